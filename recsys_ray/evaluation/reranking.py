"""What reranking is worth: figures over all queries, those whose product was never retrieved included.

A second stage cannot find what the first did not, and leaving such queries out makes every stage look better
than its shopper finds it. So a query whose right product is not among the candidates counts 0. The same figures
over the queries that had it are given beside them, marked as conditional: they compare rerankers, not systems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_ray.evaluation.metrics import MetricSpec, rank_judgments, score_all
from recsys_ray.evaluation.significance import Resampling, Units, compare_columns, mean_intervals

Values = npt.NDArray[np.float64]
SPECS = tuple(MetricSpec.parse(name) for name in ("nDCG@5", "MRR", "nDCG@10"))
PRIMARY = SPECS[0].name


@dataclass(frozen=True)
class RerankingValues:
    """Every metric of every query by every system, (Q, M) each; NaN where a query has nothing relevant."""

    query_ids: list[str]
    values: dict[str, Values]
    found: npt.NDArray[np.bool_]    # (Q,): something relevant was among the candidates


def reranking_values(judgments: pa.Table, answers: Mapping[str, Sequence[pa.Table]], query_ids: Sequence[str],
                     relevant_gain: float = 1.0, specs: Sequence[MetricSpec] = SPECS) -> RerankingValues:
    """The metrics of `query_ids`; `answers` are rows of (query_id, product_id, rank) by system.

    Whether a query was found is read off the first system, which must be the whole retrieval.
    """
    ranked = {name: rank_judgments(judgments, tables, query_ids) for name, tables in answers.items()}
    first = next(iter(ranked.values()))
    found = np.zeros(len(query_ids), dtype=bool)
    found[first.query[(first.rank > 0) & (first.gain >= np.float32(relevant_gain))]] = True
    return RerankingValues(list(query_ids), {name: score_all(one, specs, relevant_gain)
                                             for name, one in ranked.items()}, found)


def reranking_figures(measured: RerankingValues, baseline: str, units: Units | None = None,
                      resampling: Resampling | None = None, specs: Sequence[MetricSpec] = SPECS) -> dict[str, Any]:
    """Means with intervals of every system, and each one's paired difference to the baseline."""
    units = Units.rows(len(measured.query_ids)) if units is None else units
    resampling = resampling or Resampling()
    masks = {"unconditional": np.ones(len(measured.found), dtype=bool), "conditional": measured.found}
    table: dict[str, Any] = {
        "definitions": [spec.definition() for spec in specs],
        "unconditional": "all queries; one whose product was not retrieved counts 0",
        "conditional": "only the queries that had their product among the candidates",
        "queries": len(measured.found), "found": int(measured.found.sum()), "baseline": baseline,
        "systems": [], "differences": []}
    for scope, mask in masks.items():
        if not mask.any():
            continue
        part = units.take(mask)
        for name, values in measured.values.items():
            for spec, one in zip(specs, mean_intervals(values[mask], part, resampling), strict=True):
                table["systems"].append({"system": name, "scope": scope, "metric": spec.name, **asdict(one)})
            if name == baseline:
                continue
            compared = compare_columns(values[mask], measured.values[baseline][mask], part, resampling)
            for spec, other in zip(specs, compared, strict=True):
                table["differences"].append({"system": name, "scope": scope, "metric": spec.name, **other.as_dict()})
    return table


def figure(table: Mapping[str, Any], part: str, system: str, metric: str = PRIMARY) -> dict[str, Any]:
    """One unconditional row of `systems` or `differences`."""
    return next(row for row in table[part]
                if (row["system"], row["scope"], row["metric"]) == (system, "unconditional", metric))
