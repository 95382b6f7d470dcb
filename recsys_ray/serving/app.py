"""The service as Ray Serve deployments: gateway (HTTP) -> encoder (batched) and one deployment per index shard.

A shard is some of the index's segments. Every replica loads in a background thread and works in
threads, so no event loop ever waits for a model or an index. All parts serve the one index version
that was current when the application was built.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Self

import httpx
from fastapi import FastAPI
from pydantic import Field, model_validator
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import HTTPOptions
from ray.serve.handle import DeploymentHandle

from recsys_ray.artifacts import Manifest, open_artifact
from recsys_ray.config import Config, ConfigError
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoder, TextEncoderConfig, encoder_identity
from recsys_ray.models.token_signals import Encoding
from recsys_ray.retrieval.retriever import RetrieverConfig
from recsys_ray.retrieval.segments import Index, open_index
from recsys_ray.runtime import RayConfig, connected
from recsys_ray.serving.api import Limits
from recsys_ray.serving.gateway import EncoderCalls, Gateway, ShardCalls
from recsys_ray.serving.limits import api_key_digest
from recsys_ray.serving.loading import Background, PartStatus
from recsys_ray.serving.recommender import (
    NoEncoding,
    Query,
    Row,
    ShardAnswer,
    ask_shard,
    document_encoding,
    encode_each,
    query_encoding,
)
from recsys_ray.serving.routes import create_api

log = logging.getLogger(__name__)

DEAD_REPLICA_RETRIES = 2    # Serve itself never repeats a request whose replica died


class ServeConfig(Config):
    """What is served, how it is divided, and where it listens."""

    index: Path
    encoder: TextEncoderConfig | None = TextEncoderConfig()     # None: BM25 alone
    retriever: RetrieverConfig = RetrieverConfig()
    limits: Limits = Limits()
    shards: int = Field(default=2, ge=1)                        # at most one a segment
    gateway_replicas: int = Field(default=1, ge=1)
    shard_replicas: int = Field(default=1, ge=1)
    encoder_replicas: int = Field(default=1, ge=1)
    gateway_cpus: float = Field(default=0.1, gt=0)
    shard_cpus: float = Field(default=0.2, gt=0)
    encoder_cpus: float = Field(default=0.5, gt=0)
    encoder_gpus: float = Field(default=0.0, ge=0)
    batch_size: int = Field(default=16, ge=1)                   # queries encoded together
    batch_wait_ms: float = Field(default=5.0, ge=0)             # how long the first of them waits for company
    deadline_ms: int = Field(default=2000, ge=1)                # of one round to the shards, or to the encoder
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
        return self


class ServeError(ValueError):
    """A service that did not come up; the message says which part and why."""


class EncoderReplica:
    """Texts -> vectors and, for queries whose retrieval weighs them, signals; several requests at a time."""

    def __init__(self, config: TextEncoderConfig, built_with: dict[str, Any], retriever: RetrieverConfig,
                 batch_size: int, batch_wait_ms: float) -> None:
        self._retriever = retriever
        self._encoder: Background[TextEncoder] = Background("encoder", lambda: _load_encoder(config, built_with))
        batched: Any
        for batched in (self.query, self.document):  # the decorator gives them these methods
            batched.set_max_batch_size(batch_size)
            batched.set_batch_wait_timeout_s(batch_wait_ms / 1000)

    @serve.batch
    async def query(self, texts: list[str]) -> list[Encoding | NoEncoding]:
        """What the shards are asked with for a query."""
        return await asyncio.to_thread(encode_each, partial(query_encoding, self._encoder.get(), self._retriever),
                                       texts)

    @serve.batch
    async def document(self, texts: list[str]) -> list[Encoding | NoEncoding]:
        """What the shards are asked with for products like one of this text."""
        return await asyncio.to_thread(encode_each, partial(document_encoding, self._encoder.get()), texts)

    async def status(self) -> PartStatus:
        """Whether the model is loaded."""
        return self._encoder.status()


class ShardReplica:
    """Some segments of one version of the index."""

    def __init__(self, number: int, root: str, version: str, segments: list[str]) -> None:
        self._index: Background[Index] = Background(
            f"shard {number}", lambda: open_index(root, version=version, segments=segments))

    async def search(self, query: Query, encoding: Encoding | None) -> ShardAnswer:
        """The best candidates of these segments."""
        return await asyncio.to_thread(ask_shard, self._index.get(), query, encoding)

    async def product(self, product_id: str) -> Row | None:
        """The product, if it is in these segments."""
        return await asyncio.to_thread(self._index.get().product, product_id)

    async def status(self) -> PartStatus:
        """Whether the segments are loaded."""
        return self._index.status()


class GatewayReplica:
    """HTTP in front of the other deployments."""

    def __init__(self, shards: list[DeploymentHandle[Any]], encoder: DeploymentHandle[Any] | None, config: ServeConfig,
                 index_version: str, key_sha256: str | None) -> None:
        self._shards, self._encoder, self._config = shards, encoder, config
        self._index_version, self._key_sha256 = index_version, key_sha256

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application of this replica, made where it runs."""
        shards = [ShardCalls(*(partial(_call, handle, name) for name in ("search", "product", "status")))
                  for handle in self._shards]
        encoder = None if self._encoder is None else EncoderCalls(
            *(partial(_call, self._encoder, name) for name in ("query", "document", "status")))
        gateway = Gateway(shards, encoder, config=self._config.retriever, index_version=self._index_version,
                          deadline_s=self._config.deadline_ms / 1000)
        return create_api(gateway, self._config.limits, self._key_sha256)


def _load_encoder(config: TextEncoderConfig, built_with: dict[str, Any]) -> TextEncoder:
    encoder = build_text_encoder(config)
    refuse_foreign(config.model, encoder.identity, built_with)  # this node's files may differ from the builder's
    return encoder


def refuse_foreign(model: str, ours: dict[str, Any], built_with: dict[str, Any]) -> None:
    """Raise `ServeError` unless the encoder's vectors live in the space that the index was built in."""
    different = sorted(key for key in {*ours, *built_with} if ours.get(key) != built_with.get(key))
    if different:
        raise ServeError(f"the index was built with another encoder than {model!r}: " + "; ".join(
            f"{key} is {built_with.get(key)!r} there and {ours.get(key)!r} here" for key in different))


async def _call(handle: DeploymentHandle[Any], method: str, *arguments: Any) -> Any:
    """The answer of a replica; asked again when it died meanwhile, since every call only reads."""
    for attempt in range(DEAD_REPLICA_RETRIES + 1):
        try:
            return await getattr(handle, method).remote(*arguments)
        except RayActorError:
            if attempt == DEAD_REPLICA_RETRIES:
                raise
            log.warning("a replica died while answering %s; asking another", method)
    raise AssertionError("unreachable")


def build_app(config: ServeConfig | dict[str, Any]) -> serve.Application:
    """The application for `serve.run`, `serve deploy` and RayService (where `config` is the `args` mapping).

    Errors: `ArtifactError` for a missing or damaged index, `ServeError` when the configured encoder is
    not the one that the index was built with, `ConfigError` for an open host without an API key.
    """
    config = ServeConfig.model_validate(config)
    key_sha256 = api_key_digest(config.host)
    root = config.index.resolve()
    manifest = open_artifact(root, "index").manifest
    built_with = manifest.facts["encoder"]
    if config.encoder is not None:
        refuse_foreign(config.encoder.model, encoder_identity(config.encoder), built_with)
    parts = divide(segment_rows(manifest), config.shards)
    shards = [_deployment(ShardReplica, f"shard-{number}", config.shard_replicas, config.shard_cpus).bind(
        number, str(root), manifest.version, segments) for number, segments in enumerate(parts)]
    encoder = None if config.encoder is None else _deployment(
        EncoderReplica, "encoder", config.encoder_replicas, config.encoder_cpus, config.encoder_gpus,
        max_ongoing_requests=4 * config.batch_size).bind(config.encoder, built_with, config.retriever,
                                                         config.batch_size, config.batch_wait_ms)
    gateway = _deployment(serve.ingress()(GatewayReplica), "gateway", config.gateway_replicas, config.gateway_cpus)
    return gateway.bind(shards, encoder, config, manifest.version, key_sha256)


def _deployment(cls: Callable[..., Any], name: str, replicas: int, cpus: float, gpus: float = 0.0,
                max_ongoing_requests: int = 64) -> serve.Deployment:
    # max_surge_percent: with few replicas, a new version comes up before the old one goes.
    decorate = serve.deployment(name=name, num_replicas=replicas, max_ongoing_requests=max_ongoing_requests,
                                max_surge_percent=100, graceful_shutdown_timeout_s=5, graceful_shutdown_wait_loop_s=0.2,
                                ray_actor_options={"num_cpus": cpus, "num_gpus": gpus})
    return decorate(cls)


def segment_rows(manifest: Manifest) -> dict[str, int]:
    """The rows of each segment of an index, by name."""
    names = (entry.path.split("/") for entry in manifest.files)
    return {parts[1]: manifest.rows(f"segments/{parts[1]}/rows.parquet")
            for parts in names if len(parts) == 3 and parts[0] == "segments"}


def divide(rows: dict[str, int], shards: int) -> list[list[str]]:
    """The segments of each of at most `shards` shards, as even in rows as largest-first placing gets them."""
    parts: list[list[str]] = [[] for _ in range(max(1, min(shards, len(rows))))]
    sizes = [0] * len(parts)
    for name in sorted(rows, key=lambda name: (-rows[name], name)):
        smallest = sizes.index(min(sizes))
        parts[smallest].append(name)
        sizes[smallest] += rows[name]
    return [sorted(part) for part in parts]


@contextmanager
def serving(config: ServeConfig) -> Iterator[str]:
    """The base URL of the service, ready to answer; it ends with the block. Needs a connected Ray.

    Errors: those of `build_app`; `ServeError` when the port is taken or a part cannot load.
    """
    app = build_app(config)
    started_here = not serve.status().proxies
    if started_here:
        _check_port(config.host, config.port)
    try:
        yield _deploy(app, config)
    finally:
        serve.delete(config.name)
        if started_here:
            serve.shutdown()  # type: ignore[no-untyped-call]


def _deploy(app: serve.Application, config: ServeConfig) -> str:
    serve.start(proxy_location="EveryNode", http_options=HTTPOptions(
        host=config.host, port=config.port, request_timeout_s=10 + 4 * config.deadline_ms / 1000))
    serve.run(app, name=config.name, route_prefix="/")
    url = base_url(config.host, config.port)
    _wait_until_ready(url, config.start_timeout_s)
    log.info("ready: %s/docs", url)
    return url


def base_url(host: str, port: int) -> str:
    """Where this machine reaches a service that listens on `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from None


def _wait_until_ready(url: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    state = "no answer"
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{url}/readyz", timeout=10)
        except httpx.HTTPError as error:
            state = type(error).__name__
        else:
            if answer.status_code == 200:
                return
            state = "; ".join(_problems(answer))
            if state and not all(part.endswith((": loading", "does not answer")) for part in _problems(answer)):
                raise ServeError(f"{url} cannot become ready: {state}")
        time.sleep(0.2)
    raise ServeError(f"{url} was not ready after {timeout_s:g} s: {state}")


def _problems(answer: httpx.Response) -> list[str]:
    try:
        return [str(problem) for problem in answer.json()["problems"]]
    except (ValueError, KeyError, TypeError):
        return []


def run(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM; with `block: false`, deploy to a running cluster and leave it there."""
    if not config.block and not (config.ray.address or os.environ.get("RAY_ADDRESS")):
        raise ConfigError("block: false leaves the service on a running cluster: set ray.address or RAY_ADDRESS")
    with connected(config.ray):
        if not config.block:
            _deploy(build_app(config), config)
            return
        with until_stopped(), serving(config):
            threading.Event().wait()


@contextmanager
def until_stopped() -> Iterator[None]:
    """A block that SIGINT or SIGTERM ends without an error, whatever it is doing; its cleaning up is still done."""
    def stop(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)   # a second one must not disturb the cleaning up
        log.info("stopping")
        raise KeyboardInterrupt                         # the one exception that Ray's native calls pass on

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        log.info("stopped")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
