"""Contrastive fine-tuning of a text encoder on (query, positive, hard negatives): its configuration and its task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from recsys_ray.config import Config, fingerprint
from recsys_ray.models.bge_m3_heads import BgeM3Heads
from recsys_ray.models.sentence_layout import find_model
from recsys_ray.models.text_encoder import TextEncoderConfig, encoder_identity
from recsys_ray.models.trainable_bert import TrainableBert, TrainableConfig, TrainableOptions
from recsys_ray.runtime import RayConfig
from recsys_ray.training.bge_m3 import HeadsConfig
from recsys_ray.training.contrastive import ContrastiveConfig, PairBatch, contrastive_backward
from recsys_ray.training.distributed import rank, world_size
from recsys_ray.training.guide import GuideVectors, guide_identity
from recsys_ray.training.loop import LoopConfig, Task
from recsys_ray.training.mini_catalogue import MiniCatalogueConfig, draw_catalogue
from recsys_ray.training.pair_shards import PairShards, ShardSettings
from recsys_ray.training.query_information import informative
from recsys_ray.training.sampler import BatchSampler, SamplerConfig

STAGE_VERSION = 1       # raise it when the same inputs would give another model


class WorkersConfig(Config):
    """Who computes."""

    count: int = Field(default=0, ge=0)         # 0: this process, without Ray
    gpus: bool = False                          # a GPU each, NCCL; else CPUs, gloo
    cpus: float = Field(default=1.0, gt=0)      # that Ray sets aside for each
    threads: int | None = Field(default=None, ge=1)     # of torch in each; None: the cores shared out evenly
    max_failures: int = Field(default=3, ge=0)  # restarts of the workers before the run is given up


class FinetuneBgeConfig(LoopConfig):
    """Which encoder learns from which pairs, and how."""

    pairs: Path                                     # artefact of make_pairs or mine_negatives
    output: Path                                    # artefact root of the encoder
    shards: Path | None = None                      # of the tokenised pairs; None: beside the output
    encoder: TextEncoderConfig = TextEncoderConfig()    # where it starts from
    body: TrainableOptions = TrainableOptions()
    query_tokens: int = Field(default=256, ge=3)    # queries are cut here, and where the encoder cuts them
    document_tokens: int = Field(default=512, ge=3)
    negatives: int | None = Field(default=None, ge=0)   # hard ones of each pair; None: all it has
    guide: TextEncoderConfig | None = None          # takes out false negatives, from contrastive.guide_margin on
    contrastive: ContrastiveConfig = ContrastiveConfig()
    heads: HeadsConfig = HeadsConfig()              # with encoder.sparse and encoder.multi_vector: all are trained
    sampler: SamplerConfig = SamplerConfig()
    validation: MiniCatalogueConfig = MiniCatalogueConfig()
    workers: WorkersConfig = WorkersConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = {"mrr", *(f"recall@{cutoff}" for cutoff in self.validation.cutoffs)}
        if self.validation.objective not in names:
            raise ValueError(f"validation.objective: {self.validation.objective!r} is not measured; there are "
                             f"{', '.join(sorted(names))}")
        if self.workers.count > self.sampler.batch_size:
            raise ValueError(f"workers.count: {self.workers.count} workers for batches of {self.sampler.batch_size}")
        if self.encoder.sparse or self.encoder.multi_vector:
            self._refuse_what_heads_cannot()
        if (self.guide is None) != (self.contrastive.guide_margin is None):
            raise ValueError("guide, contrastive.guide_margin: one says which encoder takes out false negatives, the "
                             "other from where on; give both or neither")
        return self

    def _refuse_what_heads_cannot(self) -> None:
        if not (self.encoder.sparse and self.encoder.multi_vector):
            raise ValueError("encoder.sparse, encoder.multi_vector: the heads are trained together, each learns from "
                             "both; set both or neither")
        plain, found = ContrastiveConfig(), self.contrastive
        for name in ("similarity", "in_batch", "hard_weight", "symmetric", "matryoshka", "guide_margin",
                     "distillation"):
            if getattr(found, name) != getattr(plain, name):
                raise ValueError(f"contrastive.{name}: is for plain vectors; leave it out where encoder.sparse and "
                                 "encoder.multi_vector are set")

    @property
    def shards_root(self) -> Path:
        """Where the tokenised pairs are."""
        return (self.shards or self.output.with_name(self.output.name + "-shards")).resolve()

    @property
    def guide_root(self) -> Path:
        """Where the guide's vectors are: beside the shards."""
        return self.shards_root.with_name(self.shards_root.name + "-guide")

    def resolved(self) -> Self:
        """The same with absolute paths: workers start in other directories."""
        return self.replace(pairs=self.pairs.resolve(), output=self.output.resolve(), shards=self.shards_root,
                            encoder=pinned(self.encoder), guide=None if self.guide is None else pinned(self.guide))

    def shard_settings(self) -> ShardSettings:
        """How the pairs are tokenised."""
        encoder = self.encoder.replace(device="cpu", sparse=False, multi_vector=False)
        return ShardSettings(encoder.model_dump(mode="json"), self.query_tokens, self.document_tokens)

    def base_identity(self) -> dict[str, Any]:
        """The identity of what the training starts from; heads that it has yet to make are no part of it."""
        if self.encoder.sparse and not BgeM3Heads.there(find_model(self.encoder.model)):
            return encoder_identity(self.encoder.replace(sparse=False, multi_vector=False))
        return encoder_identity(self.encoder)

    def key(self, shards_fingerprint: str) -> str:
        """What the run is known by: everything that decides the trained weights."""
        away = {"pairs", "output", "shards", "workers", "ray", "trackers", "checkpoint_every", "guide", "heads"}
        values = self.model_dump(mode="json", exclude=away) | {"encoder": self.base_identity()}
        if self.guide is not None:      # options that came later: a run without them keeps the key it had
            values["guide"] = guide_identity(self.guide)
        if not self.sampler.min_information:
            del values["sampler"]["min_information"]
        if self.encoder.sparse:
            values["heads"] = self.heads.model_dump(mode="json")
        return fingerprint({"stage": STAGE_VERSION, "shards": shards_fingerprint, "config": values,
                            "dtype": self.encoder.dtype})


def pinned(encoder: TextEncoderConfig) -> TextEncoderConfig:
    """The encoder at an absolute path, if it has one: of one version, whatever is published meanwhile."""
    return encoder.replace(model=str(find_model(encoder.model))) if Path(encoder.model).is_dir() else encoder


@dataclass
class BgeTask:
    """The model, the batches and their losses, on one worker."""

    config: FinetuneBgeConfig
    model: TrainableBert
    train: PairShards
    valid: PairShards
    guide: GuideVectors | None = None

    def __post_init__(self) -> None:
        """Draw the batches and the validation; wrap the model where there are several workers."""
        config = self.config
        least = config.sampler.min_information
        self.sampler = BatchSampler(config.sampler, config.seed, self.train.lengths, self.train.groups,
                                    self.train.query_hashes, informative(self.train, least) if least else None)
        self.catalogue = draw_catalogue(self.valid, self.train, config.validation, config.seed)
        self.wrapped: Any = self.model
        if world_size() > 1:
            self.wrapped = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False,
                                                               gradient_as_bucket_view=True)

    def task(self) -> Task:
        """What the loop runs."""
        several = {"no_sync": self.wrapped.no_sync} if world_size() > 1 else {}
        return Task(model=self.model, batches_per_epoch=self.sampler.steps_per_epoch, backward=self.backward,
                    evaluate=self.evaluate if self.catalogue is not None else None,
                    objective=self.config.validation.objective, begin=self.begin,
                    half=self.model.dtype == "float16", **several)

    def begin(self, number: int) -> None:
        """Give the batch its dropout."""
        self.model.dropout_seed = (self.config.seed << 32) + number

    def backward(self, number: int, scale: float) -> Mapping[str, float]:
        """Add this worker's gradients of a batch; returns the figures of the whole batch."""
        share = self.sampler.share(number, rank(), world_size())
        places = self.train.places(share, self.config.negatives)
        batch, given = self.train.batch_at(places), dict[str, Any]()
        if self.guide is not None:
            given["guide"] = self.guide.at(places)
        if self.config.contrastive.distillation is not None:
            given["teacher"] = torch.from_numpy(self.train.teacher_scores(places))
        if world_size() > 1:
            given["sync"] = self.wrapped.no_sync
        found = contrastive_backward(self.wrapped, self.wrapped, batch, self.config.contrastive, scale=scale, **given)
        return {"loss": found.loss, "accuracy": found.accuracy, "masked_share": found.masked_share,
                "false_negative_share": false_negative_share(batch), "tokens": float(tokens_of(batch))}

    def evaluate(self) -> Mapping[str, float]:
        """The figures of the mini-catalogue with the weights as they are."""
        assert self.catalogue is not None
        return self.catalogue.evaluate(self.model, self.config.validation.cutoffs)


def build_task(config: FinetuneBgeConfig, train: PairShards, valid: PairShards,
               device: Literal["auto", "cpu", "cuda"], guide: GuideVectors | None = None) -> BgeTask:
    """The task on this worker: the encoder is loaded; adapters start from the run's seed."""
    torch.manual_seed(config.seed)
    model = TrainableBert.load(trainable_config(config, device))
    refuse_other_similarity(config, model.similarity)
    return BgeTask(config, model, train, valid, guide)


def trainable_config(config: FinetuneBgeConfig, device: Literal["auto", "cpu", "cuda"]) -> TrainableConfig:
    """Which body is trained on this worker, and how its passes are computed."""
    encoder = config.encoder
    return TrainableConfig(model=encoder.model, dtype=encoder.dtype, device=device, similarity=encoder.similarity,
                           **config.body.model_dump())


def refuse_other_similarity(config: FinetuneBgeConfig, similarity: str) -> None:
    """Raise `ValueError` unless the loss compares vectors as the encoder's users will."""
    if similarity != config.contrastive.similarity:
        raise ValueError(f"contrastive.similarity: {config.contrastive.similarity}, but the encoder's vectors are "
                         f"compared by {similarity}; set it, or encoder.similarity, to the same")


def false_negative_share(batch: PairBatch) -> float:
    """The share of a worker's (query, other document) pairs that are of one product group or one text."""
    texts = batch.document_text[batch.positive]
    same = (batch.query_group[:, None] == batch.document_group[None, :]) | (
        texts[:, None] == batch.document_text[None, :])
    queries = len(batch.positive)
    same[np.arange(queries), batch.positive] = False
    return float(same.sum() / max(1, same.size - queries))


def tokens_of(batch: PairBatch) -> int:
    """Real tokens of a batch."""
    return sum(map(len, batch.query_tokens)) + sum(map(len, batch.document_tokens))
