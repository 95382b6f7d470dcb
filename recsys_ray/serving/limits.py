"""What stands before the application: request ids, the API key, and bodies that are too large.

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
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recsys_ray.config import ConfigError
from recsys_ray.serving.errors import ApiError, error_body, error_headers

log = logging.getLogger(__name__)

API_KEY = "RECSYS_API_KEY"
MIN_KEY_CHARS = 16
OPEN_PATHS = frozenset({"/healthz", "/readyz"})  # probes carry no key, and learn nothing about the catalogue
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
    """ASGI middleware: names the request, checks the key, bounds the body, and hides unforeseen errors."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, key_sha256: str | None) -> None:
        self.app, self.max_body_bytes, self.key_sha256 = app, max_body_bytes, key_sha256

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with 401, 413 or 500."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                kept = [pair for pair in message.get("headers", []) if pair[0] != b"x-request-id"]
                message = {**message, "headers": [*kept, (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            self._check_declared_length(headers.get(b"content-length"))
            await self.app(scope, self._counted(receive), send_named)
        except ApiError as error:
            if not started:
                await _refuse(error, request_id, send_named)
        except Exception:
            log.exception("request %s failed", request_id)
            if not started:
                await _refuse(ApiError(500, "internal_error", "something went wrong"), request_id, send_named)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.key_sha256 is None or path in OPEN_PATHS:
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        presented = headers.get(b"x-api-key") or (token.strip() if scheme.lower() == b"bearer" else b"")
        if not hmac.compare_digest(hashlib.sha256(presented).hexdigest(), self.key_sha256):
            raise ApiError(401, "unauthorized", "send the API key as 'Authorization: Bearer <key>' or "
                                                "'X-API-Key: <key>'")

    def _check_declared_length(self, declared: bytes | None) -> None:
        if declared is None:
            return
        if not declared.isdigit():
            raise ApiError(400, "bad_request", "Content-Length is not a number", "content-length")
        if len(declared) > 18 or int(declared) > self.max_body_bytes:
            raise self._too_large()

    def _counted(self, receive: Receive) -> Receive:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b"")) if message["type"] == "http.request" else 0
            if seen > self.max_body_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        return ApiError(413, "body_too_large", f"the body is larger than {self.max_body_bytes} bytes")


def _request_id(sent: bytes | None) -> str:
    """The client's request id when it is harmless, else a new one."""
    return sent.decode() if sent is not None and REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex


async def _refuse(error: ApiError, request_id: str, send: Send) -> None:
    body = error_body(error, request_id)
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error_headers(error.status)}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
