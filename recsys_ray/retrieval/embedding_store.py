"""What is left to embed, in which units, and how units and earlier vectors become one table.

A row is carried over when the earlier vectors hold the same row id with the same text hash. The rest
is planned into units that depend on nothing but the rows themselves, so that whoever continues a
killed run plans the same units and finds the finished ones by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_ray.ids import row_ids
from recsys_ray.models.token_signals import Encoding, Signals, concat_signals
from recsys_ray.schema import PRODUCT_TEXT, QUARANTINE, conform, embedding_schema

TEXT_COLUMNS = ["row_id", "product_id", "text", "text_hash"]
TEXT_SCHEMA = pa.schema([PRODUCT_TEXT.field(name) for name in TEXT_COLUMNS])
HASH_COLUMNS = ["row_id", "text_hash"]
TEXT_SHOWN = 2000  # characters of a quarantined text that are kept

Encode = Callable[[Sequence[str]], npt.NDArray[np.float32] | Encoding]
Fields = Sequence["pa.Field[Any]"]      # of the encoder's signals (`token_signals.signal_fields`)


class EmbeddingError(ValueError):
    """Texts or vectors that contradict each other; the message names the bucket and the row."""


@dataclass(frozen=True)
class Chunk:
    """A run of rows of one bucket that are to be embedded: all pending rows from `first` to `last`."""

    bucket: str
    first: int
    last: int
    rows: int
    digest: str


@dataclass(frozen=True)
class Unit:
    """What one call embeds and one shard file holds."""

    name: str
    chunks: tuple[Chunk, ...]

    @property
    def rows(self) -> int:
        """Rows of all chunks."""
        return sum(chunk.rows for chunk in self.chunks)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `unit_from_dict` reads them back."""
        return asdict(self)


def unit_from_dict(values: dict[str, Any]) -> Unit:
    """The unit that `Unit.as_dict` described."""
    return Unit(values["name"], tuple(Chunk(**chunk) for chunk in values["chunks"]))


@dataclass(frozen=True)
class BucketPlan:
    """What one bucket needs: pending chunks, rows carried over, and whether its old file can stay."""

    bucket: str
    rows: int
    carried: int
    empty: int          # rows without a text: quarantined, never embedded
    clipped: int        # rows whose text is longer than the encoder is given
    unchanged: bool     # the old vectors are exactly these rows
    chunks: tuple[Chunk, ...]


def plan_bucket(bucket: str, texts: pa.Table, earlier: pa.Table | None, unit_rows: int, max_chars: int) -> BucketPlan:
    """The plan of one bucket from its texts and the (row_id, text_hash) of its earlier vectors, if any.

    Errors: `EmbeddingError` when a row id occurs twice.
    """
    texts = _sorted_texts(bucket, texts)
    empty, carried = _empty(texts), _carried(texts, earlier)
    pending = texts.filter(pa.array(~carried & ~empty))
    chunks = []
    for start in range(0, pending.num_rows, unit_rows):
        rows = pending.slice(start, unit_rows)
        ids = _ids(rows)
        chunks.append(Chunk(bucket, int(ids[0]), int(ids[-1]), rows.num_rows, _digest(rows)))
    kept = int((carried & ~empty).sum())
    clipped = sum(len(text) > max_chars for text in _strings(texts, "text"))
    unchanged = earlier is not None and not chunks and kept == earlier.num_rows
    return BucketPlan(bucket, texts.num_rows, kept, int(empty.sum()), clipped, unchanged, tuple(chunks))


def plan_units(plans: Iterable[BucketPlan], unit_rows: int) -> list[Unit]:
    """Units of at most `unit_rows` rows: neighbouring chunks share one when they fit."""
    units: list[Unit] = []
    open_chunks: list[Chunk] = []
    for chunk in (chunk for plan in plans for chunk in plan.chunks):
        if open_chunks and sum(one.rows for one in open_chunks) + chunk.rows > unit_rows:
            units.append(_unit(open_chunks))
            open_chunks = []
        open_chunks.append(chunk)
    return [*units, _unit(open_chunks)] if open_chunks else units


def _unit(chunks: Sequence[Chunk]) -> Unit:
    named = hashlib.sha256("".join(chunk.digest for chunk in chunks).encode()).hexdigest()[:16]
    return Unit(f"{chunks[0].bucket}-{named}", tuple(chunks))


def pending_rows(chunk: Chunk, texts: pa.Table, earlier: pa.Table | None) -> pa.Table:
    """The rows of `chunk`, sorted by row id; raises `EmbeddingError` when they are not those planned."""
    texts = _sorted_texts(chunk.bucket, texts)
    ids = _ids(texts)
    inside = (ids >= chunk.first) & (ids <= chunk.last)
    rows = texts.filter(pa.array(inside & ~_carried(texts, earlier) & ~_empty(texts)))
    if rows.num_rows != chunk.rows or _digest(rows) != chunk.digest:
        raise EmbeddingError(f"{chunk.bucket}: rows {chunk.first} to {chunk.last} changed after they were planned; "
                             "run the job again")
    return rows


def embed_rows(rows: pa.Table, encode: Encode, dimension: int, fields: Fields = ()) -> tuple[pa.Table, pa.Table]:
    """(EMBEDDING rows, QUARANTINE rows) of a TEXT table: every row is in exactly one of them.

    A row whose text makes `encode` raise is found by halving the batch; a vector with NaN or infinity,
    or of length zero, and signals with NaN or infinity are set aside. When not even a plain word can be
    encoded, the encoder itself is broken and its error is raised.
    """
    texts = _strings(rows, "text")
    vectors, problems = np.zeros((len(texts), dimension), dtype=np.float32), [""] * len(texts)
    parts: list[tuple[range, Signals]] = []
    _encode_halving(texts, range(len(texts)), encode, vectors, parts, problems)
    finite = np.asarray(np.isfinite(vectors).all(axis=1))
    for places, signals in parts:
        finite[places.start:places.stop] &= signals.finite(len(places))
    nonzero = np.abs(vectors).max(axis=1) > 0
    for place in np.flatnonzero(~(finite & nonzero)):
        problems[place] = problems[place] or ("vector of zeros" if finite[place] else "vector with NaN or infinity")
    good = np.array([not problem for problem in problems], dtype=bool)
    columns = [rows.column(name).combine_chunks().filter(pa.array(good))
               for name in ("row_id", "product_id", "text_hash")]
    flat = pa.array(vectors[good].ravel(), type=pa.float32())
    columns += [pa.FixedSizeListArray.from_arrays(flat, dimension), *_signal_columns(parts, good, fields)]
    table = pa.Table.from_arrays(columns, schema=embedding_schema(dimension, fields))
    return table, quarantine(rows.filter(pa.array(~good)), [problem for problem in problems if problem])


def _signal_columns(parts: Sequence[tuple[range, Signals]], good: npt.NDArray[np.bool_], fields: Fields
                    ) -> list[pa.Array[Any]]:
    """The columns `fields` of the good rows; `parts` ascend and leave out rows that could not be encoded."""
    encoded = np.concatenate([np.zeros(0, np.int64), *(np.arange(one.start, one.stop) for one, _ in parts)])
    found = concat_signals([signals for _, signals in parts]).take(np.flatnonzero(good[encoded])).columns()
    return [found[field.name] if len(encoded) else pa.array([], field.type) for field in fields]


def _encode_halving(texts: list[str], places: range, encode: Encode, vectors: npt.NDArray[np.float32],
                    parts: list[tuple[range, Signals]], problems: list[str]) -> None:
    try:
        found = encode(texts[places.start:places.stop])
        encoding = found if isinstance(found, Encoding) else Encoding(found)
        vectors[places.start:places.stop] = encoding.dense
        parts.append((places, encoding.signals))
    except Exception as error:
        if len(places) > 1:
            middle = places.start + len(places) // 2
            _encode_halving(texts, range(places.start, middle), encode, vectors, parts, problems)
            _encode_halving(texts, range(middle, places.stop), encode, vectors, parts, problems)
            return
        encode(["text"])  # raises when the encoder, not the row, is the problem
        problems[places.start] = f"the encoder failed: {type(error).__name__}: {error}"[:TEXT_SHOWN]


def quarantine(rows: pa.Table, reasons: Sequence[str]) -> pa.Table:
    """QUARANTINE rows for rows of a TEXT table, one reason each."""
    return conform(pa.table({
        "table": pa.array(["product_text"] * rows.num_rows, pa.string()),
        "key": pa.array(_strings(rows, "product_id"), pa.string()), "reason": pa.array(reasons, pa.string()),
        "row": pa.array([text[:TEXT_SHOWN] for text in _strings(rows, "text")], pa.string()),
    }), QUARANTINE, "quarantine")


def empty_texts(texts: pa.Table) -> pa.Table:
    """QUARANTINE rows of the rows whose text is empty or white space."""
    rows = texts.filter(pa.array(_empty(texts)))
    return quarantine(rows, ["empty text"] * rows.num_rows)


def merge_bucket(bucket: str, texts: pa.Table, earlier: pa.Table | None, fresh: Sequence[pa.Table],
                 set_aside: pa.Table, dimension: int, fields: Fields = ()) -> pa.Table:
    """EMBEDDING rows of one bucket, sorted by row id: carried over from `earlier`, else from `fresh`.

    `fresh` may hold rows of other buckets. Errors: `EmbeddingError` unless every row of `texts` with a
    text is in the result exactly once or in `set_aside` (QUARANTINE rows).
    """
    texts = _sorted_texts(bucket, texts)
    texts = texts.filter(pa.array(~_empty(texts)))
    carried = _carried(texts, earlier)
    parts = [embedding_schema(dimension, fields).empty_table()]
    if earlier is not None and carried.any():
        places = np.searchsorted(_ids(earlier), _ids(texts)[carried])
        parts.append(earlier.take(pa.array(places, pa.int64())))
    wanted = _ids(texts)[~carried]
    parts += [table.filter(pa.array(np.isin(_ids(table), wanted))) for table in fresh]
    merged = pa.concat_tables(parts).sort_by("row_id")
    aside = np.isin(_ids(texts), row_ids(_strings(set_aside, "key")))
    have, expected = _ids(merged), _ids(texts)[~aside]
    if not np.array_equal(have, expected):
        wrong = np.setxor1d(have, expected)
        raise EmbeddingError(f"{bucket}: {len(have)} vectors for {len(expected)} products"
                             + (f", first row that differs: {wrong[0]}" if len(wrong) else ": a row occurs twice"))
    return merged


def _ids(table: pa.Table) -> npt.NDArray[np.int64]:
    ids: npt.NDArray[np.int64] = table.column("row_id").to_numpy()
    return ids


def _sorted_texts(bucket: str, texts: pa.Table) -> pa.Table:
    texts = texts.sort_by("row_id")
    ids = _ids(texts)
    twice = np.flatnonzero(ids[1:] == ids[:-1])
    if len(twice):
        raise EmbeddingError(f"{bucket}: row id {ids[twice[0]]} occurs twice (product "
                             f"{texts.column('product_id').to_pylist()[twice[0]]!r}); prepare the data again")
    return texts


def _empty(texts: pa.Table) -> npt.NDArray[np.bool_]:
    return np.array([not text.strip() for text in _strings(texts, "text")], dtype=np.bool_)


def _carried(texts: pa.Table, earlier: pa.Table | None) -> npt.NDArray[np.bool_]:
    """Which rows of `texts` have their vector, with the same text, in `earlier` (sorted by row id)."""
    if earlier is None or earlier.num_rows == 0:
        return np.zeros(texts.num_rows, dtype=bool)
    known = _ids(earlier)
    places = np.minimum(np.searchsorted(known, _ids(texts)), len(known) - 1)
    same_text = _hashes(texts) == _hashes(earlier)[places]
    found: npt.NDArray[np.bool_] = (known[places] == _ids(texts)) & same_text
    return found


def _hashes(table: pa.Table) -> npt.NDArray[np.object_]:
    return np.array(_strings(table, "text_hash"), dtype=object)


def _strings(table: pa.Table, column: str) -> list[str]:
    values: list[Any] = table.column(column).to_pylist()
    return values


def _digest(rows: pa.Table) -> str:
    digest = hashlib.sha256(_ids(rows).tobytes())
    digest.update("".join(_hashes(rows)).encode())
    return digest.hexdigest()[:16]
