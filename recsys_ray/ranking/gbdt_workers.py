"""[ray] Where trees grow: in this process, or on the workers of Ray Train's LightGBM trainer.

A list is never divided: lambdarank compares the candidates of one query. Lists go round robin to the workers,
each of which reads its own file; the lists that stop the rounds are the same on all of them, so all stop at one
round. Data-parallel trees add up the histograms of all workers, so that each learns from every list.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from recsys_ray import runtime
from recsys_ray.artifacts import write_text
from recsys_ray.config import Config
from recsys_ray.ranking.gbdt import GbdtConfig, GbdtError, Lists, fit, model_text
from recsys_ray.runtime import RayConfig

log = logging.getLogger(__name__)

FOLDER = "workers"
STOP = "stop.npz"


class TreeWorkers(Config):
    """How many processes grow the trees together."""

    count: int = Field(default=0, ge=0)         # 0: this process, without Ray
    cpus: float = Field(default=1.0, gt=0)      # of each
    max_failures: int = Field(default=0, ge=0)  # how often the group may be started again


@dataclass(frozen=True)
class Grown:
    """LightGBM's text file, and where it stopped."""

    text: str
    rounds: int
    stop_ndcg: float


def grow(lists: Lists, stop: Lists, config: GbdtConfig, label_gain: tuple[float, ...], workers: TreeWorkers,
         ray_config: RayConfig, staging: Path) -> Grown:
    """Trees fitted to `lists`; `staging` is a directory that all workers share.

    Errors: `GbdtError` for lists that cannot teach, `ValueError` with what the first failed worker said.
    """
    if workers.count == 0:
        fitted = fit(lists, stop, config, label_gain)
        return Grown(model_text(fitted), fitted.rounds, fitted.stop_ndcg)
    folder = staging / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    telling = lists.take(lists.telling())
    if len(telling.sizes) < workers.count:
        raise GbdtError(f"workers.count: {workers.count} workers for {len(telling.sizes)} lists to learn from")
    turn = np.arange(len(telling.sizes)) % workers.count
    for number in range(workers.count):
        save_lists(folder / f"lists-{number}.npz", telling.take(turn == number))
    save_lists(folder / STOP, stop)
    with runtime.connected(ray_config):
        _run(folder, config, label_gain, workers)
    found = json.loads((folder / "found.json").read_bytes())
    text = (folder / "model.txt").read_text(encoding="utf-8")
    shutil.rmtree(folder)
    return Grown(text, found["rounds"], found["stop_ndcg"])


def save_lists(path: Path, lists: Lists) -> None:
    """Write lists as arrays."""
    positions: dict[str, Any] = {} if lists.positions is None else {"positions": lists.positions}
    with path.open("wb") as stream:
        np.savez(stream, features=lists.features, labels=lists.labels, sizes=lists.sizes, **positions)


def load_lists(path: Path) -> Lists:
    """The lists of a file."""
    with np.load(path, allow_pickle=False) as arrays:
        return Lists(arrays["features"], arrays["labels"], arrays["sizes"],
                     arrays["positions"] if "positions" in arrays.files else None)


def _run(folder: Path, config: GbdtConfig, label_gain: tuple[float, ...], workers: TreeWorkers) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.lightgbm import LightGBMTrainer
    from ray.train.v2.api.exceptions import WorkerGroupError

    trainer = LightGBMTrainer(
        _worker, train_loop_config={"folder": str(folder), "config": config.model_dump(mode="json"),
                                    "label_gain": list(label_gain)},
        scaling_config=ScalingConfig(num_workers=workers.count, resources_per_worker={"CPU": workers.cpus}),
        run_config=RunConfig(name=f"{time.time_ns()}-{os.getpid()}", storage_path=str(folder / "ray"),
                             failure_config=FailureConfig(max_failures=workers.max_failures)))
    try:
        trainer.fit()
    except WorkerGroupError as error:
        first = next(iter(error.worker_failures.values()), error)
        raise ValueError(f"growing trees failed on a worker: {first}") from error


def _worker(settings: dict[str, Any]) -> None:
    """One worker: its own lists, everybody's trees; the first writes them down."""
    import ray.train
    from ray.train.lightgbm import get_network_params

    folder, rank = Path(settings["folder"]), ray.train.get_context().get_world_rank()
    config = GbdtConfig.model_validate(settings["config"])
    network = {**get_network_params(), "tree_learner": "data", "pre_partition": True}
    fitted = fit(load_lists(folder / f"lists-{rank}.npz"), load_lists(folder / STOP), config, settings["label_gain"],
                 network)
    if rank == 0:
        write_text(folder / "model.txt", model_text(fitted))
        write_text(folder / "found.json", json.dumps({"rounds": fitted.rounds, "stop_ndcg": fitted.stop_ndcg}))
