"""The vectors of any artefact that has some, with what is known of each: embeddings, pictures, indexes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_ray.artifacts import Artifact, ArtifactError, current_version, list_versions, open_artifact
from recsys_ray.retrieval.hybrid_index import open_hybrid
from recsys_ray.retrieval.segments import open_index

ROWS = pa.schema([pa.field("product_id", pa.string(), nullable=False), pa.field("category", pa.string()),
                  pa.field("brand", pa.string()), pa.field("price_cents", pa.int64())])
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class VectorTable:
    """All vectors of an artefact: N rows (category, brand and price null where it does not know them)."""

    rows: pa.Table
    vectors: Floats
    encoder: Any        # identity: only vectors of the same one can be compared
    reference: str


def read_vectors(root: Path, version: str | None = None) -> VectorTable:
    """The table of `embeddings`, `image_vectors`, an `index` or a `hybrid_index`; `ArtifactError` for another kind."""
    artifact = _open(root, version)
    parts = list(vector_parts(root, artifact.manifest.version))
    facts = artifact.manifest.facts
    return VectorTable(pa.concat_tables([ROWS.empty_table(), *(rows for rows, _ in parts)]),
                       np.concatenate([np.asarray(vectors, np.float32) for _, vectors in parts]),
                       facts.get("encoders") or facts.get("encoder"), artifact.manifest.reference)


def vector_parts(root: Path, version: str | None = None) -> Iterator[tuple[pa.Table, Floats]]:
    """(rows, their vectors), part by part; pictures go by their own ids, for a product may have many."""
    artifact = _open(root, version)
    manifest = artifact.manifest
    if manifest.kind == "hybrid_index":
        hybrid = open_hybrid(root, manifest.version)
        yield hybrid.rows.select(ROWS.names), hybrid.vectors.vectors
    elif manifest.kind == "index":
        for segment in open_index(root, manifest.version).segments:
            alive = np.flatnonzero(segment.alive)
            yield segment.rows.select(ROWS.names).take(pa.array(alive)), segment.vectors.vectors[alive]
    else:
        name = "product_id" if manifest.kind == "embeddings" else "image_id"
        for table in artifact.tables("vectors/", [name, "vector"]):
            vectors = table["vector"].combine_chunks().flatten().to_numpy()
            nothing = {field.name: pa.nulls(len(table), field.type) for field in ROWS}
            yield (pa.table({**nothing, "product_id": table[name]}, schema=ROWS),
                   vectors.reshape(len(table), manifest.facts["dimension"]))


def _open(root: Path, version: str | None) -> Artifact:
    wanted = version or current_version(root)
    kinds = {one.version: one.kind for one in list_versions(root)}
    kind = kinds.get(wanted or "")
    if kind not in ("embeddings", "image_vectors", "index", "hybrid_index"):
        raise ArtifactError(f"{root}: " + ("nothing was published here" if not kinds else
                                           f"version {wanted} is {kind or 'not there'}; vectors are in embeddings, "
                                           "image_vectors, an index or a hybrid_index"))
    return open_artifact(root, kind, wanted)
