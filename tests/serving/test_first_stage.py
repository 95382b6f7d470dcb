"""`/v1/recommend`: histories known and unknown, filters, what was seen, and parity with one process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from small_shop import (
    DEPTH,
    LIMITS,
    RETRIEVER,
    Parts,
    WordEncoder,
    catalogue,
    client,
    local_app,
    open_parts,
    small_first_stage,
    small_reranker,
)

from recsys_ray.artifacts import ArtifactError, stage
from recsys_ray.config import Config
from recsys_ray.data.interactions import ContextConfig, History, Items, catalogue_table, context_text
from recsys_ray.models.cross_encoder import CrossEncoderConfig
from recsys_ray.ranking.recommenders import Recommender as Fitted
from recsys_ray.retrieval.segments import open_index
from recsys_ray.serving.api import RecommendRequest, parse
from recsys_ray.serving.first_stage import FirstStage, open_first_stage
from recsys_ray.serving.recommender import Recommender, history_query

SOFAS = ["P000", "P006", "P012"]


@pytest.fixture(scope="module")
def first() -> FirstStage:
    return small_first_stage()


def parts_with(root: Path, first: FirstStage) -> Parts:
    parts = open_parts(root)
    parts.first = first
    return parts


def post(parts: Parts, expected: int = 200, **fields: object) -> dict[str, Any]:
    async def call() -> httpx.Response:
        async with client(local_app(parts)) as http:
            return await http.post("/v1/recommend", content=json.dumps(fields).encode())

    answer = asyncio.run(call())
    assert answer.status_code == expected, answer.text
    found: dict[str, Any] = answer.json()
    return found


def shown(answer: dict[str, Any]) -> list[str]:
    return [item["product_id"] for item in answer["items"]]


def test_who_has_sofas_is_shown_sofas_and_none_they_have(small_index: Path, first: FirstStage) -> None:
    answer = post(parts_with(small_index, first), history=SOFAS, k=10)
    assert len(shown(answer)) == 10
    assert all("sofa" in item["title"] for item in answer["items"])
    assert not set(shown(answer)) & set(SOFAS)
    assert (answer["source"], answer["fallback"], answer["known"]) == ("ease", False, 3)
    assert set(answer["took_ms"]) == {"recommender", "shards"}


@pytest.mark.parametrize("history", [[], ["no such product"], ["\u2603", "P999"]])
def test_without_a_known_history_popular_products_are_shown_and_it_says_so(small_index: Path, first: FirstStage,
                                                                           history: list[str]) -> None:
    answer = post(parts_with(small_index, first), history=history, k=5)
    assert (answer["source"], answer["fallback"], answer["known"]) == ("popularity", True, 0)
    model = first.model
    assert isinstance(model, Fitted)
    popular = np.lexsort((np.arange(len(model.items)), -model.popularity))[:5]
    assert shown(answer) == [model.items[place] for place in popular]


def test_what_was_seen_elsewhere_is_not_shown(small_index: Path, first: FirstStage) -> None:
    before = shown(post(parts_with(small_index, first), history=SOFAS, k=10))
    answer = post(parts_with(small_index, first), history=SOFAS, seen=before[:4], k=10)
    assert shown(answer)[:6] == before[4:]


def test_filters_reach_beyond_the_head_of_the_list(small_index: Path, first: FirstStage) -> None:
    wanted = {row["product_id"] for row in catalogue() if row["brand"] == "Nord" and row["category"] == "home"
              and row["product_id"] in first.model.items}
    answer = post(parts_with(small_index, first), history=SOFAS, k=50, filters={"brand": ["Nord"],
                                                                                "category": ["home"]})
    assert set(shown(answer)) == wanted     # although sofas fill the head
    assert len(wanted) > 10
    assert answer["candidates"] == len(wanted)


def test_bad_requests_name_their_field(small_index: Path, first: FirstStage) -> None:
    parts = parts_with(small_index, first)
    for fields, field in (({}, "history"), ({"history": "P000"}, "history"), ({"history": [""]}, "history"),
                          ({"history": ["a"] * 201}, "history"), ({"history": [], "k": 0}, "k"),
                          ({"history": [], "offset": 1}, "offset"), ({"history": [], "seen": [5]}, "seen.0"),
                          ({"history": [], "user_id": "\0"}, "user_id")):
        assert post(parts, 422, **fields)["error"]["field"] == field, fields


def test_a_service_without_a_recommender_has_no_such_path(small_index: Path) -> None:
    assert post(open_parts(small_index), 404, history=[])["error"]["code"] == "not_found"


def test_a_recommender_that_fails_is_a_503(small_index: Path, first: FirstStage) -> None:
    parts = parts_with(small_index, first)
    parts.broken.add("recommender")
    assert post(parts, 503, history=[])["error"]["code"] == "recommender_unavailable"


@pytest.mark.parametrize("reranked", [False, True])
def test_over_shards_the_list_is_that_of_one_process(small_index: Path, first: FirstStage, reranked: bool,
                                                     tiny_pair_model: Callable[..., Path], tmp_path: Path) -> None:
    parts = parts_with(small_index, first)
    if reranked:
        cross = CrossEncoderConfig(model=str(tiny_pair_model()), max_tokens=48, device="cpu", dtype="float32")
        parts.reranker = small_reranker(tmp_path, cross)
    offline = Recommender(open_index(small_index), WordEncoder(), RETRIEVER)  # type: ignore[arg-type]
    for fields in ({"history": SOFAS, "k": 12, "explain": True}, {"history": [], "k": 5},
                   {"history": ["P003"], "k": 20, "filters": {"price_max": 80.0}, "explain": True}):
        request = parse(RecommendRequest, json.dumps(fields).encode(), LIMITS)
        expected = offline.recommend(first, request, DEPTH, parts.reranker)
        answer = post(parts, **fields)
        assert shown(answer) == [hit.product_id for hit in expected["items"]]
        assert answer["candidates"] == expected["candidates"]
        for item, hit in zip(answer["items"], expected["items"], strict=True):
            assert item["score"] == pytest.approx(hit.score, abs=1e-5)
            if request.explain:
                assert item["explanation"]["first_rank"] == hit.explanation.first_rank
                assert ("ranker" in item["explanation"]["scores"]) == reranked
        assert not answer["degraded"]


def test_popular_products_are_shown_under_the_same_rules(small_index: Path, first: FirstStage, tmp_path: Path) -> None:
    parts = parts_with(small_index, first)
    plain = shown(post(parts, history=[], k=12))
    parts.reranker = small_reranker(tmp_path, None, diversity=0.2)
    answer = post(parts, history=[], k=12, explain=True)
    assert set(answer["took_ms"]) == {"recommender", "shards", "rows"}      # no ranker was asked
    assert not any("ranker" in item["explanation"]["scores"] for item in answer["items"])
    assert shown(answer) != plain
    assert not set(answer["items"][0]["title"].split()) & set(answer["items"][1]["title"].split())
    offline = Recommender(open_index(small_index), WordEncoder(), RETRIEVER)  # type: ignore[arg-type]
    request = parse(RecommendRequest, json.dumps({"history": [], "k": 12}).encode(), LIMITS)
    expected = offline.recommend(first, request, DEPTH, parts.reranker)
    assert shown(answer) == [hit.product_id for hit in expected["items"]]


def test_a_history_is_read_as_the_contexts_of_training_are() -> None:
    products = pa.Table.from_pylist([
        {"product_id": name, "title": title, "author": author, "description": None, "categories": categories}
        for name, title, author, categories in (("a", "Dune", "F. Herbert", ["novels"]), ("b", "Emma", None, []),
                                                ("c", "Atlas", None, ["maps"]), ("d", "Ivanhoe", None, ["novels"]))])
    items = Items(catalogue_table(products, None, None, None, 5))
    bought = History("u", np.arange(4), np.full(4, 5.0), np.array([40, 30, 20, 10]), ("rating",) * 4)
    trained = context_text(bought, np.arange(4), items, ContextConfig(), seed=7)
    cards = [{"product_id": one["product_id"], "title": one["title"], "brand": one["author"],
              "category": next(iter(one["categories"]), None)} for one in products.to_pylist()]
    assert history_query(["d", "c", "a", "x", "b", "a"], cards) == trained == (
        "Likes: Dune by F. Herbert; Emma; Atlas; Ivanhoe. Genres: novels, maps.")


def test_an_artefact_of_recommenders_is_opened_by_name(tmp_path: Path, first: FirstStage) -> None:
    with pytest.raises(ArtifactError, match="no recommenders artefact"):
        open_first_stage(tmp_path, "ease")
    with stage(tmp_path, "recommenders", "x") as staging:
        assert isinstance(first.model, Fitted)
        files = [staging.entry(f"ease/{name}") for name in first.model.save(staging.path / "ease")]
        staging.commit(files, config=Config(), facts={"chosen": {"ease": {}}})
    opened = open_first_stage(tmp_path, "ease")
    again, before = opened.suggest(SOFAS, 9), first.suggest(SOFAS, 9)
    assert (again.product_ids, again.source, again.known) == (before.product_ids, "ease", 3)
    assert not again.complete
    assert opened.suggest(SOFAS, 10_000).complete
    with pytest.raises(ValueError, match="no recommender 'item_knn'"):
        open_first_stage(tmp_path, "item_knn")
