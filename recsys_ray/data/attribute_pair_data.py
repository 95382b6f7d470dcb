"""Attributes and current vectors -> an "attribute_pairs" artefact: pairs to train on, of each split by itself.

A group is in one split as a whole (`split_of_group`), and both products of a pair are of one split. Where vectors are
given, products without one are in no pair: there is nothing of them to train on.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from recsys_ray.artifacts import Artifact, find_artifact, open_artifact, stage, write_text
from recsys_ray.config import Config, fingerprint
from recsys_ray.data.attribute_data import IMAGES_KIND, open_attributes
from recsys_ray.data.attribute_pairs import POSITIVE, AttributePairError, PairConfig, Vectors, make_pairs
from recsys_ray.data.attributes import split_of_group
from recsys_ray.data.splits import SPLITS
from recsys_ray.schema import ATTRIBUTE_PAIR

log = logging.getLogger(__name__)

KIND = "attribute_pairs"
TEXTS_KIND = "embeddings"       # of the embed job
STAGE_VERSION = 1               # raise it when the same inputs would give other pairs


class CurrentVectors(Config):
    """Vectors that hard negatives are mined from: of pictures, or of texts."""

    images: Path | None = None      # artefact of embed_images; several pictures of a product are averaged
    texts: Path | None = None       # artefact of embed

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.images is None) == (self.texts is None):
            raise ValueError("give either images (artefact of embed_images) or texts (artefact of embed)")
        return self

    def open(self) -> Artifact:
        """The artefact, whichever it is."""
        return open_artifact(self.images, IMAGES_KIND) if self.images else open_artifact(self.texts or "", TEXTS_KIND)


class GroupSplit(Config):
    """Shares of the groups; the rest is test."""

    train: float = Field(default=0.7, gt=0, le=1)
    valid: float = Field(default=0.15, ge=0, lt=1)
    seed: int = 7

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.train + self.valid > 1:
            raise ValueError(f"train {self.train} and valid {self.valid} are more than all")
        return self


class MakeAttributePairsConfig(Config):
    """Which products, and which pairs of them."""

    attributes: Path                            # artefact of label_attributes
    vectors: CurrentVectors | None = None       # None: nothing is mined, mix.hard must be 0
    pairs: PairConfig = PairConfig()
    split: GroupSplit = GroupSplit()
    output: Path


def make_attribute_pairs(config: MakeAttributePairsConfig) -> Artifact:
    """The `attribute_pairs` artefact: pairs/<split>.parquet (ATTRIBUTE_PAIR) and statistics.json.

    Facts: statistics (of each split and kind), short (kinds with fewer pairs than wanted), counts, split. Errors:
    `AttributePairError` when nothing can be paired, or a pair were not what it says.
    """
    attributes, rows = open_attributes(config.attributes)
    parents = {"attributes": attributes.manifest}
    vectors_of = None if config.vectors is None else config.vectors.open()
    if vectors_of is not None:
        parents["vectors"] = vectors_of.manifest
    key = fingerprint({"stage": STAGE_VERSION, "options": config.model_dump(mode="json", exclude={"output"}),
                       "parents": {name: one.fingerprint for name, one in parents.items()}})
    if (done := find_artifact(config.output, KIND, key)) is not None:
        return done
    vectors = None if vectors_of is None else product_vectors(vectors_of, rows["product_id"].to_pylist())
    tables, facts = _pairs(config, rows, vectors)
    with stage(config.output.resolve(), KIND, key) as staging:
        files = [staging.write_table(f"pairs/{split}.parquet", table) for split, table in tables.items()]
        write_text(staging.path / "statistics.json", json.dumps(facts, indent=1, allow_nan=False) + "\n")
        return staging.commit([*files, staging.entry("statistics.json")], config=config, parents=parents, facts=facts)


def product_vectors(artifact: Artifact, product_ids: list[str]) -> Vectors:
    """The vector of each product, (N, D) of unit length; NaN for one that has none. Several pictures are averaged."""
    place = {one: at for at, one in enumerate(product_ids)}
    sums = np.zeros((len(product_ids), int(artifact.manifest.facts["dimension"])), dtype=np.float32)
    for table in artifact.tables("vectors/", ["product_id", "vector"]):
        at = np.array([place.get(one, -1) for one in table["product_id"].to_pylist()], dtype=np.int64)
        values = table["vector"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
        length = np.linalg.norm(values, axis=1, keepdims=True)
        np.add.at(sums, at[at >= 0], (values / np.where(length > 0, length, 1))[at >= 0])
    length = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.where(length > 0, sums / np.where(length > 0, length, 1), np.nan).astype(np.float32)


def _pairs(config: MakeAttributePairsConfig, rows: pa.Table, vectors: Vectors | None
           ) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    usable = np.ones(rows.num_rows, bool) if vectors is None else np.isfinite(vectors).all(axis=1)
    if not usable.any():
        raise AttributePairError("none of the products with attributes has a vector; are they of the same shop?")
    split = np.array([split_of_group(key or product, config.split.seed, config.split.train, config.split.valid)
                      for key, product in zip(rows["group_key"].to_pylist(), rows["product_id"].to_pylist(),
                                              strict=True)], dtype=object)
    tables, statistics, short = {}, {}, []
    for name in SPLITS:
        places = np.flatnonzero(usable & (split == name))
        count = round(config.pairs.pairs * len(places) / int(usable.sum()))
        part = None if vectors is None else vectors[places]
        try:
            tables[name], statistics[name] = make_pairs(rows.take(pa.array(places)), count, config.pairs, part)
        except AttributePairError:
            if name == "train":     # the test split of a small shop may have no two that are alike
                raise
            tables[name], statistics[name] = ATTRIBUTE_PAIR.empty_table(), []
        short += [f"{name}, {row['kind']}: {row['made']} of {row['wanted']}" for row in statistics[name]
                  if row["made"] < row["wanted"]]
    for one in short:
        log.warning("fewer pairs than wanted: %s", one)
    counts = {"products": rows.num_rows, "without a vector": int((~usable).sum()),
              **{f"{name} products": int((usable & (split == name)).sum()) for name in SPLITS},
              **{f"{name} pairs": table.num_rows for name, table in tables.items()},
              "alike": sum(table["kind"].to_pylist().count(kind) for table in tables.values() for kind in POSITIVE)}
    return tables, {"statistics": statistics, "short": short, "counts": counts,
                    "split": config.split.model_dump(mode="json")}
