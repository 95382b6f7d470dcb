"""The service on Ray Serve: gateway (HTTP) -> encoder -> index shards -> cross-encoder -> ranker, or recommender.

A shard is some of the index's segments. Which stages are deployments and which live in the gateway is
`ServeConfig.stages`. All parts serve the one index version that was current when the application was built.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import httpx
from ray import serve
from ray.serve.config import HTTPOptions

from recsys_ray.artifacts import Manifest, open_artifact
from recsys_ray.config import ConfigError
from recsys_ray.models.text_encoder import encoder_identity
from recsys_ray.ranking.rerank import RerankConfig, check_concern_model
from recsys_ray.retrieval.hybrid_index import KIND as HYBRID_INDEX
from recsys_ray.retrieval.hybrid_search import refuse_another
from recsys_ray.retrieval.segments import indexed_concerns
from recsys_ray.runtime import connected
from recsys_ray.serving.config import Scale, ServeConfig, Stage
from recsys_ray.serving.deployments import (
    CrossEncoderReplica,
    EncoderReplica,
    GatewayReplica,
    Local,
    PictureReplica,
    RankerReplica,
    RecommenderReplica,
    ServeError,
    ShardReplica,
    refuse_foreign,
)
from recsys_ray.serving.limits import api_key_digest
from recsys_ray.serving.pictures import PicturesConfig

log = logging.getLogger(__name__)


def build_app(config: ServeConfig | dict[str, Any]) -> serve.Application:
    """The application for `serve.run`, `serve deploy` and RayService (where `config` is the `args` mapping).

    Errors: `ArtifactError` for a missing or damaged index, `ServeError` when the configured encoder is
    not the one that the index was built with, `IndexMismatch` when the trees read concerns by another model than the
    index has, `ConfigError` for an open host without an API key.
    """
    config = ServeConfig.model_validate(config)
    key_sha256 = api_key_digest(config.host)
    root = config.index.resolve()
    manifest = open_artifact(root, "index").manifest
    built_with = manifest.facts["encoder"]
    if config.encoder is not None:
        refuse_foreign(config.encoder.model, encoder_identity(config.encoder), built_with)
    stages, room = config.stages, config.limits.max_in_flight
    parts: dict[str, Any] = {}
    if config.encoder is not None:
        parts["encoder"] = _part(stages.encoder, "encoder", room, EncoderReplica, config.encoder, built_with,
                                 config.retriever, config.encode_together)
    for rerank in (config.rerank, None if config.recommend is None else config.recommend.rerank):
        if rerank is not None and rerank.gbdt is not None:
            facts = open_artifact(rerank.gbdt.resolve(), "gbdt").manifest.facts
            check_concern_model(facts.get("concern_model"), manifest)
    parts |= _ranking(config, config.rerank, "search")
    if config.recommend is not None:
        parts["recommender"] = _part(stages.recommender, "recommender", room, RecommenderReplica,
                                     str(config.recommend.artifact.resolve()), config.recommend.name)
        parts |= _ranking(config, config.recommend.rerank, "recommend")
    if config.pictures is not None:
        parts["pictures"] = _part(stages.pictures, "pictures", room, PictureReplica,
                                  *_pictures(config.pictures, built_with))
    if config.events is not None:
        config = config.replace(events=config.events.replace(directory=config.events.directory.resolve()))
    if config.image_folder is not None:
        if not config.image_folder.is_dir():
            raise ServeError(f"image_folder: {config.image_folder} is no folder")
        config = config.replace(image_folder=config.image_folder.resolve())
    shards = [_part(stages.shard, f"shard-{number}", room, ShardReplica, number, str(root), manifest.version, segments)
              for number, segments in enumerate(divide(segment_rows(manifest), config.shards))]
    gateway = _deployment(serve.ingress()(GatewayReplica), "gateway", stages.gateway, room)
    return gateway.bind(shards, parts, config, manifest.version, indexed_concerns(manifest), key_sha256)


def _pictures(config: PicturesConfig, text_encoder: dict[str, Any]) -> tuple[PicturesConfig, str]:
    """The stage with absolute paths, and the version of its index; it must hold vectors of the same text encoder."""
    manifest = open_artifact(config.index, HYBRID_INDEX).manifest
    refuse_another("text", text_encoder, manifest.facts["encoders"])
    return config.resolved(), manifest.version


def _ranking(config: ServeConfig, rerank: RerankConfig | None, name: str) -> dict[str, Any]:
    """The stages that rank what a search, or a recommender, found."""
    if rerank is None:
        return {}
    rerank, room = rerank.resolved(), config.limits.max_in_flight
    parts = {f"{name}-ranker": _part(config.stages.ranker, f"{name}-ranker", room, RankerReplica, rerank)}
    if rerank.cross_encoder is not None:
        parts[f"{name}-cross-encoder"] = _part(config.stages.cross_encoder, f"{name}-cross-encoder", room,
                                               CrossEncoderReplica, rerank.cross_encoder, config.score_together)
    return parts


def _part(stage: Stage, name: str, room: int, cls: Callable[..., Any], *arguments: Any) -> Any:
    """A stage as the gateway is given it: a deployment, or how to make it in the gateway."""
    if stage.in_gateway:
        return Local(partial(cls, *arguments))
    return _deployment(cls, name, stage, room).bind(*arguments)


def _deployment(cls: Callable[..., Any], name: str, scale: Scale, room: int) -> serve.Deployment:
    # Twice the requests that a gateway lets in: a health check finds room, and what is more is refused, not queued.
    # max_surge_percent: with few replicas, a new version comes up before the old one goes.
    decorate = serve.deployment(name=name, num_replicas=scale.replicas, max_ongoing_requests=2 * room,
                                max_queued_requests=2 * room, max_surge_percent=100, graceful_shutdown_timeout_s=5,
                                graceful_shutdown_wait_loop_s=0.2,
                                ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus})
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
