"""Requests with a picture: base64 in the JSON body, or a form with a file.

    {"picture": "<base64>", "query": "but in red", "k": 10}
    curl -F picture=@dress.jpg -F 'request={"k": 10}' http://localhost:8000/v1/search
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Self

from fastapi import Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator
from starlette.datastructures import UploadFile

from recsys_ray.serving.api import Limits, RankedRequest, SearchRequest, Sort, check_window, parse, query_text
from recsys_ray.serving.errors import ApiError

FORM = "multipart/form-data"
EXAMPLE = ("iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAFklEQVR42mPYYmNDEmIY1TCqYfhqAAD19SwQ/9ZRBgAAAABJRU5E"
           "rkJggg==")       # 16 x 16 pixels of one colour


def _decoded(text: bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError("holds no base64 in one line") from None


class PictureRequest(RankedRequest):
    """One page of products that look like a picture, with words beside it or without."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"picture": EXAMPLE, "query": "but in red", "k": 5}]})

    picture: Annotated[bytes, AfterValidator(_decoded)] | None = Field(
        default=None, description="the file in base64; or send a form", json_schema_extra={"format": "byte"})
    query: Annotated[str, AfterValidator(query_text)] | None = Field(default=None, description="words beside it")
    offset: int = Field(default=0, ge=0, description="answers to skip; offset + k is limited")
    sort: Sort = "relevance"

    @model_validator(mode="after")
    def _page_within_limits(self, info: ValidationInfo) -> Self:
        check_window(self.offset + self.k, info)
        return self


def picture_body(words: dict[str, Any], picture: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI entry of a body that is a search by words, one by a picture, or a form with the latter's file."""
    kinds = [one["content"]["application/json"] for one in (words, picture)]
    examples = [value for one in kinds for value in one["examples"].values()]
    form = {"type": "object", "required": ["picture"], "additionalProperties": False, "properties": {
        "picture": {"type": "string", "format": "binary"},
        "request": {"type": "string", "description": "the other fields as JSON"}}}
    return {"required": True, "content": {
        "application/json": {"schema": {"anyOf": [one["schema"] for one in kinds]},
                             "examples": {f"example {number}": value for number, value in enumerate(examples, 1)}},
        FORM: {"schema": form}}}


class _Peek(BaseModel):
    picture: Any = None


async def search_request(request: Request, limits: Limits) -> SearchRequest | PictureRequest:
    """What a body asks: with a picture, or by words alone.

    Errors: `ApiError` 413 for a picture beyond `limits.max_picture_bytes`, 422 or 400 for whatever is not a request.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == FORM:
        return await _from_form(request, limits)
    body = await request.body()
    try:
        by_words = _Peek.model_validate_json(body).picture is None
    except ValidationError:     # no JSON, or no object: the full parser says what is wrong
        by_words = True
    if by_words:
        return parse(SearchRequest, body, limits)
    return _bounded(parse(PictureRequest, body, limits), limits)


async def _from_form(request: Request, limits: Limits) -> PictureRequest:
    async with request.form(max_files=1, max_fields=1, max_part_size=limits.max_body_bytes) as form:
        if unknown := sorted(set(form) - {"picture", "request"}):
            raise ApiError(422, "unknown_field", "a form has the fields picture (a file) and request (JSON)",
                           unknown[0][:80] if unknown[0].isprintable() else None)
        picture, asked = form.get("picture"), form.get("request", "{}")
        if not isinstance(picture, UploadFile):
            raise ApiError(422, "invalid_request", "picture is missing: send a file", "picture")
        if not isinstance(asked, str):
            raise ApiError(422, "invalid_request", "request is a file; send JSON", "request")
        found = parse(PictureRequest, asked.encode("utf-8", "surrogatepass"), limits)
        if found.picture is not None:
            raise ApiError(422, "invalid_request", "picture is given twice", "picture")
        return _bounded(found.model_copy(update={"picture": await picture.read()}), limits)


def _bounded(asked: PictureRequest, limits: Limits) -> PictureRequest:
    if len(asked.picture or b"") > limits.max_picture_bytes:
        raise ApiError(413, "body_too_large", f"the picture is larger than {limits.max_picture_bytes} bytes", "picture")
    return asked
