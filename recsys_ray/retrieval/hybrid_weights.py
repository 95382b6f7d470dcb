"""What each alpha is worth on judged queries: the curve that the weight of the text is chosen by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_ray.evaluation.metrics import MetricSpec, rank_judgments, score
from recsys_ray.retrieval.hybrid_index import Found, HybridIndex
from recsys_ray.retrieval.hybrid_vectors import Half, HybridError, Name, Weights
from recsys_ray.schema import CANDIDATE

ALPHAS = tuple(round(0.1 * step, 1) for step in range(11))


@dataclass(frozen=True)
class Curve:
    """A metric of Q queries under A alphas, `values` of shape (A, Q), NaN where it is undefined."""

    alphas: tuple[float, ...]
    values: npt.NDArray[np.float64]

    @staticmethod
    def weights(alpha: float) -> Weights:
        """Text and picture sharing 1."""
        return Weights(text=alpha, image=1 - alpha)


def alpha_curve(index: HybridIndex, directions: Mapping[Name, Half], query_ids: Sequence[str], judgments: pa.Table,
                alphas: Sequence[float], metric: MetricSpec) -> Curve:
    """The metric of every query for every alpha; the index is built once and asked under each.

    `directions` are those of the queries (`HybridSearcher`), in the order of `query_ids`. Errors: `HybridError` for a
    metric without a cut-off, or an index that lacks one of the two halves.
    """
    if metric.k is None:
        raise HybridError(f"{metric.name}: give a cut-off, as in nDCG@10; the catalogue is not ranked whole")
    if not all(index.space.part(name) for name in ("text", "image")):
        raise HybridError("alpha weighs texts against pictures, and the index has only one of them")
    judgments = judgments.filter(pa.compute.is_in(judgments["query_id"], value_set=pa.array(query_ids, pa.string())))
    rows = []
    for alpha in alphas:
        found = index.search(index.space.questions(directions, Curve.weights(alpha)), metric.k)
        rows.append(score(rank_judgments(judgments, [candidates(query_ids, found)], query_ids), metric))
    return Curve(tuple(alphas), np.array(rows))


def candidates(query_ids: Sequence[str], found: Sequence[Found]) -> pa.Table:
    """CANDIDATE rows of answers, rank 1 first."""
    return pa.concat_tables([CANDIDATE.empty_table(), *(pa.table({
        "query_id": pa.repeat(pa.scalar(query, pa.string()), len(one.row_ids)),
        "row_id": pa.array(one.row_ids, pa.int64()), "product_id": pa.array(one.product_ids, pa.string()),
        "rank": pa.array(np.arange(1, len(one.row_ids) + 1), pa.int32()), "score": pa.array(one.scores, pa.float32()),
        **{name: pa.nulls(len(one.row_ids), pa.float32())
           for name in ("dense_score", "lexical_score", "sparse_score", "multi_score")}}, schema=CANDIDATE)
        for query, one in zip(query_ids, found, strict=True))])
