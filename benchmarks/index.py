"""Index types on real embeddings beside hnswlib: build time, queries per second, recall, recall under filters.

    python benchmarks/index.py --config configs/bench_index/full.yaml

Documents are real product texts, queries those of real shoppers. All sides live in one process and
answer on one thread; the rounds alternate (A B C ..., then backwards). Our times are of the whole
`VectorIndex.search`, exact scores and ties included. Recall is against a float64 product of all pairs.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parent))
from index_texts import embedded, product_texts, shopper_queries

from recsys_ray.config import Config, main
from recsys_ray.evaluation.results import write_result
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.retrieval.vector_index import VectorIndex, VectorIndexConfig, faiss_threads

log = logging.getLogger(__name__)

KINDS = ("flat", "hnsw", "ivf", "sq8", "ivf_pq")
K = 10
BATCHES = (1, 64)
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Search = Callable[[Floats], Ints]


class JobConfig(Config):
    """What is indexed and how often it is asked."""

    data: Path                                          # the folder of the real data sets
    work: Path = Path("runs/bench_index")               # keeps the vectors for the next run
    result: Path = Path("benchmarks/results/index.json")
    encoder: TextEncoderConfig = TextEncoderConfig(device="cpu", max_tokens=64)
    rows: int = Field(default=100_000, ge=1000)
    max_queries: int = Field(default=1000, ge=1)
    rounds: int = Field(default=4, ge=1)
    workers: int = Field(default=2, ge=1)               # that embed
    build_threads: int = Field(default=2, ge=1)         # the same for every side
    shares: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.5, 0.9, 1.0)
    filtered_queries: int = Field(default=200, ge=1)
    seed: int = 7


def run(config: JobConfig) -> Path:
    """Measure all sides and write the result file; returns its path."""
    texts, sources = product_texts(config.data, config.rows)
    vectors = embedded("documents", texts, config.encoder, config.workers, config.work)
    asked = shopper_queries(config.data)[: config.max_queries]
    queries = embedded("queries", asked, config.encoder, config.workers, config.work)
    truth = nearest(vectors, queries, None)
    indexes, searches, builds = _build(vectors, config)
    measured = _rounds(searches, queries, config)
    found = {name: _in_batches(search, queries, 64) for name, search in searches.items()}
    filtered = _filtered(indexes, vectors, queries, sources, config)
    headline: dict[str, float] = {}
    for name in searches:
        headline |= {f"{name}_qps": statistics.median(measured[name]["1"]),
                     f"{name}_qps_batch64": statistics.median(measured[name]["64"]),
                     f"{name}_recall10": recall(found[name], truth), f"{name}_build_s": builds[name]["wall_s"]}
    headline["filtered_recall10_min"] = min(row["recall10"] for row in filtered)
    counts = {source: sources.count(source) for source in dict.fromkeys(sources)}
    tables = {"queries_per_second": measured, "builds": builds, "filtered": filtered, "texts": counts,
              "queries": len(queries), "dimension": int(vectors.shape[1]), "setting": config.model_dump(mode="json")}
    return write_result(config.result, command=f"python benchmarks/index.py {' '.join(sys.argv[1:])}",
                        headline=headline, tables=tables, seeds=[config.seed])


def nearest(vectors: Floats, queries: Floats, allowed: Mask | None) -> list[set[int]]:
    """The true best `K` allowed positions of each query, by a product in float64."""
    rows = np.arange(len(vectors)) if allowed is None else np.flatnonzero(allowed)
    wide = vectors[rows].astype(np.float64)
    best = []
    for start in range(0, len(queries), 64):
        scores = wide @ queries[start: start + 64].astype(np.float64).T
        best += [set(rows[np.lexsort((rows, -column))[:K]].tolist()) for column in scores.T]
    return best


def recall(found: list[list[int]], truth: list[set[int]]) -> float:
    """The mean share of the true answers that were found; queries without any are left out."""
    return float(np.mean([len(set(one) & best) / len(best) for one, best in zip(found, truth, strict=True) if best]))


def _build(vectors: Floats, config: JobConfig) -> tuple[dict[str, VectorIndex], dict[str, Search], dict[str, Any]]:
    indexes: dict[str, VectorIndex] = {}
    searches: dict[str, Search] = {}
    builds: dict[str, Any] = {}
    for kind in KINDS:
        settings = VectorIndexConfig.model_validate({"kind": kind, "build_threads": config.build_threads,
                                                     "seed": config.seed})
        indexes[kind], builds[kind] = _timed(lambda settings=settings: VectorIndex.build(vectors, settings))
        searches[kind] = lambda batch, index=indexes[kind]: index.search(batch, K)[1]
        log.info("%-8s built in %.1f s", kind, builds[kind]["wall_s"])
    peer, builds["hnswlib"] = _timed(lambda: _hnswlib(vectors, indexes["hnsw"].config, config))
    searches["hnswlib"] = lambda batch: peer.knn_query(batch, k=K, num_threads=1)[0].astype(np.int64)
    log.info("%-8s built in %.1f s", "hnswlib", builds["hnswlib"]["wall_s"])
    return indexes, searches, builds


def _hnswlib(vectors: Floats, settings: VectorIndexConfig, config: JobConfig) -> Any:
    import hnswlib

    index = hnswlib.Index(space="ip", dim=vectors.shape[1])
    index.init_index(max_elements=len(vectors), M=settings.hnsw_neighbours,
                     ef_construction=settings.hnsw_build_depth, random_seed=config.seed)
    index.add_items(vectors, num_threads=config.build_threads)
    index.set_ef(settings.hnsw_search_depth)
    return index


def _timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    cpu, start = time.process_time(), time.perf_counter()
    made = work()
    return made, {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}


def _in_batches(search: Search, queries: Floats, size: int) -> list[list[int]]:
    return [row for start in range(0, len(queries), size) for row in search(queries[start: start + size]).tolist()]


def _rounds(searches: dict[str, Search], queries: Floats, config: JobConfig) -> dict[str, dict[str, list[float]]]:
    """Queries per second of each side and batch size, one figure a round."""
    measured: dict[str, dict[str, list[float]]] = {name: {str(size): [] for size in BATCHES} for name in searches}
    with faiss_threads(1):
        for search in searches.values():
            search(queries[:64])    # warm
        for number in range(config.rounds):
            for name in list(searches)[:: 1 if number % 2 == 0 else -1]:
                for size in BATCHES:
                    _, took = _timed(lambda name=name, size=size: _in_batches(searches[name], queries, size))
                    measured[name][str(size)].append(len(queries) / took["wall_s"])
            log.info("round %d of %d", number + 1, config.rounds)
    return measured


def _filtered(indexes: dict[str, VectorIndex], vectors: Floats, queries: Floats, sources: list[str],
              config: JobConfig) -> list[dict[str, Any]]:
    """Recall and speed under random filters of each share and under those that follow the subject."""
    rng = np.random.default_rng(config.seed)
    masks: dict[str, Mask] = {f"random {share:g}": rng.random(len(vectors)) < share for share in config.shares}
    named = np.array(sources)
    masks |= {f"source {source}": named == source for source in dict.fromkeys(sources)}
    masks |= {f"source not {source}": named != source for source in dict.fromkeys(sources)}
    some = queries[rng.permutation(len(queries))[: config.filtered_queries]]
    rows = []
    with faiss_threads(1):
        for name, mask in masks.items():
            if not mask.any():
                continue
            truth = nearest(vectors, some, mask)
            for kind, index in indexes.items():
                found, took = _timed(lambda index=index, mask=mask: _in_batches(
                    lambda batch: index.search(batch, K, mask)[1], some, 1))
                full = all(len(one) == len(best) for one, best in zip(found, truth, strict=True))
                rows.append({"filter": name, "share": float(mask.mean()), "kind": kind, "full": full,
                             "recall10": recall(found, truth), "qps": len(some) / took["wall_s"]})
            log.info("%-24s lowest recall %.3f", name, min(row["recall10"] for row in rows[-len(indexes):]))
    return rows


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
