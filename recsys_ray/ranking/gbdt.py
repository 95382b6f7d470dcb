"""LightGBM LambdaMART over the features: candidates' feature tables -> scores, and what each feature added.

The model is LightGBM's own text file inside a "gbdt" artefact, whose manifest has its SHA-256 and names the
features it was fitted to; it refuses any other list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator, model_validator

from recsys_ray.artifacts import open_artifact
from recsys_ray.config import Config
from recsys_ray.ranking.features import FAMILIES, FEATURES

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
KIND = "gbdt"
MODEL = "model.txt"
FUSED_RANK = FEATURES.index("fused_rank")


class GbdtError(ValueError):
    """Trees that cannot be fitted or used; the message names what does not fit."""


class GbdtConfig(Config):
    """How trees grow."""

    rounds: int = Field(default=600, ge=1)
    stop_after: int = Field(default=50, ge=1)               # rounds without a better nDCG on the stopping lists
    stop_at: int = Field(default=5, ge=1)                   # cut-off of that nDCG
    learning_rate: float = Field(default=0.05, gt=0)
    leaves: int = Field(default=15, ge=2)
    min_leaf: int = Field(default=40, ge=1)                 # candidates in a leaf
    feature_fraction: float = Field(default=0.6, gt=0, le=1)
    bagging_fraction: float = Field(default=0.8, gt=0, le=1)
    l2: float = Field(default=1.0, ge=0)
    truncation: int = Field(default=30, ge=1)               # places whose exchanges are learned from
    # trees begin at -start * ln(rank by retrieval), so that with few lists they mend an order and need not learn it
    start: float = Field(default=0.0, ge=0)
    label_gain: tuple[float, ...] | None = None             # gain of label 0, 1, ...; None: the judgments' own gains
    monotone: dict[str, Literal[-1, 1]] = Field(default_factory=dict)   # feature -> more of it never lowers / raises
    without: tuple[str, ...] = ()                           # families that are not read
    threads: int = Field(default=1, ge=1)
    seed: int = 7

    @field_validator("monotone")
    @classmethod
    def _known_features(cls, given: dict[str, Literal[-1, 1]]) -> dict[str, Literal[-1, 1]]:
        if unknown := set(given) - set(FEATURES):
            raise ValueError(f"no feature {', '.join(sorted(unknown))}")
        return given

    @field_validator("without")
    @classmethod
    def _known_families(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(given) - set(FAMILIES):
            raise ValueError(f"no family {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
        return given

    @model_validator(mode="after")
    def _start_is_read(self) -> Self:
        if self.start and "fused" in self.without:
            raise ValueError("start: begins from the fused rank, whose family is in without")
        return self

    @property
    def columns(self) -> Ints:
        """The columns of the feature table that are read."""
        left_out = {name for family in self.without for name in FAMILIES[family]}
        return np.array([place for place, name in enumerate(FEATURES) if name not in left_out], dtype=np.int64)

    def params(self, label_gain: Sequence[float]) -> dict[str, Any]:
        """LightGBM's parameters."""
        return {
            "objective": "lambdarank", "metric": "ndcg", "eval_at": [self.stop_at], "label_gain": list(label_gain),
            "learning_rate": self.learning_rate, "num_leaves": self.leaves, "min_data_in_leaf": self.min_leaf,
            "feature_fraction": self.feature_fraction, "bagging_fraction": self.bagging_fraction, "bagging_freq": 1,
            "bagging_by_query": True, "lambda_l2": self.l2, "lambdarank_truncation_level": self.truncation,
            "monotone_constraints": [self.monotone.get(FEATURES[one], 0) for one in self.columns],
            "deterministic": True, "force_row_wise": True, "num_threads": self.threads, "seed": self.seed,
            "verbosity": -1}


@dataclass(frozen=True)
class Lists:
    """The candidates of Q queries, one list after the other: N rows."""

    features: Floats            # (N, F), columns FEATURES
    labels: Ints                # (N,): 0, 1, ..., what each is worth is `label_gain`
    sizes: Ints                 # (Q,)
    positions: Ints | None = None   # (N,): where each was shown, 1 the top; None: not known

    def __post_init__(self) -> None:
        """Errors: `GbdtError` when the parts do not belong together."""
        lengths = {"labels": len(self.labels), "sizes": int(self.sizes.sum())}
        if self.positions is not None:
            lengths["positions"] = len(self.positions)
        if self.features.shape[1:] != (len(FEATURES),) or set(lengths.values()) - {len(self.features)}:
            raise GbdtError(f"features of shape {self.features.shape} for {len(FEATURES)} names and {lengths}")

    def take(self, queries: npt.NDArray[np.bool_]) -> Lists:
        """The lists of the masked queries (Q,)."""
        rows = np.repeat(queries, self.sizes)
        return Lists(self.features[rows], self.labels[rows], self.sizes[queries],
                     None if self.positions is None else self.positions[rows])

    def telling(self) -> npt.NDArray[np.bool_]:
        """Which lists hold two different labels, (Q,): from the others nothing is learned."""
        starts = np.cumsum(self.sizes) - self.sizes
        return np.array([size > 0 and bool((self.labels[start:start + size] != self.labels[start]).any())
                         for start, size in zip(starts.tolist(), self.sizes.tolist(), strict=True)], dtype=bool)


def beginning(features: Floats, start: float) -> npt.NDArray[np.float64]:
    """Where the trees begin, (N,): -start * ln(rank by retrieval)."""
    return -start * np.log(np.maximum(features[:, FUSED_RANK].astype(np.float64), 1.0))


def graded(gains: npt.NDArray[np.floating[Any]], label_gain: Sequence[float] | None = None
           ) -> tuple[Ints, tuple[float, ...]]:
    """(label of each row, gain of each label): labels number the different gains, 0 being 0.

    A configured `label_gain` gives the labels other gains, as many as there are.
    """
    levels = np.unique(np.concatenate([np.zeros(1), np.asarray(gains, dtype=np.float64)]))
    labels = np.searchsorted(levels, np.asarray(gains, dtype=np.float64)).astype(np.int64)
    if label_gain is not None and len(label_gain) < len(levels):
        raise GbdtError(f"label_gain: {len(label_gain)} gains for the {len(levels)} different gains of the judgments: "
                        f"{levels.tolist()}")
    return labels, tuple(label_gain) if label_gain is not None else tuple(levels.tolist())


@dataclass(frozen=True)
class Fitted:
    """Grown trees, and where they stopped."""

    booster: Any
    rounds: int         # that are kept
    stop_ndcg: float    # of the stopping lists, at that round


def fit(lists: Lists, stop: Lists, config: GbdtConfig, label_gain: Sequence[float],
        network: Mapping[str, Any] | None = None) -> Fitted:
    """Trees fitted to `lists`; `stop` decides how many rounds are kept.

    The same input gives the same trees. With positions, a bias of each position is learned beside the trees and
    taken off the labels (unbiased LambdaMART as LightGBM has it). `network` are LightGBM's parameters of a group of
    workers: `lists` are then this worker's, and `stop` the same on all of them, so that all stop at one round.
    Errors: `GbdtError` when either holds no list from which an order can be learned.
    """
    import lightgbm

    parts = []
    for name, one in (("fit", lists), ("stop", stop)):
        telling = one.take(one.telling())
        if not len(telling.sizes):
            raise GbdtError(f"{name}: none of {len(one.sizes)} lists holds candidates of different labels; retrieve "
                            "deeper, or for more queries")
        parts.append(telling)
    data = [lightgbm.Dataset(one.features[:, config.columns], one.labels, group=one.sizes, position=one.positions,
                             init_score=beginning(one.features, config.start) if config.start else None,
                             feature_name=[FEATURES[column] for column in config.columns]) for one in parts]
    data[1].set_reference(data[0])
    booster = lightgbm.train({**config.params(label_gain), **(network or {})}, data[0], config.rounds,
                             valid_sets=[data[1]], valid_names=["stop"],
                             callbacks=[lightgbm.early_stopping(config.stop_after, verbose=False)])
    return Fitted(booster, int(booster.best_iteration), float(booster.best_score["stop"][f"ndcg@{config.stop_at}"]))


def model_text(fitted: Fitted) -> str:
    """LightGBM's text file of the rounds that are kept."""
    return str(fitted.booster.model_to_string(num_iteration=fitted.rounds))


@dataclass(frozen=True)
class GbdtRanker:
    """Fitted trees, and what they were fitted with."""

    booster: Any
    columns: Ints                               # of FEATURES that the trees read
    cross_encoder: dict[str, Any] | None        # identity of the one whose scores they read; None: they read none
    trained_with: Mapping[str, int]             # depth, cross_top
    start: float = 0.0                          # as in `GbdtConfig`
    concern_model: dict[str, Any] | None = None     # whose probabilities they read; None: of none

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The trees of a "gbdt" artefact, their checksum verified.

        Errors: `ArtifactError` for a missing or damaged one, `GbdtError` when they read other features than ours.
        """
        artifact = open_artifact(folder, KIND)
        facts = artifact.manifest.facts
        known = tuple(facts["features"])
        if known != FEATURES:
            different = sorted(set(known) ^ set(FEATURES)) or ["their order"]
            raise GbdtError(f"{artifact.path}: fitted to {len(known)} features, here are {len(FEATURES)}; different: "
                            f"{', '.join(different[:5])}; fit it again")
        return cls.of(artifact.file(MODEL).read_text(encoding="utf-8"), facts["cross_encoder"], facts["trained_with"],
                      facts["start"], facts["concern_model"])

    @classmethod
    def of(cls, text: str, cross_encoder: dict[str, Any] | None, trained_with: Mapping[str, int],
           start: float = 0.0, concern_model: dict[str, Any] | None = None) -> Self:
        """The trees of LightGBM's text; `GbdtError` when they read a feature that is none of ours."""
        import lightgbm

        booster = lightgbm.Booster(model_str=text)
        if unknown := [name for name in booster.feature_name() if name not in FEATURES]:
            raise GbdtError(f"the trees read {', '.join(unknown[:5])}, which is no feature of ours; fit them again")
        columns = np.array([FEATURES.index(name) for name in booster.feature_name()], dtype=np.int64)
        return cls(booster, columns, cross_encoder, dict(trained_with), start, concern_model)

    def importance(self) -> dict[str, float]:
        """The share of each feature in the gain of all splits, largest first."""
        gains = self.booster.feature_importance("gain")
        shares = {FEATURES[column]: float(gain / max(gains.sum(), 1e-12))
                  for column, gain in zip(self.columns, gains, strict=True)}
        return dict(sorted(shares.items(), key=lambda one: (-one[1], one[0])))

    def score(self, features: Floats) -> npt.NDArray[np.float64]:
        """The score of each row of a feature table (C, F), (C,); higher is better."""
        own = self._own(features)
        if not len(own):
            return np.zeros(0)
        grown: npt.NDArray[np.float64] = self.booster.predict(own, num_threads=1)
        return grown + beginning(features, self.start) if self.start else grown

    def contributions(self, features: Floats) -> Floats:
        """What each feature added to the score of each row, (C, F) (TreeSHAP); 0 for features that are not read."""
        found = np.zeros(features.shape, np.float32)
        if len(features):
            found[:, self.columns] = self.booster.predict(self._own(features), pred_contrib=True, num_threads=1)[:, :-1]
        if self.start:
            found[:, FUSED_RANK] += beginning(features, self.start)
        return found

    def _own(self, features: Floats) -> Floats:
        if features.ndim != 2 or features.shape[1] != len(FEATURES):
            raise GbdtError(f"a table of shape {features.shape}; the trees read {len(FEATURES)} features")
        return features[:, self.columns]
