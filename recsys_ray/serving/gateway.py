"""One request over all stages: encode once, ask every shard, rank, wait until the deadline, put together.

Knows nothing of Ray or HTTP: every stage is a set of async calls, so the same code runs over deployments
and over objects in the same process.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.data.preprocess import clean_query
from recsys_ray.ids import row_ids
from recsys_ray.models.token_signals import Encoding
from recsys_ray.retrieval.filters import Filters
from recsys_ray.retrieval.retriever import RetrieverConfig
from recsys_ray.serving.answers import (
    EventsResponse,
    Hit,
    ProductResponse,
    ReadyResponse,
    RecommendResponse,
    SearchResponse,
    SimilarResponse,
)
from recsys_ray.serving.api import EventsRequest, RankedRequest, RecommendRequest, SearchRequest
from recsys_ray.serving.calls import Clock, EncoderCalls, LateError, RecommenderCalls, ShardCalls, within
from recsys_ray.serving.cascade import Cascade, Outcome
from recsys_ray.serving.errors import ApiError
from recsys_ray.serving.event_log import EventLog
from recsys_ray.serving.first_stage import Suggestion
from recsys_ray.serving.loading import PartStatus
from recsys_ray.serving.picture_api import PictureRequest
from recsys_ray.serving.pictures import NoPicture, PictureAnswer, PictureCalls, PictureQuestion
from recsys_ray.serving.recommender import (
    NoEncoding,
    history_query,
    known_filters,
    page,
    rank,
    recommended,
    search_query,
    shortlist,
    similar_hits,
    similar_query,
    suggested,
    to_product,
)
from recsys_ray.serving.reranking import Ints, Row, Shortlist, as_found

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Recommending:
    """The stages behind `/v1/recommend`."""

    first: RecommenderCalls
    depth: int
    cascade: Cascade | None = None


class Gateway:
    """The service: every public method answers one kind of request or raises `ApiError`."""

    def __init__(self, shards: Sequence[ShardCalls], encoder: EncoderCalls | None, *, config: RetrieverConfig,
                 index_version: str, deadline_s: float, concerns: Sequence[str] = (), cascade: Cascade | None = None,
                 recommending: Recommending | None = None, budget_ms: int | None = None,
                 events: EventLog | None = None, pictures: PictureCalls | None = None) -> None:
        if not shards:
            raise ValueError("a gateway needs at least one shard")
        self.shards, self.encoder, self.config = shards, encoder, config
        self.index_version, self.deadline_s, self.budget_ms = index_version, deadline_s, budget_ms
        self.concerns = concerns        # that the index's products were scored for
        self.cascade, self.recommending, self.events, self.pictures = cascade, recommending, events, pictures

    async def search(self, request: SearchRequest, request_id: str) -> SearchResponse:
        """One page of answers to a query."""
        clock = self._clock(request)
        query = search_query(request, self.config, self.concerns)
        encoding = None
        if self.encoder is not None and query.config.mode != "bm25":
            encoding = await self._encoding(query.text, document=False)
            clock.done("encode")
        answers = await self._ask_all(lambda shard: shard.search(query, encoding))
        clock.done("shards")
        found = shortlist(list(answers.values()), query)
        clock.done("rank")
        outcome = Outcome(None)
        if self.cascade is not None and request.system == "full":
            found = found.head(self.cascade.config.depth)
            owners = {int(row_id): number for number, one in answers.items() for row_id in one.hits.row_ids}
            outcome = await self._reranked(self.cascade, query.text, found, owners, [], clock, request)
        fields = page(found, outcome.ordered, request)
        return SearchResponse(**self._made(request_id, len(answers), clock), **fields, **_degraded(outcome),
                              list_id=self._shown(query.text, fields["items"], request))

    async def recommend(self, request: RecommendRequest, request_id: str) -> RecommendResponse:
        """What a user may like after a history."""
        if self.recommending is None:
            raise ApiError(404, "not_found", "this service has no recommender")
        clock = self._clock(request)
        suggestion, found, owners, answered = await self._suggested(self.recommending, request, clock)
        cascade, outcome = self.recommending.cascade, Outcome(None)
        if cascade is not None:
            found = found.head(cascade.config.depth)
            context: str | None = None
            if suggestion.known:
                asked = partial(_cards, row_ids=row_ids(request.history), filters=Filters())
                context = history_query(request.history, _flat(await self._ask_all(asked)))
                clock.done("shards")
            outcome = await self._reranked(cascade, context, found, owners, request.history, clock, request)
        fields = recommended(found, outcome.ordered, suggestion, request)
        return RecommendResponse(**self._made(request_id, answered, clock), **fields, **_degraded(outcome),
                                 list_id=self._shown(None, fields["items"], request))

    async def product(self, product_id: str, request_id: str) -> ProductResponse:
        """One product."""
        clock = Clock()
        row, answered = await self._find(product_id)
        clock.done("shards")
        return ProductResponse(**self._made(request_id, answered, clock), product=to_product(row))

    async def similar(self, product_id: str, k: int, request_id: str) -> SimilarResponse:
        """The `k` products nearest to a product, itself left out."""
        clock = Clock()
        row, _ = await self._find(product_id)
        clock.done("product")
        query = similar_query(row, k, self.config, dense=self.encoder is not None)
        encoding = await self._encoding(query.text, document=True) if self.encoder is not None else None
        clock.done("encode")
        answers = await self._ask_all(lambda shard: shard.search(query, encoding))
        clock.done("shards")
        items = similar_hits(rank(list(answers.values()), query), product_id, k)
        clock.done("rank")
        return SimilarResponse(**self._made(request_id, len(answers), clock), product_id=product_id, items=items)

    async def search_picture(self, request: PictureRequest, request_id: str) -> SearchResponse:
        """One page of products that look like a picture; with words beside it, those that are also like them."""
        clock = self._clock(request)
        words = None
        if text := clean_query(request.query or ""):
            if self.encoder is None:
                raise ApiError(422, "invalid_request", "this service reads no words beside a picture", "query")
            words = (await self._encoding(text, document=False)).dense
            clock.done("encode")
        filters = known_filters(request, self.concerns)
        question = PictureQuestion(self.config.depth, filters, request.picture, words)
        found, answered = await self._pictured(question, self.config.depth, clock)
        fields = page(found, None, request)
        return SearchResponse(**self._made(request_id, answered, clock), **fields,
                              list_id=self._shown(request.query, fields["items"], request))

    async def looks_like(self, product_id: str, k: int, request_id: str) -> SimilarResponse:
        """The `k` products whose pictures are nearest to a product's, itself left out."""
        clock = Clock()
        found, answered = await self._pictured(PictureQuestion(k + 1, Filters(), like=product_id), k + 1, clock)
        return SimilarResponse(**self._made(request_id, answered, clock), product_id=product_id,
                               items=similar_hits(as_found(found), product_id, k))

    async def keep_events(self, request: EventsRequest, request_id: str) -> EventsResponse:
        """Take in what shoppers did."""
        if self.events is None:
            raise ApiError(404, "not_found", "this service keeps no events")
        if not self.events.happened(request.events):
            raise ApiError(503, "events_full", "the events that wait to be written leave no room")
        return EventsResponse(request_id=request_id, accepted=len(request.events))

    async def readiness(self) -> ReadyResponse:
        """Which parts have loaded what they serve."""
        parts = [(f"shard {number}", shard.status) for number, shard in enumerate(self.shards)]
        parts += [("encoder", self.encoder.status)] if self.encoder else []
        for cascade in (self.cascade, self.recommending and self.recommending.cascade):
            parts += cascade.parts() if cascade else []
        parts += [("recommender", self.recommending.first.status)] if self.recommending else []
        parts += [("pictures", self.pictures.status)] if self.pictures else []
        found = {name: status if isinstance(status, PartStatus) else PartStatus(False, "does not answer")
                 for (name, _), status in zip(parts, await within(self.deadline_s, [call() for _, call in parts]),
                                              strict=True)}
        problems = [f"{name}: {part.problem or 'loading'}" for name, part in found.items() if not part.ready]
        shards = [part.ready for name, part in found.items() if name.startswith("shard ")]
        return ReadyResponse(ready=not problems, index_version=self.index_version, problems=problems,
                             shards_ready=sum(shards), shards_total=len(shards),
                             encoder_ready="encoder" not in found or found["encoder"].ready)

    # --- stages -----------------------------------------------------------------------------------
    def _clock(self, request: RankedRequest) -> Clock:
        budget_ms = request.budget_ms or self.budget_ms
        return Clock(None if budget_ms is None else budget_ms / 1000)

    async def _encoding(self, text: str, document: bool) -> Encoding:
        assert self.encoder is not None
        call = self.encoder.document if document else self.encoder.query
        encoding = (await within(self.deadline_s, [call(text)]))[0]
        if isinstance(encoding, NoEncoding) and encoding.bad_text:
            raise ApiError(422, "unencodable", "the text cannot be encoded", "query")
        if isinstance(encoding, NoEncoding | BaseException):
            log.warning("no encoding: %r", encoding)
            raise ApiError(503, "encoder_unavailable", "the text encoder did not answer")
        return encoding

    async def _reranked(self, cascade: Cascade, query: str | None, found: Shortlist, owners: Mapping[int, int],
                        seen: Sequence[str], clock: Clock, request: RankedRequest) -> Outcome:
        """The order of the rankers; that of the first stage when what they read of the products cannot be had."""
        if not found.cards:
            return Outcome(None)
        try:
            rows = await self._rows(found.row_ids, owners)
        except Exception as error:
            log.warning("no rows for the rankers: %r", error)
            return Outcome(None, "ranker")
        finally:
            clock.done("rows")
        return await cascade.order(query, found, rows, list(seen), clock, request.explain)

    async def _rows(self, wanted: Ints, owners: Mapping[int, int]) -> pa.Table:
        """What the rankers read of these products, in their order, each from the shard that named it."""
        of_shard: dict[int, list[int]] = {number: [] for number in sorted({*owners.values()})}
        for row_id in wanted.tolist():
            of_shard[owners[row_id]].append(row_id)
        tables = []
        for answer in await within(self.deadline_s, [self.shards[number].rows(np.array(ids, dtype=np.int64))
                                                     for number, ids in of_shard.items()]):
            if isinstance(answer, BaseException):
                raise answer
            tables.append(answer)
        whole = pa.concat_tables(tables)
        return whole.take(pc.index_in(pa.array(wanted), value_set=whole["row_id"].combine_chunks()))

    async def _suggested(self, stages: Recommending, request: RecommendRequest, clock: Clock
                         ) -> tuple[Suggestion, Shortlist, dict[int, int], int]:
        """(what the recommender says, those that may be shown, the shard of each of them, shards that answered)."""
        filters, count = known_filters(request, self.concerns), stages.depth
        while True:
            suggestion = (await within(self.deadline_s, [stages.first.suggest(request.history, count)]))[0]
            if isinstance(suggestion, BaseException):
                log.warning("no recommendations: %r", suggestion)
                raise ApiError(503, "recommender_unavailable", "the recommender did not answer")
            clock.done("recommender")
            asked = partial(_cards, row_ids=row_ids(suggestion.product_ids), filters=filters)
            answers = await self._ask_all(asked)
            clock.done("shards")
            found = suggested(suggestion, _flat(answers), request.seen, stages.depth)
            if len(found.cards) == stages.depth or suggestion.complete:
                owners = {card["row_id"]: number for number, cards in answers.items() for card in cards}
                return suggestion, found, owners, len(answers)
            count *= 4

    async def _pictured(self, question: PictureQuestion, depth: int, clock: Clock) -> tuple[Shortlist, int]:
        """(the at most `depth` best products that the index has, shards that answered)."""
        if self.pictures is None:
            raise ApiError(404, "not_found", "this service has no pictures")
        while True:
            answer = (await within(self.deadline_s, [self.pictures.ask(question)]))[0]
            clock.done("pictures")
            if isinstance(answer, NoPicture):
                raise ApiError(422, answer.code, answer.reason, "picture")
            if not isinstance(answer, PictureAnswer):
                log.warning("no answer to a picture: %r", answer)
                raise ApiError(503, "pictures_unavailable", "the picture search did not answer")
            asked = partial(_cards, row_ids=row_ids(answer.product_ids), filters=question.filters)
            answers = await self._ask_all(asked)
            clock.done("shards")
            suggestion = Suggestion(answer.product_ids, answer.scores, "pictures", 0, answer.complete)
            found = suggested(suggestion, _flat(answers), [], depth)
            if len(found.cards) == depth or answer.complete:
                return found, len(answers)
            question = replace(question, count=4 * question.count)     # some products are no longer in the index

    async def _find(self, product_id: str) -> tuple[Row, int]:
        answers = await self._ask_all(lambda shard: shard.product(product_id))
        row = next((row for row in answers.values() if row is not None), None)
        if row is not None:
            return row, len(answers)
        if len(answers) < len(self.shards):
            raise ApiError(503, "shards_unavailable", "not every shard answered in time, and no other has the product")
        raise ApiError(404, "not_found", "no such product", "product_id")

    async def _ask_all(self, call: Callable[[ShardCalls], Awaitable[T]]) -> dict[int, T]:
        """The answers that came in time, by number of the shard; `ApiError` 503 when none did."""
        outcomes = await within(self.deadline_s, [call(shard) for shard in self.shards])
        answers: dict[int, T] = {}
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, LateError):
                log.warning("shard %d did not answer within %.3f s", number, self.deadline_s)
            elif isinstance(outcome, BaseException):
                log.warning("shard %d failed: %s: %s", number, type(outcome).__name__, outcome)
            else:
                answers[number] = outcome
        if not answers:
            raise ApiError(503, "shards_unavailable", "no shard of the index answered in time")
        return answers

    def _made(self, request_id: str, answered: int, clock: Clock) -> dict[str, Any]:
        """The fields of `Answer`."""
        return {"request_id": request_id, "index_version": self.index_version, "shards_answered": answered,
                "shards_total": len(self.shards), "took_ms": clock.took_ms}

    def _shown(self, query: str | None, items: Sequence[Hit], request: RankedRequest) -> str | None:
        """Keep the list that is shown, where events are kept; its id."""
        if self.events is None:
            return None
        return self.events.shown(query, [(one.rank, one.product_id) for one in items], request.user_id)


def _degraded(outcome: Outcome) -> dict[str, Any]:
    return {"degraded": outcome.degraded is not None, "degraded_stage": outcome.degraded}


def _cards(shard: ShardCalls, row_ids: Ints, filters: Filters) -> Awaitable[list[Row]]:
    return shard.cards(row_ids, filters)


def _flat(answers: Mapping[int, list[Row]]) -> list[Row]:
    return [card for cards in answers.values() for card in cards]
