"""The HTTP face of a gateway: paths, documents and error handlers, and no decision of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse

from recsys_ray.serving.answers import (
    Answer,
    EventsResponse,
    ProductResponse,
    RankedAnswer,
    ReadyResponse,
    RecommendResponse,
    SearchResponse,
    SimilarResponse,
    error_documents,
)
from recsys_ray.serving.api import (
    EventsRequest,
    Limits,
    RecommendRequest,
    SearchRequest,
    SimilarQuery,
    check_product_id,
    check_similar_k,
    parse,
)
from recsys_ray.serving.docs import PAGE_POLICY, docs_page
from recsys_ray.serving.errors import ApiError, error_body, error_headers, from_status, validation_error
from recsys_ray.serving.event_log import EventLog
from recsys_ray.serving.gateway import Gateway
from recsys_ray.serving.limits import Gate
from recsys_ray.serving.page import add_page
from recsys_ray.serving.picture_api import PictureRequest, picture_body, search_request
from recsys_ray.serving.records import Observe, Record, log_record

AnyAnswer = TypeVar("AnyAnswer", bound=Answer)
PARTS: dict[str, Any] = {}      # schemas that the bodies refer to


def _body(kind: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI entry of a body that a route parses itself."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    PARTS.update(schema.pop("$defs", {}))
    examples = {f"example {number}": {"value": value} for number, value in enumerate(schema["examples"], 1)}
    return {"requestBody": {"required": True, "content": {"application/json": {
        "schema": schema, "examples": examples}}}}


SEARCH_BODY, RECOMMEND_BODY, EVENTS_BODY = _body(SearchRequest), _body(RecommendRequest), _body(EventsRequest)
PICTURE_BODY = _body(PictureRequest)
SEARCH_PATH = "/v1/search"
ERRORS = (400, 401, 413, 422, 429, 503)


class NoQuery(BaseModel):
    """A path that takes no query string."""

    model_config = ConfigDict(extra="forbid")


def create_api(gateway: Gateway, limits: Limits, key_sha256: str | None = None, *, observe: Observe = log_record,
               log_queries: bool = False, image_hosts: Sequence[str] = (), image_folder: Path | None = None
               ) -> FastAPI:
    """The ASGI application of `gateway`; with `key_sha256`, only for clients that send that key.

    Every request ends in a call of `observe`. At shutdown the events that wait are written.
    """
    app = FastAPI(title="recsys_ray", version="1", summary="Product search, recommendations and similar products",
                  docs_url=None, redoc_url=None,    # FastAPI's own pages load their scripts from elsewhere
                  lifespan=_closing(gateway.events))
    larger = {} if gateway.pictures is None else {SEARCH_PATH: limits.max_picture_body_bytes}
    app.add_middleware(Gate, max_body_bytes=limits.max_body_bytes, larger=larger, max_in_flight=limits.max_in_flight,
                       key_sha256=key_sha256, observe=observe)
    _add_error_handlers(app)
    if gateway.pictures is None:
        _add_search(app, gateway, limits, log_queries)
    else:
        _add_picture_search(app, gateway, limits, log_queries)
    if gateway.recommending is not None:
        _add_recommend(app, gateway, limits)
    if gateway.events is not None:
        _add_events(app, gateway, limits)
    _add_products(app, gateway, limits)
    _add_health(app, gateway)
    _describe(app)
    _add_docs(app)
    add_page(app, image_hosts, pictures=gateway.pictures is not None, image_folder=image_folder)
    return app


def _closing(events: EventLog | None) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if events is not None:
            await asyncio.to_thread(events.close)

    return lifespan


def _add_search(app: FastAPI, gateway: Gateway, limits: Limits, log_queries: bool) -> None:
    @app.post(SEARCH_PATH, response_model=SearchResponse, openapi_extra=SEARCH_BODY, tags=["search"],
              responses=error_documents(*ERRORS))
    async def search(request: Request, query: Annotated[NoQuery, Query()]) -> SearchResponse:
        """The products that fit a query best, filtered, sorted and counted."""
        asked = parse(SearchRequest, await request.body(), limits)
        return _recorded(request, await gateway.search(asked, _request_id(request)),
                         asked.query if log_queries else None)


def _add_picture_search(app: FastAPI, gateway: Gateway, limits: Limits, log_queries: bool) -> None:
    body = {"requestBody": picture_body(SEARCH_BODY["requestBody"], PICTURE_BODY["requestBody"])}

    @app.post(SEARCH_PATH, response_model=SearchResponse, openapi_extra=body, tags=["search"],
              responses=error_documents(*ERRORS))
    async def search(request: Request, query: Annotated[NoQuery, Query()]) -> SearchResponse:
        """The products that fit words, a picture or both best, filtered, sorted and counted."""
        asked = await search_request(request, limits)
        answer = await (gateway.search_picture(asked, _request_id(request)) if isinstance(asked, PictureRequest)
                        else gateway.search(asked, _request_id(request)))
        return _recorded(request, answer, asked.query if log_queries else None)


def _add_recommend(app: FastAPI, gateway: Gateway, limits: Limits) -> None:
    @app.post("/v1/recommend", response_model=RecommendResponse, openapi_extra=RECOMMEND_BODY, tags=["recommend"],
              responses=error_documents(*ERRORS))
    async def recommend(request: Request, query: Annotated[NoQuery, Query()]) -> RecommendResponse:
        """What somebody may like who has these products; the most popular ones when none of them is known."""
        asked = parse(RecommendRequest, await request.body(), limits)
        return _recorded(request, await gateway.recommend(asked, _request_id(request)))


def _add_events(app: FastAPI, gateway: Gateway, limits: Limits) -> None:
    @app.post("/v1/events", response_model=EventsResponse, openapi_extra=EVENTS_BODY, tags=["events"],
              status_code=202, responses=error_documents(*ERRORS))
    async def events(request: Request, query: Annotated[NoQuery, Query()]) -> EventsResponse:
        """Take in clicks, carts and purchases; they are written within seconds."""
        return await gateway.keep_events(parse(EventsRequest, await request.body(), limits), _request_id(request))


def _add_products(app: FastAPI, gateway: Gateway, limits: Limits) -> None:
    # An id may hold a slash, hence the path converter; the longer route has to come first.
    @app.get("/v1/products/{product_id:path}/similar", response_model=SimilarResponse, tags=["products"],
             responses=error_documents(*ERRORS, 404))
    async def similar(request: Request, product_id: str, query: Annotated[SimilarQuery, Query()]) -> SimilarResponse:
        """The products nearest to a product, by their texts or by their pictures."""
        nearest = gateway.similar if query.by == "text" else gateway.looks_like
        answer = await nearest(check_product_id(product_id, limits), check_similar_k(query.k, limits),
                               _request_id(request))
        return _recorded(request, answer)

    @app.get("/v1/products/{product_id:path}", response_model=ProductResponse, tags=["products"],
             responses=error_documents(*ERRORS, 404))
    async def product(request: Request, product_id: str, query: Annotated[NoQuery, Query()]) -> ProductResponse:
        """One product."""
        return _recorded(request, await gateway.product(check_product_id(product_id, limits), _request_id(request)))


def _add_health(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        """The gateway is alive."""
        return {"status": "ok"}

    @app.get("/readyz", response_model=ReadyResponse, responses={503: {"model": ReadyResponse}}, tags=["health"])
    async def readyz(response: Response) -> ReadyResponse:
        """The index is loaded in all shards, and the encoder is the one it was built with."""
        readiness = await gateway.readiness()
        response.status_code = 200 if readiness.ready else 503
        return readiness


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        body = error_body(error, _request_id(request))
        return Response(body, error.status, error_headers(error.status), "application/json")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return await refused(request, validation_error(error.errors(), where=1))

    @app.exception_handler(HTTPException)
    async def unserved(request: Request, error: HTTPException) -> Response:
        response = await refused(request, from_status(error.status_code))
        response.headers.update(error.headers or {})
        return response


def _describe(app: FastAPI) -> None:
    """Give the OpenAPI document the schemas that bodies refer to."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        document = plain()
        document["components"]["schemas"].update(PARTS)
        return document

    app.openapi = described  # type: ignore[method-assign]


def _add_docs(app: FastAPI) -> None:
    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        """The documentation page."""
        return HTMLResponse(docs_page(app.openapi()), headers={"content-security-policy": PAGE_POLICY})


def _request_id(request: Request) -> str:
    return str(request.state.request_id)




def _recorded(request: Request, answer: AnyAnswer, query: str | None = None) -> AnyAnswer:
    """The answer, when what is known of it stands in the request's record."""
    record: Record = request.state.record
    record.stages_ms, record.query = answer.took_ms, query
    record.degraded = answer.degraded_stage if isinstance(answer, RankedAnswer) else None
    return answer
