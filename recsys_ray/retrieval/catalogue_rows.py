"""Prepared products -> the rows of an index, each with a hash that decides whether it is replaced."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.retrieval.segments import ROWS, STATISTICS, Ints


def row_hashes(rows: pa.Table) -> pa.Array:
    """32 hex digits per row over all columns but `row_hash`: equal exactly when the rows are."""
    columns = [_as_texts(rows[name]) for name in ROWS.names if name != "row_hash"]
    return pa.array([hashlib.blake2b("\x1f".join(row).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
                     for row in zip(*columns, strict=True)], pa.string())


def _as_texts(column: pa.ChunkedArray[Any]) -> list[str]:
    if pa.types.is_nested(column.type):
        return ["\0" if one is None else json.dumps(one) for one in column.to_pylist()]
    texts: list[str] = column.cast(pa.string()).fill_null("\0").to_pylist()
    return texts


def catalogue_rows(products: pa.Table, texts: pa.Table, stats: pa.Table,
                   concerns: Callable[[Ints], Mapping[str, pa.Array]]) -> pa.Table:
    """ROWS sorted by row id, from PRODUCT, PRODUCT_TEXT and PRODUCT_STATS rows of the same products.

    `concerns`: row ids -> the columns concerns, addresses and because (`concern_columns`).
    """
    joined = products.sort_by("row_id")
    for other, names in ((texts, ("text", "lexical_text")), (stats, STATISTICS)):
        places = pc.index_in(joined["row_id"], value_set=other["row_id"].combine_chunks())
        for name in names:
            joined = joined.append_column(name, other[name].take(places))
    images = pc.list_slice(joined["image_urls"], 0, 1)
    first = [one[0] if one else None for one in images.to_pylist()]
    columns = {name: joined[name] for name in ROWS.names if name in joined.column_names}
    rows = pa.table({**columns, "image_url": pa.array(first, pa.string()),
                     **concerns(joined["row_id"].to_numpy())})
    return rows.append_column("row_hash", row_hashes(rows)).select(ROWS.names).cast(ROWS)
