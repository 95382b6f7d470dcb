"""One contrastive step: forward and backward of a batch, at once or in chunks, on one worker or many.

The loss is computed on detached embeddings, block by block of queries, and its gradient is then sent
through the encoder: in the plain form through the graph of the first pass, in the cached form
(GradCache; Gao et al., arXiv 2101.06983) through a second pass, chunk by chunk, which replays the
random numbers of the first. With workers, every query meets the documents of all of them. In every
form the gradient is that of one plain step on the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor

from recsys_ray.config import Config
from recsys_ray.training.distributed import RowCounts, exchange_counts, gather_rows, sum_over_workers, world_size
from recsys_ray.training.losses import (
    Similarity,
    distillation_kl,
    guided,
    info_nce,
    margin_mse,
    matryoshka,
    same_key,
    scores,
)

TokenIds = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]
Encode = Callable[[Sequence[TokenIds]], Tensor]     # N texts -> (N, D) with gradient, in their order
Sync = Callable[[], AbstractContextManager[object]]

BLOCK_CELLS = 1 << 22       # (query, document) scores held at once: 16 MB in float32, some four times over


class BatchError(ValueError):
    """A batch whose parts do not belong together."""


@dataclass(frozen=True)
class PairBatch:
    """Tokenised queries and documents of one worker's step: B queries, C documents."""

    query_tokens: list[TokenIds]        # B, not padded, special tokens included
    document_tokens: list[TokenIds]     # C: the B positives first, then any number of hard negatives
    positive: Ints                      # (B,) place of each query's positive among the documents
    query_group: Ints                   # (B,) near-duplicate group of the query's positive product
    document_group: Ints                # (C,) group of each document's product
    document_text: Ints                 # (C,) hash of each document's text, the same in every process
    negative_of: Ints                   # (C,) -1, or for a hard negative the place of the query it was found for

    def __post_init__(self) -> None:
        """Raise `BatchError` unless all parts fit together."""
        queries, documents = len(self.query_tokens), len(self.document_tokens)
        for field in fields(self)[2:]:
            wanted = queries if field.name in ("positive", "query_group") else documents
            if np.shape(getattr(self, field.name)) != (wanted,):
                raise BatchError(f"{field.name}: shape {np.shape(getattr(self, field.name))}, expected ({wanted},)")
        if queries and (self.positive.min() < 0 or self.positive.max() >= documents):
            raise BatchError(f"positive: {self.positive.min()} to {self.positive.max()} of {documents} documents")
        if documents and (self.negative_of.min() < -1 or self.negative_of.max() >= queries):
            raise BatchError(f"negative_of: {self.negative_of.min()} to {self.negative_of.max()} of {queries} queries")


class DistillationConfig(Config):
    """What is learned from a teacher's scores beside the pairs themselves."""

    kind: Literal["margin_mse", "kl"] = "kl"
    weight: float = Field(default=1.0, gt=0)                # of this loss in the sum
    temperature: float = Field(default=1.0, gt=0)           # the student's scores are divided by it
    teacher_temperature: float = Field(default=1.0, gt=0)   # and the teacher's by this


class ContrastiveConfig(Config):
    """The loss of a step and how it is computed."""

    similarity: Similarity = "cosine"
    temperature: float = Field(default=0.05, gt=0)
    mask_same_product: bool = True      # documents of the positive's near-duplicate group are no negatives
    mask_same_text: bool = True         # nor those with its very text
    in_batch: bool = True               # False: only the hard negatives found for the query itself
    hard_weight: float = Field(default=1.0, gt=0)   # a query's own hard negative counts as so many
    symmetric: bool = False             # also find the query of a document among all queries
    matryoshka: dict[int, float] = Field(default_factory=dict)  # dimensions -> weight; empty: all, weight 1
    guide_margin: float | None = None   # a guide removes documents from its positive's score less this on
    distillation: DistillationConfig | None = None
    mini_batch: int | None = Field(default=None, ge=1)  # texts of a chunk of the cached form; None: plain
    gather: bool = True                 # negatives of all workers; False: of the own worker only

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.symmetric and not self.in_batch:
            raise ValueError("symmetric: needs in_batch=true, the other queries are what a document is told from")
        if any(size < 1 or weight <= 0 for size, weight in self.matryoshka.items()):
            raise ValueError(f"matryoshka: {self.matryoshka}: dimensions and weights have to be above 0")
        return self


@dataclass(frozen=True)
class GuideScores:
    """A guide's embeddings of the worker's texts; their products are its scores, of other workers' documents too."""

    queries: Tensor         # (B, E)
    documents: Tensor       # (C, E)


@dataclass(frozen=True)
class StepValues:
    """What a step found, over all workers."""

    loss: float
    accuracy: float         # share of queries whose positive scores above all other candidates
    masked_share: float     # share of (query, other document) pairs taken out as likely false negatives
    queries: int


@dataclass(frozen=True)
class RandomState:
    """The state of torch's random numbers, to be returned to."""

    cpu: Tensor
    device: int | None
    cuda: Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        used = torch.cuda.is_available() and torch.cuda.is_initialized()    # type: ignore[no-untyped-call]
        device = torch.cuda.current_device() if used else None
        return cls(torch.get_rng_state(), device, None if device is None else torch.cuda.get_rng_state(device))

    @contextmanager
    def replayed(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[] if self.device is None else [self.device]):
            torch.set_rng_state(self.cpu)
            if self.device is not None and self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


@dataclass(frozen=True)
class _Chunk:
    """Texts that go through an encoder together, and where their embeddings are among those of the worker."""

    encode: Encode
    tokens: Sequence[TokenIds]
    place: slice
    rng: RandomState
    is_last: bool


@dataclass(frozen=True)
class _Pool:
    """What a worker's queries meet: Q queries and K documents, of all workers or only of this one."""

    queries: Tensor             # (Q, D), a leaf: the loss leaves its gradient here
    documents: Tensor           # (K, D), another
    query_group: Tensor         # (Q,)
    positive: Tensor            # (Q,) places among the K documents
    document_group: Tensor      # (K,)
    document_text: Tensor       # (K,)
    negative_of: Tensor         # (K,) places among the Q queries, or -1
    own_queries: slice
    own_documents: slice
    guide: GuideScores | None


def contrastive_backward(encode_queries: Encode, encode_documents: Encode, batch: PairBatch,
                         config: ContrastiveConfig, *, scale: float = 1.0, guide: GuideScores | None = None,
                         teacher: Tensor | None = None, sync: Sync = nullcontext) -> StepValues:
    """Add the gradient of the step's loss to the parameters of the encoders; returns what was found.

    The loss is the mean over the queries of all workers of

        l_i = info_nce_i                                            (query -> document)
        l_i = (info_nce_i + info_nce of p(i) among the queries)/2   (symmetric)
              + weight * margin_mse_i or T^2 kl_i                   (with a teacher)

    summed over the Matryoshka dimensions; see `losses` for the terms. It is multiplied by `scale` (of
    a gradient scaler, or one over the accumulated steps) and by the number of workers, because the caller
    averages gradients over the workers, as DistributedDataParallel does. Workers may bring different
    numbers of queries and documents. `sync` is the encoder's `no_sync`: it is held in all chunks but the last.
    `teacher` (B, C) are a teacher's scores of the worker's own documents, NaN where it gave none.

    Errors: `BatchError` on all workers when one has no queries, or when the guide or teacher that
    `config` asks for is missing.
    """
    _check_given(batch, config, guide, teacher)
    if config.mini_batch is None:
        rows_ND = torch.cat([encode_queries(batch.query_tokens), encode_documents(batch.document_tokens)])
        return _loss_and_gradient(rows_ND, batch, config, guide, teacher, scale)
    rows_ND, (*again, kept), last_ND = _first_pass(
        _chunks(encode_queries, encode_documents, batch, config.mini_batch), sync)
    values = _loss_and_gradient(rows_ND.requires_grad_(), batch, config, guide, teacher, scale)
    gradient_ND = _gradient(rows_ND)
    with sync():    # first, so that the graph is gone before the next one is built; another chunk is the last to sync
        torch.autograd.backward(last_ND, gradient_ND[kept.place])
    for number, chunk in enumerate(again):
        with nullcontext() if number == len(again) - 1 else sync(), chunk.rng.replayed():
            torch.autograd.backward(chunk.encode(chunk.tokens), gradient_ND[chunk.place])
    return values


@torch.no_grad()
def contrastive_loss(encode_queries: Encode, encode_documents: Encode, batch: PairBatch, config: ContrastiveConfig, *,
                     guide: GuideScores | None = None, teacher: Tensor | None = None) -> StepValues:
    """What `contrastive_backward` finds, without gradients: for validation."""
    _check_given(batch, config, guide, teacher)
    most = config.mini_batch or max(len(batch.query_tokens), len(batch.document_tokens))
    rows_ND, *_ = _first_pass(_chunks(encode_queries, encode_documents, batch, most))
    return _loss_and_gradient(rows_ND, batch, config, guide, teacher, None)


def _check_given(batch: PairBatch, config: ContrastiveConfig, guide: GuideScores | None,
                 teacher: Tensor | None) -> None:
    if (guide is None) != (config.guide_margin is None):
        raise BatchError("a guide's embeddings and guide_margin belong together: one is missing")
    if (teacher is None) != (config.distillation is None):
        raise BatchError("a teacher's scores and distillation belong together: one is missing")
    shape = (len(batch.query_tokens), len(batch.document_tokens))
    if guide is not None and (len(guide.queries), len(guide.documents)) != shape:
        raise BatchError(f"guide: {len(guide.queries)} queries, {len(guide.documents)} documents, expected {shape}")
    if teacher is not None and teacher.shape != shape:
        raise BatchError(f"teacher: scores of shape {tuple(teacher.shape)}, expected {shape}")


def _chunks(encode_queries: Encode, encode_documents: Encode, batch: PairBatch, most: int) -> Iterator[_Chunk]:
    """Chunks of at most `most` texts in their order; the random state is that of the moment a chunk is taken."""
    sides = ((encode_queries, batch.query_tokens), (encode_documents, batch.document_tokens))
    total = len(batch.query_tokens) + len(batch.document_tokens)
    for (encode, tokens), offset in zip(sides, (0, len(batch.query_tokens)), strict=True):
        for start in range(0, len(tokens), most):
            some = tokens[start: start + most]
            place = slice(offset + start, offset + start + len(some))
            yield _Chunk(encode, some, place, RandomState.now(), place.stop == total)


def _first_pass(chunks: Iterator[_Chunk], sync: Sync = nullcontext) -> tuple[Tensor, list[_Chunk], Tensor]:
    """(embeddings of all texts, queries first, without a graph; their chunks; the last chunk's, with their graph).

    That one graph is no more memory than any chunk needs, and spares its chunk a second pass.
    """
    taken, parts = [], []
    for chunk in chunks:
        taken.append(chunk)
        graph = chunk.is_last and torch.is_grad_enabled()
        with sync() if graph else nullcontext(), torch.set_grad_enabled(graph):
            parts.append(chunk.encode(chunk.tokens))
    if not parts:
        raise BatchError("a batch without queries and documents")
    return torch.cat([part.detach() for part in parts]), taken, parts[-1]


def _loss_and_gradient(rows_ND: Tensor, batch: PairBatch, config: ContrastiveConfig, guide: GuideScores | None,
                       teacher: Tensor | None, scale: float | None) -> StepValues:
    """The values of a step; the gradient goes to `rows_ND` (queries, then documents) unless `scale` is None."""
    sizes = [len(batch.query_tokens), len(batch.document_tokens)]
    if len(rows_ND) != sum(sizes):
        raise BatchError(f"the encoders gave {len(rows_ND)} embeddings for {sizes[0]} queries and {sizes[1]} documents")
    queries, documents = exchange_counts(sizes, rows_ND.device)
    if 0 in queries.counts:
        raise BatchError(f"workers with {queries.counts} queries: every worker needs at least one")
    total = queries.total
    if not config.gather:
        queries, documents = (RowCounts((size,), 0) for size in sizes)
    joint = RowCounts(tuple(map(sum, zip(queries.counts, documents.counts, strict=True))), queries.rank)
    gathered_ND = gather_rows(rows_ND, joint)
    pool = _pool(gathered_ND, batch, queries, documents, guide)
    if teacher is not None:
        teacher = teacher.detach().to(rows_ND.device)
    sums = torch.zeros(4, dtype=torch.float64, device=rows_ND.device)
    step = max(1, BLOCK_CELLS // max(len(pool.queries), len(pool.documents)))
    for start in range(pool.own_queries.start, pool.own_queries.stop, step):
        rows = slice(start, min(start + step, pool.own_queries.stop))
        some = None if teacher is None else teacher[rows.start - pool.own_queries.start:][: rows.stop - rows.start]
        loss_M, counts = _query_losses(pool, rows, config, some)
        if scale is not None:
            torch.autograd.backward(loss_M.sum() * (scale * world_size() / total))
        sums += torch.cat([loss_M.detach().sum().double()[None], counts.double()])
    if scale is not None:
        gradient_ND = torch.zeros_like(gathered_ND)
        query_rows, document_rows = _rows_of(queries, documents, rows_ND.device)
        gradient_ND[query_rows], gradient_ND[document_rows] = _gradient(pool.queries), _gradient(pool.documents)
        torch.autograd.backward(gathered_ND, gradient_ND)
    loss, hits, masked, others = sum_over_workers(sums).tolist()
    return StepValues(loss / total, hits / total, masked / max(1, others), total)


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _rows_of(queries: RowCounts, documents: RowCounts, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where queries and documents are when every worker's queries and then its documents follow one another."""
    kinds = np.concatenate([np.repeat([0, 1], pair) for pair in zip(queries.counts, documents.counts, strict=True)])
    places = (torch.from_numpy(np.flatnonzero(kinds == kind)).to(device) for kind in (0, 1))
    return next(places), next(places)


def _pool(gathered_ND: Tensor, batch: PairBatch, queries: RowCounts, documents: RowCounts,
          guide: GuideScores | None) -> _Pool:
    device = gathered_ND.device
    query_rows, document_rows = _rows_of(queries, documents, device)
    hard = batch.negative_of >= 0
    own_ids = (np.stack([batch.query_group, batch.positive + documents.own.start], axis=1),
               np.stack([batch.document_group, batch.document_text,
                         np.where(hard, batch.negative_of + queries.own.start, -1)], axis=1))
    ids_Q2, ids_K3 = (gather_rows(torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64)).to(device), counts)
                      for ids, counts in zip(own_ids, (queries, documents), strict=True))
    leaves = [gathered_ND.detach()[rows].requires_grad_(torch.is_grad_enabled())
              for rows in (query_rows, document_rows)]
    if guide is not None:
        guide = GuideScores(gather_rows(guide.queries.detach().to(device), queries),
                            gather_rows(guide.documents.detach().to(device), documents))
    return _Pool(
        queries=leaves[0], documents=leaves[1], query_group=ids_Q2[:, 0], positive=ids_Q2[:, 1],
        document_group=ids_K3[:, 0], document_text=ids_K3[:, 1], negative_of=ids_K3[:, 2],
        own_queries=queries.own, own_documents=documents.own, guide=guide)


def _query_losses(pool: _Pool, rows: slice, config: ContrastiveConfig, teacher_MC: Tensor | None
                  ) -> tuple[Tensor, Tensor]:
    """(the loss of each query of `rows`, (M,); counts: positives on top, masked pairs, pairs)."""
    positive_M = pool.positive[rows]
    places_M = torch.arange(rows.start, rows.stop, device=positive_M.device)
    everything_K = torch.arange(len(pool.documents), device=positive_M.device)
    rejected_MK, own_MK = _rejected(pool, config, rows, everything_K)
    mine_MK = pool.negative_of[None, :] == places_M[:, None]
    considered_MK = ~own_MK if config.in_batch else mine_MK & ~own_MK
    allowed_MK = (considered_MK & ~rejected_MK) | own_MK
    weights_MK = None
    if config.hard_weight != 1:
        weights_MK = (mine_MK & ~own_MK).to(pool.queries.dtype) * float(np.log(config.hard_weight))
    sizes = config.matryoshka or {pool.queries.shape[1]: 1.0}
    hits: list[Tensor] = []

    def loss(query_QD: Tensor, document_KD: Tensor) -> Tensor:
        scores_MK = scores(query_QD[rows], document_KD, config.similarity)
        found_M = info_nce(scores_MK, positive_M, config.temperature, allowed_MK, weights_MK)
        if config.symmetric:
            found_M = (found_M + _document_losses(pool, rows, config, query_QD, document_KD)) / 2
        if config.distillation is not None and teacher_MC is not None:
            found_M = found_M + _distilled(config.distillation, scores_MK[:, pool.own_documents], teacher_MC,
                                           positive_M - pool.own_documents.start)
        if query_QD.shape[1] == max(sizes):
            others_MK = scores_MK.detach().masked_fill(~allowed_MK | own_MK, -torch.inf)
            hits.append((scores_MK.detach().gather(1, positive_M[:, None]) > others_MK).all(dim=1).sum())
        return found_M

    loss_M = matryoshka(loss, pool.queries, pool.documents, sizes)
    return loss_M, torch.stack([hits[0], (considered_MK & rejected_MK).sum(), considered_MK.sum()])


def _rejected(pool: _Pool, config: ContrastiveConfig, rows: slice, columns_C: Tensor) -> tuple[Tensor, Tensor]:
    """(documents that may be relevant to a query though they are not its positive; its positive), each (M, C)."""
    positive_M = pool.positive[rows]
    own_MC = positive_M[:, None] == columns_C[None, :]
    rejected_MC = torch.zeros_like(own_MC)
    if config.mask_same_product:
        rejected_MC |= same_key(pool.query_group[rows], pool.document_group[columns_C])
    if config.mask_same_text:
        rejected_MC |= same_key(pool.document_text[positive_M], pool.document_text[columns_C])
    if config.guide_margin is not None and pool.guide is not None:
        query_ME, document_KE = pool.guide.queries[rows], pool.guide.documents
        thresholds_M = (query_ME * document_KE[positive_M]).sum(dim=1)
        rejected_MC |= guided(scores(query_ME, document_KE[columns_C], "dot"), thresholds_M, config.guide_margin)
    return rejected_MC & ~own_MC, own_MC


def _document_losses(pool: _Pool, rows: slice, config: ContrastiveConfig, query_QD: Tensor, document_KD: Tensor
                     ) -> Tensor:
    """The loss of finding each query of `rows` by its positive among all queries, (M,).

    A query whose positive this document is, or for which it may be relevant, is not told from it.
    """
    positive_M = pool.positive[rows]
    rejected_QM, shared_QM = _rejected(pool, config, slice(0, len(query_QD)), positive_M)
    places_M = torch.arange(rows.start, rows.stop, device=positive_M.device)
    allowed_MQ = (~rejected_QM & ~shared_QM).T.scatter(1, places_M[:, None], True)
    scores_MQ = scores(document_KD[positive_M], query_QD, config.similarity)
    return info_nce(scores_MQ, places_M, config.temperature, allowed_MQ)


def _distilled(config: DistillationConfig, student_MC: Tensor, teacher_MC: Tensor, positive_M: Tensor) -> Tensor:
    """The weighted loss of each query against the teacher, (M,)."""
    student_MC, teacher_MC = student_MC / config.temperature, teacher_MC / config.teacher_temperature
    if config.kind == "margin_mse":
        return config.weight * margin_mse(student_MC, teacher_MC, positive_M)
    # gradients of softened distributions shrink with the square of the temperature
    return config.weight * config.temperature**2 * distillation_kl(student_MC, teacher_MC, positive_M)
