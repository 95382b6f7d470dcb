"""The sequence model's loss and its runs, in one process and on Ray."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from curves import ROUNDING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ranking"))
from small_histories import COLD, ITEMS, write_embeddings, write_prepared, write_reranker_histories

from recsys_ray.artifacts import Artifact
from recsys_ray.training.sequence import (
    FinetuneSequenceConfig,
    finetune_sequence,
    open_sequence_model,
    sampled_softmax,
    text_vectors,
)
from recsys_ray.training.trackers import read_curve


def settings(root: Path, source: str = "reranker_pairs", **changes: Any) -> FinetuneSequenceConfig:
    return FinetuneSequenceConfig.model_validate({
        "histories": {"format": source, "path": root / source}, "embeddings": root / "embeddings",
        "output": root / "sequence", "model": {"dimension": 16, "layers": 1, "dropout": 0.0}, "batch_size": 16,
        "negatives": 32, "max_steps": 40, "epochs": 99, "evaluate_every": 20,
        "optim": {"learning_rate": 1e-2}, **changes})


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("books")
    write_reranker_histories(root / "reranker_pairs")
    write_embeddings(root / "embeddings")
    return root


@pytest.fixture(scope="module")
def trained(books: Path) -> Artifact:
    return finetune_sequence(settings(books))


def test_the_sampled_loss_is_the_full_one_when_everything_is_drawn_as_often_as_expected() -> None:
    """Items drawn in proportion to their chance: the corrected sampled softmax equals the full softmax.

    Four items of chance 1/8, 1/8, 1/4, 1/2, drawn 1, 1, 2 and 4 times: each drawn copy weighs exp(logit) / expected,
    so the copies of an item sum to exp(logit). The target's own copies are left out and it enters once with
    exp(logit) / expected: it must be drawn once for equality, so the targets are the items drawn once.
    """
    torch.manual_seed(0)
    states, vectors, biases = torch.randn(2, 5), torch.randn(4, 5), torch.randn(4)
    chance, drawn = torch.tensor([1, 1, 2, 4]) / 8, torch.tensor([0, 1, 2, 2, 3, 3, 3, 3])
    targets = torch.tensor([0, 1])
    found = sampled_softmax(states, (vectors[targets], biases[targets]), (vectors[drawn], biases[drawn]), targets,
                            drawn, chance)
    logits = states @ vectors.T + biases
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))


def test_training_finds_the_tastes_and_places_cold_items_by_their_text(trained: Artifact) -> None:
    facts = trained.manifest.facts
    assert facts["best_value"] > facts["base_value"] + 0.1
    assert facts["cold_items"] == len(COLD)
    model = open_sequence_model(trained)
    for history, liked, other in ((["i02", "i04", "i08"], "i22", "i23"), (["i03", "i05", "i09"], "i23", "i22")):
        ids, scores = model.recommend(history, len(ITEMS))
        by_item = dict(zip(ids, scores, strict=True))
        assert by_item[liked] > by_item[other]      # both unknown to training, told apart by text


def test_a_finished_run_is_not_repeated_and_the_same_run_gives_the_same_curve(trained: Artifact, books: Path) -> None:
    assert finetune_sequence(settings(books)).manifest.version == trained.manifest.version
    again = finetune_sequence(settings(books, output=books / "again"))
    curves = [[line["loss"] for line in read_curve(one.file("metrics.jsonl")) if "loss" in line]
              for one in (trained, again)]
    assert curves[0] == pytest.approx(curves[1], rel=ROUNDING)
    assert np.mean(curves[0][-5:]) < np.mean(curves[0][:5])


def test_a_shop_with_times_keeps_the_order(tmp_path: Path) -> None:
    write_prepared(tmp_path / "prepared")
    write_embeddings(tmp_path / "embeddings")
    found = finetune_sequence(settings(tmp_path, "prepared", max_steps=5))
    assert found.manifest.facts["timed"]
    assert open_sequence_model(found).model.config.ordered


def test_items_without_an_embedding_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 items have no embedding, .* i99"):
        text_vectors(write_embeddings(tmp_path), (*ITEMS, "i99"))


@pytest.mark.ray
def test_two_workers_compute_the_batch_together(books: Path, local_ray: None) -> None:
    found = finetune_sequence(settings(books, output=books / "two", max_steps=10, evaluate_every=10,
                                       workers={"count": 2, "threads": 1}))
    assert found.manifest.facts["steps"] == 10
    losses = [line["loss"] for line in read_curve(found.file("metrics.jsonl")) if "loss" in line]
    assert losses[-1] < losses[0]
