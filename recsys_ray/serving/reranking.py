"""The shortlist of a first stage -> its order by the rankers, and why: what gateway and offline share.

The order itself is `Reranker.order`; here are the shapes before and after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_ray.ranking.features import FEATURES, Candidates
from recsys_ray.ranking.rerank import RerankConfig, Reranker
from recsys_ray.serving.answers import ConcernReason, Explanation, Influence

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Row = dict[str, Any]            # one product with the columns of the index's rows
TOLD = 8                        # features that an explanation names


@dataclass(frozen=True)
class Shortlist:
    """C candidates of a first stage, best first: their scores by name, `fused` among them, and what is shown."""

    scores: Mapping[str, Floats | None]
    cards: list[Row]

    @property
    def row_ids(self) -> Ints:
        """Of the candidates, (C,)."""
        return np.array([card["row_id"] for card in self.cards], dtype=np.int64)

    def head(self, count: int) -> Shortlist:
        """The best `count`."""
        return Shortlist({name: None if one is None else one[:count] for name, one in self.scores.items()},
                         self.cards[:count])

    def candidates(self, rows: pa.Table) -> Candidates:
        """As rankers take them; `rows` in the order of the list."""
        return Candidates(self.row_ids, self.scores, rows)


@dataclass(frozen=True)
class CrossScores:
    """The cross-encoder's scores of one query's texts, (N,), or why there are none."""

    scores: Floats | None
    reason: str = ""


@dataclass(frozen=True)
class Ordered:
    """Places in a shortlist of C, best first, and their scores; the rest only where an explanation was asked for."""

    places: Ints
    scores: Floats
    cross: Floats | None = None             # (C,), NaN where none was made
    features: Floats | None = None          # (C, F), as the trees saw them
    contributions: Floats | None = None     # (C, F): what each feature added to the score


@dataclass(frozen=True)
class Ranked:
    """A candidate in its place."""

    score: float
    card: Row
    first_rank: int         # in the shortlist


def as_found(shortlist: Shortlist) -> list[Ranked]:
    """The order of the first stage."""
    fused = shortlist.scores["fused"]
    assert fused is not None
    return [Ranked(float(score), card, rank)
            for rank, (score, card) in enumerate(zip(fused, shortlist.cards, strict=True), 1)]


def reordered(shortlist: Shortlist, ordered: Ordered) -> list[Ranked]:
    """The order of the rankers."""
    return [Ranked(float(score), shortlist.cards[place], place + 1)
            for place, score in zip(ordered.places.tolist(), ordered.scores, strict=True)]


def cross_texts(rows: pa.Table, config: RerankConfig) -> list[str]:
    """What the cross-encoder reads of a shortlist: the texts of its first candidates."""
    return [one or "" for one in rows["text"][:min(config.cross_top, config.depth)].to_pylist()]


def order_with(reranker: Reranker, query: str, candidates: Candidates, cross: Floats | None, seen: Collection[str],
               explain: bool) -> Ordered:
    """The reranker's order; with `explain` also what it rests on."""
    found = reranker.order(query, candidates, cross, seen)
    if not explain:
        return Ordered(found.places, found.scores)
    if reranker.gbdt is None or found.features is None:
        return Ordered(found.places, found.scores, cross)
    return Ordered(found.places, found.scores, cross, found.features, reranker.gbdt.contributions(found.features))


def score_each(score: Callable[[Sequence[str], Sequence[str]], Floats], asked: Sequence[tuple[str, list[str]]]
               ) -> list[CrossScores]:
    """The scores of several queries' texts in one go; one bad query never costs the others theirs.

    The batch is tried as a whole, sorted by length inside; when that fails, query by query.
    """
    try:
        queries = [query for query, texts in asked for _ in texts]
        scores = score(queries, [text for _, texts in asked for text in texts])
        parts = np.split(scores, np.cumsum([len(texts) for _, texts in asked])[:-1])
        return [CrossScores(part) if np.isfinite(part).all() else CrossScores(None, "not finite") for part in parts]
    except Exception as error:
        if len(asked) > 1:
            log.warning("a batch of %d queries failed (%s); scoring them one by one", len(asked), type(error).__name__)
            return [answer for one in asked for answer in score_each(score, [one])]
        log.warning("a query of %d characters cannot be scored", len(asked[0][0]), exc_info=True)
        return [CrossScores(None, type(error).__name__)]


def explanation(one: Ranked, shortlist: Shortlist, ordered: Ordered | None) -> Explanation:
    """Why a candidate stands where it does."""
    place = one.first_rank - 1
    scores = {name: float(values[place]) for name, values in shortlist.scores.items() if values is not None}
    concerns = concern_reasons(one.card)
    if ordered is None:
        return Explanation(scores=_known(scores), first_rank=one.first_rank, features=[], concerns=concerns)
    if ordered.cross is not None:
        scores["cross_encoder"] = float(ordered.cross[place])
    features: list[Influence] = []
    if ordered.features is not None and ordered.contributions is not None:
        scores["ranker"] = one.score
        values, added = ordered.features[place], ordered.contributions[place]
        strongest = np.argsort(-np.abs(added), kind="stable")[:TOLD]
        features = [Influence(feature=FEATURES[i], value=float(values[i]) if np.isfinite(values[i]) else None,
                              contribution=float(added[i])) for i in strongest.tolist() if added[i]]
    return Explanation(scores=_known(scores), first_rank=one.first_rank, features=features, concerns=concerns)


def concern_reasons(card: Row) -> list[ConcernReason]:
    """The concerns that a product addresses, the surest first, and the ingredients that say so where they are known."""
    probability, because = dict(card["concerns"] or ()), dict(card["because"] or ())
    return [ConcernReason(concern=one, probability=round(probability[one], 4), because=because.get(one, []))
            for one in sorted(card["addresses"] or (), key=lambda one: (-probability[one], one))]


def _known(scores: dict[str, float]) -> dict[str, float]:
    return {name: score for name, score in scores.items() if np.isfinite(score)}
