"""The whole graph on a local Serve: ranking, recommending, metrics, and events that are written when it ends."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import ray
from ray import serve
from small_shop import LIMITS, RETRIEVER, RealIndex, body, catalogue, publish_small_trees, small_first_stage

from recsys_ray.artifacts import stage
from recsys_ray.config import Config
from recsys_ray.models.cross_encoder import CrossEncoderConfig
from recsys_ray.ranking.recommenders import Recommender as FittedRecommender
from recsys_ray.ranking.rerank import RerankConfig, Reranker
from recsys_ray.runtime import free_ports
from recsys_ray.serving.api import RecommendRequest, SearchRequest, parse
from recsys_ray.serving.app import serving
from recsys_ray.serving.config import EventsConfig, RecommendConfig, ServeConfig, Stage, Stages
from recsys_ray.serving.recommender import Recommender

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def real_index(tmp_path_factory: pytest.TempPathFactory) -> RealIndex:
    return RealIndex(tmp_path_factory.mktemp("real") / "index")


@pytest.fixture(scope="module")
def ranked(real_index: RealIndex, tiny_pair_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
           ) -> ServeConfig:
    """All stages: the encoder, the shards and the ranker within the gateway, the others apart."""
    work = tmp_path_factory.mktemp("ranked")
    cross = CrossEncoderConfig(model=str(tiny_pair_model()), max_tokens=32, device="cpu", dtype="float32")
    publish_small_trees(work / "gbdt", cross)
    with stage(work / "recommenders", "recommenders", "x") as staging:
        model = small_first_stage().model
        assert isinstance(model, FittedRecommender)
        files = [staging.entry(f"ease/{name}") for name in model.save(staging.path / "ease")]
        staging.commit(files, config=Config(), facts={"chosen": {"ease": {}}})
    rerank = RerankConfig(gbdt=work / "gbdt", cross_encoder=cross, depth=60)
    port = free_ports(1)[0]
    return ServeConfig(
        index=real_index.root, retriever=RETRIEVER, limits=LIMITS, deadline_ms=10_000, port=port, rerank=rerank,
        recommend=RecommendConfig(artifact=work / "recommenders", rerank=rerank), log_queries=True,
        events=EventsConfig(directory=work / "events", flush_s=3600), stages=Stages(
            encoder=Stage(in_gateway=True), shard=Stage(in_gateway=True), cross_encoder=Stage(cpus=0.2),
            ranker=Stage(in_gateway=True), recommender=Stage(cpus=0.1)))


@pytest.fixture(scope="module")
def service(local_ray: None, ranked: ServeConfig) -> Iterator[httpx.Client]:
    with serving(ranked) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield http


def test_the_ranking_service_answers_what_one_process_answers(service: httpx.Client, ranked: ServeConfig,
                                                              real_index: RealIndex) -> None:
    assert ranked.rerank is not None
    reranker = Reranker(ranked.rerank)
    offline = Recommender(real_index.recommender.index, real_index.encoder, RETRIEVER, reranker)
    for fields in ({"query": "oak table", "k": 15, "explain": True}, {"query": "red sofa", "system": "bm25"}):
        expected = offline.search(parse(SearchRequest, body(**fields), LIMITS))["items"]
        answer = service.post("/v1/search", content=body(**fields)).json()
        assert (answer["degraded"], answer["shards_answered"]) == (False, 2)
        assert [item["product_id"] for item in answer["items"]] == [hit.product_id for hit in expected]
        assert [item["explanation"] is None for item in answer["items"]] == [not fields.get("explain")] * len(expected)
    asked = {"history": ["P000", "P006"], "k": 8, "explain": True}
    request = parse(RecommendRequest, json.dumps(asked).encode(), LIMITS)
    expected = offline.recommend(small_first_stage(), request, 200, reranker)["items"]
    answer = service.post("/v1/recommend", json=asked).json()
    assert [item["product_id"] for item in answer["items"]] == [hit.product_id for hit in expected]
    assert (answer["source"], answer["fallback"], answer["degraded"]) == ("ease", False, False)
    assert service.get("/").headers["content-type"].startswith("text/html")


def test_many_at_once_are_ranked_as_one_by_one(service: httpx.Client) -> None:
    queries = [str(row["title"]) for row in catalogue()[:12]]

    async def ask_all() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=service.base_url, timeout=60) as http:
            answers = await asyncio.gather(*(http.post("/v1/search", content=body(query=one)) for one in queries))
        return [answer.json() for answer in answers]

    together = asyncio.run(ask_all())
    alone = [service.post("/v1/search", content=body(query=one)).json() for one in queries]
    assert not any(one["degraded"] for one in together)
    assert [[item["product_id"] for item in one["items"]] for one in together] == [
        [item["product_id"] for item in one["items"]] for one in alone]


def test_requests_are_counted_for_prometheus(service: httpx.Client) -> None:
    service.post("/v1/search", content=body())
    port = ray.nodes()[0]["MetricsExportPort"]
    deadline = time.monotonic() + 60
    wanted = ('path="/v1/search"', 'stage="cross_encoder"', 'stage="ranker"')
    while not all(one in (text := httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text) for one in wanted):
        assert time.monotonic() < deadline, [line for line in text.splitlines() if "recsys" in line][:20]
        time.sleep(1)
    assert "recsys_stage_ms" in text


def test_what_was_shown_is_written_when_the_service_ends(service: httpx.Client, ranked: ServeConfig) -> None:
    answer = service.post("/v1/search", content=body(k=3)).json()
    click = {"kind": "click", "product_id": answer["items"][0]["product_id"], "list_id": answer["list_id"]}
    assert service.post("/v1/events", json={"events": [click]}).status_code == 202
    assert ranked.events is not None
    serve.delete(ranked.name)
    deadline = time.monotonic() + 20
    while not list(ranked.events.directory.glob("events/*.parquet")):
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.2)
    rows = pq.read_table(ranked.events.directory / "events").to_pylist()
    mine = [row for row in rows if row["list_id"] == answer["list_id"]]
    assert [(row["kind"], row["position"]) for row in mine] == [("impression", 1), ("impression", 2), ("impression", 3),
                                                                ("click", None)]
    assert len({row["query_id"] for row in mine}) == 1
