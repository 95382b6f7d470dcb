"""A source and the name of a table -> recipes that have been checked against the files, before any work."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import lru_cache, partial

import pyarrow as pa
import pyarrow.parquet as pq

from recsys_ray.data.sources import adapters
from recsys_ray.data.sources.blocks import Recipe, open_parquet
from recsys_ray.data.sources.config import (
    TABLES,
    AmazonReviewsSource,
    ClothingSource,
    EsciSource,
    GoodbooksSource,
    GoodreadsSource,
    IcecatSource,
    SourceConfig,
    SourceError,
    TableSource,
    check_columns,
)
from recsys_ray.data.sources.files import DataFile, find_files
from recsys_ray.data.sources.lines import csv_header, peek, read_csv, read_jsonl, read_lines
from recsys_ray.data.sources.values import Reading

OPEN_TO_TRUTH = frozenset({"queries", "judgments"})     # evaluation may read what training and serving may not
REQUIRED = {                                            # of a mapped table: without these no later stage can work
    "products": ("product_id", "title"), "reviews": ("product_id", "timestamp_ms"), "queries": ("query_id", "query"),
    "judgments": ("query_id", "product_id", "gain"), "interactions": ("user_id", "product_id", "kind"),
    "tags": ("product_id", "tag"), "events": ("event_id", "kind", "timestamp_ms", "product_id"),
}
AMAZON_KEYS = {"products": ("parent_asin", "title"), "reviews": ("user_id", "rating", "timestamp")}
IMAGE_ROWS = 256        # in one block: with the bytes of the image, rows are large


def recipes(source: SourceConfig, table: str) -> list[Recipe]:
    """How to read `table` of `source`, checked: the files exist, are not empty and hold the columns.

    Errors: `SourceError` naming the file, the column and what was found, or the tables `source` has.
    """
    available = tables_of(source)
    if table not in available:
        raise SourceError(f"a source of format {source.format!r} has no {table} here; it has {', '.join(available)}")
    if isinstance(source, AmazonReviewsSource):
        return [_amazon(source, table)]
    if isinstance(source, TableSource):
        path = getattr(source, table)
        files = find_files(path, source.endpoint_url, allow_truth=table in OPEN_TO_TRUTH)
        return [mapped_recipe(files, table, source.columns_of(table), TABLES[table], REQUIRED[table], source)]
    return _folder(source, table)


def tables_of(source: SourceConfig) -> tuple[str, ...]:
    """The tables that `source` can be asked for."""
    if isinstance(source, AmazonReviewsSource):
        return ("products", "reviews") if source.reviews else ("products",)
    if isinstance(source, TableSource):
        return tuple(name for name in source.table_names() if getattr(source, name))
    if isinstance(source, GoodbooksSource):
        return ("products", "interactions", "tags")
    if isinstance(source, GoodreadsSource):
        return ("products", "interactions", "tags", "texts")
    return ("images",) if isinstance(source, ClothingSource) else ("products", "queries", "judgments")


def file_states(source: SourceConfig, tables: Sequence[str] | None = None) -> list[dict[str, str | int]]:
    """Path, bytes and state of each file behind `tables` (default: all): equal only while the input is the same."""
    found = {file.path: file for table in tables or tables_of(source)
             for recipe in recipes(source, table) for file in recipe.files}
    return [{"path": file.path, "bytes": file.size, "state": file.state} for _, file in sorted(found.items())]


# --- Amazon ---------------------------------------------------------------------------------------
def _amazon(source: AmazonReviewsSource, table: str) -> Recipe:
    path = source.products if table == "products" else source.reviews or ""
    files = find_files(path, source.endpoint_url, kinds=("jsonl",))
    if len(files) > 1:      # a folder with both: the name tells them apart
        wanted = [file for file in files if _is_meta(file) == (table == "products")]
        if not wanted:
            raise SourceError(f"{path}: no {'meta_*' if table == 'products' else 'review'} file among "
                              f"{', '.join(file.path for file in files[:5])}")
        files = wanted
    for file in files:
        names = _jsonl_names(file)
        missing = [key for key in AMAZON_KEYS[table] if key not in names]
        if missing:
            raise SourceError(f"{file.path}: no {', '.join(map(repr, missing))} in the first lines, so this is no file "
                              f"of {table} in the Amazon Reviews 2023 format; found {', '.join(names)}")
    adapt = adapters.amazon_product if table == "products" else adapters.amazon_review
    return Recipe(table, TABLES[table], tuple(files), record=adapt)


def _is_meta(file: DataFile) -> bool:
    return file.path.rsplit("/", 1)[-1].startswith("meta_")


# --- the families that are folders of Parquet files -----------------------------------------------
def _folder(source: EsciSource | IcecatSource | GoodbooksSource | GoodreadsSource | ClothingSource, table: str
            ) -> list[Recipe]:
    parts: dict[str, tuple[str, tuple[str, ...], adapters.TableAdapter]] = {
        "queries": ("queries.parquet", ("query_id", "query"), adapters.queries),
    }
    if isinstance(source, EsciSource):
        judgment = ("query_id", "product_id", "esci_label", "gain")
        parts["products"] = ("products.parquet", adapters.ESCI_PRODUCT, adapters.esci_products)
        parts["judgments"] = ("judgments.parquet", judgment, adapters.esci_judgments)
    elif isinstance(source, IcecatSource):
        product = partial(adapters.icecat_products, with_attributes=source.attributes)
        parts["products"] = ("products.parquet", adapters.ICECAT_PRODUCT, product)
        parts["judgments"] = ("ratings.parquet", ("query_id", "product_id", "rating"), adapters.icecat_judgments)
    elif isinstance(source, GoodbooksSource):
        return _goodbooks(source, table)
    elif isinstance(source, GoodreadsSource):
        return _goodreads(source, table)
    else:
        parts["images"] = ("images.parquet", adapters.PHOTOGRAPH, adapters.clothing_images)
    name, columns, adapt = parts[table]
    return [_parquet_recipe(source.path, name, source.endpoint_url, table, columns, adapt)]


def _goodbooks(source: GoodbooksSource, table: str) -> list[Recipe]:
    root, endpoint = source.path, source.endpoint_url
    if table == "products":
        return [_parquet_recipe(root, "books.parquet", endpoint, table, adapters.BOOK, adapters.books)]
    if table == "interactions":
        rated, wished = ("user_id", "book_id", "rating"), ("user_id", "book_id")
        return [_parquet_recipe(root, "ratings.parquet", endpoint, table, rated, adapters.book_ratings),
                _parquet_recipe(root, "to_read.parquet", endpoint, table, wished, adapters.books_to_read)]
    books, tags = (find_files(f"{root.rstrip('/')}/{name}", endpoint)[0] for name in ("books.parquet", "tags.parquet"))
    for file, wanted in ((books, ("book_id", "goodreads_book_id")), (tags, ("tag_id", "tag_name"))):
        _require(file, wanted, _parquet_names(file))
    adapt = partial(_joined_tags, books=books, tags=tags)
    columns = ("goodreads_book_id", "tag_id", "count")
    return [_parquet_recipe(root, "book_tags.parquet", endpoint, table, columns, adapt)]


def _goodreads(source: GoodreadsSource, table: str) -> list[Recipe]:
    names = {"products": "reduced_books", "tags": "reduced_books", "interactions": "reduced_interactions",
             "texts": "book_texts_reduced"}
    needed = {"products": ("book_id", "title", "authors"), "tags": ("book_id", "popular_shelves"),
              "interactions": ("user_id", "book_id", "rating"), "texts": ("book_id", "text")}
    welcome = {"products": "description", "interactions": "date_added"}     # read where the file has it
    root, endpoint = source.path.rstrip("/"), source.endpoint_url
    name, columns = f"{names[table]}.parquet", needed[table]
    if welcome.get(table) in _parquet_names(find_files(f"{root}/{name}", endpoint, kinds=("parquet",))[0]):
        columns = (*columns, welcome[table])
    adapt: dict[str, adapters.TableAdapter] = {
        "tags": adapters.goodreads_shelves, "texts": adapters.goodreads_texts,
        "interactions": adapters.goodreads_interactions}
    if table == "products":
        authors = find_files(f"{root}/new_authors.parquet", endpoint, kinds=("parquet",))[0]
        _require(authors, ("author_id", "name"), _parquet_names(authors))
        adapt["products"] = partial(_with_authors, authors=authors)
    return [_parquet_recipe(root, name, endpoint, table, columns, adapt[table])]


def _with_authors(table: pa.Table, authors: DataFile) -> pa.Table:
    return adapters.goodreads_books(table, _side_table(authors, ("author_id", "name")))


def _joined_tags(table: pa.Table, books: DataFile, tags: DataFile) -> pa.Table:
    return adapters.book_tags(table, _side_table(books, ("book_id", "goodreads_book_id")),
                              _side_table(tags, ("tag_id", "tag_name")))


@lru_cache(maxsize=4)
def _side_table(file: DataFile, columns: tuple[str, ...]) -> pa.Table:
    """A small table to join with, read once in each worker process."""
    with file.open() as stream:
        return pq.read_table(stream, columns=list(columns))


def _parquet_recipe(
    folder: str, name: str, endpoint: str | None, table: str, columns: tuple[str, ...], adapt: adapters.TableAdapter,
) -> Recipe:
    files = find_files(f"{folder.rstrip('/')}/{name}", endpoint, kinds=("parquet",),
                       allow_truth=table in OPEN_TO_TRUTH)
    for file in files:
        _require(file, columns, _parquet_names(file))
    rows = IMAGE_ROWS if table == "images" else Recipe.batch_rows
    return Recipe(table, TABLES[table], tuple(files), columns, parquet=adapt, batch_rows=rows)


# --- any table ------------------------------------------------------------------------------------
def mapped_recipe(
    files: list[DataFile], table: str, mapping: dict[str, str], wanted: pa.Schema, required: Sequence[str],
    source: TableSource,
) -> Recipe:
    """A recipe for files with their own column names; all of them must hold the same mapped columns."""
    if len({file.kind for file in files}) > 1:
        raise SourceError(f"{files[0].path} and {files[-1].path}: one table, one kind of file; use a glob")
    check_columns(mapping, wanted)
    delimiter = source.delimiter or ("\t" if ".tsv" in files[0].path.lower() else ",")
    resolved = [_resolve(file, mapping, wanted, required, delimiter) for file in files]
    for file, found in zip(files, resolved, strict=True):
        if found != resolved[0]:
            differing = sorted(set(found.values()) ^ set(resolved[0].values()))
            raise SourceError(f"{file.path}: {', '.join(map(repr, differing))} not in both this file and "
                              f"{files[0].path}; one table needs the same columns in every file")
    reading = Reading(source.list_separator, 1000 if source.time_unit == "s" else 1)
    return Recipe(table, wanted, tuple(files), tuple(dict.fromkeys(resolved[0].values())),
                  record=partial(adapters.mapped_record, mapping=resolved[0]),
                  parquet=partial(adapters.mapped_table, mapping=resolved[0]), reading=reading, delimiter=delimiter)


def _resolve(
    file: DataFile, mapping: dict[str, str], wanted: pa.Schema, required: Sequence[str], delimiter: str,
) -> dict[str, str]:
    """Our column -> their column of one file: what is mapped, then what has our name."""
    if file.kind == "parquet":
        names = _parquet_names(file)
    else:
        names = _csv_names(file, delimiter) if file.kind == "csv" else _jsonl_names(file)
    _require(file, list(mapping.values()), names)
    for ours in required:
        if mapping.get(ours, ours) not in names:
            raise SourceError(f"{file.path}: no column for our {ours!r}; found {', '.join(names)}. "
                              f"Say which one it is in the column mapping, as {ours}: <their column>")
    # Keys of a JSON object may first appear in line 10,000, so there every name of ours is asked for.
    same_name = {name: name for name in wanted.names if name in names or file.kind == "jsonl"}
    return {**same_name, **mapping}


def _require(file: DataFile, columns: Sequence[str], names: list[str]) -> None:
    for column in columns:
        if column not in names:
            near = difflib.get_close_matches(column, names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise SourceError(f"{file.path}: no column {column!r}{hint}; found {', '.join(names)}")


def _parquet_names(file: DataFile) -> list[str]:
    with open_parquet(file) as opened:
        names: list[str] = opened.schema_arrow.names
        return names


def _csv_names(file: DataFile, delimiter: str) -> list[str]:
    names = csv_header(read_lines(file), file, delimiter)
    if not peek(read_csv(file, delimiter), rows=1)[1]:
        raise SourceError(f"{file.path}: no row below the header")
    return names


def _jsonl_names(file: DataFile) -> list[str]:
    names, records = peek(read_jsonl(file))
    if not names:
        found = records[0].error if records else "no line"
        raise SourceError(f"{file.path}: expected one JSON object a line, found {found}")
    return names
