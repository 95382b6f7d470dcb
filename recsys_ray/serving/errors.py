"""Every refusal in one shape: `{"error": {"code", "message", "field"}, "request_id"}`.

A message never repeats what the client sent (it may not even be encodable) and never says where in
the code something happened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

CODES = {400: "bad_request", 401: "unauthorized", 404: "not_found", 405: "method_not_allowed",
         413: "body_too_large", 422: "invalid_request", 429: "overloaded", 500: "internal_error", 503: "unavailable"}


class ApiError(Exception):
    """A request that is answered with `status` and a message instead of results."""

    def __init__(self, status: int, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.field = status, code, message, field

    def __reduce__(self) -> tuple[type[ApiError], tuple[int, str, str, str | None]]:
        return ApiError, (self.status, self.code, self.message, self.field)


def error_body(error: ApiError, request_id: str) -> bytes:
    """The JSON body of a refusal."""
    detail = {"code": error.code, "message": error.message, "field": error.field}
    return json.dumps({"error": detail, "request_id": request_id}).encode()


def error_headers(status: int) -> dict[str, str]:
    """What a refusal with this status tells the client beside its body."""
    headers = {401: {"www-authenticate": "Bearer"}, 413: {"connection": "close"}, 429: {"retry-after": "1"},
               503: {"retry-after": "1"}}
    return headers.get(status, {})


def validation_error(problems: Sequence[Mapping[str, Any]], where: int = 0) -> ApiError:
    """The `ApiError` for the first of pydantic's problems; the first `where` parts of its location name no field."""
    first = problems[0]
    field = ".".join(str(part) for part in first["loc"][where:]) or None
    if first["type"] == "json_invalid":
        return ApiError(400, "invalid_json", "the body is not valid JSON in UTF-8")
    if field is not None and not field.isprintable():
        field = None
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return ApiError(422, "unknown_field", "no such field", _short(field))
    return ApiError(422, "invalid_request", f"{field} {message}" if _is_phrase(message) and field else message,
                    _short(field))


def _is_phrase(message: str) -> bool:
    """Our own messages about one field continue its name: "has 2000 characters; ...", "is empty"."""
    return message.startswith(("has ", "is empty", "holds "))


def _short(field: str | None) -> str | None:
    return None if field is None else field[:80]


def from_status(status: int) -> ApiError:
    """The `ApiError` for a status that the framework itself decided on."""
    texts = {404: "no such resource", 405: "this resource does not know that method"}
    return ApiError(status, CODES.get(status, "bad_request" if status < 500 else "internal_error"),
                    texts.get(status, "the request could not be read" if status < 500 else "something went wrong"))
