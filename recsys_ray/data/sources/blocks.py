"""Pieces of files -> Arrow blocks of bounded size with the declared schema and two bookkeeping columns.

`_error` is null for a usable row; a bad row has everything else null and its reason there. `_source`
says where the row is: "file:line" of a text file, "file:row" (the first is 1) of a Parquet file,
"file:byte N" in later parts of a large JSONL file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recsys_ray.data.sources.adapters import ROW, RecordAdapter, TableAdapter
from recsys_ray.data.sources.config import SourceError
from recsys_ray.data.sources.files import SPLIT_BYTES, DataFile, byte_ranges
from recsys_ray.data.sources.lines import Record, read_csv, read_jsonl
from recsys_ray.data.sources.values import DEFAULT, Reading, RowError, convert_column, converter, readable

BLOCK_ROWS = 4096
BLOCK_BYTES = 8 << 20       # of a text file's rows in one block
REVIEW_KEY = ("user_id", "product_id", "variant_id", "timestamp_ms", "title", "text")


@dataclass(frozen=True)
class Recipe:
    """Everything a reading task needs to turn files of one table into blocks."""

    table: str                              # "products", "reviews", ...
    schema: pa.Schema
    files: tuple[DataFile, ...]
    columns: tuple[str, ...] = ()           # of a Parquet file, in their names
    record: RecordAdapter | None = None     # for JSONL and CSV
    parquet: TableAdapter | None = None
    reading: Reading = field(default=DEFAULT)
    delimiter: str = ","
    batch_rows: int = BLOCK_ROWS


@dataclass(frozen=True)
class Piece:
    """A part of one file that one task reads: bytes of a JSONL file, row groups of a Parquet file."""

    file: DataFile
    start: int = 0
    stop: int | None = None
    rows_before: int = 0


def block_schema(schema: pa.Schema) -> pa.Schema:
    """`schema` with every column nullable, as bad rows need it, and `_error` and `_source`."""
    fields = [one.with_nullable(True) for one in schema]
    return pa.schema([*fields, pa.field("_error", pa.string()), pa.field("_source", pa.string())])


def pieces_of(file: DataFile, split_bytes: int = SPLIT_BYTES) -> list[Piece]:
    """The pieces of `file`, which together hold each row once: one for CSV and gzip, else by size."""
    if file.kind == "parquet":
        return _row_group_pieces(file, split_bytes)
    if file.kind == "csv" or file.gzipped:
        return [Piece(file)]
    return [Piece(file, start, stop) for start, stop in byte_ranges(file.size, split_bytes)]


def _row_group_pieces(file: DataFile, split_bytes: int) -> list[Piece]:
    with open_parquet(file) as opened:
        metadata = opened.metadata
    pieces, start, size, rows, rows_before = [], 0, 0, 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        rows += metadata.row_group(group).num_rows
        if size >= split_bytes or group == metadata.num_row_groups - 1:
            pieces.append(Piece(file, start, group + 1, rows_before))
            start, size, rows, rows_before = group + 1, 0, 0, rows_before + rows
    return pieces


def open_parquet(file: DataFile) -> pq.ParquetFile:
    """The open Parquet file; `SourceError` when it is none or its footer is damaged."""
    try:
        return pq.ParquetFile(file.open(), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{file.path}: not a readable Parquet file ({file.size} bytes): {error}") from None


def read_piece(piece: Piece, recipe: Recipe) -> Iterator[pa.Table]:
    """Blocks of one piece, each of at most `recipe.batch_rows` rows, in the file's order."""
    if piece.file.kind == "parquet":
        return _parquet_blocks(piece, recipe)
    records = (read_csv(piece.file, recipe.delimiter) if piece.file.kind == "csv"
               else read_jsonl(piece.file, piece.start, piece.stop))
    return record_blocks(records, recipe)


def record_blocks(records: Iterable[Record], recipe: Recipe) -> Iterator[pa.Table]:
    """Blocks of records, closed at `recipe.batch_rows` rows or BLOCK_BYTES of text, whichever comes first."""
    adapt = recipe.record
    if adapt is None:
        raise SourceError(f"{recipe.table}: this source reads Parquet files only")
    builder = _Builder(recipe)
    for record in records:
        try:
            if record.values is None:
                raise RowError(record.error)
            builder.add(adapt(record.values), record)
        except RowError as error:
            builder.add_bad(str(error), record)
        if len(builder.places) >= recipe.batch_rows or builder.size >= BLOCK_BYTES:
            yield builder.finish()
    if builder.places:
        yield builder.finish()


class _Builder:
    """Columns of the block that is being filled."""

    def __init__(self, recipe: Recipe) -> None:
        self.schema = block_schema(recipe.schema)
        self.fields = [(one.name, one.nullable, converter(one, recipe.reading)) for one in recipe.schema]
        self._clear()

    def _clear(self) -> None:
        self.rows: list[tuple[Any, ...]] = []
        self.errors: list[str | None] = []
        self.places: list[str] = []
        self.size = 0

    def add(self, values: Mapping[str, Any], record: Record) -> None:
        row: list[Any] = []
        for name, nullable, convert in self.fields:
            value = values.get(name)
            if value is not None:
                try:
                    value = convert(value)
                except RowError as error:
                    raise RowError(f"{name}: {error}") from None
            if value is None and not nullable:
                raise RowError(f"{name} is missing")
            row.append(value)
        self._append(tuple(row), None, record)

    def add_bad(self, reason: str, record: Record) -> None:
        self._append((None,) * len(self.fields), reason, record)

    def _append(self, row: tuple[Any, ...], error: str | None, record: Record) -> None:
        self.rows.append(row)
        self.errors.append(error)
        self.places.append(record.place)
        self.size += record.size

    def finish(self) -> pa.Table:
        columns = [pa.array(values, one.type) for values, one in zip(zip(*self.rows, strict=True), self.schema)]  # noqa: B905
        table = pa.Table.from_arrays([*columns, pa.array(self.errors, pa.string()), pa.array(self.places, pa.string())],
                                     schema=self.schema)
        self._clear()
        return with_review_ids(table)


def _parquet_blocks(piece: Piece, recipe: Recipe) -> Iterator[pa.Table]:
    adapt = recipe.parquet
    if adapt is None:
        raise SourceError(f"{piece.file.path}: this source reads {recipe.table} from JSONL files, not from Parquet")
    groups = list(range(piece.start, piece.stop or piece.start))
    row = piece.rows_before
    with open_parquet(piece.file) as opened:
        batches = opened.iter_batches(recipe.batch_rows, row_groups=groups, columns=list(recipe.columns))
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise SourceError(f"{piece.file.path}: damaged after row {row}: {error}") from None
            if batch is None:
                return
            places = [f"{piece.file.path}:{row + offset + 1}" for offset in range(batch.num_rows)]
            row += batch.num_rows
            raw, unreadable = readable(pa.Table.from_batches([batch]))
            rows = adapt(raw)
            if ROW in rows.column_names:    # one row became several, or none
                at = rows[ROW].to_pylist()
                places = [places[one] for one in at]
                unreadable = {number: unreadable[one] for number, one in enumerate(at) if one in unreadable}
            yield table_block(rows, places, recipe, unreadable)


def table_block(raw: pa.Table, places: list[str], recipe: Recipe, unreadable: Mapping[int, str]) -> pa.Table:
    """One block from columns under our names but with the file's types; `unreadable` rows are bad already."""
    columns: list[pa.Array[Any]] = []
    reasons: dict[int, str] = dict(unreadable)
    for one in recipe.schema:
        if one.name in raw.column_names:
            column, bad = convert_column(raw[one.name], one, recipe.reading)
        else:
            column, bad = pa.nulls(raw.num_rows, one.type), {}
        if not one.nullable and column.null_count:
            for position, missing in enumerate(column.is_null().to_pylist()):
                if missing:
                    bad.setdefault(position, f"{one.name} is missing")
        for position, reason in bad.items():
            reasons.setdefault(position, reason)
        columns.append(column)
    if reasons:
        keep = pa.array([None if at in reasons else at for at in range(raw.num_rows)], pa.int64())
        columns = [column.take(keep) for column in columns]
    errors = pa.array([reasons.get(at) for at in range(raw.num_rows)], pa.string())
    table = pa.Table.from_arrays([*columns, errors, pa.array(places, pa.string())],
                                 schema=block_schema(recipe.schema))
    return with_review_ids(table)


def with_review_ids(table: pa.Table) -> pa.Table:
    """`table`; of reviews, those without an id of their own get `review_id` of what they say."""
    if "review_id" not in table.column_names or not table["review_id"].null_count:
        return table
    rows = table.select([*REVIEW_KEY, "review_id", "_error"]).to_pylist()
    ids = [row["review_id"] if row["review_id"] or row["_error"] else review_id(row) for row in rows]
    at = table.column_names.index("review_id")
    return table.set_column(at, table.schema.field(at), pa.array(ids, pa.string()))


def review_id(row: Mapping[str, Any]) -> str:
    """32 hex digits from who said what about which variant and when: equal only for a review repeated in full."""
    written = json.dumps([row.get(name) for name in REVIEW_KEY], ensure_ascii=True)
    return hashlib.blake2b(written.encode(), digest_size=16).hexdigest()
