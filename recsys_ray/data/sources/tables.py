"""Small tables (queries, judgments) read at once, strictly: what is scored must be complete."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from recsys_ray.data.sources.blocks import block_schema, pieces_of, read_piece
from recsys_ray.data.sources.config import SourceError, TableSource
from recsys_ray.data.sources.files import find_files
from recsys_ray.data.sources.plan import mapped_recipe
from recsys_ray.schema import conform

MAX_TABLE_BYTES = 1 << 30   # of files: more belongs in a stream


def load_table(
    path: str, columns: Mapping[str, str], schema: pa.Schema, *, endpoint_url: str | None = None,
) -> pa.Table:
    """The Parquet, CSV or JSONL file, folder or glob `path` as one table of exactly `schema`.

    `columns` says our column -> their column for names that differ. A demo shop's truth may be read
    here: its queries and judgments are for evaluation. Errors: `SourceError` for a missing file or
    column, for the first bad row (with its place), and for files of more than 1 GiB in total.
    """
    table = load_rows(path, columns, schema, endpoint_url=endpoint_url, allow_truth=True)
    bad = table.filter(table["_error"].is_valid())
    if bad.num_rows:
        raise SourceError(f"{bad['_source'][0]}: {bad['_error'][0]} ({bad.num_rows} bad row(s) in {path})")
    return conform(table, schema, path)


def load_rows(
    path: str, columns: Mapping[str, str], schema: pa.Schema, *, endpoint_url: str | None = None,
    allow_truth: bool = False,
) -> pa.Table:
    """The same table, bad rows too: `_error` says what is wrong with a row (null: nothing), `_source` its place."""
    files = find_files(path, endpoint_url, allow_truth=allow_truth)
    size = sum(file.size for file in files)
    if size > MAX_TABLE_BYTES:
        raise SourceError(f"{path}: {size} bytes are too many for a table that is held whole; stream it instead")
    required = [field.name for field in schema if not field.nullable]
    recipe = mapped_recipe(files, "table", dict(columns), schema, required, TableSource(products=path))
    blocks = [block for file in files for piece in pieces_of(file) for block in read_piece(piece, recipe)]
    return pa.concat_tables(blocks) if blocks else block_schema(schema).empty_table()


def table_states(path: str) -> list[list[str | int]]:
    """Path, bytes and state of each file that `load_rows` would read: equal only while the table is the same."""
    return [[file.path, file.size, file.state] for file in find_files(path)]
