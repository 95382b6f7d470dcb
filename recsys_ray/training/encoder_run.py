"""One worker's run of a fine-tuning, and what becomes of it: an encoder folder, its card and its facts."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from recsys_ray.artifacts import Artifact, FileEntry, Manifest, Staging, write_text
from recsys_ray.models.sentence_layout import ENCODER_FOLDER as FOLDER
from recsys_ray.models.text_encoder import device_of, encoder_identity
from recsys_ray.training.bge import BgeTask, FinetuneBgeConfig, WorkersConfig, build_task
from recsys_ray.training.bge_m3_task import build_bge_m3_task
from recsys_ray.training.distributed import rank, world_size
from recsys_ray.training.guide import open_guide_vectors
from recsys_ray.training.loop import Loop, LoopConfig, Progress, Report, RunFiles, best_weights
from recsys_ray.training.model_card import model_card
from recsys_ray.training.pair_shards import open_pair_shards
from recsys_ray.training.trackers import read_curve

log = logging.getLogger(__name__)

CURVE = "metrics.jsonl"
RESULT = "result.json"


def train_worker(config: FinetuneBgeConfig, staging: str, shards_version: str, key: str,
                 report: Report | None = None, guide_version: str | None = None) -> None:
    """Train, or go on with a run that was stopped; the first worker writes the encoder's folder into `staging`."""
    use_threads(config.workers)
    directory = Path(staging)
    train, valid = (open_pair_shards(config.shards_root, split, shards_version) for split in ("train", "valid"))
    guide = None if guide_version is None else open_guide_vectors(config.guide_root, guide_version)
    device = "cuda" if config.workers.gpus else device_of(config.encoder)
    task = (build_bge_m3_task(config, train, valid, device) if config.encoder.sparse  # type: ignore[arg-type]
            else build_task(config, train, valid, device, guide))   # type: ignore[arg-type]
    files = RunFiles(directory / "run")
    loop = Loop(task.task(), config, files, key, parameters_of(config), report)
    progress = loop.run()
    if rank() == 0:
        _write_encoder(config, task, files, directory, progress)


def use_threads(workers: WorkersConfig) -> None:
    """Give torch in this process as many threads as the configuration says, or its share of the cores."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if workers.threads is not None or world_size() > 1:
        torch.set_num_threads(workers.threads or max(1, (os.cpu_count() or 1) // world_size()))


def _write_encoder(config: FinetuneBgeConfig, task: BgeTask, files: RunFiles, directory: Path,
                   progress: Progress) -> None:
    best = best_weights(files)
    if best is not None:
        task.model.load_state_dict(best)
    values = asdict(progress) | {"train_pairs": len(task.train), "valid_pairs": len(task.valid),
                                 "base": config.base_identity()}
    curve = read_curve(files.curve)
    prompts = {"query": config.encoder.query_prompt, "document": config.encoder.document_prompt}
    own = {"query": task.model.layout.query_prompt, "document": task.model.layout.document_prompt}
    said = {name: own[name] if text is None else text for name, text in prompts.items()}
    write_model(directory, FOLDER, files, values, lambda folder: task.model.save(
        folder, model_card(config, values, curve), said if said != own else None))


def write_model(directory: Path, folder: str, files: RunFiles, values: Mapping[str, Any],
                save: Callable[[Path], None]) -> None:
    """Write a finished run into the staging `directory`: the model's folder, whole or not at all, curve and values."""
    partial = directory / f".{folder}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save(partial)
    shutil.rmtree(directory / folder, ignore_errors=True)
    os.replace(partial, directory / folder)
    shutil.copyfile(files.curve, directory / CURVE)
    write_text(directory / RESULT, json.dumps(values))


def model_files(staging: Staging, folder: str) -> list[FileEntry]:
    """The manifest entries of what `write_model` wrote."""
    found = sorted(path.relative_to(staging.path).as_posix() for path in (staging.path / folder).rglob("*")
                   if path.is_file())
    return [staging.entry(name) for name in (*found, CURVE)]


def publish(config: FinetuneBgeConfig, staging: Staging, parents: Mapping[str, Manifest]) -> Artifact:
    """Commit what the first worker wrote as a version of the `encoder` artefact."""
    values: dict[str, Any] = json.loads((staging.path / RESULT).read_bytes())
    steps, shares = values["step"], values["sums"]
    facts = outcome(config, values, config.validation.objective) | {
        "encoder": encoder_identity(config.encoder.replace(model=str(staging.path / FOLDER))),
        "base": values["base"], "base_model": config.encoder.model,
        "false_negative_share": shares.get("false_negative_share", 0.0) / max(1, steps),
        "masked_share": shares.get("masked_share", 0.0) / max(1, steps),
        "mask_same_product": config.contrastive.mask_same_product,
        "pairs": {"train": values["train_pairs"], "valid": values["valid_pairs"]},
        "copied_token_gap": parents["pairs"].facts.get("copied_token_gap"),
    }
    return staging.commit(model_files(staging, FOLDER), config=config, parents=parents, facts=facts)


def outcome(config: LoopConfig, values: Mapping[str, Any], objective: str) -> dict[str, Any]:
    """What the facts of every fine-tuning say of how far it came, of the values that `write_model` wrote; logs it."""
    best, steps = values["best_value"], values["step"]
    best_step = steps if best is None else values["best_step"]
    log.info("%d steps, best %s %s at step %d, %s at the start", steps, objective, _figure(best), best_step,
             _figure(values["base_value"]))
    return {"steps": steps, "objective": objective, "best_step": best_step, "best_value": best,
            "base_value": values["base_value"], "stopped_early": values["stopped"], "seed": config.seed,
            "learning_rate": config.optim.learning_rate, "cpu_seconds": values["cpu_seconds"]}


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def parameters_of(config: LoopConfig) -> dict[str, Any]:
    """The run's settings by dotted key, for trackers that list runs."""
    found: dict[str, Any] = {}

    def add(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                add(f"{prefix}.{name}" if prefix else str(name), inner)
        else:
            found[prefix] = value

    add("", config.model_dump(mode="json", exclude={"ray", "trackers"}))
    return found
