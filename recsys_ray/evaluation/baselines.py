"""Two rows that put the others in proportion: popularity below, and the ceiling of a planted truth above."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from recsys_ray.artifacts import open_artifact
from recsys_ray.evaluation.judgments import Problem
from recsys_ray.evaluation.metrics import MetricSpec, RankedJudgments, rank_judgments, score_all

POPULARITY = "popularity"
ORACLE = "oracle"


def popularity_ranks(prepared: Path, problem: Problem, depth: int) -> tuple[RankedJudgments, int]:
    """The judgments ranked by number of earlier reviews, and how many judged products the catalogue lacks.

    Every query gets the same `depth` products: most reviews first, ties by row id. Reads the
    catalogue one bucket at a time.
    """
    artifact = open_artifact(prepared, "prepared")
    judged = set(problem.judgments["product_id"].unique().to_pylist())
    best = np.zeros((0, 2), np.int64)       # (-reviews, row id), the best `depth` so far
    for stats in artifact.tables("product_stats/", ["row_id", "num_reviews"]):
        more = np.stack([-stats["num_reviews"].to_numpy(), stats["row_id"].to_numpy()], axis=1)
        both = np.concatenate([best, more])
        best = both[np.lexsort((both[:, 1], both[:, 0]))[:depth]]
    rank_of_row = {int(row): rank for rank, row in enumerate(best[:, 1], 1)}
    rank_of_product: dict[str, int] = {}
    for products in artifact.tables("products/", ["row_id", "product_id"]):
        ids = [str(one) for one in products["product_id"].to_pylist()]
        judged.difference_update(ids)
        top = np.flatnonzero(np.isin(products["row_id"].to_numpy(), best[:, 1]))
        rank_of_product |= {ids[place]: rank_of_row[products["row_id"][int(place)].as_py()] for place in top}
    return _same_answer(problem, rank_of_product), len(judged)


def _same_answer(problem: Problem, rank_of_product: dict[str, int]) -> RankedJudgments:
    ordered = problem.judgments     # sorted by query, as RankedJudgments asks
    rank = np.array([rank_of_product.get(str(one), 0) for one in ordered["product_id"].to_pylist()], np.int64)
    gain = ordered["gain"].to_numpy().astype(np.float64)
    position = {query: place for place, query in enumerate(problem.query_ids)}
    query = np.array([position[str(one)] for one in ordered["query_id"].to_pylist()], np.int64)
    length = np.full(len(problem.query_ids), len(rank_of_product), np.int64)
    return RankedJudgments(tuple(problem.query_ids), query, gain, rank, length)


def oracle_values(problem: Problem, specs: Sequence[MetricSpec], relevant_gain: float, generic: npt.NDArray[np.bool_],
                  popularity: npt.NDArray[np.float64] | None) -> npt.NDArray[np.float64]:
    """The most that reading a query can give, shape (Q, metrics): the ceiling for every system.

    Answerable queries get their judged products in the best order. Nothing in a generic query names
    its product, so popularity is the best guess left (0 where popularity was not computed).
    """
    empty = rank_judgments(problem.judgments, [], problem.query_ids)
    order = np.lexsort((-empty.gain, empty.query))
    first = np.searchsorted(empty.query, np.arange(len(empty.query_ids)))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - first[empty.query] + 1
    best = RankedJudgments(empty.query_ids, empty.query, empty.gain, rank, np.bincount(empty.query))
    values = score_all(best, specs, relevant_gain)
    guess = np.zeros_like(values) if popularity is None else popularity
    return np.where(generic[:, None], guess, values)
