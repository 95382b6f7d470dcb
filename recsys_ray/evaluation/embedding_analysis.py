"""Is an embedding space in order, and has it moved since the last version? Figures, a page, and a trigger to retrain.

What is measured, all by cosine:

* mean similarity and its spread over random pairs; diversity is 1 - mean. A space whose pairs are all alike (a narrow
  cone) tells little apart.
* effective dimensions: the participation ratio (sum of the covariance's eigenvalues, squared, over the sum of their
  squares); how many directions the vectors really use.
* category match rate: the share of the k nearest neighbours that are of the same category, beside what chance gives
  (the sum of the squared shares of the categories).
* hubness: the skewness of how often a vector is among the k nearest of others (Radovanovic et al., JMLR 2010), the
  largest such count, and the share of vectors that nobody has as a neighbour and no search finds.
* near-duplicates: pairs of neighbours closer than a threshold.

Drift between two versions is seen on the products that both have: how far vectors moved (only where both come from one
encoder), the share of nearest neighbours kept (comparable whatever the encoder), and on new products: the probability
that one lies further from the old catalogue than an old one does (an AUC; 0.5 means that new products are like old).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from recsys_ray.config import Config

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class AnalysisError(ValueError):
    """Vectors that cannot be analysed or compared; the message says why."""


class AnalysisOptions(Config):
    """How deep and how wide is looked."""

    k: int = Field(default=10, ge=1)
    pairs: int = Field(default=50_000, ge=100)          # random ones
    sample: int = Field(default=5000, ge=10)            # vectors whose neighbours are looked for
    duplicate_cosine: float = Field(default=0.98, gt=0, le=1)
    seed: int = 7


class DriftLimits(Config):
    """From where on drift asks for a retraining."""

    kept_neighbours: float = Field(default=0.7, ge=0, le=1)     # less than this share of the k nearest kept
    moved: float = Field(default=0.05, ge=0)                    # more than this, 1 - mean cosine of the same product
    novelty: float = Field(default=0.75, ge=0.5, le=1)          # AUC of new products lying further out
    category_match_loss: float = Field(default=0.05, ge=0)


@dataclass(frozen=True)
class Duplicate:
    """Two vectors that are nearly one."""

    first: str
    second: str
    cosine: float


@dataclass(frozen=True)
class Drift:
    """What changed between two versions; None where it cannot be said."""

    common: int
    new: int
    gone: int
    moved: float | None
    kept_neighbours: float | None
    novelty: float | None
    category_match_change: float | None
    reasons: tuple[str, ...]        # why to retrain; empty: no need

    @property
    def retrain(self) -> bool:
        """Whether a limit is passed."""
        return bool(self.reasons)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "reasons": list(self.reasons), "retrain": self.retrain}


class EmbeddingAnalyser:
    """Figures of N vectors (N, D) with their ids and, where known, categories; each is computed when first asked."""

    def __init__(self, vectors: npt.NDArray[np.floating[Any]], ids: Sequence[str],
                 categories: Sequence[str | None] | None = None, options: AnalysisOptions | None = None) -> None:
        """Errors: `AnalysisError` for values that are not finite, vectors of zeros and lengths that do not fit."""
        vectors = np.asarray(vectors, np.float32)
        lengths = np.linalg.norm(vectors, axis=1)
        if len(ids) != len(vectors) or (categories is not None and len(categories) != len(vectors)):
            raise AnalysisError(f"{len(vectors)} vectors, {len(ids)} ids; each needs one, and a category if any has")
        if len(vectors) < 3 or not np.isfinite(lengths).all() or not lengths.all():
            raise AnalysisError(f"{len(vectors)} vectors, some of zeros or not finite; at least three good ones are "
                                "needed")
        self.ids, self.options = list(ids), options or AnalysisOptions()
        self.unit: Floats = vectors / lengths[:, None]
        self.categories = None if categories is None or not any(categories) else np.array(categories, object)
        self._neighbours: tuple[Ints, Ints, Floats] | None = None

    def similarities(self) -> Floats:
        """Cosines of random pairs of different vectors."""
        random = np.random.default_rng(self.options.seed)
        count = len(self.unit)
        first = random.integers(0, count, self.options.pairs)
        second = (first + random.integers(1, count, self.options.pairs)) % count
        step = max(1, (1 << 24) // self.unit.shape[1])
        return np.concatenate([np.einsum("nd,nd->n", self.unit[first[at:at + step]], self.unit[second[at:at + step]])
                               for at in range(0, len(first), step)])

    def diversity(self) -> dict[str, float]:
        """mean_similarity, std_similarity, diversity (1 - mean), effective_dimensions."""
        found = self.similarities()
        rows = self.unit[self._sample()].astype(np.float64)
        values = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2
        return {"mean_similarity": float(found.mean()), "std_similarity": float(found.std()),
                "diversity": float(1 - found.mean()),
                "effective_dimensions": float(values.sum() ** 2 / max(1e-30, float((values ** 2).sum())))}

    def neighbours(self) -> tuple[Ints, Ints, Floats]:
        """(sampled rows (S,), their k nearest others (S, k), the cosines (S, k)), nearest first, equal ones by row."""
        if self._neighbours is None:
            from recsys_ray.retrieval.vector_index import VectorIndex, VectorIndexConfig

            rows, k = self._sample(), min(self.options.k, len(self.unit) - 1)
            scores, places = VectorIndex.build(self.unit, VectorIndexConfig()).search(self.unit[rows], k + 1)
            others = np.argsort(places == rows[:, None], axis=1, kind="stable")[:, :k]    # the row itself goes last
            self._neighbours = (rows, np.take_along_axis(places, others, axis=1),
                                np.take_along_axis(scores, others, axis=1))
        return self._neighbours

    def category_match(self) -> dict[str, float] | None:
        """category_match_rate of the k nearest and category_match_chance; None without categories."""
        if self.categories is None:
            return None
        rows, places, _ = self.neighbours()
        known = np.array([one is not None for one in self.categories[rows]])
        same = self.categories[places[known]] == self.categories[rows[known]][:, None]
        _, counts = np.unique(self.categories[np.array([one is not None for one in self.categories])].astype(str),
                              return_counts=True)
        return {"category_match_rate": float(same.mean()) if known.any() else float("nan"),
                "category_match_chance": float(((counts / counts.sum()) ** 2).sum())}

    def occurrences(self) -> Ints:
        """How often each of the N vectors is among the k nearest of a sampled one."""
        return np.bincount(self.neighbours()[1].ravel(), minlength=len(self.unit)).astype(np.int64)

    def hubness(self) -> dict[str, float]:
        """hub_skewness, largest_hub (a share of the sampled), never_found (a share of all; with all sampled)."""
        counts = self.occurrences().astype(np.float64)
        spread = counts.std()
        return {"hub_skewness": float(((counts - counts.mean()) ** 3).mean() / spread ** 3) if spread else 0.0,
                "largest_hub": float(counts.max() / len(self.neighbours()[0])),
                "never_found": float((counts == 0).mean())}

    def near_duplicates(self) -> list[Duplicate]:
        """Neighbours at least `duplicate_cosine` alike, each pair once, the most alike first."""
        rows, places, scores = self.neighbours()
        found = {tuple(sorted((int(row), int(place)))): float(score)
                 for row, near, alike in zip(rows, places, scores, strict=True)
                 for place, score in zip(near, alike, strict=True) if score >= self.options.duplicate_cosine}
        ordered = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))
        return [Duplicate(self.ids[first], self.ids[second], round(score, 6)) for (first, second), score in ordered]

    def figures(self) -> dict[str, float]:
        """All figures by name."""
        sampled = max(1, len(self.neighbours()[0]))
        duplicates = {one for pair in self.near_duplicates() for one in (pair.first, pair.second)}
        return {"vectors": len(self.unit), "dimensions": self.unit.shape[1], **self.diversity(),
                **(self.category_match() or {}), **self.hubness(),
                "near_duplicates": min(1.0, len(duplicates) / sampled)}

    def _sample(self) -> Ints:
        count = len(self.unit)
        if count <= self.options.sample:
            return np.arange(count)
        return np.sort(np.random.default_rng(self.options.seed).choice(count, self.options.sample, replace=False))


def drift(before: EmbeddingAnalyser, after: EmbeddingAnalyser, limits: DriftLimits | None = None, *,
          same_encoder: bool) -> Drift:
    """What changed from one version to the next, and why that asks for a retraining, if it does."""
    limits = limits or DriftLimits()
    place = {one: number for number, one in enumerate(before.ids)}
    here = np.array([place.get(one, -1) for one in after.ids])
    old, now = here[here >= 0], np.flatnonzero(here >= 0)
    moved = None
    if same_encoder and len(old) and before.unit.shape[1] == after.unit.shape[1]:
        moved = float(1 - (before.unit[old] * after.unit[now]).sum(axis=1).mean())
    kept = _kept(before.unit[old], after.unit[now], after.options) if len(old) > 2 else None
    novelty = _novelty(before, after.unit[here < 0]) if (here < 0).any() and same_encoder else None
    first, second = before.category_match(), after.category_match()
    change = None if first is None or second is None else (second["category_match_rate"]
                                                           - first["category_match_rate"])
    reasons = [text for text, passed in (
        (f"neighbours kept {kept or 0:.3f}, below {limits.kept_neighbours:g}",
         kept is not None and kept < limits.kept_neighbours),
        (f"vectors moved by {moved or 0:.3f}, over {limits.moved:g}", moved is not None and moved > limits.moved),
        (f"new products lie further out than old ones (AUC {novelty or 0:.3f}, over {limits.novelty:g})",
         novelty is not None and novelty > limits.novelty),
        (f"category match fell by {-(change or 0):.3f}, over {limits.category_match_loss:g}",
         change is not None and -change > limits.category_match_loss)) if passed]
    return Drift(len(old), int((here < 0).sum()), len(before.ids) - len(old), moved, kept, novelty, change,
                 tuple(reasons))


def _kept(before: Floats, after: Floats, options: AnalysisOptions) -> float:
    """The mean share of the k nearest neighbours that are the same in both, among the products that both have."""
    names = [str(number) for number in range(len(before))]
    first, second = (EmbeddingAnalyser(one, names, options=options).neighbours()[1] for one in (before, after))
    shares = [len(np.intersect1d(one, other)) / len(one) for one, other in zip(first, second, strict=True)]
    return float(np.mean(shares))


def _novelty(before: EmbeddingAnalyser, new: Floats) -> float:
    """P(a new product is further from its nearest old one than an old one is), equal ones counted half."""
    from scipy.stats import rankdata

    from recsys_ray.retrieval.vector_index import VectorIndex, VectorIndexConfig

    nearest = VectorIndex.build(before.unit, VectorIndexConfig()).search(new, 1)[0][:, 0]
    usual = before.neighbours()[2][:, 0]
    ranks = rankdata(np.concatenate([-nearest, -usual]))
    wins = ranks[:len(nearest)].sum() - len(nearest) * (len(nearest) + 1) / 2
    return float(wins / (len(nearest) * len(usual)))
