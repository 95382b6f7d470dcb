"""What stands before the application: request ids, the API key, bodies that are too large, and too many at once.

Plain ASGI, so that a refused body is never collected: its bytes are counted as they arrive, and a
declared length is refused before the first of them.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import re
import time
import uuid
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recsys_ray.config import ConfigError
from recsys_ray.serving.errors import ApiError, error_body, error_headers
from recsys_ray.serving.page import IMAGE_PATH, PAGE_PATHS
from recsys_ray.serving.records import Observe, Record

log = logging.getLogger(__name__)

API_KEY = "RECSYS_API_KEY"
MIN_KEY_CHARS = 16
PROBES = frozenset({"/healthz", "/readyz"})     # they carry no key, learn nothing about the catalogue, and never wait
OPEN_PATHS = PROBES | PAGE_PATHS                # nor the page, which asks for the key it then sends
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def api_key_digest(host: str) -> str | None:
    """The SHA-256 of the key in RECSYS_API_KEY, or None when the service is open on this machine only.

    Errors: `ConfigError` when `host` can be reached from elsewhere and there is no key, or a short one.
    """
    key = os.environ.get(API_KEY)
    if not key:
        if not _is_loopback(host):
            raise ConfigError(f"host {host!r} can be reached from other machines: set {API_KEY} to a secret of at "
                              f"least {MIN_KEY_CHARS} characters, or use 127.0.0.1")
        return None
    if len(key) < MIN_KEY_CHARS:
        raise ConfigError(f"{API_KEY} has {len(key)} characters; use at least {MIN_KEY_CHARS}")
    return hashlib.sha256(key.encode()).hexdigest()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Gate:
    """ASGI middleware: names the request, checks the key, bounds bodies and requests at a time, and keeps a record.

    It also hides unforeseen errors. Every request but a probe ends in one call of `observe`.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, max_in_flight: int, key_sha256: str | None,
                 observe: Observe, larger: Mapping[str, int] | None = None) -> None:
        """`larger`: paths whose bodies may have more bytes than `max_body_bytes`."""
        self.app, self.max_body_bytes, self.key_sha256, self.observe = app, max_body_bytes, key_sha256, observe
        self.larger = dict(larger or {})
        self.max_in_flight, self.in_flight = max_in_flight, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with 401, 413, 429 or 500."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, headers = time.perf_counter(), dict(scope["headers"])
        record = Record(_request_id(headers.get(b"x-request-id")))
        scope.setdefault("state", {}).update(request_id=record.request_id, record=record)
        probe = scope["path"] in PROBES
        self.in_flight += not probe
        try:
            await self._answer(scope, headers, receive, _named(send, record))
        finally:
            self.in_flight -= not probe
            record.path = getattr(scope.get("route"), "path", "other")
            record.total_ms = (time.perf_counter() - begun) * 1000
            if not probe:
                self.observe(record)

    async def _answer(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        record: Record = scope["state"]["record"]
        try:
            self._check_key(scope["path"], headers)
            self._check_room()
            most = self.larger.get(scope["path"], self.max_body_bytes)
            _check_declared_length(headers.get(b"content-length"), most)
            await self.app(scope, _counted(receive, most), send)
        except ApiError as error:
            if not record.status:
                await _refuse(error, record.request_id, send)
        except Exception:
            log.exception("request %s failed", record.request_id)
            if not record.status:
                await _refuse(ApiError(500, "internal_error", "something went wrong"), record.request_id, send)

    def _check_room(self) -> None:
        if self.in_flight > self.max_in_flight:
            raise ApiError(429, "overloaded", f"{self.max_in_flight} requests are being worked on; come back later")

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.key_sha256 is None or path in OPEN_PATHS or path.startswith(IMAGE_PATH):  # an <img> sends no key
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        presented = headers.get(b"x-api-key") or (token.strip() if scheme.lower() == b"bearer" else b"")
        if not hmac.compare_digest(hashlib.sha256(presented).hexdigest(), self.key_sha256):
            raise ApiError(401, "unauthorized", "send the API key as 'Authorization: Bearer <key>' or "
                                                "'X-API-Key: <key>'")


def _check_declared_length(declared: bytes | None, most: int) -> None:
    if declared is None:
        return
    if not declared.isdigit():
        raise ApiError(400, "bad_request", "Content-Length is not a number", "content-length")
    if len(declared) > 18 or int(declared) > most:
        raise _too_large(most)


def _counted(receive: Receive, most: int) -> Receive:
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b"")) if message["type"] == "http.request" else 0
        if seen > most:
            raise _too_large(most)
        return message

    return counted


def _too_large(most: int) -> ApiError:
    return ApiError(413, "body_too_large", f"the body is larger than {most} bytes")


def _request_id(sent: bytes | None) -> str:
    """The client's request id when it is harmless, else a new one."""
    return sent.decode() if sent is not None and REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex


def _named(send: Send, record: Record) -> Send:
    """`send` that puts the request's id on the answer, and the answer's status into the record."""
    async def send_named(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            kept = [pair for pair in message.get("headers", []) if pair[0] != b"x-request-id"]
            message = {**message, "headers": [*kept, (b"x-request-id", record.request_id.encode())]}
        await send(message)

    return send_named


async def _refuse(error: ApiError, request_id: str, send: Send) -> None:
    body = error_body(error, request_id)
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error_headers(error.status)}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
