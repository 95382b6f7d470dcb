"""What a segment keeps beside vectors and words when its encoder gave more: postings of learned token
weights, and token vectors for scoring candidates anew. Most segments have neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys_ray.artifacts import Artifact
from recsys_ray.models.token_signals import MultiVectors, Signals
from recsys_ray.retrieval.late_interaction import load_multi_vectors, save_multi_vectors
from recsys_ray.retrieval.learned_sparse import SparsePostings

SPARSE, MULTI_OFFSETS, MULTI_VECTORS = "sparse.npz", "multi_offsets.npy", "multi_vectors.npy"


@dataclass(frozen=True)
class SegmentSignals:
    """The learned postings and the token vectors of one segment; None for what its encoder does not give."""

    sparse: SparsePostings | None
    multi: MultiVectors | None

    @classmethod
    def load(cls, artifact: Artifact, segment: str) -> SegmentSignals:
        """What the segment has by its manifest, every file verified."""
        base = f"segments/{segment}"
        stored = artifact.names(f"{base}/")
        sparse, multi = None, None
        if f"{base}/{SPARSE}" in stored:
            sparse = SparsePostings.load(artifact.file(f"{base}/{SPARSE}"))
        if f"{base}/{MULTI_VECTORS}" in stored:
            multi = load_multi_vectors(artifact.file(f"{base}/{MULTI_OFFSETS}"),
                                       artifact.file(f"{base}/{MULTI_VECTORS}"))
        return cls(sparse, multi)

    def signals(self) -> Signals:
        """The signals of the segment's rows, as the encoder gave them."""
        return Signals(None if self.sparse is None else self.sparse.rows(), self.multi)

    def fit(self, identity: Mapping[str, Any]) -> bool:
        """Whether these are the signals that an encoder of this identity gives."""
        width = None if self.multi is None else self.multi.vectors.shape[1]
        return ((self.sparse is not None) == ("sparse_sha256" in identity)
                and width == identity.get("multi_vector_dimension"))

    def sizes(self) -> set[int]:
        """For how many rows there are signals: a set of one number, or of none."""
        return {len(one) for one in (self.sparse, self.multi) if one is not None}


def save_signals(signals: Signals, directory: Path) -> None:
    """Write the files of a segment's signals, if there are any."""
    if signals.sparse is not None:
        SparsePostings.build(signals.sparse).save(directory / SPARSE)
    if signals.multi is not None:
        save_multi_vectors(signals.multi, directory / MULTI_OFFSETS, directory / MULTI_VECTORS)
