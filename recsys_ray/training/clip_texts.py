"""Products' texts as vectors by the text tower of an OpenCLIP network, once: the frozen texts of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import pyarrow as pa

from recsys_ray.artifacts import Artifact, find_artifact, open_artifact, stage
from recsys_ray.config import Config, ConfigError, fingerprint
from recsys_ray.models.image_encoder import ImageEncoder, ImageEncoderConfig
from recsys_ray.schema import embedding_schema

KIND = "embeddings"     # as the texts of a text encoder
STAGE_VERSION = 1       # raise it when the same inputs would give other vectors


class ClipTexts(Config):
    """Which products' texts, and whose text tower; it must be that of the pictures' network."""

    prepared: Path
    encoder: ImageEncoderConfig

    def resolved(self) -> Self:
        """The same with absolute paths."""
        return self.replace(prepared=self.prepared.resolve(), encoder=self.encoder.resolved())


def clip_text_vectors(config: ClipTexts, pictures: Artifact, output: Path) -> Artifact:
    """The `embeddings` artefact of the products that have a picture: vectors/bucket-00000.parquet.

    Facts: encoder (identity of the whole network), dimension, rows. Errors: `EncoderError` for a network without a text
    tower, `ConfigError` when the pictures were embedded with another network or no product has a text.
    """
    prepared, encoder = open_artifact(config.prepared, "prepared"), ImageEncoder(config.encoder)
    if encoder.identity != pictures.manifest.facts["encoder"]:
        raise ConfigError(f"clip_texts.encoder: {config.encoder.model} is not the network of {pictures.path}; texts "
                          "and pictures are in one space only where both are of one network")
    key = fingerprint({"stage": STAGE_VERSION, "prepared": prepared.manifest.fingerprint,
                       "pictures": pictures.manifest.fingerprint, "encoder": encoder.identity})
    if (done := find_artifact(output, KIND, key)) is not None:
        return done
    shown = {one for table in pictures.tables("vectors/", ["product_id"]) for one in table["product_id"].to_pylist()}
    rows = [row for table in prepared.tables("product_text/", ["row_id", "product_id", "text", "text_hash"])
            for row in table.to_pylist() if row["product_id"] in shown]
    if not rows:
        raise ConfigError(f"{config.prepared}: has no text of a product of {pictures.path}; prepare the same shop")
    vectors = encoder.encode_texts([row["text"] for row in rows])
    table = pa.table({**{name: [row[name] for row in rows] for name in ("row_id", "product_id", "text_hash")},
                      "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), encoder.dimension)},
                     schema=embedding_schema(encoder.dimension))
    with stage(output, KIND, key) as staging:
        return staging.commit([staging.write_table("vectors/bucket-00000.parquet", table)], config=config,
                              parents={"prepared": prepared.manifest, "pictures": pictures.manifest},
                              facts={"encoder": encoder.identity, "dimension": encoder.dimension, "rows": len(rows)})
