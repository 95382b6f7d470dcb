"""What an evaluation is scored against: judgments, the queries asked, their slices and their units.

Whatever does not fit (unknown queries, pairs judged twice, judged products that the catalogue does
not hold) is counted in `Counts` and said in the log, never dropped in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
from pydantic import Field

from recsys_ray.artifacts import Artifact, open_artifact
from recsys_ray.config import Config
from recsys_ray.evaluation.significance import Units
from recsys_ray.schema import JUDGMENT, QUERY, conform

log = logging.getLogger(__name__)
pc: Any = pyarrow.compute  # its published types reject many calls that work


class JudgmentError(ValueError):
    """Judgments that cannot be used; the message names the file and the mend."""


class TableJudgments(Config):
    """Judgments from a Parquet, CSV or JSONL file under its own column names."""

    format: Literal["table"] = "table"
    path: Path
    columns: dict[str, str] = Field(default_factory=dict)  # our column -> theirs, of query_id, product_id, gain, label
    gain_of_label: dict[str, float] | None = None   # when the file has labels instead of gains


class ReviewJudgments(Config):
    """Each review of a split is a query, and the product it was written about is its one relevant product."""

    format: Literal["reviews"]
    prepared: Path
    split: Literal["train", "valid", "test"] = "test"


class CandidateJudgments(Config):
    """The judgments.parquet that lies inside the candidates of the first system."""

    format: Literal["candidates"]


JudgmentSource = Annotated[TableJudgments | ReviewJudgments | CandidateJudgments, Field(discriminator="format")]


class TruthConfig(Config):
    """A planted truth: which reviews are generic, i.e. name nothing that could identify their product."""

    path: Path
    query_column: str = "review_id"
    generic_column: str = "generic"


@dataclass
class Counts:
    """What came in and what did not fit."""

    judgments: int = 0                  # used
    queries: int = 0                    # scored: judged and asked
    asked_without_judgment: int = 0
    unknown_queries: int = 0            # judged, but no system was asked
    judged_twice: int = 0               # further rows of a pair; the highest gain counts
    judged_twice_differently: int = 0   # of those, with another gain
    not_in_catalogue: int = 0           # judged products that no system could return; they count as not found
    without_relevant: int = 0           # queries without a product at the relevance threshold

    def as_dict(self) -> dict[str, int]:
        """The counts as a plain mapping."""
        return asdict(self)


@dataclass(frozen=True)
class Problem:
    """The queries to score, aligned: judgments, text, slices and what the bootstrap resamples."""

    judgments: pa.Table             # JUDGMENT, one row per pair
    query_ids: list[str]            # sorted
    texts: list[str]
    slices: dict[str, npt.NDArray[np.bool_]]   # name -> mask over queries; "all" comes first
    units: Units
    counts: Counts


def read_table(path: Path, columns: Mapping[str, str], wanted: Sequence[str]) -> pa.Table:
    """The wanted columns of a Parquet, CSV or JSONL file, renamed from `columns` (ours -> theirs), ids as strings."""
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet as pq

    if not path.is_file():
        raise JudgmentError(f"{path}: no such file")
    csv, json = pyarrow.csv.read_csv, pyarrow.json.read_json
    readers: dict[str, Any] = {".parquet": pq.read_table, ".csv": csv, ".jsonl": json}
    if path.suffix not in readers:
        raise JudgmentError(f"{path}: one of {', '.join(readers)} can be read")
    table = readers[path.suffix](path)
    unknown = [f"{ours}: {theirs}" for ours, theirs in columns.items() if theirs not in table.column_names]
    if unknown or not set(columns) <= set(wanted):
        raise JudgmentError(f"{path}: columns {{{', '.join(unknown or columns)}}} do not fit; "
                            f"we know {', '.join(wanted)}; the file has {', '.join(table.column_names)}")
    names = {ours: columns.get(ours, ours) for ours in wanted}
    return pa.table({ours: table[theirs] for ours, theirs in names.items() if theirs in table.column_names})


def read_judgments(source: JudgmentSource, first_system: Artifact) -> tuple[pa.Table, pa.Table | None]:
    """The JUDGMENT rows of `source` as they stand and, for reviews, one row per review with its units and slices."""
    if isinstance(source, ReviewJudgments):
        reviews = _reviews(source)
        ones = pa.array(np.ones(reviews.num_rows), pa.float32())
        return conform(reviews.append_column("query_id", reviews["review_id"]).append_column("gain", ones),
                       JUDGMENT, f"{source.prepared} reviews/{source.split}"), reviews
    if isinstance(source, CandidateJudgments):
        name = "judgments.parquet"
        return conform(first_system.table(name), JUDGMENT, f"{first_system.path}/{name}"), None
    table = read_table(source.path, source.columns, JUDGMENT.names)
    if source.gain_of_label is not None:
        table = _gains_from_labels(table, source.gain_of_label, source.path)
    for name in ("query_id", "product_id", "label"):
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.string()))
    return conform(table, JUDGMENT, str(source.path)), None


def _reviews(source: ReviewJudgments) -> pa.Table:
    columns = ["review_id", "product_id", "user_id", "cold"]
    tables = list(open_artifact(source.prepared, "prepared").tables(f"reviews/{source.split}/", columns))
    if not tables:
        raise JudgmentError(f"{source.prepared}: the prepared data holds no reviews of split {source.split!r}")
    return pa.concat_tables(tables)


def _gains_from_labels(table: pa.Table, gains: Mapping[str, float], path: Path) -> pa.Table:
    if "label" not in table.column_names:
        raise JudgmentError(f"{path}: gain_of_label needs a label column; map it with columns.label")
    labels = table["label"].cast(pa.string())
    unknown = sorted({str(one) for one in labels.unique().to_pylist()} - set(gains))
    if unknown:
        raise JudgmentError(f"{path}: no gain for label(s) {', '.join(unknown[:5])}; "
                            f"gain_of_label has {', '.join(gains)}")
    values = pa.array([gains[str(one)] for one in labels.to_pylist()], pa.float32())
    kept = table.drop_columns(["gain"]) if "gain" in table.column_names else table
    return kept.append_column("gain", values)


def merge_duplicates(judgments: pa.Table, counts: Counts) -> pa.Table:
    """One row per (query, product), the highest gain of a pair judged more than once; counted."""
    grouped = judgments.group_by(["query_id", "product_id"]).aggregate(
        [("gain", "max"), ("gain", "min"), ("gain", "count"), ("label", "min")])
    more = grouped.filter(pc.greater(grouped["gain_count"], 1))
    counts.judged_twice = judgments.num_rows - grouped.num_rows
    counts.judged_twice_differently = more.filter(pc.not_equal(more["gain_max"], more["gain_min"])).num_rows
    merged = grouped.select(["query_id", "product_id", "gain_max", "label_min"]).rename_columns(JUDGMENT.names)
    order: Any = [("query_id", "ascending"), ("product_id", "ascending")]
    return conform(merged.sort_by(order), JUDGMENT, "merged judgments")


def asked_queries(systems: Iterable[Artifact]) -> pa.Table:
    """The QUERY rows that any system was asked, one per query id."""
    tables = [conform(system.table("queries.parquet"), QUERY, f"{system.path}/queries.parquet") for system in systems]
    together = pa.concat_tables(tables)
    first = together.append_column("row", pa.array(np.arange(together.num_rows))).group_by("query_id").aggregate(
        [("row", "min")])["row_min"]
    return together.take(first).sort_by("query_id")


def build_problem(judgments: pa.Table, queries: pa.Table, reviews: pa.Table | None, truth: TruthConfig | None,
                  unit: str, relevant_gain: float) -> Problem:
    """Judgments joined with the queries asked; `queries` are QUERY rows, `reviews` those of `read_judgments`.

    `unit` is query | unit_id | product_and_user. Errors: `JudgmentError` when no judged query was asked.
    """
    counts = Counts()
    judgments = merge_duplicates(judgments, counts)
    known = pc.is_in(judgments["query_id"], value_set=queries["query_id"].combine_chunks())
    counts.unknown_queries = len(judgments.filter(pc.invert(known))["query_id"].unique())
    judgments = judgments.filter(known)
    scored = queries.filter(pc.is_in(queries["query_id"], value_set=judgments["query_id"].unique()))
    if not scored.num_rows:
        raise JudgmentError(f"none of the {counts.unknown_queries} judged queries was asked; query ids of the "
                            f"judgments and of the candidates differ (asked: {queries['query_id'][:3].to_pylist()})")
    query_ids = [str(one) for one in scored["query_id"].to_pylist()]
    relevant = judgments.filter(pc.greater_equal(judgments["gain"], pa.scalar(relevant_gain, pa.float32())))
    counts.judgments, counts.queries = judgments.num_rows, len(query_ids)
    counts.asked_without_judgment = queries.num_rows - len(query_ids)
    counts.without_relevant = len(query_ids) - len(relevant["query_id"].unique())
    _say(counts)
    if reviews is not None:
        place = pc.index_in(pa.array(query_ids), value_set=reviews["review_id"].combine_chunks())
        reviews = reviews.take(place)
    slices = _slices(scored, reviews, truth, query_ids)
    return Problem(judgments, query_ids, [str(one) for one in scored["query"].to_pylist()], slices,
                   _units(unit, scored, reviews, len(query_ids)), counts)


def _say(counts: Counts) -> None:
    log.info("%d queries with %d judgments; asked without a judgment: %d", counts.queries, counts.judgments,
             counts.asked_without_judgment)
    for name in ("unknown_queries", "judged_twice", "judged_twice_differently"):
        if number := getattr(counts, name):
            log.warning("%s: %d", name.replace("_", " "), number)


def _slices(queries: pa.Table, reviews: pa.Table | None, truth: TruthConfig | None,
            query_ids: list[str]) -> dict[str, npt.NDArray[np.bool_]]:
    masks: dict[str, npt.NDArray[np.bool_]] = {"all": np.ones(len(query_ids), dtype=bool)}
    for row, names in enumerate(queries["slices"].to_pylist()):
        for name in names or ():
            masks.setdefault(name, np.zeros(len(query_ids), dtype=bool))[row] = True
    if reviews is not None:
        cold = np.asarray(pc.fill_null(reviews["cold"], False).to_numpy(), dtype=bool)
        masks |= {"warm": ~cold, "cold": cold}
    if truth is not None:
        generic = generic_flags(truth, query_ids)
        masks |= {"answerable": ~generic, "generic": generic}
    order = ["all", "warm", "cold", "answerable", "generic"]
    named = [name for name in order if name in masks] + sorted(set(masks) - set(order))
    return {name: masks[name] for name in named if masks[name].any()}


def generic_flags(truth: TruthConfig, query_ids: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Whether the truth calls each query generic, shape (Q,); `JudgmentError` for a query it does not name."""
    columns = {"query_id": truth.query_column, "generic": truth.generic_column}
    table = read_table(truth.path, columns, ["query_id", "generic"])
    place = pc.index_in(pa.array(query_ids), value_set=table["query_id"].cast(pa.string()).combine_chunks())
    if place.null_count:
        raise JudgmentError(f"{truth.path}: names {len(query_ids) - place.null_count} of {len(query_ids)} queries; "
                            "is this the truth of the same shop?")
    return np.asarray(table["generic"].take(place).to_numpy(), dtype=bool)


def _units(unit: str, queries: pa.Table, reviews: pa.Table | None, count: int) -> Units:
    if unit == "product_and_user":
        if reviews is None:
            raise JudgmentError("unit: product_and_user needs judgments of format reviews, which have both")
        users = pc.fill_null(reviews["user_id"], "")
        return Units.of(reviews["product_id"].to_pylist(), users.to_pylist())
    if unit == "unit_id":
        ids: list[Any] = pc.coalesce(queries["unit_id"], queries["query_id"]).to_pylist()
        return Units.of(ids)
    return Units.rows(count)
