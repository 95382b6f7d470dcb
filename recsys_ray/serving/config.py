"""What is served, which of its stages share a process, and where the service listens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from recsys_ray.config import Config
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.ranking.rerank import RerankConfig
from recsys_ray.retrieval.retriever import RetrieverConfig
from recsys_ray.runtime import RayConfig
from recsys_ray.serving.api import Limits
from recsys_ray.serving.pictures import PicturesConfig

Origin = Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?$")]


class Scale(Config):
    """How many replicas, and what each asks of Ray; the threads of a replica are its CPUs, at least one."""

    replicas: int = Field(default=1, ge=1)
    cpus: float = Field(default=0.2, gt=0)
    gpus: float = Field(default=0.0, ge=0)              # a fraction: replicas that share a GPU


class Stage(Scale):
    """A stage in replicas of its own, or in every replica of the gateway."""

    in_gateway: bool = False

    @model_validator(mode="after")
    def _asks_for_nothing_in_the_gateway(self) -> Self:
        asked = self.model_fields_set & {"replicas", "cpus", "gpus"}
        if self.in_gateway and asked and self.model_dump(include=asked) != Stage().model_dump(include=asked):
            raise ValueError(f"in_gateway: the stage has the gateway's replicas, cpus and gpus; leave out "
                             f"{', '.join(sorted(asked))}")
        return self


class Stages(Config):
    """Where each stage runs. As it stands: a gateway, an encoder, a cross-encoder, and the shards."""

    gateway: Scale = Scale(cpus=0.1)
    encoder: Stage = Stage(cpus=0.5)
    shard: Stage = Stage()                              # each shard has as many replicas
    cross_encoder: Stage = Stage(cpus=1.0)
    ranker: Stage = Stage(in_gateway=True)              # features, LightGBM, rules
    recommender: Stage = Stage(in_gateway=True)
    pictures: Stage = Stage(cpus=0.5)                   # network and hybrid index


class Batching(Config):
    """How many requests a model computes together, and how long the first of them waits for company."""

    size: int = Field(default=16, ge=1)
    wait_ms: float = Field(default=5.0, ge=0)


class RecommendConfig(Config):
    """What `/v1/recommend` asks first."""

    artifact: Path                  # of train_recommenders or finetune_sequence
    name: str = "ease"              # which of the recommenders; a sequence model is alone in its artefact
    depth: int = Field(default=200, ge=1)       # items that are ranked
    rerank: RerankConfig | None = None          # trained on contexts of histories, as make_reranker_pairs writes them


class EventsConfig(Config):
    """Searches, shown lists and what shoppers did with them, kept for training."""

    directory: Path
    max_buffered: int = Field(default=50_000, ge=1)     # rows in memory; beyond, events are refused and counted
    flush_s: float = Field(default=10.0, gt=0)          # a file each so often, when there is something to write


class ServeConfig(Config):
    """What is served, how it is divided, and where it listens."""

    index: Path
    encoder: TextEncoderConfig | None = TextEncoderConfig()     # None: BM25 alone
    retriever: RetrieverConfig = RetrieverConfig()
    rerank: RerankConfig | None = None                          # None: the order of retrieval
    recommend: RecommendConfig | None = None                    # None: no /v1/recommend
    pictures: PicturesConfig | None = None                      # None: nothing is found by pictures
    limits: Limits = Limits()
    shards: int = Field(default=2, ge=1)                        # at most one a segment
    stages: Stages = Stages()
    encode_together: Batching = Batching()
    score_together: Batching = Batching(size=4)                 # requests of the cross-encoder, each many pairs
    deadline_ms: int = Field(default=2000, ge=1)                # of one call to a stage
    budget_ms: int | None = Field(default=None, ge=1)           # of a request that names none; None: deadline_ms alone
    events: EventsConfig | None = None                          # None: nothing is kept
    log_queries: bool = False                                   # whether the log has the shoppers' words
    image_hosts: tuple[Origin, ...] = ()                        # that the search page may show images from
    image_folder: Path | None = None                            # where relative image URLs begin; shown to everybody
    name: str = "recsys"
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65_535)
    start_timeout_s: int = Field(default=180, ge=1)
    block: bool = True          # stay until SIGINT or SIGTERM; false: leave it running on the cluster at `ray.address`
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.encoder is None and self.retriever.mode != "bm25":
            raise ValueError(f"retriever.mode {self.retriever.mode!r} needs an encoder; name one or use bm25")
        if self.retriever.asks_signals and self.encoder is not None:
            for name, option in (("sparse", "sparse"), ("multi", "multi_vector")):
                if getattr(self.retriever.fusion, f"{name}_weight") > 0 and not getattr(self.encoder, option):
                    raise ValueError(f"retriever.fusion.{name}_weight is above 0, but encoder.{option} is not set; set "
                                     "it, here and for the embeddings, or give it no weight")
        if self.retriever.depth < self.limits.max_window:
            raise ValueError(f"retriever.depth {self.retriever.depth} is smaller than limits.max_window "
                             f"{self.limits.max_window}: the last pages would be empty; raise depth")
        if self.rerank is not None and self.rerank.depth < self.limits.max_window:
            raise ValueError(f"rerank.depth {self.rerank.depth} is smaller than limits.max_window "
                             f"{self.limits.max_window}: the last pages would be empty; lower limits.max_window")
        return self
