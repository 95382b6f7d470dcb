"""Late interaction: candidates scored anew by the token vectors of query and text, kept in files.

score(q, d) = 1/|q| sum_i max_j q_i . d_j (Khattab and Zaharia, "ColBERT", SIGIR 2020, divided by the
query's length as BGE-M3 does, so that it lies between -1 and 1).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys_ray.models.token_signals import MultiVectors

Floats = npt.NDArray[np.float32]


class LateInteractionError(ValueError):
    """Token vectors that cannot be used; the message names the file or the shapes and the mend."""


def max_sim(query_VM: npt.NDArray[np.floating[Any]], documents: MultiVectors,
            places: npt.NDArray[np.int64]) -> Floats:
    """The late-interaction scores of one query (V, M) with the texts at `places`, float32 (P,).

    A text without any vector has NaN. Computed text by text in float32, so a score does not depend on
    which other texts are asked for, and only the vectors of these texts are read.
    """
    width = documents.vectors.shape[1]
    if query_VM.ndim != 2 or query_VM.shape[1] != width or not len(query_VM):
        raise LateInteractionError(f"query vectors of shape {query_VM.shape} for token vectors of {width} dimensions")
    query = np.ascontiguousarray(query_VM, dtype=np.float32)
    scores = np.full(len(places), np.nan, dtype=np.float32)
    for number, place in enumerate(places):
        vectors = np.asarray(documents.row(int(place)), dtype=np.float32)
        if len(vectors):
            scores[number] = (query @ vectors.T).max(axis=1).mean()
    return scores


def save_multi_vectors(multi: MultiVectors, offsets_path: Path, vectors_path: Path) -> None:
    """Write the offsets and the vectors as two .npy files."""
    np.save(offsets_path, multi.offsets, allow_pickle=False)
    np.save(vectors_path, multi.vectors, allow_pickle=False)


def load_multi_vectors(offsets_path: Path, vectors_path: Path) -> MultiVectors:
    """What `save_multi_vectors` wrote; the vectors stay on disk until they are read."""
    try:
        offsets = np.load(offsets_path, allow_pickle=False)
        vectors = np.load(vectors_path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise LateInteractionError(f"{vectors_path}: not a file of token vectors ({error}); "
                                   "rebuild the segment") from None
    if (vectors.ndim != 2 or vectors.dtype not in (np.float16, np.float32) or offsets.dtype != np.int64
            or not len(offsets) or offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] != len(vectors)):
        raise LateInteractionError(f"{vectors_path}: {vectors.dtype} {vectors.shape} does not fit the offsets; "
                                   "rebuild the segment")
    return MultiVectors(offsets, vectors)

