"""Fine-tuning as a job: pairs -> tokenised shards -> training on N workers -> a published encoder.

Ray Train starts the workers and starts them again when one dies; the state of the run is in our own
checkpoints, because Ray's list of checkpoints is rewritten in place and one torn write makes a run
unresumable. So each start of the driver is a new run to Ray, and the same one to us.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
from recsys_ray.models.sentence_layout import ENCODER_KIND as KIND
from recsys_ray.training import pair_shards
from recsys_ray.training.bge import FinetuneBgeConfig, WorkersConfig
from recsys_ray.training.loop import Report
from recsys_ray.training.pair_passes import guide_vectors
from recsys_ray.training.pair_shards import PairTokenizer, ShardSettings, write_shard
from recsys_ray.training.teacher import require_its_student
from recsys_ray.training.trackers import followed

log = logging.getLogger(__name__)

TASK_CPUS = 0.9
WAIT_S = 3600.0     # for another run that makes the same shards


class _Entries(Config):
    """What a finished shard consists of."""

    entries: tuple[FileEntry, ...]


def finetune_bge(config: FinetuneBgeConfig) -> Artifact:
    """The `encoder` artefact: encoder/ (a sentence-transformers folder), metrics.jsonl (the curve).

    Facts: encoder (identity), base (identity of what it started from), steps, best_step, best_value,
    base_value, objective, learning_rate, false_negative_share, mask_same_product, copied_token_gap, pairs.
    A killed run continues when the same configuration is run again.
    """
    if config.workers.count == 0:
        return finetune_here(config)
    with runtime.connected(config.ray):
        return _finetune(config, None)


def finetune_here(config: FinetuneBgeConfig, report: Report | None = None) -> Artifact:
    """`finetune_bge` in this process, whatever `workers` says; `report(step, value)` is told each evaluation."""
    return _finetune(config.replace(workers={**config.workers.model_dump(), "count": 0}), report)


def _finetune(given: FinetuneBgeConfig, report: Report | None) -> Artifact:
    from recsys_ray.training.encoder_run import publish, train_worker

    config = given.resolved()
    pairs = open_artifact(config.pairs, "pairs")
    if config.contrastive.distillation is not None:
        require_its_student(pairs.manifest.facts, config.encoder, config.pairs)
    shards = _tokenised(config, pairs)
    output, key = config.output, config.key(shards.manifest.fingerprint)
    if (done := find_artifact(output, KIND, key)) is not None:
        return done
    guide = None if config.guide is None else guide_vectors(config, pairs)
    with stage(output, KIND, key) as staging:
        settings: dict[str, Any] = {
            "staging": str(staging.path), "shards_version": shards.manifest.version, "key": key,
            "guide_version": None if guide is None else guide.manifest.version}
        if config.workers.count == 0:
            train_worker(config, **settings, report=report)
        else:
            run_workers(_worker, {"config": config.model_dump(mode="json"), "run": settings}, config.workers,
                        staging.path)
        parents = {"pairs": pairs.manifest, "pair_shards": shards.manifest}
        return publish(given, staging, parents if guide is None else {**parents, "guide": guide.manifest})


# --- workers --------------------------------------------------------------------------------------
def run_workers(worker: Callable[[dict[str, Any]], None], settings: dict[str, Any], workers: WorkersConfig,
                staging: Path) -> None:
    """Run `worker(settings)` on every worker of a group until all are done; one that dies is started again.

    `staging` is the run's directory: its curve is followed there. `settings` are plain values, because
    they travel. Errors: `ValueError` with what the first failed worker said, once `max_failures` are used up.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import WorkerGroupError

    state = staging / "ray"
    shutil.rmtree(state, ignore_errors=True)    # of drivers that ended; this one holds the lock
    resources = {"CPU": workers.cpus, **({"GPU": 1.0} if workers.gpus else {})}
    trainer = TorchTrainer(
        worker, train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=workers.count, use_gpu=workers.gpus, resources_per_worker=resources),
        torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo"),
        run_config=RunConfig(name=f"{time.time_ns()}-{os.getpid()}", storage_path=str(state),
                             failure_config=FailureConfig(max_failures=workers.max_failures)))
    try:
        with followed(staging / "run" / "metrics.jsonl"):
            trainer.fit()
    except WorkerGroupError as error:
        first = next(iter(error.worker_failures.values()), error)
        raise ValueError(f"training failed on a worker: {first}") from error
    shutil.rmtree(state, ignore_errors=True)


def _worker(settings: dict[str, Any]) -> None:
    """One worker of the group: the process group is there, the device is set."""
    from recsys_ray.training.encoder_run import train_worker

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    config = FinetuneBgeConfig.model_validate(settings["config"])
    train_worker(config, **settings["run"])


# --- tokens ---------------------------------------------------------------------------------------
def _tokenised(config: FinetuneBgeConfig, pairs: Artifact) -> Artifact:
    """The `pair_shards` artefact of these pairs and this tokenizer, made if it is not there yet."""
    root, settings = config.shards_root, config.shard_settings()
    key = fingerprint({"pairs": pairs.manifest.fingerprint, "version": pairs.manifest.version,
                       "settings": settings.identity()})
    if (done := find_artifact(root, pair_shards.KIND, key)) is not None:
        return done
    with stage(root, pair_shards.KIND, key, WAIT_S) as staging:
        if (done := find_artifact(root, pair_shards.KIND, key)) is not None:
            return done     # made by a run beside this one, with the same shards
        names = [name for split in pair_shards.SPLITS for name in pairs.names(f"pairs/{split}/")]
        todo = [name for name in names if _finished(staging.path, _shard_name(name)) is None]
        log.info("tokenising %d files of pairs, %d found finished", len(names), len(names) - len(todo))
        if config.workers.count:
            _tokenise_on_ray(pairs, todo, settings, staging.path)
        else:
            tokenizer = PairTokenizer(settings)
            for name in todo:
                _tokenise(pairs, name, tokenizer, staging.path)
        files = [entry for name in names for entry in _finished(staging.path, _shard_name(name)) or ()]
        return staging.commit(files, config=config, parents={"pairs": pairs.manifest},
                              facts={"settings": settings.identity(), "pairs": {
                                  split: pairs.manifest.rows(f"pairs/{split}/") for split in pair_shards.SPLITS}})


def _tokenise_on_ray(pairs: Artifact, names: Sequence[str], settings: ShardSettings, staging: Path) -> None:
    task = ray.remote(num_cpus=TASK_CPUS * runtime.core_cpus(), max_retries=3)(_tokenise_alone)
    root, version = str(pairs.path.parents[1]), pairs.manifest.version
    ray.get([task.remote(root, version, name, settings, str(staging)) for name in names])


def _tokenise_alone(root: str, version: str, name: str, settings: ShardSettings, staging: str) -> None:
    _tokenise(open_artifact(root, "pairs", version), name, PairTokenizer(settings), Path(staging))


def _tokenise(pairs: Artifact, name: str, tokenizer: PairTokenizer, staging: Path) -> None:
    shard = _shard_name(name)
    entries = write_shard(pairs.table(name), tokenizer, staging, shard)
    write_text(staging / "done" / f"{shard}.json", _Entries(entries=tuple(entries)).model_dump_json())


def _shard_name(name: str) -> str:
    return name.removeprefix("pairs/").removesuffix(".parquet")


def _finished(staging: Path, shard: str) -> list[FileEntry] | None:
    """The entries of a shard whose files are whole, else None."""
    try:
        entries = _Entries.model_validate_json((staging / "done" / f"{shard}.json").read_bytes()).entries
        for entry in entries:
            check_file(staging / entry.path, entry)
    except (OSError, ValueError):
        return None
    return list(entries)
