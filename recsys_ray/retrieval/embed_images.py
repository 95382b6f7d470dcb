"""A table of pictures -> one vector a picture by a frozen network, on every node of a cluster, resumable.

A picture that cannot be had or read is in quarantine with its reason; a piece of the table that is done is not done
again. Vectors are stored with what the table says of a picture, so that training on them needs no pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from recsys_ray import runtime
from recsys_ray.artifacts import Artifact, ArtifactError, find_artifact, stage, write_table
from recsys_ray.config import Config, fingerprint
from recsys_ray.data.image_files import ImageTable, with_bytes
from recsys_ray.data.images import Pixels, decoded_images
from recsys_ray.data.sources.blocks import Piece, Recipe, pieces_of, read_piece
from recsys_ray.models.image_encoder import ImageEncoder, ImageEncoderConfig
from recsys_ray.piecework import piece_file, run_pieces
from recsys_ray.runtime import RayConfig
from recsys_ray.schema import IMAGE, QUARANTINE

log = logging.getLogger(__name__)

KIND = "image_vectors"
STAGE_VERSION = 1       # raise it when the same inputs would give other vectors
VECTORS, ASIDE = "vectors/part", "set_aside/part"
PIECE_BYTES = 8 << 20   # of a table that holds its pictures; one of places is a piece of its own
FACTS = [field for field in IMAGE if field.name != "data"]


class EmbedImagesConfig(Config):
    """Which pictures, which network."""

    images: ImageTable
    output: Path                                        # artefact root of the vectors
    encoder: ImageEncoderConfig = ImageEncoderConfig()
    workers: int | None = Field(default=None, ge=1)     # None: one a GPU, else one a core
    ray: RayConfig = RayConfig()


@dataclass(frozen=True)
class _Job:
    """What every worker needs to know; pieces are named by their number."""

    work: tuple[tuple[Piece, Recipe], ...]
    staging: str
    images: dict[str, Any]
    encoder: dict[str, Any]
    identity: dict[str, Any]


def vector_schema(dimension: int) -> pa.Schema:
    """IMAGE without the bytes, with `vector` (plain FixedSizeList<float32>)."""
    return pa.schema([*FACTS, pa.field("vector", pa.list_(pa.float32(), dimension), nullable=False)])


def embed_images(config: EmbedImagesConfig) -> Artifact:
    """The `image_vectors` artefact: vectors/part-*.parquet (`vector_schema`), quarantine.parquet.

    Facts: encoder (identity), dimension, rows, quarantined. Errors: `EncoderError` for a network that cannot be had,
    `ValueError` when no picture could be read.
    """
    recipe = config.images.recipe()
    encoder = config.encoder.resolved()
    loaded = ImageEncoder(encoder)
    key = fingerprint({"stage": STAGE_VERSION, "encoder": loaded.identity, "dtype": encoder.dtype,
                       "images": config.images.model_dump(mode="json", exclude={"path"}),
                       "files": [[file.path, file.size, file.state] for file in recipe.files]})
    if (done := find_artifact(config.output, KIND, key)) is not None:
        return done
    work = image_pieces(config.images)
    images = config.images if "://" in config.images.root else config.images.replace(
        root=str(Path(config.images.root).resolve()))
    with stage(config.output.resolve(), KIND, key) as staging, runtime.connected(config.ray):
        job = _Job(work, str(staging.path), images.model_dump(mode="json"), encoder.model_dump(mode="json"),
                   loaded.identity)
        made = run_pieces(_PieceEmbedder, job, len(work), staging.path, VECTORS, gpu=encoder.device != "cpu",
                          workers=config.workers)
        quarantine = pa.concat_tables([QUARANTINE.empty_table(), *(
            pq.read_table(staging.path / piece_file(ASIDE, number), schema=QUARANTINE)
            for number in range(len(work)))])
        rows = sum(entry.rows or 0 for entry in made)
        if not rows:
            raise ValueError(f"{config.images.path}: no picture could be read; the first reason: "
                             f"{quarantine['reason'][0].as_py() if quarantine.num_rows else 'the table is empty'}")
        log.info("%d pictures embedded, %d set aside", rows, quarantine.num_rows)
        return staging.commit([*made, staging.write_table("quarantine.parquet", quarantine)], config=config, facts={
            "encoder": loaded.identity, "dimension": loaded.dimension, "rows": rows,
            "quarantined": quarantine.num_rows})


def image_pieces(images: ImageTable) -> tuple[tuple[Piece, Recipe], ...]:
    """What a worker takes at a time, with how it is read."""
    recipe = images.recipe()
    return tuple((piece, recipe) for file in recipe.files for piece in pieces_of(file, PIECE_BYTES))


class _PieceEmbedder:
    """A loaded network that turns the number of a piece into vectors."""

    def __init__(self, job: _Job) -> None:
        self.job, self.images = job, ImageTable.model_validate(job.images)
        self.encoder = ImageEncoder(ImageEncoderConfig.model_validate(job.encoder))
        if self.encoder.identity != job.identity:
            raise ArtifactError(f"{job.encoder['model']}: this node has other weights than the driver; install the "
                                "same everywhere")

    def make(self, number: int) -> pa.Table:
        """The vectors of a piece; what cannot be had or read is set aside in a file of its own."""
        embedded, aside = [vector_schema(self.encoder.dimension).empty_table()], [QUARANTINE.empty_table()]
        for block in read_piece(*self.job.work[number]):
            usable, framed, refused = decoded_images(with_bytes(block, self.images), self.encoder.framing.frame,
                                                     self.images.limits)
            embedded.append(embed_rows(usable, framed, self.encoder))
            aside.append(refused)
        write_table(Path(self.job.staging), piece_file(ASIDE, number), pa.concat_tables(aside))
        return pa.concat_tables(embedded)


def embed_rows(images: pa.Table, framed: Sequence[Pixels], encoder: ImageEncoder) -> pa.Table:
    """IMAGE rows and their framed pixels -> their vectors with what else is known of them, in their order."""
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(encoder.encode_framed(framed).reshape(-1)), encoder.dimension)
    return pa.table({**{field.name: images[field.name] for field in FACTS}, "vector": vectors},
                    schema=vector_schema(encoder.dimension))
