"""BGE-M3's three scores and its self-distillation, on packed token states and with gradients.

Chen et al., arXiv 2402.03216, sections 3.2 and 3.3. No tensor of batch x length x vocabulary exists:
token weights meet in a matrix over the tokens that queries and documents share, and late interaction
keeps of each (query token, document token) pair only which document token was nearest.

A step is that of `contrastive`: every query meets the documents of all workers, at once or in chunks,
and the gradient is that of one plain step on the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import Field
from torch import Tensor

from recsys_ray.config import Config
from recsys_ray.models.bge_m3 import TokenIds, TokenStates
from recsys_ray.training.contrastive import BatchError, ContrastiveConfig, PairBatch, RandomState, StepValues, Sync
from recsys_ray.training.distributed import RowCounts, exchange_counts, gather_rows, sum_over_workers, world_size
from recsys_ray.training.losses import same_key

SIMILARITY_CELLS = 1 << 24      # largest block of (query token, document token) products held at once
EncodeStates = Callable[[TokenIds], TokenStates]


class BgeM3LossConfig(Config):
    """Weights of the scores in the ensemble and of the losses in the sum; the defaults are the paper's."""

    ensemble: tuple[float, float, float] = (1.0, 0.3, 1.0)      # of dense, sparse and multi-vector scores
    losses: tuple[float, float, float] = (1.0, 0.1, 1.0)        # of their losses
    self_distillation: bool = True


class HeadsConfig(BgeM3LossConfig):
    """How the heads for token weights and token vectors are trained beside the dense vector."""

    multi_dimension: int | None = Field(default=None, ge=1)     # of token vectors made anew; None: the body's states


@dataclass(frozen=True)
class Scores:
    """The scores of B queries with C documents, each (B, C)."""

    dense: Tensor
    sparse: Tensor
    multi: Tensor

    def ensemble(self, weights: tuple[float, float, float]) -> Tensor:
        """w1 dense + w2 sparse + w3 multi-vector."""
        return weights[0] * self.dense + weights[1] * self.sparse + weights[2] * self.multi


def scores(queries: TokenStates, documents: TokenStates) -> Scores:
    """All three scores of every query with every document."""
    return Scores(
        queries.dense @ documents.dense.T,
        sparse_scores(queries, documents),
        multi_vector_scores(queries.multi, queries.multi_lengths, documents.multi, documents.multi_lengths))


def sparse_scores(queries: TokenStates, documents: TokenStates) -> Tensor:
    """sum_t q_t d_t over the tokens t that both texts have, (B, C); a repeated token counts with its largest weight."""
    shared = np.intersect1d(queries.token_ids, documents.token_ids)
    return _shared_weights(queries, shared) @ _shared_weights(documents, shared).T


def _shared_weights(states: TokenStates, shared: npt.NDArray[np.int64]) -> Tensor:
    """The weight of each shared token in each text, (N, S); gradients of equal largest weights are shared out."""
    kept = np.flatnonzero(np.isin(states.token_ids, shared))
    text = np.repeat(np.arange(len(states.lengths)), states.lengths)[kept]
    cells = text * len(shared) + np.searchsorted(shared, states.token_ids[kept])
    device = states.weights.device
    weights = states.weights[torch.from_numpy(kept).to(device)]
    flat = torch.zeros(len(states.lengths) * len(shared), dtype=weights.dtype, device=device)
    flat = flat.scatter_reduce(0, torch.from_numpy(cells).to(device), weights, "amax")  # weights are never negative
    return flat.view(len(states.lengths), len(shared))


def multi_vector_scores(query_VM: Tensor, query_lengths: Sequence[int], document_VM: Tensor,
                        document_lengths: Sequence[int]) -> Tensor:
    """1/|q| sum_i max_j q_i . d_j, (B, C), of packed token vectors; every text needs at least one."""
    starts = np.cumsum([0, *document_lengths])
    order = np.argsort(document_lengths, kind="stable")
    nearest = []        # (V, documents of one length) each
    for length, same in groupby(order, key=lambda place: document_lengths[place]):
        places = list(same)
        step = max(1, SIMILARITY_CELLS // max(1, length * len(query_VM)))
        for begin in range(0, len(places), step):
            some = places[begin: begin + step]
            tokens = np.concatenate([np.arange(starts[place], starts[place] + length) for place in some])
            block = document_VM[torch.from_numpy(tokens).to(document_VM.device)]
            nearest.append((query_VM @ block.T).view(len(query_VM), len(some), length).max(dim=2).values)
    back = torch.from_numpy(np.argsort(order)).to(query_VM.device)
    nearest_VC = torch.cat(nearest, dim=1)[:, back]
    lengths = torch.tensor(list(query_lengths), device=query_VM.device)
    text = torch.repeat_interleave(torch.arange(len(lengths), device=query_VM.device), lengths)
    summed = torch.zeros(len(lengths), nearest_VC.shape[1], dtype=nearest_VC.dtype, device=query_VM.device)
    return summed.index_add(0, text, nearest_VC) / lengths[:, None]


def bge_m3_loss(found: Scores, positive: Tensor, config: BgeM3LossConfig, temperature: float,
                allowed: Tensor | None = None) -> tuple[Tensor, dict[str, float]]:
    """(the loss, its parts as floats) of B queries with C documents; `positive` (B,) are their places.

    With tau the temperature (0.02 in the paper), l(s) the mean over queries of -log softmax(s / tau)[positive], s_x the
    scores, s_e = w1 s_d + w2 s_s + w3 s_m and (a1, a2, a3) the weights of the losses:

        L  = (a1 l(s_d) + a2 l(s_s) + a3 l(s_m) + l(s_e)) / 4
        L' = (a1 k(s_d) + a2 k(s_s) + a3 k(s_m)) / 3,   k as in `self_distillation`
        loss = (L + L') / 2, or L alone without self-distillation.

    Documents where `allowed` (B, C) is False count for no loss of that query; its positive must be allowed.
    """
    single = (found.dense, found.sparse, found.multi)
    ensemble = found.ensemble(config.ensemble)
    names = ("dense", "sparse", "multi", "ensemble")
    plain = [F.cross_entropy(_logits(one, temperature, allowed), positive) for one in (*single, ensemble)]
    parts = dict(zip(names, (float(one.detach()) for one in plain), strict=True))
    loss = (sum((weight * one for weight, one in zip(config.losses, plain, strict=False)), plain[3])) / 4
    if config.self_distillation:
        taught = [self_distillation(one, ensemble, temperature, allowed) for one in single]
        parts |= {f"distil_{name}": float(one.detach()) for name, one in zip(names, taught, strict=False)}
        distilled = sum((weight * one for weight, one in zip(config.losses, taught, strict=True)),
                        torch.zeros_like(loss)) / 3
        loss = (loss + distilled) / 2
    return loss, parts


def self_distillation(student: Tensor, teacher: Tensor, temperature: float, allowed: Tensor | None = None) -> Tensor:
    """k(s) = - mean over queries of sum_c p_c log softmax(s / tau)_c with p = softmax(teacher / tau).

    The teacher, the ensemble of the model's own scores, gets no gradient. Scores are (B, C).
    """
    targets = torch.softmax(_logits(teacher.detach(), temperature, allowed), dim=-1)
    logs = torch.log_softmax(_logits(student, temperature, allowed), dim=-1)
    return -(targets * logs.masked_fill(targets == 0, 0)).sum(dim=-1).mean()  # 0 * -inf has no place in a sum


# --- a step ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Chunk:
    """Texts that go through the model together, and the random state that this began with."""

    texts: TokenIds
    rng: RandomState


def bge_m3_backward(encode: EncodeStates, batch: PairBatch, heads: BgeM3LossConfig, config: ContrastiveConfig, *,
                    scale: float = 1.0, sync: Sync = nullcontext) -> tuple[StepValues, Mapping[str, float]]:
    """(the values of the step, the parts of its loss), over all workers; gradients are added to the parameters.

    Of `config` temperature, masks, `mini_batch` and `gather` have a say. The loss is `bge_m3_loss` of every
    query with the documents of all workers, times `scale` and, because the caller averages gradients over
    the workers, their number. With `mini_batch` texts at a time the states are computed without gradients,
    the loss is differentiated with respect to them, and each mini-batch runs again to carry its part back
    (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983);
    `sync`, the model's `no_sync`, is held in all of them but the last.

    Errors: `BatchError` on all workers when one has no queries.
    """
    sides = (batch.query_tokens, batch.document_tokens)
    if config.mini_batch is None:
        states = [encode(texts) for texts in sides]
        leaves = [_leaves([one]) for one in states]
        values = _loss_of_leaves(leaves[0], leaves[1], batch, heads, config, scale)
        torch.autograd.backward([tensor for one in states for tensor in _tensors(one)],
                                [_gradient(leaf) for one in leaves for leaf in _tensors(one)])
        return values
    chunks = [list[_Chunk](), list[_Chunk]()]
    with torch.no_grad():
        leaves = [_leaves([encode(chunk.texts) for chunk in _chunked(texts, config.mini_batch, own)])
                  for texts, own in zip(sides, chunks, strict=True)]
    values = _loss_of_leaves(leaves[0], leaves[1], batch, heads, config, scale)
    for side, own in enumerate(chunks):
        done = [0, 0, 0]
        for number, chunk in enumerate(own):
            last = side == 1 and number == len(own) - 1
            with nullcontext() if last else sync(), chunk.rng.replayed():
                again = _tensors(encode(chunk.texts))
                ends = [start + len(part) for start, part in zip(done, again, strict=True)]
                torch.autograd.backward(again, [_gradient(leaf)[start:end] for leaf, start, end in zip(
                    _tensors(leaves[side]), done, ends, strict=True)])
                done = ends
    return values


def _chunked(texts: TokenIds, most: int, taken: list[_Chunk]) -> Iterator[_Chunk]:
    """Chunks of at most `most` texts, noted in `taken`; the random state is that of the moment one is taken."""
    for start in range(0, len(texts), most):
        taken.append(_Chunk(texts[start:start + most], RandomState.now()))
        yield taken[-1]


def _loss_of_leaves(queries: TokenStates, documents: TokenStates, batch: PairBatch, heads: BgeM3LossConfig,
                    config: ContrastiveConfig, scale: float) -> tuple[StepValues, dict[str, float]]:
    """The values of a step; the gradient of the worker's own texts, by all workers' losses, goes to the leaves."""
    device = queries.dense.device
    sizes = [len(queries.lengths), len(documents.lengths), len(documents.token_ids), len(documents.multi)]
    counts = exchange_counts(sizes, device)
    if 0 in counts[0].counts:
        raise BatchError(f"workers with {counts[0].counts} queries: every worker needs at least one")
    total, own = counts[0].total, sizes[0]
    if not config.gather:
        counts = [RowCounts((size,), 0) for size in sizes]
    pool = _of_all_workers(documents, counts[1:])
    positive_B, allowed_BC = _candidates(batch, counts[1], config, device)
    found = scores(queries, pool)
    loss, parts = bge_m3_loss(found, positive_B, heads, config.temperature, allowed_BC)
    (loss * (own * scale * world_size() / total)).backward()    # type: ignore[no-untyped-call]
    for leaf, of_all, rows in zip(_tensors(documents), _tensors(pool), (counts[1], counts[2], counts[3]), strict=True):
        gradient = _gradient(of_all)
        leaf.grad = (sum_over_workers(gradient) if len(rows.counts) > 1 else gradient)[rows.own]
    ensemble_BC = found.ensemble(heads.ensemble).detach()
    places_B = torch.arange(own, device=device)
    others_BC = allowed_BC.clone()
    others_BC[places_B, positive_B] = False
    best_B = ensemble_BC.masked_fill(~others_BC, -torch.inf).max(dim=1).values
    hits = float((ensemble_BC[places_B, positive_B] > best_B).sum())
    names = sorted(parts)
    sums = torch.tensor([float(loss.detach()) * own, hits, float((~allowed_BC).sum()), allowed_BC.numel() - own,
                         *(parts[name] * own for name in names)], dtype=torch.float64, device=device)
    summed, hit, masked, others, *of_parts = sum_over_workers(sums).tolist()
    return (StepValues(summed / total, hit / total, masked / max(1, others), total),
            {name: value / total for name, value in zip(names, of_parts, strict=True)})


def _of_all_workers(states: TokenStates, counts: Sequence[RowCounts]) -> TokenStates:
    """The states of all workers' texts, to differentiate with respect to; `counts` of texts, tokens and vectors."""
    texts, tokens, vectors = counts
    device = states.dense.device
    dense, weights, multi = (gather_rows(tensor.detach(), of).requires_grad_()
                             for tensor, of in zip(_tensors(states), (texts, tokens, vectors), strict=True))
    token_ids = gather_rows(torch.from_numpy(states.token_ids).to(device), tokens).cpu().numpy()
    lengths = gather_rows(torch.tensor(states.lengths, device=device), texts).tolist()
    return TokenStates(dense, weights, token_ids, lengths, multi, [length - 1 for length in lengths])


def _candidates(batch: PairBatch, documents: RowCounts, config: ContrastiveConfig, device: torch.device
                ) -> tuple[Tensor, Tensor]:
    """(the place of each query's positive among all workers' documents, (B,); which of them count for it, (B, C))."""
    keys = np.stack([batch.document_group, batch.document_text], axis=1)
    groups_C, texts_C = gather_rows(torch.from_numpy(keys).to(device), documents).unbind(dim=1)
    positive_B = torch.from_numpy(batch.positive + documents.own.start).to(device)
    rejected_BC = torch.zeros(len(positive_B), len(groups_C), dtype=torch.bool, device=device)
    if config.mask_same_product:
        rejected_BC |= same_key(torch.from_numpy(batch.query_group).to(device), groups_C)
    if config.mask_same_text:
        rejected_BC |= same_key(texts_C[positive_B], texts_C)
    return positive_B, (~rejected_BC).scatter(1, positive_B[:, None], True)


def _tensors(states: TokenStates) -> tuple[Tensor, Tensor, Tensor]:
    return states.dense, states.weights, states.multi


def _gradient(leaf: Tensor) -> Tensor:
    return leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)


def _leaves(parts: Sequence[TokenStates]) -> TokenStates:
    """The states of all texts, to differentiate with respect to."""
    joined = joined_states(parts)
    dense, weights, multi = (tensor.detach().requires_grad_() for tensor in _tensors(joined))
    return TokenStates(dense, weights, joined.token_ids, joined.lengths, multi, joined.multi_lengths)


def joined_states(parts: Sequence[TokenStates]) -> TokenStates:
    """The states of the texts of all parts, one after the other."""
    dense, weights, multi = (torch.cat(tensors) for tensors in zip(*map(_tensors, parts), strict=True))
    lengths = [length for part in parts for length in part.lengths]
    return TokenStates(dense, weights, np.concatenate([part.token_ids for part in parts]), lengths, multi,
                       [length - 1 for length in lengths])


def _logits(score: Tensor, temperature: float, allowed: Tensor | None) -> Tensor:
    logits = score / temperature
    return logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)
