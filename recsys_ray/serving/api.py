"""The requests of the HTTP service, and the limits that a request must keep.

A request is parsed from its bytes in one strict step (`parse`), so that broken JSON, NaN,
numbers beyond float, lone surrogates, unknown keys and values out of range all end as one
`ApiError` with the field's name and never reach the search.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from recsys_ray.config import Config
from recsys_ray.data.events import MAX_TIMESTAMP_MS
from recsys_ray.retrieval.filters import Filters
from recsys_ray.serving.errors import ApiError, validation_error

Sort = Literal["relevance", "price_asc", "price_desc", "rating"]
System = Literal["bm25", "retriever", "full"]
EventKind = Literal["click", "cart", "purchase"]     # impressions are the service's own
MAX_PRICE = 1e9


class Limits(Config):
    """What a request may ask for."""

    max_query_chars: int = Field(default=1000, ge=1)
    max_k: int = Field(default=100, ge=1)
    max_window: int = Field(default=200, ge=1)          # offset + k; also how many candidates are ranked a query
    max_filter_values: int = Field(default=50, ge=1)
    max_value_chars: int = Field(default=256, ge=1)     # of one filter value or product id
    max_history: int = Field(default=200, ge=1)         # product ids of a history, and of those not to show
    max_events: int = Field(default=100, ge=1)          # of one request
    max_body_bytes: int = Field(default=65_536, ge=1024)
    max_picture_bytes: int = Field(default=5 << 20, ge=1024)    # of a picture, where the service has pictures
    max_in_flight: int = Field(default=64, ge=1)        # requests that one gateway works on; more are sent away

    @model_validator(mode="after")
    def _a_page_fits_the_window(self) -> Self:
        if self.max_k > self.max_window:
            raise ValueError(f"max_k {self.max_k} is larger than max_window {self.max_window}; raise max_window")
        return self

    @property
    def max_picture_body_bytes(self) -> int:
        """Of a request with a picture: in base64 it takes a third more."""
        return self.max_body_bytes + -(-self.max_picture_bytes * 4 // 3)


def _limits(info: ValidationInfo) -> Limits:
    limits = (info.context or {}).get("limits")
    return limits if isinstance(limits, Limits) else Limits()


def query_text(text: str, info: ValidationInfo) -> str:
    """`text` if it can be asked; `ValueError` says what is wrong with it."""
    longest = _limits(info).max_query_chars
    if len(text) > longest:
        raise ValueError(f"has {len(text)} characters; at most {longest} are allowed")
    if "\0" in text:
        raise ValueError("holds a NUL character")
    if not text.strip():
        raise ValueError("is empty")
    return text


def value_text(text: str, limits: Limits) -> str:
    """`text` if it can name a product, a brand or a category; `ValueError` says what is wrong with it."""
    if not text.strip():
        raise ValueError("is empty")
    if len(text) > limits.max_value_chars:
        raise ValueError(f"has {len(text)} characters; at most {limits.max_value_chars} are allowed")
    if "\0" in text:
        raise ValueError("holds a NUL character")
    return text


def check_window(end: int, info: ValidationInfo) -> None:
    """`ValueError` unless a page that ends there is within the limits."""
    if end > (most := _limits(info).max_window):
        raise ValueError(f"offset + k is {end}; at most {most} are allowed")


def _filter_values(values: list[str], info: ValidationInfo) -> list[str]:
    limits = _limits(info)
    if not 1 <= len(values) <= limits.max_filter_values:
        raise ValueError(f"has {len(values)} values; 1 to {limits.max_filter_values} are allowed")
    return [value_text(value, limits) for value in values]


def _id_text(text: str, info: ValidationInfo) -> str:
    return value_text(text, _limits(info))


def _history(ids: list[str], info: ValidationInfo) -> list[str]:
    limits = _limits(info)
    if len(ids) > limits.max_history:
        raise ValueError(f"has {len(ids)} values; at most {limits.max_history} are allowed")
    return [value_text(one, limits) for one in ids]


Values = Annotated[list[str], AfterValidator(_filter_values)]
Ids = Annotated[list[str], AfterValidator(_history)]
Id = Annotated[str, AfterValidator(_id_text)]
Price = Annotated[float, Field(ge=0, le=MAX_PRICE)]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class SearchFilters(_Request):
    """Conditions that every answer meets. A product without a price never meets a price condition."""

    category: Values | None = Field(default=None, description="one of these categories")
    brand: Values | None = Field(default=None, description="one of these brands")
    concern: Values | None = Field(default=None, description="addresses one of these concerns, e.g. acne; a product "
                                                             "that was not scored never does")
    price_min: Price | None = Field(default=None, description="in units of the currency, inclusive")
    price_max: Price | None = Field(default=None, description="in units of the currency, inclusive")

    @model_validator(mode="after")
    def _prices_in_order(self) -> Self:
        if self.price_min is not None and self.price_max is not None and self.price_min > self.price_max:
            raise ValueError("price_min is larger than price_max")
        return self

    def to_filters(self) -> Filters:
        """The same conditions as retrieval knows them: prices in cents."""
        return Filters(category=_alternatives(self.category), brand=_alternatives(self.brand),
                       concern=_alternatives(self.concern),
                       price_min_cents=_cents(self.price_min), price_max_cents=_cents(self.price_max))


def _alternatives(values: list[str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values)


def _cents(price: float | None) -> int | None:
    return None if price is None else round(price * 100)


class RankedRequest(_Request):
    """What every request for a ranked list may say."""

    k: int = Field(default=10, ge=1, description="answers on the page", json_schema_extra={"maximum": 100})
    filters: SearchFilters = SearchFilters()
    user_id: Id | None = Field(default=None, description="whose events this list belongs to; does not change the list")
    explain: bool = Field(default=False, description="say of each answer why it stands where it does")
    budget_ms: int | None = Field(default=None, ge=1, le=60_000, description="what the answer may take; a late "
                                  "cross-encoder is left out, and the answer says so")

    @model_validator(mode="after")
    def _k_within_limits(self, info: ValidationInfo) -> Self:
        if self.k > (most := _limits(info).max_k):
            raise ValueError(f"k is {self.k}; at most {most} are allowed")
        return self


class SearchRequest(RankedRequest):
    """One page of answers to one query."""

    model_config = ConfigDict(json_schema_extra={"examples": [
        {"query": "couch for a small flat", "k": 10},
        {"query": "face cream", "k": 5, "sort": "price_asc", "filters": {"category": ["beauty"], "price_max": 25.0}}]})

    query: Annotated[str, AfterValidator(query_text)] = Field(
        description="the shopper's words", json_schema_extra={"minLength": 1, "maxLength": 1000})
    offset: int = Field(default=0, ge=0, description="answers to skip; offset + k is limited",
                        json_schema_extra={"maximum": 199})
    sort: Sort = Field(default="relevance", description="order of the most relevant products; a product without a "
                                                        "price or rating comes last")
    system: System = Field(default="full", description="which rankers are asked: words alone, retrieval alone, or all")

    @model_validator(mode="after")
    def _page_within_limits(self, info: ValidationInfo) -> Self:
        check_window(self.offset + self.k, info)
        return self


class RecommendRequest(RankedRequest):
    """What a user may like after a history."""

    model_config = ConfigDict(json_schema_extra={"examples": [
        {"history": ["B00CHAIR01", "B00LAMP002"], "k": 10},
        {"history": [], "k": 5, "filters": {"category": ["home"]}}]})

    history: Ids = Field(description="product ids, the latest last; unknown ones are passed over")
    seen: Ids = Field(default=[], description="further product ids not to show; those of the history never are")


class Event(_Request):
    """What a shopper did with a product of a list."""

    kind: EventKind
    product_id: Id
    list_id: Id | None = Field(default=None, description="of the answer it was shown in")
    user_id: Id | None = None
    event_id: Id | None = Field(default=None, description="the same id is kept once; else a new one is made")
    timestamp_ms: int | None = Field(default=None, ge=0, lt=MAX_TIMESTAMP_MS, description="default: now")


class EventsRequest(_Request):
    """Events, kept for training."""

    model_config = ConfigDict(json_schema_extra={"examples": [
        {"events": [{"kind": "click", "product_id": "B00CHAIR01", "list_id": "0f8c2e6d9a7b4c31"}]}]})

    events: list[Event] = Field(min_length=1)

    @model_validator(mode="after")
    def _not_too_many(self, info: ValidationInfo) -> Self:
        if len(self.events) > (most := _limits(info).max_events):
            raise ValueError(f"events: {len(self.events)} in one request; at most {most} are allowed")
        return self


AnyRequest = TypeVar("AnyRequest", bound=_Request)


def parse(kind: type[AnyRequest], body: bytes, limits: Limits) -> AnyRequest:
    """The request in a JSON body; `ApiError` 422 (400 when it is not JSON at all) names the first bad field."""
    try:
        return kind.model_validate_json(body, context={"limits": limits})
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_input=False)) from None


class SimilarQuery(BaseModel):
    """The query string of `similar`."""

    model_config = ConfigDict(extra="forbid")
    k: int = 10
    by: Literal["text", "looks"] = Field(default="text", description="looks: products whose pictures are alike")


def check_product_id(product_id: str, limits: Limits) -> str:
    """`product_id`, or `ApiError` 422."""
    try:
        return value_text(product_id, limits)
    except ValueError as error:
        raise ApiError(422, "invalid_request", f"product_id {error}", "product_id") from None


def check_similar_k(k: int, limits: Limits) -> int:
    """`k`, or `ApiError` 422."""
    if not 1 <= k <= limits.max_k:
        raise ApiError(422, "invalid_request", f"k is out of range; 1 to {limits.max_k} are allowed", "k")
    return k
