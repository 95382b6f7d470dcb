"""The table of a nested cross-validation: every query as it was found out of fold, and the gain with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
from judged_answers import METRICS, Fold

from recsys_ray.evaluation.significance import Comparison, Resampling, Units, compare_columns, mean_intervals
from recsys_ray.retrieval.fusion import tune_dense_weight

Values = npt.NDArray[np.float64]
RESAMPLING = Resampling(samples=10_000)
ROUNDED = 4


def summary(base: Mapping[str, Any], trained: Sequence[Mapping[str, Any]], folds: Sequence[Fold],
            weights: Sequence[float], relevant_gain: float) -> tuple[dict[str, float], dict[str, Any]]:
    """(headline, tables) from the cell of the base model and one cell a fold; the figures are out of fold."""
    zero, zero_weights = out_of_fold([base] * len(folds), folds, weights)
    tuned, tuned_weights = out_of_fold(trained, folds, weights)
    ids = sorted(zero["bm25"])
    systems = {"bm25": zero["bm25"], "zero-shot dense": zero["dense"], "fine-tuned dense": tuned["dense"],
               "zero-shot hybrid": zero["hybrid"], "fine-tuned hybrid": tuned["hybrid"]}
    values = {name: np.array([found[one] for one in ids], float) for name, found in systems.items()}
    gains = {kind: dict(zip(METRICS, compare_columns(values[f"fine-tuned {kind}"], values[f"zero-shot {kind}"],
                                                     Units.rows(len(ids)), RESAMPLING), strict=True))
             for kind in ("hybrid", "dense")}
    tables = {
        "definitions": [spec.definition(relevant_gain) for spec in METRICS.values()],
        "protocol": f"{len(folds)} folds of the queries, each reported by encoders neither trained nor chosen with it",
        "queries": len(ids), "products": base["products"],
        "verdict": {kind: {metric: verdict(one) for metric, one in of_kind.items()} for kind, of_kind in gains.items()},
        "systems": [row for name, found in values.items() for row in _rows(name, found)],
        "gains": {kind: {metric: one.as_dict() for metric, one in of_kind.items()} for kind, of_kind in gains.items()},
        "folds": [_fold_row(cell, fold, weight, base_weight) for cell, fold, weight, base_weight
                  in zip(trained, folds, tuned_weights, zero_weights, strict=True)]}
    return _headline(values, gains), tables


def out_of_fold(cells: Sequence[Mapping[str, Any]], folds: Sequence[Fold], weights: Sequence[float]
                ) -> tuple[dict[str, dict[str, list[float]]], list[float]]:
    """({system: {query: its figure for each metric}}, the fusion weight of each fold).

    A cell has `query_ids` and for these `bm25`, `dense` (Q, M) and `hybrid` (W, Q, M). The weight is the best of
    the queries that choose, the figures are those of the queries that are reported.
    """
    found: dict[str, dict[str, list[float]]] = {"bm25": {}, "dense": {}, "hybrid": {}}
    taken = []
    for cell, fold in zip(cells, folds, strict=True):
        place = {name: at for at, name in enumerate(cell["query_ids"])}
        hybrid_WQM = np.array(cell["hybrid"], float)
        choosing = hybrid_WQM[:, [place[one] for one in fold.choose], 0]
        weight = tune_dense_weight(weights, choosing, folds=2).weight
        taken.append(weight)
        parts = {"bm25": cell["bm25"], "dense": cell["dense"], "hybrid": cell["hybrid"][list(weights).index(weight)]}
        for name, of_part in parts.items():
            found[name] |= {one: of_part[place[one]] for one in fold.report}
    return found, taken


def verdict(gain: Comparison) -> str:
    """better, worse or undecided, by the interval; unchanged where no query moved, which no interval can tell."""
    if not gain.wins + gain.losses:
        return "unchanged"
    return "better" if gain.difference.low > 0 else "worse" if gain.difference.high < 0 else "undecided"


def _rows(system: str, values: Values) -> list[dict[str, Any]]:
    found = mean_intervals(values, Units.rows(len(values)), RESAMPLING)
    return [{"system": system, "metric": metric, **asdict(one)} for metric, one in zip(METRICS, found, strict=True)]


def _fold_row(cell: Mapping[str, Any], fold: Fold, weight: float, base_weight: float) -> dict[str, Any]:
    facts = cell["training"]
    return {"report": len(fold.report), "choose": len(fold.choose), "train": len(fold.train),
            "learning_rate": cell["learning_rate"], "share": cell["share"], "dense_weight": weight,
            "zero_shot_dense_weight": base_weight,
            **{name: facts[name] for name in ("steps", "best_step", "base_value", "best_value", "cpu_seconds",
                                              "false_negative_share", "pairs")}}


def _headline(values: Mapping[str, Values], gains: Mapping[str, Mapping[str, Comparison]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for at, metric in enumerate(METRICS):
        means = {name: float(np.nanmean(one[:, at])) for name, one in values.items()}
        found[f"bm25_{metric}"] = means["bm25"]
        for kind, front in (("hybrid", ""), ("dense", "dense_")):
            gain = gains[kind][metric]
            found |= {f"{front}{metric}_zero_shot": means[f"zero-shot {kind}"],
                      f"{front}{metric}_finetuned": means[f"fine-tuned {kind}"]}
            told = front if metric == "ndcg10" else f"{front}{metric}_"
            found |= {f"{told}gain": gain.difference.mean, f"{told}gain_ci_low": gain.difference.low,
                      f"{told}gain_ci_high": gain.difference.high, f"{told}detectable": gain.detectable,
                      f"{told}p_value": gain.p_value}
    return {name: round(value, ROUNDED) for name, value in found.items()}
