"""A history of products -> products to recommend: the fitted recommenders of an artefact, asked online."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from recsys_ray.artifacts import Artifact, ArtifactError, open_artifact
from recsys_ray.ranking.train_recommenders import KIND, open_recommender

Floats = npt.NDArray[np.float32]
FALLBACK = "popularity"


class FittedRecommender(Protocol):
    """`Recommender` (popularity, ItemKNN, EASE) and `SequenceRecommender`."""

    items: tuple[str, ...]

    def recommend(self, history: list[str], k: int, exclude_seen: bool = True) -> tuple[list[str], Floats]:
        """The k best items for a history and their scores, best first."""


@dataclass(frozen=True)
class Suggestion:
    """Items for a history, best first."""

    product_ids: list[str]
    scores: Floats
    source: str         # the recommender, or what it falls back to
    known: int          # items of the history that it knows
    complete: bool      # there are no further items


class FirstStage:
    """A recommender that says what its list rests on."""

    def __init__(self, model: FittedRecommender, name: str) -> None:
        self.model, self.name = model, name
        self._items = frozenset(model.items)

    def suggest(self, history: Sequence[str], count: int) -> Suggestion:
        """The `count` best items that are not in the history; the most popular ones when nothing of it is known."""
        known = [one for one in history if one in self._items]
        items, scores = self.model.recommend(known, count)
        return Suggestion(items, scores, self.name if known else FALLBACK, len(known), len(items) < count)


def open_recommender_artifact(path: Path) -> Artifact:
    """The `recommenders` or `sequence_model` artefact at a root; `ArtifactError` for neither."""
    try:
        return open_artifact(path, KIND)
    except ArtifactError as error:
        from recsys_ray.training.sequence import KIND as SEQUENCE_KIND

        try:
            return open_artifact(path, SEQUENCE_KIND)
        except ArtifactError:
            raise error from None


def open_first_stage(artifact: Path, name: str) -> FirstStage:
    """The recommender `name` of a `recommenders` artefact, or the model of a `sequence_model` artefact.

    Errors: `ArtifactError` for neither, `ValueError` for a name that the artefact lacks.
    """
    found = open_recommender_artifact(artifact)
    if found.manifest.kind == KIND:
        return FirstStage(open_recommender(found, name), name)  # type: ignore[arg-type]
    from recsys_ray.training.sequence import open_sequence_model

    return FirstStage(open_sequence_model(found), "sequence")
