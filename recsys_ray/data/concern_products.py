"""Any products -> what a concern model reads of them (CONCERN_PRODUCT without the split), the rest set aside.

Products come from a prepared artefact or from a plain table with columns of any names. Of one without an ingredient
list, one may be found in its text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from recsys_ray.artifacts import Manifest, open_artifact
from recsys_ray.config import Config
from recsys_ray.data.concern_splits import formula_groups
from recsys_ray.data.concerns import PATH_SEPARATOR, Labeller
from recsys_ray.data.dedup import NearDuplicateConfig, band_keys, close_pairs, groups_of_pairs, pairs_of_bands
from recsys_ray.data.ingredients import ingredients_in_text, list_flags, parse_ingredients
from recsys_ray.data.preprocess import QUARANTINED_CHARS
from recsys_ray.data.sources import load_rows
from recsys_ray.data.sources.files import find_files
from recsys_ray.ids import row_ids
from recsys_ray.schema import CONCERN_PRODUCT, QUARANTINE, TEXTS

TABLE = pa.schema([         # of a plain table of products; only id and title must be there
    pa.field("product_id", pa.string(), nullable=False), pa.field("title", pa.string(), nullable=False),
    pa.field("category", TEXTS), pa.field("ingredients", pa.string()), pa.field("text", pa.string())])
PRODUCTS = pa.schema([field for field in CONCERN_PRODUCT if field.name != "split"])
_PREPARED = ["product_id", "row_id", "title", "categories", "ingredients", "description", "features", "group_id"]
Row = dict[str, Any]


class ConcernProducts(Config):
    """Where the products are: a prepared artefact, or a table (Parquet, CSV, JSONL; file, folder or glob)."""

    prepared: Path | None = None
    path: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)   # ours (names of TABLE): theirs
    endpoint_url: str | None = None
    find_in_text: bool = False      # where there is no list: one after "Ingredients:", or the ones the text names
    without_ingredients: Literal["set_aside", "keep"] = "set_aside"
    near_duplicates: NearDuplicateConfig = NearDuplicateConfig()    # of a table; a prepared artefact has found its own

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.prepared is None) == (self.path is None):
            raise ValueError("give either prepared (the root of a prepared artefact) or path (a table of products)")
        return self

    def parents(self) -> dict[str, Manifest]:
        """The manifest of the prepared artefact, where there is one."""
        return {} if self.prepared is None else {"prepared": open_artifact(self.prepared, "prepared").manifest}

    def states(self) -> list[list[str | int]]:
        """Path, bytes and state of the files of a table."""
        files = find_files(self.path, self.endpoint_url) if self.path else []
        return [[file.path, file.size, file.state] for file in files]


def read_concern_products(config: ConcernProducts, labeller: Labeller, kinds_only: bool) -> tuple[pa.Table, pa.Table]:
    """(PRODUCTS, QUARANTINE), both by product; `kinds_only`: products of no known kind are set aside.

    A product is set aside without an id or title, when its id comes twice, without ingredients (unless they are not
    asked for) and with a list that is none (`list_flags`).
    """
    kept: dict[str, Row] = {}
    formulas: list[list[str]] = []
    aside: list[Row] = []
    for place, reason, row in _rows(config):
        reason = reason or ("a second row with this id" if row["product_id"] in kept else None)
        names: list[str] = []
        if reason is None:
            names, reason = _judged(row, config, labeller, kinds_only)
        if reason is None:
            kept[row["product_id"]] = row
            formulas.append(names)
        else:
            aside.append({"table": "products", "source": place, "key": row.get("product_id"), "reason": reason,
                          "row": json.dumps(row, ensure_ascii=False)[:QUARANTINED_CHARS]})
    aside.sort(key=lambda one: (one["reason"], one["key"] or ""))
    quarantine = pa.Table.from_pylist(aside, schema=QUARANTINE)
    if not kept:
        return PRODUCTS.empty_table(), quarantine
    table = pa.Table.from_pylist(list(kept.values()), schema=PRODUCTS)
    groups = table["group_id"].to_numpy() if config.prepared is not None else _groups(table, config.near_duplicates)
    groups = formula_groups(table["row_id"].to_numpy(), groups, formulas)
    table = table.set_column(PRODUCTS.names.index("group_id"), "group_id", pa.array(groups))
    return table.sort_by("row_id"), quarantine


def _judged(row: Row, config: ConcernProducts, labeller: Labeller, kinds_only: bool) -> tuple[list[str], str | None]:
    """(the names of its ingredients, why it cannot be used); the row's own list may be replaced by one of its text."""
    book, text = labeller.rulebook, row.pop("text")
    if not (row["title"] or "").strip():
        return [], "title is missing"
    if kinds_only and not labeller.kinds(row["category"], row["title"]):
        return [], f"no kind of product in its category: {row['category'] or 'none'}"
    if not (row["ingredients"] or "").strip():
        row["ingredients"] = ingredients_in_text(f"{row['title']}\n{text or ''}", book.synonyms, book.active_names) \
            if config.find_in_text else None
        if row["ingredients"] is None:
            return [], "no ingredients" if config.without_ingredients == "set_aside" else None
    listed = parse_ingredients(row["ingredients"], book.synonyms)
    flags = list_flags(listed, book.synonyms)
    return [one.name for one in listed], f"not an ingredient list: {flags[0]}" if flags else None


def _rows(config: ConcernProducts) -> Iterator[tuple[str, str | None, Row]]:
    """(place, why the row cannot be read, the row with the columns of PRODUCTS and `text`)."""
    if config.prepared is not None:
        artifact = open_artifact(config.prepared, "prepared")
        for name in artifact.names("products/"):
            for row in artifact.table(name, _PREPARED).to_pylist():
                text = "\n".join(one for one in (row.pop("description"), *(row.pop("features") or ())) if one)
                yield name, None, {**row, "category": category_path(row.pop("categories")), "text": text}
        return
    table = load_rows(config.path or "", config.columns, TABLE, endpoint_url=config.endpoint_url)
    for row in table.to_pylist():
        place, reason = row.pop("_source"), row.pop("_error")
        number = int(row_ids([row["product_id"]])[0]) if reason is None else None
        yield place, reason, {**row, "category": category_path(row["category"]), "row_id": number, "group_id": number}


def category_path(levels: Sequence[str] | None) -> str | None:
    """The levels of a category as one text; a level may be a path itself."""
    parts = [part.strip() for level in levels or () for part in level.split(PATH_SEPARATOR.strip())]
    return PATH_SEPARATOR.join(filter(None, parts)) or None


def _groups(table: pa.Table, config: NearDuplicateConfig) -> np.ndarray[Any, np.dtype[np.int64]]:
    rows = table["row_id"].to_numpy()
    texts = [f"{row['title']} {row['ingredients'] or ''}" for row in table.select(["title", "ingredients"]).to_pylist()]
    pairs, _ = pairs_of_bands(band_keys(texts, rows, config), config.max_bucket)
    found: Mapping[int, int] = groups_of_pairs([close_pairs(pairs, config.shared_bands())])
    return np.array([found.get(one, one) for one in rows.tolist()], dtype=np.int64)
