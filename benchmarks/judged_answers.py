"""Judged queries asked of a whole catalogue: folds of the queries, answers by every fusion weight, figures a query.

The metrics are those of `real_labels.py`. The whole catalogue is scored, product by product, so an answer
depends on no index and no depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from retriever_ranks import DOCUMENTS_A_CALL, Catalogue

from recsys_ray.artifacts import open_artifact
from recsys_ray.data.judged_pairs import query_folds
from recsys_ray.data.preprocess import clean_query
from recsys_ray.evaluation.metrics import MetricSpec, rank_judgments, score_all
from recsys_ray.retrieval.fusion import FusionConfig, fuse, ranking
from recsys_ray.schema import CANDIDATE

Values = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.float32]
METRICS = {"ndcg10": MetricSpec.parse("nDCG@10"), "recall100": MetricSpec.parse("Recall@100")}
KEPT = 100          # products of an answer: what Recall@100 needs
POOLED = 20         # products of each retriever that choosing looks at
ANSWER = pa.schema([CANDIDATE.field(name) for name in ("query_id", "product_id", "rank")])


@dataclass(frozen=True)
class Fold:
    """One round of a nested cross-validation: the queries reported, those that choose, those trained on."""

    report: tuple[str, ...]
    choose: tuple[str, ...]
    train: tuple[str, ...]

    @property
    def inner(self) -> tuple[str, ...]:
        """All that a training and its choices may know."""
        return tuple(sorted((*self.choose, *self.train)))


def nested_folds(query_ids: Sequence[str], outer: int, inner: int, seed: int) -> list[Fold]:
    """`outer` folds that report every query once; of the others of each, one of `inner` parts chooses.

    The inner parts are those that `JudgedQueries(query_ids=fold.inner, folds=inner, seed=seed)` makes, part 0
    being the one that chooses.
    """
    places = query_folds(query_ids, outer, seed)
    found = []
    for number in range(outer):
        rest = [one for one in places if places[one] != number]
        parts = query_folds(rest, inner, seed)
        found.append(Fold(tuple(sorted(one for one in places if places[one] == number)),
                          tuple(sorted(one for one in rest if parts[one] == 0)),
                          tuple(sorted(one for one in rest if parts[one] != 0))))
    return found


@dataclass(frozen=True)
class Problem:
    """Q judged queries, sorted by id, and what is relevant to them."""

    query_ids: list[str]
    texts: list[str]
    judgments: pa.Table         # JUDGMENT
    relevant_gain: float

    @classmethod
    def of(cls, queries: pa.Table, judgments: pa.Table, relevant_gain: float) -> Problem:
        """The judged ones of the queries of a QUERY table."""
        texts = dict(zip(queries["query_id"].to_pylist(), queries["query"].to_pylist(), strict=True))
        ids = sorted(str(one) for one in judgments["query_id"].unique().to_pylist())
        return cls(ids, [clean_query(texts[one]) for one in ids], judgments, relevant_gain)

    def score(self, answers: Sequence[pa.Table]) -> Values:
        """Each metric of each query, (Q, metrics)."""
        return score_all(rank_judgments(self.judgments, answers, self.query_ids), tuple(METRICS.values()),
                         self.relevant_gain)

    def only(self, query_ids: Sequence[str]) -> Problem:
        """The same with these queries alone."""
        texts = dict(zip(self.query_ids, self.texts, strict=True))
        return Problem(sorted(query_ids), [texts[one] for one in sorted(query_ids)], self.judgments,
                       self.relevant_gain)


def document_vectors(encoder: Any, catalogue: Catalogue) -> Vectors:
    """The vectors of all products, (N, D), in the order of the catalogue."""
    parts = [encoder.encode_documents(catalogue.texts[start:start + DOCUMENTS_A_CALL])
             for start in range(0, len(catalogue.texts), DOCUMENTS_A_CALL)]
    return np.concatenate(parts)


def stored_vectors(embeddings: Path, catalogue: Catalogue) -> Vectors:
    """The same from an embeddings artefact."""
    table = pa.concat_tables(open_artifact(embeddings, "embeddings").tables("vectors/", ["row_id", "vector"]))
    table = table.sort_by("row_id").combine_chunks()
    if table["row_id"].to_numpy().tolist() != catalogue.row_ids.tolist():
        raise ValueError(f"{embeddings}: the vectors are of other products than the catalogue's; embed them again")
    flat = table["vector"].chunk(0).flatten().to_numpy()
    return np.asarray(flat, dtype=np.float32).reshape(len(catalogue.texts), -1)


def scored(encoder: Any, documents: Vectors, catalogue: Catalogue, problem: Problem
           ) -> Iterator[tuple[str, Vectors, Vectors]]:
    """(query id, dense scores, BM25 scores) of each query over the catalogue, each (N,)."""
    queries = encoder.encode_queries(problem.texts)
    for query_id, text, vector in zip(problem.query_ids, problem.texts, queries, strict=True):
        yield query_id, documents @ vector, catalogue.bm25.document_scores(text)


def answer(query_id: str, scores: Vectors, catalogue: Catalogue, positive_only: bool = False) -> pa.Table:
    """The best products of one query as rows of (query_id, product_id, rank); `positive_only`: those above 0."""
    order = ranking(scores, catalogue.row_ids, KEPT)
    if positive_only:
        order = order[scores[order] > 0]
    return pa.table({"query_id": [query_id] * len(order),
                     "product_id": [catalogue.product_ids[place] for place in order.tolist()],
                     "rank": pa.array(np.arange(1, len(order) + 1), pa.int32())}, schema=ANSWER)


def system_values(encoder: Any, documents: Vectors, catalogue: Catalogue, problem: Problem,
                  weights: Sequence[float]) -> dict[str, Any]:
    """Per query and metric: `bm25` and `dense` (Q, M), `hybrid` (W, Q, M) by dense weight; null where undefined."""
    answers: dict[str, list[pa.Table]] = {"bm25": [], "dense": []}
    fused: list[list[pa.Table]] = [[] for _ in weights]
    for query_id, dense, lexical in scored(encoder, documents, catalogue, problem):
        answers["bm25"].append(answer(query_id, lexical, catalogue, positive_only=True))
        answers["dense"].append(answer(query_id, dense, catalogue))
        for at, weight in enumerate(weights):
            fused[at].append(answer(query_id, fuse(dense, lexical, FusionConfig(dense_weight=weight)), catalogue))
    return {**{name: _plain(problem.score(tables)) for name, tables in answers.items()},
            "hybrid": [_plain(problem.score(tables)) for tables in fused]}


def _plain(values: Values) -> list[list[float | None]]:
    return [[None if np.isnan(one) else round(one, 6) for one in row] for row in values.tolist()]


def near_the_top(encoder: Any, documents: Vectors, catalogue: Catalogue, problem: Problem) -> dict[str, list[int]]:
    """The row ids of the best products by BM25 and by vectors, per query: what a like encoder would confuse."""
    return {query_id: sorted({int(catalogue.row_ids[place]) for scores in (dense, lexical)
                              for place in ranking(scores, catalogue.row_ids, POOLED)})
            for query_id, dense, lexical in scored(encoder, documents, catalogue, problem)}


def pooled(catalogue: Catalogue, problem: Problem, pool: Mapping[str, Sequence[int]]) -> npt.NDArray[np.int64]:
    """The places of the products that are judged for one of the queries or in its pool, ascending."""
    asked = set(problem.query_ids)
    judged = {product for query, product in zip(problem.judgments["query_id"].to_pylist(),
                                                problem.judgments["product_id"].to_pylist(), strict=True)
              if query in asked}
    near = {row for query in asked for row in pool[query]}
    return np.array([place for place, (row, product) in enumerate(
        zip(catalogue.row_ids.tolist(), catalogue.product_ids, strict=True)) if row in near or product in judged],
        dtype=np.int64)


def pool_figure(encoder: Any, catalogue: Catalogue, problem: Problem, places: npt.NDArray[np.int64],
                fusion: FusionConfig) -> float:
    """nDCG@10 of the hybrid when only the products at these places can be found: to choose by, not to report."""
    some = Catalogue(catalogue.row_ids[places], [catalogue.product_ids[at] for at in places.tolist()],
                     [catalogue.texts[at] for at in places.tolist()], [], catalogue.num_reviews[places])
    documents, queries = document_vectors(encoder, some), encoder.encode_queries(problem.texts)
    answers = []
    for query_id, text, vector in zip(problem.query_ids, problem.texts, queries, strict=True):
        lexical = catalogue.bm25.document_scores(text)[places]
        answers.append(answer(query_id, fuse(documents @ vector, lexical, fusion), some))
    return float(np.nanmean(problem.score(answers)[:, 0]))
