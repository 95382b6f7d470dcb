"""Hybrid vectors of a catalogue, ready to be asked: the "hybrid_index" artefact, opened.

Layout: rows.parquet (HYBRID_ROWS, by row id), vectors.npy and, unless flat, vectors.faiss (row by row the same
products), space.npz (means and projections). Facts: parts with their weights, projections, the encoders of text and
pictures, how many products know which half, and what was tuned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_ray.artifacts import open_artifact
from recsys_ray.ids import row_ids
from recsys_ray.retrieval.filters import FilterColumns, Filters
from recsys_ray.retrieval.hybrid_vectors import Half, HybridError, HybridSpace, Name, Projection, Weights, load_space
from recsys_ray.retrieval.segments import ROWS
from recsys_ray.retrieval.vector_index import VectorIndex, VectorIndexConfig

KIND = "hybrid_index"
SHOWN = ("row_id", "product_id", "title", "brand", "category", "price_cents", "rating_mean", "num_reviews", "image_url")
HALVES: tuple[Name, ...] = ("text", "image", "behaviour")       # that a product may lack
FILTERED = ("addresses",)       # beside category, brand and price, which are shown
HYBRID_ROWS = pa.schema([*(ROWS.field(name) for name in (*SHOWN, *FILTERED)),
                         *(pa.field(f"has_{name}", pa.bool_(), nullable=False) for name in HALVES)])


@dataclass(frozen=True)
class Found:
    """The answer to one query: K products, best first."""

    positions: npt.NDArray[np.int64]
    row_ids: npt.NDArray[np.int64]
    product_ids: list[str]
    scores: npt.NDArray[np.float32]


class HybridIndex:
    """Hybrid vectors of a catalogue, ready to be asked."""

    def __init__(self, space: HybridSpace, projections: Mapping[tuple[Name, Name], Projection], rows: pa.Table,
                 vectors: VectorIndex, encoders: dict[str, dict[str, Any]], text_weights: Weights | None = None
                 ) -> None:
        self.space, self.projections, self.rows, self.vectors = space, projections, rows, vectors
        self.encoders, self.text_weights = encoders, text_weights      # tuned for queries of words alone
        self._row_ids: npt.NDArray[np.int64] = rows["row_id"].to_numpy()
        self._filters = FilterColumns(rows)

    def search(self, questions: npt.NDArray[np.float32], k: int, filters: Filters | None = None) -> list[Found]:
        """The `k` best products of each question (Q, D) of `HybridSpace.questions`, filters inside."""
        allowed = None if filters is None or filters.pass_all else self._filters.mask(filters)
        scores, positions = self.vectors.search(questions, k, allowed)
        ids = self.rows["product_id"]
        return [Found(places, self._row_ids[places], ids.take(pa.array(places)).to_pylist(), of_query)
                for places, of_query in zip(positions, scores, strict=True)]

    def product(self, product_id: str) -> dict[Name, Half] | None:
        """The directions of one product, or None when the index does not have it."""
        number = row_ids([product_id])[0]
        place = int(np.searchsorted(self._row_ids, number))
        if place == len(self._row_ids) or self._row_ids[place] != number:
            return None
        return self.space.split(np.asarray(self.vectors.vectors[place:place + 1]))

    def cards(self, positions: Sequence[int] | npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        """What is shown of the products at these positions."""
        cards: list[dict[str, Any]] = self.rows.select(SHOWN).take(pa.array(positions, pa.int64())).to_pylist()
        return [{name: None if value != value else value for name, value in card.items()} for card in cards]


def open_hybrid(root: str | Path, version: str | None = None) -> HybridIndex:
    """The current (or the named) hybrid index below `root`, every file verified."""
    artifact = open_artifact(root, KIND, version)
    facts, rows = artifact.manifest.facts, artifact.table("rows.parquet")
    space, projections = load_space(facts, artifact.file("space.npz"))
    vectors = VectorIndex.load(VectorIndexConfig.model_validate(facts["vector"]), artifact.file("vectors.npy"),
                               artifact.file("vectors.faiss") if "vectors.faiss" in artifact.names() else None)
    if vectors.size != len(rows):
        raise HybridError(f"{artifact.path}: {vectors.size} vectors for {len(rows)} products; build it again")
    tuned = facts.get("text_weights")
    return HybridIndex(space, projections, rows, vectors, facts["encoders"],
                       None if tuned is None else Weights.model_validate(tuned))
