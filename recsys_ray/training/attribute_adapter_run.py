"""A training of the adapter of pictures from artefacts to a published folder; a killed run goes on where it was."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recsys_ray import runtime
from recsys_ray.artifacts import Artifact, Staging, find_artifact, open_artifact, stage, write_text
from recsys_ray.config import ConfigError
from recsys_ray.data.attribute_items import Floats, Items, Pairs, halves, label_pairs, read_items, split_places
from recsys_ray.data.attribute_pair_data import GroupSplit
from recsys_ray.evaluation.gate import GateError
from recsys_ray.models.attribute_adapter import KIND, AttributeAdapter, adapter_identity
from recsys_ray.models.image_encoder import ImageEncoder
from recsys_ray.training.attribute_adapter import (
    OBJECTIVE,
    AdapterData,
    AdapterTask,
    FinetuneAttributeAdapterConfig,
    build_task,
)
from recsys_ray.training.attribute_gate import SliceVerdicts, judge_slices, judge_texts, require_alignment
from recsys_ray.training.clip_texts import clip_text_vectors
from recsys_ray.training.distributed import rank
from recsys_ray.training.encoder_run import RESULT, model_files, outcome, parameters_of, use_threads, write_model
from recsys_ray.training.launch import run_workers
from recsys_ray.training.loop import Loop, Progress, Report, RunFiles, best_weights
from recsys_ray.training.model_card import adapter_card
from recsys_ray.training.tower_pictures import open_pictures
from recsys_ray.training.trackers import read_curve

log = logging.getLogger(__name__)

KINDS = {"vectors": "image_vectors", "attributes": "attributes", "pairs": "attribute_pairs",
         "embeddings": "embeddings"}
SCOREBOARD = "scoreboard.json"
Inputs = dict[str, Artifact]


def finetune_attribute_adapter(config: FinetuneAttributeAdapterConfig) -> Artifact:
    """The `attribute_adapter` artefact: attribute_adapter/ (for `load_image_tower`), scoreboard.json (chance, frozen
    and trained with intervals, slice by slice) and metrics.jsonl (the curve).

    Facts: adapter (identity), steps, best_step, best_value, base_value (of the frozen model), objective, pictures,
    pairs (by kind), tower (full, lora or null), slices (by their verdict beside the frozen model), forced. A killed
    run continues when the same configuration is run again. Errors: `GateError` when a declared slice is decidably
    below the frozen model; `ValueError` when attributes and pictures do not belong together.
    """
    if config.workers.count == 0:
        return finetune_here(config)
    with runtime.connected(config.ray):
        return _finetune(config, None)


def finetune_here(config: FinetuneAttributeAdapterConfig, report: Report | None = None) -> Artifact:
    """The same in this process, whatever `workers` says; `report(step, value)` is told each evaluation."""
    return _finetune(config.replace(workers={**config.workers.model_dump(), "count": 0}), report)


def _finetune(given: FinetuneAttributeAdapterConfig, report: Report | None) -> Artifact:
    config = given.resolved()
    inputs = {name: open_artifact(path, kind) for name, kind in KINDS.items()
              if (path := getattr(config, name)) is not None}
    if config.clip_texts is not None:
        root = config.output.with_name(config.output.name + "-texts")
        inputs["embeddings"] = clip_text_vectors(config.clip_texts, inputs["vectors"], root)
        config = config.replace(embeddings=root, clip_texts=None)
    key = config.key({name: f"{one.manifest.fingerprint} {one.manifest.version}" for name, one in inputs.items()})
    if (done := find_artifact(config.output, KIND, key)) is not None:
        return done
    if config.tower is not None:
        config = config.replace(tower=config.tower.completed(inputs["vectors"].manifest.config, config.workers.gpus))
    data = read_data(config, inputs)
    require_alignment(data.items, config.seed)
    with stage(config.output, KIND, key) as staging:
        data = with_pictures(config, data, staging.path)
        if config.workers.count == 0:
            use_threads(config.workers)
            train_worker(config, data, staging.path, key, report)
        else:
            versions = {name: one.manifest.version for name, one in inputs.items()}
            run_workers(_worker, {"config": config.model_dump(mode="json"), "staging": str(staging.path),
                                  "versions": versions, "key": key}, config.workers, staging.path)
        return _publish(config, given, staging, inputs, data)


def _worker(settings: dict[str, Any]) -> None:
    """One worker of the group: the process group is there, the device is set."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    config = FinetuneAttributeAdapterConfig.model_validate(settings["config"])
    use_threads(config.workers)
    inputs = {name: open_artifact(getattr(config, name), KINDS[name], version)
              for name, version in settings["versions"].items()}
    data = with_pictures(config, read_data(config, inputs), Path(settings["staging"]))
    train_worker(config, data, Path(settings["staging"]), settings["key"])


def read_data(config: FinetuneAttributeAdapterConfig, inputs: Inputs) -> AdapterData:
    """What the artefacts hold, split by groups."""
    items = read_items(inputs["vectors"], inputs.get("attributes"), inputs.get("embeddings"))
    shares = config.split if "pairs" not in inputs else GroupSplit.model_validate(
        inputs["pairs"].manifest.facts["split"])
    split = split_places(items, shares)
    valid, judges = halves(items, split["valid"], config.validation.share, shares.seed)
    if "pairs" in inputs:
        table = pa.concat_tables(inputs["pairs"].tables("pairs/train"))
        pairs = Pairs.of(table, items, config.seed)
    else:
        pairs = label_pairs(items, config.seed)
    text = inputs["embeddings"].manifest.facts["encoder"] if "embeddings" in inputs else None
    return AdapterData(items, split["train"], valid, pairs.within(split["train"], len(items)),
                       inputs["vectors"].manifest.facts["encoder"], text, judges)


def with_pictures(config: FinetuneAttributeAdapterConfig, data: AdapterData, directory: Path) -> AdapterData:
    """The same with the pictures of all but the test split, where the tower is trained; kept in `directory`."""
    tower = config.tower
    if tower is None or tower.encoder is None or tower.images is None:
        return data
    encoder = ImageEncoder(tower.encoder)
    if encoder.identity != data.image:
        raise ConfigError(f"tower.encoder: {tower.encoder.model} of these weights is not the network of `vectors`")
    places = np.concatenate([data.train, data.valid, data.judging])
    return replace(data, pictures=open_pictures(directory / "run", data.items, places, tower.images, encoder))


def train_worker(config: FinetuneAttributeAdapterConfig, data: AdapterData, directory: Path, key: str,
                 report: Report | None = None) -> None:
    """Train, or go on with a run that was stopped; the first worker writes the adapter's folder into `directory`."""
    task = build_task(config, data)
    files = RunFiles(directory / "run")
    progress = Loop(task.task(), config, files, key, parameters_of(config), report).run()
    if rank() == 0:
        _write(config, task, files, directory, progress)


def _write(config: FinetuneAttributeAdapterConfig, task: AdapterTask, files: RunFiles, directory: Path,
           progress: Progress) -> None:
    best = best_weights(files)
    if best is not None:
        task.trained.load_state_dict(best)
    data = task.data
    values = asdict(progress) | {"pictures": {"train": len(data.train), "valid": len(data.valid),
                                              "gate": len(data.judging)},
                                 "pairs": dict(Counter(data.pairs.kinds)), "attributes": {
                                     name: len(one) for name, one in data.items.values.items()}}
    readme = adapter_card(config, data.image, values, read_curve(files.curve))

    def save(folder: Path) -> None:
        if task.tower is not None:
            task.model.card = task.model.card.on(task.tower.save(folder))
        task.model.save(folder, readme)

    write_model(directory, KIND, files, values, save)


def _publish(config: FinetuneAttributeAdapterConfig, given: FinetuneAttributeAdapterConfig, staging: Staging,
             inputs: Inputs, data: AdapterData) -> Artifact:
    values: dict[str, Any] = json.loads((staging.path / RESULT).read_bytes())
    adapter = AttributeAdapter.load(str(staging.path / KIND))
    judged = data.items.take(data.judging)
    adapted = adapter.adapt(_vectors(config, data, staging.path / KIND))
    verdicts = judge_slices(judged, adapted, config.gate, config.seed)
    _require(verdicts, config)
    boards = {"pictures": verdicts.board, "texts": _texts(config, adapter, judged, adapted)}
    write_text(staging.path / SCOREBOARD, json.dumps(boards, indent=1, allow_nan=False) + "\n")
    facts = outcome(config, values, OBJECTIVE) | {
        "adapter": adapter_identity(str(staging.path / KIND)), "pictures": values["pictures"], "pairs": values["pairs"],
        "tower": None if config.tower is None else config.tower.train,
        "slices": verdicts.as_dict(), "forced": config.force and bool(verdicts.names("worse"))}
    return staging.commit([*model_files(staging, KIND), staging.entry(SCOREBOARD)], config=given, facts=facts,
                          parents={name: one.manifest for name, one in inputs.items()})


def _vectors(config: FinetuneAttributeAdapterConfig, data: AdapterData, folder: Path) -> Floats:
    """Vectors of the judging pictures by the tower that the adapter in `folder` stands on, (N, D)."""
    if config.tower is None or config.tower.encoder is None or data.pictures is None:
        return data.items.vectors[data.judging]
    trained = ImageEncoder(config.tower.encoder.replace(pretrained=str(folder)))
    return trained.encode_framed(data.pictures.framed(data.judging))


def _texts(config: FinetuneAttributeAdapterConfig, adapter: AttributeAdapter, judged: Items, adapted: Floats
           ) -> dict[str, Any] | None:
    if judged.texts is None or len(judged) < 2:
        return None
    return judge_texts(judged, adapted, adapter.adapt(judged.texts, "text"), config.gate,
                       config.seed, judged.texts if adapter.card.shares_space else None)


def _require(verdicts: SliceVerdicts, config: FinetuneAttributeAdapterConfig) -> None:
    """Raise `GateError` where a declared slice is decidably below the frozen model; say which are undecidable."""
    if undecidable := verdicts.of("undecidable"):
        log.warning("undecidable beside the frozen model: %s", "; ".join(undecidable))
    if not verdicts.names("worse"):
        return
    told = "; ".join(verdicts.of("worse"))
    if not config.force:
        raise GateError(f"below the frozen model: {told}. Train longer or slower, draw these more often "
                        "(sampler.boosts), or publish it all the same with force=true")
    log.warning("published all the same, below the frozen model: %s", told)
