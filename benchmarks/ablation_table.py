"""The table of a retriever ablation, from the ranks of its cells: figures by slice, and gains with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys_ray.evaluation.significance import Comparison, Resampling, Units, compare

Floats = npt.NDArray[np.float64]
Cells = Mapping[str, Mapping[str, Mapping[str, Any]]]     # shop -> "row/seed" -> cell

METRICS: dict[str, Callable[[Floats], Floats]] = {
    "recall1": lambda rank: (rank <= 1).astype(float), "recall10": lambda rank: (rank <= 10).astype(float),
    "recall100": lambda rank: (rank <= 100).astype(float), "mrr": lambda rank: 1 / rank}
KINDS = ("dense", "hybrid", "all")      # all: of rows with token weights and token vectors only
UNTRAINED = ("popularity", "bm25", "oracle")
RESAMPLING = Resampling(samples=2000, permutations=2000)


def summary(cells: Cells, source: str, ours: str, null_shop: str | None) -> tuple[dict[str, float], dict[str, Any]]:
    """(headline, tables): per shop every system by slice, and each row against the source recipe and against base."""
    tables: dict[str, Any] = {}
    headline: dict[str, float] = {}
    for shop, made in cells.items():
        asked = made["base/0"]["asked"]
        trained: dict[str, list[str]] = {}
        for name in made:
            trained.setdefault(name.rpartition("/")[0], []).append(name)
        rows = [row for row in trained if row != "base"]
        ranks = {name: [np.array(made["base/0"]["ranks"][name], float)] for name in UNTRAINED}
        for row in ("base", *rows):
            of_seeds = [made[name]["ranks"] for name in trained[row]]
            for kind in (one for one in KINDS if one in of_seeds[0]):
                ranks[f"{row} {kind}"] = [np.array(one[kind], float) for one in of_seeds]
        units = Units.of(asked["product"], asked["user"])
        gains = {f"{row} {kind} against {name} {kind}": _gains(ranks[f"{row} {kind}"], ranks[f"{name} {kind}"], units)
                 for kind in ("dense", "hybrid") for name in ("base", source) for row in rows if row != name}
        gains |= {f"{row} all against {name} hybrid": _gains(ranks[f"{row} all"], ranks[f"{name} hybrid"], units)
                  for row in rows if f"{row} all" in ranks for name in dict.fromkeys(("base", source, ours, row))}
        gains[f"{ours} hybrid against {source} dense"] = _gains(ranks[f"{ours} hybrid"], ranks[f"{source} dense"],
                                                                units)
        tables[shop] = {"products": made["base/0"]["products"], "queries": len(asked["cold"]),
                        "systems": [_figures(name, ranks[name], asked) for name in ranks], "gains": gains,
                        "learning_rates": {row: [made[name]["learning_rate"] for name in trained[row]] for row in rows}}
        if shop == null_shop:
            headline["null_shop_max_gain"] = max(
                one["recall100"]["difference"] for name, one in gains.items() if "against base" in name)
        elif "recall100_gain_rel" not in headline:
            headline |= _headline(gains, source, ours)
    return headline, tables


def _headline(gains: Mapping[str, Any], source: str, ours: str) -> dict[str, float]:
    whole, dense = gains[f"{ours} hybrid against {source} dense"], gains[f"{ours} dense against {source} dense"]
    hybrid = gains[f"{ours} hybrid against {source} hybrid"]
    found = {f"{metric}_gain_{key}": whole[metric][f"worst_seed_{key}"]
             for metric in ("recall100", "recall10") for key in ("rel", "ci_low")}
    found |= {f"dense_{metric}_gain_{key}": dense[metric][f"worst_seed_{key}"]
              for metric in ("recall100", "recall10") for key in ("rel", "ci_low")}
    return found | {"hybrid_over_source_hybrid_recall100": hybrid["recall100"]["worst_seed_rel"],
                    "hybrid_over_source_hybrid_ci_low": hybrid["recall100"]["worst_seed_ci_low"]}


def _figures(name: str, ranks: Sequence[Floats], asked: Mapping[str, Any]) -> dict[str, Any]:
    cold, generic = np.array(asked["cold"], bool), np.array(asked["generic"], bool)
    slices = {"all": np.ones(len(cold), bool), "warm": ~cold, "cold": cold, "answerable": ~generic, "generic": generic}
    found: dict[str, Any] = {"system": name, "seeds": len(ranks)}
    for part, mask in slices.items():
        found[part] = {metric: _mean([value(one[mask]) for one in ranks]) for metric, value in METRICS.items()}
    return found


def _mean(values: Sequence[Floats]) -> float | None:
    return round(float(np.mean(values)), 4) if len(values[0]) else None


def _gains(candidate: Sequence[Floats], baseline: Sequence[Floats], units: Units) -> dict[str, Any]:
    """Each metric: over all seeds together, and of the seed with the lowest interval; relative to the baseline."""
    pairs = [(one, baseline[at % len(baseline)]) for at, one in enumerate(candidate)]
    found: dict[str, Any] = {}
    for metric, value in METRICS.items():
        level = float(np.mean([value(one) for one in baseline]))
        whole = compare(np.stack([value(a) for a, _ in pairs]), np.stack([value(b) for _, b in pairs]), units,
                        RESAMPLING)
        single: list[Comparison] = [compare(value(a), value(b), units, RESAMPLING) for a, b in pairs]
        worst = min(single, key=lambda one: one.difference.low)
        found[metric] = {
            "difference": _round(whole.difference.mean), "ci_low": _round(whole.difference.low),
            "ci_high": _round(whole.difference.high), "p_value": _round(whole.p_value),
            "detectable": _round(whole.detectable), "relative": _round(whole.difference.mean / max(level, 1e-9)),
            "worst_seed_rel": _round(worst.difference.mean / max(level, 1e-9)),
            "worst_seed_ci_low": _round(worst.difference.low / max(level, 1e-9))}
    return found


def _round(value: float) -> float:
    return round(float(value), 4)
