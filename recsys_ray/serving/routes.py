"""The HTTP face of a gateway: paths, documents and error handlers, and no decision of its own."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse

from recsys_ray.serving.api import (
    Limits,
    ProductResponse,
    ReadyResponse,
    SearchRequest,
    SearchResponse,
    SimilarResponse,
    check_product_id,
    check_similar_k,
    error_documents,
    parse_search,
)
from recsys_ray.serving.docs import PAGE_POLICY, docs_page
from recsys_ray.serving.errors import ApiError, error_body, error_headers, from_status, validation_error
from recsys_ray.serving.gateway import Gateway
from recsys_ray.serving.limits import Gate

SEARCH_SCHEMA = SearchRequest.model_json_schema(ref_template="#/components/schemas/{model}")
SEARCH_PARTS = SEARCH_SCHEMA.pop("$defs", {})
SEARCH_BODY = {"requestBody": {"required": True, "content": {"application/json": {
    "schema": SEARCH_SCHEMA,
    "examples": {f"example {number}": {"value": value} for number, value in enumerate(SEARCH_SCHEMA["examples"], 1)}}}}}


class SimilarQuery(BaseModel):
    """The query string of `similar`."""

    model_config = ConfigDict(extra="forbid")
    k: int = 10


class NoQuery(BaseModel):
    """A path that takes no query string."""

    model_config = ConfigDict(extra="forbid")


def create_api(gateway: Gateway, limits: Limits, key_sha256: str | None = None) -> FastAPI:
    """The ASGI application of `gateway`; with `key_sha256`, only for clients that send that key."""
    app = FastAPI(title="recsys_ray", version="1", summary="Product search and similar products",
                  docs_url=None, redoc_url=None)  # FastAPI's own pages load their scripts from elsewhere
    app.add_middleware(Gate, max_body_bytes=limits.max_body_bytes, key_sha256=key_sha256)
    _add_error_handlers(app)
    _add_search(app, gateway, limits)
    _add_products(app, gateway, limits)
    _add_health(app, gateway)
    _describe(app)
    _add_docs(app)
    return app


def _add_search(app: FastAPI, gateway: Gateway, limits: Limits) -> None:
    @app.post("/v1/search", response_model=SearchResponse, openapi_extra=SEARCH_BODY, tags=["search"],
              responses=error_documents(400, 401, 413, 422, 503))
    async def search(request: Request, query: Annotated[NoQuery, Query()]) -> SearchResponse:
        """The products that fit a query best, filtered, sorted and counted."""
        return await gateway.search(parse_search(await request.body(), limits), _request_id(request))


def _add_products(app: FastAPI, gateway: Gateway, limits: Limits) -> None:
    # An id may hold a slash, hence the path converter; the longer route has to come first.
    @app.get("/v1/products/{product_id:path}/similar", response_model=SimilarResponse, tags=["products"],
             responses=error_documents(400, 401, 404, 413, 422, 503))
    async def similar(request: Request, product_id: str, query: Annotated[SimilarQuery, Query()]) -> SimilarResponse:
        """The products nearest to a product."""
        return await gateway.similar(check_product_id(product_id, limits), check_similar_k(query.k, limits),
                                     _request_id(request))

    @app.get("/v1/products/{product_id:path}", response_model=ProductResponse, tags=["products"],
             responses=error_documents(400, 401, 404, 413, 422, 503))
    async def product(request: Request, product_id: str, query: Annotated[NoQuery, Query()]) -> ProductResponse:
        """One product."""
        return await gateway.product(check_product_id(product_id, limits), _request_id(request))


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
    """Give the OpenAPI document the schemas that the search body refers to."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        document = plain()
        document["components"]["schemas"].update(SEARCH_PARTS)
        return document

    app.openapi = described  # type: ignore[method-assign]


def _add_docs(app: FastAPI) -> None:
    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        """The documentation page."""
        return HTMLResponse(docs_page(app.openapi()), headers={"content-security-policy": PAGE_POLICY})


def _request_id(request: Request) -> str:
    return str(request.state.request_id)


