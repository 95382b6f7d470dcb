"""Quality against cost: nDCG@10 and CPU-milliseconds a query of every cascade, from BM25 alone to the full graph.

    python benchmarks/pareto.py --config configs/bench_pareto/full.yaml

Each cascade answers the same judged queries in this process, in rounds that alternate; its cost is the CPU time of the
process (all threads), encoding and retrieval included, the least of the rounds. A cascade is on the front when no other
is both better and cheaper.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field
from serve_speed import ANSWER, JUDGED, NDCG, SHOWN, Quality

from recsys_ray.config import Config, main
from recsys_ray.data.judged_pairs import GradedQuery, graded_queries
from recsys_ray.evaluation.metrics import rank_judgments, score_all
from recsys_ray.evaluation.results import write_result
from recsys_ray.evaluation.significance import Resampling, Units, mean_intervals
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.ranking.rerank import RerankConfig, Reranker
from recsys_ray.retrieval.retriever import RetrieverConfig
from recsys_ray.retrieval.segments import open_index
from recsys_ray.serving.api import SearchRequest
from recsys_ray.serving.recommender import Recommender

log = logging.getLogger(__name__)

HOUR_MS = 3_600_000


class CascadeConfig(Config):
    """One way to answer."""

    retriever: RetrieverConfig = RetrieverConfig()
    rerank: RerankConfig | None = None


class JobConfig(Config):
    """What is asked of which cascades."""

    quality: Quality
    cascades: dict[str, CascadeConfig]
    encoder: TextEncoderConfig = TextEncoderConfig()
    result: Path = Path("benchmarks/results/pareto.json")
    plot: Path = Path("docs/pareto.png")
    queries: int | None = Field(default=None, ge=1)     # the first so many; None: all
    rounds: int = Field(default=3, ge=1)
    cpu_hour_price: float = Field(default=0.04, gt=0)   # of one core, in any currency
    seed: int = 7


def run(config: JobConfig) -> Path:
    """Measure all cascades, write the result file and the plot; returns the path of the result."""
    asked = graded_queries(config.quality.judged)[:config.queries]
    index, encoder = open_index(config.quality.index), build_text_encoder(config.encoder)
    recommenders = {name: Recommender(index, encoder, one.retriever, one.rerank and Reranker(one.rerank))
                    for name, one in config.cascades.items()}
    values: dict[str, npt.NDArray[np.float64]] = {}
    cost: dict[str, list[float]] = {name: [] for name in recommenders}
    for recommender in recommenders.values():
        answered(recommender, asked[:2])    # models are loaded and warm
    for number in range(config.rounds):
        for name in list(recommenders) if number % 2 == 0 else list(recommenders)[::-1]:
            begun = time.process_time()
            lists = answered(recommenders[name], asked)
            cost[name].append(1000 * (time.process_time() - begun) / len(asked))
            values[name] = ndcg(lists, asked)
            log.info("%-24s nDCG@10 %.4f, %8.2f CPU-ms", name, values[name].mean(), cost[name][-1])
    rows = table(values, cost, config)
    best, cheapest = max(rows, key=lambda row: row["ndcg10"]), min(rows, key=lambda row: row["cpu_ms"])
    headline: dict[str, float | None] = {
        "best_ndcg10": best["ndcg10"], "best_cpu_ms": best["cpu_ms"], "cheapest_ndcg10": cheapest["ndcg10"],
        "cheapest_cpu_ms": cheapest["cpu_ms"], "on_the_front": sum(row["front"] for row in rows)}
    written = write_result(config.result, command=f"python benchmarks/pareto.py {' '.join(sys.argv[1:])}",
                           headline=headline, tables={"cascades": rows, "setting": config.model_dump(mode="json")},
                           seeds=[config.seed])
    plot_rows(rows, config.plot)    # after it: a picture that changed would make the commit look dirty
    return written


def answered(recommender: Recommender, asked: Sequence[GradedQuery]) -> list[list[str]]:
    """The product ids of each query's first page."""
    return [[hit.product_id for hit in recommender.search(SearchRequest(query=one.query, k=SHOWN))["items"]]
            for one in asked]


def ndcg(lists: Sequence[Sequence[str]], asked: Sequence[GradedQuery]) -> npt.NDArray[np.float64]:
    """nDCG@10 of each query, (Q,), in the order of the query ids."""
    import pyarrow as pa

    judged = [{"query_id": one.query_id, "product_id": product, "gain": gain}
              for one in asked for product, gain in one.gains.items()]
    rows = [{"query_id": one.query_id, "product_id": product, "rank": rank}
            for one, found in zip(asked, lists, strict=True) for rank, product in enumerate(found, 1)]
    ranked = rank_judgments(pa.Table.from_pylist(judged, schema=JUDGED), [pa.Table.from_pylist(rows, schema=ANSWER)])
    return score_all(ranked, [NDCG])[:, 0]


def table(values: Mapping[str, npt.NDArray[np.float64]], cost: Mapping[str, Sequence[float]], config: JobConfig
          ) -> list[dict[str, Any]]:
    """A row per cascade: quality with its interval, cost, and whether it is on the front; cheapest first."""
    units = Units.rows(len(next(iter(values.values()))))
    rows = []
    for name, one in values.items():
        mean = mean_intervals(one[:, None], units, Resampling(samples=10_000, seed=config.seed))[0]
        cpu = min(cost[name])
        rows.append({"cascade": name, "ndcg10": float(one.mean()), "low": mean.low, "high": mean.high, "cpu_ms": cpu,
                     "price_per_million": 1e6 * cpu / HOUR_MS * config.cpu_hour_price})
    rows.sort(key=lambda row: row["cpu_ms"])
    for place, row in enumerate(rows):
        row["front"] = all(row["ndcg10"] > other["ndcg10"] for other in rows[:place])
    return rows


def plot_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw quality over cost, the front as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5), dpi=120)
    front = [row for row in rows if row["front"]]
    axes.plot([row["cpu_ms"] for row in front], [row["ndcg10"] for row in front], color="#1f5fbf", linewidth=1.2)
    for number, row in enumerate(rows, 1):      # names beside the points would lie over each other
        color = "#1f5fbf" if row["front"] else "#9aa0aa"
        axes.errorbar(row["cpu_ms"], row["ndcg10"], [[row["ndcg10"] - row["low"]], [row["high"] - row["ndcg10"]]],
                      fmt="o", color=color, elinewidth=0.6, markersize=11, label=f"{number}  {row['cascade']}")
        axes.annotate(str(number), (row["cpu_ms"], row["ndcg10"]), ha="center", va="center", fontsize=7, color="white")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False, markerscale=0.6)
    axes.set(xscale="log", xlabel="CPU-milliseconds a query", ylabel="nDCG@10")
    price = rows[0]["price_per_million"] / rows[0]["cpu_ms"]
    above = axes.secondary_xaxis("top", functions=(lambda ms: ms * price, lambda dollars: dollars / price))
    above.set_xlabel("dollars for a million queries")
    axes.grid(alpha=0.25)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
