"""A text index and vectors of pictures -> one index of hybrid vectors, aligned to the products.

Every live product of the text index is in it, with or without a picture; pictures of other products are left out and
counted. Alpha for queries of words can be tuned on judged validation queries.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from recsys_ray.artifacts import Artifact, find_artifact, open_artifact, stage
from recsys_ray.config import Config, fingerprint
from recsys_ray.data.preprocess import clean_query
from recsys_ray.data.sources.tables import load_table, table_states
from recsys_ray.evaluation.metrics import MetricSpec
from recsys_ray.ids import row_ids
from recsys_ray.models.attribute_adapter import ImageTower, ImageTowerConfig, load_image_tower
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.retrieval.fusion import tune_dense_weight
from recsys_ray.retrieval.hybrid_index import FILTERED, HALVES, HYBRID_ROWS, KIND, SHOWN, HybridIndex
from recsys_ray.retrieval.hybrid_search import HybridSearcher, reads_texts, refuse_another
from recsys_ray.retrieval.hybrid_vectors import (
    Half,
    HybridError,
    Name,
    Projection,
    Weights,
    behaviour_half,
    category_half,
    fit_projection,
    fit_space,
    save_space,
    space_facts,
)
from recsys_ray.retrieval.hybrid_weights import ALPHAS, alpha_curve
from recsys_ray.retrieval.query_sets import TableQueries, table_query_set
from recsys_ray.retrieval.segments import Index, open_index
from recsys_ray.retrieval.vector_index import VectorIndex, VectorIndexConfig
from recsys_ray.schema import JUDGMENT

log = logging.getLogger(__name__)

STAGE_VERSION = 1
IMAGE_VECTORS = "image_vectors"


class BehaviourConfig(Config):
    """Which purchases say that products are bought by the same people."""

    prepared: Path
    split: str = "train"            # later reviews would tell what is to be found out
    dimension: int = Field(default=64, ge=1)


class TuneConfig(Config):
    """Judged validation queries that alpha is chosen by; the test queries must be others."""

    queries: TableQueries
    judgments: TableQueries
    encoder: TextEncoderConfig = TextEncoderConfig()
    alphas: tuple[float, ...] = ALPHAS
    metric: MetricSpec = MetricSpec(measure="nDCG", k=10)
    folds: int = Field(default=5, ge=2)


class BuildHybridConfig(Config):
    """What stands side by side, and how much each part counts."""

    index: Path                                 # text index: products, their text vectors and categories
    images: Path | None = None                  # image_vectors artefact
    behaviour: BehaviourConfig | None = None
    output: Path
    weights: Weights = Weights()
    centred: tuple[Name, ...] | None = None     # halves whose mean is taken away; None: the picture's, unless its
                                                # network has a text tower, whose texts ask for plain cosines
    learn: bool = True          # guesses of pictures from texts and back, for queries that have one of them
    vector: VectorIndexConfig = VectorIndexConfig()
    tower: ImageTowerConfig | None = None       # the network of `images`; needed by an adapter and by tuning with one
    tune: TuneConfig | None = None              # None: queries of words are asked with `weights`


def build_hybrid(config: BuildHybridConfig) -> Artifact:
    """The `hybrid_index` artefact of a text index and, where given, vectors of pictures and purchases.

    Errors: `HybridError` for a weight without its half, `ArtifactError` for a missing or damaged parent.
    """
    parents = {"index": open_artifact(config.index, "index").manifest}
    if config.images is not None:
        parents["images"] = open_artifact(config.images, IMAGE_VECTORS).manifest
    if config.behaviour is not None:
        parents["behaviour"] = open_artifact(config.behaviour.prepared, "prepared").manifest
    key = fingerprint({"stage": STAGE_VERSION, "parents": {name: one.fingerprint for name, one in parents.items()},
                       "judged": _judged(config.tune), **config.model_dump(mode="json", exclude={"index", "images",
                                                                                                "output"})})
    if (done := find_artifact(config.output, KIND, key)) is not None:
        return done
    encoders = {"text": parents["index"].facts["encoder"]}
    tower = None if config.tower is None else load_image_tower(config.tower)
    if config.images is not None:
        encoders["image"] = _picture_identity(parents["images"].facts["encoder"], tower)
    rows, halves, left_out = _read_halves(config, tower)
    plain = encoders.get("image", {}).get("texts") if tower is None else reads_texts(tower)
    space = fit_space(halves, config.weights, config.centred if config.centred is not None
                      else () if plain else ("image",))
    directions = space.directions({name: half for name, half in halves.items() if space.part(name)})
    projections = _projections(halves) if config.learn else {}
    rows = rows.select([*SHOWN, *FILTERED])
    for name in HALVES:
        has = directions[name].known if name in directions else np.zeros(len(rows), bool)
        rows = rows.append_column(HYBRID_ROWS.field(f"has_{name}"), pa.array(has))
    built = HybridIndex(space, projections, rows.cast(HYBRID_ROWS),
                        VectorIndex.build(space.items(directions), config.vector), encoders)
    tuned = None if config.tune is None else _tuned(built, tower, config.tune)
    with stage(config.output.resolve(), KIND, key) as staging:
        files = [staging.write_table("rows.parquet", built.rows)]
        save_space(space, projections, staging.path / "space.npz")
        saved = built.vectors.save(staging.path / "vectors.npy", staging.path / "vectors.faiss")
        files += [staging.entry(name) for name in ("space.npz", "vectors.npy", *(["vectors.faiss"] if saved else []))]
        known = {name: int(pc.sum(built.rows[f"has_{name}"]).as_py() or 0) for name in HALVES}
        log.info("%d products; known: %s; pictures of unknown products left out: %d", len(rows), known, left_out)
        return staging.commit(files, config=config, parents=parents, facts={
            **space_facts(space, projections), "encoders": encoders, "vector": config.vector.model_dump(mode="json"),
            "rows": len(rows), "known": known, "images_left_out": left_out, **(tuned or {})})


def _judged(tune: TuneConfig | None) -> list[Any]:
    """Which files alpha is tuned on, as they are now."""
    return [] if tune is None else [table_states(tune.queries.path), table_states(tune.judgments.path)]


def _picture_identity(frozen: dict[str, Any], tower: ImageTower | None) -> dict[str, Any]:
    """What the picture half of the index can be compared with: the network's vectors, or an adapter's.

    Errors: `HybridError` when the pictures were embedded by another network than the tower's.
    """
    if tower is None:
        return frozen
    refuse_another("image", tower.encoder.identity, {"image": frozen})
    return tower.identity


def _tuned(index: HybridIndex, tower: ImageTower | None, tune: TuneConfig) -> dict[str, Any]:
    """The curve over alpha and the weights of queries of words, from judged validation queries."""
    searcher = HybridSearcher(index, build_text_encoder(tune.encoder), tower)
    queries = table_query_set(tune.queries).queries
    judgments = load_table(tune.judgments.path, tune.judgments.columns, JUDGMENT)
    directions = searcher.of_texts([clean_query(one) for one in queries["query"].to_pylist()])
    curve = alpha_curve(index, directions, queries["query_id"].to_pylist(), judgments, tune.alphas, tune.metric)
    chosen = tune_dense_weight(curve.alphas, curve.values, folds=tune.folds)
    log.info("alpha %g of queries of words: %s %.3f on queries left out", chosen.weight, tune.metric.name,
             np.nanmean(chosen.out_of_fold))
    return {"text_weights": curve.weights(chosen.weight).model_dump(mode="json"),
            "tuned": {"metric": tune.metric.name, **chosen.as_dict(),
                      "curve": [[alpha, float(np.nanmean(row))]
                                for alpha, row in zip(curve.alphas, curve.values, strict=True)]}}


def _read_halves(config: BuildHybridConfig, tower: ImageTower | None) -> tuple[pa.Table, dict[Name, Half], int]:
    """(the live products by row id, their halves in that order, pictures of products that are not among them)."""
    index = open_index(config.index)
    rows, text = _catalogue(index)
    halves: dict[Name, Half] = {"text": Half.of(text)}
    left_out = 0
    if config.images is not None:
        halves["image"], left_out = picture_half(open_artifact(config.images, IMAGE_VECTORS),
                                                 rows["row_id"].to_numpy(), tower)
    if config.weights.category:
        categories = rows["category"].to_pylist()
        halves["category"] = category_half(categories, sorted({one for one in categories if one}))
    if config.behaviour is not None:
        halves["behaviour"] = _purchases(config.behaviour, rows["row_id"].to_numpy())
    return rows, halves, left_out


def _catalogue(index: Index) -> tuple[pa.Table, npt.NDArray[np.float32]]:
    tables, vectors = [], []
    for segment in index.segments:
        alive = np.flatnonzero(segment.alive)
        tables.append(segment.rows.take(pa.array(alive)))
        vectors.append(np.asarray(segment.vectors.vectors[alive]))
    rows = pa.concat_tables(tables)
    order = np.argsort(rows["row_id"].to_numpy(), kind="stable")
    return rows.take(pa.array(order)), np.concatenate(vectors)[order]


def picture_half(artifact: Artifact, rows: npt.NDArray[np.int64], tower: ImageTower | None = None
                 ) -> tuple[Half, int]:
    """(the picture vectors of products by row id, the mean of several; pictures that belong to none of them).

    With a `tower` its adapter's vectors in place of the frozen network's.
    """
    dimension = int(artifact.manifest.facts["dimension"])
    sums, left_out = np.zeros((len(rows), dimension), np.float64), 0
    for table in artifact.tables("vectors/", ["product_id", "vector"]):
        named = table.filter(table["product_id"].is_valid())
        left_out += table.num_rows - named.num_rows
        ids = row_ids(named["product_id"].to_pylist())
        vectors = named["vector"].combine_chunks().flatten().to_numpy().reshape(len(ids), dimension)
        vectors = vectors if tower is None else tower.adapt(vectors)
        places = np.minimum(np.searchsorted(rows, ids), max(0, len(rows) - 1))
        here = rows[places] == ids if len(rows) else np.zeros(len(ids), bool)
        np.add.at(sums, places[here], vectors[here])
        left_out += int((~here).sum())
    return Half.of(sums.astype(np.float32)), left_out


def _purchases(config: BehaviourConfig, rows: npt.NDArray[np.int64]) -> Half:
    users: dict[str, int] = {}
    who: list[npt.NDArray[np.int64]] = []
    what: list[npt.NDArray[np.int64]] = []
    artifact = open_artifact(config.prepared, "prepared")
    for table in artifact.tables(f"reviews/{config.split}/", ["row_id", "user_id"]):
        table = table.filter(table["user_id"].is_valid())
        ids = table["row_id"].to_numpy()
        places = np.minimum(np.searchsorted(rows, ids), len(rows) - 1)
        here = rows[places] == ids
        numbers = np.array([users.setdefault(one, len(users)) for one in table["user_id"].to_pylist()], np.int64)
        who.append(numbers[here])
        what.append(places[here].astype(np.int64))
    if not who:
        raise HybridError(f"{artifact.path}: no reviews of split {config.split!r}, so no behaviour vectors")
    return behaviour_half(np.concatenate(who), np.concatenate(what), len(rows), config.dimension)


def _projections(halves: Mapping[Name, Half]) -> dict[tuple[Name, Name], Projection]:
    """From text to picture and back, where both are there and enough products have both."""
    if not {"text", "image"} <= set(halves):
        return {}
    found: dict[tuple[Name, Name], Projection] = {}
    for source, target in (("text", "image"), ("image", "text")):
        try:
            one = fit_projection(halves[source], halves[target])  # type: ignore[index]
        except HybridError as error:
            log.warning("nothing is learned from %s to %s: %s", source, target, error)
            return {}
        found[source, target] = one  # type: ignore[index]
        log.info("%s -> %s: cosine %.3f on held-out products (ridge %g)", source, target, one.held_out_cosine,
                 one.ridge)
    return found


