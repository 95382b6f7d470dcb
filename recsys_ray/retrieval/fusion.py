"""One score from several: how the dense, the lexical and other scores of a candidate become its rank.

All functions look at one query's candidates, each of which carries all scores, so the result does
not depend on which retriever found a candidate, nor on how the catalogue is divided into segments.
The scores by learned token weights (sparse) and by late interaction (multi) take part when they have
a weight; the lexical score has what the others leave, w_l = 1 - w_d - w_s - w_m. Three methods:

* convex (default): the weighted sum of normalised scores. Each score is min-max normalised over its own
  `window` best candidates: the best has 1, the last of the window 0, and what lies below falls by a
  thousandth of that slope, enough to keep its order and too little to outweigh the other score.
  The lexical minimum is 0, what BM25 gives a text without any query term, while fewer than `window`
  candidates match. A fixed minimum for both (Bruch et al., "An Analysis of Fusion Functions for
  Hybrid Retrieval", TOIS 2023, take -1 for a cosine) leaves the dense scores of a catalogue in a
  narrow band near the top and lets the weaker retriever spoil the stronger one; a window also makes
  the result independent of how many further candidates were fetched.
* rrf: the sum of w_i / (c + rank by score i); a candidate without any query term has no lexical
  rank, one without any shared token no sparse rank. Cormack et al., SIGIR 2009, with weights.
* sum: the weighted sum of the scores as they are. What BGE-M3 does with its own three, whose scales
  are alike: its weights (1, 0.3, 1) are dense_weight 0.435, sparse_weight 0.13, multi_weight 0.435.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from recsys_ray.config import Config

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]

BELOW_WINDOW = 1e-3


class FusionError(ValueError):
    """Scores or figures that cannot be fused or tuned; the message says what does not fit."""


class FusionConfig(Config):
    """How several scores become one."""

    method: Literal["convex", "rrf", "sum"] = "convex"
    # 0.35: cross-validated over the judged queries of two real shops (benchmarks/results/esci.json, icecat.json)
    dense_weight: float = Field(default=0.35, ge=0, le=1)   # the lexical score has what all others leave
    sparse_weight: float = Field(default=0.0, ge=0, le=1)   # of learned token weights; above 0 they are searched
    multi_weight: float = Field(default=0.0, ge=0, le=1)    # of late interaction; above 0 candidates are scored by it
    window: int = Field(default=100, ge=2)                  # convex: candidates over which a score goes from 1 to 0
    rrf_k: int = Field(default=60, ge=1)                    # rrf: the constant added to every rank

    @model_validator(mode="after")
    def _leave_a_rest(self) -> Self:
        if self.lexical_weight < 0:
            raise ValueError("dense_weight, sparse_weight and multi_weight sum to more than 1; the lexical score has "
                             "what they leave")
        return self

    @property
    def lexical_weight(self) -> float:
        """What the other weights leave; a rounding error below 0 is 0."""
        rest = 1 - (self.dense_weight + self.sparse_weight + self.multi_weight)
        return 0.0 if abs(rest) < 1e-9 else rest

    @property
    def asks_signals(self) -> bool:
        """Whether learned token weights or token vectors have a say."""
        return self.sparse_weight > 0 or self.multi_weight > 0


def fuse(dense: Floats, lexical: Floats, config: FusionConfig, sparse: Floats | None = None,
         multi: Floats | None = None) -> npt.NDArray[np.float32]:
    """The fused scores, shape (C,), of one query's C candidates; a NaN dense or multi score counts as the lowest.

    Errors: `FusionError` when a score that has a weight is missing or of another length.
    """
    weighted = [(dense, config.dense_weight, False), (lexical, config.lexical_weight, True)]
    for name, scores, weight, matches in (("sparse", sparse, config.sparse_weight, True),
                                          ("multi", multi, config.multi_weight, False)):
        if weight > 0:
            if scores is None:
                raise FusionError(f"fusion.{name}_weight is {weight}, but the candidates have no {name} scores")
            weighted.append((scores, weight, matches))
    if any(scores.shape != dense.shape for scores, _, _ in weighted):
        raise FusionError(f"{len(dense)} dense scores but {[len(one) for one, _, _ in weighted[1:]]} lexical and other "
                          "scores: every candidate needs both, and each other score that has a weight")
    total = np.zeros(len(dense))
    for scores, weight, matches in weighted if len(dense) else ():
        total += weight * _part(scores.astype(np.float64), matches, config)
    return total.astype(np.float32)


def _part(scores: Floats, matches: bool, config: FusionConfig) -> Floats:
    """One score as it enters the sum; with `matches` a candidate of score 0 shares nothing with the query."""
    if config.method == "rrf":
        there = scores > 0 if matches else ~np.isnan(scores)
        return np.where(there, reciprocal_ranks(scores, config.rrf_k), 0)
    scores = np.where(scores > 0, scores, 0) if matches else scores
    if config.method == "convex":
        return normalised(scores, config.window)
    known = scores[~np.isnan(scores)]
    return np.nan_to_num(scores, nan=float(known.min()) if len(known) else 0.0)


def normalised(scores: Floats, window: int) -> Floats:
    """(score - floor) / (best - floor), the floor being the score at rank `window` or the last one.

    What lies below the floor is a small negative number. When the window holds one score only, that
    score gives 1. A NaN gives 0 or the lowest result, whichever is less.
    """
    known = scores[~np.isnan(scores)]
    if not len(known):
        return np.zeros(len(scores))
    rank = min(window, len(known))
    floor, best = np.partition(known, len(known) - rank)[len(known) - rank], known.max()
    if best <= floor:
        return np.where(scores >= best, 1.0, 0.0)
    parts: Floats = (scores - floor) / (best - floor)
    parts = np.where(parts < 0, BELOW_WINDOW * parts, parts)
    return np.nan_to_num(parts, nan=min(0.0, float(np.nanmin(parts))))


def reciprocal_ranks(scores: Floats, constant: int) -> Floats:
    """1 / (constant + rank), rank 1 for the best; equal scores share the best rank of their group."""
    order = np.sort(-np.nan_to_num(scores, nan=-np.inf))
    rank = np.searchsorted(order, -np.nan_to_num(scores, nan=-np.inf)) + 1
    shares: Floats = 1.0 / (constant + rank)
    return shares


def ranking(scores: Floats, row_ids: Ints, k: int) -> Ints:
    """The positions of the at most `k` best candidates, best first, equal scores by smaller row id."""
    return np.lexsort((row_ids, -scores))[: max(0, k)]


@dataclass(frozen=True)
class TunedWeight:
    """A dense weight chosen by cross-validation, and what it can be expected to give on new queries."""

    weight: float                           # chosen on all queries
    out_of_fold: npt.NDArray[np.float64]    # (Q,): each query under the weight chosen without its fold
    query_weights: npt.NDArray[np.float64]  # (Q,): that weight
    in_sample: float                        # mean under `weight` on the same queries: optimistic

    def as_dict(self) -> dict[str, Any]:
        """Weights and means as plain values for JSON."""
        return {"weight": self.weight, "out_of_fold": float(np.nanmean(self.out_of_fold)),
                "fold_weights": sorted(set(self.query_weights.tolist())), "in_sample": self.in_sample}


def tune_dense_weight(weights: Sequence[float], values: npt.NDArray[np.float64], *, folds: int = 5,
                      seed: int = 7) -> TunedWeight:
    """The best dense weight by k-fold cross-validation over queries.

    `values[i, q]` is the metric of query q when fused with `weights[i]`; NaN where the metric is
    undefined. A weight is judged together with its neighbours (1 : 2 : 1) before the best is taken,
    because the curve is smooth and its noise is not. Errors: `FusionError` for shapes that do not
    fit or too few queries.
    """
    if values.ndim != 2 or values.shape[0] != len(weights) or len(weights) == 0:
        raise FusionError(f"{len(weights)} weights for values of shape {values.shape}; one row per weight is needed")
    queries = values.shape[1]
    if not 2 <= folds <= queries:
        raise FusionError(f"{folds} folds for {queries} queries; take 2 to {queries}")
    fold = np.random.default_rng(seed).permutation(queries) % folds
    out_of_fold = np.full(queries, np.nan)
    query_weights = np.full(queries, np.nan)
    for number in range(folds):
        best = _best_row(values[:, fold != number])
        out_of_fold[fold == number] = values[best, fold == number]
        query_weights[fold == number] = weights[best]
    best = _best_row(values)
    return TunedWeight(float(weights[best]), out_of_fold, query_weights, float(np.nanmean(values[best])))


def _best_row(values: npt.NDArray[np.float64]) -> int:
    means = np.nanmean(values, axis=1)
    padded = np.concatenate([means[:1], means, means[-1:]])
    smooth = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return int(np.argmax(smooth))
