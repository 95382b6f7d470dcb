"""A fine-tuning of a cross-encoder from its lists to a published folder; a killed run goes on where it was."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recsys_ray import runtime
from recsys_ray.artifacts import Artifact, Staging, find_artifact, open_artifact, stage
from recsys_ray.config import fingerprint
from recsys_ray.models.cross_encoder import CrossEncoderConfig, cross_encoder_identity
from recsys_ray.models.sentence_layout import CROSS_ENCODER_KIND as KIND
from recsys_ray.training.cross_encoder import CrossEncoderTask, FinetuneCrossEncoderConfig, build_task
from recsys_ray.training.distributed import rank
from recsys_ray.training.encoder_run import RESULT, model_files, outcome, parameters_of, use_threads, write_model
from recsys_ray.training.launch import run_workers
from recsys_ray.training.loop import Loop, Progress, Report, RunFiles, best_weights
from recsys_ray.training.model_card import reranker_card
from recsys_ray.training.reranker_groups import KIND as PAIRS_KIND
from recsys_ray.training.reranker_groups import read_groups
from recsys_ray.training.trackers import read_curve


def finetune_cross_encoder(config: FinetuneCrossEncoderConfig) -> Artifact:
    """The `cross_encoder` artefact: cross_encoder/ (sentence_transformers.CrossEncoder loads it), metrics.jsonl.

    Facts: identity of the weights, base, loss, steps, best_step, best_value, base_value, objective, pairs,
    lists, tokens, cpu_seconds. A killed run continues when the same configuration is run again.
    """
    if config.workers.count == 0:
        return finetune_here(config)
    with runtime.connected(config.ray):
        return _finetune(config, None)


def finetune_here(config: FinetuneCrossEncoderConfig, report: Report | None = None) -> Artifact:
    """`finetune_cross_encoder` in this process, whatever `workers` says; `report(step, value)` is told evaluations."""
    return _finetune(config.replace(workers={**config.workers.model_dump(), "count": 0}), report)


def _finetune(given: FinetuneCrossEncoderConfig, report: Report | None) -> Artifact:
    config = given.resolved()
    pairs = open_artifact(config.pairs, PAIRS_KIND)
    key = config.key(fingerprint([pairs.manifest.fingerprint, pairs.manifest.version]))
    if (done := find_artifact(config.output, KIND, key)) is not None:
        return done
    with stage(config.output, KIND, key) as staging:
        if config.workers.count == 0:
            train_worker(config, staging.path, pairs.manifest.version, key, report)
        else:
            run_workers(_worker, {"config": config.model_dump(mode="json"), "staging": str(staging.path),
                                  "pairs": pairs.manifest.version, "key": key}, config.workers, staging.path)
        return _publish(given, staging, pairs)


def _worker(settings: dict[str, Any]) -> None:
    """One worker of the group: the process group is there, the device is set."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    config = FinetuneCrossEncoderConfig.model_validate(settings["config"])
    train_worker(config, Path(settings["staging"]), settings["pairs"], settings["key"])


def train_worker(config: FinetuneCrossEncoderConfig, directory: Path, pairs_version: str, key: str,
                 report: Report | None = None) -> None:
    """Train, or go on with a run that was stopped; the first worker writes the model's folder into `directory`."""
    use_threads(config.workers)
    pairs = open_artifact(config.pairs, PAIRS_KIND, pairs_version)
    task = build_task(config, read_groups(pairs, "train"), read_groups(pairs, "valid"))
    files = RunFiles(directory / "run")
    progress = Loop(task.task(), config, files, key, parameters_of(config), report).run()
    if rank() == 0:
        _write(config, task, files, directory, progress)


def _write(config: FinetuneCrossEncoderConfig, task: CrossEncoderTask, files: RunFiles, directory: Path,
           progress: Progress) -> None:
    best = best_weights(files)
    if best is not None:
        task.model.load_state_dict(best)
    values = asdict(progress) | {"train_pairs": task.train.num_rows, "train_groups": len(task.train),
                                 "valid_pairs": task.valid.num_rows, "base": config.base_identity()}
    card = reranker_card(config, values, read_curve(files.curve))
    write_model(directory, KIND, files, values, lambda folder: task.model.save(folder, config.max_tokens, card))


def _publish(config: FinetuneCrossEncoderConfig, staging: Staging, pairs: Artifact) -> Artifact:
    values: dict[str, Any] = json.loads((staging.path / RESULT).read_bytes())
    scorer = CrossEncoderConfig(model=str(staging.path / KIND), device="cpu", max_chars=config.max_chars)
    facts = outcome(config, values, config.validation.objective) | {
        "cross_encoder": cross_encoder_identity(scorer), "base": values["base"], "base_model": config.model,
        "loss": config.loss, "lists": values["train_groups"], "tokens": values["sums"].get("tokens", 0.0),
        "pairs": {"train": values["train_pairs"], "valid": values["valid_pairs"]}}
    return staging.commit(model_files(staging, KIND), config=config, parents={"pairs": pairs.manifest}, facts=facts)
