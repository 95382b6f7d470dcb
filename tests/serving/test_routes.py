"""The HTTP surface: good answers, documents with examples, and generated requests that never cause a 5xx."""

from __future__ import annotations

import asyncio
import html
import json
import re
from pathlib import Path

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from small_shop import LIMITS, RETRIEVER, WordEncoder, body, client, local_app, open_parts

from recsys_ray.retrieval.segments import open_index
from recsys_ray.serving.api import SearchRequest, parse
from recsys_ray.serving.recommender import Recommender


@pytest.fixture(scope="module")
def app(small_index: Path) -> FastAPI:
    return local_app(open_parts(small_index))


def get(app: FastAPI, path: str, method: str = "GET", content: bytes | None = None):  # type: ignore[no-untyped-def]
    async def call():  # type: ignore[no-untyped-def]
        async with client(app) as http:
            return await http.request(method, path, content=content)

    return asyncio.run(call())


def test_over_http_the_answers_are_those_of_the_recommender(app: FastAPI, small_index: Path) -> None:
    recommender = Recommender(open_index(small_index), WordEncoder(), RETRIEVER)  # type: ignore[arg-type]
    for fields in ({"query": "blue lamp", "k": 20}, {"query": "sofa", "sort": "rating", "offset": 4},
                   {"query": "oak", "filters": {"brand": ["Haus"], "price_max": 99.5}}):
        content = body(**fields)
        expected = recommender.search(parse(SearchRequest, content, LIMITS))
        answer = get(app, "/v1/search", "POST", content).json()
        assert answer["items"] == [json.loads(hit.model_dump_json()) for hit in expected["items"]]
        assert answer["facets"] == expected["facets"]
        assert answer["items"]


def test_products_and_their_neighbours(app: FastAPI) -> None:
    product = get(app, "/v1/products/P003").json()["product"]
    assert product == {"product_id": "P003", "title": "oak table number3", "brand": "Nord", "category": "home",
                       "price": 14.11, "rating": None, "num_reviews": 3, "image_url": None, "concerns": None}
    similar = get(app, "/v1/products/P003/similar?k=4").json()
    assert len(similar["items"]) == 4
    assert similar["product_id"] == "P003"


def test_an_id_with_a_slash_and_a_space_is_found(app: FastAPI) -> None:
    assert get(app, "/v1/products/odd%2Fid%207").json()["product"]["title"] == "green lamp number7"
    assert get(app, "/v1/products/odd%2Fid%207/similar?k=2").json()["product_id"] == "odd/id 7"


def test_health_is_about_the_process_and_readiness_about_the_parts(small_index: Path) -> None:
    parts = open_parts(small_index)
    parts.broken.add(0)
    app = local_app(parts)
    assert get(app, "/healthz").status_code == 200
    ready = get(app, "/readyz")
    assert ready.status_code == 503
    assert ready.json()["shards_ready"] == 1


def test_an_overloaded_or_broken_service_says_when_to_come_back(small_index: Path) -> None:
    parts = open_parts(small_index)
    parts.broken.update({0, 1})
    answer = get(local_app(parts), "/v1/search", "POST", body())
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "shards_unavailable"


def test_the_document_describes_the_service_with_examples_that_work(app: FastAPI) -> None:
    document = get(app, "/openapi.json").json()
    assert set(document["paths"]) == {"/v1/search", "/v1/products/{product_id}", "/v1/products/{product_id}/similar",
                                      "/healthz", "/readyz"}
    search = document["paths"]["/v1/search"]["post"]
    assert {"200", "400", "401", "413", "422", "503"} <= set(search["responses"])
    content = search["requestBody"]["content"]["application/json"]
    assert content["schema"]["properties"]["query"]["maxLength"] == 1000
    assert len(content["examples"]) >= 2
    for example in content["examples"].values():
        assert get(app, "/v1/search", "POST", json.dumps(example["value"]).encode()).status_code == 200
    references = {part.split("/")[-1].rstrip('"') for part in json.dumps(document).split("#/components/schemas/")[1:]
                  for part in [part.split('"')[0]]}
    assert references <= set(document["components"]["schemas"])
    assert "HTTPValidationError" not in references


def test_the_documentation_page_needs_nothing_from_elsewhere_and_shows_every_operation(app: FastAPI) -> None:
    page, document = get(app, "/docs"), get(app, "/openapi.json").json()
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.findall(r"""(?:https?:)?//[a-z]|src=|@import|url\(""", page.text)
    sections = re.findall(r'<section data-method="(\w+)" data-path="([^"]+)">', page.text)
    assert sections == [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]
    examples = [json.loads(html.unescape(text)) for text in re.findall(r'data-example="([^"]+)"', page.text)]
    content = document["paths"]["/v1/search"]["post"]["requestBody"]["content"]["application/json"]
    assert examples == [example["value"] for example in content["examples"].values()]
    for name in document["components"]["schemas"]:
        assert f'<section id="{name}">' in page.text


def test_generated_requests_never_cause_a_server_error(app: FastAPI) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    seen: list[int] = []

    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy()

        @settings(max_examples=120, deadline=None, database=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))
        @given(case=strategy)
        def check(case) -> None:  # type: ignore[no-untyped-def]
            answer = case.call()
            seen.append(answer.status_code)
            assert answer.status_code < 500, answer.text

        check()
    assert len(seen) >= 300
    assert 200 in seen
