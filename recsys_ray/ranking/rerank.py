"""Candidates of one query -> their final order: cross-encoder, LightGBM, duplicates, diversity; ties by row id.

The service, the offline recommender and every benchmark call `Reranker.order`. Where a stage is missing (no
cross-encoder score in time, no model at all) the stages before it decide, so there is always an order.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from recsys_ray.artifacts import Manifest
from recsys_ray.config import Config
from recsys_ray.ids import row_ids
from recsys_ray.models.cross_encoder import CrossEncoder, CrossEncoderConfig, cross_encoder_identity
from recsys_ray.models.registry import build_cross_encoder
from recsys_ray.ranking.features import Candidates, feature_table
from recsys_ray.ranking.gbdt import GbdtRanker
from recsys_ray.ranking.text_match import words
from recsys_ray.retrieval.fusion import ranking
from recsys_ray.retrieval.segments import concern_model_of, refuse_other_concerns

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
STEP_BELOW = 1e-3       # from the last score of the candidates that a model scored to the first of the others
_LETTERS = re.compile(r"\w+")


class RerankError(ValueError):
    """A reranking that cannot be done as configured; the message names the key and the mend."""


class RerankConfig(Config):
    """Which models reorder how many candidates, and what an answer must not hold twice."""

    gbdt: Path | None = None                            # artefact root of the trees; None: the cross-encoder decides
    cross_encoder: CrossEncoderConfig | None = None
    cross_top: int = Field(default=20, ge=1)            # candidates that the cross-encoder scores
    depth: int = Field(default=100, ge=1)               # candidates that are reordered; the others follow
    diversity: float = Field(default=1.0, ge=0, le=1)   # lambda of MMR: 1 is relevance alone
    one_title: bool = True                              # of products with the same title only the best

    def rules(self) -> RerankConfig:
        """The same without models: what an answer must not hold twice, and how alike its products may be."""
        return self.replace(gbdt=None, cross_encoder=None)

    def resolved(self) -> RerankConfig:
        """The same with absolute paths: workers start in other directories."""
        cross = self.cross_encoder
        if cross is not None and Path(cross.model).is_dir():
            cross = cross.replace(model=str(Path(cross.model).resolve()))
        return self.replace(gbdt=self.gbdt and self.gbdt.resolve(), cross_encoder=cross)


@dataclass(frozen=True)
class Reordered:
    """An order of C candidates, without those that must not be shown."""

    places: Ints                # into the candidates, best first
    scores: Floats              # of those; with diversity below 1 they need not fall
    features: Floats | None     # (C, F) in the candidates' order, NaN beyond `depth`; None without trees


class Reranker:
    """The models of a configuration; the cross-encoder is loaded when it is first asked."""

    def __init__(self, config: RerankConfig, gbdt: GbdtRanker | None = None) -> None:
        """`gbdt` are trees that were not published yet, in place of those at `config.gbdt`.

        Errors: `RerankError` when the trees were fitted with another cross-encoder than the configured one.
        """
        self.config = config
        self.gbdt = gbdt if gbdt is not None or config.gbdt is None else GbdtRanker.load(config.gbdt)
        if self.gbdt is not None:
            _check_fit(self.gbdt, config)

    def refuse_foreign(self, index: Manifest) -> None:
        """Nothing when the trees may read this index; `IndexMismatch` when it knows concerns by another model."""
        if self.gbdt is not None:
            check_concern_model(self.gbdt.concern_model, index)

    @cached_property
    def cross_encoder(self) -> CrossEncoder:
        """The loaded cross-encoder; `RerankError` without one."""
        if self.config.cross_encoder is None:
            raise RerankError("rerank.cross_encoder: none is configured")
        return build_cross_encoder(self.config.cross_encoder)

    def to_cross(self, candidates: Candidates) -> Ints:
        """The places of the candidates that the cross-encoder should score, best retrieved first."""
        if self.config.cross_encoder is None:
            return np.zeros(0, np.int64)
        return ranking(candidates.fused, candidates.row_ids, min(self.config.cross_top, self.config.depth))

    def cross_scores(self, query: str, texts: Sequence[str]) -> Floats:
        """The cross-encoder's score of each text, (N,)."""
        return self.cross_encoder.score([query] * len(texts), texts)

    def cross(self, query: str, candidates: Candidates) -> Floats | None:
        """The cross-encoder's scores of C candidates, NaN for those it does not look at; None without one."""
        if self.config.cross_encoder is None:
            return None
        places = self.to_cross(candidates)
        texts = [one or "" for one in candidates.rows["text"].take(places).to_pylist()]
        return spread(self.cross_scores(query, texts), places, len(candidates))

    def order(self, query: str, candidates: Candidates, cross: Floats | None, seen: Collection[str] = (),
              as_of_ms: int | None = None) -> Reordered:
        """The candidates in their final order; `seen` are product ids that must not come.

        `cross` are the scores that `cross` gives, None when none came (in time). `as_of_ms` as in `feature_table`.
        """
        size = len(candidates)
        retrieved = ranking(candidates.fused, candidates.row_ids, size)
        head = retrieved[: self.config.depth]
        features, scores = None, np.full(size, np.nan)
        if self.gbdt is not None and size:
            table = feature_table(query, candidates.take(head), None if cross is None else cross[head], as_of_ms)
            features = np.full((size, table.shape[1]), np.nan, np.float32)
            features[head], scores[head] = table, self.gbdt.score(table)
        elif cross is not None:
            scores[head] = cross[head]
        scores = continued(scores, candidates.fused)
        places = ranking(scores, candidates.row_ids, size)
        places = places[~np.isin(candidates.row_ids[places], row_ids(seen))]
        titles = candidates.rows["title"].to_pylist()
        if self.config.one_title:
            places = first_of_title(places, titles)
        if self.config.diversity < 1:
            places = diverse(places, scores, titles, self.config.diversity, self.config.depth)
        return Reordered(places, scores[places].astype(np.float32), features)

    def contributions(self, reordered: Reordered) -> Floats:
        """What each feature added to each score, (C, F), NaN beyond `depth`; `RerankError` without trees."""
        if self.gbdt is None or reordered.features is None:
            raise RerankError("rerank.gbdt: without trees no feature adds anything to a score")
        found = np.full_like(reordered.features, np.nan)
        scored = ~np.isnan(reordered.features).all(axis=1)
        found[scored] = self.gbdt.contributions(reordered.features[scored])
        return found


def check_concern_model(trained_with: Mapping[str, Any] | None, index: Manifest) -> None:
    """Nothing when trees that read these probabilities of concerns find them in the index; else `IndexMismatch`.

    Trees that were fitted without any read none.
    """
    if trained_with is not None:
        refuse_other_concerns(concern_model_of(index), trained_with, "rerank.gbdt: the trees read probabilities by")


def _check_fit(gbdt: GbdtRanker, config: RerankConfig) -> None:
    wanted = gbdt.cross_encoder
    if wanted is not None:
        if config.cross_encoder is None:
            raise RerankError("rerank.cross_encoder: the trees read the scores of one; configure the one they were "
                              "fitted with")
        if (found := cross_encoder_identity(config.cross_encoder)) != wanted:
            different = sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))
            raise RerankError("rerank.cross_encoder: is another one than the trees were fitted with; different: "
                              + ", ".join(different))
    for name, trained in gbdt.trained_with.items():
        if (now := getattr(config, name)) != trained and (name != "cross_top" or wanted is not None):
            log.warning("rerank.%s is %d, but the trees were fitted with %d: ranks and gaps mean something else",
                        name, now, trained)


def spread(scores: Floats, places: Ints, size: int) -> Floats:
    """Scores (N,) of some candidates at their places among `size`, NaN elsewhere."""
    found = np.full(size, np.nan, np.float32)
    found[places] = scores
    return found


def continued(scores: npt.NDArray[np.float64], fused: Floats) -> npt.NDArray[np.float64]:
    """`scores` (C,) where the candidates without one (NaN) follow all others in the order of their fused scores."""
    known = ~np.isnan(scores)
    if known.all():
        return scores
    rest = fused[~known].astype(np.float64)
    start = scores[known].min() - STEP_BELOW - rest.max() if known.any() else 0.0
    found = scores.copy()
    found[~known] = rest + start
    return found


def first_of_title(places: Ints, titles: Sequence[str | None]) -> Ints:
    """`places` without those whose title, but for case and punctuation, came before; no title is like no other."""
    taken: set[str] = set()
    kept = []
    for place in places.tolist():
        title = " ".join(_LETTERS.findall((titles[place] or "").casefold()))
        if title in taken:
            continue
        if title:
            taken.add(title)
        kept.append(place)
    return np.array(kept, dtype=np.int64)


def diverse(places: Ints, scores: npt.NDArray[np.float64], titles: Sequence[str | None], weight: float, depth: int
            ) -> Ints:
    """The first `depth` places by maximal marginal relevance, then the rest as they were.

    weight * relevance - (1 - weight) * likeness to the likest one taken (Carbonell and Goldstein, SIGIR 1998):
    relevance is the score from 0 to 1 over these places, likeness the Jaccard index of the titles' words.
    """
    head, rest = places[:depth], places[depth:]
    if len(head) < 2:
        return places
    likeness = title_likeness([titles[place] for place in head.tolist()])
    span = scores[head].max() - scores[head].min()
    relevance = (scores[head] - scores[head].min()) / span if span > 0 else np.zeros(len(head))
    likest, left, taken = np.zeros(len(head)), np.ones(len(head), dtype=bool), list[int]()
    for _ in range(len(head)):
        gain = np.where(left, weight * relevance - (1 - weight) * likest, -np.inf)
        best = int(np.argmax(gain))     # of equal ones the first, which the order before decides
        taken.append(best)
        left[best] = False
        likest = np.maximum(likest, likeness[best])
    return np.concatenate([head[taken], rest])


def title_likeness(titles: Sequence[str | None]) -> npt.NDArray[np.float64]:
    """Jaccard index of each two titles' words, (N, N); a title without words is like no other."""
    sets = [words(one or "").known for one in titles]
    numbers = {word: number for number, word in enumerate(sorted(frozenset().union(*sets)))}
    has = np.zeros((len(sets), max(1, len(numbers))))
    for row, one in enumerate(sets):
        has[row, [numbers[word] for word in one]] = 1
    shared = has @ has.T
    sizes = has.sum(axis=1)
    either = sizes[:, None] + sizes[None, :] - shared
    likeness: npt.NDArray[np.float64] = np.divide(shared, either, out=np.zeros_like(shared), where=either > 0)
    return likeness
