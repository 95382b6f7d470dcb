"""Scatter-gather: late and broken shards, readiness, and answers equal to those of one process."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from small_shop import LIMITS, RETRIEVER, WordEncoder, body, catalogue, open_parts

from recsys_ray.retrieval.segments import open_index
from recsys_ray.serving.api import SearchRequest, parse
from recsys_ray.serving.errors import ApiError
from recsys_ray.serving.gateway import Gateway
from recsys_ray.serving.recommender import Recommender


def request(**fields: object) -> SearchRequest:
    return parse(SearchRequest, body(**fields), LIMITS)


def test_over_shards_the_answer_is_that_of_one_process(small_index: Path) -> None:
    one_process = Recommender(open_index(small_index), WordEncoder(), RETRIEVER)  # type: ignore[arg-type]
    asked = request(query="oak table", k=15, sort="price_desc", filters={"category": ["home"]})
    answer = asyncio.run(open_parts(small_index).gateway().search(asked, "id-1"))
    expected = one_process.search(asked)
    assert answer.items == expected["items"]
    assert answer.candidates == expected["candidates"]
    assert answer.facets.model_dump() == expected["facets"]
    assert (answer.shards_answered, answer.shards_total, answer.request_id) == (2, 2, "id-1")
    assert answer.index_version == one_process.index.version
    assert set(answer.took_ms) == {"encode", "shards", "rank"}
    similar = asyncio.run(open_parts(small_index).gateway().similar("P010", 6, "id-2"))
    assert similar.items == one_process.similar("P010", 6)


def test_a_late_shard_is_left_out_and_said_so(small_index: Path) -> None:
    parts = open_parts(small_index)
    parts.delays[1] = 30
    started = time.monotonic()
    answer = asyncio.run(parts.gateway(deadline_s=0.1).search(request(k=50), "id"))
    assert time.monotonic() - started < 5
    assert (answer.shards_answered, answer.shards_total) == (1, 2)
    in_first = {row["product_id"] for row in catalogue()[0::3]}
    assert answer.items
    assert {hit.product_id for hit in answer.items} <= in_first


def test_a_broken_shard_does_not_break_the_answer(small_index: Path) -> None:
    parts = open_parts(small_index)
    parts.broken.add(0)
    answer = asyncio.run(parts.gateway().search(request(), "id"))
    assert answer.shards_answered == 1
    assert answer.items


def test_without_any_shard_there_is_no_answer(small_index: Path) -> None:
    parts = open_parts(small_index)
    parts.broken.update({0, 1})
    with pytest.raises(ApiError) as error:
        asyncio.run(parts.gateway().search(request(), "id"))
    assert (error.value.status, error.value.code) == (503, "shards_unavailable")


def test_a_product_that_may_be_on_a_silent_shard_is_not_called_unknown(small_index: Path) -> None:
    parts = open_parts(small_index)
    parts.broken.add(1)
    gateway = parts.gateway()
    assert asyncio.run(gateway.product("P000", "id")).product.title == "red sofa number0"
    with pytest.raises(ApiError) as error:
        asyncio.run(gateway.product("P001", "id"))
    assert error.value.status == 503
    parts.broken.clear()
    with pytest.raises(ApiError) as error:
        asyncio.run(gateway.product("P999", "id"))
    assert error.value.status == 404


def test_an_encoder_that_fails_is_a_503_and_a_bad_text_a_422(small_index: Path) -> None:
    parts = open_parts(small_index)
    with pytest.raises(ApiError) as error:
        asyncio.run(parts.gateway().search(request(query="poison"), "id"))
    assert error.value.status == 422
    parts.encoder.encode_queries = lambda texts: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ApiError) as error:
        asyncio.run(parts.gateway().search(request(query="sofa"), "id"))
    assert error.value.status == 503


def test_readiness_names_the_part_that_is_missing(small_index: Path) -> None:
    parts = open_parts(small_index)
    ready = asyncio.run(parts.gateway().readiness())
    assert (ready.ready, ready.shards_ready, ready.encoder_ready, ready.problems) == (True, 2, True, [])
    parts.broken.add(1)
    broken = asyncio.run(parts.gateway().readiness())
    assert (broken.ready, broken.shards_ready) == (False, 1)
    assert broken.problems == ["shard 1: does not answer"]


def test_a_gateway_needs_a_shard() -> None:
    with pytest.raises(ValueError, match="at least one shard"):
        Gateway([], None, config=RETRIEVER, index_version="v", deadline_s=1)
