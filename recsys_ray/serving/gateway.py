"""One request over all shards: encode once, ask every shard, wait until the deadline, put together.

Knows nothing of Ray or HTTP: a shard and the encoder are async calls, so the same code runs over
deployments and over an index in the same process.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from recsys_ray.models.token_signals import Encoding
from recsys_ray.retrieval.retriever import RetrieverConfig
from recsys_ray.serving.api import (
    ProductResponse,
    ReadyResponse,
    SearchRequest,
    SearchResponse,
    SimilarResponse,
)
from recsys_ray.serving.errors import ApiError
from recsys_ray.serving.loading import PartStatus
from recsys_ray.serving.recommender import (
    NoEncoding,
    Query,
    Row,
    ShardAnswer,
    page,
    rank,
    search_query,
    similar_hits,
    similar_query,
    to_product,
)

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class ShardCalls:
    """What a shard can be asked; each call may be repeated without harm."""

    search: Callable[[Query, Encoding | None], Awaitable[ShardAnswer]]
    product: Callable[[str], Awaitable[Row | None]]
    status: Callable[[], Awaitable[PartStatus]]


@dataclass(frozen=True)
class EncoderCalls:
    """What the encoder can be asked; a text that cannot be encoded comes back as `NoEncoding`."""

    query: Callable[[str], Awaitable[Encoding | NoEncoding]]
    document: Callable[[str], Awaitable[Encoding | NoEncoding]]
    status: Callable[[], Awaitable[PartStatus]]


@dataclass
class Stages:
    """Milliseconds per stage of one request."""

    last: float = field(default_factory=time.perf_counter)
    took_ms: dict[str, float] = field(default_factory=dict)

    def done(self, name: str) -> None:
        """The stage `name` ends here and the next one begins."""
        now = time.perf_counter()
        self.took_ms[name] = round((now - self.last) * 1000, 3)
        self.last = now


class Gateway:
    """The service: every public method answers one kind of request or raises `ApiError`."""

    def __init__(self, shards: Sequence[ShardCalls], encoder: EncoderCalls | None, *, config: RetrieverConfig,
                 index_version: str, deadline_s: float) -> None:
        if not shards:
            raise ValueError("a gateway needs at least one shard")
        self.shards, self.encoder, self.config = shards, encoder, config
        self.index_version, self.deadline_s = index_version, deadline_s

    async def search(self, request: SearchRequest, request_id: str) -> SearchResponse:
        """One page of answers to a query."""
        stages = Stages()
        query = search_query(request, self.config)
        encoding = await self._encoding(query.text, document=False) if self.encoder is not None else None
        stages.done("encode")
        answers = await self._ask_all(lambda shard: shard.search(query, encoding))
        stages.done("shards")
        found = page(rank(answers, query), request)
        stages.done("rank")
        return SearchResponse(**self._made(request_id, len(answers), stages), **found)

    async def product(self, product_id: str, request_id: str) -> ProductResponse:
        """One product."""
        stages = Stages()
        row, answered = await self._find(product_id)
        stages.done("shards")
        return ProductResponse(**self._made(request_id, answered, stages), product=to_product(row))

    async def similar(self, product_id: str, k: int, request_id: str) -> SimilarResponse:
        """The `k` products nearest to a product, itself left out."""
        stages = Stages()
        row, _ = await self._find(product_id)
        stages.done("product")
        query = similar_query(row, k, self.config, dense=self.encoder is not None)
        encoding = await self._encoding(query.text, document=True) if self.encoder is not None else None
        stages.done("encode")
        answers = await self._ask_all(lambda shard: shard.search(query, encoding))
        stages.done("shards")
        items = similar_hits(rank(answers, query), product_id, k)
        stages.done("rank")
        return SimilarResponse(**self._made(request_id, len(answers), stages), product_id=product_id, items=items)

    async def readiness(self) -> ReadyResponse:
        """Which parts have loaded what they serve."""
        calls = [shard.status for shard in self.shards] + ([self.encoder.status] if self.encoder else [])
        parts = [part if isinstance(part, PartStatus) else PartStatus(False, "does not answer")
                 for part in await _within(self.deadline_s, [call() for call in calls])]
        shards = parts[: len(self.shards)]
        names = [f"shard {number}" for number in range(len(shards))] + ["encoder"]
        problems = [f"{name}: {part.problem or 'loading'}"
                    for name, part in zip(names, parts, strict=False) if not part.ready]
        return ReadyResponse(ready=not problems, index_version=self.index_version, problems=problems,
                             shards_ready=sum(part.ready for part in shards), shards_total=len(shards),
                             encoder_ready=all(part.ready for part in parts[len(shards):]))

    async def _encoding(self, text: str, document: bool) -> Encoding:
        assert self.encoder is not None
        call = self.encoder.document if document else self.encoder.query
        encoding = (await _within(self.deadline_s, [call(text)]))[0]
        if isinstance(encoding, NoEncoding) and encoding.bad_text:
            raise ApiError(422, "unencodable", "the text cannot be encoded", "query")
        if isinstance(encoding, NoEncoding | BaseException):
            log.warning("no encoding: %r", encoding)
            raise ApiError(503, "encoder_unavailable", "the text encoder did not answer")
        return encoding

    async def _find(self, product_id: str) -> tuple[Row, int]:
        answers = await self._ask_all(lambda shard: shard.product(product_id))
        row = next((row for row in answers if row is not None), None)
        if row is not None:
            return row, len(answers)
        if len(answers) < len(self.shards):
            raise ApiError(503, "shards_unavailable", "not every shard answered in time, and no other has the product")
        raise ApiError(404, "not_found", "no such product", "product_id")

    async def _ask_all(self, call: Callable[[ShardCalls], Awaitable[T]]) -> list[T]:
        """The answers that came in time, in the order of the shards; `ApiError` 503 when none did."""
        outcomes = await _within(self.deadline_s, [call(shard) for shard in self.shards])
        answers: list[T] = []
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, _LateError):
                log.warning("shard %d did not answer within %.3f s", number, self.deadline_s)
            elif isinstance(outcome, BaseException):
                log.warning("shard %d failed: %s: %s", number, type(outcome).__name__, outcome)
            else:
                answers.append(outcome)
        if not answers:
            raise ApiError(503, "shards_unavailable", "no shard of the index answered in time")
        return answers

    def _made(self, request_id: str, answered: int, stages: Stages) -> dict[str, Any]:
        """The fields of `Answer`."""
        return {"request_id": request_id, "index_version": self.index_version, "shards_answered": answered,
                "shards_total": len(self.shards), "took_ms": stages.took_ms}


class _LateError(Exception):
    """In the place of an answer that did not come in time."""


async def _within(seconds: float, calls: Sequence[Awaitable[T]]) -> list[T | BaseException]:
    """The result, the exception, or `_LateError`, of each call; those still running at the deadline are cancelled."""
    tasks = [asyncio.ensure_future(_awaited(call)) for call in calls]
    try:
        await asyncio.wait(tasks, timeout=seconds)
    finally:
        late = [task for task in tasks if not task.done()]
        for task in late:
            task.cancel()
    outcomes: list[T | BaseException] = []
    for task in tasks:
        if task in late or task.cancelled():
            outcomes.append(_LateError())
        else:
            error = task.exception()
            outcomes.append(error if error is not None else task.result())
    return outcomes


async def _awaited(call: Awaitable[T]) -> T:
    return await call
