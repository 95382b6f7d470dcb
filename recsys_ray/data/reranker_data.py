"""[ray] A source of users and items, or a judged shop -> (query, text, label) rows to train a reranker on.

Interactions are scattered by the hash bucket of their user; one task a bucket first counts what training
users like, and then draws positives, contexts and negatives. The catalogue travels to the workers as one
shared table. A bucket that is finished is not made again, so a killed run continues where it was.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import Field, model_validator

from recsys_ray import runtime
from recsys_ray.artifacts import (
    Artifact,
    FileEntry,
    Staging,
    check_file,
    find_artifact,
    open_artifact,
    stage,
    write_table,
    write_text,
)
from recsys_ray.config import fingerprint
from recsys_ray.data.buckets import Part, gather_all, scatter
from recsys_ray.data.candidate_lists import CandidateLists, candidate_lists
from recsys_ray.data.interactions import (
    Ints,
    Items,
    catalogue_table,
    genre_rows,
    liked,
    named_items,
    plain_items,
    top_genres,
    user_histories,
)
from recsys_ray.data.judged_pairs import GradedQuery, digest, graded_queries
from recsys_ray.data.judged_triples import JudgedShop, judged_rows
from recsys_ray.data.reranker_pairs import (
    LEAKS,
    SPLITS,
    NegativePool,
    PairCounts,
    RerankerPairError,
    RerankerPairsConfig,
    audit_page,
    audit_rows,
    count_rows,
    history_rows,
    rows_of,
    user_rows,
    users_in_two_splits,
)
from recsys_ray.data.sources import (
    SourceConfig,
    file_states,
    load_table,
    read_interactions,
    read_products,
    read_reviews,
    read_tags,
    read_texts,
    tables_of,
)
from recsys_ray.ids import bucket_of, row_ids
from recsys_ray.runtime import RayConfig
from recsys_ray.schema import AUDIT, HISTORY, INTERACTION, PRODUCT_WORDS, RERANKER_PAIR, conform

log = logging.getLogger(__name__)

KIND = "reranker_pairs"
STAGE_VERSION = 1       # raise it when the same inputs would give other rows
TASK_CPUS = 0.9
SCRATCH, AUDIT_PAGE = "scratch", "audit/audit.md"
JUDGED_QUERIES = 2000   # of one file
_ELIGIBLE = pa.schema([pa.field("product_id", pa.string(), nullable=False)])


class MakeRerankerPairsConfig(RerankerPairsConfig):
    """Where users and items, or judgments, come from, and where the rows go."""

    source: SourceConfig | None = None      # users and items; or
    judged: JudgedShop | None = None        # queries and judged products
    eligible: str | None = None             # table of the items that may be candidates; None: all
    eligible_columns: dict[str, str] = Field(default_factory=dict)      # our column -> theirs
    candidates: tuple[str, ...] = ()        # candidate lists to mine: tables of query_id (the user), product_id, rank
    output: Path                            # artefact root of the rows
    num_buckets: int = Field(default=16, ge=1, le=4096)
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.source is None) == (self.judged is None):
            raise ValueError("give either source (users and items) or judged (queries and judged products)")
        mined = self.judged.mined if self.judged is not None else self.negatives.mined
        if mined and not self.candidates:
            raise ValueError("mined negatives need candidates: tables of query_id, product_id and rank")
        return self


@dataclass(frozen=True)
class _Job:
    """What the tasks share."""

    config: MakeRerankerPairsConfig
    staging: str
    parts: list[Part]
    items: pa.Table
    mined: CandidateLists


def make_reranker_pairs(config: MakeRerankerPairsConfig) -> Artifact:
    """The `reranker_pairs` artefact: pairs/<split>/*.parquet (RERANKER_PAIR), audit/audit.parquet (AUDIT) and, of
    users and items, items.parquet (ITEM) and histories/*.parquet (HISTORY, of all users, with or without rows).

    Facts: counts, popularity_auc (per split: what popularity alone reaches), leaks.
    Errors: `RerankerPairError` when nothing comes out, `SourceError` for input that cannot be read.
    """
    config = config.replace(output=config.output.resolve())
    judged = graded_queries(config.judged) if config.judged is not None else []
    tables = () if config.source is None else _tables(config.source)
    mined = candidate_lists(config.candidates, config.first_rank, config.last_rank)
    key = fingerprint({
        "stage": STAGE_VERSION, "options": config.model_dump(mode="json", exclude={"output", "ray"}),
        "files": file_states(config.source, tables) if config.source is not None else [],
        "judged": digest(judged), "mined": mined.digest(), "eligible": fingerprint(sorted(_eligible(config) or ())),
        "prepared": config.judged and open_artifact(config.judged.prepared, "prepared").manifest.fingerprint})
    if (done := find_artifact(config.output, KIND, key)) is not None:
        return done
    with stage(config.output, KIND, key) as staging, runtime.connected(config.ray):
        if config.source is None:
            return _of_judgments(config, staging, judged, mined)
        return _of_users(config, config.source, staging, mined)


def _tables(source: SourceConfig) -> list[str]:
    """What is read of a source; reviews stand in for interactions where there are none."""
    has = tables_of(source)
    met = "interactions" if "interactions" in has else "reviews"
    if "products" not in has or met not in has:
        raise RerankerPairError(f"a source of format {source.format!r} has {', '.join(has)} here; users and items need "
                                "products, and interactions or reviews")
    return ["products", met, *(name for name in ("tags", "texts") if name in has)]


def _eligible(config: MakeRerankerPairsConfig) -> list[str] | None:
    if config.eligible is None:
        return None
    found: list[str] = load_table(config.eligible, config.eligible_columns, _ELIGIBLE)["product_id"].to_pylist()
    return found


# --- users and items ------------------------------------------------------------------------------
def _of_users(config: MakeRerankerPairsConfig, source: SourceConfig, staging: Staging, mined: CandidateLists
              ) -> Artifact:
    counts: Counter[str] = Counter()
    scratch = staging.path / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    items = _catalogue(config, source, counts)
    parts = _scattered(source, config.num_buckets, str(scratch), counts)
    buckets = range(config.num_buckets)
    shared = ray.put(_Job(config, str(staging.path), parts, items, mined))
    count = ray.remote(num_cpus=TASK_CPUS, max_retries=3)(_count_likes)
    popularity = np.sum(ray.get([count.remote(shared, bucket) for bucket in buckets]), axis=0, dtype=np.int64)
    items = items.set_column(items.schema.get_field_index("popularity"), items.schema.field("popularity"),
                             pa.array(popularity))
    job = _Job(config, str(staging.path), parts, items, mined)
    found, files = _run_parts(job, {f"bucket-{bucket:05d}": partial(_make_bucket, bucket=bucket) for bucket in buckets})
    found.counts.update(counts)
    files.append(staging.write_table("items.parquet", items))
    return _publish(config, staging, found, files, {})


def _catalogue(config: MakeRerankerPairsConfig, source: SourceConfig, counts: Counter[str]) -> pa.Table:
    """ITEM rows of the source, by product id; popularity is not known yet."""
    has = tables_of(source)
    listed = _collected(read_products(source), plain_items, counts, "products")
    products = named_items(listed)
    counts["products without a title"] += listed.num_rows - products.num_rows
    genres = top_genres(_collected(read_tags(source), genre_rows, counts, "tags"), config.item_genres) \
        if "tags" in has else None
    texts = _collected(read_texts(source), _words, counts, "texts") if "texts" in has else None
    items = catalogue_table(products, genres, texts, _eligible(config), config.item_genres)
    counts["items"], counts["items, eligible"] = items.num_rows, int(np.sum(items["eligible"].to_numpy()))
    if not counts["items, eligible"]:
        raise RerankerPairError("no item may be a candidate: the source has none, or none of those in `eligible`")
    return items


def _words(rows: pa.Table) -> pa.Table:
    return rows.select(PRODUCT_WORDS.names)


def _collected(dataset: ray.data.Dataset, work: Callable[[pa.Table], pa.Table], counts: Counter[str], table: str
               ) -> pa.Table:
    """`work` of every block's usable rows, as one table."""
    blocks = dataset.map_batches(partial(_of_usable, work), batch_size=None, batch_format="pyarrow",
                                 num_cpus=TASK_CPUS, zero_copy_batch=True)
    found = list(blocks.iter_batches(batch_size=None, batch_format="pyarrow"))
    joined = pa.concat_tables(found) if found else pa.table({"_unusable": pa.array([], pa.int64())})
    counts[f"{table} set aside"] += pc.sum(joined["_unusable"]).as_py() or 0
    rows = joined.filter(pc.is_null(joined["_unusable"]))
    return rows.drop_columns(["_unusable"])


def _of_usable(work: Callable[[pa.Table], pa.Table], block: pa.Table) -> pa.Table:
    """The rows, and one that counts those that could not be used."""
    usable = block.filter(pc.and_(block["_error"].is_null(), block["product_id"].is_valid()))
    rows = work(usable)
    bad = pa.table({"_unusable": pa.array([block.num_rows - usable.num_rows], pa.int64())})
    return pa.concat_tables([rows.append_column("_unusable", pa.nulls(rows.num_rows, pa.int64())), bad],
                            promote_options="default")


def _scattered(source: SourceConfig, buckets: int, scratch: str, counts: Counter[str]) -> list[Part]:
    """The interactions by the bucket of their user."""
    read = read_interactions if "interactions" in tables_of(source) else read_reviews
    answers = read(source).map_batches(partial(_scatter, buckets, scratch), batch_size=None, batch_format="pyarrow",
                                       num_cpus=TASK_CPUS, zero_copy_batch=True)
    parts = []
    for row in answers.iter_rows():
        counts["interactions"] += row["rows"]
        counts["interactions set aside"] += row["unusable"]
        if row["path"] is not None:
            parts.append(Part(row["path"], tuple(row["buckets"])))
    return sorted(parts, key=lambda part: Path(part.path).name)     # blocks finish in any order


def _scatter(buckets: int, scratch: str, block: pa.Table) -> pa.Table:
    named = pc.and_(block["user_id"].is_valid(), block["product_id"].is_valid())
    usable = block.filter(pc.and_(block["_error"].is_null(), named))
    if "kind" not in usable.column_names:
        usable = usable.append_column("kind", pa.array(["rating"] * usable.num_rows, pa.string()))
    rows = conform(usable, INTERACTION, "interactions")
    part = scatter(rows, bucket_of(row_ids(rows["user_id"].to_pylist()), buckets), Path(scratch) / "interactions")
    return pa.table({"path": pa.array([part and part.path], pa.string()),
                     "buckets": pa.array([list(part.buckets) if part else []], pa.list_(pa.int64())),
                     "rows": [rows.num_rows], "unusable": [block.num_rows - rows.num_rows]})


def _count_likes(job: _Job, bucket: int) -> Ints:
    """How many training users of a bucket like each item, (N,)."""
    items, config = Items(job.items), job.config
    found: Ints = np.zeros(len(items.product_ids), dtype=np.int64)
    histories = list(user_histories(gather_all(job.parts, bucket, INTERACTION), items.places))
    splits = config.splits.of([one.user_id for one in histories], config.seed)
    for history, split in zip(histories, splits, strict=True):
        if split == "train":
            found[history.places[liked(history, config.min_rating)]] += 1
    return found


def _make_bucket(job: _Job, part: str, bucket: int) -> tuple[PairCounts, list[FileEntry]]:
    """Write the rows and histories of one bucket of users."""
    items, config, found = Items(job.items), job.config, PairCounts()
    pool = NegativePool(items, config.popularity_bins)
    histories = list(user_histories(gather_all(job.parts, bucket, INTERACTION), items.places))
    splits = config.splits.of([one.user_id for one in histories], config.seed)
    order = np.argsort(row_ids(f"{config.seed}:sample:{one.user_id}" for one in histories), kind="stable")
    left = {split: _share(config.max_users.get(split), bucket, config.num_buckets) for split in SPLITS}
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    known: list[dict[str, Any]] = []
    for place in order.tolist():
        history, split = histories[place], splits[place]
        user = None
        if left[split] > 0:
            mined = [items.places[name] for name in job.mined.of(history.user_id) if name in items.places]
            user = user_rows(history, split, pool, mined, config, found.counts)
        known += history_rows(history, split, user.positives if user is not None else (), items)
        if user is not None:
            left[split] -= 1
            count_rows(user, items, found)
            rows[split] += rows_of(user, items)
    found.counts[LEAKS[1]] += users_in_two_splits(
        {split: [row["query_id"] for row in some] for split, some in rows.items()})
    return found, _written(job, part, rows, known)


def _share(most: int | None, bucket: int, buckets: int) -> float:
    """What one bucket may take of a number that all of them share; None: as much as there is."""
    return math.inf if most is None else most // buckets + (bucket < most % buckets)


def _written(job: _Job, part: str, rows: dict[str, list[dict[str, Any]]], known: list[dict[str, Any]]
             ) -> list[FileEntry]:
    staging = Path(job.staging)
    files = [write_table(staging, f"pairs/{split}/{part}.parquet", pa.Table.from_pylist(some, schema=RERANKER_PAIR))
             for split, some in rows.items() if some]
    if known:
        files.append(write_table(staging, f"histories/{part}.parquet", pa.Table.from_pylist(known, schema=HISTORY)))
    return files


# --- judged queries -------------------------------------------------------------------------------
def _of_judgments(config: MakeRerankerPairsConfig, staging: Staging, judged: Sequence[GradedQuery],
                  mined: CandidateLists) -> Artifact:
    assert config.judged is not None
    prepared = open_artifact(config.judged.prepared.resolve(), "prepared")
    here = config.replace(judged=config.judged.replace(prepared=config.judged.prepared.resolve()))
    parts = {f"judged-{start // JUDGED_QUERIES:05d}": partial(
        _make_judged, version=prepared.manifest.version, queries=judged[start:start + JUDGED_QUERIES])
        for start in range(0, len(judged), JUDGED_QUERIES)}
    found, files = _run_parts(_Job(here, str(staging.path), [], pa.table({}), mined), parts)
    files.append(staging.write_table("judged_queries.parquet", pa.table({      # which queries the model may know
        "query_id": [one.query_id for one in judged], "query": [one.query for one in judged],
        "split": [one.split for one in judged]})))
    return _publish(config, staging, found, files, {"prepared": prepared.manifest})


def _make_judged(job: _Job, part: str, version: str, queries: Sequence[GradedQuery]
                 ) -> tuple[PairCounts, list[FileEntry]]:
    config, found = job.config.judged, PairCounts()
    assert config is not None
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for row in judged_rows(queries, open_artifact(config.prepared, "prepared", version), config, job.mined,
                           found.counts):
        rows[row["split"]].append(row)
    return found, _written(job, part, rows, [])


# --- parts ----------------------------------------------------------------------------------------
_Make = Callable[..., tuple[PairCounts, list[FileEntry]]]


def _run_parts(job: _Job, makers: Mapping[str, _Make]) -> tuple[PairCounts, list[FileEntry]]:
    """Every part that is not finished yet as a task; what all of them counted, and their files."""
    staging = Path(job.staging)
    todo = [part for part in makers if _finished(staging, part) is None]
    log.info("%d parts, %d of them found finished", len(makers), len(makers) - len(todo))
    task, shared = ray.remote(num_cpus=TASK_CPUS, max_retries=3)(_make_part), ray.put(job)
    pending = [task.remote(shared, part, makers[part]) for part in todo]
    while pending:
        done, pending = ray.wait(pending)
        ray.get(done)
    total, files = PairCounts(), list[FileEntry]()
    for part in makers:
        finished = _finished(staging, part)
        assert finished is not None
        total.add(finished[0])
        files += finished[1]
    return total, files


def _make_part(job: _Job, part: str, make: _Make) -> None:
    found, files = make(job, part)
    write_text(Path(job.staging) / "done" / f"{part}.json", json.dumps(
        {"files": [entry.model_dump() for entry in files], "found": found.as_json()}))


def _finished(staging: Path, part: str) -> tuple[PairCounts, list[FileEntry]] | None:
    """What a part gave, if its files are whole."""
    try:
        values = json.loads((staging / "done" / f"{part}.json").read_bytes())
        files = [FileEntry.model_validate(one) for one in values["files"]]
        for entry in files:
            check_file(staging / entry.path, entry)
    except (OSError, ValueError, KeyError):
        return None
    return PairCounts.from_json(values["found"]), files


def _publish(config: MakeRerankerPairsConfig, staging: Staging, found: PairCounts, files: Iterable[FileEntry],
             parents: dict[str, Any]) -> Artifact:
    files = list(files)
    rows = {split: sum(entry.rows or 0 for entry in files if entry.path.startswith(f"pairs/{split}/"))
            for split in SPLITS}
    if not rows["train"]:
        raise RerankerPairError(f"no training row came out; counted: {dict(sorted(found.counts.items()))}")
    audit = audit_rows(found)
    leaks = {row["name"]: row["value"] for row in audit if row["section"] == "leaks"}
    popular = {row["name"].partition(":")[0]: row["value"] for row in audit if row["section"] == "popularity"}
    log.info("rows: %s; ROC AUC of popularity alone: %s", ", ".join(f"{name} {count}" for name, count in rows.items()),
             ", ".join(f"{name} {value:.3f}" for name, value in popular.items()) or "not known")
    for name, value in leaks.items():
        if value:
            log.warning("leak: %s: %d", name, value)
    files.append(staging.write_table("audit/audit.parquet", pa.Table.from_pylist(audit, schema=AUDIT)))
    write_text(staging.path / AUDIT_PAGE, audit_page(audit))
    files.append(staging.entry(AUDIT_PAGE))
    return staging.commit(files, config=config, parents=parents, facts={
        "rows": rows, "counts": dict(sorted(found.counts.items())), "popularity_auc": popular, "leaks": leaks})
