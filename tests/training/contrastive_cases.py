"""A tiny encoder, batches with planted false negatives, their division over workers, and the loss in plain loops."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recsys_ray.training.contrastive import ContrastiveConfig, GuideScores, PairBatch, contrastive_backward
from recsys_ray.training.distributed import exchange_counts, gather_rows, sum_over_workers
from recsys_ray.training.distributed import rank as distributed_rank

WORDS, WIDTH = 50, 8
DIVISIONS = {1: [12], 2: [5, 7], 4: [2, 5, 1, 4]}    # queries of each worker
GATHERED = (3, 1, 0)        # rows of each worker in the test of gathering
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "unmasked": {"mask_same_product": False, "mask_same_text": False},
    "cached 1": {"mini_batch": 1},
    "cached 5": {"mini_batch": 5},
    "cached, one chunk a side": {"mini_batch": 64},
    "symmetric": {"symmetric": True, "mini_batch": 3},
    "matryoshka": {"matryoshka": {8: 1.0, 3: 0.5}, "mini_batch": 4, "symmetric": True},
    "dot": {"similarity": "dot", "temperature": 1.5},
    "hard weight": {"hard_weight": 3.0, "mini_batch": 4},
    "own negatives only": {"in_batch": False, "hard_weight": 2.0},
    "guided": {"guide_margin": 0.2, "symmetric": True, "mini_batch": 5},
    "kl": {"distillation": {"kind": "kl", "weight": 0.7, "temperature": 0.3, "teacher_temperature": 2.0}},
    "margin": {"distillation": {"kind": "margin_mse", "weight": 0.3, "teacher_temperature": 5.0}, "mini_batch": 2},
}


def config_of(name: str) -> ContrastiveConfig:
    """The configuration of a case, warm enough that every document matters."""
    return ContrastiveConfig.model_validate({"temperature": 0.3, **CASES[name]})


class TinyEncoder(nn.Module):
    """Mean of word vectors and two layers; dropout keyed by the text, the same in any batch."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.words = nn.Parameter(torch.randn(WORDS, WIDTH, generator=generator, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / 2)
        self.down = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / 2)
        self.rate = rate

    def forward(self, token_ids: Sequence[np.ndarray]) -> Tensor:
        pooled = torch.stack([self.words[torch.from_numpy(one).long()].mean(dim=0) for one in token_ids])
        hidden = torch.tanh(pooled @ self.up)
        if self.rate:
            masks = []
            for one in token_ids:
                seed = int.from_bytes(np.asarray(one).tobytes(), "little") % (1 << 62)
                uniform = torch.rand(WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                masks.append((uniform >= self.rate).double() / (1 - self.rate))
            hidden = hidden * torch.stack(masks)
        return hidden @ self.down


def whole_batch(hard: bool) -> PairBatch:
    """12 queries; 3 and 7 share a product, 1 and 8 a text under two products; with `hard`, 0 to 3 negatives each."""
    rng = np.random.default_rng(5)

    def text() -> np.ndarray:
        return rng.integers(0, WORDS, size=rng.integers(2, 7)).astype(np.int32)

    count = 12
    owners = np.sort(rng.integers(0, count, size=17)) if hard else np.zeros(0, dtype=np.int64)
    documents = [text() for _ in range(count + len(owners))]
    groups = np.arange(100, 100 + len(documents))
    groups[7] = groups[3]
    documents[8] = documents[1]
    if hard:
        groups[count + 4] = groups[6]           # a hard negative that is another query's product
        documents[count + 9] = documents[2]     # and one with another positive's text
    texts = np.array([zlib.crc32(one.tobytes()) for one in documents], dtype=np.int64)
    return PairBatch(
        query_tokens=[text() for _ in range(count)], document_tokens=documents, positive=np.arange(count),
        query_group=groups[:count].copy(), document_group=groups, document_text=texts,
        negative_of=np.concatenate([np.full(count, -1), owners]).astype(np.int64))


def guide_of(batch: PairBatch) -> GuideScores:
    """Embeddings of a guide that looks at nothing but the tokens."""
    table = np.random.default_rng(11).normal(size=(WORDS, 5))

    def embed(texts: Sequence[np.ndarray]) -> Tensor:
        rows = np.stack([table[one].mean(axis=0) for one in texts])
        return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))

    return GuideScores(embed(batch.query_tokens), embed(batch.document_tokens))


def teacher_of(batch: PairBatch) -> Tensor:
    """A teacher that scored every query's positive and own hard negatives, but nothing of queries 0 and 4."""
    scores = torch.full((len(batch.query_tokens), len(batch.document_tokens)), math.nan, dtype=torch.float64)
    for query, tokens in enumerate(batch.query_tokens):
        if int(tokens[0]) % 5 == 0:
            continue
        for place in [int(batch.positive[query]), *np.flatnonzero(batch.negative_of == query)]:
            scores[query, place] = float(np.sin(batch.document_tokens[place].sum() + tokens.sum())) * 4
    return scores


def share_of(batch: PairBatch, sizes: Sequence[int], rank: int) -> PairBatch:
    """The queries of one worker with their positives and hard negatives, under the worker's own places."""
    start = sum(sizes[:rank])
    queries = np.arange(start, start + sizes[rank])
    hard = np.flatnonzero(np.isin(batch.negative_of, queries))
    places = np.concatenate([batch.positive[queries], hard])
    return PairBatch(
        query_tokens=[batch.query_tokens[one] for one in queries],
        document_tokens=[batch.document_tokens[one] for one in places],
        positive=np.arange(len(queries)), query_group=batch.query_group[queries],
        document_group=batch.document_group[places], document_text=batch.document_text[places],
        negative_of=np.where(batch.negative_of[places] >= 0, batch.negative_of[places] - start, -1))


def loop_loss(query: Tensor, document: Tensor, batch: PairBatch, config: ContrastiveConfig) -> Tensor:
    """The mean loss, written as its definition: one query, one document at a time."""
    guide, teacher = guide_of(batch), teacher_of(batch)
    total = torch.zeros((), dtype=torch.float64)
    sizes = config.matryoshka or {query.shape[1]: 1.0}
    for size, weight in sizes.items():
        short_query, short_document = query[:, :size], document[:, :size]
        if config.similarity == "cosine":
            short_query = short_query / short_query.norm(dim=1, keepdim=True)
            short_document = short_document / short_document.norm(dim=1, keepdim=True)
        score = short_query @ short_document.T
        for i in range(len(query)):
            total = total + weight * _loop_query(i, score, batch, config, guide, teacher)
    return total / len(query)


def _may_be_relevant(i: int, c: int, batch: PairBatch, config: ContrastiveConfig, guide: GuideScores) -> bool:
    positive = int(batch.positive[i])
    if config.mask_same_product and batch.query_group[i] == batch.document_group[c]:
        return True
    if config.mask_same_text and batch.document_text[positive] == batch.document_text[c]:
        return True
    if config.guide_margin is None:
        return False
    found = guide.documents @ guide.queries[i]
    return bool(found[c] >= found[positive] - config.guide_margin)


def _loop_query(i: int, score: Tensor, batch: PairBatch, config: ContrastiveConfig, guide: GuideScores,
                teacher: Tensor) -> Tensor:
    positive, warm = int(batch.positive[i]), config.temperature
    below = torch.exp(score[i, positive] / warm)
    for c in range(score.shape[1]):
        mine = batch.negative_of[c] == i
        if c == positive or not (mine or config.in_batch) or _may_be_relevant(i, c, batch, config, guide):
            continue
        below = below + (config.hard_weight if mine else 1) * torch.exp(score[i, c] / warm)
    loss = torch.log(below) - score[i, positive] / warm
    if config.symmetric:
        others = [j for j in range(len(score)) if j != i and batch.positive[j] != positive
                  and not _may_be_relevant(j, positive, batch, config, guide)]
        logits = torch.stack([score[j, positive] / warm for j in [i, *others]])
        loss = (loss + torch.logsumexp(logits, 0) - logits[0]) / 2
    if config.distillation is not None:
        known = [c for c in range(score.shape[1]) if not math.isnan(teacher[i, c]) and c != positive]
        loss = loss + _loop_distilled(score[i], teacher[i], positive, known, config)
    return loss


def _loop_distilled(student: Tensor, teacher: Tensor, positive: int, known: list[int], config: ContrastiveConfig
                    ) -> Tensor | float:
    settings = config.distillation
    assert settings is not None
    if not known:
        return 0.0
    student, teacher = student / settings.temperature, teacher / settings.teacher_temperature
    if settings.kind == "margin_mse":
        errors = [(student[positive] - student[c] - teacher[positive] + teacher[c]) ** 2 for c in known]
        return settings.weight * sum(errors) / len(errors)  # type: ignore[return-value]
    places = [positive, *known]
    wanted, got = torch.softmax(teacher[places], 0), torch.softmax(student[places], 0)
    return settings.weight * settings.temperature**2 * (wanted * (wanted / got).log()).sum()


def reference(batch: PairBatch, config: ContrastiveConfig, rate: float) -> tuple[float, list[Tensor]]:
    """(loss, gradients) of one plain full batch by plain loops and plain autograd."""
    model = TinyEncoder(rate)
    loss = loop_loss(model(batch.query_tokens), model(batch.document_tokens), batch, config)
    loss.backward()
    return float(loss.detach()), [one.grad for one in model.parameters() if one.grad is not None]


def step(model: nn.Module, batch: PairBatch, config: ContrastiveConfig, **given: Any) -> Any:
    """`contrastive_backward` with the guide and teacher that `config` asks for."""
    return contrastive_backward(
        model, model, batch, config, guide=guide_of(batch) if config.guide_margin is not None else None,
        teacher=teacher_of(batch) if config.distillation is not None else None, **given)


def start_workers(work: Callable[[int, int], dict[str, Any]], world: int, folder: Path) -> list[dict[str, Any]]:
    """What `work(rank, world)` returns in each of `world` spawned processes that form a gloo group."""
    import torch.multiprocessing as mp

    context = mp.start_processes(_worker, (world, work, str(folder)), nprocs=world, join=False, start_method="spawn")
    assert context is not None
    try:
        deadline = time.monotonic() + 150
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "the workers hang"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _worker(rank: int, world: int, work: Callable[[int, int], dict[str, Any]], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world,
                            timeout=timedelta(seconds=60))
    torch.save(work(rank, world), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def all_cases(rank: int, world: int) -> dict[str, Any]:
    """Losses and gradients of every case under DistributedDataParallel."""
    found: dict[str, Any] = {}
    for hard in (False, True):
        for rate in (0.0, 0.4):
            for name in CASES:
                model = DistributedDataParallel(TinyEncoder(rate))
                batch = share_of(whole_batch(hard), DIVISIONS[world], rank)
                values = step(model, batch, config_of(name), sync=model.no_sync)
                found[f"{name} hard={hard} rate={rate}"] = {
                    "loss": values.loss, "accuracy": values.accuracy, "masked_share": values.masked_share,
                    "queries": values.queries, "gradients": [one.grad for one in model.parameters()]}
    found["own pool"] = _own_pool(rank, world)
    found["accumulated"] = _accumulated(rank, world)
    found["empty"] = _empty(rank, world)
    return found


def gather(rank: int, world: int) -> dict[str, Any]:
    """Gathered rows, ids and sums of a worker, and the gradient of its rows."""
    count = GATHERED[rank]
    rows = (torch.arange(count).double() + 10 * rank)[:, None].repeat(1, 2).requires_grad_()
    counts, sevens = exchange_counts([count, 7], rows.device)
    gathered = gather_rows(rows, counts)
    ids = gather_rows(rows.detach()[:, 0].long(), counts)
    places = torch.arange(1, len(gathered) + 1)[:, None]
    ((rank + 1) * (places * gathered**2).sum() / 2).backward()
    error = ""
    try:
        gather_rows(torch.zeros(count + 1, 2), counts)
    except ValueError as refusal:
        error = str(refusal)
    return {"rows": gathered.detach(), "ids": ids, "gradient": rows.grad, "error": error, "rank": distributed_rank(),
            "counts": [list(counts.counts), list(sevens.counts)],
            "sum": sum_over_workers(torch.tensor([float(rank), 1.0]))}


def _own_pool(rank: int, world: int) -> dict[str, Any]:
    """Without gathering, workers meet only their own documents; the mean is still over all queries."""
    model = DistributedDataParallel(TinyEncoder())
    batch = share_of(whole_batch(True), DIVISIONS[world], rank)
    values = step(model, batch, ContrastiveConfig(gather=False, mini_batch=3), sync=model.no_sync)
    return {"loss": values.loss, "gradients": [one.grad for one in model.parameters()]}


def _accumulated(rank: int, world: int) -> list[Tensor | None]:
    """Gradients of two half steps, of which the first is not to be synchronised at all."""
    model = DistributedDataParallel(TinyEncoder())
    batch = share_of(whole_batch(True), DIVISIONS[world], rank)
    with model.no_sync():
        step(model, batch, config_of("cached 5"), sync=model.no_sync, scale=0.5)
    step(model, batch, config_of("cached 5"), sync=model.no_sync, scale=0.5)
    return [one.grad for one in model.parameters()]


def _empty(rank: int, world: int) -> str:
    """What a worker is told when the last one has no queries."""
    sizes = [12 // (world - 1)] * (world - 1) + [0]
    batch = share_of(whole_batch(False), sizes, rank)
    rows = torch.zeros(max(1, sizes[rank]), WIDTH, dtype=torch.float64, requires_grad=True)

    def encode(token_ids: Sequence[np.ndarray]) -> Tensor:
        return rows[: len(token_ids)]

    try:
        contrastive_backward(encode, encode, batch, ContrastiveConfig())
    except ValueError as error:
        return str(error)
    return "no error"
