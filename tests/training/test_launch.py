"""Fine-tuning from pairs to a published encoder, killed and gone on with, in one process and on Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from curves import assert_same_curve, assert_same_weights, curve
from small_pairs import write_pairs

from recsys_ray.artifacts import Artifact, current_version, open_artifact
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.training.bge import FinetuneBgeConfig
from recsys_ray.training.launch import finetune_bge, finetune_here
from recsys_ray.training.trackers import read_curve

REPO = Path(__file__).resolve().parents[2]
TinyModel = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tiny_text_model: TinyModel) -> Path:
    return tiny_text_model(prompts={"query": "q "})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    write_pairs(root, negatives=2)
    return root


def settings_of(pairs: Path, model: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {"pairs": str(pairs), "output": str(output), "encoder": {"model": str(model), "device": "cpu",
            "dtype": "float32"}, "query_tokens": 16, "document_tokens": 32, "max_steps": 10, "epochs": 9,
            "evaluate_every": 4, "checkpoint_every": 3, "sampler": {"batch_size": 8}, "optim": {"learning_rate": 3e-3},
            "validation": {"queries": 10, "products": 20}, **changes}


@pytest.fixture(scope="module")
def uninterrupted(pairs: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    output = tmp_path_factory.mktemp("whole") / "encoder"
    return finetune_bge(FinetuneBgeConfig.model_validate(settings_of(pairs, model, output)))


def test_the_artefact_is_an_encoder_with_its_curve_and_facts(uninterrupted: Artifact, model: Path) -> None:
    facts = uninterrupted.manifest.facts
    assert (facts["steps"], facts["learning_rate"], facts["copied_token_gap"]) == (10, 3e-3, 0.05)
    assert facts["best_value"] >= facts["base_value"]
    assert facts["pairs"] == {"train": 64, "valid": 20}
    assert set(uninterrupted.manifest.parents) == {"pairs", "pair_shards"}
    lines = curve(uninterrupted)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    assert [line["step"] for line in lines if "mrr" in line] == [0, 4, 8, 10]
    assert np.mean([line["loss"] for line in lines[-4:] if "loss" in line]) < lines[1]["loss"]
    assert 0 <= facts["false_negative_share"] < 0.2
    card = (uninterrupted.path / "encoder/README.md").read_text()
    assert "64 pairs of query and product, 10 steps of 8 pairs" in card
    assert f"| {facts['best_step']} |" in card
    base = TextEncoderConfig(model=str(model), device="cpu")
    assert facts["base"] == build_text_encoder(base).identity


def test_an_artefact_root_is_a_model(uninterrupted: Artifact, model: Path) -> None:
    from sentence_transformers import SentenceTransformer

    root, folder = uninterrupted.path.parents[1], uninterrupted.path / "encoder"
    one, other = (build_text_encoder(TextEncoderConfig(model=str(path), device="cpu", dtype="float32"))
                  for path in (root, folder))
    assert one.identity == other.identity == uninterrupted.manifest.facts["encoder"]
    assert one.identity["query_prompt"] == "q "
    theirs = SentenceTransformer(str(folder), device="cpu")
    assert np.allclose(one.encode_documents(["abc d"]), theirs.encode(["abc d"]), atol=1e-5)
    assert np.allclose(one.encode_queries(["abc d"]), theirs.encode_query(["abc d"]), atol=1e-5)
    old = build_text_encoder(TextEncoderConfig(model=str(model), device="cpu", dtype="float32"))
    assert not np.allclose(one.encode_documents(["abc d"]), old.encode_documents(["abc d"]), atol=1e-3)


def test_the_same_command_again_does_nothing(uninterrupted: Artifact) -> None:
    config = FinetuneBgeConfig.model_validate(uninterrupted.manifest.config)
    assert finetune_bge(config).manifest.version == uninterrupted.manifest.version


def test_evaluations_are_reported(pairs: Path, model: Path, tmp_path: Path) -> None:
    told: list[tuple[int, float]] = []
    artifact = finetune_here(FinetuneBgeConfig.model_validate(settings_of(
        pairs, model, tmp_path / "encoder", max_steps=4, workers={"count": 3})), lambda *one: told.append(one))
    assert [step for step, _ in told] == [0, 4]
    assert max(value for _, value in told) == artifact.manifest.facts["best_value"]


@pytest.mark.parametrize("point", ["step_2", "step_7", "checkpoint_before_complete", "before_publish"])
def test_a_killed_process_goes_on_to_the_same_end(
        pairs: Path, model: Path, tmp_path: Path, uninterrupted: Artifact, point: str) -> None:
    settings = settings_of(pairs, model, tmp_path / "encoder")
    if point == "before_publish":   # of the encoder: the shards are there already
        settings["shards"] = str(uninterrupted.path.parents[1].with_name("encoder-shards"))
    killed = driver(settings, tmp_path, {"RECSYS_CRASH_AT": point})
    assert killed.wait(120) == 137, (tmp_path / "log").read_text()
    assert current_version(tmp_path / "encoder") is None
    resumed = finetune_bge(FinetuneBgeConfig.model_validate(settings))
    assert_same_curve(curve(resumed), curve(uninterrupted))
    assert_same_weights(*(one.file("encoder/model.safetensors") for one in (resumed, uninterrupted)))


def driver(settings: dict[str, Any], directory: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    path = directory / "config.yaml"
    path.write_text(json.dumps(settings))
    with (directory / "log").open("ab") as stream:
        return subprocess.Popen([sys.executable, str(REPO / "jobs/finetune_bge.py"), "--config", str(path)],
                                stdout=stream, stderr=stream, cwd=REPO,
                                env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


@pytest.mark.parametrize("changes", [
    {"encoder": {"dtype": "float16"}}, {"encoder": {"dtype": "bfloat16"}}, {"contrastive": {"mini_batch": 3}},
    {"accumulate": 2}, {"body": {"gradient_checkpointing": True, "freeze_token_embeddings": True}}])
def test_every_way_of_computing_learns(pairs: Path, model: Path, tmp_path: Path, uninterrupted: Artifact,
                                       changes: dict[str, Any]) -> None:
    settings = settings_of(pairs, model, tmp_path / "encoder", **changes)
    settings["encoder"] = {"model": str(model), "device": "cpu", "dtype": "float32", **changes.get("encoder", {})}
    settings["shards"] = str(uninterrupted.path.parents[1].with_name("encoder-shards"))
    found = [line["loss"] for line in curve(finetune_bge(FinetuneBgeConfig.model_validate(settings))) if "loss" in line]
    wanted = [line["loss"] for line in curve(uninterrupted) if "loss" in line]
    assert found[0] == pytest.approx(wanted[0], rel=0.05) or "accumulate" in changes
    assert np.mean(found[-3:]) < found[0]
    if "contrastive" in changes:    # in chunks, dropout on: the same to the last digits of float32
        assert found == pytest.approx(wanted, rel=1e-4)


def test_adapters_start_from_the_seed_and_are_merged(pairs: Path, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = {"lora": {"rank": 2, "dropout": 0.1, "modules": ["query", "value"]}}
    found = [finetune_bge(FinetuneBgeConfig.model_validate(settings_of(
        pairs, model, tmp_path / name / "encoder", body=lora, max_steps=4))) for name in ("a", "b")]
    assert curve(found[0]) == curve(found[1])
    assert found[0].manifest.facts["encoder"] == found[1].manifest.facts["encoder"]
    assert found[0].manifest.facts["encoder"] != found[0].manifest.facts["base"]
    assert not [name for name in found[0].names("encoder/") if "adapter" in name]


def test_contradictions_are_refused(pairs: Path, model: Path, tmp_path: Path) -> None:
    for changes, reason in (({"validation": {"objective": "ndcg"}}, "validation.objective"),
                            ({"workers": {"count": 9}}, r"workers\.count"),
                            ({"encoder": {"model": str(model), "sparse": True}}, "set both or neither")):
        with pytest.raises(ValueError, match=reason):
            FinetuneBgeConfig.model_validate(settings_of(pairs, model, tmp_path, **changes))
    other = FinetuneBgeConfig.model_validate(settings_of(pairs, model, tmp_path / "e",
                                                         contrastive={"similarity": "dot"}))
    with pytest.raises(ValueError, match=r"contrastive\.similarity: dot"):
        finetune_bge(other)


# --- on Ray ---------------------------------------------------------------------------------------
def on_ray(pairs: Path, model: Path, output: Path) -> dict[str, Any]:
    return settings_of(pairs, model, output, workers={"count": 2, "cpus": 0.5, "threads": 1},
                       ray={"num_cpus": 4, "progress": False})


@pytest.mark.ray
def test_two_workers_learn_what_one_learns(pairs: Path, model: Path, tmp_path: Path, uninterrupted: Artifact,
                                           local_ray: None) -> None:
    artifact = finetune_bge(FinetuneBgeConfig.model_validate(on_ray(pairs, model, tmp_path / "encoder")))
    wanted = [{name: value for name, value in line.items() if name not in ("tokens", "false_negative_share")}
              for line in curve(uninterrupted)]  # these two are of the first worker's share
    found = [{name: value for name, value in line.items() if name not in ("tokens", "false_negative_share")}
             for line in curve(artifact)]
    assert_same_curve(found, wanted, 2e-3)


@pytest.mark.ray
def test_a_killed_worker_and_a_killed_driver_change_nothing(pairs: Path, model: Path, tmp_path: Path,
                                                            local_ray: None) -> None:
    steps = {"max_steps": 60, "checkpoint_every": 5, "evaluate_every": 20}
    uninterrupted = finetune_bge(FinetuneBgeConfig.model_validate({**on_ray(pairs, model, tmp_path / "whole"),
                                                                   **steps}))
    settings = {**on_ray(pairs, model, tmp_path / "encoder"), **steps}
    running = driver(settings, tmp_path, {})
    _after_step(tmp_path, 10, running)
    next(one for one in _train_workers(running.pid)).send_signal(signal.SIGKILL)
    before = _step(tmp_path)
    _after_step(tmp_path, before + 12, running)     # the group came back and went on
    family = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGKILL)
    running.wait(30)
    psutil.wait_procs(family, timeout=60)
    assert current_version(tmp_path / "encoder") is None
    running = driver(settings, tmp_path, {})
    assert running.wait(240) == 0, (tmp_path / "log").read_text()
    resumed = open_artifact(tmp_path / "encoder", "encoder")
    assert_same_curve(curve(resumed), curve(uninterrupted))
    assert_same_weights(*(one.file("encoder/model.safetensors") for one in (resumed, uninterrupted)))
    assert "going on from step" in (tmp_path / "log").read_text() or resumed.manifest.facts["steps"] == 60


def _train_workers(driver_pid: int) -> list[psutil.Process]:
    return [one for one in psutil.Process(driver_pid).children(recursive=True) if "RayTrainWorker" in one.name()
            or any("RayTrainWorker" in part for part in one.cmdline())]


def _step(directory: Path) -> int:
    found = list((directory / "encoder" / "staging").glob("*/run/metrics.jsonl"))
    lines = read_curve(found[0]) if found else []
    return int(lines[-1]["step"]) if lines else 0


def _after_step(directory: Path, step: int, running: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + 180
    while _step(directory) < step:
        assert running.poll() is None, (directory / "log").read_text()
        assert time.monotonic() < ends, (directory / "log").read_text()
        time.sleep(0.05)
