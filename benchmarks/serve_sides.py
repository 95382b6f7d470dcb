"""One side of `serve_speed.py` in its own process: starts, prints its URL, and serves until its input ends.

    python benchmarks/serve_sides.py TASK.json

Sides: `ours` (a `ServeConfig`), `naive` (sentence-transformers, FAISS, `CrossEncoder`, pandas, Serve as it comes),
`uvicorn` and `hop` (an empty answer without Serve, and with it). The environment, with Serve's switches in it, is the
caller's.
"""

# no postponed annotations: in a replica FastAPI could not resolve them, since the routes travel there by value
import json
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from fastapi import FastAPI

Request = dict[str, Any]


class Naive:
    """The usual stack in one replica: dense retrieval, all candidates through the cross-encoder, trees on top."""

    def __init__(self, task: dict[str, Any]) -> None:
        import faiss
        import numpy as np
        import pandas as pd
        import torch
        from sentence_transformers import CrossEncoder, SentenceTransformer

        from recsys_ray.ranking.features import FEATURE_COLUMNS
        from recsys_ray.ranking.gbdt import GbdtRanker
        from recsys_ray.retrieval.segments import open_index

        index = open_index(task["index"])
        vectors = np.concatenate([segment.vectors.vectors[segment.alive] for segment in index.segments])
        self.products = pd.concat([segment.rows.select(["product_id", *FEATURE_COLUMNS]).to_pandas()[segment.alive]
                                   for segment in index.segments], ignore_index=True)
        self.faiss = faiss.IndexFlatIP(vectors.shape[1])
        self.faiss.add(vectors)
        dtype = {"dtype": getattr(torch, task["dtype"])}
        self.encoder = SentenceTransformer(task["encoder"], device="cpu", model_kwargs=dtype)
        self.cross = CrossEncoder(task["cross_encoder"], device="cpu", max_length=task["pair_tokens"],
                                  model_kwargs=dtype)
        self.gbdt = None if task["gbdt"] is None else GbdtRanker.load(Path(task["gbdt"]))
        self.depth = task["depth"]

    def search(self, request: Request) -> dict[str, Any]:
        """The `k` best products of a query, with milliseconds per stage."""
        import time

        clock, took = time.perf_counter(), dict[str, float]()

        def done(stage: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            took[stage], clock = (now - clock) * 1000, now

        query = request["query"]
        vector = self.encoder.encode([query], normalize_embeddings=True, show_progress_bar=False)
        done("encode")
        scores, places = self.faiss.search(vector.astype("float32"), self.depth)
        found = self.products.iloc[places[0]].reset_index(drop=True)
        done("retrieve")
        found["cross"] = self.cross.predict([(query, text) for text in found["text"].fillna("")],
                                            show_progress_bar=False)
        done("cross_encoder")
        found["score"] = found["cross"] if self.gbdt is None else self._trees(query, found, scores[0])
        found = found.sort_values("score", ascending=False).drop_duplicates("title").head(request["k"])
        done("ranker")
        return {"items": found[["product_id", "title", "score"]].to_dict("records"), "took_ms": took}

    def _trees(self, query: str, found: Any, dense: Any) -> Any:
        import pyarrow as pa

        from recsys_ray.ranking.features import FEATURE_COLUMNS, Candidates, feature_table
        from recsys_ray.retrieval.segments import ROWS

        rows = pa.Table.from_pandas(found[list(FEATURE_COLUMNS)], preserve_index=False,
                                    schema=pa.schema([ROWS.field(name) for name in FEATURE_COLUMNS]))
        candidates = Candidates(found["row_id"].to_numpy(), {"dense": dense, "fused": dense}, rows)
        assert self.gbdt is not None
        return self.gbdt.score(feature_table(query, candidates, found["cross"].to_numpy("float32")))


def naive_app(task: dict[str, Any]) -> Any:
    """The usual stack behind FastAPI, as Serve's first example has it."""
    from ray import serve

    api = FastAPI()

    @serve.deployment(num_replicas=task["replicas"], ray_actor_options={"num_cpus": task["cpus"]})
    @serve.ingress(api)
    class Service:
        def __init__(self) -> None:
            self.stack = Naive(task)

        @api.post("/v1/search")
        def search(self, request: Request) -> dict[str, Any]:
            return self.stack.search(request)

        @api.get("/readyz")
        def readyz(self) -> dict[str, bool]:
            return {"ready": True}

    return Service.bind()  # type: ignore[attr-defined]


def hop_app(hops: int) -> Any:
    """An empty answer through the ingress and `hops` further deployments."""
    from ray import serve

    api = FastAPI()

    @serve.deployment
    class Last:
        async def __call__(self, value: int) -> int:
            return value

    @serve.deployment
    class Next:
        def __init__(self, behind: Any) -> None:
            self.behind = behind

        async def __call__(self, value: int) -> int:
            answer: int = await self.behind.remote(value)
            return answer

    @serve.deployment
    @serve.ingress(api)
    class Ingress:
        def __init__(self, behind: Any = None) -> None:
            self.behind = behind

        @api.post("/v1/search")
        async def search(self, request: Request) -> dict[str, int]:
            return {"value": 1 if self.behind is None else await self.behind.remote(1)}

        @api.get("/readyz")
        async def readyz(self) -> dict[str, bool]:
            return {"ready": True}

    behind: Any = None
    for place in range(hops):
        behind = Last.bind() if place == 0 else Next.options(name=f"next-{place}").bind(behind)  # type: ignore[attr-defined]
    return Ingress.bind() if behind is None else Ingress.bind(behind)  # type: ignore[attr-defined]


def plain_app() -> FastAPI:
    """The same empty answer without Serve."""
    api = FastAPI()

    @api.post("/v1/search")
    async def search(request: Request) -> dict[str, int]:
        return {"value": 1}

    return api


def main(path: Path) -> None:
    """Start the side of a task and serve until the input ends."""
    task = json.loads(path.read_bytes())
    if task["side"] == "uvicorn":
        import uvicorn

        server = uvicorn.Server(uvicorn.Config(plain_app(), port=task["port"], log_level="warning"))
        threading.Thread(target=server.run, daemon=True).start()
        _announce_when_open(task["port"])
        return
    from recsys_ray.runtime import RayConfig, connected

    with connected(RayConfig(num_cpus=task["logical_cpus"], progress=False)):
        if task["side"] == "ours":
            from recsys_ray.serving.app import serving
            from recsys_ray.serving.config import ServeConfig

            with serving(ServeConfig.model_validate({**task["config"], "port": task["port"]})) as url:
                _announce(url)
            return
        from ray import serve

        serve.start(http_options={"host": "127.0.0.1", "port": task["port"]})
        serve.run(naive_app(task) if task["side"] == "naive" else hop_app(task["hops"]))
        _announce(f"http://127.0.0.1:{task['port']}")
        serve.shutdown()


def _announce_when_open(port: int) -> None:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            threading.Event().wait(0.05)
        else:
            _announce(f"http://127.0.0.1:{port}")
            return


def _announce(url: str) -> None:
    print(f"READY {url}", flush=True)
    sys.stdin.read()    # until whoever started this closes it


if __name__ == "__main__":
    main(Path(sys.argv[1]))
