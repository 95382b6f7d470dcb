"""Learned token weights as an inverted index: the stored form of a segment and exact search in it.

A score is the sum over the tokens that query and text share of the product of their weights. It needs
no statistics of the catalogue, so a segment answers for itself, and it is added up in the order of the
query's tokens: any division of the texts into segments gives the same numbers to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from recsys_ray.models.token_signals import SparseRows
from recsys_ray.retrieval.lexical import best_positions

Floats = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

ARRAYS = ("token_ids", "offsets", "positions", "weights", "size")


class LearnedSparseError(ValueError):
    """Token weights that cannot be used; the message names the file and the mend."""


@dataclass(frozen=True)
class SparsePostings:
    """Token by token: `token_ids[i]` has `weights[j]` in text `positions[j]` for j in offsets[i] to offsets[i + 1].

    Tokens ascend, and so do positions within a token.
    """

    token_ids: npt.NDArray[np.int32]    # (K,)
    offsets: npt.NDArray[np.int64]      # (K + 1,)
    positions: npt.NDArray[np.int32]    # (P,)
    weights: Floats                     # (P,)
    size: int                           # texts, also those without any token

    def __len__(self) -> int:
        return self.size

    @classmethod
    def build(cls, rows: SparseRows) -> SparsePostings:
        """The postings of N texts; text number i has position i."""
        text = np.repeat(np.arange(len(rows), dtype=np.int32), np.diff(rows.offsets))
        order = np.argsort(rows.token_ids, kind="stable")
        tokens, counts = np.unique(rows.token_ids, return_counts=True)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
        return cls(tokens.astype(np.int32), offsets, text[order], rows.weights[order].astype(np.float32), len(rows))

    def rows(self) -> SparseRows:
        """The texts again, as `build` got them."""
        tokens = np.repeat(self.token_ids, np.diff(self.offsets))
        order = np.argsort(self.positions, kind="stable")
        counts = np.bincount(self.positions, minlength=self.size)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
        return SparseRows(offsets, tokens[order], self.weights[order])

    def save(self, path: Path) -> None:
        """Write one .npz file without pickled content."""
        with path.open("wb") as stream:
            np.savez(stream, token_ids=self.token_ids, offsets=self.offsets, positions=self.positions,
                     weights=self.weights, size=np.int64(self.size))

    @classmethod
    def load(cls, path: Path) -> SparsePostings:
        """The postings of a file written by `save`; `LearnedSparseError` when it is not one."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                found = {name: archive[name] for name in ARRAYS}
        except (OSError, KeyError, ValueError, EOFError, BadZipFile) as error:
            raise LearnedSparseError(f"{path}: not a file of token weights ({error}); rebuild the segment") from None
        postings = cls(**{**found, "size": int(found["size"])})
        if (len(postings.offsets) != len(postings.token_ids) + 1 or len(postings.positions) != len(postings.weights)
                or postings.offsets[-1] != len(postings.positions)
                or (len(postings.positions) and not 0 <= postings.positions.min() <= postings.positions.max()
                    < postings.size)):
            raise LearnedSparseError(f"{path}: the arrays do not fit together; rebuild the segment")
        return postings

    def document_scores(self, token_ids: npt.NDArray[np.int32], weights: Floats) -> Floats:
        """The score of every text, shape (N,), for a query of different tokens; 0 where none is shared."""
        scores = np.zeros(self.size, dtype=np.float32)
        places = np.searchsorted(self.token_ids, token_ids)
        for place, token, weight in zip(places, token_ids, weights, strict=True):
            if place < len(self.token_ids) and self.token_ids[place] == token:
                own = slice(self.offsets[place], self.offsets[place + 1])
                scores[self.positions[own]] += weight * self.weights[own]  # a text comes once within a token
        return scores

    def search(self, token_ids: npt.NDArray[np.int32], weights: Floats, k: int, allowed: Mask | None = None
               ) -> tuple[Floats, Positions]:
        """Scores and positions of the at most `k` best allowed texts that share a token, ties by position."""
        return best_positions(self.document_scores(token_ids, weights), k, allowed)
