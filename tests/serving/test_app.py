"""The deployments: how segments become shards, what is refused at the start, and the whole service on a local Ray."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ray import serve
from ray.exceptions import ActorDiedError
from small_pictures import build_real_hybrid, photograph
from small_shop import (
    LIMITS,
    REFUSED,
    RETRIEVER,
    SEGMENTS,
    RealIndex,
    WordEncoder,
    body,
    build_small_index,
    catalogue,
)

from recsys_ray.artifacts import ArtifactError, open_artifact
from recsys_ray.config import ConfigError
from recsys_ray.models.bge_m3_heads import BgeM3Heads
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig, encoder_identity
from recsys_ray.ranking.rerank import RerankConfig
from recsys_ray.retrieval.fusion import FusionConfig
from recsys_ray.retrieval.retriever import RetrieverConfig
from recsys_ray.retrieval.segments import open_index
from recsys_ray.runtime import free_ports
from recsys_ray.serving import deployments
from recsys_ray.serving.api import SearchRequest, parse
from recsys_ray.serving.app import base_url, build_app, divide, run, segment_rows, serving
from recsys_ray.serving.config import ServeConfig, Stage, Stages
from recsys_ray.serving.deployments import ServeError, ShardReplica, refuse_foreign
from recsys_ray.serving.limits import API_KEY
from recsys_ray.serving.recommender import Recommender

REPO = Path(__file__).resolve().parents[2]
BM25 = RETRIEVER.replace(mode="bm25")


# --- without Ray ----------------------------------------------------------------------------------
@pytest.mark.parametrize(("shards", "expected"), [
    (1, [["a", "b", "c", "d"]]), (2, [["a"], ["b", "c", "d"]]), (3, [["a"], ["b"], ["c", "d"]]),
    (9, [["a"], ["b"], ["c"], ["d"]])])
def test_segments_are_divided_evenly_by_rows(shards: int, expected: list[list[str]]) -> None:
    assert divide({"a": 90, "b": 40, "c": 30, "d": 10}, shards) == expected


def test_the_manifest_says_how_large_each_segment_is(small_index: Path) -> None:
    assert segment_rows(open_artifact(small_index, "index").manifest) == dict.fromkeys(SEGMENTS, 40)


def test_configurations_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="needs an encoder"):
        ServeConfig(index=Path("x"), encoder=None)
    with pytest.raises(ValueError, match="raise depth"):
        ServeConfig(index=Path("x"), retriever=RETRIEVER)
    with pytest.raises(ValueError, match=r"multi_weight is above 0, but encoder\.multi_vector is not set"):
        ServeConfig(index=Path("x"), retriever=RetrieverConfig(fusion=FusionConfig(multi_weight=0.2)))
    with pytest.raises(ValueError, match=r"lower limits\.max_window"):
        ServeConfig(index=Path("x"), rerank=RerankConfig(depth=100))
    with pytest.raises(ValueError, match="in_gateway: the stage has the gateway's"):
        Stage(in_gateway=True, cpus=2)
    assert ServeConfig(index=Path("x")).host == "127.0.0.1"


def test_a_stage_is_a_deployment_or_part_of_the_gateway(small_index: Path) -> None:
    config = ServeConfig(index=small_index, encoder=None, retriever=BM25, limits=LIMITS,
                         rerank=RerankConfig(depth=60), shards=2)
    gateway = build_app(config)._bound_deployment
    shards, parts = gateway.init_args[0], gateway.init_args[1]
    assert [one._bound_deployment.name for one in shards] == ["shard-0", "shard-1"]
    assert set(parts) == {"search-ranker"}
    assert isinstance(parts["search-ranker"], deployments.Local)
    apart = config.replace(stages=Stages(ranker=Stage(replicas=3, cpus=0.5), shard=Stage(in_gateway=True)))
    gateway = build_app(apart)._bound_deployment
    assert all(isinstance(one, deployments.Local) for one in gateway.init_args[0])
    ranker = gateway.init_args[1]["search-ranker"]._bound_deployment
    assert (ranker.num_replicas, ranker.ray_actor_options["num_cpus"]) == (3, 0.5)
    assert ranker.max_queued_requests == 2 * LIMITS.max_in_flight


def test_a_missing_index_and_a_foreign_encoder_are_refused_before_anything_starts(small_index: Path,
                                                                                 tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no index artefact"):
        build_app(ServeConfig(index=tmp_path, encoder=None, retriever=BM25, limits=LIMITS))
    with pytest.raises(ServeError, match="dimension is 32 there and 384 here"):
        build_app({"index": str(small_index), "limits": LIMITS.model_dump(), "retriever": RETRIEVER.model_dump()})
    with pytest.raises(ServeError, match="pooling is 'cls' there and 'mean' here"):
        refuse_foreign("m", {"pooling": "mean", "same": 1}, {"pooling": "cls", "same": 1})


def test_a_missing_folder_of_images_is_refused(small_index: Path, tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="image_folder"):
        build_app(ServeConfig(index=small_index, encoder=None, retriever=RetrieverConfig(mode="bm25", depth=200),
                              image_folder=tmp_path / "gone"))


def test_an_open_host_is_refused_without_a_key(small_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    with pytest.raises(ConfigError, match=API_KEY):
        build_app(ServeConfig(index=small_index, encoder=None, retriever=BM25, limits=LIMITS, host="0.0.0.0"))


def test_a_service_that_stays_needs_a_cluster_to_stay_on(small_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"set ray\.address"):
        run(ServeConfig(index=small_index, encoder=None, retriever=BM25, limits=LIMITS, block=False))


def test_urls_of_wildcard_hosts_lead_to_this_machine() -> None:
    assert base_url("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert base_url("::", 80) == "http://[::1]:80"
    assert base_url("127.0.0.1", 8000) == "http://127.0.0.1:8000"


class DyingHandle:
    """A deployment handle whose first replicas die."""

    def __init__(self, deaths: int) -> None:
        self.deaths, self.calls = deaths, 0
        self.search = self

    async def remote(self, value: int) -> int:
        self.calls += 1
        if self.calls <= self.deaths:
            raise ActorDiedError
        return value


@pytest.mark.parametrize(("deaths", "calls"), [(0, 1), (1, 2), (2, 3)])
def test_a_call_to_a_dead_replica_is_repeated(deaths: int, calls: int) -> None:
    handle = DyingHandle(deaths)
    assert asyncio.run(deployments._call(handle, "search", 7)) == 7  # type: ignore[arg-type]
    assert handle.calls == calls


def test_repeating_has_an_end() -> None:
    handle = DyingHandle(99)
    with pytest.raises(ActorDiedError):
        asyncio.run(deployments._call(handle, "search", 7))  # type: ignore[arg-type]
    assert handle.calls == 3


# --- on a local Ray -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def real_index(tmp_path_factory: pytest.TempPathFactory) -> RealIndex:
    return RealIndex(tmp_path_factory.mktemp("real") / "index")


@pytest.fixture(scope="module")
def service(local_ray: None, real_index: RealIndex) -> Iterator[httpx.Client]:
    config = ServeConfig(index=real_index.root, retriever=RETRIEVER, limits=LIMITS, port=free_ports(1)[0],
                         deadline_ms=10_000, pictures=build_real_hybrid(real_index.root.parent, real_index.root))
    with serving(config) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield http


@pytest.mark.ray
def test_the_service_answers_what_one_process_answers(service: httpx.Client, real_index: RealIndex) -> None:
    for fields in ({"query": "couch in red", "k": 20}, {"query": "oak shelf", "sort": "price_asc", "offset": 3, "k": 5},
                   {"query": "something to sit on", "filters": {"category": ["seating"], "price_max": 100.0}}):
        expected = real_index.recommender.search(parse(SearchRequest, body(**fields), LIMITS))
        answer = service.post("/v1/search", content=body(**fields)).json()
        assert [item["product_id"] for item in answer["items"]] == [hit.product_id for hit in expected["items"]]
        assert [item["score"] for item in answer["items"]] == pytest.approx(
            [hit.score for hit in expected["items"]], abs=2e-3)  # vectors depend a little on what is in their batch
        assert answer["facets"] == expected["facets"]
        assert (answer["shards_answered"], answer["shards_total"]) == (2, 2)
        assert answer["index_version"] == real_index.recommender.index.version
        assert set(answer["took_ms"]) == {"encode", "shards", "rank"}
    similar = service.get("/v1/products/P010/similar?k=6").json()
    assert [item["product_id"] for item in similar["items"]] == [
        hit.product_id for hit in real_index.recommender.similar("P010", 6)]


@pytest.mark.ray
def test_the_service_finds_by_pictures(service: httpx.Client) -> None:
    answer = service.post("/v1/search", files={"picture": photograph("blue")}, data={"request": '{"k": 4}'}).json()
    assert all("blue" in one["title"] for one in answer["items"])
    looks = service.get("/v1/products/P001/similar?by=looks&k=4").json()["items"]
    assert all("blue" in one["title"] for one in looks)
    bad = service.post("/v1/search", files={"picture": b"no picture"})
    assert (bad.status_code, bad.json()["error"]["code"]) == (422, "bad_picture")


@pytest.mark.ray
def test_a_service_weighs_token_weights_and_vectors(local_ray: None, service: httpx.Client, tmp_path: Path,
                                                    tiny_text_model: Callable[..., Path]) -> None:
    model = tiny_text_model(body="xlm-roberta", pooling="cls")
    BgeM3Heads.new(32, 16).save(model)
    config = ServeConfig(
        index=tmp_path / "index", limits=LIMITS, name="whole", port=int(service.base_url.port or 0),
        deadline_ms=10_000, retriever=RETRIEVER.replace(fusion={
            "window": 20, "dense_weight": 0.3, "sparse_weight": 0.2, "multi_weight": 0.3}),
        encoder=TextEncoderConfig(model=str(model), device="cpu", dtype="float32", sparse=True, multi_vector=True))
    assert config.encoder is not None
    encoder = build_text_encoder(config.encoder)
    build_small_index(config.index, encoder, encoder.identity)  # type: ignore[arg-type]
    offline = Recommender(open_index(config.index, encoder_identity=encoder.identity), encoder, config.retriever)
    serve.run(build_app(config), name=config.name, route_prefix="/whole")
    try:
        for query in ("red sofa", "green mirror number17"):
            expected = offline.search(parse(SearchRequest, body(query=query, k=20), LIMITS))["items"]
            deadline = time.monotonic() + 60
            while (answer := service.post("/whole/v1/search", content=body(query=query, k=20))).status_code != 200:
                assert time.monotonic() < deadline, answer.text     # still loading
                time.sleep(0.2)
            found = answer.json()["items"]
            assert [item["product_id"] for item in found] == [hit.product_id for hit in expected]
            # replicas have another number of threads; normalising the close scores of random weights makes its
            # rounding some hundred times larger
            assert [item["score"] for item in found] == pytest.approx([hit.score for hit in expected], abs=1e-3)
    finally:
        serve.delete(config.name)


@pytest.mark.ray
def test_products_and_probes(service: httpx.Client) -> None:
    for row in catalogue()[:3]:
        assert service.get(f"/v1/products/{row['product_id']}").json()["product"]["title"] == row["title"]
    assert service.get("/v1/products/odd%2Fid%207").status_code == 200
    assert service.get("/healthz").json() == {"status": "ok"}
    assert service.get("/readyz").json()["ready"] is True
    assert "/v1/search" in service.get("/openapi.json").json()["paths"]


@pytest.mark.ray
def test_bad_requests_are_refused_through_the_real_proxy(service: httpx.Client) -> None:
    for name in list(REFUSED)[::2]:
        method, path, content, status, field = REFUSED[name]
        if name == "query that the encoder refuses":
            continue
        answer = service.request(method, path, content=content)
        assert answer.status_code == status, (name, answer.text)
        assert answer.json()["error"]["field"] == field, name


@pytest.mark.ray
def test_a_300_mb_body_is_refused_without_being_kept(service: httpx.Client) -> None:
    before = memory_of_replicas()
    port = service.base_url.port
    assert port is not None
    for headers in (b"content-length: 300000000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as link:
            link.sendall(b"POST /v1/search HTTP/1.1\r\nhost: shop\r\ncontent-type: application/json\r\n" + headers)
            status = read_status_while_sending(link, chunked=b"chunked" in headers)
        assert status.startswith(b"HTTP/1.1 413"), status
    assert memory_of_replicas() - before < 150 << 20
    assert service.get("/healthz").status_code == 200


def read_status_while_sending(link: socket.socket, chunked: bool, total: int = 300_000_000) -> bytes:
    """Send the body until the server answers or hangs up; returns the beginning of the answer."""
    piece = b"x" * 65_536
    piece = b"10000\r\n" + piece + b"\r\n" if chunked else piece
    link.settimeout(0.001)
    sent, answer = 0, b""
    while sent < total and not answer:
        try:
            sent += link.send(piece)
        except TimeoutError:
            pass
        except OSError:
            break
        try:
            answer = link.recv(4096)
        except TimeoutError:
            continue
        except OSError:
            break
    link.settimeout(30)
    return answer or link.recv(4096)


def memory_of_replicas() -> int:
    """Resident bytes of this process's Ray: its descendants."""
    return sum(one.memory_info().rss for one in psutil.Process().children(recursive=True) if one.is_running())


@pytest.mark.ray
def test_concurrent_queries_share_batches_and_stay_apart(service: httpx.Client, real_index: RealIndex) -> None:
    queries = [f"{row['title']}" for row in catalogue()[:24]]

    async def ask_all() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=service.base_url, timeout=60) as http:
            answers = await asyncio.gather(*(http.post("/v1/search", content=body(query=one, k=1)) for one in queries))
        return [answer.json() for answer in answers]

    titles = [answer["items"][0]["title"] for answer in asyncio.run(ask_all())]
    assert titles == queries


@pytest.mark.ray
def test_a_damaged_index_does_not_become_ready_and_says_why(local_ray: None, service: httpx.Client,
                                                           real_index: RealIndex, tmp_path: Path) -> None:
    shutil.copytree(real_index.root, tmp_path / "index")
    victim = next((tmp_path / "index").rglob("seg-b/vectors.npy"))
    damaged = bytearray(victim.read_bytes())
    damaged[-1] ^= 1
    victim.write_bytes(bytes(damaged))
    replica = ShardReplica(0, str(tmp_path / "index"), real_index.recommender.index.version, ["seg-b"])
    deadline = time.monotonic() + 30
    while (status := asyncio.run(replica.status())).problem is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.ready
    assert "SHA-256 differs" in str(status.problem)


@pytest.mark.ray
def test_the_job_serves_until_it_is_told_to_stop_and_leaves_nothing(small_index: Path, tmp_path: Path) -> None:
    port = free_ports(1)[0]
    overrides = [f"index={small_index}", "encoder=null", "retriever.mode=bm25", f"port={port}", "ray.progress=false"]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    job = subprocess.Popen([sys.executable, "jobs/serve.py", "--config", "configs/serve/demo.yaml", *overrides],
                           cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_ready(url, job)
        answer = httpx.post(f"{url}/v1/search", content=json.dumps({"query": "red sofa number30"}), timeout=30).json()
        assert answer["items"][0]["product_id"] == "P030"
        children = psutil.Process(job.pid).children(recursive=True)
        assert children
        job.send_signal(signal.SIGTERM)
        status = job.wait(60)
        assert status == 0, job.stdout.read().decode()[-3000:] if job.stdout else ""
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        assert job.stdout is not None
        job.stdout.close()
        job.wait()


def wait_ready(url: str, job: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert job.poll() is None, job.stdout.read().decode() if job.stdout else ""
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    raise AssertionError("the job did not become ready")


def test_the_words_encoder_is_not_what_the_service_uses() -> None:
    """Guards the fixtures: the service test must run on a real model, not on the stand-in."""
    assert WordEncoder.identity != encoder_identity(TextEncoderConfig())
