"""Whether what is found looks like what was asked for: value@10 of each attribute, average precision, alignment.

`category2@10` of a query is the share of the ten nearest products that are of its kind, among products whose kind is
known; the other attributes likewise. The query's own product and its group are left out, and "graphic" is no kind
(`category_of`). Ties count as any order of them does on average (McSherry and Najork, ECIR 2008), so vectors that are
all the same reach exactly the level of chance and not what the order of the rows happens to give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_ray.data.attribute_schema import NAMES
from recsys_ray.data.attributes import value_of
from recsys_ray.evaluation.slice_gate import slice_gate as slice_gate

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
LeaveOut = Literal["group", "product", "nothing"]
CELLS = 1 << 23         # similarities held at once
DECIMALS = 6            # a smaller difference between two similarities is rounding


class AttributeMetricError(ValueError):
    """Vectors and rows that do not belong together, or vectors that are none."""


@dataclass(frozen=True)
class _Coded:
    """Queries and catalogue with values as numbers (-1: unknown) and what is left out as numbers."""

    query: dict[str, Ints]
    catalogue: dict[str, Ints]
    query_own: Ints             # a catalogue row with the same number is left out; -1: nothing is
    catalogue_own: Ints


def attribute_figures(query_vectors: Vectors, query_rows: pa.Table, catalogue_vectors: Vectors,
                      catalogue_rows: pa.Table, depth: int = 10, leave_out: LeaveOut = "group") -> dict[str, Floats]:
    """Attribute -> value@depth of each query, shape (N_q,); NaN where the query's value is unknown or nothing is left.

    Vectors are compared by cosine; rows are ATTRIBUTE_ROW in the vectors' order. Errors: `AttributeMetricError`.
    """
    coded = _coded(query_rows, catalogue_rows, leave_out)
    found = {name: np.full(len(query_vectors), np.nan) for name in NAMES}
    for part, scores in _similarities(query_vectors, query_rows, catalogue_vectors, catalogue_rows, coded):
        for name in NAMES:
            columns = np.flatnonzero(coded.catalogue[name] >= 0)
            asked = coded.query[name][part]
            rows = np.flatnonzero(asked >= 0)
            if len(columns) and len(rows):
                same = coded.catalogue[name][columns][None, :] == asked[rows, None]
                found[name][part[rows]] = _expected_share(scores[np.ix_(rows, columns)], same, depth)
    return found


def chance_level(query_rows: pa.Table, catalogue_rows: pa.Table, leave_out: LeaveOut = "group") -> dict[str, Floats]:
    """Attribute -> what a random order reaches for each query, exactly: the share of its value in the catalogue."""
    coded = _coded(query_rows, catalogue_rows, leave_out)
    found = {}
    for name in NAMES:
        same, known = _offered(coded, name)
        with np.errstate(invalid="ignore", divide="ignore"):
            found[name] = np.where(coded.query[name] >= 0, same / known, np.nan)
    return found


def chance_precision(query_rows: pa.Table, catalogue_rows: pa.Table, name: str = "category2",
                     leave_out: LeaveOut = "group") -> Floats:
    """The average precision of a random order for each query, exactly, (N_q,); NaN where nothing is relevant.

    With R relevant rows of N, p = (R - 1) / (N - 1) and the harmonic number H_N it is p + (1 - p) H_N / N: a row at
    rank k is relevant with R / N, and of the k - 1 before it a share p is expected to be.
    """
    coded = _coded(query_rows, catalogue_rows, leave_out)
    same, known = _offered(coded, name)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, known.max(initial=1) + 1))])[known]
    with np.errstate(invalid="ignore", divide="ignore"):
        others = np.where(known > 1, (same - 1) / (known - 1), 0.0)
        return np.where((coded.query[name] >= 0) & (same > 0), others + (1 - others) * harmonic / known, np.nan)


def _offered(coded: _Coded, name: str) -> tuple[Ints, Ints]:
    """(rows of each query's value, rows of any known value) in the catalogue without what is left out, (N_q,) each."""
    asked, offered = coded.query[name], coded.catalogue[name]
    known = offered >= 0
    size = 1 + int(max(offered.max(initial=-1), asked.max(initial=-1), 0))
    own_known = _counts_of(coded.query_own, coded.catalogue_own[known])
    own_same = _counts_of(np.where(coded.query_own >= 0, coded.query_own * size + asked, -1),
                          np.where(coded.catalogue_own[known] >= 0, coded.catalogue_own[known] * size + offered[known],
                                   -1))
    same = np.bincount(offered[known], minlength=size)[np.maximum(asked, 0)] - own_same
    return np.where(asked >= 0, same, 0), known.sum() - own_known


def average_precisions(query_vectors: Vectors, query_rows: pa.Table, catalogue_vectors: Vectors,
                       catalogue_rows: pa.Table, name: str = "category2", leave_out: LeaveOut = "group",
                       seed: int = 7) -> Floats:
    """Average precision of each query over the whole order, shape (N_q,); relevant is what has its value of `name`.

    Unknown rows are not in the order; ties fall at random. NaN where nothing is relevant. The mean over queries is mAP.
    """
    coded = _coded(query_rows, catalogue_rows, leave_out)
    shuffled = np.random.default_rng(seed).permutation(np.flatnonzero(coded.catalogue[name] >= 0))
    found = np.full(len(query_vectors), np.nan)
    for part, scores in _similarities(query_vectors, query_rows, catalogue_vectors, catalogue_rows, coded):
        for row, query in enumerate(part):
            own = scores[row, shuffled]
            kept = np.isfinite(own)
            order = np.argsort(-own[kept], kind="stable")
            relevant = (coded.catalogue[name][shuffled][kept] == coded.query[name][query])[order]
            if coded.query[name][query] >= 0 and relevant.any():
                ranks = np.flatnonzero(relevant) + 1
                found[query] = float((np.arange(1, len(ranks) + 1) / ranks).mean())
    return found


def top_products(query_vectors: Vectors, query_rows: pa.Table, catalogue_vectors: Vectors, catalogue_rows: pa.Table,
                 depth: int = 10, leave_out: LeaveOut = "group", seed: int = 7) -> Ints:
    """The nearest catalogue rows of each query, best first, shape (N_q, depth); -1 where there are fewer."""
    coded = _coded(query_rows, catalogue_rows, leave_out)
    shuffled = np.random.default_rng(seed).permutation(len(catalogue_vectors))
    found = np.full((len(query_vectors), depth), -1, dtype=np.int64)
    for part, scores in _similarities(query_vectors, query_rows, catalogue_vectors, catalogue_rows, coded):
        order = np.argsort(-scores[:, shuffled], axis=1, kind="stable")[:, :depth]
        best = shuffled[order]
        best[~np.isfinite(np.take_along_axis(scores, best, axis=1))] = -1
        found[part, : best.shape[1]] = best
    return found


def _expected_share(scores_BN: Vectors, same_BN: npt.NDArray[np.bool_], depth: int) -> Floats:
    """The share of hits among the first `depth`, averaged over every order of what ties at the last place."""
    depth = min(depth, scores_BN.shape[1])
    edge = -np.partition(-scores_BN, depth - 1, axis=1)[:, [depth - 1]]
    above = scores_BN > edge
    ties = (scores_BN == edge) & np.isfinite(scores_BN)
    ahead, tied = above.sum(axis=1), ties.sum(axis=1)
    places = np.minimum(depth - ahead, tied)        # left for what ties
    with np.errstate(invalid="ignore", divide="ignore"):
        hits = (above & same_BN).sum(axis=1) + np.where(tied, places * (ties & same_BN).sum(axis=1) / tied, 0)
        return np.asarray(hits / (ahead + places), dtype=np.float64)


# --- rows and vectors -----------------------------------------------------------------------------
def _coded(query_rows: pa.Table, catalogue_rows: pa.Table, leave_out: LeaveOut) -> _Coded:
    numbers: dict[tuple[str, str], int] = {}

    def code(kind: str, values: Sequence[str | None]) -> Ints:
        return np.array([-1 if one is None else numbers.setdefault((kind, one), len(numbers)) for one in values],
                        dtype=np.int64)

    tables = [rows.select(["product_id", "group_key", *NAMES]).to_pylist() for rows in (query_rows, catalogue_rows)]
    values = [{name: [value_of(row, name) for row in rows] for name in NAMES} for rows in tables]
    query, catalogue = {}, {}
    for name in NAMES:
        numbers.clear()
        query[name], catalogue[name] = (code(name, part[name]) for part in values)
    numbers.clear()
    owns = [code("own", [_own(row, leave_out) for row in rows]) for rows in tables]
    return _Coded(query, catalogue, *owns)


def _own(row: Mapping[str, Any], leave_out: LeaveOut) -> str | None:
    if leave_out == "nothing":
        return None
    return f"group {row['group_key']}" if leave_out == "group" and row["group_key"] else f"product {row['product_id']}"


def _counts_of(asked: Ints, offered: Ints) -> Ints:
    """How often each asked number is offered; 0 for -1."""
    numbers, counts = np.unique(offered[offered >= 0], return_counts=True)
    if not len(numbers):
        return np.zeros(len(asked), dtype=np.int64)
    at = np.minimum(np.searchsorted(numbers, asked), len(numbers) - 1)
    return np.where((asked >= 0) & (numbers[at] == asked), counts[at], 0)


def _similarities(query_vectors: Vectors, query_rows: pa.Table, catalogue_vectors: Vectors, catalogue_rows: pa.Table,
                  coded: _Coded) -> Iterator[tuple[Ints, Vectors]]:
    """(places of some queries, their cosines with the catalogue, -inf for what is left out)."""
    query = _unit(query_vectors, query_rows, "queries")
    catalogue = _unit(catalogue_vectors, catalogue_rows, "catalogue")
    if query.shape[1] != catalogue.shape[1]:
        raise AttributeMetricError(f"queries have {query.shape[1]} dimensions, the catalogue {catalogue.shape[1]}")
    step = max(1, CELLS // max(1, len(catalogue)))
    for first in range(0, len(query), step):
        part = np.arange(first, min(first + step, len(query)))
        scores = np.round(query[part] @ catalogue.T, DECIMALS)
        own = coded.query_own[part]
        scores[(own[:, None] == coded.catalogue_own[None, :]) & (own >= 0)[:, None]] = -np.inf
        yield part, scores


def _unit(vectors: Vectors, rows: pa.Table, name: str) -> Vectors:
    if vectors.ndim != 2 or len(vectors) != rows.num_rows:
        raise AttributeMetricError(f"{name}: vectors of shape {vectors.shape} for {rows.num_rows} rows")
    if not np.isfinite(vectors).all():
        at = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise AttributeMetricError(f"{name}: the vector of {rows['product_id'][at]} (row {at}) is not finite")
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(length > 0, length, 1), dtype=np.float32)


# --- alignment ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Alignment:
    """Whether rows speak of the vectors beside them; true or false as such."""

    agreement: float            # of neighbours' values
    chance: float               # with rows shuffled
    bad_rows: tuple[tuple[int, int], ...]   # first and last row of stretches that say nothing of their vectors
    reason: str                 # "" where all is well

    def __bool__(self) -> bool:
        return not self.reason


def aligned(vectors: Vectors, rows: pa.Table, seed: int = 7, ids: Sequence[str] | None = None, neighbours: int = 5,
            most: int = 4000, blocks: int = 8, shuffles: int = 100) -> Alignment:
    """Whether `rows` (ATTRIBUTE_ROW) belong to `vectors`, row by row.

    `ids`, the product ids that were stored with the vectors, must be those of the rows. Beyond ids: neighbours must
    share more attributes than with shuffled rows (by four standard deviations), and where they do in the whole, none of
    `blocks` stretches of the table may be without any such sign. Vectors that say nothing (collapsed, random weights)
    fail as well.
    """
    if ids is not None and (bad := [at for at, (one, two) in enumerate(
            zip(ids, rows["product_id"].to_pylist(), strict=True)) if one != two]):
        return Alignment(float("nan"), float("nan"), ((bad[0], bad[-1]),), f"row {bad[0]} is of product "
                         f"{rows['product_id'][bad[0]]}, its vector of {ids[bad[0]]} ({len(bad)} rows differ)")
    random = np.random.default_rng(seed)
    places = np.sort(random.permutation(rows.num_rows)[:most])
    part = rows.take(pa.array(places))
    near = top_products(vectors[places], part, vectors[places], part, neighbours, "group", seed)
    codes = np.stack([_coded(part, part, "nothing").query[name] for name in NAMES], axis=1)
    stretch = np.minimum(np.arange(len(places)) * blocks // max(1, len(places)), blocks - 1)
    seen = _agreement(codes, near, stretch, blocks)
    null = np.stack([_agreement(_shuffled(codes, random), near, stretch, blocks) for _ in range(shuffles)])
    mean, spread = null.mean(axis=0), null.std(axis=0)
    lift = seen - mean
    if not lift[-1] > 4 * spread[-1]:
        return Alignment(float(seen[-1]), float(mean[-1]), (), f"neighbours share {seen[-1]:.3f} of their attributes, "
                         f"shuffled rows {mean[-1]:.3f}: the rows are not those of the vectors, or the vectors say "
                         "nothing of them")
    bad_blocks = [at for at in range(blocks) if 0 < 6 * spread[at] < lift[-1] and lift[at] < 2 * spread[at]]
    spans = tuple((int(places[stretch == at][0]), int(places[stretch == at][-1])) for at in bad_blocks)
    reason = f"rows {spans[0][0]} to {spans[0][1]} share no more attributes with their neighbours than shuffled " \
             "ones, the others do: they are not those of their vectors" if spans else ""
    return Alignment(float(seen[-1]), float(mean[-1]), spans, reason)


def _shuffled(codes_NA: Ints, random: np.random.Generator) -> Ints:
    """The same with the known values of each attribute dealt anew among the rows that have one."""
    shuffled = codes_NA.copy()
    for at in range(codes_NA.shape[1]):
        known = np.flatnonzero(codes_NA[:, at] >= 0)
        shuffled[known, at] = codes_NA[random.permutation(known), at]
    return shuffled


def _agreement(codes_NA: Ints, near_NK: Ints, stretch: Ints, blocks: int) -> Floats:
    """Share of equal values among neighbours, of each stretch and, last, of all, shape (blocks + 1,)."""
    other = codes_NA[np.maximum(near_NK, 0)]                                # (N, K, A)
    both = (other >= 0) & (codes_NA[:, None, :] >= 0) & (near_NK >= 0)[:, :, None]
    same = ((other == codes_NA[:, None, :]) & both).sum(axis=(1, 2)).astype(np.float64)
    counted = both.sum(axis=(1, 2)).astype(np.float64)
    sums = [np.append(np.bincount(stretch, one, minlength=blocks), one.sum()) for one in (same, counted)]
    return np.asarray(sums[0] / np.maximum(sums[1], 1))
