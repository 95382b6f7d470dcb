"""Does a lever that helps in one shop help in another? Signs of gains and orders of methods, data set by data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import kendalltau

from recsys_ray.evaluation.significance import Resampling, Units, compare

Values = npt.NDArray[np.float64]
RESAMPLING = Resampling(samples=2000, permutations=2000)
ROUNDED = 4

# lever -> (the system with it, the system without it); each also with "hybrid" in the place of "dense"
LEVERS = {
    "fine-tuning, source recipe": ("source", "base"),
    "own words left out of the positive": ("leave_one_out", "source"),
    "larger batch, false negatives masked": ("large_batch", "leave_one_out"),
    "mined negatives, false negatives masked": ("mined", "leave_one_out"),
}


class Measured:
    """One data set: systems -> metric -> (S, Q) figures a seed and query; and what its bootstrap resamples."""

    def __init__(self, systems: Mapping[str, Mapping[str, Values]], units: Units) -> None:
        self.systems, self.units = systems, units

    def level(self, system: str, metric: str) -> float:
        """The mean of a system."""
        return float(np.nanmean(self.systems[system][metric]))

    def gain(self, one: str, other: str, metric: str) -> dict[str, Any]:
        """The paired difference of two systems with its interval, and what sign it shows: +1, -1 or 0 (undecided)."""
        first, second = self.systems[one][metric], self.systems[other][metric]
        seeds = max(len(first), len(second))
        found = compare(_of_seeds(first, seeds), _of_seeds(second, seeds), self.units, RESAMPLING)
        low, high = found.difference.low, found.difference.high
        return {"difference": round(found.difference.mean, ROUNDED), "ci_low": round(low, ROUNDED),
                "ci_high": round(high, ROUNDED), "detectable": round(found.detectable, ROUNDED),
                "sign": int(np.sign(found.difference.mean)), "shown": 1 if low > 0 else -1 if high < 0 else 0}


def _of_seeds(values: Values, seeds: int) -> Values:
    """A system without seeds of its own beside one with several."""
    return np.repeat(values, seeds, axis=0) if len(values) == 1 else values


def rank_figures(ranks: Sequence[Sequence[int]]) -> dict[str, Values]:
    """The metrics of queries with one relevant product, from its ranks (S, Q)."""
    rank_SQ = np.array(ranks, float)
    return {"ndcg10": np.where(rank_SQ <= 10, 1 / np.log2(1 + rank_SQ), 0.0),
            "recall100": (rank_SQ <= 100).astype(float)}


def transfer(data: Mapping[str, Measured], home: str, metrics: Sequence[str]
             ) -> tuple[dict[str, float], dict[str, Any]]:
    """(headline, tables): the ladder, the levers and their agreement, Kendall's tau; `home` is what others are held to.
    """
    systems = list(data[home].systems)
    tables: dict[str, Any] = {
        "ladder": [{"system": name, **{metric: {place: round(one.level(name, metric), ROUNDED)
                                                for place, one in data.items()} for metric in metrics}}
                   for name in systems]}
    levers: list[dict[str, Any]] = []
    for metric in metrics:
        for lever, (one, other) in levers_among(systems).items():
            gains = {place: found.gain(one, other, metric) for place, found in data.items()}
            levers.append({"lever": lever, "metric": metric, "gains": gains, **agreement(gains, home)})
    taus = {metric: order_agreement({place: [one.level(name, metric) for name in systems]
                                     for place, one in data.items()}) for metric in metrics}
    tables |= {"levers": levers, "kendall_tau": taus}
    return _headline(levers, taus, home, metrics), tables


def levers_among(systems: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The levers that these systems show, for vectors alone and for the hybrid, and the fusion itself."""
    every = {f"{lever} ({kind})": (f"{one} {kind}", f"{other} {kind}")
             for kind in ("dense", "hybrid") for lever, (one, other) in LEVERS.items()}
    every |= {"BM25 beside the vectors": ("base hybrid", "base dense")}
    return {lever: pair for lever, pair in every.items() if set(pair) <= set(systems)}


def agreement(gains: Mapping[str, Mapping[str, Any]], home: str) -> dict[str, Any]:
    """How far the other data sets tell the same of a lever as `home`.

    `same_sign` is the share of the others whose difference has the sign of home's, interval or not; `verdict`:
    *disagrees* when home's and another's interval exclude zero on different sides, or an interval of another
    is below zero; *agrees* when home and one other show a gain and none a loss; else *undecided*.
    """
    others = [one for name, one in gains.items() if name != home]
    same = float(np.mean([one["sign"] == gains[home]["sign"] for one in others]))
    shown = [one["shown"] for one in others]
    if -1 in shown or (gains[home]["shown"] == -1 and 1 in shown):
        verdict = "disagrees"
    else:
        verdict = "agrees" if gains[home]["shown"] == 1 and 1 in shown else "undecided"
    return {"same_sign": round(same, ROUNDED), "verdict": verdict}


def order_agreement(levels: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Kendall's tau-b between the orders of the same systems, for each pair of data sets."""
    return {f"{one} / {other}": round(float(kendalltau(levels[one], levels[other]).statistic), ROUNDED)
            for one, other in combinations(levels, 2)}


def _headline(levers: Sequence[Mapping[str, Any]], taus: Mapping[str, Mapping[str, float]], home: str,
              metrics: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in metrics:
        mine = [one for one in levers if one["metric"] == metric]
        found[f"sign_agreement_{metric}"] = round(float(np.mean([one["same_sign"] for one in mine])), ROUNDED)
        for verdict in ("agrees", "disagrees", "undecided"):
            found[f"levers_{verdict}_{metric}"] = sum(one["verdict"] == verdict for one in mine)
        found[f"kendall_tau_{metric}"] = round(float(np.mean(list(taus[metric].values()))), ROUNDED)
        found[f"kendall_tau_min_{metric}"] = min(taus[metric].values())
    return found
