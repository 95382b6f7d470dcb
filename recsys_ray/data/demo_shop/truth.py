"""What was planted, as one Parquet file per table in a folder of its own, written batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from recsys_ray.schema import ATTRIBUTES, JUDGMENT, QUERY, TEXTS

FOLDER = "truth"
PRODUCTS = pa.schema({
    "product_id": pa.string(), "department": pa.string(), "kind": pa.string(), "kind_group": pa.string(),
    "colour": pa.string(), "pattern": pa.string(), "neckline": pa.string(), "sleeve": pa.string(),
    "material": pa.string(),
    "visible": pa.bool_(),              # an image exists and shows the department's visible attributes
    "attributes": ATTRIBUTES,           # every attribute, by facet
    "brand": pa.string(), "line": pa.string(), "price_cents": pa.int64(), "quality": pa.float32(),
    "duplicate_group": pa.string(),     # the id of the listing that the others of the group repeat
    "cold": pa.bool_(),                 # its first review falls after the first 80 % of all reviews
    "first_review_ms": pa.int64(), "num_reviews": pa.int64(),
    "claims": TEXTS, "helps": TEXTS,    # concerns
})
CONCERNS = pa.schema({
    "product_id": pa.string(), "concern": pa.string(), "claimed": pa.bool_(),
    "strength": pa.float32(),           # after order effects and antagonists
    "helps": pa.bool_(),                # strength of one half at least
    "label": pa.bool_(),                # `helps` as a careless annotator writes it down
    "actives": TEXTS, "antagonists": TEXTS, "ingredients": TEXTS,
})
USERS = pa.schema({
    "user_id": pa.string(), "department": pa.string(), "kind": pa.string(), "price_level": pa.float32(),
    "likes": ATTRIBUTES, "weights": pa.map_(pa.string(), pa.float32()), "concerns": TEXTS,
})
REVIEWS = pa.schema({
    "review_id": pa.string(), "product_id": pa.string(), "user_id": pa.string(), "timestamp_ms": pa.int64(),
    "generic": pa.bool_(),              # names nothing that could tell its product from others
    "duplicate": pa.bool_(),            # the same line comes twice
    "says_kind": pa.bool_(), "facets": TEXTS, "concern": pa.string(),
    "about_product_id": pa.string(),    # differs from product_id only in the null mode
})
DIRTY = pa.schema({"table": pa.string(), "product_id": pa.string(), "review_id": pa.string(), "kind": pa.string()})
TABLES = {"products": PRODUCTS, "concerns": CONCERNS, "users": USERS, "reviews": REVIEWS, "queries": QUERY,
          "judgments": JUDGMENT, "dirty": DIRTY}


class TruthWriter:
    """Opens one Parquet file for every table and appends rows to them."""

    def __init__(self, shop: Path) -> None:
        folder = shop / FOLDER
        folder.mkdir(parents=True)
        self._writers = {name: pq.ParquetWriter(folder / f"{name}.parquet", schema, compression="zstd",
                                                write_page_checksum=True)
                         for name, schema in TABLES.items()}
        self.rows = dict.fromkeys(TABLES, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for writer in self._writers.values():
            writer.close()

    def add(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to a table."""
        if rows:
            self._writers[name].write_table(pa.Table.from_pylist(list(rows), schema=TABLES[name]))
            self.rows[name] += len(rows)

    def add_columns(self, name: str, columns: Mapping[str, Any]) -> None:
        """Append a batch of columns to a table."""
        table = pa.table(dict(columns), schema=TABLES[name])
        self._writers[name].write_table(table)
        self.rows[name] += table.num_rows
