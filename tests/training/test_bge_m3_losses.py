"""BGE-M3's scores and loss against loops over texts and tokens, with gradients."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from bge_m3_cases import SPECIAL, Lookup, a_model, whole_batch, work
from contrastive_cases import start_workers

from recsys_ray.models.bge_m3 import BgeM3, TokenStates
from recsys_ray.models.bge_m3_heads import BgeM3Heads
from recsys_ray.training import bge_m3
from recsys_ray.training.bge_m3 import (
    BgeM3LossConfig,
    Scores,
    bge_m3_backward,
    bge_m3_loss,
    scores,
    self_distillation,
)
from recsys_ray.training.contrastive import ContrastiveConfig


def states(seed: int, texts: int, longest: int = 9, double: bool = True) -> TokenStates:
    """Random states whose texts share, repeat and lack tokens; the shortest have special tokens only."""
    rng = np.random.default_rng(seed)
    ids = [np.array([0, *rng.integers(3, 12, size), 2]) for size in rng.integers(0, longest, texts)]
    lengths = [len(one) for one in ids]
    tokens = np.concatenate(ids)
    generator = torch.Generator().manual_seed(seed)
    kind = torch.float64 if double else torch.float32
    dense = F.normalize(torch.randn(texts, 6, generator=generator, dtype=kind), dim=-1).requires_grad_()
    weights = torch.rand(len(tokens), generator=generator, dtype=kind)
    weights = (weights * torch.from_numpy(~np.isin(tokens, SPECIAL))).requires_grad_()
    multi = F.normalize(torch.randn(len(tokens) - texts, 5, generator=generator, dtype=kind), dim=-1).requires_grad_()
    return TokenStates(dense, weights, tokens, lengths, multi, [length - 1 for length in lengths])


def looped(queries: TokenStates, documents: TokenStates) -> Scores:
    def cut(one: TokenStates) -> list[tuple[dict[int, torch.Tensor], torch.Tensor]]:
        found, start, multi_start = [], 0, 0
        for length, multi_length in zip(one.lengths, one.multi_lengths, strict=True):
            words: dict[int, torch.Tensor] = {}
            for place in range(start, start + length):
                token = int(one.token_ids[place])
                if token not in SPECIAL and (token not in words or one.weights[place] > words[token]):
                    words[token] = one.weights[place]
            found.append((words, one.multi[multi_start:multi_start + multi_length]))
            start, multi_start = start + length, multi_start + multi_length
        return found

    zero = queries.dense.sum() * 0
    rows = [[(sum((words[t] * other[t] for t in words if t in other), zero),
              torch.stack([max((q @ d for d in vectors), key=lambda cell: cell.item()) for q in own]).mean())
             for other, vectors in cut(documents)] for words, own in cut(queries)]
    return Scores(torch.stack([documents.dense @ one for one in queries.dense]),
                  torch.stack([torch.stack([cell[0] for cell in row]) for row in rows]),
                  torch.stack([torch.stack([cell[1] for cell in row]) for row in rows]))


def gradients(found: Scores, *of: TokenStates) -> list[torch.Tensor]:
    leaves = [leaf for one in of for leaf in (one.dense, one.weights, one.multi)]
    weight = torch.linspace(-1, 2, found.dense.numel(), dtype=found.dense.dtype).view_as(found.dense)
    total = ((found.dense + 3 * found.sparse ** 2 + found.multi ** 3) * weight).sum()
    return list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("cells", [1, 1 << 24])
def test_scores_and_gradients_equal_loops(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bge_m3, "SIMILARITY_CELLS", cells)
    queries, documents = states(1, 5), states(2, 7)
    found, expected = scores(queries, documents), looped(queries, documents)
    for name in ("dense", "sparse", "multi"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-12)
    for one, other in zip(gradients(found, queries, documents), gradients(expected, queries, documents), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert (expected.sparse > 0).sum() > 10


def test_texts_without_a_shared_token_score_zero() -> None:
    one = states(1, 3, longest=1)       # special tokens only
    assert scores(one, states(2, 4)).sparse.tolist() == [[0.0] * 4] * 3


def hand_loss(found: Scores, positive: list[int], allowed: np.ndarray, config: BgeM3LossConfig,
              temperature: float) -> float:
    def rows(score: torch.Tensor) -> list[dict[int, float]]:
        logs = []
        for number, row in enumerate(score.tolist()):
            kept = {c: value / temperature for c, value in enumerate(row) if allowed[number, c]}
            total = math.log(sum(math.exp(value) for value in kept.values()))
            logs.append({c: value - total for c, value in kept.items()})
        return logs

    single = (found.dense, found.sparse, found.multi)
    ensemble = sum(w * s for w, s in zip(config.ensemble, single, strict=True))
    plain = [-np.mean([row[p] for row, p in zip(rows(s), positive, strict=True)]) for s in (*single, ensemble)]
    loss = (sum(w * one for w, one in zip(config.losses, plain, strict=False)) + plain[3]) / 4
    if not config.self_distillation:
        return float(loss)
    taught = [-np.mean([sum(math.exp(t[c]) * s[c] for c in t) for t, s in zip(rows(ensemble), rows(x), strict=True)])
              for x in single]
    return float((loss + sum(w * one for w, one in zip(config.losses, taught, strict=True)) / 3) / 2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("distil", [False, True])
def test_the_loss_is_the_papers_sum(masked: bool, distil: bool) -> None:
    found, positive = scores(states(3, 4), states(4, 6)), [2, 0, 5, 1]
    allowed = np.ones((4, 6), dtype=bool)
    if masked:
        allowed[0, 0] = allowed[1, 1:5] = allowed[3, 5] = False
    config = BgeM3LossConfig(ensemble=(1, 0.5, 2), losses=(1, 0.2, 0.7), self_distillation=distil)
    loss, parts = bge_m3_loss(found, torch.tensor(positive), config, 0.3,
                              torch.from_numpy(allowed) if masked else None)
    assert loss.item() == pytest.approx(hand_loss(found, positive, allowed, config, 0.3), abs=1e-10)
    assert set(parts) == {"dense", "sparse", "multi", "ensemble"} | (
        {"distil_dense", "distil_sparse", "distil_multi"} if distil else set())


def test_distillation_teaches_the_parts_and_not_the_ensemble() -> None:
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    allowed = torch.ones(3, 4, dtype=torch.bool)
    allowed[0, 1] = False
    self_distillation(student, teacher, 0.5, allowed).backward()
    assert teacher.grad is None
    assert student.grad is not None
    expected = (torch.softmax((student / 0.5).masked_fill(~allowed, -torch.inf), -1)
                - torch.softmax((teacher / 0.5).masked_fill(~allowed, -torch.inf), -1)) / 0.5 / 3
    torch.testing.assert_close(student.grad, expected.detach())
    same = torch.randn(3, 4)
    entropy = -(torch.softmax(same, -1) * torch.log_softmax(same, -1)).sum(-1).mean()
    assert float(self_distillation(same, same, 1.0)) == pytest.approx(float(entropy))


def test_a_model_learns_all_three_scores() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(5)
    model = BgeM3(Lookup(), BgeM3Heads.new(8, 4), SPECIAL)
    queries = [np.array([0, *rng.integers(3, 12, size), 2], np.int32) for size in (1, 3, 2, 5)]
    documents = [np.array([0, *query[1:-1], 4, 2], np.int32) for query in queries]
    found = model(documents)
    assert found.weights[np.isin(found.token_ids, SPECIAL)].abs().max() == 0
    assert found.dense.shape == (4, 8)
    assert found.multi.shape == (sum(map(len, documents)) - 4, 4)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    losses = []
    for _ in range(60):
        loss, _ = bge_m3_loss(scores(model(queries), model(documents)), torch.arange(4), BgeM3LossConfig(), 0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert losses[-1] < 0.5 * losses[0]


ALLOWED = [[1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1, 1],
           [1, 1, 1, 0, 1, 1, 1]]


def test_a_step_is_the_loss_of_all_allowed_documents() -> None:
    model, batch = a_model(), whole_batch()
    found = scores(model(batch.query_tokens), model(batch.document_tokens))
    loss, parts = bge_m3_loss(found, torch.arange(5), BgeM3LossConfig(), 0.1, torch.tensor(ALLOWED, dtype=torch.bool))
    (3 * loss).backward()
    wanted = [one.grad.clone() for one in model.parameters() if one.grad is not None]
    model.zero_grad()
    values, of_parts = bge_m3_backward(model, batch, BgeM3LossConfig(), ContrastiveConfig(temperature=0.1), scale=3)
    assert values.loss == pytest.approx(float(loss.detach()), abs=1e-12)
    assert of_parts == pytest.approx(parts, abs=1e-12)
    assert values.masked_share == pytest.approx(5 / 30)
    ensemble = found.ensemble((1.0, 0.3, 1.0)).detach().masked_fill(~torch.tensor(ALLOWED, dtype=torch.bool), -9)
    assert values.accuracy == pytest.approx(float((ensemble.argmax(dim=1) == torch.arange(5)).double().mean()))
    for one, other in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(one.grad, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mini_batch", [1, 3, 100])
def test_a_cached_step_equals_the_plain_one(mini_batch: int) -> None:
    model, found = a_model(), []
    for size in (None, mini_batch):
        model.zero_grad()
        values = bge_m3_backward(model, whole_batch(), BgeM3LossConfig(), ContrastiveConfig(mini_batch=size))
        found.append((values, [one.grad.clone() for one in model.parameters() if one.grad is not None]))
    assert found[0][0][0].loss == pytest.approx(found[1][0][0].loss, abs=1e-12)
    assert found[0][0][1] == pytest.approx(found[1][0][1], abs=1e-12)
    assert len(found[0][1]) == len(list(model.parameters()))
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_two_workers_take_the_step_of_one(tmp_path: Path) -> None:
    model = a_model()
    values, parts = bge_m3_backward(model, whole_batch(), BgeM3LossConfig(), ContrastiveConfig(temperature=0.1))
    for of_worker in start_workers(work, 2, tmp_path):
        for found in of_worker.values():
            assert found["loss"] == pytest.approx(values.loss, abs=1e-12)
            assert (found["masked"], found["accuracy"]) == pytest.approx((values.masked_share, values.accuracy))
            assert {name: found[name] for name in parts} == pytest.approx(parts, abs=1e-12)
            for one, other in zip(found["gradients"], model.parameters(), strict=True):
                torch.testing.assert_close(one, other.grad, rtol=0, atol=1e-9)
