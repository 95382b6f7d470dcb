"""What an encoder may give beside one vector a text: weights of tokens, and a vector for each token.

Both are ragged, so they are kept flat with offsets: text i owns the entries from `offsets[i]` to
`offsets[i + 1]`. Numpy and Arrow only; whoever searches an index needs no model library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

SPARSE_COLUMNS = ("sparse_tokens", "sparse_weights")
MULTI_COLUMN = "multi_vectors"


class SignalError(ValueError):
    """Token weights or vectors that do not fit together; the message says what does not."""


@dataclass(frozen=True)
class SparseRows:
    """Weights above 0 of the different tokens of N texts; tokens ascend within a text."""

    offsets: Ints                           # (N + 1,)
    token_ids: npt.NDArray[np.int32]        # (P,)
    weights: Floats                         # (P,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, number: int) -> tuple[npt.NDArray[np.int32], Floats]:
        """The tokens of one text and their weights."""
        own = slice(int(self.offsets[number]), int(self.offsets[number + 1]))
        return self.token_ids[own], self.weights[own]

    def take(self, places: npt.NDArray[np.integer[Any]]) -> SparseRows:
        """The texts at `places`, in that order."""
        offsets, flat = _taken(self.offsets, places)
        return SparseRows(offsets, self.token_ids[flat], self.weights[flat])


@dataclass(frozen=True)
class MultiVectors:
    """One unit-length vector for each token of N texts, (T, D), float32 or float16; may lie in a file."""

    offsets: Ints                           # (N + 1,)
    vectors: npt.NDArray[np.floating[Any]]  # (T, D)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, number: int) -> npt.NDArray[np.floating[Any]]:
        """The vectors of one text, (L, D)."""
        return self.vectors[int(self.offsets[number]):int(self.offsets[number + 1])]

    def take(self, places: npt.NDArray[np.integer[Any]]) -> MultiVectors:
        """The texts at `places`, in that order."""
        offsets, flat = _taken(self.offsets, places)
        return MultiVectors(offsets, self.vectors[flat])


@dataclass(frozen=True)
class Signals:
    """The token weights and token vectors of the same N texts; None where they were not asked for."""

    sparse: SparseRows | None = None
    multi: MultiVectors | None = None

    def __bool__(self) -> bool:
        return self.sparse is not None or self.multi is not None

    def take(self, places: npt.NDArray[np.integer[Any]]) -> Signals:
        """The texts at `places`, in that order."""
        return Signals(None if self.sparse is None else self.sparse.take(places),
                       None if self.multi is None else self.multi.take(places))

    def finite(self, count: int) -> npt.NDArray[np.bool_]:
        """Which of the `count` texts have neither NaN nor infinity in their signals, shape (N,)."""
        good = np.ones(count, dtype=np.bool_)
        if self.sparse is not None:
            bad = np.flatnonzero(~np.isfinite(self.sparse.weights))
            good[np.searchsorted(self.sparse.offsets, bad, side="right") - 1] = False
        if self.multi is not None:
            bad = np.flatnonzero(~np.isfinite(self.multi.vectors).all(axis=1))
            good[np.searchsorted(self.multi.offsets, bad, side="right") - 1] = False
        return good

    def columns(self) -> dict[str, pa.Array[Any]]:
        """Arrow columns of N rows: lists of tokens, of weights and of vectors, as far as there are any."""
        found: dict[str, pa.Array[Any]] = {}
        if self.sparse is not None:
            offsets = pa.array(self.sparse.offsets, pa.int32())
            for name, values in zip(SPARSE_COLUMNS, (self.sparse.token_ids, self.sparse.weights), strict=True):
                found[name] = pa.ListArray.from_arrays(offsets, pa.array(values))
        if self.multi is not None:
            width = self.multi.vectors.shape[1]
            each = pa.FixedSizeListArray.from_arrays(pa.array(self.multi.vectors.ravel()), width)
            found[MULTI_COLUMN] = pa.ListArray.from_arrays(pa.array(self.multi.offsets, pa.int32()), each)
        return found


@dataclass(frozen=True)
class Encoding:
    """All an encoder gives for N texts: vectors (N, D), None where not asked for, and signals."""

    dense: Floats | None
    signals: Signals = field(default_factory=Signals)

    def take(self, places: npt.NDArray[np.integer[Any]]) -> Encoding:
        """The texts at `places`, in that order."""
        return Encoding(None if self.dense is None else self.dense[places], self.signals.take(places))


def concat_signals(parts: Sequence[Signals]) -> Signals:
    """The texts of all parts in order; every part must have the same kinds of signals."""
    sparse = [part.sparse for part in parts if part.sparse is not None]
    multi = [part.multi for part in parts if part.multi is not None]
    if len(sparse) not in (0, len(parts)) or len(multi) not in (0, len(parts)):
        raise SignalError(f"of {len(parts)} parts {len(sparse)} have token weights and {len(multi)} token vectors: "
                          "all or none must")
    return Signals(
        SparseRows(_joined(sparse), np.concatenate([one.token_ids for one in sparse]),
                   np.concatenate([one.weights for one in sparse])) if sparse else None,
        MultiVectors(_joined(multi), np.concatenate([one.vectors for one in multi])) if multi else None)


def concat_encodings(parts: Sequence[Encoding]) -> Encoding:
    """The texts of all parts, which have vectors, in order."""
    dense = np.concatenate([part.dense for part in parts if part.dense is not None])
    return Encoding(dense, concat_signals([part.signals for part in parts]))


def signals_of(table: pa.Table) -> Signals:
    """The signals in the columns of a table, as `Signals.columns` wrote them."""
    sparse, multi = None, None
    if SPARSE_COLUMNS[0] in table.column_names:
        tokens, weights = (table[name].combine_chunks() for name in SPARSE_COLUMNS)
        offsets = _offsets(tokens)
        if not np.array_equal(offsets, _offsets(weights)):
            raise SignalError("a row has more tokens than weights, or fewer")
        sparse = SparseRows(offsets, tokens.flatten().to_numpy(), weights.flatten().to_numpy())
    if MULTI_COLUMN in table.column_names:
        column = table[MULTI_COLUMN].combine_chunks()
        width = column.type.value_type.list_size
        multi = MultiVectors(_offsets(column), column.flatten().flatten().to_numpy().reshape(-1, width))
    return Signals(sparse, multi)


def signal_fields(identity: Mapping[str, Any]) -> list[pa.Field[Any]]:
    """The fields of the columns that an encoder of this identity adds to its vectors; none for most encoders."""
    fields = []
    if "sparse_sha256" in identity:
        kinds = (pa.int32(), pa.float32())
        fields = [pa.field(name, pa.list_(kind), nullable=False)
                  for name, kind in zip(SPARSE_COLUMNS, kinds, strict=True)]
    if "multi_vector_sha256" in identity:
        kind = pa.float16() if identity["multi_vector_dtype"] == "float16" else pa.float32()
        vector = pa.list_(kind, identity["multi_vector_dimension"])
        fields.append(pa.field(MULTI_COLUMN, pa.list_(vector), nullable=False))
    return fields


def empty_encoding(identity: Mapping[str, Any]) -> Encoding:
    """What an encoder of this identity gives for no texts, in the right types."""
    schema = pa.schema(signal_fields(identity))
    return Encoding(np.zeros((0, int(identity["dimension"])), np.float32), signals_of(schema.empty_table()))


def _offsets(column: pa.Array[Any]) -> Ints:
    ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)
    return np.concatenate([np.zeros(1, np.int64), ends])


def _taken(offsets: Ints, places: npt.NDArray[np.integer[Any]]) -> tuple[Ints, Ints]:
    """(offsets of the taken texts, where their entries lie)."""
    starts, lengths = offsets[:-1][places], np.diff(offsets)[places]
    taken = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    return taken, np.arange(taken[-1]) + np.repeat(starts - taken[:-1], lengths)


def _joined(parts: Sequence[SparseRows] | Sequence[MultiVectors]) -> Ints:
    lengths = np.concatenate([np.zeros(1, np.int64), *(np.diff(part.offsets) for part in parts)])
    return np.cumsum(lengths, dtype=np.int64)
