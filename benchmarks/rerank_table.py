"""The table of rerank_labels.py: every query as it was found out of fold, and what reranking added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from recsys_ray.evaluation.metrics import MetricSpec
from recsys_ray.evaluation.reranking import figure, reranking_figures, reranking_values
from recsys_ray.evaluation.significance import Resampling
from recsys_ray.schema import JUDGMENT

WHOLE, JUDGED = "whole catalogue", "judged only"
BASE, OURS = "retrieval", "both"
SPECS = {WHOLE: tuple(MetricSpec.parse(name) for name in ("nDCG@10", "nDCG@5", "MRR")),
         JUDGED: (MetricSpec.parse("nDCG(scope=judged)"), MetricSpec.parse("nDCG(scope=judged)@10"))}


def summary(cells: Sequence[Mapping[str, Any]], relevant_gain: float, seed: int
            ) -> tuple[dict[str, float], dict[str, Any]]:
    """(headline, tables) from one cell a fold."""
    resampling = Resampling(samples=10_000, seed=seed)
    ids = sorted(query for cell in cells for query in cell["query_ids"])
    judgments = pa.table({name: [one for cell in cells for one in cell["judgments"][name]]
                          for name in ("query_id", "product_id", "gain")}).cast(
        pa.schema([JUDGMENT.field(name) for name in ("query_id", "product_id", "gain")]))
    tables: dict[str, Any] = {
        "protocol": f"{len(cells)} folds of the queries, each reported by models neither trained nor chosen with it; "
                    "the weight of the fusion is chosen by the other queries too",
        "products": cells[0]["products"],
        "folds": [{"queries": len(cell["query_ids"]), "fusion": cell["fusion"], "trees": cell["trees"]}
                  for cell in cells]}
    for scope, specs in SPECS.items():
        answers = {name: [_table(cell["answers"][scope][name]) for cell in cells]
                   for name in cells[0]["answers"][scope]}
        measured = reranking_values(judgments, answers, ids, relevant_gain, specs)
        tables[scope] = reranking_figures(measured, BASE, None, resampling, specs)
    return _headline(tables), tables


def _table(answers: Mapping[str, Sequence[str]]) -> pa.Table:
    rows = [(query, product, rank) for query, products in answers.items() for rank, product in enumerate(products, 1)]
    return pa.table({"query_id": pa.array([row[0] for row in rows], pa.string()),
                     "product_id": pa.array([row[1] for row in rows], pa.string()),
                     "rank": pa.array([row[2] for row in rows], pa.int32())})


def _headline(tables: Mapping[str, Any]) -> dict[str, float]:
    whole, judged = tables[WHOLE], tables[JUDGED]
    ndcg, depth = SPECS[WHOLE][0].name, SPECS[JUDGED][0].name
    gain = figure(whole, "differences", OURS, ndcg)
    found = {
        "ndcg10_retrieval": figure(whole, "systems", BASE, ndcg)["mean"],
        "ndcg10_rerank": figure(whole, "systems", OURS, ndcg)["mean"],
        "gain_ci_low": gain["difference"]["low"], "gain_ci_high": gain["difference"]["high"],
        "detectable": gain["detectable"],
        "ndcg10_cross_encoder": figure(whole, "systems", "cross-encoder", ndcg)["mean"],
        "ndcg10_lightgbm": figure(whole, "systems", "lightgbm", ndcg)["mean"],
        "judged_only_ndcg": figure(judged, "systems", OURS, depth)["mean"],
        "judged_only_ndcg_retrieval": figure(judged, "systems", BASE, depth)["mean"],
        "judged_only_gain_ci_low": figure(judged, "differences", OURS, depth)["difference"]["low"]}
    return {name: round(float(value), 4) for name, value in found.items()}
