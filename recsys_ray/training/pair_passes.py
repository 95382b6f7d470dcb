"""One pass of a model over the pairs, file by file: a guide's vectors, a teacher's scores.

On Ray each actor loads the model once; a file is finished when its sidecar says so, so a killed pass
goes on where it was. Without workers the same runs in this process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from recsys_ray import runtime
from recsys_ray.artifacts import (
    Artifact,
    FileEntry,
    check_file,
    find_artifact,
    open_artifact,
    stage,
    write_text,
)
from recsys_ray.config import Config, fingerprint
from recsys_ray.models.pair_scorer import PairScorerConfig, build_pair_scorer
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.training import guide, teacher
from recsys_ray.training.bge import FinetuneBgeConfig
from recsys_ray.training.teacher import PAIRS_KIND, ScorePairsConfig

log = logging.getLogger(__name__)

ACTOR_CPUS = 0.9        # below 1, so that a pool as large as the machine leaves room for other tasks
WAIT_S = 3600.0         # for another run that makes the same vectors
ACTOR_RESTARTS = 3      # a file that kills its process must end the run one day

Write = Callable[[pa.Table, Path, str], list[FileEntry]]    # (a file of pairs, staging, its name) -> what was written
Build = Callable[[Mapping[str, Any]], Write]                # from plain settings, on the worker


class _Entries(Config):
    """What became of a file of pairs."""

    entries: tuple[FileEntry, ...]


@dataclass(frozen=True)
class _Pass:
    """What every worker needs to know; plain values, so that they travel."""

    build: Build
    settings: dict[str, Any]
    pairs: str
    version: str
    staging: str


# --- guide ----------------------------------------------------------------------------------------
def guide_vectors(config: FinetuneBgeConfig, pairs: Artifact) -> Artifact:
    """The `guide_vectors` artefact of the train pairs, beside the shards; made if it is not there yet.

    Facts: encoder (the guide's identity). `config` has a guide and absolute paths.
    """
    assert config.guide is not None
    root, identity = config.guide_root, guide.guide_identity(config.guide)
    key = fingerprint({"pairs": pairs.manifest.fingerprint, "version": pairs.manifest.version, "guide": identity})
    if (done := find_artifact(root, guide.KIND, key)) is not None:
        return done
    with stage(root, guide.KIND, key, WAIT_S) as staging:
        if (done := find_artifact(root, guide.KIND, key)) is not None:
            return done     # made by a run beside this one, with the same shards
        one = _Pass(_guide_writer, config.guide.model_dump(mode="json"), *_named(pairs), str(staging.path))
        files = _over_files(one, pairs.names("pairs/train/"), config.workers.count,
                            config.workers.gpus)
        return staging.commit(files, config=config.guide, parents={"pairs": pairs.manifest},
                              facts={"encoder": identity})


def _guide_writer(settings: Mapping[str, Any]) -> Write:
    encoder = build_text_encoder(TextEncoderConfig.model_validate(settings))

    def write(table: pa.Table, staging: Path, name: str) -> list[FileEntry]:
        return guide.write_vectors(table, encoder, staging, name.removeprefix("pairs/").removesuffix(".parquet"))

    return write


# --- teacher --------------------------------------------------------------------------------------
def score_pairs(config: ScorePairsConfig) -> Artifact:
    """The `pairs` artefact of `config.pairs` with a teacher's scores beside every train pair; valid stays as it is.

    Facts: those of the pairs, and `teacher`: its identity, the student's, their comparison on validation
    pairs. Errors: `TeacherError` with the figures when the teacher was not shown to be better than the
    student and `force` is not set; `PairError` for pairs without negatives.
    """
    config = config.resolved()
    pairs, root = open_artifact(config.pairs, PAIRS_KIND), config.output
    key = config.key(pairs)
    if (done := find_artifact(root, PAIRS_KIND, key)) is not None:
        return done
    teacher.require_negatives(pairs)
    with stage(root, PAIRS_KIND, key) as staging, runtime.connected(config.ray) if config.workers else nullcontext():
        found = teacher.compared(config, pairs)
        one = _Pass(_score_writer, config.teacher.model_dump(mode="json"), *_named(pairs), str(staging.path))
        files = _over_files(one, pairs.names("pairs/train/"), config.workers, config.gpus)
        files += [staging.write_table(name, pairs.table(name)) for name in pairs.names("pairs/valid/")]
        return staging.commit(files, config=config, parents={"pairs": pairs.manifest},
                              facts={**pairs.manifest.facts, "teacher": found})


def _score_writer(settings: Mapping[str, Any]) -> Write:
    scorer = build_pair_scorer(PairScorerConfig.model_validate(settings))
    return lambda table, staging, name: [teacher.write_scored(table, scorer, staging, name)]


# --- passes ---------------------------------------------------------------------------------------
def _named(pairs: Artifact) -> tuple[str, str]:
    return str(pairs.path.parents[1]), pairs.manifest.version


def _over_files(one: _Pass, names: Sequence[str], workers: int, gpus: bool) -> list[FileEntry]:
    """What the pass wrote for these files, by so many workers, or none but this process."""
    staging = Path(one.staging)
    todo = [name for name in names if _finished(staging, name) is None]
    log.info("%d files of pairs, %d found finished", len(names), len(names) - len(todo))
    if workers == 0 and todo:
        worker = _Worker(one)
        for name in todo:
            worker.make(name)
    elif todo:
        _on_ray(one, todo, workers, gpus)
    return [entry for name in names for entry in _finished(staging, name) or ()]


def _on_ray(one: _Pass, names: Sequence[str], workers: int, gpus: bool) -> None:
    ray.data.DataContext.get_current().max_consecutive_actor_init_deaths = ACTOR_RESTARTS
    made = ray.data.from_items([{"name": name} for name in names], override_num_blocks=len(names)).map_batches(
        _Worker, fn_constructor_args=(one, 1), batch_size=1, batch_format="numpy", num_cpus=ACTOR_CPUS,
        num_gpus=int(gpus), compute=ray.data.ActorPoolStrategy(size=min(workers, len(names))),
        max_restarts=ACTOR_RESTARTS, max_task_retries=ACTOR_RESTARTS)
    for done, _ in enumerate(made.iter_rows(), start=1):
        if done % max(1, len(names) // 10) == 0:
            log.info("%d of %d files", done, len(names))


class _Worker:
    """A loaded model that turns files of pairs into files of its own."""

    def __init__(self, one: _Pass, threads: int | None = None) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if threads is not None:     # workers are the parallelism
            import torch

            torch.set_num_threads(threads)
        self.staging, self.pairs = Path(one.staging), open_artifact(one.pairs, PAIRS_KIND, one.version)
        self.write = one.build(one.settings)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for name in batch["name"]:
            self.make(str(name))
        return batch

    def make(self, name: str) -> None:
        """Write what belongs to one file, unless an actor that died did so before it could say it."""
        if _finished(self.staging, name) is None:
            entries = self.write(self.pairs.table(name), self.staging, name)
            write_text(_sidecar(self.staging, name), _Entries(entries=tuple(entries)).model_dump_json())


def _sidecar(staging: Path, name: str) -> Path:
    return staging / "done" / f"{name}.json"


def _finished(staging: Path, name: str) -> list[FileEntry] | None:
    """The entries of a file whose results are whole, else None."""
    try:
        entries = _Entries.model_validate_json(_sidecar(staging, name).read_bytes()).entries
        for entry in entries:
            check_file(staging / entry.path, entry)
    except (OSError, ValueError):
        return None
    return list(entries)
