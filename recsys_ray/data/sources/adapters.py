"""What each family's rows mean: pure functions from a record or a Parquet table to our column names.

The values keep the file's types; `blocks` gives them ours. Fields that were counted when the shop was
crawled (average rating, number of ratings) are left out on purpose: they know the future.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.data.sources.values import RowError, shown

RecordAdapter = Callable[[Mapping[str, Any]], dict[str, Any]]
TableAdapter = Callable[[pa.Table], pa.Table]

ESCI_PRODUCT = ("product_id", "title", "description", "bullet_points", "brand", "color", "category_path", "price",
                "image_url")
ICECAT_PRODUCT = ("product_id", "name", "title", "short_description", "supplier", "price_cents", "date_released",
                  "image_url", "attributes_json")
BOOK = ("book_id", "title", "authors", "original_publication_year", "original_title", "language_code", "isbn13",
        "image_url")
PHOTOGRAPH = ("image_id", "sender_id", "label", "width", "height", "jpeg")
ROW = "_row"    # of an adapter that makes several rows out of one: which one, counted in its table
_ICECAT_PREFIX = re.compile(r"^[tnb]_")             # text, number, boolean
_ICECAT_UNIT = re.compile(r"__[a-z_]+_$")           # operating_temperature__t_t_


# --- Amazon Reviews 2023 --------------------------------------------------------------------------
def amazon_product(record: Mapping[str, Any]) -> dict[str, Any]:
    """RAW_PRODUCT values of one line of `meta_<Category>.jsonl`; the key is `parent_asin`."""
    details = _details(record.get("details"))
    named = {str(name).strip().lower(): value for name, value in details.items()}
    categories = record.get("categories") or ([record["main_category"]] if record.get("main_category") else None)
    return {
        "product_id": record.get("parent_asin"), "title": record.get("title"),
        "description": record.get("description"), "features": record.get("features"),
        "brand": record.get("store") or named.get("brand"), "color": record.get("color") or named.get("color"),
        "categories": categories, "ingredients": named.get("ingredients"), "attributes": details,
        "price": record.get("price"), "released": named.get("date first available"),
        "image_urls": _amazon_images(record.get("images")),
    }


def amazon_review(record: Mapping[str, Any]) -> dict[str, Any]:
    """RAW_REVIEW values of one line of `<Category>.jsonl`; `asin` is the variant of `parent_asin`."""
    asin = record.get("asin")
    return {
        "product_id": record.get("parent_asin") or asin, "variant_id": asin, "user_id": record.get("user_id"),
        "rating": record.get("rating"), "title": record.get("title"), "text": record.get("text"),
        "timestamp_ms": record.get("timestamp"), "verified": record.get("verified_purchase"),
        "helpful_votes": record.get("helpful_vote"),
    }


def _details(details: Any) -> dict[str, Any]:
    """Amazon's `details`, which is an object in the JSON files and JSON text in their Parquet copies."""
    if isinstance(details, str):
        try:
            parsed = json.loads(details)
        except (ValueError, RecursionError):
            parsed = details.strip()
        details = parsed if isinstance(parsed, Mapping) else {"details": parsed} if parsed else {}
    if details is None:
        return {}
    if not isinstance(details, Mapping):
        raise RowError(f"details: expected names and values, found {shown(details)}")
    return dict(details)


def _amazon_images(images: Any) -> list[str]:
    """The largest URL of each image, in order; the files hold a list of objects or an object of lists."""
    if isinstance(images, Mapping):
        sizes = [images.get(size) or [] for size in ("hi_res", "large", "thumb")]
        if not all(isinstance(urls, list) for urls in sizes):
            raise RowError(f"images: expected lists of addresses, found {shown(images)}")
        most = max(map(len, sizes))
        images = [dict(zip(("hi_res", "large", "thumb"), urls, strict=True))
                  for urls in ([urls[at] if at < len(urls) else None for urls in sizes] for at in range(most))]
    if images is None:
        return []
    if not isinstance(images, list):
        raise RowError(f"images: expected a list, found {shown(images)}")
    urls = [one if isinstance(one, str) else _largest(one) for one in images]
    return [url for url in urls if url]


def _largest(image: Any) -> str | None:
    if not isinstance(image, Mapping):
        return None
    found = image.get("hi_res") or image.get("large") or image.get("thumb")
    return found if isinstance(found, str) else None


# --- ESCI -----------------------------------------------------------------------------------------
def esci_products(table: pa.Table) -> pa.Table:
    """RAW_PRODUCT columns of ESCI's products; bullet points become features."""
    return _table({
        "product_id": table["product_id"], "title": table["title"], "description": table["description"],
        "features": _lines_of(table["bullet_points"]), "brand": table["brand"], "color": table["color"],
        "categories": table["category_path"], "price": _plain_number(table["price"]),
        "image_urls": _singletons(table["image_url"]),
    })


def queries(table: pa.Table) -> pa.Table:
    """QUERY columns, also of the queries whose labels are withheld."""
    return _table({"query_id": table["query_id"], "query": table["query"]})


def esci_judgments(table: pa.Table) -> pa.Table:
    """JUDGMENT columns of ESCI: its own gain (E 1, S 0.1, C 0.01, I 0) and its letter as the label."""
    return _table({"query_id": table["query_id"], "product_id": table["product_id"], "gain": table["gain"],
                     "label": table["esci_label"]})


# --- Icecat ---------------------------------------------------------------------------------------
def icecat_products(table: pa.Table, with_attributes: bool) -> pa.Table:
    """RAW_PRODUCT columns of Icecat; a model name that the title lacks is the only feature."""
    names, titles = table["name"].to_pylist(), table["title"].to_pylist()
    features = [[name] if name and name not in (title or "") else [] for name, title in zip(names, titles, strict=True)]
    columns: dict[str, Any] = {
        "product_id": table["product_id"], "title": table["title"], "description": table["short_description"],
        "features": pa.array(features, pa.list_(pa.string())), "brand": table["supplier"],
        "price": _euros(table["price_cents"]), "released": table["date_released"],
        "image_urls": _singletons(table["image_url"]),
    }
    if with_attributes:
        sheets = [icecat_attributes(sheet) for sheet in table["attributes_json"].to_pylist()]
        columns["attributes"] = pa.array([json.dumps(sheet) for sheet in sheets], pa.string())
        columns["color"] = pa.array([sheet.get("product colour") for sheet in sheets], pa.string())
    return _table(columns)


def icecat_attributes(sheet: str | None) -> dict[str, str]:
    """A specification sheet as name -> value: `{"t_print_technology": "Laser"}` gives `{"print technology": "Laser"}`.

    Booleans become yes and no. A sheet that is not a JSON object gives one attribute, `details`.
    """
    attributes: dict[str, str] = {}
    for name, value in _details(sheet).items():
        plain = _ICECAT_UNIT.sub("", _ICECAT_PREFIX.sub("", name)).replace("_", " ").strip()
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, float):
            value = f"{value:.15g}"
        written = str(value).strip() if value is not None else ""
        if plain and written and written not in attributes.get(plain, "").split(", "):
            # t_x and n_x of one sheet say different things under one name: keep both
            attributes[plain] = f"{attributes[plain]}, {written}" if plain in attributes else written
    return attributes


def icecat_judgments(table: pa.Table) -> pa.Table:
    """JUDGMENT columns of Icecat: the rating 0 to 3 is the gain, and the label as text."""
    return _table({"query_id": table["query_id"], "product_id": table["product_id"], "gain": table["rating"],
                     "label": table["rating"]})


# --- goodbooks ------------------------------------------------------------------------------------
def books(table: pa.Table) -> pa.Table:
    """RAW_PRODUCT columns of goodbooks: the authors are the brand, everything is in the category Books."""
    facts = {"authors": "authors", "original title": "original_title", "language": "language_code", "isbn": "isbn13"}
    rows = zip(*(table[column].to_pylist() for column in facts.values()), strict=True)
    attributes = [json.dumps({name: one for name, one in zip(facts, row, strict=True) if one}) for row in rows]
    return _table({
        "product_id": table["book_id"], "title": table["title"], "brand": table["authors"],
        "categories": pa.array([["Books"]] * table.num_rows, pa.list_(pa.string())),
        "attributes": pa.array(attributes, pa.string()), "released": table["original_publication_year"],
        "image_urls": _singletons(table["image_url"]),
    })


def book_ratings(table: pa.Table) -> pa.Table:
    """INTERACTION columns of kind `rating`."""
    return _table({"user_id": table["user_id"], "product_id": table["book_id"], "kind": _constant(table, "rating"),
                     "rating": table["rating"]})


def books_to_read(table: pa.Table) -> pa.Table:
    """INTERACTION columns of kind `to_read`."""
    return _table({"user_id": table["user_id"], "product_id": table["book_id"], "kind": _constant(table, "to_read")})


def book_tags(table: pa.Table, books_table: pa.Table, tags_table: pa.Table) -> pa.Table:
    """TAG columns of `book_tags`, joined to our book ids and tag names; an unknown book or tag gives nulls."""
    book_at = pc.index_in(table["goodreads_book_id"], value_set=books_table["goodreads_book_id"])
    tag_at = pc.index_in(table["tag_id"], value_set=tags_table["tag_id"])
    return _table({"product_id": books_table["book_id"].take(book_at), "tag": tags_table["tag_name"].take(tag_at),
                     "count": table["count"]})


# --- Goodreads ------------------------------------------------------------------------------------
def goodreads_books(table: pa.Table, authors: pa.Table) -> pa.Table:
    """RAW_PRODUCT columns of `reduced_books`; the authors' names, joined by commas, are the brand."""
    names = dict(zip(authors["author_id"].cast(pa.string()).to_pylist(), authors["name"].to_pylist(), strict=True))
    written = [", ".join(filter(None, (names.get(str(_field(one, "author_id"))) for one in ids or ()))) or None
               for ids in table["authors"].to_pylist()]
    columns = {
        "product_id": table["book_id"], "title": table["title"], "brand": pa.array(written, pa.string()),
        "categories": pa.array([["Books"]] * table.num_rows, pa.list_(pa.string()))}
    return _table(columns | ({"description": table["description"]} if "description" in table.column_names else {}))


def goodreads_shelves(table: pa.Table) -> pa.Table:
    """TAG columns of the `popular_shelves` of `reduced_books`: a row a shelf, and the ROW it stood in."""
    found = [(row, book, _field(shelf, "name"), shelf.get("count") if isinstance(shelf, Mapping) else None)
             for row, (book, shelves) in enumerate(zip(table["book_id"].to_pylist(),
                                                       table["popular_shelves"].to_pylist(), strict=True))
             for shelf in shelves or ()]
    rows, books, tags, counts = zip(*found, strict=True) if found else ((), (), (), ())
    return _table({ROW: pa.array(rows, pa.int64()), "product_id": pa.array(books, table["book_id"].type),
                   "tag": pa.array(tags, pa.string()),
                   "count": pa.array([one and int(one) for one in counts], pa.int64())})


def goodreads_interactions(table: pa.Table) -> pa.Table:
    """INTERACTION columns of `reduced_interactions`: kind `rating`, or `to_read` where nothing was rated."""
    rated = pc.greater(pc.fill_null(table["rating"], 0), 0)
    columns = {"user_id": table["user_id"], "product_id": table["book_id"],
               "kind": pc.if_else(rated, "rating", "to_read"), "rating": pc.if_else(rated, table["rating"], None)}
    if "date_added" in table.column_names:
        columns["timestamp_ms"] = pa.array([_written_time(one) for one in table["date_added"].to_pylist()], pa.int64())
    return _table(columns)


def goodreads_texts(table: pa.Table) -> pa.Table:
    """PRODUCT_WORDS columns of `book_texts_reduced`."""
    return _table({"product_id": table["book_id"], "text": table["text"]})


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else value


def _written_time(value: str | None) -> int | None:
    """Milliseconds of a time as Goodreads writes it, `Tue Oct 17 09:40:11 -0700 2017`; None for anything else."""
    try:
        return round(datetime.strptime(value or "", "%a %b %d %H:%M:%S %z %Y").timestamp() * 1000)
    except (TypeError, ValueError):
        return None


# --- clothing -------------------------------------------------------------------------------------
def clothing_images(table: pa.Table) -> pa.Table:
    """IMAGE columns; the sender is the group that must not be split between train and test."""
    return _table({"image_id": table["image_id"], "group_id": table["sender_id"], "label": table["label"],
                     "width": table["width"], "height": table["height"], "data": table["jpeg"]})


# --- any table ------------------------------------------------------------------------------------
def mapped_record(record: Mapping[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """A record under our names."""
    return {ours: record.get(theirs) for ours, theirs in mapping.items()}


def mapped_table(table: pa.Table, mapping: Mapping[str, str]) -> pa.Table:
    """A table under our names."""
    return _table({ours: table[theirs] for ours, theirs in mapping.items()})


# --- columns --------------------------------------------------------------------------------------
def _table(columns: dict[str, Any]) -> pa.Table:
    return pa.table(columns)


def _constant(table: pa.Table, value: str) -> pa.Array[Any]:
    return pa.array([value] * table.num_rows, pa.string())


def _singletons(column: pa.ChunkedArray[Any]) -> pa.Array[Any]:
    return pa.array([[one] if one else [] for one in column.to_pylist()], pa.list_(pa.string()))


def _lines_of(column: pa.ChunkedArray[Any]) -> pa.Array[Any]:
    return pa.array([one.split("\n") if one else [] for one in column.to_pylist()], pa.list_(pa.string()))


def _plain_number(column: pa.ChunkedArray[Any]) -> pa.ChunkedArray[Any]:
    """Numbers as texts, a float32 as it was written (12.99, not 12.989999771)."""
    return column.cast(pa.string()) if pa.types.is_floating(column.type) else column


def _euros(cents: pa.ChunkedArray[Any]) -> pa.Array[Any]:
    prices = [None if one is None else f"{one // 100}.{one % 100:02d}" for one in cents.to_pylist()]
    return pa.array(prices, pa.string())
