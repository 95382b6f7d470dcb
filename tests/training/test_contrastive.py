"""One contrastive step in all its forms against the loss written in plain loops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from contrastive_cases import (
    CASES,
    DIVISIONS,
    TinyEncoder,
    all_cases,
    config_of,
    loop_loss,
    reference,
    share_of,
    start_workers,
    step,
    whole_batch,
)
from torch import Tensor, nn

from recsys_ray.training import contrastive
from recsys_ray.training.contrastive import (
    BatchError,
    ContrastiveConfig,
    PairBatch,
    contrastive_backward,
    contrastive_loss,
)

EXACT = 1e-12


def largest(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    assert len(found) == len(wanted)
    return max(float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_loop_and_its_gradient(name: str, hard: bool, rate: float) -> None:
    config, batch, model = config_of(name), whole_batch(hard), TinyEncoder(rate)
    loss, gradients = reference(batch, config, rate)
    values = step(model, batch, config)
    assert values.loss == pytest.approx(loss, abs=EXACT)
    assert values.queries == 12
    assert largest([one.grad for one in model.parameters()], gradients) < EXACT
    assert hard or max(float(one.abs().max()) for one in gradients) > 1e-3 or not config.in_batch


@pytest.mark.parametrize("name", CASES)
def test_blocks_of_queries_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, batch = config_of(name), whole_batch(True)
    loss, gradients = reference(batch, config, 0.0)
    monkeypatch.setattr(contrastive, "BLOCK_CELLS", 5 * len(batch.document_tokens))
    model = TinyEncoder()
    assert step(model, batch, config).loss == pytest.approx(loss, abs=EXACT)
    assert largest([one.grad for one in model.parameters()], gradients) < EXACT


def test_every_case_is_another_loss() -> None:
    batch = whole_batch(True)
    losses = {name: round(reference(batch, config_of(name), 0.0)[0], 9) for name in CASES}
    same = {name for name in CASES if name.startswith("cached")} | {"plain"}
    assert len({losses[name] for name in same}) == 1
    assert len(set(losses.values())) == len(CASES) - len(same) + 1


def test_values_of_a_step_by_hand() -> None:
    """Two queries and three documents on the axes of the plane, t = 1, dot products.

    s = [[2, 1, 0], [0, 1, 2]], positives 0 and 1; the third document is query 0's hard negative and of
    query 1's product. l_0 = log(e^2 + e^1 + 1) - 2; query 1 has document 0 left: l_1 = log(e^0 + e^1) - 1.
    Query 0 has its positive on top, and so has query 1, since the third document is taken out:
    accuracy 1, and 1 of 4 pairs is masked.
    """
    table = {0: [1.0, 0.0], 1: [0.0, 1.0], 2: [2.0, 0.0], 3: [1.0, 1.0], 4: [0.0, 2.0]}

    def encode(token_ids: Sequence[np.ndarray]) -> Tensor:
        return torch.tensor([table[int(one[0])] for one in token_ids], dtype=torch.float64)

    def ids(*values: int) -> list[np.ndarray]:
        return [np.array([value], dtype=np.int32) for value in values]

    batch = PairBatch(ids(0, 1), ids(2, 3, 4), positive=np.array([0, 1]), query_group=np.array([7, 8]),
                      document_group=np.array([7, 8, 8]), document_text=np.array([1, 2, 3]),
                      negative_of=np.array([-1, -1, 0]))
    config = ContrastiveConfig(similarity="dot", temperature=1.0)
    values = contrastive_loss(encode, encode, batch, config)
    wanted = (np.log(np.exp(2) + np.exp(1) + 1) - 2 + np.log(1 + np.exp(1)) - 1) / 2
    assert values.loss == pytest.approx(wanted, abs=EXACT)
    assert (values.accuracy, values.masked_share, values.queries) == (1.0, 0.25, 2)
    unmasked = contrastive_loss(encode, encode, batch, config.replace(mask_same_product=False))
    assert (unmasked.accuracy, unmasked.masked_share) == (0.5, 0.0)


def test_a_weight_of_two_is_a_negative_given_twice() -> None:
    batch, model = whole_batch(True), TinyEncoder()
    hard = np.flatnonzero(batch.negative_of >= 0)
    twice = np.concatenate([np.arange(len(batch.document_tokens)), hard])
    doubled = PairBatch(
        batch.query_tokens, [batch.document_tokens[place] for place in twice], batch.positive, batch.query_group,
        batch.document_group[twice], batch.document_text[twice], batch.negative_of[twice])
    config = ContrastiveConfig(in_batch=False)
    weighted = contrastive_loss(model, model, batch, config.replace(hard_weight=2.0))
    assert weighted.loss == pytest.approx(contrastive_loss(model, model, doubled, config).loss, abs=EXACT)


def test_queries_may_share_a_document() -> None:
    """Two queries with one positive: it is given once, and to no query is the other a wrong answer."""
    whole, model = whole_batch(False), TinyEncoder()
    kept = np.delete(np.arange(12), 7)
    positive = np.searchsorted(kept, np.where(np.arange(12) == 7, 3, np.arange(12)))
    shared = PairBatch(whole.query_tokens, [whole.document_tokens[place] for place in kept], positive,
                       whole.query_group, whole.document_group[kept], whole.document_text[kept], np.full(11, -1))
    for config in (ContrastiveConfig(symmetric=True), ContrastiveConfig(symmetric=True, mask_same_product=False)):
        query, document = model(shared.query_tokens), model(shared.document_tokens)
        wanted = float(loop_loss(query, document, shared, config).detach())
        assert contrastive_loss(model, model, shared, config).loss == pytest.approx(wanted, abs=EXACT)


def test_evaluation_finds_what_the_step_finds_and_leaves_no_gradient() -> None:
    batch, model = whole_batch(True), TinyEncoder()
    for mini_batch in (None, 4):
        config = ContrastiveConfig(mini_batch=mini_batch, symmetric=True)
        found = contrastive_loss(model, model, batch, config)
        assert all(one.grad is None for one in model.parameters())
        assert found == step(TinyEncoder(), batch, config)


def test_scale_multiplies_the_gradient_and_not_the_loss() -> None:
    batch, config = whole_batch(True), ContrastiveConfig(mini_batch=4)
    plain, scaled = TinyEncoder(), TinyEncoder()
    assert step(plain, batch, config) == step(scaled, batch, config, scale=0.25)
    step(scaled, batch, config, scale=0.75)     # gradients add up over steps
    assert largest([one.grad for one in scaled.parameters()], [one.grad for one in plain.parameters()]) < EXACT


class Dropped(nn.Module):
    """torch's own dropout, which draws anew in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyEncoder()
        self.passes: list[Tensor] = []

    def forward(self, token_ids: Sequence[np.ndarray]) -> Tensor:
        self.passes.append(nn.functional.dropout(self.inner(token_ids), 0.5))
        return self.passes[-1]


def test_the_second_pass_replays_the_random_numbers_of_the_first() -> None:
    """The reference encodes the chunks in the same order with a graph; afterwards both draw the same next number."""
    batch, config, size = whole_batch(True), ContrastiveConfig(mini_batch=5), 5

    def chunked(model: nn.Module, texts: Sequence[np.ndarray]) -> Tensor:
        return torch.cat([model(texts[start: start + size]) for start in range(0, len(texts), size)])

    plain, cached = Dropped(), Dropped()
    torch.manual_seed(1)
    loss = loop_loss(chunked(plain, batch.query_tokens), chunked(plain, batch.document_tokens), batch, config)
    loss.backward()
    next_number = torch.rand(1)
    torch.manual_seed(1)
    values = contrastive_backward(cached, cached, batch, config)
    assert torch.equal(torch.rand(1), next_number)
    assert values.loss == pytest.approx(float(loss.detach()), abs=EXACT)
    assert largest([one.grad for one in cached.parameters()], [one.grad for one in plain.parameters()]) < EXACT
    chunks = (len(cached.passes) + 1) // 2      # the last one keeps its graph: it has no second pass
    assert all(torch.equal(*pair) for pair in zip(cached.passes[:chunks - 1], cached.passes[chunks:], strict=True))


def test_all_chunks_but_one_are_kept_from_synchronising() -> None:
    events: list[str] = []
    model = TinyEncoder()

    def encode(token_ids: Sequence[np.ndarray]) -> Tensor:
        events.append(f"{len(token_ids)}{'' if torch.is_grad_enabled() else ' without graph'}")
        return model(token_ids)

    @contextmanager
    def sync() -> Iterator[None]:
        events.append("(")
        yield
        events.append(")")

    contrastive_backward(encode, encode, whole_batch(False), ContrastiveConfig(mini_batch=8), sync=sync)
    first = ["8 without graph", "4 without graph", "8 without graph", "(", "4", ")"]
    backward_of_the_last = ["(", ")"]
    assert events == [*first, *backward_of_the_last, "(", "8", ")", "(", "4", ")", "8"]


def test_encoders_of_queries_and_documents_may_differ() -> None:
    batch, config = whole_batch(True), ContrastiveConfig(mini_batch=4)
    models = [TinyEncoder(), TinyEncoder()]
    with torch.no_grad():
        models[1].down.mul_(-1.3)
    loop_loss(models[0](batch.query_tokens), models[1](batch.document_tokens), batch, config).backward()
    wanted = [one.grad.clone() for model in models for one in model.parameters() if one.grad is not None]
    for model in models:
        model.zero_grad()
    contrastive_backward(*models, batch, config)
    assert largest([one.grad for model in models for one in model.parameters()], wanted) < EXACT


@pytest.mark.parametrize(("change", "message"), [
    ({"positive": np.arange(11)}, "positive: shape"),
    ({"positive": np.arange(12) + 1}, "positive: 1 to 12 of 12 documents"),
    ({"negative_of": np.full(12, 12)}, "negative_of: 12 to 12 of 12 queries"),
    ({"document_text": np.zeros(3)}, "document_text: shape"),
])
def test_parts_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    whole = whole_batch(False)
    with pytest.raises(BatchError, match=message):
        PairBatch(**{**whole.__dict__, **change})


def test_what_the_configuration_asks_for_has_to_be_given() -> None:
    batch, model = whole_batch(False), TinyEncoder()
    for config, message in ((ContrastiveConfig(guide_margin=0.0), "guide"),
                            (ContrastiveConfig.model_validate({"distillation": {"kind": "kl"}}), "teacher")):
        with pytest.raises(BatchError, match=message):
            contrastive_backward(model, model, batch, config)
    with pytest.raises(BatchError, match=r"teacher: scores of shape \(1, 2\)"):
        contrastive_backward(model, model, batch, ContrastiveConfig.model_validate({"distillation": {}}),
                             teacher=torch.zeros(1, 2))
    with pytest.raises(BatchError, match="23 embeddings for 12 queries and 12 documents"):
        contrastive_backward(model, lambda tokens: model(tokens)[1:], batch, ContrastiveConfig())
    with pytest.raises(ValueError, match="in_batch"):
        ContrastiveConfig(symmetric=True, in_batch=False)
    with pytest.raises(ValueError, match="matryoshka"):
        ContrastiveConfig(matryoshka={8: 0.0})


@pytest.fixture(scope="module", params=[2, 4], ids=lambda world: f"{world} workers")
def workers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each worker of a gloo group found, every case under DistributedDataParallel."""
    return start_workers(all_cases, request.param, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_workers_make_the_step_of_one(workers: list[dict[str, Any]], name: str, hard: bool, rate: float) -> None:
    config, batch = config_of(name), whole_batch(hard)
    loss, gradients = reference(batch, config, rate)
    alone = step(TinyEncoder(rate), batch, config)
    for worker in workers:
        found = worker[f"{name} hard={hard} rate={rate}"]
        assert found["loss"] == pytest.approx(loss, abs=EXACT)
        assert largest(found["gradients"], gradients) < EXACT
        assert (found["accuracy"], found["queries"]) == (alone.accuracy, alone.queries)
        assert found["masked_share"] == pytest.approx(alone.masked_share)


def test_workers_accumulate_gradients(workers: list[dict[str, Any]]) -> None:
    _, gradients = reference(whole_batch(True), config_of("cached 5"), 0.0)
    assert all(largest(worker["accumulated"], gradients) < EXACT for worker in workers)


def test_without_gathering_workers_keep_to_their_own_documents(workers: list[dict[str, Any]]) -> None:
    sizes, model = DIVISIONS[len(workers)], TinyEncoder()
    config, whole = ContrastiveConfig(), whole_batch(True)
    shares = [share_of(whole, sizes, rank) for rank in range(len(sizes))]
    loss = sum((loop_loss(model(share.query_tokens), model(share.document_tokens), share, config) * size
                for share, size in zip(shares, sizes, strict=True)), torch.zeros(())) / 12
    loss.backward()
    for worker in workers:
        assert worker["own pool"]["loss"] == pytest.approx(float(loss.detach()), abs=EXACT)
        assert largest(worker["own pool"]["gradients"], [one.grad for one in model.parameters()]) < EXACT


def test_a_worker_without_queries_is_an_error_of_all(workers: list[dict[str, Any]]) -> None:
    assert all("every worker needs at least one" in worker["empty"] for worker in workers)


