"""A fine-tuning of BT-BERT from labels to a published folder; a killed run goes on where it was."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recsys_ray import runtime
from recsys_ray.artifacts import Artifact, Staging, find_artifact, open_artifact, stage
from recsys_ray.config import fingerprint
from recsys_ray.data.concern_data import KIND as LABELS_KIND
from recsys_ray.models.bt_bert import KIND, Calibration
from recsys_ray.models.bt_bert_scorer import BtBertConfig, bt_bert_identity
from recsys_ray.training.bt_bert import OBJECTIVE, BtBertTask, FinetuneBtBertConfig, build_task, known_concerns
from recsys_ray.training.calibration import calibrate
from recsys_ray.training.concern_pairs import concerns_of, read_pairs
from recsys_ray.training.distributed import rank
from recsys_ray.training.encoder_run import RESULT, model_files, outcome, parameters_of, use_threads, write_model
from recsys_ray.training.launch import run_workers
from recsys_ray.training.loop import Loop, Progress, Report, RunFiles, best_weights
from recsys_ray.training.model_card import bt_bert_card
from recsys_ray.training.trackers import read_curve


def finetune_bt_bert(config: FinetuneBtBertConfig) -> Artifact:
    """The `bt_bert` artefact: bt_bert/ (an ordinary Transformers folder with a head), metrics.jsonl (the curve).

    Facts: bt_bert (identity, with concerns, temperature and thresholds), base, mode, steps, best_step, best_value,
    base_value, objective, products, pairs, old_and_new, tokens, cpu_seconds. A killed run continues when the same
    configuration is run again.
    """
    if config.workers.count == 0:
        return finetune_here(config)
    with runtime.connected(config.ray):
        return _finetune(config, None)


def finetune_here(config: FinetuneBtBertConfig, report: Report | None = None) -> Artifact:
    """`finetune_bt_bert` in this process, whatever `workers` says; `report(step, value)` is told evaluations."""
    return _finetune(config.replace(workers={**config.workers.model_dump(), "count": 0}), report)


def _finetune(given: FinetuneBtBertConfig, report: Report | None) -> Artifact:
    labels = given.labels.artifact(given.output.resolve())
    config = given.resolved().replace(labels=given.labels.at(labels))
    concerns_of(labels, config.concerns)    # a name that nobody labelled is an error before any worker starts
    key = config.key(fingerprint([labels.manifest.fingerprint, labels.manifest.version]))
    if (done := find_artifact(config.output, KIND, key)) is not None:
        return done
    with stage(config.output, KIND, key) as staging:
        if config.workers.count == 0:
            train_worker(config, staging.path, labels.manifest.version, key, report)
        else:
            run_workers(_worker, {"config": config.model_dump(mode="json"), "staging": str(staging.path),
                                  "labels": labels.manifest.version, "key": key}, config.workers, staging.path)
        return _publish(given, staging, labels)


def _worker(settings: dict[str, Any]) -> None:
    """One worker of the group: the process group is there, the device is set."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    config = FinetuneBtBertConfig.model_validate(settings["config"])
    train_worker(config, Path(settings["staging"]), settings["labels"], settings["key"])


def train_worker(config: FinetuneBtBertConfig, directory: Path, labels_version: str, key: str,
                 report: Report | None = None) -> None:
    """Train, or go on with a run that was stopped; the first worker writes the model's folder into `directory`."""
    use_threads(config.workers)
    labels = open_artifact(config.labels.path, LABELS_KIND, labels_version)
    concerns = concerns_of(labels, config.concerns)
    train, valid = (read_pairs(labels, split, concerns, config.unlabelled_weight) for split in ("train", "valid"))
    task = build_task(config, concerns, train, valid)
    files = RunFiles(directory / "run")
    progress = Loop(task.task(), config, files, key, parameters_of(config), report).run()
    if rank() == 0:
        _write(config, task, files, directory, progress)


def _write(config: FinetuneBtBertConfig, task: BtBertTask, files: RunFiles, directory: Path, progress: Progress
           ) -> None:
    best = best_weights(files)
    if best is not None:
        task.model.load_state_dict(best)
    task.model.eval()
    task.settle()
    calibration = calibrate(task.model.card.names(), task.logits(task.judged_products), task.judged.targets,
                            task.judged.weights) if len(task.judged) else Calibration()
    values = asdict(progress) | {
        "products": {"train": len(task.train), "valid": len(task.valid)}, "pairs": len(task.units),
        "base": config.base_identity(), "concerns": task.model.card.names(),
        "calibration": calibration.model_dump(mode="json")}
    curve = read_curve(files.curve)
    values["old_and_new"] = old_and_new(curve, known_concerns(config.model), values["best_step"])
    card = bt_bert_card(config, values, curve)
    write_model(directory, KIND, files, values, lambda folder: task.model.save(folder, calibration, card))


def old_and_new(curve: Sequence[Mapping[str, Any]], known: Sequence[str], best_step: int
                ) -> dict[str, dict[str, float]]:
    """Macro average precision on validation of the concerns that the model knew (`old`) and of the `new` ones, each
    `before` the first step and `after` the best one; empty for a bare body and where nothing was evaluated.
    """
    lines = {line["step"]: line for line in curve if OBJECTIVE in line}
    if not known or 0 not in lines or best_step not in lines:
        return {}
    found: dict[str, dict[str, float]] = {}
    for part, line in (("before", lines[0]), ("after", lines[best_step])):
        each = {name.removeprefix("ap_"): value for name, value in line.items() if name.startswith("ap_")}
        for age, values in (("old", [value for name, value in each.items() if name in known]),
                            ("new", [value for name, value in each.items() if name not in known])):
            if values:
                found.setdefault(age, {})[part] = sum(values) / len(values)
    return found


def _publish(config: FinetuneBtBertConfig, staging: Staging, labels: Artifact) -> Artifact:
    values: dict[str, Any] = json.loads((staging.path / RESULT).read_bytes())
    facts = outcome(config, values, OBJECTIVE) | {
        "bt_bert": bt_bert_identity(BtBertConfig(model=str(staging.path / KIND))), "base": values["base"],
        "base_model": config.model, "mode": config.mode, "products": values["products"], "pairs": values["pairs"],
        "old_and_new": values["old_and_new"], "tokens": values["sums"].get("tokens", 0.0)}
    return staging.commit(model_files(staging, KIND), config=config, parents={"labels": labels.manifest}, facts=facts)
