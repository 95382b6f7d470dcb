"""A shortlist through the cross-encoder and the ranker, within a request's budget and never with an error.

A stage that is late or fails is left out, and the answer says so. The cross-encoder is not even asked when what it
took lately does not fit into what is left; trees know how to do without it, and without trees the order is that
of retrieval, under the same rules.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from recsys_ray.ranking.rerank import RerankConfig, Reranker, spread
from recsys_ray.serving.answers import Stage
from recsys_ray.serving.calls import Clock, CrossCalls, LateError, RankerCalls, within
from recsys_ray.serving.loading import PartStatus
from recsys_ray.serving.reranking import CrossScores, Floats, Ordered, Shortlist, cross_texts, order_with

log = logging.getLogger(__name__)

CROSS: Stage = "cross_encoder"
RANKER: Stage = "ranker"
NEWER = 0.2         # weight of the latest measurement
LATE_TIMES = 2.0    # one that was given up is taken for so many times what was waited
TRY_AGAIN_S = 1.0   # what seems too slow is measured again each so often


class RecentCost:
    """What a stage took lately, in seconds: whether asking it is worth while."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._measured = -float("inf")

    def fits(self, left: float) -> bool:
        """Whether it can be expected in time; now and then it is tried in any case, since it may have recovered."""
        return left > 0 and (self.seconds <= left or time.monotonic() - self._measured > TRY_AGAIN_S)

    def add(self, seconds: float, late: bool = False) -> None:
        """It took so long; or, `late`, it was given up after so long."""
        if late:
            self.seconds = max(self.seconds, LATE_TIMES * seconds)
        else:
            self.seconds = seconds if not self.seconds else (1 - NEWER) * self.seconds + NEWER * seconds
        self._measured = time.monotonic()


@dataclass(frozen=True)
class Outcome:
    """An order, None for that of the first stage, and the stage that it had to do without."""

    ordered: Ordered | None
    degraded: Stage | None = None


class Cascade:
    """The rankers of a service."""

    def __init__(self, config: RerankConfig, cross: CrossCalls | None, ranker: RankerCalls, deadline_s: float) -> None:
        self.config, self.cross, self.ranker, self.deadline_s = config, cross, ranker, deadline_s
        self.cross_cost, self.ranker_cost = RecentCost(), RecentCost()
        self._rules = Reranker(config.rules())

    def parts(self) -> list[tuple[str, Callable[[], Awaitable[PartStatus]]]]:
        """What has to be loaded, by name."""
        cross = [] if self.cross is None else [("cross-encoder", self.cross.status)]
        return [*cross, ("ranker", self.ranker.status)]

    async def order(self, query: str | None, shortlist: Shortlist, rows: pa.Table, seen: list[str], clock: Clock,
                    explain: bool) -> Outcome:
        """The order of the shortlist; `rows` are its products, in the same order.

        Where there is nothing to compare them with, the `query` being None, the rules alone decide.
        """
        candidates = shortlist.candidates(rows)
        if query is None:
            return Outcome(await asyncio.to_thread(order_with, self._rules, "", candidates, None, seen, False))
        cross, degraded = None, None
        if self.cross is not None:
            found = await self._cross_scores(query, cross_texts(rows, self.config), clock)
            clock.done("cross_encoder")
            if found is None:
                degraded = CROSS
            else:
                cross = spread(found, np.arange(len(found)), len(candidates))
        begun = time.perf_counter()
        answer = (await within(self.deadline_s, [self.ranker.order(query, candidates, cross, seen, explain)]))[0]
        clock.done("ranker")
        if isinstance(answer, BaseException):
            log.warning("the ranker failed: %r", answer)
            rules = await asyncio.to_thread(order_with, self._rules, query, candidates, None, seen, False)
            return Outcome(rules, RANKER)
        self.ranker_cost.add(time.perf_counter() - begun)
        return Outcome(answer, degraded)

    async def _cross_scores(self, query: str, texts: list[str], clock: Clock) -> Floats | None:
        """The scores of the texts, or None when they are late or cannot be had."""
        assert self.cross is not None
        left = min(self.deadline_s, clock.left() - self.ranker_cost.seconds)
        if not self.cross_cost.fits(left):
            return None
        begun = time.perf_counter()
        answer = (await within(left, [self.cross.score(query, texts)]))[0]
        self.cross_cost.add(time.perf_counter() - begun, late=isinstance(answer, LateError))
        if isinstance(answer, CrossScores):
            return answer.scores
        log.warning("no scores of the cross-encoder: %r", answer)
        return None
