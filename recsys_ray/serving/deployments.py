"""The stages as Ray Serve replicas. A stage may as well be an object in the gateway: the same class, asked directly.

Every replica loads in a background thread and works in threads, so no event loop ever waits for a model
or an index.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from recsys_ray.models.cross_encoder import CrossEncoder, CrossEncoderConfig
from recsys_ray.models.registry import build_cross_encoder, build_text_encoder
from recsys_ray.models.text_encoder import TextEncoder, TextEncoderConfig
from recsys_ray.models.token_signals import Encoding
from recsys_ray.ranking.features import Candidates
from recsys_ray.ranking.rerank import RerankConfig, Reranker
from recsys_ray.retrieval.filters import Filters
from recsys_ray.retrieval.retriever import RetrieverConfig
from recsys_ray.retrieval.segments import Index, open_index
from recsys_ray.serving.calls import CrossCalls, EncoderCalls, RankerCalls, RecommenderCalls, ShardCalls
from recsys_ray.serving.cascade import Cascade
from recsys_ray.serving.config import Batching, ServeConfig
from recsys_ray.serving.event_log import EventLog
from recsys_ray.serving.first_stage import FirstStage, Suggestion, open_first_stage
from recsys_ray.serving.gateway import Gateway, Recommending
from recsys_ray.serving.loading import Background, PartStatus
from recsys_ray.serving.measures import Measures, log_requests_to_stderr
from recsys_ray.serving.pictures import (
    NoPicture,
    PictureAnswer,
    PictureCalls,
    PictureQuestion,
    PicturesConfig,
    PictureSearch,
)
from recsys_ray.serving.recommender import (
    NoEncoding,
    Query,
    ShardAnswer,
    ask_cards,
    ask_rows,
    ask_shard,
    document_encoding,
    encode_each,
    query_encoding,
)
from recsys_ray.serving.reranking import CrossScores, Floats, Ints, Ordered, Row, order_with, score_each
from recsys_ray.serving.routes import create_api

log = logging.getLogger(__name__)

QUERIES_TOKENS = 256        # of the queries that are encoded together, as a rule
PICTURES_AT_ONCE = 2        # of one replica: each decoded picture takes 3 bytes a pixel
DEAD_REPLICA_RETRIES = 2    # Serve itself never repeats a request whose replica died
A = TypeVar("A")
B = TypeVar("B")
EncodeOne = Callable[[str], Awaitable[Encoding | NoEncoding]]
ScoreOne = Callable[[tuple[str, list[str]]], Awaitable[CrossScores]]
Calls = TypeVar("Calls", ShardCalls, EncoderCalls, CrossCalls, RankerCalls, RecommenderCalls, PictureCalls)


class ServeError(ValueError):
    """A service that did not come up; the message says which part and why."""


class EncoderReplica:
    """Texts -> vectors and, for queries whose retrieval weighs them, signals; several requests at a time."""

    def __init__(self, config: TextEncoderConfig, built_with: dict[str, Any], retriever: RetrieverConfig,
                 together: Batching) -> None:
        self._retriever = retriever
        self._encoder: Background[TextEncoder] = Background("encoder", lambda: _load_encoder(config, built_with))
        self._queries: EncodeOne = _batched(self._encode_queries, together)
        self._documents: EncodeOne = _batched(self._encode_documents, together)

    async def query(self, text: str) -> Encoding | NoEncoding:
        """What the shards are asked with for a query."""
        return await self._queries(text)

    async def document(self, text: str) -> Encoding | NoEncoding:
        """What the shards are asked with for products like one of this text."""
        return await self._documents(text)

    async def _encode_queries(self, texts: list[str]) -> list[Encoding | NoEncoding]:
        return await asyncio.to_thread(encode_each, partial(query_encoding, self._encoder.get(), self._retriever),
                                       texts)

    async def _encode_documents(self, texts: list[str]) -> list[Encoding | NoEncoding]:
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

    async def rows(self, row_ids: Ints) -> pa.Table:
        """What rankers read of products that are in these segments."""
        return await asyncio.to_thread(ask_rows, self._index.get(), row_ids)

    async def cards(self, row_ids: Ints, filters: Filters) -> list[Row]:
        """What is shown of those of the products that are in these segments."""
        return await asyncio.to_thread(ask_cards, self._index.get(), row_ids, filters)

    async def product(self, product_id: str) -> Row | None:
        """The product, if it is in these segments."""
        return await asyncio.to_thread(self._index.get().product, product_id)

    async def status(self) -> PartStatus:
        """Whether the segments are loaded."""
        return self._index.status()


class CrossEncoderReplica:
    """(query, texts) -> scores; the pairs of several requests are computed together, sorted by length."""

    def __init__(self, config: CrossEncoderConfig, together: Batching) -> None:
        self._model: Background[CrossEncoder] = Background("cross-encoder", lambda: _load_cross_encoder(config))
        self._scores: ScoreOne = _batched(self._score, together)

    async def score(self, query: str, texts: list[str]) -> CrossScores:
        """The scores of one query's texts."""
        return await self._scores((query, texts))

    async def _score(self, asked: list[tuple[str, list[str]]]) -> list[CrossScores]:
        return await asyncio.to_thread(score_each, self._model.get().score, asked)

    async def status(self) -> PartStatus:
        """Whether the model is loaded."""
        return self._model.status()


class RankerReplica:
    """Candidates -> their order: features, trees, rules."""

    def __init__(self, config: RerankConfig) -> None:
        self._reranker: Background[Reranker] = Background("ranker", lambda: Reranker(config))

    async def order(self, query: str, candidates: Candidates, cross: Floats | None, seen: list[str], explain: bool
                    ) -> Ordered:
        """The order of one query's candidates."""
        return await asyncio.to_thread(order_with, self._reranker.get(), query, candidates, cross, seen, explain)

    async def status(self) -> PartStatus:
        """Whether the trees are loaded."""
        return self._reranker.status()


class RecommenderReplica:
    """Histories -> items."""

    def __init__(self, artifact: str, name: str) -> None:
        self._first: Background[FirstStage] = Background("recommender",
                                                         lambda: open_first_stage(Path(artifact), name))

    async def suggest(self, history: list[str], count: int) -> Suggestion:
        """So many items for a history."""
        return await asyncio.to_thread(self._first.get().suggest, history, count)

    async def status(self) -> PartStatus:
        """Whether the recommender is loaded."""
        return self._first.status()


class PictureReplica:
    """Pictures -> products that look like them."""

    def __init__(self, config: PicturesConfig, version: str) -> None:
        self._search: Background[PictureSearch] = Background("pictures", lambda: PictureSearch(config, version))
        self._threads = ThreadPoolExecutor(PICTURES_AT_ONCE)

    async def ask(self, question: PictureQuestion) -> PictureAnswer | NoPicture:
        """The products that look most like a picture, or like a product."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._search.get().ask, question)

    async def status(self) -> PartStatus:
        """Whether the index and its network are loaded."""
        return self._search.status()


# --- the gateway ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Local:
    """A stage that every gateway has for itself, made where the gateway runs."""

    make: Callable[[], Any]


Part = DeploymentHandle[Any] | Local


class GatewayReplica:
    """HTTP in front of the other stages."""

    def __init__(self, shards: list[Part], parts: dict[str, Part], config: ServeConfig, index_version: str,
                 concerns: tuple[str, ...], key_sha256: str | None) -> None:
        """`parts` by name: encoder, recommender, search-ranker, search-cross-encoder, recommend-ranker ..."""
        self._shards, self._parts, self._config = shards, parts, config
        self._index_version, self._concerns, self._key_sha256 = index_version, concerns, key_sha256

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application of this replica, made where it runs."""
        config, parts = self._config, self._parts
        recommending = None
        if config.recommend is not None:
            recommending = Recommending(calls(RecommenderCalls, parts["recommender"]), config.recommend.depth,
                                        self._cascade(config.recommend.rerank, "recommend"))
        events = None if config.events is None else EventLog(config.events)
        gateway = Gateway([calls(ShardCalls, shard) for shard in self._shards],
                          None if config.encoder is None else calls(EncoderCalls, parts["encoder"]),
                          config=config.retriever, index_version=self._index_version, concerns=self._concerns,
                          deadline_s=config.deadline_ms / 1000, budget_ms=config.budget_ms, recommending=recommending,
                          cascade=self._cascade(config.rerank, "search"), events=events,
                          pictures=calls(PictureCalls, parts["pictures"]) if config.pictures else None)
        log_requests_to_stderr()
        return create_api(gateway, config.limits, self._key_sha256, observe=Measures(events),
                          log_queries=config.log_queries, image_hosts=config.image_hosts,
                          image_folder=config.image_folder)

    def _cascade(self, config: RerankConfig | None, name: str) -> Cascade | None:
        if config is None:
            return None
        cross = None if config.cross_encoder is None else calls(CrossCalls, self._parts[f"{name}-cross-encoder"])
        return Cascade(config, cross, calls(RankerCalls, self._parts[f"{name}-ranker"]),
                       self._config.deadline_ms / 1000)


def calls(kind: type[Calls], part: Part) -> Calls:
    """The calls of a stage, whether it is a deployment or lives here."""
    names = list(kind.__dataclass_fields__)
    if isinstance(part, Local):
        replica = part.make()
        return kind(*(getattr(replica, name) for name in names))
    return kind(*(partial(_call, part, name) for name in names))


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


def _batched(compute: Callable[[list[A]], Awaitable[list[B]]], together: Batching) -> Callable[[A], Awaitable[B]]:
    """`compute` for single requests, those that come together computed together; a queue for each replica."""
    async def batch(asked: list[A]) -> list[B]:
        return await compute(asked)

    batch.__name__ = compute.__name__       # what Serve's own metrics call it
    found: Callable[[A], Awaitable[B]] = serve.batch(
        max_batch_size=together.size, batch_wait_timeout_s=together.wait_ms / 1000)(batch)
    return found


def _load_encoder(config: TextEncoderConfig, built_with: dict[str, Any]) -> TextEncoder:
    encoder = build_text_encoder(config)
    refuse_foreign(config.model, encoder.identity, built_with)  # this node's files may differ from the builder's
    encoder.warm_up(QUERIES_TOKENS)
    return encoder


def _load_cross_encoder(config: CrossEncoderConfig) -> CrossEncoder:
    model = build_cross_encoder(config)
    model.warm_up()
    return model


def refuse_foreign(model: str, ours: dict[str, Any], built_with: dict[str, Any]) -> None:
    """Raise `ServeError` unless the encoder's vectors live in the space that the index was built in."""
    different = sorted(key for key in {*ours, *built_with} if ours.get(key) != built_with.get(key))
    if different:
        raise ServeError(f"the index was built with another encoder than {model!r}: " + "; ".join(
            f"{key} is {built_with.get(key)!r} there and {ours.get(key)!r} here" for key in different))
