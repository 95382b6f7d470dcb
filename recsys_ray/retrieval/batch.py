"""Candidates for a whole query set on a Ray cluster, resumable at any moment.

The driver writes the queries into staging; Ray Data hands chunks of row numbers to a pool of actors,
each of which opens the index once (and with it verifies every file) and writes the candidates of a
chunk as one file that appears whole or not at all. A rerun skips the chunks that are there, so
memory is bounded by one chunk and a killed run continues where it was.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
from pydantic import Field

from recsys_ray import runtime
from recsys_ray.artifacts import (
    Artifact,
    FileEntry,
    Manifest,
    Staging,
    check_file,
    find_artifact,
    open_artifact,
    stage,
    sweep_staging,
    write_table,
    write_text,
)
from recsys_ray.config import Config, fingerprint
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig, encoder_identity
from recsys_ray.retrieval.filters import Filters
from recsys_ray.retrieval.lexical import LexicalConfig, LexicalStatistics
from recsys_ray.retrieval.query_sets import (
    REVIEW_COLUMNS,
    QuerySet,
    QuerySetError,
    QuerySource,
    ReviewQueries,
    review_query_set,
    table_query_set,
)
from recsys_ray.retrieval.retriever import Retriever, RetrieverConfig
from recsys_ray.retrieval.segments import LEXICON, open_index
from recsys_ray.runtime import RayConfig

log = logging.getLogger(__name__)

KIND = "candidates"
STAGE_VERSION = 1       # raise it when the same inputs would give other candidates
ACTOR_CPUS = 0.9        # below 1, so that a pool as large as the machine leaves room for other tasks
ACTOR_RESTARTS = 3      # a query that kills its process must end the run one day


class RetrieveConfig(Config):
    """Which queries are asked of which index, and how."""

    index: Path                                             # artefact root of the index
    output: Path                                            # artefact root of the candidates
    queries: QuerySource
    encoder: TextEncoderConfig = TextEncoderConfig()        # must be the index's own; unused with mode bm25
    retriever: RetrieverConfig = RetrieverConfig()
    filters: Filters = Filters()
    top_k: int = Field(default=100, ge=1)                   # candidates kept for each query
    queries_per_file: int = Field(default=512, ge=1)        # the unit of work: must end within the progress timeout
    workers: int | None = Field(default=None, ge=1)         # None: one a core
    ray: RayConfig = RayConfig()


@dataclass(frozen=True)
class _Job:
    """What every worker needs to know; paths, never data."""

    index: str
    index_version: str
    identity: dict[str, Any] | None
    staging: str
    encoder: dict[str, Any]
    retriever: dict[str, Any]
    filters: dict[str, Any]
    top_k: int
    queries_per_file: int


def retrieve_candidates(config: RetrieveConfig) -> Artifact:
    """The `candidates` artefact: candidates-*.parquet (CANDIDATE), queries.parquet (QUERY) and, for reviews,
    judgments.parquet (JUDGMENT).

    Facts: mode, encoder, fusion, top_k, queries, skipped, candidates. Errors: a `ValueError` when the
    index was built with another encoder, or there is nothing to ask.
    """
    index = open_artifact(config.index.resolve(), "index")
    output = config.output.resolve()
    identity = encoder_identity(config.encoder) if config.retriever.mode != "bm25" else None
    open_index(config.index.resolve(), index.manifest.version, identity, segments=())  # refuses another encoder
    query_set, parents = _query_set(config, index)
    key = fingerprint({
        "stage": STAGE_VERSION, "index": index.manifest.fingerprint, "encoder": identity,
        "queries": _digest(query_set), "retriever": config.retriever.model_dump(mode="json"),
        "filters": config.filters.model_dump(mode="json"), "top_k": config.top_k,
        "queries_per_file": config.queries_per_file})
    if (done := find_artifact(output, KIND, key)) is not None:
        log.info("%s is up to date", done.manifest.reference)
        return done
    with stage(output, KIND, key) as staging, runtime.connected(config.ray):
        sweep_staging(output, key)
        return _run(config, index, identity, staging, query_set, {"index": index.manifest, **parents})


def _run(config: RetrieveConfig, index: Artifact, identity: dict[str, Any] | None, staging: Staging,
         query_set: QuerySet, parents: dict[str, Manifest]) -> Artifact:
    files = [staging.write_table("queries.parquet", query_set.queries)]
    if query_set.judgments is not None:
        files.append(staging.write_table("judgments.parquet", query_set.judgments))
    job = _Job(str(config.index.resolve()), index.manifest.version, identity, str(staging.path),
               _resolved(config.encoder).model_dump(mode="json"), config.retriever.model_dump(mode="json"),
               config.filters.model_dump(mode="json"), config.top_k, config.queries_per_file)
    count = query_set.queries.num_rows
    chunks = range(-(-count // config.queries_per_file))
    todo = [chunk for chunk in chunks if _finished(staging.path, chunk) is None]
    log.info("%d queries (%d skipped) in %d files, %d of them found finished", count, query_set.skipped,
             len(chunks), len(chunks) - len(todo))
    _retrieve(config, job, todo)
    candidates = [_described(staging.path, chunk) for chunk in chunks]
    facts = {
        "mode": config.retriever.mode, "encoder": identity, "fusion": config.retriever.fusion.model_dump(mode="json"),
        "top_k": config.top_k, "queries": count, "skipped": query_set.skipped,
        "candidates": sum(entry.rows or 0 for entry in candidates)}
    return staging.commit([*files, *candidates], config=config, parents=parents, facts=facts)


def _name(chunk: int) -> str:
    return f"candidates-{chunk:05d}.parquet"


def _described(staging: Path, chunk: int) -> FileEntry:
    return FileEntry.model_validate_json((staging / _name(chunk)).with_suffix(".json").read_bytes())


def _finished(staging: Path, chunk: int) -> FileEntry | None:
    """The entry of a file that is whole and as it was written, else None."""
    try:
        entry = _described(staging, chunk)
        check_file(staging / entry.path, entry)
    except (OSError, ValueError):
        return None
    return entry


def _digest(query_set: QuerySet) -> str:
    """A digest of everything in the query set, in its order."""
    digest = hashlib.sha256(str(query_set.skipped).encode())
    for table in (query_set.queries, query_set.judgments):
        for row in table.to_pylist() if table is not None else ():
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def _resolved(encoder: TextEncoderConfig) -> TextEncoderConfig:
    """The encoder with an absolute model path: workers start in other directories."""
    path = Path(encoder.model)
    return encoder.replace(model=str(path.resolve())) if path.is_dir() else encoder


# --- queries --------------------------------------------------------------------------------------
def _query_set(config: RetrieveConfig, index: Artifact) -> tuple[QuerySet, dict[str, Manifest]]:
    queries = config.queries
    if isinstance(queries, ReviewQueries):
        prepared = open_artifact(queries.prepared.resolve(), "prepared")
        buckets = prepared.tables(f"reviews/{queries.split}/", REVIEW_COLUMNS)
        lexical = LexicalConfig.model_validate(index.manifest.facts["lexical"])
        statistics = LexicalStatistics.load(index.file(LEXICON))
        return review_query_set(buckets, queries, statistics, lexical), {"prepared": prepared.manifest}
    return table_query_set(queries), {}


# --- work -----------------------------------------------------------------------------------------
def _retrieve(config: RetrieveConfig, job: _Job, chunks: list[int]) -> None:
    if not chunks:
        return
    ray.data.DataContext.get_current().max_consecutive_actor_init_deaths = ACTOR_RESTARTS
    workers = min(config.workers or _cores(), len(chunks))
    finished = ray.data.from_items([{"chunk": chunk} for chunk in chunks], override_num_blocks=len(chunks)).map_batches(
        _ChunkRetriever, fn_constructor_args=(job,), batch_size=1, batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=workers), num_cpus=ACTOR_CPUS,
        max_restarts=ACTOR_RESTARTS, max_task_retries=ACTOR_RESTARTS)
    for done, _ in enumerate(finished.iter_rows(), start=1):
        log.info("retrieved %d of %d files", done, len(chunks))


def _cores() -> int:
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]
    if nodes > 1:
        return max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]
    return os.cpu_count() or 1  # a local Ray declares more logical CPUs than there are cores


class _ChunkRetriever:
    """The actor: an open index and, unless BM25 is enough, a loaded encoder."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        config = RetrieverConfig.model_validate(job.retriever)
        index = open_index(job.index, version=job.index_version, encoder_identity=job.identity)
        self.retriever = Retriever(_load_encoder(job), index, config)
        self.filters = Filters.model_validate(job.filters)
        self.queries = pq.read_table(Path(job.staging) / "queries.parquet", columns=["query_id", "query"])

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for chunk in batch["chunk"]:
            self._retrieve(int(chunk))
        return {"chunk": np.asarray(batch["chunk"])}

    def _retrieve(self, chunk: int) -> None:
        staging = Path(self.job.staging)
        if _finished(staging, chunk) is not None:  # finished by an actor that died before it could say so
            return
        rows = self.queries.slice(chunk * self.job.queries_per_file, self.job.queries_per_file)
        entry = write_table(staging, _name(chunk), self.retriever.retrieve(
            rows["query_id"].to_pylist(), rows["query"].to_pylist(), self.job.top_k, self.filters))
        write_text((staging / entry.path).with_suffix(".json"), entry.model_dump_json())


def _load_encoder(job: _Job) -> Any:
    if job.identity is None:
        return None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(1)  # workers are the parallelism
    encoder = build_text_encoder(TextEncoderConfig.model_validate(job.encoder))
    if encoder.identity != job.identity:
        raise QuerySetError(f"{job.encoder['model']}: this node has another encoder than the driver; "
                            "install the same model everywhere")
    return encoder
