"""Splits of products for concern models: near-duplicates and listings of one formula together, stratified per concern.

Splitting (product, concern) rows, as is often done, puts one ingredient list on both sides; here the group is the unit.
Stratification is the iterative one of Sechidis, Tsoumakas and Vlahavas, "On the stratification of multi-label data"
(ECML PKDD 2011), with groups in the place of examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from recsys_ray.config import Config
from recsys_ray.data.splits import SPLITS

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
FORMULA = 4     # names from which two equal lists are one formula


class ConcernSplitConfig(Config):
    """Shares of the products; the rest is test."""

    train: float = Field(default=0.7, gt=0, lt=1)
    valid: float = Field(default=0.15, ge=0, lt=1)
    seed: int = 7

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.train + self.valid >= 1:
            raise ValueError(f"train {self.train} and valid {self.valid} leave nothing for test")
        return self

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of train, valid and test."""
        return self.train, self.valid, 1 - self.train - self.valid


def formula_groups(row_ids: Ints, group_ids: Ints, formulas: Sequence[Sequence[str]]) -> Ints:
    """The group of each of N products, shape (N,): near-duplicates, and listings with one ingredient list, joined.

    `formulas` are the ingredient names in order; one of fewer than 4 names joins nothing: pure oils, and ingredients
    that a text names, are alike by chance. A group's id is its smallest row id.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(row_ids)
    first: dict[object, int] = {}
    joined = []
    for at, (group, formula) in enumerate(zip(group_ids.tolist(), formulas, strict=True)):
        keys: list[object] = [group] if len(formula) < FORMULA else [group, tuple(formula)]
        joined += [(at, first.setdefault(key, at)) for key in keys]
    left, right = np.array(joined, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(count, count))
    number, code = connected_components(graph, directed=False)
    smallest = np.full(number, np.iinfo(np.int64).max)
    np.minimum.at(smallest, code, row_ids)
    return np.asarray(smallest[code], dtype=np.int64)


def stratified_split(group_ids: Ints, marks: npt.NDArray[np.bool_], config: ConcernSplitConfig) -> list[str]:
    """"train", "valid" or "test" of each of N products; equal ids are together, marks (N, M) spread by the shares.

    The rarest mark is dealt out first, each of its groups to the split that lacks it most, so that a concern with
    ten positives still has some to test on.
    """
    _, code = np.unique(group_ids, return_inverse=True)
    groups = int(code.max()) + 1 if len(code) else 0
    counts = np.zeros((groups, marks.shape[1] + 1))
    np.add.at(counts, code, np.concatenate([marks, np.ones((len(marks), 1), dtype=bool)], axis=1).astype(np.float64))
    split = _deal(counts, np.array(config.shares), np.random.default_rng(config.seed))
    return [SPLITS[one] for one in split[code]]


def _deal(counts: Floats, shares: Floats, rng: np.random.Generator) -> Ints:
    """The split of each group; counts (G, M + 1) of each mark, and in the last column of products."""
    wanted = shares[:, None] * counts.sum(axis=0)[None, :]      # (splits, M + 1)
    split = np.full(len(counts), -1, dtype=np.int64)
    order = rng.permutation(len(counts))
    open_groups = np.ones(len(counts), dtype=bool)
    while open_groups.any():
        left = (counts[open_groups] > 0).sum(axis=0)[:-1]
        mark = int(np.where(left > 0, left, np.iinfo(np.int64).max).argmin()) if (left > 0).any() else -1
        todo = order[open_groups[order] & (counts[order, mark] > 0)]
        for group in todo[np.argsort(-counts[todo, mark], kind="stable")]:
            need = np.where(shares > 0, wanted[:, mark], -np.inf)
            ties = np.flatnonzero(need >= need.max() - 1e-9)
            best = int(ties[wanted[ties, -1].argmax()])
            split[group] = best
            wanted[best] -= counts[group]
            open_groups[group] = False
    return split
