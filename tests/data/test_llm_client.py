"""The client against a real HTTP server that fails, stalls and answers anything but a chat completion."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest
from chat_server import Reply, chat_server
from pydantic import ValidationError

from recsys_ray.data.llm_client import LlmClient, LlmConfig, LlmError, LlmRefused, LlmUnavailable, Pace

ASKED = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "{}"}]


def client_of(url: str, **change: Any) -> LlmClient:
    return LlmClient(LlmConfig.model_validate({"base_url": url, "model": "m", "timeout_s": 0.5, "max_retries": 2,
                                               **change}))


def test_an_answer_and_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "from-the-environment")
    with chat_server(lambda *_: Reply("hello")) as server:
        assert client_of(server.url, api_key_env="MY_KEY", temperature=0.5).ask(ASKED) == "hello"
        client_of(server.url, api_key_env="NO_SUCH_KEY", json_mode=False).ask(ASKED)
    first, second = server.requests
    assert first["messages"] == ASKED
    assert (first["model"], first["temperature"], first["response_format"]) == ("m", 0.5, {"type": "json_object"})
    assert "response_format" not in second
    assert server.keys == ["Bearer from-the-environment", "Bearer none"]


def test_what_passes_is_asked_again() -> None:
    failures = [Reply(status=500), Reply(status=429, headers={"Retry-After": "1"})]
    with chat_server(lambda _, number: failures[number] if number < 2 else Reply("at last")) as server:
        assert client_of(server.url).ask(ASKED) == "at last"
    assert len(server.requests) == 3
    assert server.times[2] - server.times[1] >= 1.0     # as the server told


@pytest.mark.parametrize("reply", [Reply(status=500), Reply(status=429), Reply(status=408), Reply(status=503)])
def test_a_server_that_only_fails_is_given_up(reply: Reply) -> None:
    with chat_server(lambda *_: reply) as server, pytest.raises(LlmUnavailable, match="after 1 retries"):
        client_of(server.url, max_retries=1).ask(ASKED)
    assert len(server.requests) == 2


def test_a_server_that_stalls_is_given_up_in_time() -> None:
    with chat_server(lambda *_: Reply("late", delay_s=3)) as server:
        start = time.monotonic()
        with pytest.raises(LlmUnavailable, match="APITimeoutError"):
            client_of(server.url, timeout_s=0.2, max_retries=1).ask(ASKED)
        assert time.monotonic() - start < 2.5


def test_no_server_at_all() -> None:
    with chat_server() as server:
        url = server.url
    with pytest.raises(LlmUnavailable, match="APIConnectionError"):
        client_of(url, max_retries=0).ask(ASKED)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_ends_the_run_with_the_mend(status: int) -> None:
    with (chat_server(lambda *_: Reply(status=status)) as server,
          pytest.raises(LlmError, match=r"llm\.model.*the key in")):
        client_of(server.url).ask(ASKED)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_text_is_that_text_s_failure(status: int) -> None:
    with chat_server(lambda *_: Reply(status=status)) as server, pytest.raises(LlmRefused, match=str(status)):
        client_of(server.url).ask(ASKED)
    assert len(server.requests) == 1


@pytest.mark.parametrize("raw", [b"", b"{", b"null", b"[]", b'{"choices": []}', b'{"choices": 5}', b'{"choices": [7]}',
                                 b'{"choices": [{"message": {"content": null}}]}', b"\xff\xfe", b"<html>busy</html>",
                                 b'{"choices": [{"message": {"content": {"a": 1}}}]}'])
@pytest.mark.parametrize("kind", ["application/json", "text/html"])
def test_anything_but_a_chat_completion_is_no_answer(raw: bytes, kind: str) -> None:
    with chat_server(lambda *_: Reply(raw=raw, headers={"Content-Type": kind})) as server:
        found = ""
        with contextlib.suppress(LlmRefused):
            found = client_of(server.url, max_retries=0).ask(ASKED)
        assert found == ""


def test_requests_leave_at_an_even_pace_retries_counted() -> None:
    with chat_server(lambda _, number: Reply(status=500 if number == 0 else 200, text="x")) as server:
        client = client_of(server.url, requests_per_minute=300)     # one in 0.2 s
        for _ in range(3):
            client.ask(ASKED)
    assert len(server.times) == 4
    assert all(later - earlier > 0.15 for earlier, later in zip(server.times, server.times[1:], strict=False))


def test_a_pace_without_limit_never_waits_and_one_with_catches_up_no_burst() -> None:
    now, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    Pace(None, lambda: now[0], sleep).wait()
    assert slept == []
    pace = Pace(60, lambda: now[0], sleep)
    pace.wait()
    pace.wait()
    now[0] += 10        # an idle time does not allow a burst
    pace.wait()
    pace.wait()
    assert slept == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://user:secret@host/v1"])
def test_addresses_that_cannot_be_used_are_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="http"):
        LlmConfig(base_url=url)
