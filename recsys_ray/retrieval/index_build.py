"""Prepared products and their vectors -> an index of segments, built in parallel Ray tasks.

The first build makes one segment per group of buckets. A later run compares row by row, group by
group, with what the index holds: unchanged rows stay, changed and new ones go into appended segments,
replaced and deleted ones become tombstones. When too much has changed, or too many segments have
gathered, it builds anew. `compact_index` merges segments without the prepared tables.

A run that died continues: its finished segments lie whole in the staging directory.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from pydantic import Field, model_validator

from recsys_ray import runtime
from recsys_ray.artifacts import (
    Artifact,
    ArtifactError,
    FileEntry,
    Manifest,
    Staging,
    current_version,
    file_entry,
    list_versions,
    open_artifact,
    stage,
)
from recsys_ray.config import Config, fingerprint
from recsys_ray.ids import bucket_of
from recsys_ray.models.token_signals import Encoding, concat_encodings, empty_encoding
from recsys_ray.retrieval.concern_columns import concern_facts, open_concerns
from recsys_ray.retrieval.index_plan import (
    Change,
    Inputs,
    Part,
    appended_parts,
    bucket_groups,
    group_change,
    read_part,
    segments_of,
    sorted_rows,
)
from recsys_ray.retrieval.lexical import (
    LexicalConfig,
    LexicalStatistics,
    Postings,
    global_statistics,
    merged_statistics,
)
from recsys_ray.retrieval.segment_signals import SegmentSignals
from recsys_ray.retrieval.segments import (
    LEXICON,
    ROWS,
    card_file,
    live_mask,
    segment_entries,
    segment_files,
    tombstones_file,
    write_segment,
)
from recsys_ray.retrieval.vector_index import VectorIndexConfig
from recsys_ray.runtime import RayConfig

log = logging.getLogger(__name__)

KIND = "index"
STAGE_VERSION = 4       # raise it when the same inputs would give another index
TASK_CPUS = 0.9
COMPACT_BUCKETS = 256   # ranges a compacted index is cut by when its segments were cut in different ways
Ints = npt.NDArray[np.int64]
Segments = dict[str, list[FileEntry]]


class BuildIndexConfig(Config):
    """What is indexed, how, and when an index is built anew."""

    prepared: Path
    embeddings: Path
    concerns: Path | None = None                # scores of these products (score_concerns): filter, facet and features
    reasons: Path | None = None                 # explanations of them (explain_concerns): "because of ..."
    output: Path
    vector: VectorIndexConfig = VectorIndexConfig()
    lexical: LexicalConfig = LexicalConfig()
    rows_per_segment: int = Field(default=500_000, ge=1)
    rebuild_above: float = Field(default=0.2, ge=0, le=1)   # share of changed rows above which all is built anew
    max_segments: int = Field(default=64, ge=1)
    ray: RayConfig = RayConfig()


    @model_validator(mode="after")
    def _reasons_for_scores(self) -> Self:
        if self.reasons is not None and self.concerns is None:
            raise ValueError("reasons: explain nothing without the scores they are for; set concerns")
        return self


class CompactIndexConfig(Config):
    """Which index is merged, and into segments of what size."""

    index: Path
    rows_per_segment: int = Field(default=500_000, ge=1)
    ray: RayConfig = RayConfig()


def build_index(config: BuildIndexConfig) -> Artifact:
    """The "index" artefact of the prepared products, reused, brought up to date or built anew.

    Errors: `IndexMismatch` naming the bucket when vectors and texts are not of the same rows.
    """
    prepared = open_artifact(config.prepared, "prepared")
    embeddings = open_artifact(config.embeddings, "embeddings")
    scores, reasons = (None, None) if config.concerns is None else open_concerns(config.concerns, config.reasons,
                                                                                prepared.manifest)
    parents = {name: one.manifest for name, one in (("prepared", prepared), ("embeddings", embeddings),
                                                    ("concerns", scores), ("reasons", reasons)) if one is not None}
    options = config.model_dump(mode="json", exclude={*parents, "output", "ray", "concerns", "reasons"})
    identity = fingerprint({"options": options, "code": STAGE_VERSION,
                            **{name: one.fingerprint for name, one in parents.items()}})
    root = config.output.resolve()
    current = _current(root)
    if current is not None and current.manifest.fingerprint == identity:
        log.info("index is up to date: %s", current.manifest.version)
        return current
    inputs = Inputs(str(config.prepared.resolve()), prepared.manifest.version,
                    str(config.embeddings.resolve()), embeddings.manifest.version, _place(scores), _place(reasons))
    facts = {"encoder": embeddings.manifest.facts["encoder"], "template": prepared.manifest.facts.get("template"),
             "vector": config.vector.model_dump(mode="json"), "lexical": config.lexical.model_dump(mode="json"),
             "concerns": concern_facts(scores)}
    with runtime.connected(config.ray), stage(root, KIND, identity) as staging:
        num_buckets = int(prepared.manifest.facts["num_buckets"])
        groups = bucket_groups(prepared, config.rows_per_segment)
        built = None
        if current is not None and all(current.manifest.facts.get(name) == value for name, value in facts.items()):
            built = _brought_up_to_date(inputs, config, staging, current, groups, num_buckets)
        if built is None:
            parts = [Part(group, num_buckets) for group in groups]
            built = _build_segments(inputs, config, staging, parts, taken=()), {}
        segments, dead = built
        return _publish(staging, config, segments, dead, facts, parents)


def _place(artifact: Artifact | None) -> tuple[str, str] | None:
    """Root and version, as any node finds it."""
    return None if artifact is None else (str(artifact.path.parents[1].resolve()), artifact.manifest.version)


def _current(root: Path) -> Artifact | None:
    """The current index, or None where there is none or a damaged one (then all is built anew)."""
    if current_version(root) is None:
        return None
    try:
        return open_artifact(root, KIND)
    except ArtifactError as error:
        if any(manifest.kind != KIND for manifest in list_versions(root)):
            raise
        log.warning("%s; the index is built anew", error)
        return None


def _brought_up_to_date(inputs: Inputs, config: BuildIndexConfig, staging: Staging, current: Artifact,
                        groups: Sequence[tuple[str, ...]], num_buckets: int) -> tuple[Segments, dict[str, Ints]] | None:
    """Kept and appended segments and the dead positions of the kept ones; None when all is better built anew."""
    task = ray.remote(num_cpus=TASK_CPUS)(group_change)
    root, version = str(current.path.parent.parent), current.manifest.version
    try:
        changes: list[Change] = ray.get([task.remote(inputs, root, version, group, num_buckets) for group in groups])
        dead = _dead_positions(current, changes)
        kept = [name for name in current.manifest.facts["segments"] if not _all_dead(current, name, dead[name])]
        parts = appended_parts(changes, num_buckets, config.rows_per_segment)
        rows, touched = sum(change.rows for change in changes), sum(change.touched for change in changes)
        log.info("%d of %d rows to index or to remove", touched, rows)
        if touched > config.rebuild_above * max(1, rows) or len(kept) + len(parts) > config.max_segments:
            return None
        linked = {name: _link_segment(current, name, staging) for name in kept}
    except ArtifactError as error:
        log.warning("%s; the index is built anew", error)
        return None
    built = _build_segments(inputs, config, staging, parts, taken=current.manifest.facts["segments"])
    return linked | built, {name: dead[name] for name in kept}


def _dead_positions(current: Artifact, changes: Sequence[Change]) -> dict[str, Ints]:
    dead = {name: np.flatnonzero(~live_mask(current, name)) for name in current.manifest.facts["segments"]}
    for change in changes:
        for name, places in change.dead.items():
            dead[name] = np.union1d(dead[name], places)
    return dead


def _all_dead(current: Artifact, name: str, dead: Ints) -> bool:
    return len(dead) == current.manifest.rows(segment_files(name)[0])


# --- build ----------------------------------------------------------------------------------------
def _build_segments(inputs: Inputs, config: BuildIndexConfig, staging: Staging, parts: Sequence[Part],
                    taken: Sequence[str]) -> Segments:
    """New segments under names that no kept one has: the same inputs may come again after others."""
    free = (name for number in range(len(parts) + len(taken))
            if (name := f"{staging.fingerprint[:8]}-{number:05d}") not in taken)
    named = dict(zip(free, parts, strict=False))
    task = ray.remote(num_cpus=TASK_CPUS)(_build_segment)
    built: list[list[FileEntry]] = ray.get([task.remote(inputs, str(staging.path), name, part, config)
                                            for name, part in named.items()])
    return dict(zip(named, built, strict=True))


def _build_segment(inputs: Inputs, directory: str, name: str, part: Part, config: BuildIndexConfig) -> list[FileEntry]:
    if _finished(Path(directory), name, part.card()):
        return segment_entries(Path(directory), name)
    rows, encoded = read_part(inputs, part)
    return write_segment(Path(directory), name, rows, encoded, config.vector, config.lexical, part.card())


def _finished(directory: Path, name: str, card: Mapping[str, Any]) -> bool:
    """Whether an earlier run of the same build left this very segment."""
    path = directory / card_file(name)
    return path.is_file() and json.loads(path.read_bytes()).get("made_of") == card["made_of"]


def _link_segment(current: Artifact, name: str, staging: Staging) -> list[FileEntry]:
    """The files of an unchanged segment under the new version: hard links where the file system has them."""
    entries = [entry for entry in current.manifest.files if entry.path.startswith(f"segments/{name}/")]
    shutil.rmtree(staging.path / "segments" / name, ignore_errors=True)
    for entry in entries:
        source, target = current.file(entry.path), staging.path / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        _link(source, target)
    return entries


def _link(source: Path, target: Path, link: Callable[[Path, Path], Any] = os.link) -> None:
    try:
        link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _publish(staging: Staging, config: Config, segments: Segments, dead: Mapping[str, Ints], facts: Mapping[str, Any],
             parents: Mapping[str, Manifest]) -> Artifact:
    entries = [entry for files in segments.values() for entry in files]
    gone = {name: dead[name].astype(np.int64) for name in segments if len(dead.get(name, ()))}
    for name, places in gone.items():
        path = staging.path / tombstones_file(name)
        path.parent.mkdir(exist_ok=True)
        np.save(path, places, allow_pickle=False)
        entries.append(file_entry(staging.path, tombstones_file(name)))
    task = ray.remote(num_cpus=TASK_CPUS)(_segment_statistics)
    statistics = merged_statistics(ray.get([
        task.remote(str(staging.path / segment_files(name)[1]), gone.get(name)) for name in segments]))
    statistics.save(staging.path / LEXICON)
    entries.append(file_entry(staging.path, LEXICON))
    return staging.commit(entries, config=config, parents=parents,
                          facts={**facts, "segments": list(segments), "live_rows": statistics.documents})


def _segment_statistics(postings_path: str, dead: Ints | None) -> LexicalStatistics:
    postings = Postings.load(Path(postings_path))
    alive = np.ones(len(postings.lengths), dtype=np.bool_)
    alive[[] if dead is None else dead] = False
    return global_statistics([postings], [alive])


# --- compaction -----------------------------------------------------------------------------------
def compact_index(config: CompactIndexConfig) -> Artifact:
    """The same live rows in as few segments as `rows_per_segment` allows, without tombstones."""
    current = open_artifact(config.index, KIND)
    facts = current.manifest.facts
    root = config.index.resolve()
    identity = fingerprint({"compacted": current.manifest.fingerprint, "version": current.manifest.version,
                            "rows_per_segment": config.rows_per_segment, "code": STAGE_VERSION})
    with runtime.connected(config.ray), stage(root, KIND, identity) as staging:
        num_buckets = _num_buckets(current)
        count = min(num_buckets, max(1, -(-int(facts["live_rows"]) // config.rows_per_segment)))
        ranges = np.array_split(np.arange(num_buckets, dtype=np.int32), count)
        names = [f"{identity[:8]}-{number:05d}" for number in range(count)]
        task = ray.remote(num_cpus=TASK_CPUS)(_compact_part)
        built: list[list[FileEntry]] = ray.get([
            task.remote(str(root), current.manifest.version, str(staging.path), name, part, num_buckets)
            for name, part in zip(names, ranges, strict=True)])
        kept = {name: facts[name] for name in ("encoder", "template", "vector", "lexical", "concerns")}
        return _publish(staging, config, dict(zip(names, built, strict=True)), {}, kept, {"index": current.manifest})


def _num_buckets(index: Artifact) -> int:
    """The number of buckets all segments were cut by, so that a range of them is read from few segments."""
    cards = [json.loads(index.file(card_file(name)).read_bytes()) for name in index.manifest.facts["segments"]]
    found = {card.get("num_buckets") for card in cards}
    return int(found.pop()) if len(found) == 1 and None not in found else COMPACT_BUCKETS


def _compact_part(root: str, version: str, directory: str, name: str, buckets: npt.NDArray[np.int32],
                  num_buckets: int) -> list[FileEntry]:
    current = open_artifact(root, KIND, version)
    facts = current.manifest.facts
    card = Part(tuple(f"bucket-{number:05d}" for number in buckets), num_buckets).card()
    if _finished(Path(directory), name, card):
        return segment_entries(Path(directory), name)
    tables = [ROWS.empty_table()]
    blocks = [empty_encoding(facts["encoder"])]
    for segment in segments_of(current, buckets, num_buckets):
        rows = current.table(segment_files(segment)[0])
        mask = live_mask(current, segment) & np.isin(bucket_of(rows["row_id"].to_numpy(), num_buckets), buckets)
        vectors = np.load(current.file(segment_files(segment)[2]), mmap_mode="r", allow_pickle=False)
        stored = SegmentSignals.load(current, segment).signals()
        tables.append(rows.filter(pa.array(mask)).select(ROWS.names))
        blocks.append(Encoding(vectors, stored).take(np.flatnonzero(mask)))
    rows, encoded = sorted_rows(pa.concat_tables(tables), concat_encodings(blocks))
    return write_segment(Path(directory), name, rows, encoded, VectorIndexConfig.model_validate(facts["vector"]),
                         LexicalConfig.model_validate(facts["lexical"]), card)
