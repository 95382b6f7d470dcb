"""What the gateway can ask of each stage, as async calls: of deployments, or of objects in its own process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pyarrow as pa

from recsys_ray.models.token_signals import Encoding
from recsys_ray.ranking.features import Candidates
from recsys_ray.retrieval.filters import Filters
from recsys_ray.serving.first_stage import Suggestion
from recsys_ray.serving.loading import PartStatus
from recsys_ray.serving.recommender import NoEncoding, Query, ShardAnswer
from recsys_ray.serving.reranking import CrossScores, Floats, Ints, Ordered, Row

T = TypeVar("T")


@dataclass(frozen=True)
class ShardCalls:
    """What a shard can be asked; each call may be repeated without harm."""

    search: Callable[[Query, Encoding | None], Awaitable[ShardAnswer]]
    rows: Callable[[Ints], Awaitable[pa.Table]]                             # for the rankers: products it lately named
    cards: Callable[[Ints, Filters], Awaitable[list[Row]]]                  # of those products that it has
    product: Callable[[str], Awaitable[Row | None]]
    status: Callable[[], Awaitable[PartStatus]]


@dataclass(frozen=True)
class EncoderCalls:
    """What the encoder can be asked; a text that cannot be encoded comes back as `NoEncoding`."""

    query: Callable[[str], Awaitable[Encoding | NoEncoding]]
    document: Callable[[str], Awaitable[Encoding | NoEncoding]]
    status: Callable[[], Awaitable[PartStatus]]


@dataclass(frozen=True)
class CrossCalls:
    """What the cross-encoder can be asked; a query that cannot be scored comes back without scores."""

    score: Callable[[str, list[str]], Awaitable[CrossScores]]
    status: Callable[[], Awaitable[PartStatus]]


@dataclass(frozen=True)
class RankerCalls:
    """What the ranker can be asked: an order of candidates, explained when the last argument says so."""

    order: Callable[[str, Candidates, Floats | None, list[str], bool], Awaitable[Ordered]]
    status: Callable[[], Awaitable[PartStatus]]


@dataclass(frozen=True)
class RecommenderCalls:
    """What the recommender can be asked: so many items for a history."""

    suggest: Callable[[list[str], int], Awaitable[Suggestion]]
    status: Callable[[], Awaitable[PartStatus]]


@dataclass
class Clock:
    """Milliseconds per stage of one request, and what is left of its budget."""

    budget_s: float | None = None
    begun: float = field(default_factory=time.perf_counter)
    took_ms: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._last = self.begun

    def done(self, name: str) -> None:
        """The stage `name` ends here and the next one begins; a stage that comes twice adds up."""
        now = time.perf_counter()
        self.took_ms[name] = round(self.took_ms.get(name, 0.0) + (now - self._last) * 1000, 3)
        self._last = now

    def left(self) -> float:
        """Seconds until the budget is spent; infinite without one."""
        return float("inf") if self.budget_s is None else self.begun + self.budget_s - time.perf_counter()


class LateError(Exception):
    """In the place of an answer that did not come in time."""


async def within(seconds: float, calls: Sequence[Awaitable[T]]) -> list[T | BaseException]:
    """The result, the exception, or `LateError`, of each call; those still running at the deadline are cancelled."""
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
            outcomes.append(LateError())
        else:
            error = task.exception()
            outcomes.append(error if error is not None else task.result())
    return outcomes


async def _awaited(call: Awaitable[T]) -> T:
    return await call
