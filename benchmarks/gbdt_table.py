"""The tables of gbdt.py, from the ranks of its cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recsys_ray.evaluation.metrics import RankedJudgments, score_all
from recsys_ray.evaluation.reranking import PRIMARY, SPECS, RerankingValues, figure, reranking_figures
from recsys_ray.evaluation.significance import Resampling, Units

Cells = Mapping[str, Mapping[str, Any]]     # shop -> stage -> cell
FUSED, OURS, LIGHT, CROSS = "fused", "both", "lightgbm", "cross-encoder"


def summary(cells: Cells, null_shop: str, seed: int) -> tuple[dict[str, float], dict[str, Any]]:
    """(headline, tables): every system against the fused retrieval, and each family's absence against all of them."""
    tables: dict[str, Any] = {}
    for shop, stages in cells.items():
        lists = stages["lists"]
        ranks = dict(lists["test"]["ranks"])
        trees = {name: stage for name, stage in stages.items() if name not in ("cross", "lists")}
        for stage in trees.values():
            ranks |= stage["ranks"]
        resampling = Resampling(samples=2000, permutations=2000, seed=seed)
        units = Units.of(lists["test"]["products"], lists["test"]["users"])
        measured = _values(lists["test"]["queries"], {FUSED: ranks[FUSED], **ranks})
        tables[shop] = {
            "products": lists["products"], "fusion": lists["fusion"], "fusion_curve": lists["curve"],
            "against_fused": reranking_figures(measured, FUSED, units, resampling),
            "cross_encoder": {name: stages["cross"]["training"].get(name) for name in (
                "steps", "best_step", "best_value", "pairs", "tokens", "cpu_seconds")},
            "trees": {name: {key: stage[key] for key in ("rounds", "stop_ndcg", "importance")}
                      for name, stage in trees.items()},
            "cpu_ms_a_query": {**lists["cpu_ms_a_query"], "trees": stages[OURS]["cpu_ms_a_query"]}}
        ablated = {name: ranks[name] for name in ranks if name.startswith("without ")}
        if ablated:
            whole = _values(lists["test"]["queries"], {OURS: ranks[OURS], LIGHT: ranks[LIGHT], **ablated})
            tables[shop]["families"] = reranking_figures(whole, OURS, units, resampling)
    main = next(name for name in cells if name != null_shop)
    return _headline(tables[main]["against_fused"], tables[null_shop]["against_fused"]), tables


def _values(query_ids: Sequence[str], ranks: Mapping[str, Sequence[int]]) -> RerankingValues:
    """The metrics of every query; lists end before the queries that have no answer, whose rank is 0."""
    count = len(query_ids)
    ranks = {name: [*one, *[0] * (count - len(one))] for name, one in ranks.items()}
    values = {name: score_all(RankedJudgments(tuple(query_ids), np.arange(count), np.ones(count),
                                              np.array(one, dtype=np.int64), np.array(one, dtype=np.int64)), SPECS)
              for name, one in ranks.items()}
    return RerankingValues(list(query_ids), values, np.array(next(iter(ranks.values()))) > 0)


def _headline(planted: Mapping[str, Any], null: Mapping[str, Any]) -> dict[str, float]:
    level = figure(planted, "systems", FUSED)["mean"]
    gain = figure(planted, "differences", OURS)["difference"]
    nothing = figure(null, "differences", OURS)["difference"]
    found = {
        "ndcg5_fused": level, "ndcg5_cross_encoder": figure(planted, "systems", CROSS)["mean"],
        "ndcg5_lightgbm": figure(planted, "systems", LIGHT)["mean"],
        "ndcg5_both": figure(planted, "systems", OURS)["mean"],
        "ndcg5_gain_rel": gain["mean"] / max(level, 1e-9), "ndcg5_gain_ci_low": gain["low"] / max(level, 1e-9),
        "gain_over_fusion_ci_low": gain["low"], "mrr_both": figure(planted, "systems", OURS, "MRR")["mean"],
        "mrr_fused": figure(planted, "systems", FUSED, "MRR")["mean"],
        "null_shop_gain": nothing["mean"], "null_shop_gain_ci_low": nothing["low"],
        "null_shop_gain_ci_high": nothing["high"]}
    assert PRIMARY == "nDCG@5"
    return {name: round(float(value), 4) for name, value in found.items()}
