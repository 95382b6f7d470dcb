"""The stages one after another, below one directory: source -> prepared -> vectors -> index -> candidates.

`FlowConfig` nests the configuration of every stage and fills in where each reads and writes, so that a
whole flow is one short YAML. Every stage reuses what it finished before, so a second run is quick and a
killed run continues.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from recsys_ray.artifacts import Artifact
from recsys_ray.config import Config
from recsys_ray.data.demo_shop import DemoShopConfig, make_demo_shop
from recsys_ray.data.pipeline import PrepareConfig, prepare
from recsys_ray.retrieval.batch import RetrieveConfig, retrieve_candidates
from recsys_ray.retrieval.embed import EmbedConfig, embed_products
from recsys_ray.retrieval.index_build import BuildIndexConfig, build_index
from recsys_ray.retrieval.query_sets import QuerySource
from recsys_ray.retrieval.retriever import RetrieverConfig
from recsys_ray.runtime import RayConfig, connected

log = logging.getLogger(__name__)


class FlowConfig(Config):
    """Every stage of one shop; paths that are not given lie below `work_dir`."""

    work_dir: Path
    shop: DemoShopConfig | None = None              # generate the demo shop first
    prepare: PrepareConfig
    embed: EmbedConfig
    index: BuildIndexConfig
    systems: dict[str, RetrieverConfig] = Field(default_factory=dict)   # the retrievers to compare
    queries: dict[str, QuerySource] = Field(default_factory=dict)       # the query sets they answer
    top_k: int = Field(default=100, ge=1)
    ray: RayConfig = RayConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_paths(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "work_dir" not in values:
            return values
        work = Path(values["work_dir"])
        prepared, embeddings = work / "prepared", work / "embeddings"
        defaults: dict[str, dict[str, Any]] = {
            "prepare": {"output": prepared},
            "embed": {"prepared": prepared, "output": embeddings},
            "index": {"prepared": prepared, "embeddings": embeddings, "output": work / "index"},
        }
        if values.get("shop") is not None:
            defaults["shop"] = {"output": work / "shop"}
        filled = {name: {**paths, **_as_mapping(values.get(name))} for name, paths in defaults.items()}
        return {**values, **filled}

    def retrievals(self) -> dict[tuple[str, str], RetrieveConfig]:
        """The retrieval of every system for every query set, by (system, query set)."""
        return {
            (system, name): RetrieveConfig(
                index=self.index.output, output=self.work_dir / "candidates" / f"{system}-{name}",
                encoder=self.embed.encoder, retriever=retriever, queries=queries, top_k=self.top_k, ray=self.ray)
            for name, queries in self.queries.items() for system, retriever in self.systems.items()}


def _as_mapping(value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    return value.model_dump() if isinstance(value, Config) else value


def run_flow(config: FlowConfig) -> dict[tuple[str, str], Artifact]:
    """Run every stage that is not finished; returns the candidates by (system, query set)."""
    with connected(config.ray):
        ensure_index(config)
        retrievals = config.retrievals()
        with stage_clock(f"retrieve candidates ({len(retrievals)} lists)"):
            return {key: retrieve_candidates(retrieval) for key, retrieval in retrievals.items()}


def ensure_index(config: FlowConfig) -> Artifact:
    """The index of the flow, after every stage before it."""
    with connected(config.ray):
        if config.shop is not None:
            with stage_clock("demo shop"):
                make_demo_shop(config.shop)
        with stage_clock("prepare"):
            prepare(config.prepare)
        with stage_clock("embed"):
            embed_products(config.embed)
        with stage_clock("build index"):
            return build_index(config.index)


def ensure_candidates(config: FlowConfig) -> dict[str, Artifact]:
    """The candidates of every system for the one query set of the flow, by system."""
    if len(config.queries) != 1:
        raise ValueError(f"flow.queries: {len(config.queries)} query sets where one is needed; "
                         f"found: {', '.join(config.queries) or 'none'}")
    return {system: candidates for (system, _), candidates in run_flow(config).items()}


@contextmanager
def stage_clock(name: str) -> Iterator[None]:
    """Log when a stage begins and how long it took."""
    log.info("%s ...", name)
    started = time.monotonic()
    yield
    log.info("%s: %.1f s", name, time.monotonic() - started)
