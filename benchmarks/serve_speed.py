"""How fast and how good searches with reranking are served, beside the usual stack on the same cores.

    python benchmarks/serve_speed.py --config configs/bench_serve_speed/full.yaml

Sides, each in its own processes with its own Ray, started anew for each round, the rounds alternating (A B C D, then
backwards): the usual stack in fp32 and in bf16 (sentence-transformers, FAISS flat, `CrossEncoder`, pandas, Serve as it
comes), ours with the same work (all candidates through the cross-encoder), and ours as a cascade. No query is asked
twice of a side in a round, and a run with a degraded or failed answer is refused. The quality of a side is its nDCG@10
on judged queries of another index, which its models must not have learned from, ranked by the side's own code here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator
from serve_clients import Answered, closed_loop, percentiles, running, wait_until_answered
from serve_sides import Naive

from recsys_ray.artifacts import open_artifact
from recsys_ray.config import Config, main
from recsys_ray.data.judged_pairs import GradedQuery, JudgmentFolds, graded_queries
from recsys_ray.evaluation.metrics import MetricSpec, rank_judgments, score_all
from recsys_ray.evaluation.results import write_result
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.sentence_layout import CROSS_ENCODER_KIND, ENCODER_KIND, find_model
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.ranking.rerank import RerankConfig, Reranker
from recsys_ray.retrieval.retriever import RetrieverConfig
from recsys_ray.retrieval.segments import open_index
from recsys_ray.schema import CANDIDATE, JUDGMENT
from recsys_ray.serving.api import Limits, SearchRequest
from recsys_ray.serving.config import Batching, Scale, ServeConfig, Stage, Stages
from recsys_ray.serving.recommender import Recommender

log = logging.getLogger(__name__)

Search = Callable[[str], Sequence[str]]     # a query -> product ids, best first
NDCG = MetricSpec.parse("nDCG@10")
THROUGHPUT = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
SHOWN = 10
JUDGED = pa.schema([JUDGMENT.field(name) for name in ("query_id", "product_id", "gain")])
ANSWER = pa.schema([CANDIDATE.field(name) for name in ("query_id", "product_id", "rank")])


class Quality(Config):
    """Judged queries that no model was trained on, and the index they are asked of."""

    index: Path
    judged: JudgmentFolds


class JobConfig(Config):
    """What is served, how it is asked, and by which figures."""

    index: Path                                     # artefact of build_index
    queries: tuple[Path, ...]                       # files with a `query` column: asked in a drawn order
    encoder: TextEncoderConfig = TextEncoderConfig()
    retriever: RetrieverConfig = RetrieverConfig(depth=100)
    same_work: RerankConfig                         # all candidates through the cross-encoder
    cascade: RerankConfig                           # whatever keeps the quality
    quality: Quality
    result: Path = Path("benchmarks/results/serve.json")
    work: Path = Path("runs/bench_serve")
    clients: dict[int, int] = Field(default={1: 40, 8: 96, 32: 128}, description="clients -> requests")
    rounds: int = Field(default=3, ge=1)
    warm_up: int = Field(default=8, ge=2)           # requests before the first that counts
    cpus: int = Field(default=2, ge=1)              # threads that the models of each side compute with
    hop_requests: int = Field(default=400, ge=10)
    seed: int = 7

    @model_validator(mode="after")
    def _same_models(self) -> JobConfig:
        all_of_them = min(self.same_work.cross_top, self.same_work.depth)
        if self.same_work.cross_encoder is None or all_of_them < self.retriever.depth:
            raise ValueError("same_work: the cross-encoder must score all of retriever.depth candidates")
        if len(self.clients) != 3:
            raise ValueError(f"clients: {len(self.clients)} numbers of clients; name a few, some and many")
        return self


def run(config: JobConfig) -> Path:
    """Measure all sides and write the result file; returns its path."""
    tasks = sides(config)
    queries = drawn_queries(config)
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in tasks}
    for number in range(config.rounds):
        for name in list(tasks) if number % 2 == 0 else list(tasks)[::-1]:
            measured[name].append(_measured(tasks[name], queries, config))
    hops = {name: _hop(task, env, config) for name, task, env in hop_tasks()}
    quality = qualities(config)
    headline, tables = figures(config, measured, hops, quality)
    return write_result(config.result, command=f"python benchmarks/serve_speed.py {' '.join(sys.argv[1:])}",
                        headline=headline, tables=tables, seeds=[config.seed])


# --- sides ----------------------------------------------------------------------------------------
def sides(config: JobConfig) -> dict[str, dict[str, Any]]:
    """The task of each side by its name."""
    naive = {"side": "naive", "replicas": 1, "cpus": config.cpus, "logical_cpus": 4, **naive_settings(config)}
    ours = {"side": "ours", "logical_cpus": 4 + config.cpus}
    return {
        "naive_fp32": {"name": "naive_fp32", "dtype": "float32", **naive},
        "naive_bf16": {"name": "naive_bf16", "dtype": "bfloat16", **naive},
        "same_work": {"name": "same_work", **ours, "config": service(config, config.same_work)},
        "cascade": {"name": "cascade", **ours, "config": service(config, config.cascade)},
    }


def naive_settings(config: JobConfig, index: Path | None = None) -> dict[str, Any]:
    """What `Naive` is made of: the same models, limits and catalogue."""
    cross = config.same_work.cross_encoder
    assert cross is not None
    return {"index": str((index or config.index).resolve()), "depth": config.retriever.depth,
            "encoder": str(find_model(config.encoder.model, ENCODER_KIND)), "pair_tokens": cross.max_tokens,
            "cross_encoder": str(find_model(cross.model, CROSS_ENCODER_KIND)),
            "gbdt": None if config.same_work.gbdt is None else str(config.same_work.gbdt.resolve())}


def service(config: JobConfig, rerank: RerankConfig) -> dict[str, Any]:
    """Our service for a machine of few cores: one process beside the cross-encoder, nothing ever late."""
    window = config.retriever.depth
    found = ServeConfig(
        index=config.index.resolve(), encoder=config.encoder, retriever=config.retriever, rerank=rerank.resolved(),
        limits=Limits(max_k=min(100, window), max_window=window, max_in_flight=256), shards=1, deadline_ms=300_000,
        score_together=Batching(size=2, wait_ms=2), encode_together=Batching(size=8, wait_ms=1),
        stages=Stages(gateway=Scale(cpus=1), encoder=Stage(in_gateway=True), shard=Stage(in_gateway=True),
                      cross_encoder=Stage(cpus=config.cpus), ranker=Stage(in_gateway=True)))
    return found.model_dump(mode="json", exclude_defaults=True)


def hop_tasks() -> list[tuple[str, dict[str, Any], Mapping[str, str]]]:
    """(name, task, environment) of an empty answer: without Serve, and through it as it comes and with its switches."""
    found: list[tuple[str, dict[str, Any], Mapping[str, str]]] = [("uvicorn", {"side": "uvicorn"}, {})]
    for hops in (0, 1, 2):
        for kind, env in (("default", {}), ("throughput", THROUGHPUT)):
            task = {"side": "hop", "hops": hops, "logical_cpus": 4}
            found.append((f"{kind}_{hops}", task, env))
    return [(name, {"name": name, **task}, env) for name, task, env in found]


# --- measuring ------------------------------------------------------------------------------------
def drawn_queries(config: JobConfig) -> list[str]:
    """Different queries in a drawn order, as many as a round asks of a side."""
    texts = [text for path in config.queries for text in pq.read_table(path, columns=["query"])["query"].to_pylist()]
    different = sorted({text.strip() for text in texts if text and text.strip()})
    needed = config.warm_up + sum(config.clients.values())
    if len(different) < needed:
        raise ValueError(f"queries: {len(different)} different ones, but a round asks {needed}; name more files")
    order = np.random.default_rng(config.seed).permutation(len(different))
    return [different[place] for place in order[:needed].tolist()]


def body(query: str) -> bytes:
    """A request that each side understands."""
    return json.dumps({"query": query, "k": SHOWN}).encode()


def _measured(task: dict[str, Any], queries: Sequence[str], config: JobConfig) -> dict[str, Any]:
    """Of one side, by number of clients: rates, percentiles, CPU and the stages' shares."""
    found: dict[str, Any] = {}
    with running(task, config.work, {}) as side:
        asked = iter([body(query) for query in queries])
        wait_until_answered(side.url, next(asked))
        asyncio.run(closed_loop(side.url, [next(asked) for _ in range(config.warm_up - 1)], 2))
        for clients, requests in config.clients.items():
            bodies, cpu = [next(asked) for _ in range(requests)], side.cpu_s()
            answers = asyncio.run(closed_loop(side.url, bodies, clients))
            _check(task["name"], answers)
            wall = max(one.due_s + one.took_s for one in answers)
            found[str(clients)] = {"requests": requests, "per_s": requests / wall, **percentiles(answers),
                                   "cpu_ms": 1000 * (side.cpu_s() - cpu) / requests, "stages_ms": _stages(answers)}
            log.info("%-10s %2d clients: %6.2f/s, p50 %7.1f ms", task["name"], clients, requests / wall,
                     found[str(clients)]["p50_ms"])
    return found


def _check(name: str, answers: Sequence[Answered]) -> None:
    bad = [one for one in answers if one.status != 200 or one.body.get("degraded") or not one.body.get("items")]
    if bad:
        raise RuntimeError(f"{name}: {len(bad)} of {len(answers)} answers failed, were degraded or empty, e.g. "
                           f"{bad[0].status} {str(bad[0].body)[:300]}")


def _stages(answers: Sequence[Answered]) -> dict[str, float]:
    names = dict.fromkeys(name for one in answers for name in one.body["took_ms"])
    return {name: statistics.fmean(one.body["took_ms"].get(name, 0.0) for one in answers) for name in names}


def _hop(task: dict[str, Any], env: Mapping[str, str], config: JobConfig) -> dict[str, float]:
    """Percentiles of an empty answer at one client, and its rate at eight."""
    with running(task, config.work, env) as side:
        wait_until_answered(side.url, b"{}")
        asyncio.run(closed_loop(side.url, [b"{}"] * 50, 1))
        alone = asyncio.run(closed_loop(side.url, [b"{}"] * config.hop_requests, 1))
        crowd = asyncio.run(closed_loop(side.url, [b"{}"] * config.hop_requests, 8))
    if any(one.status != 200 for one in (*alone, *crowd)):
        raise RuntimeError(f"{task['name']}: an empty answer failed")
    found = {**percentiles(alone), "per_s_8": len(crowd) / max(one.due_s + one.took_s for one in crowd)}
    log.info("%-14s p50 %.2f ms", task["name"], found["p50_ms"])
    return found


# --- quality --------------------------------------------------------------------------------------
def qualities(config: JobConfig) -> dict[str, float]:
    """nDCG@10 of each way to rank, over the judged queries."""
    quality = config.quality
    index, asked = open_index(quality.index), graded_queries(quality.judged)
    encoder = build_text_encoder(config.encoder)
    rerankers = {"retrieval": None, "same_work": Reranker(config.same_work), "cascade": Reranker(config.cascade)}
    ways: dict[str, Search] = {name: _ours(Recommender(index, encoder, config.retriever, reranker))
                               for name, reranker in rerankers.items()}
    settings = {**naive_settings(config, quality.index), "dtype": "float32"}
    ways["naive_fp32"] = _theirs(Naive(settings))
    if settings["gbdt"] is not None:
        ways["naive_fp32_without_trees"] = _theirs(Naive({**settings, "gbdt": None}))
    return {name: _ndcg(search, asked) for name, search in ways.items()}


def _theirs(naive: Naive) -> Search:
    return lambda query: [one["product_id"] for one in naive.search({"query": query, "k": SHOWN})["items"]]


def _ours(recommender: Recommender) -> Search:
    return lambda query: [hit.product_id for hit in recommender.search(SearchRequest(query=query, k=SHOWN))["items"]]


def _ndcg(search: Search, asked: Sequence[GradedQuery]) -> float:
    judgments = [{"query_id": one.query_id, "product_id": product, "gain": gain}
                 for one in asked for product, gain in one.gains.items()]
    rows = [{"query_id": one.query_id, "product_id": product, "rank": rank}
            for one in asked for rank, product in enumerate(search(one.query), 1)]
    ranked = rank_judgments(pa.Table.from_pylist(judgments, schema=JUDGED), [pa.Table.from_pylist(rows, schema=ANSWER)])
    return float(score_all(ranked, [NDCG])[:, 0].mean())


# --- figures --------------------------------------------------------------------------------------
def figures(config: JobConfig, measured: Mapping[str, list[dict[str, Any]]], hops: Mapping[str, dict[str, float]],
            quality: Mapping[str, float]) -> tuple[dict[str, float | None], dict[str, Any]]:
    """(headline, tables): medians over the rounds, ratios of the sides of one round."""
    few, some, many = (str(clients) for clients in sorted(config.clients))

    def ratios(ours: str, theirs: str) -> list[float]:
        return [one[many]["per_s"] / other[many]["per_s"]
                for one, other in zip(measured[ours], measured[theirs], strict=True)]

    def median(side: str, clients: str, key: str) -> float:
        return statistics.median(one[clients][key] for one in measured[side])

    pairs = {f"{ours}_over_{theirs}": ratios(ours, theirs)
             for ours in ("same_work", "cascade") for theirs in ("naive_fp32", "naive_bf16")}
    plain = hops["uvicorn"]["p50_ms"]
    headline: dict[str, float | None] = {
        "same_work_ratio_vs_naive": statistics.median(pairs["same_work_over_naive_fp32"]),
        "throughput_ratio_vs_naive": statistics.median(pairs["cascade_over_naive_fp32"]),
        "throughput_ratio_vs_naive_bf16": statistics.median(pairs["cascade_over_naive_bf16"]),
        "ndcg_kept": quality["cascade"] / max(one for name, one in quality.items() if name.startswith("naive")),
        "p50_ms_1_client": median("cascade", few, "p50_ms"), "p99_ms_8_clients": median("cascade", some, "p99_ms"),
        "hop_ms_default": hops["default_0"]["p50_ms"] - plain,
        "hop_ms_throughput": hops["throughput_0"]["p50_ms"] - plain,
    }
    tables = {
        "ratios_of_requests_per_second": {name: {"median": statistics.median(one), "min": min(one), "max": max(one)}
                                          for name, one in pairs.items()},
        "sides": dict(measured), "empty_answers": dict(hops), "ndcg10": dict(quality),
        "products": open_artifact(config.index, "index").manifest.facts["live_rows"],
        "setting": config.model_dump(mode="json"),
    }
    return headline, tables


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
