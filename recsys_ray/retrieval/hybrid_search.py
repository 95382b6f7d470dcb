"""Words, a picture, both, or a product -> the products most like them: `search_products`, as a call and as a job.

Which half of the hybrid vectors a query meets:

* words meet the text half; they meet the pictures when the picture network has a text tower (OpenCLIP, or an adapter
  with one), else by the index's learned guess of a picture's direction from a text (`learn`, a ridge regression over
  the products that have both), else not at all;
* a picture meets the picture half, and the text half by the guess the other way round, if there is one;
* words and a picture each meet their own half; a product meets all halves with its own vectors.

ResNet50 and EfficientNet know pictures alone: without a guess, a search that shall weigh pictures for words is refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from recsys_ray.artifacts import Artifact, find_artifact, open_artifact, stage, write_text
from recsys_ray.config import Config, fingerprint
from recsys_ray.data.images import ImageLimits, Pixels, decode_image
from recsys_ray.data.preprocess import clean_query
from recsys_ray.data.sources.tables import table_states
from recsys_ray.models.attribute_adapter import ImageTower, ImageTowerConfig, load_image_tower
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.sentence_layout import EncoderError
from recsys_ray.models.text_encoder import TextEncoder, TextEncoderConfig
from recsys_ray.retrieval.filters import Filters
from recsys_ray.retrieval.hybrid_index import KIND, Found, HybridIndex, open_hybrid
from recsys_ray.retrieval.hybrid_vectors import Half, HybridError, Name, Weights
from recsys_ray.retrieval.hybrid_weights import candidates
from recsys_ray.retrieval.query_sets import TableQueries, table_query_set

log = logging.getLogger(__name__)

STAGE_VERSION = 1
QUERIES_AT_ONCE = 256


class HybridSearcher:
    """A hybrid index with the encoders of its halves; one that is None leaves its kind of query unanswered."""

    def __init__(self, index: HybridIndex, encoder: TextEncoder | None = None, tower: ImageTower | None = None,
                 limits: ImageLimits | None = None) -> None:
        """Errors: `HybridError` for an encoder other than the one that the index was built with."""
        self.index, self.encoder, self.tower, self.limits = index, encoder, tower, limits or ImageLimits()
        for name, loaded in (("text", encoder), ("image", tower)):
            if loaded is not None:
                refuse_another(name, loaded.identity, index.encoders)
        self.tower_reads_texts = tower is not None and reads_texts(tower)

    # --- queries -> directions of each half -------------------------------------------------------
    def of_texts(self, texts: Sequence[str]) -> dict[Name, Half]:
        """What Q texts ask, by half; `HybridError` when they meet none."""
        if self.encoder is None and not self.tower_reads_texts:
            raise HybridError("words cannot be asked: no text encoder, and " + (
                "no picture network" if self.tower is None else "the picture network has no text tower"))
        vectors = None if self.encoder is None else self.encoder.encode_queries(texts)
        return self.of_text_vectors(texts, vectors)

    def of_text_vectors(self, texts: Sequence[str], vectors: np.ndarray[Any, Any] | None) -> dict[Name, Half]:
        """The same where the text encoder's vectors (Q, D) are there already."""
        found, asked = self._nothing(len(texts)), None if vectors is None else Half.of(vectors)
        if asked is not None and (part := self.index.space.part("text")) is not None:
            found["text"] = part.directions(asked)
        if self.index.space.part("image") is not None:
            if self.tower is not None and self.tower_reads_texts:
                found["image"] = Half.of(self.tower.encode_texts(texts))
            elif asked is not None and (guess := self.index.projections.get(("text", "image"))) is not None:
                found["image"] = guess.guess(asked)
        if not any(half.known.any() for half in found.values()):
            raise HybridError("words meet no half of this index: it holds pictures alone, and their network knows no "
                              "texts; use an OpenCLIP model, or an index with a text half")
        return found

    def of_pictures(self, pictures: Sequence[Pixels]) -> dict[Name, Half]:
        """What Q pictures ask, by half."""
        if self.tower is None or (part := self.index.space.part("image")) is None:
            raise HybridError("pictures cannot be asked: " + ("the index has no picture half" if self.tower is not None
                                                              else "no picture network was given"))
        found, asked = self._nothing(len(pictures)), Half.of(self.tower.encode(pictures))
        found["image"] = part.directions(asked)
        if (guess := self.index.projections.get(("image", "text"))) is not None and self.index.space.part("text"):
            found["text"] = guess.guess(asked)
        return found

    def of_both(self, text_vectors: np.ndarray[Any, Any], pictures: Sequence[Pixels]) -> dict[Name, Half]:
        """What Q texts, as vectors, and as many pictures ask together: each its own half."""
        found = self.of_pictures(pictures)
        if (part := self.index.space.part("text")) is None:
            raise HybridError("words beside a picture cannot be asked: the index has no text half")
        return {**found, "text": part.directions(Half.of(text_vectors))}

    def looks_of(self, product_id: str) -> dict[Name, Half]:
        """A product's picture alone; `HybridError` when it has none, `KeyError` when the index does not have it."""
        halves = self.index.product(product_id)
        if halves is None:
            raise KeyError(product_id)
        if "image" not in halves or not halves["image"].known[0]:
            raise HybridError("the product has no picture")
        return {**self._nothing(1), "image": halves["image"]}

    def _nothing(self, count: int) -> dict[Name, Half]:
        return {part.name: Half.missing(count, part.dimension) for part in self.index.space.parts}

    # --- answers ----------------------------------------------------------------------------------
    def search(self, directions: dict[Name, Half], k: int, weights: Weights | None = None,
               filters: Filters | None = None) -> list[Found]:
        """The `k` best products of each query; `weights` in place of the index's own."""
        words, pictures = directions.get("text"), directions.get("image")
        if weights is not None and weights.image and words is not None and words.known.any() and (
                pictures is not None and not pictures.known.any()):
            raise HybridError(f"weights.image is {weights.image:g}, but words do not meet the pictures here: their "
                              "network has no text tower and the index learned no guess; use an OpenCLIP model, or "
                              "build the index with learn: true")
        return self.index.search(self.index.space.questions(directions, weights), k, filters)

    def search_products(self, query: str | None = None, top_k: int = 10, *, picture: bytes | None = None,
                        like: str | None = None, filters: Filters | None = None, weights: Weights | None = None
                        ) -> list[dict[str, Any]]:
        """The best products for words, an encoded picture, both, or `like` a product: rank, score and what is shown.

        Errors: `HybridError` for a query that meets no half, `ImageError` for a bad picture, `KeyError` for an unknown
        product, `ValueError` when nothing is asked.
        """
        text = clean_query(query) if query else ""
        if like is not None:
            halves = self.index.product(like)
            if halves is None:
                raise KeyError(like)
            directions = halves
        elif picture is not None:
            pixels = [decode_image(picture, self.limits)]
            directions = self.of_both(self._text_vectors([text]), pixels) if text else self.of_pictures(pixels)
        elif text:
            directions = self.of_texts([text])
            weights = weights or self.index.text_weights
        else:
            raise ValueError("nothing is asked: give words, a picture or a product")
        found = self.search(directions, top_k + (like is not None), weights, filters)[0]
        cards = self.index.cards(found.positions)
        scored = [(card, float(score)) for card, score in zip(cards, found.scores, strict=True)
                  if card["product_id"] != like][:top_k]
        return [{"rank": rank, "score": score, **card} for rank, (card, score) in enumerate(scored, 1)]

    def _text_vectors(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        if self.encoder is None:
            raise HybridError("words beside a picture need the text encoder")
        return self.encoder.encode_queries(texts)


def refuse_another(name: str, identity: dict[str, Any], built_with: dict[str, dict[str, Any]]) -> None:
    """Raise `HybridError` unless the encoder of one half is the one that the index was built with."""
    expected = built_with.get(name)
    if expected is None:
        raise HybridError(f"{name}: the index was built without vectors of that kind")
    different = sorted(key for key in {*identity, *expected} if identity.get(key) != expected.get(key))
    if different:
        raise HybridError(f"{name}: the index was built with another encoder: " + "; ".join(
            f"{key} is {expected.get(key)!r} there and {identity.get(key)!r} here" for key in different))


def reads_texts(tower: ImageTower) -> bool:
    """Whether texts can be asked in the pictures' own space."""
    try:
        tower.encode_texts(["text"])
    except EncoderError:
        return False
    return True


# --- the job --------------------------------------------------------------------------------------
class SearchProductsConfig(Config):
    """What is asked of which hybrid index: one query, or a table of them."""

    index: Path
    encoder: TextEncoderConfig | None = TextEncoderConfig()
    tower: ImageTowerConfig | None = None       # needed by pictures, and by words that meet pictures in its space
    query: str | None = None
    picture: Path | None = None                 # a file
    like: str | None = None                     # a product id
    queries: TableQueries | None = None         # in place of one query: the answers become `candidates`
    weights: Weights | None = None              # None: tuned ones for words, else the index's
    filters: Filters = Filters()
    top_k: int = Field(default=10, ge=1)
    output: Path                                # answer.json of one query; artefact root of many

    @model_validator(mode="after")
    def _something_is_asked(self) -> Self:
        if (self.queries is None) == (self.query is None and self.picture is None and self.like is None):
            raise ValueError("give either one query (query, picture, like) or a table of queries")
        return self


def search_products(config: SearchProductsConfig) -> list[dict[str, Any]] | Artifact:
    """The answer to one query, also in `output`/answer.json, or the `candidates` artefact of many queries."""
    index = open_hybrid(config.index)
    tower = None if config.tower is None else load_image_tower(config.tower)
    encoder = None if config.encoder is None else build_text_encoder(config.encoder)
    searcher = HybridSearcher(index, encoder, tower)
    if config.queries is not None:
        return _answer_all(config, config.queries, searcher)
    answer = searcher.search_products(
        config.query, config.top_k, picture=None if config.picture is None else config.picture.read_bytes(),
        like=config.like, filters=config.filters, weights=config.weights)
    for one in answer:
        log.info("%2d  %.3f  %s  %s", one["rank"], one["score"], one["product_id"], one["title"])
    write_text(config.output / "answer.json", json.dumps(answer, indent=1, allow_nan=False))
    return answer


def _answer_all(config: SearchProductsConfig, queries: TableQueries, searcher: HybridSearcher) -> Artifact:
    parent = open_artifact(config.index, KIND).manifest
    asked = config.model_dump(mode="json", exclude={"index", "output"})
    key = fingerprint({"stage": STAGE_VERSION, "index": parent.fingerprint, "files": table_states(queries.path),
                       **asked})
    if (done := find_artifact(config.output, "candidates", key)) is not None:
        return done
    table = table_query_set(queries).queries
    weights = config.weights or searcher.index.text_weights
    with stage(config.output.resolve(), "candidates", key) as staging:
        files = [staging.write_table("queries.parquet", table)]
        for number, start in enumerate(range(0, table.num_rows, QUERIES_AT_ONCE)):
            rows = table.slice(start, QUERIES_AT_ONCE)
            directions = searcher.of_texts([clean_query(one) for one in rows["query"].to_pylist()])
            found = searcher.search(directions, config.top_k, weights, config.filters)
            files.append(staging.write_table(f"candidates-{number:05d}.parquet",
                                             candidates(rows["query_id"].to_pylist(), found)))
        return staging.commit(files, config=config, parents={"index": parent}, facts={
            "mode": "hybrid vectors", "weights": None if weights is None else weights.model_dump(mode="json"),
            "top_k": config.top_k, "queries": table.num_rows})
