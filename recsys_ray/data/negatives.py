"""Hard negatives: which of the found products teach a retriever something, and which only look wrong.

Most of what ranks high for a query and is not its product is a product that would have done as well.
The positive-aware filter (Moreira et al., "NV-Retriever", arXiv 2407.15831, TopK-PercPos and
TopK-MarginPos) keeps a candidate only when it scores clearly below the positive; on a small catalogue
0.95 of the positive's score leaves almost nothing, so `kept_at` reports what other fractions would.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

from recsys_ray.config import Config
from recsys_ray.ids import row_ids

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
RATIOS = (0.6, 0.7, 0.8, 0.9, 0.95, 1.0)    # of the positive's score, for the report
SPARE = 64                                  # candidates beyond the window, in place of those that are never negatives


class NegativesConfig(Config):
    """How many negatives a pair gets, and from where in the ranking."""

    mined: int = Field(default=4, ge=0)
    random: int = Field(default=1, ge=0)            # from the whole catalogue, mixed in
    first_rank: int = Field(default=1, ge=1)        # the window, counted without the positive and its like
    last_rank: int = Field(default=50, ge=1)
    max_score_ratio: float = Field(default=0.95, gt=0)  # keep what scores below this fraction of the positive's score
    min_margin: float = Field(default=0.0, ge=0)    # and at least so far below it
    pick: Literal["hardest", "random"] = "hardest"  # of what is left in the window
    lexical: bool = True                            # the window of BM25 too, judged by the same dense scores
    seed: int = 7

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.last_rank < self.first_rank:
            raise ValueError(f"last_rank {self.last_rank} lies before first_rank {self.first_rank}")
        if not self.mined and not self.random:
            raise ValueError("mined and random are both 0: nothing would be added")
        return self

    @property
    def depth(self) -> int:
        """How many candidates each retriever has to give."""
        return self.last_rank + SPARE


@dataclass(frozen=True)
class Candidates:
    """What one query found: C products with their groups and both scores."""

    row_ids: Ints
    groups: Ints
    dense_scores: Floats
    lexical_scores: Floats


@dataclass
class MiningCounts:
    """What happened to the candidates, added up over pairs."""

    pairs: int = 0
    mined: int = 0
    random: int = 0
    short: int = 0              # pairs with fewer mined negatives than asked for
    in_window: int = 0
    too_close: int = 0          # of those: refused by the positive-aware filter
    positive_score: float = 0.0
    hardest_score: float = 0.0  # of the first mined negative, over pairs that have one
    with_mined: int = 0
    kept_at: dict[str, int] = field(default_factory=lambda: {f"{ratio:g}": 0 for ratio in RATIOS})

    def add(self, other: MiningCounts) -> None:
        """Take in the counts of other pairs."""
        for name in ("pairs", "mined", "random", "short", "in_window", "too_close", "positive_score", "hardest_score",
                     "with_mined"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for ratio, count in other.kept_at.items():
            self.kept_at[ratio] += count

    def summary(self) -> dict[str, float | int | dict[str, float]]:
        """Means and shares for the manifest; `kept_at`: the share of the window below each fraction."""
        window, pairs = max(1, self.in_window), max(1, self.pairs)
        return {
            "pairs": self.pairs, "mined": self.mined, "random": self.random,
            "short_share": round(self.short / pairs, 6), "refused_share": round(self.too_close / window, 6),
            "positive_score": round(self.positive_score / pairs, 6),
            "hardest_score": round(self.hardest_score / max(1, self.with_mined), 6),
            "kept_at": {ratio: round(count / window, 6) for ratio, count in self.kept_at.items()}}


def ceiling(positive_score: float, ratio: float, margin: float = 0.0) -> float:
    """The score a negative must stay below: `ratio` of the positive's, less `margin`.

    For a score below zero the fraction moves away from it the same way: s - (1 - ratio) |s|.
    """
    return positive_score - (1 - ratio) * abs(positive_score) - margin


def choose_mined(found: Candidates, positive_score: float, wrong_groups: Collection[int], config: NegativesConfig,
                 name: str, counts: MiningCounts) -> Ints:
    """Positions among the candidates of at most `config.mined` negatives, each of another group.

    `wrong_groups`: those of the positive and of every product the same query is paired with; `name`: of
    the pair, for the draw. `counts` takes the result in.
    """
    usable = np.flatnonzero(~np.isin(found.groups, list(wrong_groups)))
    window = _window(usable, found.dense_scores, found.row_ids, config)
    if config.lexical:
        matched = usable[found.lexical_scores[usable] > 0]
        window = np.union1d(window, _window(matched, found.lexical_scores, found.row_ids, config))
    scores = found.dense_scores[window]
    limit = ceiling(positive_score, config.max_score_ratio, config.min_margin)
    left = window[scores < limit]
    if config.pick == "random":
        random = np.random.default_rng(int(row_ids([f"{config.seed}:{name}"])[0]))
        order = left[random.permutation(len(left))]
    else:
        order = left[np.lexsort((found.row_ids[left], -found.dense_scores[left]))]
    _, first = np.unique(found.groups[order], return_index=True)
    chosen = order[np.sort(first)][: config.mined].astype(np.int64)
    _count(counts, found, scores, positive_score, limit, chosen, config)
    return chosen


def _window(places: npt.NDArray[np.intp], scores: Floats, ids: Ints, config: NegativesConfig) -> npt.NDArray[np.intp]:
    ranked = places[np.lexsort((ids[places], -scores[places]))]
    return ranked[config.first_rank - 1: config.last_rank]


def _count(counts: MiningCounts, found: Candidates, scores: Floats, positive_score: float, limit: float, chosen: Ints,
           config: NegativesConfig) -> None:
    counts.pairs += 1
    counts.mined += len(chosen)
    counts.short += len(chosen) < config.mined
    counts.in_window += len(scores)
    counts.too_close += int((scores >= limit).sum())
    counts.positive_score += positive_score
    if len(chosen):
        counts.with_mined += 1
        counts.hardest_score += float(found.dense_scores[chosen].max())
    for ratio in RATIOS:
        counts.kept_at[f"{ratio:g}"] += int((scores < ceiling(positive_score, ratio)).sum())


def choose_random(pool: Ints, groups: Ints, wrong_groups: Collection[int], count: int, name: str, seed: int) -> Ints:
    """Positions in the pool (sorted row ids with their groups) of `count` products of other groups, drawn by `name`."""
    if not len(pool) or not count:
        return np.zeros(0, np.int64)
    random = np.random.default_rng(int(row_ids([f"{seed}:random:{name}"])[0]))
    taken: list[int] = []
    groups_taken = set(wrong_groups)
    for place in random.integers(0, len(pool), size=8 * count + SPARE).tolist():
        if int(groups[place]) not in groups_taken:
            taken.append(place)
            groups_taken.add(int(groups[place]))
            if len(taken) == count:
                break
    return np.array(taken, dtype=np.int64)


class PairedGroups:
    """The groups of all products that one query text is paired with, for texts with more than one."""

    def __init__(self, hashes: Ints, groups: Ints) -> None:
        self._hashes, self._groups = hashes, groups     # sorted by hash

    @classmethod
    def of(cls, hashes: Ints, groups: Ints) -> PairedGroups:
        """From the hash of each pair's query and its group, in any order."""
        pairs = np.unique(np.stack([hashes, groups], axis=1), axis=0) if len(hashes) else np.zeros((0, 2), np.int64)
        _, place, sizes = np.unique(pairs[:, 0], return_inverse=True, return_counts=True)
        several = pairs[sizes[place] > 1]
        return cls(np.ascontiguousarray(several[:, 0]), np.ascontiguousarray(several[:, 1]))

    def table(self) -> pa.Table:
        """As a table, for the workers; `PairedGroups(*columns)` reads it back."""
        return pa.table({"query_hash": pa.array(self._hashes, pa.int64()),
                         "group_id": pa.array(self._groups, pa.int64())})

    def of_query(self, query_hash: int) -> set[int]:
        """The groups known for one query; empty when it has one alone."""
        start, end = np.searchsorted(self._hashes, [query_hash, query_hash + 1])
        return set(self._groups[start:end].tolist())


def query_hashes(queries: pa.ChunkedArray) -> Ints:
    """A number for each query text, equal for texts that differ in case and spaces alone."""
    return row_ids(" ".join(one.lower().split()) for one in queries.to_pylist())


def with_negatives(pairs: pa.Table, negatives: list[tuple[list[int], list[str], list[int]]], keep: bool) -> pa.Table:
    """The TRAINING_PAIR rows with these (row ids, texts, groups) as negatives, after the earlier ones if `keep`."""
    columns = ("negative_row_ids", "negative_texts", "negative_group_ids")
    for place, name in enumerate(columns):
        added = [one[place] for one in negatives]
        if keep:
            added = [[*old, *new] for old, new in zip(pairs[name].to_pylist(), added, strict=True)]
        number = pairs.schema.get_field_index(name)
        pairs = pairs.set_column(number, pairs.schema.field(number), pa.array(added, pairs.schema.field(number).type))
    return pairs
