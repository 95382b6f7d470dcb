"""BGE-M3's three scores and its self-distillation, on packed token states and with gradients.

Chen et al., arXiv 2402.03216, sections 3.2 and 3.3. No tensor of batch x length x vocabulary exists:
token weights meet in a matrix over the tokens that queries and documents share, and late interaction
keeps of each (query token, document) pair only which document token was nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import Field
from torch import Tensor

from recsys_ray.config import Config
from recsys_ray.models.bge_m3 import BgeM3, TokenIds, TokenStates

SIMILARITY_CELLS = 1 << 24      # largest block of (query token, document token) products held at once


class BgeM3LossConfig(Config):
    """Weights of the scores in the ensemble and of the losses in the sum; the defaults are the paper's."""

    temperature: float = Field(default=0.02, gt=0)
    ensemble: tuple[float, float, float] = (1.0, 0.3, 1.0)      # of dense, sparse and multi-vector scores
    losses: tuple[float, float, float] = (1.0, 0.1, 1.0)        # of their losses
    self_distillation: bool = True


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


def bge_m3_loss(found: Scores, positive: Tensor, config: BgeM3LossConfig, allowed: Tensor | None = None
                ) -> tuple[Tensor, dict[str, float]]:
    """(the loss, its parts as floats) of B queries with C documents; `positive` (B,) are their places.

    With tau the temperature, l(s) the mean over queries of -log softmax(s / tau)[positive], s_x the
    scores, s_e = w1 s_d + w2 s_s + w3 s_m and (a1, a2, a3) the weights of the losses:

        L  = (a1 l(s_d) + a2 l(s_s) + a3 l(s_m) + l(s_e)) / 4
        L' = (a1 k(s_d) + a2 k(s_s) + a3 k(s_m)) / 3,   k as in `self_distillation`
        loss = (L + L') / 2, or L alone without self-distillation.

    Documents where `allowed` (B, C) is False count for no loss of that query; its positive must be allowed.
    """
    single = (found.dense, found.sparse, found.multi)
    ensemble = found.ensemble(config.ensemble)
    names = ("dense", "sparse", "multi", "ensemble")
    plain = [F.cross_entropy(_logits(one, config.temperature, allowed), positive) for one in (*single, ensemble)]
    parts = dict(zip(names, (float(one.detach()) for one in plain), strict=True))
    loss = (sum((weight * one for weight, one in zip(config.losses, plain, strict=False)), plain[3])) / 4
    if config.self_distillation:
        taught = [self_distillation(one, ensemble, config.temperature, allowed) for one in single]
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
def bge_m3_backward(model: BgeM3, queries: TokenIds, documents: TokenIds, positive: Tensor, config: BgeM3LossConfig,
                    allowed: Tensor | None = None, mini_batch: int | None = None) -> dict[str, float]:
    """Loss and its parts of one step; gradients are added to the model's parameters.

    With `mini_batch` texts at a time the states are computed without gradients, the loss is differentiated
    with respect to them, and each mini-batch runs again to carry its part back (Gao et al., "Scaling Deep
    Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983). Equal to the plain step
    where the body's dropout is a function of the text, as `TrainableBert`'s is.
    """
    if mini_batch is None:
        loss, parts = bge_m3_loss(scores(model(queries), model(documents)), positive, config, allowed)
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": float(loss.detach()), **parts}
    sides = []
    for texts in (queries, documents):
        chunks = [texts[start:start + mini_batch] for start in range(0, len(texts), mini_batch)]
        with torch.no_grad():
            sides.append((chunks, _leaves([model(chunk) for chunk in chunks])))
    loss, parts = bge_m3_loss(scores(sides[0][1], sides[1][1]), positive, config, allowed)
    loss.backward()  # type: ignore[no-untyped-call]
    for chunks, states in sides:
        done = [0, 0, 0]
        for chunk in chunks:
            again = model(chunk)
            pulled = []
            for number, (leaf, part) in enumerate(zip(_tensors(states), _tensors(again), strict=True)):
                pulled.append((part * _gradient(leaf)[done[number]:done[number] + len(part)]).sum())
                done[number] += len(part)
            torch.stack(pulled).sum().backward()  # type: ignore[no-untyped-call]
    return {"loss": float(loss.detach()), **parts}


def _tensors(states: TokenStates) -> tuple[Tensor, Tensor, Tensor]:
    return states.dense, states.weights, states.multi


def _gradient(leaf: Tensor) -> Tensor:
    return leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)


def _leaves(parts: Sequence[TokenStates]) -> TokenStates:
    """The states of all texts, to differentiate with respect to."""
    joined = [torch.cat(tensors).requires_grad_() for tensors in zip(*map(_tensors, parts), strict=True)]
    lengths = [length for part in parts for length in part.lengths]
    return TokenStates(joined[0], joined[1], np.concatenate([part.token_ids for part in parts]), lengths, joined[2],
                       [length - 1 for length in lengths])


def _logits(score: Tensor, temperature: float, allowed: Tensor | None) -> Tensor:
    logits = score / temperature
    return logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)
