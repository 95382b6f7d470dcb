"""The gate before the application: body sizes, keys, request ids, unforeseen errors."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from small_shop import LIMITS, body, client, local_app, open_parts

from recsys_ray.config import ConfigError
from recsys_ray.serving.limits import API_KEY, Gate, api_key_digest
from recsys_ray.serving.records import Record
from recsys_ray.serving.routes import create_api

KEY = "correct horse battery staple"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()


class Stream:
    """A body of many chunks that counts how many were taken."""

    def __init__(self, chunks: int, size: int) -> None:
        self.chunks, self.size, self.taken = chunks, size, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(self.chunks):
            self.taken += 1
            yield b"x" * self.size


async def post(app, content: object, **headers: str) -> httpx.Response:  # type: ignore[no-untyped-def]
    async with client(app) as http:
        return await http.post("/v1/search", content=content, headers=headers)  # type: ignore[arg-type]


def raw(app, *, headers: list[tuple[bytes, bytes]], messages: list[dict]) -> tuple[int, bytes, int]:  # type: ignore[no-untyped-def, type-arg]
    """Status, body and number of messages taken, of a request given as ASGI messages."""
    sent: list[dict] = []  # type: ignore[type-arg]
    taken = 0

    async def receive() -> dict:  # type: ignore[type-arg]
        nonlocal taken
        taken += 1
        return messages[min(taken, len(messages)) - 1]

    async def send(message: dict) -> None:  # type: ignore[type-arg]
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/search", "raw_path": b"/v1/search", "query_string": b"",
             "headers": headers, "http_version": "1.1", "scheme": "http", "server": ("shop", 80), "client": ("c", 1),
             "root_path": "", "asgi": {"version": "3.0"}}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(one.get("body", b"") for one in sent[1:]), taken


def test_a_declared_300_mb_body_is_refused_before_it_is_read(small_index: Path) -> None:
    app = local_app(open_parts(small_index))
    status, text, taken = raw(app, headers=[(b"content-length", b"300000000")], messages=[])
    assert (status, taken) == (413, 0)
    assert b"body_too_large" in text


def test_an_undeclared_300_mb_body_is_counted_and_cut_off_early(small_index: Path) -> None:
    app = local_app(open_parts(small_index))
    chunk = {"type": "http.request", "body": b"x" * 16_384, "more_body": True}
    tracemalloc.start()
    status, text, taken = raw(app, headers=[], messages=[chunk] * 18_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert status == 413
    assert taken == LIMITS.max_body_bytes // 16_384 + 1
    assert peak < 5 << 20
    assert b"body_too_large" in text


def test_a_lying_content_length_does_not_help(small_index: Path) -> None:
    app = local_app(open_parts(small_index))
    chunk = {"type": "http.request", "body": b"x" * 70_000, "more_body": True}
    assert raw(app, headers=[(b"content-length", b"10")], messages=[chunk])[0] == 413
    for bad in (b"-1", b"1e3", b"", b"\xb2"):
        assert raw(app, headers=[(b"content-length", bad)], messages=[chunk])[0] == 400
    assert raw(app, headers=[(b"content-length", b"9" * 5000)], messages=[chunk])[0] == 413


def test_a_body_at_the_limit_is_read(small_index: Path) -> None:
    app = local_app(open_parts(small_index))
    padded = body()[:-1] + b" " * (LIMITS.max_body_bytes - len(body())) + b"}"
    assert len(padded) == LIMITS.max_body_bytes
    assert asyncio.run(post(app, padded)).status_code == 200
    assert asyncio.run(post(app, padded + b" ")).status_code == 413


def test_with_a_key_only_its_bearers_are_answered(small_index: Path) -> None:
    app = local_app(open_parts(small_index), DIGEST)
    accepted = [{"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {KEY}"}, {"x-api-key": KEY}]
    refused = [{}, {"authorization": "Bearer"}, {"authorization": f"Basic {KEY}"}, {"authorization": KEY},
               {"x-api-key": KEY + "x"}, {"x-api-key": DIGEST}, {"x-api-key": ""}, {"x-api-key": b"\xe9"}]
    for headers in accepted:
        assert asyncio.run(post(app, body(), **headers)).status_code == 200
    for headers in refused:
        answer = asyncio.run(post(app, body(), **headers))  # type: ignore[arg-type]
        assert answer.status_code == 401, headers
        assert answer.headers["www-authenticate"] == "Bearer"


def test_with_a_key_everything_but_the_probes_and_the_page_is_closed(small_index: Path) -> None:
    app = local_app(open_parts(small_index), DIGEST)

    async def statuses(paths: list[str]) -> list[int]:
        async with client(app) as http:
            return [(await http.get(path)).status_code for path in paths]

    opened = ["/healthz", "/readyz", "/", "/static/search.js", "/static/search.css"]
    assert asyncio.run(statuses(opened)) == [200] * len(opened)
    closed = ["/static/", "/v1/products/P001", "/docs", "/openapi.json", "/nowhere", "/healthz/"]
    assert asyncio.run(statuses(closed)) == [401] * len(closed)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "shop.example"])
def test_an_open_host_needs_a_key(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    with pytest.raises(ConfigError, match=API_KEY):
        api_key_digest(host)
    monkeypatch.setenv(API_KEY, "short")
    with pytest.raises(ConfigError, match="at least 16"):
        api_key_digest(host)
    monkeypatch.setenv(API_KEY, KEY)
    assert api_key_digest(host) == DIGEST


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.9.1"])
def test_this_machine_needs_none(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    assert api_key_digest(host) is None


def test_a_request_id_is_kept_when_harmless_and_replaced_when_not(small_index: Path) -> None:
    app = local_app(open_parts(small_index))
    kept = asyncio.run(post(app, body(), **{"x-request-id": "order-7.a"}))
    assert kept.headers["x-request-id"] == kept.json()["request_id"] == "order-7.a"
    for bad in ("a b", "a" * 65, "<script>", ""):
        replaced = asyncio.run(post(app, body(), **{"x-request-id": bad}))
        assert len(replaced.headers["x-request-id"]) == 32


def test_an_unforeseen_error_says_nothing_about_the_code() -> None:
    async def broken(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        raise RuntimeError("secret of /srv/app.py")

    records: list[Record] = []
    gate = Gate(broken, max_body_bytes=100, max_in_flight=1, key_sha256=None, observe=records.append)
    status, text, _ = raw(gate, headers=[], messages=[])
    assert status == 500
    assert b"internal_error" in text
    assert b"secret" not in text
    assert [(one.status, one.path) for one in records] == [(500, "other")]
    assert gate.in_flight == 0


def test_more_requests_than_there_is_room_for_are_sent_away_and_probes_never_are(small_index: Path) -> None:
    parts = open_parts(small_index)
    parts.delays[0] = 0.3
    app = create_api(parts.gateway(), LIMITS.replace(max_in_flight=3))

    async def crowd() -> tuple[list[httpx.Response], httpx.Response]:
        async with client(app) as http:
            waiting = [asyncio.ensure_future(http.post("/v1/search", content=body())) for _ in range(8)]
            await asyncio.sleep(0.1)
            probe = await http.get("/healthz")
            return list(await asyncio.gather(*waiting)), probe

    answers, probe = asyncio.run(crowd())
    assert sorted(one.status_code for one in answers) == [200] * 3 + [429] * 5
    refused = next(one for one in answers if one.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "overloaded"
    assert probe.status_code == 200
    assert asyncio.run(post(app, body())).status_code == 200    # there is room again


def test_every_request_leaves_one_line_without_the_shoppers_words(small_index: Path,
                                                                  caplog: pytest.LogCaptureFixture) -> None:
    app = local_app(open_parts(small_index))
    with caplog.at_level(logging.INFO, "recsys_ray.requests"):
        asyncio.run(post(app, body(query="a secret wish"), **{"x-request-id": "r-1"}))
        asyncio.run(post(app, b"{"))
        asyncio.run(get(app, "/healthz"))
        asyncio.run(get(app, "/v1/products/P001"))
    lines = [json.loads(one.message) for one in caplog.records if one.name == "recsys_ray.requests"]
    assert [(one["path"], one["status"]) for one in lines] == [
        ("/v1/search", 200), ("/v1/search", 400), ("/v1/products/{product_id:path}", 200)]
    assert lines[0]["request_id"] == "r-1"
    assert set(lines[0]["stages_ms"]) == {"encode", "shards", "rank"}
    assert 0 < sum(lines[0]["stages_ms"].values()) <= lines[0]["ms"]
    assert "secret" not in caplog.text
    told = create_api(open_parts(small_index).gateway(), LIMITS, log_queries=True)
    with caplog.at_level(logging.INFO, "recsys_ray.requests"):
        asyncio.run(post(told, body(query="a secret wish")))
    assert json.loads(caplog.records[-1].message)["query"] == "a secret wish"


async def get(app, path: str) -> httpx.Response:  # type: ignore[no-untyped-def]
    async with client(app) as http:
        return await http.get(path)
