"""A guide's vectors of the training pairs' texts: computed once, kept in files, mapped into memory by every worker.

    <split>/<name>.queries.npy      float16 (pairs of the shard, E)
    <split>/<name>.documents.npy    float16 (different texts of the shard, E), in the shard's own order

The guide reads the texts, not the shard's tokens, so it may have another tokenizer and other limits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from recsys_ray.artifacts import Artifact, ArtifactError, FileEntry, file_entry, open_artifact
from recsys_ray.models.text_encoder import TextEncoder, TextEncoderConfig, encoder_identity
from recsys_ray.training.contrastive import GuideScores
from recsys_ray.training.pair_shards import Places, different_texts

KIND = "guide_vectors"
GUIDE_VERSION = 1       # raise it when the same pairs and guide would give other vectors

Halves = npt.NDArray[np.float16]


def guide_identity(guide: TextEncoderConfig) -> dict[str, Any]:
    """What decides a guide's vectors, beside the texts."""
    return {"version": GUIDE_VERSION, "dtype": guide.dtype, **encoder_identity(guide)}


def write_vectors(pairs: pa.Table, guide: TextEncoder, directory: Path, name: str) -> list[FileEntry]:
    """Embed the queries and different documents of TRAINING_PAIR rows into `directory/<name>.*.npy`."""
    return [_write(guide.encode_queries(pairs["query"].to_pylist()), directory, f"{name}.queries.npy"),
            _write(guide.encode_documents(different_texts(pairs)[0]), directory, f"{name}.documents.npy")]


def _write(vectors: npt.NDArray[np.float32], directory: Path, name: str) -> FileEntry:
    halves = vectors.astype(np.float16)
    if not np.isfinite(halves).all():
        raise ValueError(f"{name}: the guide's vectors are too large for float16; take one that is compared by cosine")
    target = directory / name
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with partial.open("wb") as stream:
        np.save(stream, halves)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, target)
    return file_entry(directory, name, len(halves))


class GuideVectors:
    """The vectors of one split, by the places of its shards."""

    def __init__(self, shards: Sequence[tuple[Halves, Halves]]) -> None:
        """`shards`: (queries, documents) of each, in the order of the pairs' shards."""
        self._queries, self._documents = [one for one, _ in shards], [other for _, other in shards]

    def at(self, places: Places) -> GuideScores:
        """The vectors of a batch, float32; their products are the guide's scores."""
        return GuideScores(_taken(self._queries, places.queries), _taken(self._documents, places.documents))


def _taken(shards: Sequence[Halves], places: Sequence[tuple[int, int]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([shards[shard][place] for shard, place in places]).astype(np.float32))


def open_guide_vectors(root: str | Path, version: str, split: str = "train") -> GuideVectors:
    """The vectors of one split, the files checked; shards follow one another by name, as those of the pairs do."""
    artifact = open_artifact(root, KIND, version)
    names = [name.removesuffix(".queries.npy") for name in artifact.names(f"{split}/") if name.endswith(".queries.npy")]
    return GuideVectors([(_mapped(artifact, f"{name}.queries.npy"), _mapped(artifact, f"{name}.documents.npy"))
                         for name in names])


def _mapped(artifact: Artifact, name: str) -> Halves:
    try:
        found: Halves = np.load(artifact.file(name), mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ArtifactError(f"{artifact.path}/{name}: not an array of numbers: {error}") from None
    return found
