"""Requests: what is accepted, what is refused, and that every refusal over HTTP is a clear 4xx."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from small_shop import REFUSED, Refusal, body, client, local_app, open_parts

from recsys_ray.serving.api import Limits, SearchFilters, SearchRequest, parse
from recsys_ray.serving.errors import ApiError


@pytest.fixture(scope="module")
def app(small_index: Path):  # type: ignore[no-untyped-def]
    return local_app(open_parts(small_index))


async def send(app, method: str, path: str, content: bytes | None, **headers: str) -> httpx.Response:  # type: ignore[no-untyped-def]
    async with client(app) as http:
        return await http.request(method, path, content=content, headers=headers)


@pytest.mark.parametrize("refusal", REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_request_is_refused_with_its_field(app, refusal: Refusal) -> None:  # type: ignore[no-untyped-def]
    method, path, content, status, field = refusal
    answer = asyncio.run(send(app, method, path, content))
    assert answer.status_code == status, answer.text
    value = answer.json()
    assert set(value) == {"error", "request_id"}
    assert set(value["error"]) == {"code", "message", "field"}
    assert value["error"]["message"]
    assert value["error"]["field"] == field
    assert value["request_id"] == answer.headers["x-request-id"]
    assert len(answer.content) < 600, "a refusal must not echo what was sent"
    assert not re.search(r"Traceback|\.py|pydantic|line \d+", answer.text)


def test_the_table_covers_the_named_abuses() -> None:
    assert len(REFUSED) >= 60
    assert {status for *_, status, _ in REFUSED.values()} == {400, 404, 405, 413, 422}


ODD_QUERIES = ["sofa", "  red   sofa ", "ﬁne café", "\u202esofa", "\U0001f469\u200d\U0001f467 lamp", "a" * 1000,
               "e" + "\u0301" * 50, "'; DROP TABLE products; --", "{{7*7}}", "-1", "null"]


@pytest.mark.parametrize("query", ODD_QUERIES)
def test_odd_but_honest_queries_are_answered(app, query: str) -> None:  # type: ignore[no-untyped-def]
    answer = asyncio.run(send(app, "POST", "/v1/search", body(query=query)))
    assert answer.status_code == 200, answer.text


def test_unknown_filter_values_match_nothing(app) -> None:  # type: ignore[no-untyped-def]
    answer = asyncio.run(send(app, "POST", "/v1/search", body(filters={"category": ["no such"]})))
    assert answer.status_code == 200
    assert answer.json()["items"] == []
    assert answer.json()["candidates"] == 0


@settings(max_examples=300)
@given(st.binary(max_size=300) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["query", "k", "offset", "sort", "filters", "category", "price_min", "x"]), inner, max_size=5),
).map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_request_or_a_refusal(content: bytes) -> None:
    try:
        request = parse(SearchRequest, content, Limits())
    except ApiError as error:
        refused = error
    else:
        assert request.k >= 1
        assert request.offset + request.k <= Limits().max_window
        return
    assert refused.status in (400, 422)
    (refused.message + (refused.field or "")).encode()


def test_limits_are_those_of_the_configuration() -> None:
    tight = Limits(max_query_chars=5, max_k=3, max_window=4)
    assert parse(SearchRequest, body(query="abcde", k=3, offset=1), tight).k == 3
    for bad in (body(query="abcdef", k=1), body(query="a", k=4), body(query="a", k=3, offset=2)):
        with pytest.raises(ApiError) as error:
            parse(SearchRequest, bad, tight)
        assert error.value.status == 422
    with pytest.raises(ValidationError, match="raise max_window"):
        Limits(max_k=10, max_window=5)


@pytest.mark.parametrize(("price", "cents"), [(19.99, 1999), (0.29, 29), (1.15, 115), (0, 0), (1e9, 10**11)])
def test_prices_become_exact_cents(price: float, cents: int) -> None:
    assert SearchFilters(price_min=price).to_filters().price_min_cents == cents
