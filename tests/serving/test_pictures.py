"""Searching by pictures over HTTP: answers, what is refused and how, and what the page does with it."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from small_pictures import WITHOUT, build_small_hybrid, photograph, pictured
from small_shop import client, local_app, open_parts


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_hybrid(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def app(small_index: Path, hybrid: Path) -> FastAPI:
    return pictured(open_parts(small_index), hybrid)


def call(app: FastAPI, path: str = "/v1/search", method: str = "POST", **sent: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        async with client(app) as http:
            return await http.request(method, path, **sent)

    return asyncio.run(once())


def sent(picture: bytes, **fields: object) -> dict[str, Any]:
    return {"json": {"picture": base64.b64encode(picture).decode(), **fields}}


def test_a_picture_in_json_finds_what_looks_like_it(app: FastAPI) -> None:
    answer = call(app, **sent(photograph("blue"), k=12)).json()
    assert [one["rank"] for one in answer["items"]] == list(range(1, 13))
    assert all("blue" in one["title"] for one in answer["items"])
    assert set(answer["took_ms"]) == {"pictures", "shards"}
    assert answer["facets"]["category"]
    page = call(app, **sent(photograph("blue"), k=4, offset=8)).json()
    assert page["items"] == answer["items"][8:]
    seats = call(app, **sent(photograph("blue"), filters={"category": ["seating"]}, sort="price_asc")).json()["items"]
    assert {one["category"] for one in seats} == {"seating"}
    prices = [one["price"] for one in seats if one["price"] is not None]
    assert prices == sorted(prices)


def test_words_beside_it_say_which(app: FastAPI) -> None:
    both = call(app, **sent(photograph("green", kind="JPEG"), query="mirror", k=3)).json()
    assert all("green mirror" in one["title"] for one in both["items"])
    assert "encode" in both["took_ms"]


def test_a_form_with_a_file_says_the_same(app: FastAPI) -> None:
    form = call(app, files={"picture": ("red.png", photograph("red"))}, data={"request": json.dumps({"k": 5})}).json()
    assert form["items"] == call(app, **sent(photograph("red"), k=5)).json()["items"]


def test_words_alone_are_answered_as_without_pictures(app: FastAPI, small_index: Path) -> None:
    asked = {"query": "oak table", "k": 7, "system": "retriever"}
    plain = call(local_app(open_parts(small_index)), json=asked).json()
    assert call(app, json=asked).json()["items"] == plain["items"]


def test_products_that_look_like_one(app: FastAPI) -> None:
    answer = call(app, "/v1/products/P001/similar?by=looks&k=6", "GET").json()
    assert len(answer["items"]) == 6
    assert all("blue" in one["title"] for one in answer["items"])
    assert "P001" not in {one["product_id"] for one in answer["items"]}
    by_text = call(app, "/v1/products/P001/similar?k=6", "GET").json()
    assert by_text["items"] != answer["items"]


def test_what_the_index_no_longer_has_is_made_up_for(small_index: Path, hybrid: Path) -> None:
    """Pictures of products that are gone cost no place on the page, nor do conditions that only the shards know."""
    parts = open_parts(small_index)
    parts.indexes = parts.indexes[:1]
    answer = call(pictured(parts, hybrid), **sent(photograph("blue"), k=20)).json()
    kept = {one for segment in parts.indexes[0].segments for one in segment.product_ids}
    assert len(answer["items"]) == 20
    assert {one["product_id"] for one in answer["items"]} <= kept


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it has side x side pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"-")) + chunk(b"IEND", b"")


REFUSED: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "no picture at all": (sent(b"hello"), 422, "bad_picture", "does not decode"),
    "empty": (sent(b""), 422, "bad_picture", "no bytes"),
    "a bomb": (sent(bomb(6000)), 422, "bad_picture", "6000 x 6000 pixels; the limit"),
    "a larger bomb": (sent(bomb(30_000)), 422, "bad_picture", "900000000 pixels"),
    "a cut file": (sent(photograph("red")[:60]), 422, "bad_picture", "does not decode"),
    "too thin": (sent(photograph("red", (400, 4))), 422, "bad_picture", "shorter side"),
    "no base64": ({"json": {"picture": "not/base 64!"}}, 422, "invalid_request", "base64"),
    "a number": ({"json": {"picture": 5}}, 422, "invalid_request", "valid bytes"),
    "too large": (sent(bytes(30_000)), 413, "body_too_large", "20000 bytes"),
    "far too large": (sent(bytes(200_000)), 413, "body_too_large", "the body"),
    "neither words nor a picture": ({"json": {"k": 3}}, 422, "invalid_request", "required"),
    "a system": (sent(b"x", system="bm25"), 422, "unknown_field", "no such field"),
    "beyond the window": (sent(b"x", k=50, offset=50), 422, "invalid_request", "at most 60"),
    "a form without a file": ({"files": {"request": (None, "{}")}}, 422, "invalid_request", "picture is missing"),
    "a form with more": ({"files": {"picture": b"x"}, "data": {"k": "3"}}, 422, "unknown_field", "a form has"),
    "a form with broken JSON": ({"files": {"picture": b"x"}, "data": {"request": "{"}}, 400, "invalid_json", "JSON"),
    "a form with two": ({"files": {"picture": b"x"}, "data": {"request": json.dumps({"picture": "eA=="})}}, 422,
                        "invalid_request", "given twice"),
    "a torn form": ({"content": b"--x\r\nnothing", "headers": {"content-type": "multipart/form-data; boundary=x"}},
                    422, "invalid_request", "picture is missing"),
    "a form without a boundary": ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400,
                                  "bad_request", "could not be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_pictures_are_refused_with_the_reason(app: FastAPI, name: str) -> None:
    request, status, code, reason = REFUSED[name]
    answer = call(app, **request)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert reason in answer.json()["error"]["message"]


def test_where_there_is_no_picture_that_is_said(app: FastAPI, small_index: Path) -> None:
    bare = call(app, f"/v1/products/P{WITHOUT + 1}/similar?by=looks", "GET")
    assert (bare.status_code, bare.json()["error"]["message"]) == (422, "the product has no picture")
    without = local_app(open_parts(small_index))
    assert call(without, **sent(photograph("red"), query="sofa")).json()["error"]["code"] == "unknown_field"
    assert call(without, "/v1/products/P001/similar?by=looks", "GET").status_code == 404
    assert call(app, "/v1/products/P001/similar?by=smell", "GET").status_code == 422


def test_the_document_shows_both_bodies_and_its_example_works(app: FastAPI) -> None:
    body = call(app, "/openapi.json", "GET").json()["paths"]["/v1/search"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data"}
    examples = [one["value"] for one in body["application/json"]["examples"].values()]
    assert any("picture" in one for one in examples)
    for one in examples:
        assert call(app, json=one).status_code == 200
