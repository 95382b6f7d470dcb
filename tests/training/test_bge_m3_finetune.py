"""Fine-tuning with BGE-M3's heads, from pairs to an encoder that gives all three: new heads and known ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bge_m3_cases import train
from contrastive_cases import start_workers
from curves import assert_same_curve, assert_same_weights, curve
from small_pairs import write_pairs

from recsys_ray.artifacts import Artifact, current_version
from recsys_ray.models.bge_m3 import BgeM3, BgeM3Encoder
from recsys_ray.models.bge_m3_heads import BgeM3Heads
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.models.trainable_bert import TrainableConfig
from recsys_ray.training.bge import FinetuneBgeConfig
from recsys_ray.training.bge_m3_task import fit_rarity
from recsys_ray.training.launch import finetune_bge
from recsys_ray.training.pair_shards import open_pair_shards
from recsys_ray.training.trackers import read_curve

REPO = Path(__file__).resolve().parents[2]
TinyModel = Callable[..., Path]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    write_pairs(root, negatives=2)
    return root


@pytest.fixture(scope="module")
def bare(tiny_text_model: TinyModel) -> Path:
    """What MiniLM is: a BERT pooled by its mean, without heads."""
    return tiny_text_model(body="bert", pooling="mean")


@pytest.fixture(scope="module")
def whole(tiny_text_model: TinyModel) -> Path:
    """What BGE-M3 is: an XLM-RoBERTa pooled by its first token, with both heads."""
    root = tiny_text_model(body="xlm-roberta", pooling="cls")
    torch.manual_seed(4)
    BgeM3Heads.new(32, 12).save(root)
    return root


def settings_of(pairs: Path, model: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {"pairs": str(pairs), "output": str(output), "encoder": {"model": str(model), "device": "cpu",
            "dtype": "float32", "sparse": True, "multi_vector": True}, "query_tokens": 16, "document_tokens": 32,
            "max_steps": 9, "epochs": 9, "evaluate_every": 4, "checkpoint_every": 3, "sampler": {"batch_size": 8},
            "optim": {"learning_rate": 3e-3}, "validation": {"queries": 10, "products": 20},
            "heads": {"multi_dimension": 8}, **changes}


def finetuned(settings: dict[str, Any]) -> Artifact:
    return finetune_bge(FinetuneBgeConfig.model_validate(settings))


@pytest.fixture(scope="module")
def uninterrupted(pairs: Path, bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return finetuned(settings_of(pairs, bare, tmp_path_factory.mktemp("whole") / "encoder"))


def test_a_base_without_heads_becomes_an_encoder_with_them(uninterrupted: Artifact, bare: Path) -> None:
    assert {"encoder/sparse_linear.pt", "encoder/colbert_linear.pt"} <= set(uninterrupted.names("encoder/"))
    facts, lines = uninterrupted.manifest.facts, curve(uninterrupted)
    encoder = build_text_encoder(TextEncoderConfig(model=str(uninterrupted.path.parents[1]), device="cpu",
                                                   dtype="float32", sparse=True, multi_vector=True))
    assert isinstance(encoder, BgeM3Encoder)
    assert encoder.identity == facts["encoder"]
    assert facts["encoder"]["multi_vector_dimension"] == 8
    assert facts["base"] == build_text_encoder(TextEncoderConfig(model=str(bare), device="cpu")).identity
    signals = encoder.encode_all_documents(["abc def", "xyz"]).signals
    assert signals.sparse is not None
    assert signals.sparse.weights.max() > 0
    assert signals.multi is not None
    assert signals.multi.vectors.shape[1] == 8
    evaluations = [line for line in lines if "mrr" in line]
    assert set(evaluations[0]) >= {"recall@1", "mrr_dense", "mrr_sparse", "mrr_multi"}
    assert facts["best_value"] == max(line["mrr"] for line in evaluations)
    steps = [line for line in lines if "loss" in line]
    assert set(steps[0]) >= {"loss_dense", "loss_sparse", "loss_multi", "loss_ensemble", "loss_distil_multi"}
    assert np.mean([line["loss"] for line in steps[-3:]]) < steps[0]["loss"]
    assert "token weights and token vectors" in (uninterrupted.path / "encoder/README.md").read_text()


def test_known_heads_are_trained_further(pairs: Path, whole: Path, tmp_path: Path) -> None:
    artifact = finetuned(settings_of(pairs, whole, tmp_path / "encoder", heads={}))
    facts = artifact.manifest.facts
    for key in ("weights_sha256", "sparse_sha256", "multi_vector_sha256"):
        assert facts["encoder"][key] != facts["base"][key]
    assert facts["encoder"]["multi_vector_dimension"] == 12
    with pytest.raises(ValueError, match=r"heads\.multi_dimension: 8, but .* token vectors of 12"):
        finetuned(settings_of(pairs, whole, tmp_path / "other"))


@pytest.mark.parametrize("changes", [{"contrastive": {"mini_batch": 3}}, {"encoder": {"dtype": "bfloat16"}}])
def test_other_ways_of_computing_give_about_the_same_curve(pairs: Path, bare: Path, tmp_path: Path,
                                                           uninterrupted: Artifact, changes: dict[str, Any]) -> None:
    settings = settings_of(pairs, bare, tmp_path / "encoder", max_steps=3)
    settings |= {name: {**settings.get(name, {}), **values} for name, values in changes.items()}
    found = [line["loss"] for line in curve(finetuned(settings)) if "loss" in line]
    wanted = [line["loss"] for line in curve(finetuned(settings_of(pairs, bare, tmp_path / "plain", max_steps=3)))
              if "loss" in line]
    assert found == pytest.approx(wanted, rel=1e-4 if "contrastive" in changes else 0.1)


def test_a_killed_run_goes_on_as_if_it_had_not_been(pairs: Path, bare: Path, tmp_path: Path,
                                                    uninterrupted: Artifact) -> None:
    settings = settings_of(pairs, bare, tmp_path / "encoder")
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings))
    killed = subprocess.run([sys.executable, str(REPO / "jobs/finetune_bge.py"), "--config", str(path)], cwd=REPO,
                            check=False, capture_output=True, timeout=120,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "RECSYS_CRASH_AT": "step_5"})
    assert killed.returncode != 0, killed.stderr
    assert not list((tmp_path / "encoder").glob("versions/*"))
    resumed = finetuned(settings)
    assert_same_curve(curve(resumed), curve(uninterrupted))
    assert_same_weights(*(one.file("encoder/model.safetensors") for one in (resumed, uninterrupted)))


def test_plain_and_whole_trainings_share_their_tokens(uninterrupted: Artifact, pairs: Path, bare: Path) -> None:
    one = FinetuneBgeConfig.model_validate(uninterrupted.manifest.config)
    plain = one.replace(encoder=one.encoder.replace(sparse=False, multi_vector=False))
    assert one.shard_settings() == plain.shard_settings()
    assert one.key("f") != plain.key("f")
    assert plain.key("f") == plain.replace(heads={"multi_dimension": 5}).key("f")


def test_token_weights_begin_as_the_rarity_of_words(uninterrupted: Artifact, bare: Path) -> None:
    train = open_pair_shards(uninterrupted.path.parents[1].with_name("encoder-shards"))
    model = BgeM3.load(TrainableConfig(model=str(bare), device="cpu", dtype="float32"), new_heads=8)
    fit_rarity(model, train, seed=1)
    texts, rows = train.documents_of(np.arange(len(train)))
    texts = [texts[place] for place in np.unique(rows, return_index=True)[1]]
    with torch.no_grad():
        states = model.eval()(texts)
    weights = states.weights.numpy()[~np.isin(states.token_ids, model.special_ids)]
    tokens = states.token_ids[~np.isin(states.token_ids, model.special_ids)]
    holds = {token: sum(token in text for text in texts) for token in np.unique(tokens)}
    rarity = np.array([np.log1p((len(texts) - holds[token] + 0.5) / (holds[token] + 0.5)) for token in tokens])
    assert (weights > 0).mean() > 0.95
    assert np.corrcoef(weights, rarity)[0, 1] > 0.5
    norms = [np.sqrt(sum(max(weights[np.flatnonzero(tokens == token)]) ** 2 for token in np.setdiff1d(
        text, model.special_ids))) for text in texts]
    assert 0.7 < np.mean(norms) < 1.3


@pytest.mark.parametrize(("changes", "reason"), [
    ({"encoder": {"model": "x", "sparse": True}}, "set both or neither"),
    ({"contrastive": {"symmetric": True}}, r"contrastive\.symmetric: is for plain vectors"),
    ({"contrastive": {"similarity": "dot"}}, r"contrastive\.similarity: is for plain vectors")])
def test_what_heads_cannot_learn_from_is_refused(pairs: Path, bare: Path, tmp_path: Path, changes: dict[str, Any],
                                                 reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FinetuneBgeConfig.model_validate(settings_of(pairs, bare, tmp_path, **changes))


def test_two_workers_learn_what_one_learns(pairs: Path, bare: Path, tmp_path: Path, uninterrupted: Artifact) -> None:
    shards = uninterrupted.path.parents[1].with_name("encoder-shards")
    settings = settings_of(pairs, bare, tmp_path / "encoder", shards=str(shards), workers={"count": 2, "threads": 1})
    start_workers(partial(train, settings, str(tmp_path), current_version(shards)), 2, tmp_path)
    found = read_curve(tmp_path / "metrics.jsonl")
    assert (tmp_path / "encoder/sparse_linear.pt").is_file()
    for one, other in zip(found, curve(uninterrupted), strict=True):
        for name in set(other) - {"tokens", "false_negative_share"}:    # of the first worker's share
            rounding = 0.02 if "mrr" in name else 2e-3  # a rank is a whole number: two products may change places
            assert one[name] == pytest.approx(other[name], rel=2e-3, abs=rounding), (name, one["step"])
