"""Rounds of mining and training: each round's negatives are what the encoder of the round before still confuses.

A round is a chain of ordinary stages (embed, index, mine, train) below a directory of its own, so a killed
run, run again, goes on in the midst of the stage it was in.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from recsys_ray.artifacts import Artifact, write_text
from recsys_ray.config import Config
from recsys_ray.data.negatives import NegativesConfig
from recsys_ray.flow import stage_clock
from recsys_ray.models.sentence_layout import ENCODER_FOLDER
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.retrieval.embed import EmbedConfig, embed_products
from recsys_ray.retrieval.index_build import BuildIndexConfig, build_index
from recsys_ray.retrieval.mining import MineNegativesConfig, mine_negatives
from recsys_ray.retrieval.vector_index import VectorIndexConfig
from recsys_ray.runtime import RayConfig, connected
from recsys_ray.training.bge import FinetuneBgeConfig
from recsys_ray.training.launch import finetune_bge

log = logging.getLogger(__name__)

TABLE = "rounds.json"


class TrainRoundsConfig(Config):
    """What every round does, how many there may be, and where they lie."""

    work_dir: Path                                  # round-1, round-2, ... and rounds.json
    prepared: Path                                  # the catalogue
    pairs: Path                                     # of make_pairs: every round mines for these anew
    rounds: int = Field(default=3, ge=1)            # at most
    min_gain: float = Field(default=0.0, ge=0)      # of a round over the best before it, else it is the last
    start: Literal["base", "previous"] = "base"     # the encoder that each round's training starts from
    negatives: NegativesConfig = NegativesConfig()
    vector: VectorIndexConfig = VectorIndexConfig()
    finetune: FinetuneBgeConfig                     # its pairs, output and shards are those of the round
    ray: RayConfig = RayConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_paths(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not {"work_dir", "pairs"} <= set(values):
            return values
        finetune = values.get("finetune") or {}
        if isinstance(finetune, Mapping):
            finetune = {"pairs": values["pairs"], "output": values["work_dir"], **finetune}
        return {**values, "finetune": finetune}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.finetune.contrastive.distillation is not None:
            raise ValueError("finetune.contrastive.distillation: the pairs of a round have no teacher's scores; mine, "
                             "score_pairs and finetune_bge are the jobs for that")
        return self

    def folder(self, number: int) -> Path:
        """Where a round lies."""
        return self.work_dir / f"round-{number}"


def train_rounds(config: TrainRoundsConfig) -> Path:
    """rounds.json: a row a round (validation, steps, negatives), and the best round with its encoder's root.

    The first round mines with the base encoder, each further one with the encoder of the round before. The
    rounds end when one does not improve on the best before it by more than `min_gain`, and its row stays.
    """
    base = config.finetune.encoder
    encoder, rows = base, list[dict[str, Any]]()
    with connected(config.ray):
        for number in range(1, config.rounds + 1):
            trained = _round(config, number, encoder, base if config.start == "base" else encoder, rows)
            encoder = base.replace(model=str(trained.path / ENCODER_FOLDER))
            if not goes_on([rows[0]["base_value"], *(row["best_value"] for row in rows)], config.min_gain):
                break
    return _write(config, rows)


def goes_on(values: Sequence[float | None], min_gain: float) -> bool:
    """Whether the last value is more than `min_gain` above the best before it; also where nothing was measured.

    `values` are those of the base and of each round so far.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return True     # without validation pairs, all rounds are made
    return known[-1] > max(known[:-1]) + min_gain


def _round(config: TrainRoundsConfig, number: int, miner: TextEncoderConfig, start: TextEncoderConfig,
           rows: list[dict[str, Any]]) -> Artifact:
    """Mine with one encoder, train from another; a row is added."""
    folder, ray = config.folder(number), config.ray
    miner = miner.replace(sparse=False, multi_vector=False)     # vectors suffice, and a base may have no heads yet
    with stage_clock(f"round {number}: embed, index and mine"):
        embed_products(EmbedConfig(prepared=config.prepared, output=folder / "embeddings", encoder=miner, ray=ray))
        build_index(BuildIndexConfig(prepared=config.prepared, embeddings=folder / "embeddings",
                                     output=folder / "index", vector=config.vector, ray=ray))
        mined = mine_negatives(MineNegativesConfig.model_validate({
            **config.negatives.model_dump(), "pairs": config.pairs, "prepared": config.prepared,
            "index": folder / "index", "output": folder / "pairs", "encoder": miner.model_dump(),
            "ray": ray.model_dump()}))
    with stage_clock(f"round {number}: train"):
        trained = finetune_bge(config.finetune.replace(
            pairs=folder / "pairs", output=folder / "encoder", shards=folder / "shards", encoder=start.model_dump(),
            ray=ray.model_dump()))
    facts, negatives = trained.manifest.facts, mined.manifest.facts["negatives"]
    rows.append({"round": number, **{name: facts[name] for name in ("objective", "base_value", "best_value",
                                                                    "best_step", "steps", "cpu_seconds")},
                 "encoder": str(folder / "encoder"), "negatives": negatives})
    return trained


def _write(config: TrainRoundsConfig, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write and log the table of the rounds."""
    best = max(rows, key=lambda row: -1.0 if row["best_value"] is None else row["best_value"])
    for row in rows:
        log.info("round %d: %s %s (%s at the start) at step %d of %d; hardest negative %.3f, positive %.3f%s",
                 row["round"], row["objective"], _figure(row["best_value"]), _figure(row["base_value"]),
                 row["best_step"], row["steps"], row["negatives"]["hardest_score"],
                 row["negatives"]["positive_score"], " <- best" if row is best else "")
    path = config.work_dir / TABLE
    write_text(path, json.dumps({"best": best["encoder"], "rounds": rows}, indent=1) + "\n")
    return path


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
