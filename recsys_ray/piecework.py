"""Numbered pieces of work on a pool of actors: each piece becomes one file, and a rerun does only what is missing.

A worker is a class with `__init__(job)` and `make(number)`, which gives the rows of a piece. A piece's file is
described after it was written, so a piece that is described is whole.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from recsys_ray.artifacts import FileEntry, check_file, write_table, write_text

log = logging.getLogger(__name__)

ACTOR_CPUS = 0.9        # below 1, so that a pool as large as the machine leaves room for other tasks
ACTOR_RESTARTS = 3      # a row that kills its process must end the run one day


def piece_file(prefix: str, number: int) -> str:
    """The name of a piece's file, e.g. `scores/part-00003.parquet` of the prefix `scores/part`."""
    return f"{prefix}-{number:05d}.parquet"


def _write_piece(staging: Path, prefix: str, number: int, table: pa.Table) -> None:
    entry = write_table(staging, piece_file(prefix, number), table)
    write_text((staging / entry.path).with_suffix(".json"), entry.model_dump_json())


def described_piece(staging: Path, prefix: str, number: int) -> FileEntry:
    """The entry of a piece that has been written."""
    described = (staging / piece_file(prefix, number)).with_suffix(".json")
    return FileEntry.model_validate_json(described.read_bytes())


def finished_piece(staging: Path, prefix: str, number: int) -> FileEntry | None:
    """The entry of a piece whose file is whole and as it was written, else None."""
    try:
        entry = described_piece(staging, prefix, number)
        check_file(staging / entry.path, entry)
    except (OSError, ValueError):
        return None
    return entry


def run_pieces(worker: type, job: object, count: int, staging: Path, prefix: str, *, gpu: bool, workers: int | None
               ) -> list[FileEntry]:
    """The entries of all pieces 0 to `count` - 1, the missing ones made by actors of `worker(job)`.

    `gpu`: one a GPU where the cluster has some; else one a core, or `workers`.
    """
    todo = [number for number in range(count) if finished_piece(staging, prefix, number) is None]
    log.info("%s: %d pieces, %d found finished", prefix, count, count - len(todo))
    if todo:
        ray.data.DataContext.get_current().max_consecutive_actor_init_deaths = ACTOR_RESTARTS
        gpus, size = _pool(gpu, workers, len(todo))
        rows = [{"piece": number} for number in todo]
        finished = ray.data.from_items(rows, override_num_blocks=len(todo)).map_batches(
            _Actor, fn_constructor_args=(worker, job, str(staging), prefix), batch_size=1, batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=size), num_cpus=ACTOR_CPUS, num_gpus=gpus,
            max_restarts=ACTOR_RESTARTS, max_task_retries=ACTOR_RESTARTS)
        for done, _ in enumerate(finished.iter_rows(), start=1):
            log.info("%s: %d of %d pieces", prefix, done, len(todo))
    return [described_piece(staging, prefix, number) for number in range(count)]


def _pool(gpu: bool, workers: int | None, pieces: int) -> tuple[int, int]:
    """(GPUs of an actor, actors)."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = int(gpu and resources.get("GPU", 0) >= 1)
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]
    # a local Ray declares more logical CPUs than there are cores; more actors than cores only cost memory
    cores = int(resources.get("GPU" if gpus else "CPU", 1)) if nodes > 1 or gpus else (os.cpu_count() or 1)
    return gpus, min(workers or max(1, cores), pieces)


class _Actor:
    """A worker, and what it made, in one process of one thread: actors are the parallelism."""

    def __init__(self, worker: type, job: object, staging: str, prefix: str) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import torch

        torch.set_num_threads(1)
        self.worker, self.staging, self.prefix = worker(job), Path(staging), prefix

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for number in map(int, batch["piece"]):
            # it may have been finished by an actor that died before it could say so
            if finished_piece(self.staging, self.prefix, number) is None:
                _write_piece(self.staging, self.prefix, number, self.worker.make(number))
        return {"piece": batch["piece"]}
