"""Fine-tuning of a cross-encoder from lists to a published folder, killed and gone on with, here and on Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from curves import assert_same_curve, assert_same_weights, curve

from recsys_ray.artifacts import Artifact, current_version, stage
from recsys_ray.config import Config
from recsys_ray.models.cross_encoder import CrossEncoder, CrossEncoderConfig
from recsys_ray.schema import RERANKER_PAIR
from recsys_ray.training.cross_encoder import FinetuneCrossEncoderConfig, draw_lists, list_figures
from recsys_ray.training.cross_encoder_run import finetune_cross_encoder, finetune_here
from recsys_ray.training.reranker_groups import RerankerGroups, read_groups

REPO = Path(__file__).resolve().parents[2]
TinyModel = Callable[..., Path]
LETTERS = list("abcdefgh")


def pair_rows(users: int, split: str, seed: int = 0) -> list[dict[str, Any]]:
    """A user likes a letter, and the texts that are made of it: two of them among six."""
    random = np.random.default_rng([seed, len(split)])
    rows = []
    for user in range(users):
        liked, *others = random.permutation(LETTERS)[:5].tolist()
        for number, letter in enumerate([liked, liked, *others]):
            rows.append({"query_id": f"{split}-{seed}-{user}", "query": f"likes {liked} {user}",
                         "product_id": f"{letter}{number}", "text": " ".join([letter] * (2 + number)),
                         "label": float(letter == liked), "split": split,
                         "origin": "positive" if letter == liked else "uniform"})
    return rows


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    with stage(root, "reranker_pairs", "f") as staging:
        files = [staging.write_table(f"pairs/{split}/bucket-{number:05d}.parquet",
                                     pa.Table.from_pylist(pair_rows(users, split, number), schema=RERANKER_PAIR))
                 for split, users in (("train", 24), ("valid", 10)) for number in range(2)]
        staging.commit(files, config=Config())
    return root


@pytest.fixture(scope="module")
def model(tiny_text_model: TinyModel) -> Path:
    return tiny_text_model()


def settings_of(pairs: Path, model: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {"pairs": str(pairs), "output": str(output), "model": str(model), "dtype": "float32", "device": "cpu",
            "max_tokens": 48, "max_steps": 10, "epochs": 9, "evaluate_every": 4, "checkpoint_every": 3,
            "sampler": {"batch_groups": 8}, "optim": {"learning_rate": 3e-3}, "validation": {"queries": 15}, **changes}


@pytest.fixture(scope="module")
def uninterrupted(pairs: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    output = tmp_path_factory.mktemp("whole") / "cross-encoder"
    return finetune_cross_encoder(FinetuneCrossEncoderConfig.model_validate(settings_of(pairs, model, output)))


def test_the_artefact_is_a_cross_encoder_with_its_curve_and_facts(uninterrupted: Artifact) -> None:
    from sentence_transformers import CrossEncoder as TheirCrossEncoder

    facts = uninterrupted.manifest.facts
    assert (facts["steps"], facts["loss"], facts["lists"]) == (10, "bce", 48)
    assert facts["pairs"] == {"train": 288, "valid": 120}
    assert facts["best_value"] >= facts["base_value"]
    lines = curve(uninterrupted)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    assert [line["step"] for line in lines if "nDCG@10" in line] == [0, 4, 8, 10]
    folder = uninterrupted.path / "cross_encoder"
    card = (folder / "README.md").read_text()
    assert "288 pairs in 48 lists, 10 steps of 8 lists" in card
    assert f"| {facts['best_step']} |" in card
    queries, texts = ["likes a 1", "likes b 2"], ["a a a", "c c"]
    ours = CrossEncoder(CrossEncoderConfig(model=str(uninterrupted.path.parents[1]), device="cpu", dtype="float32"))
    theirs = TheirCrossEncoder(str(folder), device="cpu", local_files_only=True)
    assert np.allclose(ours.score(queries, texts),
                       theirs.predict(list(zip(queries, texts, strict=True)), show_progress_bar=False), atol=2e-5)
    assert ours.identity == facts["cross_encoder"]


@pytest.mark.parametrize("loss", ["bce", "lambda", "listnet", "ranknet", "infonce"])
def test_every_loss_learns_to_rank(pairs: Path, model: Path, tmp_path: Path, loss: str) -> None:
    settings = settings_of(pairs, model, tmp_path / "model", loss=loss, max_steps=60, evaluate_every=20,
                           checkpoint_every=100)
    facts = finetune_here(FinetuneCrossEncoderConfig.model_validate(settings)).manifest.facts
    assert facts["best_value"] > max(0.75, facts["base_value"])


@pytest.mark.parametrize("changes", [{"sampler": {"batch_groups": 8, "pass_tokens": 40}}, {"dtype": "bfloat16"},
                                     {"body": {"gradient_checkpointing": True, "freeze_token_embeddings": True}}])
def test_every_way_of_computing_gives_the_same_first_loss(
        pairs: Path, model: Path, tmp_path: Path, uninterrupted: Artifact, changes: dict[str, Any]) -> None:
    settings = settings_of(pairs, model, tmp_path / "model", max_steps=4, epochs=9, **changes)
    found = [line["loss"] for line in curve(finetune_here(FinetuneCrossEncoderConfig.model_validate(settings)))
             if "loss" in line]
    wanted = next(line["loss"] for line in curve(uninterrupted) if "loss" in line)
    assert found[0] == pytest.approx(wanted, rel=0.05 if "dtype" in changes else 1e-5)


def test_passes_add_up_to_the_gradient_of_the_batch(pairs: Path, model: Path, tmp_path: Path) -> None:
    curves = []
    for name, tokens in (("one", 1 << 20), ("many", 40)):
        settings = settings_of(pairs, model, tmp_path / name, loss="lambda",
                               sampler={"batch_groups": 8, "pass_tokens": tokens})
        curves.append(curve(finetune_here(FinetuneCrossEncoderConfig.model_validate(settings))))
    for one, other in zip(*curves, strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("point", ["step_2", "step_7", "checkpoint_before_complete", "before_publish"])
def test_a_killed_process_goes_on_to_the_same_end(
        pairs: Path, model: Path, tmp_path: Path, uninterrupted: Artifact, point: str) -> None:
    settings = settings_of(pairs, model, tmp_path / "model")
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings))
    killed = subprocess.run([sys.executable, str(REPO / "jobs/finetune_cross_encoder.py"), "--config", str(path)],
                            capture_output=True, cwd=REPO, check=False,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "RECSYS_CRASH_AT": point})
    assert killed.returncode == 137, killed.stderr.decode()
    assert current_version(tmp_path / "model") is None
    resumed = finetune_cross_encoder(FinetuneCrossEncoderConfig.model_validate(settings))
    assert_same_curve(curve(resumed), curve(uninterrupted))
    assert_same_weights(*(one.file("cross_encoder/model.safetensors") for one in (resumed, uninterrupted)))


def test_the_same_command_again_does_nothing(uninterrupted: Artifact) -> None:
    config = FinetuneCrossEncoderConfig.model_validate(uninterrupted.manifest.config)
    assert finetune_cross_encoder(config).manifest.version == uninterrupted.manifest.version


@pytest.mark.ray
def test_two_workers_learn_what_one_learns(pairs: Path, model: Path, tmp_path: Path, uninterrupted: Artifact,
                                           local_ray: None) -> None:
    settings = settings_of(pairs, model, tmp_path / "model", workers={"count": 2, "cpus": 0.5, "threads": 1},
                           ray={"num_cpus": 4, "progress": False})
    found = curve(finetune_cross_encoder(FinetuneCrossEncoderConfig.model_validate(settings)))
    for one, other in zip(found, curve(uninterrupted), strict=True):
        assert {name: value for name, value in one.items() if name != "tokens"} == pytest.approx(
            {name: value for name, value in other.items() if name != "tokens"}, rel=2e-3, abs=2e-3)


# --- lists ----------------------------------------------------------------------------------------
def test_lists_are_runs_of_one_query(pairs: Path) -> None:
    from recsys_ray.artifacts import open_artifact

    train = read_groups(open_artifact(pairs, "reranker_pairs"), "train")
    assert (len(train), train.num_rows) == (48, 288)
    assert all(set(group.labels) == {0.0, 1.0} and len(group.texts) == 6 for group in train.groups(range(48)))
    assert len(read_groups(open_artifact(pairs, "reranker_pairs"), "test")) == 0
    rows = pa.Table.from_pylist([{"query_id": user, "query": query, "text": "t", "label": 0.0}
                                 for user, query in (("a", "x"), ("a", "x"), ("a", "y"), ("b", "y"), ("b", "y"))])
    groups = RerankerGroups(rows)
    assert groups.sizes.tolist() == [2, 1, 2]
    assert [(one.query_id, one.query) for one in groups.groups(range(3))] == [("a", "x"), ("a", "y"), ("b", "y")]
    assert {one.query_id for one in draw_lists(groups, 1, 0)} in ({"a"}, {"b"})


def test_figures_are_of_queries_and_ties_count_against_them() -> None:
    # "a": best second of two, 1/log2(3) = 0.6309; "b": a tie of good and bad, the bad one counts first: the same
    figures = list_figures(["b", "b", "a", "a"], np.array([1.0, 0.0, 0.0, 1.0]), np.array([0.5, 0.5, 2.0, 1.0]),
                           ["nDCG@10", "MAP"])
    assert figures["nDCG@10"] == pytest.approx(1 / np.log2(3))
    assert figures["MAP"] == pytest.approx(0.5)


def test_contradictions_are_refused(pairs: Path, model: Path, tmp_path: Path) -> None:
    for changes, reason in (({"validation": {"objective": "MRR"}}, "objective"), ({"workers": {"count": 9}}, "workers"),
                            ({"loss": "hinge"}, "loss")):
        with pytest.raises(ValueError, match=reason):
            FinetuneCrossEncoderConfig.model_validate(settings_of(pairs, model, tmp_path, **changes))
