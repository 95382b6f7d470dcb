"""Each loss against sentence-transformers' own on the same scores, and worked examples."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recsys_ray.training.ranking_losses import LOSSES, bce, in_rows, infonce, lambda_loss, listnet, ranknet


def groups(sizes: tuple[int, ...], graded: bool, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor([0.0, 0.01, 0.1, 1.0] if graded else [0.0, 1.0])
    scores = [3 * torch.randn(size, generator=generator) for size in sizes]
    labels = [levels[torch.randint(len(levels), (size,), generator=generator)] for size in sizes]
    for one in labels:
        one[0], one[1] = 1.0, 0.0   # something to tell apart in every list
    return scores, labels


def matrices(scores: list[Tensor], labels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    sizes = [len(one) for one in scores]
    return (in_rows(torch.cat(scores), sizes), in_rows(torch.cat(labels), sizes),
            in_rows(torch.ones(sum(sizes), dtype=torch.bool), sizes))


def scored(scores: Tensor) -> Any:
    """A cross-encoder for their losses that gives scores chosen before, in order."""
    from sentence_transformers import CrossEncoder

    class Scored(CrossEncoder):
        num_labels = 1
        device = torch.device("cpu")

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.taken = 0

        def preprocess(self, pairs: list[Any], **_: Any) -> dict[str, Any]:
            return {"count": len(pairs)}

        def forward(self, features: dict[str, Any]) -> dict[str, Tensor]:
            start, self.taken = self.taken, self.taken + features["count"]
            return {"scores": scores[start:self.taken, None]}

    return Scored()


def theirs(name: str, scores: list[Tensor], labels: list[Tensor]) -> Tensor:
    from sentence_transformers.cross_encoder import losses

    model = scored(torch.cat(scores))
    inputs: Any = [["q"] * len(scores), [["d"] * len(one) for one in scores]]
    if name == "bce":
        count = sum(map(len, scores))
        found: Tensor = losses.BinaryCrossEntropyLoss(model)([["q"] * count, ["d"] * count], torch.cat(labels))
        return found
    kind = {"lambda": losses.LambdaLoss, "listnet": losses.ListNetLoss, "ranknet": losses.RankNetLoss}[name]
    found = kind(model)(inputs, labels)
    return found


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("name", ["bce", "lambda", "listnet", "ranknet"])
@pytest.mark.parametrize("seed", range(3))
def test_a_list_costs_what_sentence_transformers_says(name: str, graded: bool, seed: int) -> None:
    scores, labels = groups((7,), graded, seed)
    own = [one.clone().requires_grad_() for one in scores]
    other = [one.clone().requires_grad_() for one in scores]
    loss = LOSSES[name](*matrices(own, labels)).mean()
    wanted = theirs(name, other, labels)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    loss.backward()
    wanted.backward()
    assert torch.allclose(own[0].grad, other[0].grad, rtol=1e-4, atol=1e-7)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_is_its_lists_one_by_one(name: str) -> None:
    scores, labels = groups((3, 9, 2, 5), True, 1)
    together = LOSSES[name](*matrices(scores, labels))
    alone = torch.cat([LOSSES[name](*matrices([one], [wanted])) for one, wanted in zip(scores, labels, strict=True)])
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    scores, labels = groups((4, 3), True, 2)
    scores_GL, labels_GL, real_GL = (one.double() if one.is_floating_point() else one
                                     for one in matrices(scores, labels))
    assert torch.autograd.gradcheck(lambda values: LOSSES[name](values, labels_GL, real_GL),
                                    (scores_GL.requires_grad_(),))


@pytest.mark.parametrize("name", ["lambda", "ranknet", "infonce"])
def test_a_list_without_order_teaches_nothing(name: str) -> None:
    scores = torch.randn(1, 4, requires_grad=True)
    loss = LOSSES[name](scores, torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool))
    loss.sum().backward()
    assert loss.item() == 0
    assert scores.grad is not None
    assert not scores.grad.any()


def test_infonce_by_hand() -> None:
    # positives 2 and 1, negatives 0 and -1: log(1 + e^-2 + e^-3) and log(1 + e^-1 + e^-2), meeting no positive
    scores, labels = torch.tensor([[2.0, 0.0, 1.0, -1.0]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    wanted = (math.log(1 + math.exp(-2) + math.exp(-3)) + math.log(1 + math.exp(-1) + math.exp(-2))) / 2
    assert infonce(scores, labels, torch.ones_like(scores, dtype=torch.bool)).item() == pytest.approx(wanted)
    one = labels * torch.tensor([[1.0, 1.0, 0.0, 1.0]])     # one positive: softmax cross-entropy over the list
    assert infonce(scores, one, torch.ones_like(scores, dtype=torch.bool)).item() == pytest.approx(
        torch.nn.functional.cross_entropy(scores, torch.tensor([0])).item())


def test_a_better_order_costs_less() -> None:
    labels, real = torch.tensor([[1.0, 0.0, 0.0]]), torch.ones(1, 3, dtype=torch.bool)
    for loss in (bce, lambda_loss, listnet, ranknet, infonce):
        good, bad = (loss(torch.tensor([one]), labels, real).item() for one in ([2.0, -1.0, -1.0], [-1.0, 2.0, -1.0]))
        assert good < bad, SimpleNamespace(loss=loss, good=good, bad=bad)
