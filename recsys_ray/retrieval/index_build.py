"""Prepared products and their vectors -> an index of segments, built in parallel Ray tasks.

The first build makes one segment per group of buckets. A later run compares row by row, group by
group, with what the index holds: unchanged rows stay, changed and new ones go into appended segments,
replaced and deleted ones become tombstones. When too much has changed, or too many segments have
gathered, it builds anew. `compact_index` merges segments without the prepared tables.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import Field

from recsys_ray import runtime
from recsys_ray.artifacts import (
    Artifact,
    FileEntry,
    Staging,
    current_version,
    file_entry,
    find_artifact,
    open_artifact,
    stage,
    sweep_staging,
)
from recsys_ray.config import Config, fingerprint
from recsys_ray.ids import bucket_of
from recsys_ray.retrieval.lexical import LexicalConfig, Postings, global_statistics
from recsys_ray.retrieval.segments import (
    LEXICON,
    ROWS,
    IndexMismatch,
    catalogue_rows,
    live_mask,
    segment_files,
    tombstones_file,
    write_segment,
)
from recsys_ray.retrieval.vector_index import VectorIndexConfig
from recsys_ray.runtime import RayConfig

log = logging.getLogger(__name__)

KIND = "index"
STAGE_VERSION = 1       # raise it when the same inputs would give another index
TASK_CPUS = 0.9
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class BuildIndexConfig(Config):
    """What is indexed, how, and when an index is built anew."""

    prepared: Path
    embeddings: Path
    output: Path
    vector: VectorIndexConfig = VectorIndexConfig()
    lexical: LexicalConfig = LexicalConfig()
    rows_per_segment: int = Field(default=500_000, ge=1)
    rebuild_above: float = Field(default=0.2, ge=0, le=1)   # share of changed rows above which all is built anew
    max_segments: int = Field(default=64, ge=1)
    ray: RayConfig = RayConfig()


class CompactIndexConfig(Config):
    """Which index is merged, and into segments of what size."""

    index: Path
    rows_per_segment: int = Field(default=500_000, ge=1)
    ray: RayConfig = RayConfig()


@dataclass(frozen=True)
class _Inputs:
    """Where the tasks of one build read; plain values, so that they travel to any node."""

    prepared: str
    prepared_version: str
    embeddings: str
    embeddings_version: str

    def buckets(self) -> tuple[Artifact, Artifact]:
        """The prepared and the embeddings artefact."""
        return (open_artifact(self.prepared, "prepared", self.prepared_version),
                open_artifact(self.embeddings, "embeddings", self.embeddings_version))


@dataclass(frozen=True)
class _Change:
    """How one group of buckets differs from the current index."""

    group: tuple[str, ...]
    changed: Ints                   # row ids to index: new, or different from the live row
    dead: dict[str, Ints]           # segment -> positions that are no longer right
    rows: int


def build_index(config: BuildIndexConfig) -> Artifact:
    """The "index" artefact of the prepared products, reused, brought up to date or built anew.

    Errors: `IndexMismatch` naming the bucket when vectors and texts are not of the same rows.
    """
    prepared = open_artifact(config.prepared, "prepared")
    embeddings = open_artifact(config.embeddings, "embeddings")
    options = config.model_dump(mode="json", exclude={"prepared", "embeddings", "output", "ray"})
    identity = fingerprint({"options": options, "code": STAGE_VERSION, "prepared": prepared.manifest.fingerprint,
                            "embeddings": embeddings.manifest.fingerprint})
    done = find_artifact(config.output, KIND, identity)
    if done is not None:
        log.info("index is up to date: %s", done.manifest.version)
        return done
    root = config.output.resolve()
    inputs = _Inputs(str(config.prepared.resolve()), prepared.manifest.version,
                     str(config.embeddings.resolve()), embeddings.manifest.version)
    with runtime.connected(config.ray), stage(root, KIND, identity) as staging:
        sweep_staging(root, identity)
        groups = bucket_groups(prepared, config.rows_per_segment)
        current = _current(root, config, embeddings)
        changes = None if current is None else _changes(inputs, current, groups)
        if changes is None or _too_much(changes, current, config):
            segments = _build_segments(inputs, config, staging, [(group, None) for group in groups])
            kept: dict[str, Ints] = {}
        else:
            assert current is not None
            segments, kept = _upsert(inputs, config, staging, current, changes)
        facts = {"encoder": embeddings.manifest.facts["encoder"], "template": prepared.manifest.facts.get("template"),
                 "vector": config.vector.model_dump(mode="json"), "lexical": config.lexical.model_dump(mode="json")}
        return _publish(staging, config, segments, kept, facts,
                        {"prepared": prepared.manifest, "embeddings": embeddings.manifest})


def bucket_groups(prepared: Artifact, rows_per_segment: int) -> list[tuple[str, ...]]:
    """Neighbouring buckets put together until a segment is full, e.g. [("bucket-00000", "bucket-00001"), ...]."""
    groups: list[tuple[str, ...]] = []
    taken: list[str] = []
    rows = 0
    for name in prepared.names("product_text/"):
        size = prepared.manifest.rows(name)
        if taken and rows + size > rows_per_segment:
            groups.append(tuple(taken))
            taken, rows = [], 0
        taken.append(Path(name).stem)
        rows += size
    return [*groups, tuple(taken)] if rows else groups


def read_bucket(prepared: Artifact, embeddings: Artifact, bucket: str) -> tuple[pa.Table, Floats]:
    """ROWS of one bucket and their vectors, shape (N, D), both by row id.

    Rows whose text could not be embedded are in the quarantine of the embeddings, not here. Errors:
    `IndexMismatch` when a vector belongs to no row or to another text, or comes twice.
    """
    texts = prepared.table(f"product_text/{bucket}.parquet")
    vectors = embeddings.table(f"vectors/{bucket}.parquet").sort_by("row_id")
    where = f"bucket {bucket!r} of {embeddings.path}"
    row_ids = vectors["row_id"].to_numpy()
    if len(np.unique(row_ids)) != len(row_ids):
        raise IndexMismatch(f"{where}: holds a row twice; run the embed job again")
    hashes = dict(zip(texts["row_id"].to_pylist(), texts["text_hash"].to_pylist(), strict=True))
    for row, text_hash in zip(row_ids.tolist(), vectors["text_hash"].to_pylist(), strict=True):
        if hashes.get(row) != text_hash:
            raise IndexMismatch(f"{where}: row {row} is of another text than the prepared products; "
                                "run the embed job again")
    embedded = pc.is_in(texts["row_id"], value_set=vectors["row_id"].combine_chunks())
    missing = texts.num_rows - vectors.num_rows
    known = embeddings.manifest.rows("quarantine.parquet")
    if missing > known:
        raise IndexMismatch(f"{where}: lacks {missing} rows of the prepared products; run the embed job again")
    texts = texts.filter(embedded)
    chosen = pa.array(row_ids)
    products = prepared.table(f"products/{bucket}.parquet")
    stats = prepared.table(f"product_stats/{bucket}.parquet")
    rows = catalogue_rows(*(one.filter(pc.is_in(one["row_id"], value_set=chosen)) for one in (products, texts, stats)))
    dimension = vectors.schema.field("vector").type.list_size
    flat = vectors["vector"].combine_chunks().flatten().to_numpy().astype(np.float32)
    return rows, flat.reshape(-1, dimension)


def _read_group(inputs: _Inputs, group: Sequence[str], wanted: Ints | None) -> tuple[pa.Table, Floats]:
    prepared, embeddings = inputs.buckets()
    tables, blocks = [], []
    for bucket in group:
        rows, vectors = read_bucket(prepared, embeddings, bucket)
        if wanted is not None:
            mask = np.isin(rows["row_id"].to_numpy(), wanted)
            rows, vectors = rows.filter(pa.array(mask)), vectors[mask]
        tables.append(rows)
        blocks.append(vectors)
    return sorted_rows(pa.concat_tables(tables), np.concatenate(blocks))


def sorted_rows(rows: pa.Table, vectors: Floats) -> tuple[pa.Table, Floats]:
    """Rows and vectors by row id."""
    order = np.argsort(rows["row_id"].to_numpy(), kind="stable")
    return rows.take(pa.array(order)), np.ascontiguousarray(vectors[order])


# --- what changed ---------------------------------------------------------------------------------
def _current(root: Path, config: BuildIndexConfig, embeddings: Artifact) -> Artifact | None:
    """The index that can be brought up to date: of the same encoder and built in the same way."""
    if current_version(root) is None:
        return None
    artifact = open_artifact(root, KIND)
    facts = artifact.manifest.facts
    same = (facts["encoder"] == embeddings.manifest.facts["encoder"]
            and facts["vector"] == config.vector.model_dump(mode="json")
            and facts["lexical"] == config.lexical.model_dump(mode="json"))
    return artifact if same else None


def _changes(inputs: _Inputs, current: Artifact, groups: Sequence[tuple[str, ...]]) -> list[_Change]:
    task = ray.remote(num_cpus=TASK_CPUS)(_group_change)
    root, version = str(current.path.parent.parent), current.manifest.version
    found: list[_Change] = ray.get([task.remote(inputs, root, version, group) for group in groups])
    return found


def _group_change(inputs: _Inputs, root: str, version: str, group: tuple[str, ...]) -> _Change:
    prepared, embeddings = inputs.buckets()
    hashes: dict[int, str] = {}
    for bucket in group:
        rows, _ = read_bucket(prepared, embeddings, bucket)
        hashes |= dict(zip(rows["row_id"].to_pylist(), rows["row_hash"].to_pylist(), strict=True))
    current = open_artifact(root, KIND, version)
    numbers = np.array([int(bucket.rpartition("-")[2]) for bucket in group], dtype=np.int32)
    unchanged: set[int] = set()
    dead: dict[str, Ints] = {}
    for name in current.manifest.facts["segments"]:
        held = current.table(segment_files(name)[0], ["row_id", "row_hash"])
        row_ids = held["row_id"].to_numpy()
        here = np.isin(bucket_of(row_ids, int(prepared.manifest.facts["num_buckets"])), numbers)
        places = np.flatnonzero(here & live_mask(current, name))
        old = held["row_hash"].take(pa.array(places)).to_pylist()
        right = np.array([hashes.get(int(row)) == one for row, one in zip(row_ids[places], old, strict=True)], bool)
        unchanged.update(row_ids[places[right]].tolist())
        if not right.all():
            dead[name] = places[~right].astype(np.int64)
    changed = np.array(sorted(set(hashes) - unchanged), dtype=np.int64)
    return _Change(group, changed, dead, len(hashes))


def _too_much(changes: Sequence[_Change], current: Artifact | None, config: BuildIndexConfig) -> bool:
    total = max(1, sum(change.rows for change in changes))
    touched = sum(len(change.changed) + sum(map(len, change.dead.values())) for change in changes)
    segments = len(current.manifest.facts["segments"]) if current is not None else 0
    log.info("%d of %d rows to index or to remove", touched, total)
    return touched / total > config.rebuild_above or segments >= config.max_segments


# --- build ----------------------------------------------------------------------------------------
def _build_segments(inputs: _Inputs, config: BuildIndexConfig, staging: Staging,
                    parts: Sequence[tuple[tuple[str, ...], Ints | None]]) -> dict[str, list[FileEntry]]:
    task = ray.remote(num_cpus=TASK_CPUS)(_build_segment)
    names = [f"{staging.fingerprint[:8]}-{number:05d}" for number in range(len(parts))]
    built: list[list[FileEntry]] = ray.get([
        task.remote(inputs, str(staging.path), name, group, wanted, config)
        for name, (group, wanted) in zip(names, parts, strict=True)])
    return dict(zip(names, built, strict=True))


def _build_segment(inputs: _Inputs, directory: str, name: str, group: Sequence[str], wanted: Ints | None,
                   config: BuildIndexConfig) -> list[FileEntry]:
    rows, vectors = _read_group(inputs, group, wanted)
    return write_segment(Path(directory), name, rows, vectors, config.vector, config.lexical)


def _upsert(inputs: _Inputs, config: BuildIndexConfig, staging: Staging, current: Artifact,
            changes: Sequence[_Change]) -> tuple[dict[str, list[FileEntry]], dict[str, Ints]]:
    """Kept and appended segments, and the dead positions of the kept ones."""
    segments = {name: _link_segment(current, name, staging) for name in current.manifest.facts["segments"]}
    dead = {name: np.flatnonzero(~live_mask(current, name)) for name in segments}
    for change in changes:
        for name, places in change.dead.items():
            dead[name] = np.union1d(dead[name], places)
    parts = [(group, wanted) for group, wanted in _appended(changes, config.rows_per_segment)]
    return segments | _build_segments(inputs, config, staging, parts), dead


def _appended(changes: Sequence[_Change], rows_per_segment: int) -> list[tuple[tuple[str, ...], Ints]]:
    """Changed rows of neighbouring groups put together until a segment is full."""
    parts: list[tuple[tuple[str, ...], Ints]] = []
    for change in changes:
        if not len(change.changed):
            continue
        if parts and len(parts[-1][1]) + len(change.changed) <= rows_per_segment:
            group, rows = parts.pop()
            parts.append((group + change.group, np.concatenate([rows, change.changed])))
        else:
            parts.append((change.group, change.changed))
    return parts


def _link_segment(current: Artifact, name: str, staging: Staging) -> list[FileEntry]:
    """The files of an unchanged segment under the new version: hard links where the file system has them."""
    entries = [entry for entry in current.manifest.files if entry.path.startswith(f"segments/{name}/")]
    for entry in entries:
        source, target = current.file(entry.path), staging.path / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        _link(source, target)
    return entries


def _link(source: Path, target: Path, link: Callable[[Path, Path], Any] = os.link) -> None:
    try:
        link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _publish(staging: Staging, config: Config, segments: dict[str, list[FileEntry]], dead: dict[str, Ints],
             facts: dict[str, Any], parents: dict[str, Any]) -> Artifact:
    dead = {name: places for name, places in dead.items() if len(places)}
    entries = [entry for files in segments.values() for entry in files]
    for name, places in dead.items():
        path = staging.path / tombstones_file(name)
        path.parent.mkdir(exist_ok=True)
        np.save(path, places.astype(np.int64), allow_pickle=False)
        entries.append(file_entry(staging.path, tombstones_file(name)))
    postings = [Postings.load(staging.path / segment_files(name)[1]) for name in segments]
    alive = [np.isin(np.arange(len(one.lengths)), dead.get(name, []), invert=True)
             for name, one in zip(segments, postings, strict=True)]
    global_statistics(postings, alive).save(staging.path / LEXICON)
    entries.append(file_entry(staging.path, LEXICON))
    live = int(sum(mask.sum() for mask in alive))
    facts = {**facts, "segments": list(segments), "live_rows": live}
    return staging.commit(entries, config=config, parents=parents, facts=facts)


# --- compaction -----------------------------------------------------------------------------------
def compact_index(config: CompactIndexConfig) -> Artifact:
    """The same live rows in as few segments as `rows_per_segment` allows, without tombstones."""
    current = open_artifact(config.index, KIND)
    facts = current.manifest.facts
    root = config.index.resolve()
    identity = fingerprint({"compacted": current.manifest.fingerprint, "version": current.manifest.version,
                            "rows_per_segment": config.rows_per_segment})
    with runtime.connected(config.ray), stage(root, KIND, identity) as staging:
        sweep_staging(root, identity)
        parts = -(-int(facts["live_rows"]) // config.rows_per_segment)
        task = ray.remote(num_cpus=TASK_CPUS)(_compact_part)
        names = [f"{identity[:8]}-{number:05d}" for number in range(max(1, parts))]
        built: list[list[FileEntry]] = ray.get([
            task.remote(str(root), current.manifest.version, str(staging.path), name, number, len(names))
            for number, name in enumerate(names)])
        kept = {name: facts[name] for name in ("encoder", "template", "vector", "lexical")}
        return _publish(staging, config, dict(zip(names, built, strict=True)), {}, kept, {"index": current.manifest})


def _compact_part(root: str, version: str, directory: str, name: str, part: int, parts: int) -> list[FileEntry]:
    current = open_artifact(root, KIND, version)
    facts = current.manifest.facts
    tables, blocks = [], []
    for segment in facts["segments"]:
        rows = current.table(segment_files(segment)[0])
        mask = live_mask(current, segment) & (bucket_of(rows["row_id"].to_numpy(), parts) == part)
        vectors = np.load(current.file(segment_files(segment)[2]), mmap_mode="r", allow_pickle=False)
        tables.append(rows.filter(pa.array(mask)))
        blocks.append(np.asarray(vectors[mask]))
    rows, vectors = sorted_rows(pa.concat_tables(tables).select(ROWS.names), np.concatenate(blocks))
    return write_segment(Path(directory), name, rows, vectors, VectorIndexConfig.model_validate(facts["vector"]),
                         LexicalConfig.model_validate(facts["lexical"]))
