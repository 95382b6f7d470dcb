"""Candidates for a whole query set on a Ray cluster, resumable at any moment.

The driver writes the queries into staging; Ray Data hands chunks of row numbers to a pool of actors,
each of which opens the index once (and with it verifies every file) and writes the candidates of a
chunk as one file that appears whole or not at all. A rerun skips the chunks that are there, so
memory is bounded by one chunk and a killed run continues where it was.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from recsys_ray import runtime
from recsys_ray.artifacts import (
    Artifact,
    Manifest,
    Staging,
    find_artifact,
    open_artifact,
    stage,
)
from recsys_ray.config import Config, fingerprint
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig, encoder_identity
from recsys_ray.piecework import run_pieces
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
CANDIDATES = "candidates"       # of the files' names


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
        return done
    with stage(output, KIND, key) as staging, runtime.connected(config.ray):
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
    chunks = -(-count // config.queries_per_file)
    log.info("%d queries (%d skipped)", count, query_set.skipped)
    candidates = run_pieces(_ChunkRetriever, job, chunks, staging.path, CANDIDATES, gpu=False, workers=config.workers)
    facts = {
        "mode": config.retriever.mode, "encoder": identity, "fusion": config.retriever.fusion.model_dump(mode="json"),
        "top_k": config.top_k, "queries": count, "skipped": query_set.skipped,
        "candidates": sum(entry.rows or 0 for entry in candidates)}
    return staging.commit([*files, *candidates], config=config, parents=parents, facts=facts)


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
class _ChunkRetriever:
    """The actor: an open index and, unless BM25 is enough, a loaded encoder."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        config = RetrieverConfig.model_validate(job.retriever)
        index = open_index(job.index, version=job.index_version, encoder_identity=job.identity)
        self.retriever = Retriever(_load_encoder(job), index, config)
        self.filters = Filters.model_validate(job.filters)
        self.queries = pq.read_table(Path(job.staging) / "queries.parquet", columns=["query_id", "query"])

    def make(self, number: int) -> pa.Table:
        """The candidates of a chunk of queries."""
        rows = self.queries.slice(number * self.job.queries_per_file, self.job.queries_per_file)
        return self.retriever.retrieve(rows["query_id"].to_pylist(), rows["query"].to_pylist(), self.job.top_k,
                                       self.filters)


def _load_encoder(job: _Job) -> Any:
    if job.identity is None:
        return None
    encoder = build_text_encoder(TextEncoderConfig.model_validate(job.encoder))
    if encoder.identity != job.identity:
        raise QuerySetError(f"{job.encoder['model']}: this node has another encoder than the driver; "
                            "install the same model everywhere")
    return encoder
