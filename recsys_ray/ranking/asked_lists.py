"""A `candidates` artefact as lists to rerank: every query with its candidates, rows and statistics of its moment.

The same `Candidates` go to `Reranker.order` here as in the service. `as_lists` makes features and labels of
them, `reranked` the order by several rerankers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.artifacts import Artifact
from recsys_ray.data.splits import SPLITS
from recsys_ray.ids import row_id
from recsys_ray.ranking.features import FEATURE_COLUMNS, FEATURES, SCORES, Candidates, feature_table
from recsys_ray.ranking.gbdt import Lists, graded
from recsys_ray.ranking.point_in_time import statistics_at
from recsys_ray.ranking.rerank import Reranker
from recsys_ray.retrieval.segments import STATISTICS, Index
from recsys_ray.schema import CANDIDATE

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
ANSWER = pa.schema([CANDIDATE.field(name) for name in ("query_id", "product_id", "rank")])


class AskedError(ValueError):
    """Candidates, queries and reviews that do not belong together."""


@dataclass(frozen=True)
class Asked:
    """One query and its candidates, best retrieved first."""

    query_id: str
    query: str
    candidates: Candidates
    product_ids: list[str]
    as_of_ms: int | None        # None: the statistics are the index's own
    cross: Floats | None = None     # (C,), NaN where none was made; None: the cross-encoder was not asked


def query_times(prepared: Artifact, query_ids: Sequence[str]) -> dict[str, int]:
    """When each query was asked: the time of the review of that id; `AskedError` when one is no review."""
    found: dict[str, int] = {}
    wanted = pa.array(query_ids, pa.string())
    for split in SPLITS:
        for table in prepared.tables(f"reviews/{split}/", ["review_id", "timestamp_ms"]):
            rows = table.filter(pc.is_in(table["review_id"], value_set=wanted))
            found |= dict(zip(rows["review_id"].to_pylist(), rows["timestamp_ms"].to_pylist(), strict=True))
    if missing := [one for one in query_ids if one not in found]:
        raise AskedError(f"{prepared.path}: {len(missing)} queries are no reviews of it, e.g. {missing[0]!r}; leave "
                         "`prepared` out for queries without a time")
    return found


def queries_of(candidates: Artifact) -> dict[str, str]:
    """The text of each query by its id."""
    table = candidates.table("queries.parquet", ["query_id", "query"])
    return dict(zip(table["query_id"].to_pylist(), table["query"].to_pylist(), strict=True))


def asked_lists(candidates: pa.Table, texts: Mapping[str, str], index: Index, depth: int,
                prepared: Artifact | None = None, times: Mapping[str, int] | None = None) -> Iterator[Asked]:
    """The queries of CANDIDATE rows with their best `depth` candidates, in the order of the rows.

    With `times` (and the shop they are of) the statistics are those of the query's moment, from earlier reviews.
    """
    rows = candidates.filter(pc.less_equal(candidates["rank"], pa.scalar(depth, pa.int32())))
    query_ids = rows["query_id"].to_pylist()
    starts = [place for place, one in enumerate(query_ids) if not place or one != query_ids[place - 1]]
    if len(starts) != len(set(query_ids)):
        raise AskedError("the candidates of a query do not follow one another; sort them by query")
    statistics = None
    if times is not None:
        if prepared is None:
            raise AskedError("statistics of a moment need the prepared shop with its reviews")
        statistics = statistics_at(prepared, rows["row_id"].to_numpy(),
                                   np.array([times[one] for one in query_ids], dtype=np.int64))
    for start, end in zip(starts, [*starts[1:], len(query_ids)], strict=True):
        part, query_id = rows.slice(start, end - start), query_ids[start]
        own = None if statistics is None else statistics.slice(start, end - start)
        yield Asked(query_id, texts[query_id], _candidates(part, index, own), part["product_id"].to_pylist(),
                    None if times is None else times[query_id])


def _candidates(part: pa.Table, index: Index, statistics: pa.Table | None) -> Candidates:
    row_ids = part["row_id"].to_numpy()
    rows = index.rows(row_ids, FEATURE_COLUMNS)
    if statistics is not None:
        for name in STATISTICS:
            rows = rows.set_column(rows.schema.get_field_index(name), name, statistics[name].cast(
                rows.schema.field(name).type))
    scores: dict[str, Floats | None] = {"fused": _scores(part["score"])}
    for name in SCORES:
        column = part[f"{name}_score"]
        scores[name] = None if column.null_count == len(column) else _scores(column)
    return Candidates(row_ids, scores, rows)


def _scores(column: pa.ChunkedArray[Any]) -> Floats:
    return np.asarray(column.fill_null(float("nan")).to_numpy(), dtype=np.float32)


def with_cross(asked: Iterable[Asked], reranker: Reranker) -> Iterator[Asked]:
    """The same with the scores of the reranker's cross-encoder, where it has one."""
    for one in asked:
        yield replace(one, cross=reranker.cross(one.query, one.candidates))


# --- to learn from --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Labelled:
    """What judgments, or events, say of candidates: gain by query and product, and where each was shown.

    With positions only products that were shown are learned from.
    """

    gains: Mapping[str, Mapping[str, float]]
    positions: Mapping[str, Mapping[str, int]] | None = None

    @classmethod
    def of(cls, judgments: pa.Table) -> Labelled:
        """Of JUDGMENT rows: a product nobody judged has gain 0."""
        gains: dict[str, dict[str, float]] = {}
        for query, product, gain in zip(*(judgments[name].to_pylist() for name in ("query_id", "product_id", "gain")),
                                        strict=True):
            gains.setdefault(query, {})[product] = gain
        return cls(gains)


def as_lists(asked: Iterable[Asked], labelled: Labelled, label_gain: Sequence[float] | None = None,
             without_cross: float = 0.0, seed: int = 7) -> tuple[Lists, tuple[float, ...], list[str]]:
    """(lists with features and labels, gain of each label, the query of each list).

    A share `without_cross` of the queries, drawn by their ids, is shown without the cross-encoder's scores: in the
    service these may be late, and the trees must know what to do then.
    """
    tables, gains, positions, sizes, names = [], list[float](), list[int](), list[int](), list[str]()
    for one in asked:
        late = one.cross is None or row_id(f"{seed}:late:{one.query_id}") % 1_000_000 < without_cross * 1_000_000
        table = feature_table(one.query, one.candidates, None if late else one.cross, one.as_of_ms)
        kept = np.arange(len(one.product_ids))
        if labelled.positions is not None:
            shown = labelled.positions.get(one.query_id, {})
            kept = np.array([place for place, product in enumerate(one.product_ids) if product in shown], np.int64)
            positions += [shown[one.product_ids[place]] for place in kept.tolist()]
        known = labelled.gains.get(one.query_id, {})
        gains += [known.get(one.product_ids[place], 0.0) for place in kept.tolist()]
        tables.append(table[kept])
        sizes.append(len(kept))
        names.append(one.query_id)
    labels, worth = graded(np.array(gains), label_gain)
    features = np.concatenate(tables) if tables else np.zeros((0, len(FEATURES)), np.float32)
    return Lists(features, labels, np.array(sizes, np.int64),
                 None if labelled.positions is None else np.array(positions, np.int64)), worth, names


# --- to be judged ---------------------------------------------------------------------------------
def retrieved(asked: Asked) -> pa.Table:
    """The order of retrieval as rows of (query_id, product_id, rank)."""
    return _answer(asked, np.arange(len(asked.product_ids)))


def reranked(asked: Asked, reranker: Reranker) -> pa.Table:
    """The order by a reranker as rows of (query_id, product_id, rank)."""
    return _answer(asked, reranker.order(asked.query, asked.candidates, asked.cross, as_of_ms=asked.as_of_ms).places)


def _answer(asked: Asked, places: Ints) -> pa.Table:
    return pa.table({"query_id": [asked.query_id] * len(places),
                     "product_id": [asked.product_ids[place] for place in places.tolist()],
                     "rank": pa.array(np.arange(1, len(places) + 1), pa.int32())}, schema=ANSWER)
