"""The same collection in FAISS files, in a real embedded Chroma and in Pinecone's client against a local stand-in."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys_ray.retrieval.filters import Filters
from recsys_ray.retrieval.stores import (
    ChromaStoreConfig,
    FaissStore,
    FaissStoreConfig,
    PineconeStoreConfig,
    StoreError,
    VectorStore,
    collection_schema,
    conditions,
    open_store,
    sent_id,
)

KEY = "pc-test-key"
DIMENSION = 24


class StandIn(ThreadingHTTPServer):
    """What Pinecone's data plane does, as far as the client asks for it; every request is checked and kept."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spaces: dict[str, dict[str, dict[str, Any]]] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.problems: list[str] = []
        self.failing = False


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        size = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(size) or b"{}")
        self.server.requests.append((self.path, body))
        if size > 2_000_000:
            self.server.problems.append(f"{size} bytes in one request")
        if self.headers.get("api-key") != KEY:
            return self._answer(401, {"error": {"code": "UNAUTHENTICATED", "message": "Invalid API Key"}})
        if self.server.failing:
            return self._answer(400, {"code": 3, "message": "Vector dimension does not match", "details": []})
        space = self.server.spaces.setdefault(body.get("namespace", ""), {})
        return self._answer(200, getattr(self, self.path.strip("/").replace("/", "_"))(space, body))

    do_GET = do_POST    # noqa: N815 - as the base class looks it up

    def vectors_upsert(self, space: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        for one in body["vectors"]:
            if not one["id"].isascii() or len(one["values"]) != DIMENSION or None in one["metadata"].values():
                self.server.problems.append(f"a bad vector {one['id']!r}")
            space[one["id"]] = one
        return {"upsertedCount": len(body["vectors"])}

    def vectors_delete(self, space: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        for one in body["ids"]:
            space.pop(one, None)
        return {}

    def describe_index_stats(self, space: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        return {"namespaces": {name: {"vectorCount": len(one)} for name, one in self.server.spaces.items() if one},
                "dimension": DIMENSION, "indexFullness": 0,
                "totalVectorCount": sum(map(len, self.server.spaces.values()))}

    def query(self, space: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        scored = [(float(np.dot(body["vector"], one["values"])), name) for name, one in space.items()
                  if passes(one["metadata"], body.get("filter"))]
        best = sorted(scored, key=lambda pair: (-pair[0], pair[1]))[:body["topK"]]
        return {"matches": [{"id": name, "score": score} for score, name in best], "namespace": body["namespace"],
                "usage": {"readUnits": 1}}

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def passes(metadata: dict[str, Any], condition: dict[str, Any] | None) -> bool:
    """Pinecone's filter language, as far as it is used."""
    if not condition:
        return True
    if "$and" in condition:
        return all(passes(metadata, one) for one in condition["$and"])
    (name, test), = condition.items()
    (operator, wanted), = test.items()
    if name not in metadata:
        return False
    return {"$in": lambda: metadata[name] in wanted, "$gte": lambda: metadata[name] >= wanted,
            "$lte": lambda: metadata[name] <= wanted}[operator]()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    server = StandIn()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PINECONE_API_KEY", KEY)
    yield server
    server.shutdown()
    server.server_close()
    assert server.problems == []


def collection(count: int = 150, seed: int = 0) -> pa.Table:
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((count, DIMENSION)).astype(np.float32)
    return pa.table({
        "product_id": [f"P{number}" if number else "größe 7/a%2" for number in range(count)],
        "category": [("a", "b", None)[number % 3] for number in range(count)],
        "brand": [("x", "y")[number % 2] for number in range(count)],
        "price_cents": [None if number % 5 == 4 else 100 * number for number in range(count)],
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), DIMENSION)},
        schema=collection_schema(DIMENSION))


def expected(rows: pa.Table, query: np.ndarray, k: int, keep: Any = lambda row: True) -> list[str]:
    scored = [(float(np.dot(query, row["vector"])), row["product_id"]) for row in rows.to_pylist() if keep(row)]
    return [name for _, name in sorted(scored, reverse=True)[:k]]


@pytest.fixture(params=["faiss", "chroma", "pinecone"])
def store(request: pytest.FixtureRequest, tmp_path: Path, stand_in: StandIn) -> VectorStore:
    if request.param == "faiss":
        return open_store(FaissStoreConfig(path=tmp_path))
    if request.param == "chroma":
        pytest.importorskip("chromadb", reason="chromadb is not installed")
        return open_store(ChromaStoreConfig(kind="chroma", path=tmp_path))
    pytest.importorskip("pinecone", reason="pinecone is not installed")
    host = f"http://127.0.0.1:{stand_in.server_address[1]}"
    return open_store(PineconeStoreConfig(kind="pinecone", host=host, namespace="shop"))


def test_every_store_keeps_and_finds_the_same(store: VectorStore) -> None:
    rows, queries = collection(), np.random.default_rng(9).standard_normal((3, DIMENSION)).astype(np.float32)
    assert store.count() == 0
    store.upsert(rows.slice(0, 80))
    store.upsert(rows.slice(60, 90))        # some for the second time
    assert store.count() == 150
    for query, answer in zip(queries, store.search(queries, 8), strict=True):
        assert [one.product_id for one in answer] == expected(rows, query, 8)
        best = max(np.dot(query, row["vector"]) for row in rows.to_pylist())
        np.testing.assert_allclose(answer[0].score, best, atol=1e-4)
    filters = Filters(category=("a", "b"), brand=("x",), price_min_cents=2000, price_max_cents=12_000)
    found = store.search(queries[:1], 6, filters)[0]
    assert [one.product_id for one in found] == expected(rows, queries[0], 6, lambda row: (
        row["category"] is not None and row["brand"] == "x" and row["price_cents"] is not None
        and 2000 <= row["price_cents"] <= 12_000))

    replaced = collection(1, seed=5)        # the id that is no plain ASCII, with another vector
    store.upsert(replaced)
    store.delete(["P1", "P2", "unknown"])
    assert store.count() == 148
    now = pa.concat_tables([replaced, rows.slice(3)])
    assert [one.product_id for one in store.search(queries[:1], 148)[0]][:20] == expected(now, queries[0], 20)


def test_files_are_one_again_after_compaction_and_the_later_wins(tmp_path: Path) -> None:
    store = FaissStore(FaissStoreConfig(path=tmp_path))
    store.upsert(collection(20))
    store.upsert(collection(5, seed=3))
    store.delete(["P7"])
    before = store.search(np.ones((1, DIMENSION), np.float32), 19)
    store.compact()
    assert len(list(tmp_path.glob("*.parquet"))) == 1
    assert FaissStore(FaissStoreConfig(path=tmp_path)).search(np.ones((1, DIMENSION), np.float32), 19) == before


def test_pinecone_is_asked_within_its_limits_and_its_refusals_are_told(stand_in: StandIn) -> None:
    pytest.importorskip("pinecone", reason="pinecone is not installed")
    config = PineconeStoreConfig(kind="pinecone", host=f"http://127.0.0.1:{stand_in.server_address[1]}")
    store = open_store(config)
    store.upsert(collection())
    assert [len(body["vectors"]) for path, body in stand_in.requests if path == "/vectors/upsert"] == [100, 50]
    assert {body["namespace"] for _, body in stand_in.requests} == {"products"}
    assert sent_id("P1/a-b_c.d") == "P1/a-b_c.d"
    stand_in.failing = True
    with pytest.raises(StoreError, match=r"namespace products: upsert failed: .*dimension does not match"):
        store.upsert(collection(2))


def test_what_cannot_work_is_said_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PINECONE_API_KEY", raising=False)
    with pytest.raises(StoreError, match="set PINECONE_API_KEY"):
        open_store(PineconeStoreConfig(kind="pinecone", host="http://127.0.0.1:1"))
    bad = collection(3)
    broken = pa.FixedSizeListArray.from_arrays(pa.array(np.full(3 * DIMENSION, np.nan, np.float32)), DIMENSION)
    with pytest.raises(StoreError, match="not finite"):
        open_store(FaissStoreConfig(path=tmp_path)).upsert(bad.set_column(4, "vector", broken))
    assert conditions(Filters()) is None
    assert conditions(Filters(price_max_cents=5)) == {"price_cents": {"$lte": 5}}
