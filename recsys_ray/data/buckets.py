"""Scattered blocks and finished buckets: the two forms a table takes while it is prepared.

Scattering writes each block of rows as one Parquet file whose row groups are the buckets, so that a
bucket is read back from all blocks without any shuffle service, and a retried task writes the same
file again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

Ints = npt.NDArray[np.int64]
GATHERED_ROWS = 32_768      # what one step of a bucket holds, whatever the bucket's size


@dataclass(frozen=True)
class Part:
    """One scattered block: its file and the buckets its row groups hold, in order."""

    path: str
    buckets: tuple[int, ...]


def scatter(rows: pa.Table, bucket: npt.NDArray[np.int32], directory: Path) -> Part | None:
    """Write `rows` divided by `bucket`; the name comes from the content, so a retry is the same file."""
    if not rows.num_rows:
        return None
    order = np.argsort(bucket, kind="stable")
    rows, bucket = rows.take(pa.array(order)), bucket[order]
    sink = pa.BufferOutputStream()
    numbers, starts = np.unique(bucket, return_index=True)
    with pq.ParquetWriter(sink, rows.schema, compression="zstd", compression_level=1) as writer:
        for start, end in zip(starts, [*starts[1:], len(bucket)], strict=True):
            writer.write_table(rows.slice(int(start), int(end - start)), row_group_size=max(1, int(end - start)))
    content = sink.getvalue()
    target = directory / f"{hashlib.blake2b(content, digest_size=12).hexdigest()}.parquet"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    partial.write_bytes(content)
    os.replace(partial, target)
    return Part(str(target), tuple(int(number) for number in numbers))


def gather(parts: Sequence[Part], bucket: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The rows of one bucket, some GATHERED_ROWS at a time."""
    waiting: list[pa.Table] = []
    for part in parts:
        if bucket in part.buckets:
            with pq.ParquetFile(part.path) as file:
                waiting.append(file.read_row_group(part.buckets.index(bucket),
                                                   columns=list(columns) if columns else None))
        if sum(table.num_rows for table in waiting) >= GATHERED_ROWS:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def gather_all(parts: Sequence[Part], bucket: int, empty: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one bucket as one table; `empty` is its schema when there are none."""
    tables = list(gather(parts, bucket, columns))
    schema = empty if columns is None else pa.schema([empty.field(name) for name in columns])
    return pa.concat_tables(tables) if tables else schema.empty_table()


class ReviewStatistics:
    """Statistics of each product's train reviews, added up block by block: rows by row id, (P,) each."""

    def __init__(self, row_ids: Ints) -> None:
        self.row_ids = row_ids
        size = len(row_ids)
        self.count, self.rated = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self._verified, self._chars = np.zeros(size), np.zeros(size)
        self._rating, self._rating_squared = np.zeros(size), np.zeros(size)
        self._last = np.full(size, -1, np.int64)

    def add(self, places: Ints, columns: Mapping[str, npt.NDArray[np.float64]], timestamps: Ints) -> None:
        """Add reviews of the products at `places`; columns: rating (NaN if none), verified, chars."""
        rated = np.isfinite(columns["rating"])
        np.add.at(self.count, places, 1)
        np.add.at(self.rated, places, rated.astype(np.int64))
        np.add.at(self._verified, places, columns["verified"])
        np.add.at(self._chars, places, columns["chars"])
        rating = np.where(rated, columns["rating"], 0.0)
        np.add.at(self._rating, places, rating)
        np.add.at(self._rating_squared, places, rating**2)
        np.maximum.at(self._last, places, timestamps)

    def columns(self) -> dict[str, pa.Array]:
        """The columns of PRODUCT_STATS but row_id and as_of_ms; null where a product has no review."""
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = self._rating / self.rated
            spread = np.sqrt(np.maximum(self._rating_squared / self.rated - mean**2, 0))
            verified, chars = self._verified / self.count, self._chars / self.count
        return {
            "num_reviews": pa.array(self.count),
            "verified_share": pa.array(verified, pa.float64(), from_pandas=True),
            "rating_mean": pa.array(mean, pa.float64(), from_pandas=True),
            "rating_std": pa.array(spread, pa.float64(), from_pandas=True),
            "mean_review_chars": pa.array(chars, pa.float64(), from_pandas=True),
            "last_review_ms": pa.array(self._last, mask=self._last < 0),
        }


def first_per_group(groups: Ints, order_keys: Ints, limit: int) -> Ints:
    """Positions of at most `limit` rows of each group, those with the smallest keys, in order of group and key."""
    order = np.lexsort((order_keys, groups))
    sorted_groups = groups[order]
    starts = np.flatnonzero(np.diff(sorted_groups, prepend=sorted_groups[:1] - 1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return np.asarray(order[rank < limit], dtype=np.int64)
