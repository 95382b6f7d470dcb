"""Human labels: BM25, dense and hybrid retrieval over a whole catalogue, with intervals.

    python benchmarks/real_labels.py --config configs/bench_real_labels/esci.yaml

Runs the real stages (prepare, embed, build the index, retrieve) for each way of preparing the
catalogue. The weight of the hybrid is chosen by cross-validation over the queries and the figures of
the hybrid are out of fold: no query is scored under a weight that it helped to choose.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from recsys_ray.artifacts import Artifact, open_artifact
from recsys_ray.config import Config, main
from recsys_ray.evaluation.judgments import TableJudgments, read_judgments
from recsys_ray.evaluation.metrics import MetricSpec, rank_judgments, score_all
from recsys_ray.evaluation.results import write_result
from recsys_ray.evaluation.significance import Resampling, Units, compare_columns, mean_intervals
from recsys_ray.flow import FlowConfig, run_flow
from recsys_ray.retrieval.fusion import FusionConfig, TunedWeight, tune_dense_weight
from recsys_ray.retrieval.query_sets import QuerySource
from recsys_ray.retrieval.retriever import RetrieverConfig, refuse_candidates

Values = npt.NDArray[np.float64]
SPECS = tuple(MetricSpec.parse(name) for name in ("nDCG@10", "Recall@100", "Judged@10"))
NDCG, RECALL, JUDGED = range(len(SPECS))
KEPT = 100      # candidates of each answer: what Recall@100 needs
PARTS = ("bm25", "dense")


class JobConfig(Config):
    """Which catalogues, which labels, and how weights are chosen."""

    result: Path                                    # the result file
    catalogues: dict[str, FlowConfig]               # name -> how it is prepared; the first makes the headline
    queries: QuerySource
    judgments: TableJudgments
    relevant_gain: float = Field(default=1.0, gt=0)
    depth: int = Field(default=500, ge=KEPT)        # candidates of each retriever in the hybrid
    weight_step: float = Field(default=0.05, gt=0, le=0.5)
    folds: int = Field(default=5, ge=2)
    samples: int = Field(default=10_000, ge=100)
    seed: int = 7


@dataclass(frozen=True)
class Hybrid:
    """One fusion method: all metrics of each query, (Q, M), out of fold, and the curve over the weights."""

    values: Values
    tuned: TunedWeight
    curve: list[dict[str, float]]


def run(config: JobConfig) -> None:
    """Measure every catalogue and write the result file."""
    tables: dict[str, Any] = {"definitions": [spec.definition(config.relevant_gain) for spec in SPECS]}
    headline: dict[str, float] = {}
    for name, flow in config.catalogues.items():
        measured = _measure(config, flow)
        tables[name] = measured["table"]
        headline = headline or measured["headline"]
    command = f"python benchmarks/real_labels.py {shlex.join(sys.argv[1:])}"
    write_result(config.result, command=command, headline=headline, tables=tables, seeds=[config.seed])


def _measure(config: JobConfig, flow: FlowConfig) -> dict[str, Any]:
    candidates = _candidates(config, flow)
    judgments, _ = read_judgments(config.judgments, candidates["hybrid"])
    query_ids = sorted(str(one) for one in judgments["query_id"].unique().to_pylist())

    def score(tables: Sequence[pa.Table]) -> Values:
        return score_all(rank_judgments(judgments, tables, query_ids), SPECS, config.relevant_gain)

    parts = {name: score(list(candidates[name].tables("candidates-"))) for name in PARTS}
    deep = pa.concat_tables(candidates["hybrid"].tables("candidates-"))
    fusions = {"hybrid": FusionConfig(), "rrf": FusionConfig(method="rrf")}
    hybrids = {name: _tune(config, deep, fusion, score) for name, fusion in fusions.items()}
    committed = score([refuse_candidates(deep, FusionConfig(), KEPT)])
    systems = {**parts, **{name: one.values for name, one in hybrids.items()}, "hybrid_committed_weight": committed}
    comparisons = {name: _against_best_part(config, systems[name], parts) for name in systems if name not in PARTS}
    prepared = open_artifact(flow.prepare.output, "prepared")
    table = {
        "template": prepared.manifest.facts["template"], "products": prepared.manifest.rows("products/"),
        "queries": len(query_ids), "judgments": judgments.num_rows,
        "hybrid": "weights chosen by cross-validation, figures out of fold; hybrid_committed_weight: the default "
                  f"weight {FusionConfig().dense_weight}",
        "systems": [row for name, values in systems.items() for row in _rows(config, name, values)],
        "against_best_part": comparisons,
        "weights": {name: {**one.tuned.as_dict(), "curve": one.curve} for name, one in hybrids.items()},
    }
    return {"table": table, "headline": _headline(systems, hybrids, comparisons)}


def _candidates(config: JobConfig, flow: FlowConfig) -> Mapping[str, Artifact]:
    """The candidates of the three systems, through the real jobs."""
    systems = {"bm25": RetrieverConfig(mode="bm25", depth=KEPT), "dense": RetrieverConfig(mode="dense", depth=KEPT),
               "hybrid": RetrieverConfig(mode="hybrid", depth=config.depth)}
    asked = flow.replace(systems=systems, queries={"judged": config.queries}, top_k=2 * config.depth)
    return {system: artifact for (system, _), artifact in run_flow(asked).items()}


def _tune(config: JobConfig, deep: pa.Table, fusion: FusionConfig, score: Any) -> Hybrid:
    weights = [float(one) for one in np.round(np.arange(0, 1 + config.weight_step / 2, config.weight_step), 4)]
    values_WQM = np.stack([score([refuse_candidates(deep, fusion.replace(dense_weight=weight), KEPT)])
                           for weight in weights])
    tuned = tune_dense_weight(weights, values_WQM[:, :, NDCG], folds=config.folds, seed=config.seed)
    chosen_Q = np.array([weights.index(weight) for weight in tuned.query_weights])
    values_QM = values_WQM[chosen_Q, np.arange(values_WQM.shape[1])]
    means = np.nanmean(values_WQM, axis=1)
    curve = [{"dense_weight": weight, "ndcg10": float(mean[NDCG]), "recall100": float(mean[RECALL])}
             for weight, mean in zip(weights, means, strict=True)]
    return Hybrid(values_QM, tuned, curve)


def _rows(config: JobConfig, system: str, values: Values) -> list[dict[str, Any]]:
    found = mean_intervals(values, Units.rows(len(values)), Resampling(samples=config.samples, seed=config.seed))
    return [{"system": system, "metric": spec.name, **asdict(interval)}
            for spec, interval in zip(SPECS, found, strict=True)]


def _against_best_part(config: JobConfig, values: Values, parts: Mapping[str, Values]) -> dict[str, Any]:
    """nDCG@10 and Recall@100 against the part that is better at each, paired over the queries."""
    compared: dict[str, Any] = {}
    resampling = Resampling(samples=config.samples, seed=config.seed)
    for metric in (NDCG, RECALL):
        best = max(parts, key=lambda name: float(np.nanmean(parts[name][:, metric])))
        (one,) = compare_columns(values[:, [metric]], parts[best][:, [metric]], Units.rows(len(values)), resampling)
        compared[SPECS[metric].name] = {"best_part": best, **one.as_dict()}
    return compared


def _headline(systems: Mapping[str, Values], hybrids: Mapping[str, Hybrid],
              comparisons: Mapping[str, Any]) -> dict[str, float]:
    means = {name: np.nanmean(values, axis=0) for name, values in systems.items()}
    shown = {name: means[name] for name in (*PARTS, "hybrid", "rrf")}
    difference = comparisons["hybrid"]["nDCG@10"]["difference"]
    figures = {f"{name}_ndcg10": mean[NDCG] for name, mean in shown.items()}
    figures |= {f"{name}_recall100": mean[RECALL] for name, mean in shown.items()}
    figures |= {f"{name}_judged10": mean[JUDGED] for name, mean in shown.items()}
    figures |= {"hybrid_over_best_part": difference["mean"], "hybrid_over_best_part_ci_low": difference["low"],
                "hybrid_over_best_part_ci_high": difference["high"],
                "hybrid_committed_ndcg10": means["hybrid_committed_weight"][NDCG],
                "tuned_dense_weight": hybrids["hybrid"].tuned.weight,
                "committed_dense_weight": FusionConfig().dense_weight}
    return {name: round(float(value), 4) for name, value in figures.items()}


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
