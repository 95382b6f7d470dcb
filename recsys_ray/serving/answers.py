"""The answers of the HTTP service, as its document describes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

Stage = Literal["cross_encoder", "ranker"]


class Product(BaseModel):
    """A product as it is shown."""

    product_id: str
    title: str | None
    brand: str | None
    category: str | None
    price: float | None = Field(description="in units of the currency")
    rating: float | None = Field(description="mean of the reviews before the cut of the index")
    num_reviews: int | None
    image_url: str | None
    concerns: list[str] | None = Field(default=None, description="that it addresses; null: not scored")


class Influence(BaseModel):
    """What one feature did to a product's place."""

    feature: str
    value: float | None = Field(description="null: unknown")
    contribution: float = Field(description="what it adds to the ranker's score")


class ConcernReason(BaseModel):
    """Why a product is said to address a concern."""

    concern: str
    probability: float
    because: list[str] = Field(description="the ingredients it rests on most; empty: not explained")


class Explanation(BaseModel):
    """Why a product stands where it does."""

    scores: dict[str, float] = Field(description="by stage: dense, lexical, sparse, multi, fused or recommender, "
                                                 "cross_encoder, ranker; those that were asked")
    first_rank: int = Field(description="the rank that the first stage gave it")
    features: list[Influence] = Field(description="those that moved it most, the strongest first")
    concerns: list[ConcernReason] = Field(default=[], description="that it addresses, the surest first")


class Hit(Product):
    """A product in an answer."""

    rank: int = Field(description="1 is the first of all pages")
    score: float = Field(description="relevance; comparable within one answer only")
    explanation: Explanation | None = Field(default=None, description="with `explain`")


class FacetCount(BaseModel):
    """How many candidates have this value."""

    value: str
    count: int


class Facets(BaseModel):
    """Counts over all candidates: the most relevant products that meet the filters, on any page."""

    category: list[FacetCount]
    brand: list[FacetCount]
    concern: list[FacetCount] = Field(default=[], description="a product may address several")


class Answer(BaseModel):
    """What every answer says about how it was made."""

    request_id: str
    index_version: str
    shards_answered: int = Field(description="less than shards_total: some products could not be looked at in time")
    shards_total: int
    took_ms: dict[str, float] = Field(description="milliseconds per stage")


class RankedAnswer(Answer):
    """A list that may have passed several rankers."""

    items: list[Hit]
    candidates: int = Field(description="products that were ranked; the list ends here")
    degraded: bool = Field(default=False, description="a later stage was left out, the order is that of those before")
    degraded_stage: Stage | None = Field(default=None, description="the stage that was late or failed")
    list_id: str | None = Field(default=None, description="for `POST /v1/events`, where events are kept")


class SearchResponse(RankedAnswer):
    """One page of answers."""

    facets: Facets


class RecommendResponse(RankedAnswer):
    """What a user may like next."""

    source: str = Field(description="the recommender that made the list")
    fallback: bool = Field(description="nothing of the history was known: the list is the most popular products")
    known: int = Field(description="how many products of the history the recommender knows")


class EventsResponse(BaseModel):
    """Events that were taken in."""

    request_id: str
    accepted: int


class SimilarResponse(Answer):
    """The products nearest to one product."""

    product_id: str
    items: list[Hit]


class ProductResponse(Answer):
    """One product."""

    product: Product


class ReadyResponse(BaseModel):
    """Whether every part has loaded what it serves."""

    ready: bool
    index_version: str
    shards_ready: int
    shards_total: int
    encoder_ready: bool
    problems: list[str]


class ErrorDetail(BaseModel):
    """Why a request was refused."""

    code: str
    message: str
    field: str | None


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail
    request_id: str


def error_documents(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of these error statuses."""
    return {status: {"model": ErrorResponse} for status in statuses}
