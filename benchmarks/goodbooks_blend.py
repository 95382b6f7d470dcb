"""The blend: LightGBM LambdaMART over collaborative and text scores, fitted to validation users alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from goodbooks_scores import Floats, Ints, Panel, ranks, standardised
from pydantic import Field

from recsys_ray.config import Config

STOP_SHARE = 5      # one validation user of so many stops the rounds instead of fitting


class BlendConfig(Config):
    """How trees grow; `leaves` are tried on the validation users that stop the rounds."""

    rounds: int = Field(default=400, ge=1)
    learning_rate: float = Field(default=0.05, gt=0)
    leaves: tuple[int, ...] = (7, 15, 31)
    min_leaf: int = Field(default=40, ge=1)
    stop_after: int = Field(default=40, ge=1)
    seed: int = 7


@dataclass(frozen=True)
class Features:
    """Of each (user, book): (U, E) columns by name; NaN where a system did not look."""

    columns: dict[str, Floats]

    def rows(self, names: Sequence[str], user: Ints, book: Ints) -> Floats:
        """Of N pairs, (N, F)."""
        return np.stack([self.columns[name][user, book] for name in names], axis=1)


def features(panel: Panel, scores: Mapping[str, Floats], reranked: Mapping[str, Floats]) -> Features:
    """Each system's score, its place in the user's whole list, and what is known of the user."""
    columns: dict[str, Floats] = {}
    for name, one in scores.items():
        columns[name] = one
        if name != "popularity":
            columns[f"{name}_standardised"] = standardised(one, panel.allowed)
            columns[f"{name}_rank"] = ranks(one, panel.allowed)
    shape = panel.allowed.shape
    known = np.diff(panel.known.offsets).astype(np.float32)[:, None]
    columns["history_length"] = np.broadcast_to(known, shape)
    return Features({**columns, **reranked})


@dataclass(frozen=True)
class Blend:
    """A fitted blend."""

    names: tuple[str, ...]
    booster: Any
    facts: dict[str, Any]

    def score(self, found: Features, user: Ints, book: Ints) -> npt.NDArray[np.float64]:
        """Of N pairs, (N,)."""
        return np.asarray(self.booster.predict(found.rows(self.names, user, book)), dtype=np.float64)


def fit_blend(found: Features, user: Ints, book: Ints, label: Ints, config: BlendConfig) -> Blend:
    """LambdaMART on rows sorted by user; rounds and leaves by the nDCG@10 of the users kept for it."""
    import lightgbm

    names = list(found.columns)
    stops = user % STOP_SHARE == 0
    values = found.rows(names, user, book)

    def part(mask: npt.NDArray[np.bool_], reference: Any = None) -> Any:
        sizes = np.unique(user[mask], return_counts=True)[1]
        return lightgbm.Dataset(values[mask], label[mask], group=sizes, reference=reference,
                                feature_name=names, free_raw_data=False)

    fit = part(~stops)
    stop = part(stops, fit)
    best: tuple[float, Any, int] | None = None
    tried = {}
    for leaves in config.leaves:
        booster = lightgbm.train({
            "objective": "lambdarank", "metric": "ndcg", "eval_at": [10], "learning_rate": config.learning_rate,
            "num_leaves": leaves, "min_data_in_leaf": config.min_leaf, "feature_fraction": 0.7, "bagging_fraction": 0.8,
            "bagging_freq": 1, "verbosity": -1, "seed": config.seed, "deterministic": True, "num_threads": 2,
            "lambdarank_truncation_level": 30}, fit, config.rounds, valid_sets=[stop],
            callbacks=[lightgbm.early_stopping(config.stop_after, verbose=False)])
        value = float(booster.best_score["valid_0"]["ndcg@10"])
        tried[str(leaves)] = value
        if best is None or value > best[0]:
            best = (value, booster, leaves)
    assert best is not None
    gains = best[1].feature_importance("gain")
    importance = {name: float(gain / gains.sum()) for name, gain in zip(names, gains, strict=True)}
    order = sorted(importance, key=lambda name: -importance[name])
    return Blend(tuple(names), best[1], {
        "leaves": best[2], "rounds": best[1].best_iteration, "stop_ndcg10": tried,
        "gain_share": {name: round(importance[name], 4) for name in order}})
