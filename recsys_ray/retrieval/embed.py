"""Prepared products -> one vector a product, on every node of a Ray cluster, resumable at any moment.

Ray Data hands units of rows to a pool of actors. Each actor reads its rows, embeds them and writes its
own shard with a sidecar that describes it; only counts travel back. A run that finds a whole shard
under the name of a unit skips the unit, so a killed run continues where it was. Vectors of unchanged
products (same text hash, same encoder) are carried over from the current version.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pydantic import Field

from recsys_ray import runtime
from recsys_ray.artifacts import (
    Artifact,
    ArtifactError,
    FileEntry,
    Staging,
    check_file,
    current_version,
    find_artifact,
    list_versions,
    open_artifact,
    stage,
    write_table,
    write_text,
)
from recsys_ray.config import Config, fingerprint
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoder, TextEncoderConfig, encoder_identity
from recsys_ray.models.token_signals import signal_fields
from recsys_ray.retrieval.embedding_store import (
    HASH_COLUMNS,
    TEXT_COLUMNS,
    TEXT_SCHEMA,
    BucketPlan,
    Unit,
    embed_rows,
    empty_texts,
    merge_bucket,
    pending_rows,
    plan_bucket,
    plan_units,
    unit_from_dict,
)
from recsys_ray.runtime import RayConfig
from recsys_ray.schema import QUARANTINE, conform

log = logging.getLogger(__name__)

KIND = "embeddings"
STAGE_VERSION = 1       # raise it when the same inputs would give other vectors
ACTOR_CPUS = 0.9        # below 1, so that a pool as large as the machine leaves room for other tasks
ACTOR_RESTARTS = 3      # a row that kills its process must end the run one day
LOSSES_WITHOUT_PROGRESS = 3
LOG_EVERY_S = 10.0


class EmbedConfig(Config):
    """Which texts, which encoder, how many workers."""

    prepared: Path                                      # artefact of the prepare job
    output: Path                                        # artefact root of the vectors
    encoder: TextEncoderConfig = TextEncoderConfig()
    workers: int | None = Field(default=None, ge=1)     # None: one a GPU, else one a core
    unit_rows: int = Field(default=1024, ge=1)          # rows a shard; one unit must end within the progress timeout
    ray: RayConfig = RayConfig()


@dataclass(frozen=True)
class _Job:
    """What every worker needs to know; paths, never data."""

    prepared: str
    prepared_version: str
    output: str
    earlier_version: str | None
    staging: str
    encoder: dict[str, Any]
    identity: dict[str, Any]

    def texts(self, bucket: str) -> pa.Table:
        artifact = open_artifact(self.prepared, "prepared", self.prepared_version)
        return conform(artifact.table(f"product_text/{bucket}.parquet", TEXT_COLUMNS), TEXT_SCHEMA, bucket)

    def earlier(self, bucket: str, columns: Sequence[str] | None = None) -> pa.Table | None:
        if self.earlier_version is None:
            return None
        artifact = open_artifact(self.output, KIND, self.earlier_version)
        name = f"vectors/{bucket}.parquet"
        return artifact.table(name, columns) if name in artifact.names("vectors/") else None


def embed_products(config: EmbedConfig) -> Artifact:
    """The `embeddings` artefact: vectors/bucket-*.parquet (EMBEDDING), one row a product with a text, with
    the columns of the encoder's signals when the configuration asks for them.

    Every other product is in quarantine.parquet with its reason. Facts: encoder (identity), dtype,
    dimension, num_buckets, rows, embedded_now, reused, quarantined, clipped, units, units_recomputed.
    """
    prepared_root, output = config.prepared.resolve(), config.output.resolve()
    prepared = open_artifact(prepared_root, "prepared")
    identity = encoder_identity(config.encoder)
    inputs = {"stage": STAGE_VERSION, "prepared": prepared.manifest.fingerprint, "identity": identity,
              "encoder": config.encoder.model_dump(mode="json"), "unit_rows": config.unit_rows}
    key = fingerprint(inputs)
    if (done := find_artifact(output, KIND, key)) is not None:
        return done
    with stage(output, KIND, key) as staging, runtime.connected(config.ray):
        job = _Job(str(prepared_root), prepared.manifest.version, str(output),
                   _earlier(output, key, prepared, identity), str(staging.path),
                   _resolved(config.encoder).model_dump(mode="json"), identity)
        return _run(config, job, prepared, staging)


def _resolved(encoder: TextEncoderConfig) -> TextEncoderConfig:
    """The encoder with an absolute model path: workers start in other directories."""
    path = Path(encoder.model)
    return encoder.replace(model=str(path.resolve())) if path.is_dir() else encoder


def _earlier(output: Path, key: str, prepared: Artifact, identity: dict[str, Any]) -> str | None:
    """The version whose vectors may be carried over: same encoder, same buckets; else None.

    A run killed between publishing a version and pointing CURRENT at it left a whole one for these
    very inputs; it comes first.
    """
    made_of_these = [manifest.version for manifest in list_versions(output) if manifest.fingerprint == key]
    version = made_of_these[-1] if made_of_these else current_version(output)
    if version is None:
        return None
    facts = open_artifact(output, KIND, version).manifest.facts
    if facts["encoder"] != identity:
        log.info("%s holds vectors of another encoder; every product is embedded", version)
        return None
    if facts["num_buckets"] != prepared.manifest.facts["num_buckets"]:
        log.warning("%s has %s buckets where the products now have %s; every product is embedded", version,
                    facts["num_buckets"], prepared.manifest.facts["num_buckets"])
        return None
    return version


def _run(config: EmbedConfig, job: _Job, prepared: Artifact, staging: Staging) -> Artifact:
    buckets = [Path(name).stem for name in prepared.names("product_text/")]
    plan_one = ray.remote(num_cpus=ACTOR_CPUS * runtime.core_cpus())(_plan_bucket)
    plans: list[BucketPlan] = ray.get([
        plan_one.remote(job, bucket, config.unit_rows, config.encoder.max_chars) for bucket in buckets])
    units = plan_units(plans, config.unit_rows)
    reused = sum(plan.carried for plan in plans)
    todo = _unfinished(staging.path, units)
    log.info("%d products: %d carried over, %d to embed in %d units, %d units found finished",
             sum(plan.rows for plan in plans), reused, sum(unit.rows for unit in units), len(units),
             len(units) - len(todo))
    _embed_through_losses(config, job, todo)
    files, quarantined = _merge(job, plans, units, staging)
    starts = sum((staging.path / "attempts" / unit.name).stat().st_size for unit in units)
    described = [_sidecar(staging.path, unit.name) for unit in units]
    dtypes = sorted({str(one["dtype"]) for one in described})
    facts = {
        "encoder": job.identity, "dtype": "+".join(dtypes) or _earlier_dtype(job),
        "dimension": job.identity["dimension"], "num_buckets": prepared.manifest.facts["num_buckets"],
        "rows": sum(entry.rows or 0 for entry in files[1:]),
        "embedded_now": sum(unit.rows for unit in units), "reused": reused, "quarantined": quarantined,
        "clipped": sum(plan.clipped for plan in plans), "units": len(units), "units_recomputed": starts - len(units),
    }
    log.info("%s", ", ".join(f"{name} {facts[name]}" for name in (
        "rows", "embedded_now", "reused", "quarantined", "clipped", "units_recomputed")))
    return staging.commit(files, config=config, parents={"prepared": prepared.manifest}, facts=facts)


def _earlier_dtype(job: _Job) -> str | None:
    if job.earlier_version is None:
        return None
    return str(open_artifact(job.output, KIND, job.earlier_version).manifest.facts["dtype"])


def _plan_bucket(job: _Job, bucket: str, unit_rows: int, max_chars: int) -> BucketPlan:
    return plan_bucket(bucket, job.texts(bucket), job.earlier(bucket, HASH_COLUMNS), unit_rows, max_chars)


# --- units ----------------------------------------------------------------------------------------
def _embed_through_losses(config: EmbedConfig, job: _Job, units: Sequence[Unit]) -> None:
    """Embed `units`; when a node is lost with what it had not yet answered, go on with the units left.

    Ray Data restarts actors, but a block whose node is gone ends its run. Losses without any progress
    between them are given up after `LOSSES_WITHOUT_PROGRESS`.
    """
    losses, left = 0, list(units)
    while left:
        try:
            _embed(config, job, left)
            return
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.NodeDiedError,
                ray.exceptions.WorkerCrashedError) as error:
            still = _unfinished(Path(job.staging), left)
            losses = losses + 1 if len(still) == len(left) else 0
            if losses >= LOSSES_WITHOUT_PROGRESS:
                raise
            left = still
            log.warning("lost a worker or a node (%s); going on with %d units", type(error).__name__, len(left))


def _unfinished(staging: Path, units: Sequence[Unit]) -> list[Unit]:
    with ThreadPoolExecutor() as pool:
        finished = list(pool.map(lambda unit: _finished(staging, unit.name) is not None, units))
    return [unit for unit, done in zip(units, finished, strict=True) if not done]


def _embed(config: EmbedConfig, job: _Job, units: Sequence[Unit]) -> None:
    if not units:
        return
    context = ray.data.DataContext.get_current()
    context.max_consecutive_actor_init_deaths = ACTOR_RESTARTS
    workers, gpus = _workers(config)
    rows = [{"unit": json.dumps(unit.as_dict())} for unit in units]
    embedded = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _UnitEmbedder, fn_constructor_args=(job,), batch_size=1, batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(units))), num_cpus=ACTOR_CPUS, num_gpus=gpus,
        max_restarts=ACTOR_RESTARTS, max_task_retries=ACTOR_RESTARTS)
    total, done, start = sum(unit.rows for unit in units), 0, time.monotonic()
    logged = start
    for row in embedded.iter_rows():
        done += int(row["rows"])
        now = time.monotonic()
        if now - logged > LOG_EVERY_S or done == total:
            rate = done / (now - start)
            log.info("embedded %d of %d, %.0f a second, %.0f s left", done, total, rate, (total - done) / rate)
            logged = now


def _workers(config: EmbedConfig) -> tuple[int, int]:
    """(actors, GPUs an actor needs)."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    wants_gpu = config.encoder.device == "cuda" or (config.encoder.device == "auto" and resources.get("GPU", 0) >= 1)
    if wants_gpu:
        return config.workers or max(1, int(resources.get("GPU", 0))), 1
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]
    # a local Ray declares more logical CPUs than there are cores; more actors than cores only cost memory
    cores = int(resources.get("CPU", 1)) if nodes > 1 else (os.cpu_count() or 1)
    return config.workers or max(1, cores), 0


class _UnitEmbedder:
    """The actor: a loaded encoder that turns the description of a unit into a shard file."""

    def __init__(self, job: _Job) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread a worker: workers are the parallelism
        import torch

        torch.set_num_threads(1)
        self.job = job
        self.encoder: TextEncoder = build_text_encoder(TextEncoderConfig.model_validate(job.encoder))
        if self.encoder.identity != job.identity:
            raise ArtifactError(f"{job.encoder['model']}: this node has another encoder than the driver; "
                                "install the same model everywhere")
        self._cache: tuple[str, pa.Table, pa.Table | None] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        units = [unit_from_dict(json.loads(text)) for text in batch["unit"]]
        for unit in units:
            self._embed(unit)
        return {"unit": np.array([unit.name for unit in units]), "rows": np.array([unit.rows for unit in units])}

    def _embed(self, unit: Unit) -> None:
        staging = Path(self.job.staging)
        if _finished(staging, unit.name) is not None:  # finished by an actor that died before it could say so
            return
        attempts = staging / "attempts" / unit.name
        attempts.parent.mkdir(exist_ok=True)
        with attempts.open("ab") as stream:  # one byte a start: what was done twice is counted
            stream.write(b".")
        rows = pa.concat_tables([pending_rows(chunk, *self._bucket(chunk.bucket)) for chunk in unit.chunks])
        vectors, quarantined = embed_rows(rows, self.encoder.encode_all_documents, self.encoder.dimension,
                                          signal_fields(self.encoder.identity))
        entry = write_table(staging, f"shards/{unit.name}.parquet", vectors)
        write_text(staging / f"shards/{unit.name}.json", json.dumps({
            "entry": entry.model_dump(), "dtype": self.encoder.dtype, "quarantine": quarantined.to_pylist()}))

    def _bucket(self, bucket: str) -> tuple[pa.Table, pa.Table | None]:
        if self._cache is None or self._cache[0] != bucket:
            self._cache = (bucket, self.job.texts(bucket), self.job.earlier(bucket, HASH_COLUMNS))
        return self._cache[1:]


def _sidecar(staging: Path, unit: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((staging / f"shards/{unit}.json").read_bytes())
    return values


def _finished(staging: Path, unit: str) -> dict[str, Any] | None:
    """The sidecar of a unit whose shard is whole and as described, else None."""
    try:
        values = _sidecar(staging, unit)
        entry = FileEntry.model_validate(values["entry"])
        check_file(staging / entry.path, entry)
    except (OSError, ValueError, KeyError):
        return None
    return values


# --- merge ----------------------------------------------------------------------------------------
def _merge(job: _Job, plans: Sequence[BucketPlan], units: Sequence[Unit], staging: Staging
           ) -> tuple[list[FileEntry], int]:
    """(entries: quarantine.parquet and then the buckets, rows in quarantine)."""
    units_of: dict[str, list[str]] = {plan.bucket: [] for plan in plans}
    for unit in units:
        for chunk in unit.chunks:
            units_of[chunk.bucket].append(unit.name)
    merge_one = ray.remote(num_cpus=ACTOR_CPUS * runtime.core_cpus())(_merge_bucket)
    merged: list[tuple[FileEntry, pa.Table]] = ray.get([
        merge_one.remote(job, plan, sorted(set(units_of[plan.bucket]))) for plan in plans])
    quarantine = pa.concat_tables([QUARANTINE.empty_table(), *(table for _, table in merged)])
    quarantine = quarantine.sort_by([("reason", "ascending"), ("key", "ascending")])
    return [staging.write_table("quarantine.parquet", quarantine), *(entry for entry, _ in merged)], quarantine.num_rows


def _merge_bucket(job: _Job, plan: BucketPlan, units: Sequence[str]) -> tuple[FileEntry, pa.Table]:
    staging, name = Path(job.staging), f"vectors/{plan.bucket}.parquet"
    texts = job.texts(plan.bucket)
    set_aside = [QUARANTINE.empty_table()]
    if plan.unchanged:
        return _link_earlier(job, staging, name), empty_texts(texts)
    shards = []
    for unit in units:
        sidecar = _finished(staging, unit)
        if sidecar is None:
            raise ArtifactError(f"{staging}/shards/{unit}.parquet: damaged after it was written; run the job again")
        shards.append(pq.ParquetFile(staging / sidecar["entry"]["path"], page_checksum_verification=True).read())
        set_aside.append(pa.Table.from_pylist(sidecar["quarantine"], schema=QUARANTINE))
    poison = pa.concat_tables(set_aside)
    here = set(texts.column("product_id").to_pylist())  # a shard may hold rows of several buckets
    poison = poison.filter(pa.array([key in here for key in poison.column("key").to_pylist()], pa.bool_()))
    vectors = merge_bucket(plan.bucket, texts, job.earlier(plan.bucket), shards, poison, job.identity["dimension"],
                           signal_fields(job.identity))
    return write_table(staging, name, vectors), pa.concat_tables([empty_texts(texts), poison])


def _link_earlier(job: _Job, staging: Path, name: str) -> FileEntry:
    """The bucket's earlier file under the new version: a hard link where the file system has them."""
    earlier = open_artifact(job.output, KIND, job.earlier_version)
    source, target = earlier.file(name), staging / name
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    os.replace(partial, target)
    target_entry = next(entry for entry in earlier.manifest.files if entry.path == name)
    return target_entry
