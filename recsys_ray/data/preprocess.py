"""Raw rows -> clean rows: text without markup, prices in cents, dates in milliseconds; the rest set aside.

Pure functions on Arrow tables. A row that cannot be used goes to QUARANTINE with the reason; a value
that cannot be used (an absurd price) becomes null and is counted by the audit as missing.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from recsys_ray.config import Config
from recsys_ray.ids import row_ids
from recsys_ray.schema import PRODUCT, QUARANTINE, REVIEW

# What pass 2 of the preparation adds is missing in these two.
_ADDED = ("variant_ids", "group_id", "cold", "summary", "split", "keywords")
CLEAN_PRODUCT = pa.schema([*(field for field in PRODUCT if field.name not in _ADDED), pa.field("_source", pa.string())])
CLEAN_REVIEW = pa.schema([*(field for field in REVIEW if field.name not in _ADDED), pa.field("_source", pa.string())])

_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,400}>|<!--.{0,2000}?-->", re.DOTALL)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
_MARKUP = re.compile("[<&]")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f\u200b\u2060\ufeff\ud800-\udfff]")  # the others are spaces, or mojibake
_C1 = re.compile(r"[\x80-\x84\x86-\x9f]")               # what mojibake has left behind
_WIDE = re.compile(r"[\u0132\u0133\u0149\u01f1-\u01f3\u01c4-\u01cc\ufb00-\ufb06\uff01-\uffef]")  # ligatures, full width
_NUMBER = re.compile(r"\d{1,3}(?:['\u00a0\u202f ]\d{3})+(?!\d)(?:[.,]\d+)?|\d[\d.,]*")
_NEGATIVE = re.compile(r"\D*[-\u2212]\s*\d")
MAX_ROUNDS = 8          # of repairs; a shop's text needs one, seldom two
QUARANTINED_CHARS = 2000


class CleaningConfig(Config):
    """Limits of what is believed."""

    max_price: float = Field(default=100_000, gt=0)     # in units of the currency; above it a price is a mistake
    max_text_chars: int = Field(default=50_000, ge=100)  # of one field; the rest is cut
    earliest: str = "1990-01-01"                        # reviews before or long after today have a broken clock
    latest: str = "2100-01-01"


def clean_text(text: str | None, max_chars: int = 50_000) -> str | None:
    """`text` on one line without markup, mojibake, control characters or lone surrogates; None if nothing is left.

    Unicode is normalised to NFC, so that equal texts are equal strings; a clean text stays as it is.
    """
    if text is None:
        return None
    if not _is_plain(text):
        text = _repair(text[: 4 * max_chars])
    if len(text) > max_chars:
        text = text[:max_chars].rstrip()
    return text or None


def clean_query(text: str) -> str:
    """The query under the same normalisation as the products' texts, on one line."""
    return " ".join((clean_text(text) or "").split())


def _is_plain(text: str) -> bool:
    """Whether this is one trimmed line of ASCII without anything like markup: most texts, and quick to see."""
    return (text.isascii() and text.isprintable() and "<" not in text and "&" not in text and "  " not in text
            and text[:1] != " " and text[-1:] != " ")


def _repair(text: str) -> str:
    """Rounds of repairs until one changes nothing: what one repair uncovers may need another."""
    for _ in range(MAX_ROUNDS):
        before = text
        text = _repair_once(text)
        if text == before or _is_plain(text):
            return text
    return " ".join(_CONTROL.sub("", _MARKUP.sub(" ", text)).split())    # markup that deep means nothing


def _repair_once(text: str) -> str:
    if not text.isprintable():
        text = _CONTROL.sub("", text)
    if "&" in text:
        text = _ENTITY.sub(lambda found: html.unescape(found.group()), text)
    if "<" in text:
        text = _TAG.sub(" ", text)
    if not text.isascii():
        text = _repair_letters(unicodedata.normalize("NFC", text))
    return " ".join(text.split())


def _repair_letters(text: str) -> str:
    """`text` in the letters that were meant: mojibake decoded, curly quotes straight, wide letters narrow."""
    import ftfy

    straight: str = ftfy.fixes.uncurl_quotes(text)
    if straight.isascii():      # curly quotes were all
        return straight
    if ftfy.badness.is_bad(text):
        straight = ftfy.fixes.uncurl_quotes(ftfy.fix_encoding(text))
    text = _C1.sub("", straight)
    if _WIDE.search(text):
        text = ftfy.fixes.fix_latin_ligatures(ftfy.fixes.fix_character_width(text))
    return unicodedata.normalize("NFC", text)


def parse_price_cents(price: str | None, max_price: float = 100_000) -> int | None:
    """Cents of the first number in `price`; None when there is none, it is not positive or above `max_price`.

    Understands "$1,299.00", "12,99 EUR", "1.299,00", "from 5.99" and plain numbers.
    """
    if price is None or _NEGATIVE.match(price):
        return None
    try:
        value: float | None = float(price)      # most are plain, and 1e-05 is nothing but plain
    except ValueError:
        found = _NUMBER.search(price)
        value = _decimal(re.sub(r"['\u00a0\u202f ]", "", found.group()).rstrip(".,")) if found else None
    if value is None or not 0 < value <= max_price:
        return None
    return max(1, round(value * 100))


def _decimal(number: str) -> float | None:
    comma, point = number.rfind(","), number.rfind(".")
    if comma >= 0 and point >= 0:       # the last sign divides the decimals
        thousands, decimal = (",", ".") if point > comma else (".", ",")
        number = number.replace(thousands, "").replace(decimal, ".")
    elif comma >= 0:                    # a lone comma before three digits divides thousands
        whole = number.count(",") > 1 or len(number) - comma == 4
        number = number.replace(",", "" if whole else ".")
    elif number.count(".") > 1:
        number = number.replace(".", "")
    try:
        return float(number)
    except ValueError:
        return None


def parse_time_ms(text: str | None) -> int | None:
    """Milliseconds since 1970 (UTC) of an epoch in s or ms, an ISO 8601 text or "June 3, 2019"; None if neither.

    What is not said is the first: 2019 is 1 January 2019. A text without a year is no date.
    """
    if not text or not text.strip():
        return None
    text = text.strip()
    if re.fullmatch(r"\d{9,10}(\.\d+)?", text):
        return int(float(text) * 1000)
    if re.fullmatch(r"\d{12,13}", text):
        return int(text)
    from dateutil import parser

    try:
        moment, other = (parser.parse(text, default=datetime(year, 1, 1, tzinfo=UTC)) for year in (2000, 2004))
        return int(moment.timestamp() * 1000) if moment.year == other.year else None
    except (ValueError, OverflowError, ArithmeticError):
        return None


def clean_products(raw: pa.Table, config: CleaningConfig) -> tuple[pa.Table, pa.Table]:
    """(CLEAN_PRODUCT rows, QUARANTINE rows) of a block of RAW_PRODUCT with `_error` and `_source`."""
    nameless = pc.is_null(_trimmed(raw["product_id"]))
    read, set_aside = _divide(raw, [("no product id", nameless)], "products", "product_id")
    fix = _cleaner(config.max_text_chars)
    ids = _trimmed(read["product_id"]).to_pylist()
    categories = [_texts(value, fix) for value in read["categories"].to_pylist()]
    clean = pa.table({
        "row_id": pa.array(row_ids(ids)), "product_id": pa.array(ids, pa.string()),
        **{name: _mapped(read[name], fix) for name in ("title", "description", "brand", "color", "ingredients")},
        "features": pa.array([_texts(value, fix) for value in read["features"].to_pylist()], pa.list_(pa.string())),
        "categories": pa.array(categories, pa.list_(pa.string())),
        "category": pa.array([value[0] if value else None for value in categories], pa.string()),
        "attributes": pa.array([_pairs(value, fix) for value in read["attributes"].to_pylist()],
                               PRODUCT.field("attributes").type),
        "price_cents": pa.array([parse_price_cents(value, config.max_price) for value in read["price"].to_pylist()],
                                pa.int64()),
        "released_ms": pa.array([parse_time_ms(value) for value in read["released"].to_pylist()], pa.int64()),
        "image_urls": read["image_urls"], "_source": read["_source"],
    }).select(CLEAN_PRODUCT.names).cast(CLEAN_PRODUCT)
    speechless = pc.and_(pc.and_(pc.is_null(clean["title"]), pc.is_null(clean["description"])),
                         pc.and_(_empty(clean["features"]), pc.is_null(clean["ingredients"])))
    usable, without_text = _divide(clean, [("no text", speechless)], "products", "product_id")
    return usable, pa.concat_tables([set_aside, without_text])


def clean_reviews(raw: pa.Table, config: CleaningConfig) -> tuple[pa.Table, pa.Table]:
    """(CLEAN_REVIEW rows, QUARANTINE rows) of a block of RAW_REVIEW with `_error` and `_source`."""
    bounds = [parse_time_ms(config.earliest), parse_time_ms(config.latest)]
    time = raw["timestamp_ms"]
    impossible = pc.fill_null(pc.or_(pc.less(time, bounds[0]), pc.greater(time, bounds[1])), False)
    read, set_aside = _divide(raw, [
        ("no product id", pc.is_null(_trimmed(raw["product_id"]))), ("no timestamp", pc.is_null(time)),
        ("impossible timestamp", impossible)], "reviews", "review_id")
    fix = _cleaner(config.max_text_chars)
    ids = _trimmed(read["product_id"]).to_pylist()
    clean = pa.table({
        "review_id": read["review_id"], "row_id": pa.array(row_ids(ids)), "product_id": pa.array(ids, pa.string()),
        "title": _mapped(read["title"], fix), "text": _mapped(read["text"], fix),
        **{name: read[name] for name in ("variant_id", "user_id", "rating", "timestamp_ms", "verified",
                                         "helpful_votes", "_source")},
    }).select(CLEAN_REVIEW.names).cast(CLEAN_REVIEW)
    silent = pc.and_(pc.is_null(clean["title"]), pc.is_null(clean["text"]))
    usable, without_text = _divide(clean, [("no text", silent)], "reviews", "review_id")
    return usable, pa.concat_tables([set_aside, without_text])


def quarantine(rows: pa.Table, table: str, key: str, reasons: Sequence[str]) -> pa.Table:
    """QUARANTINE rows for `rows`, one reason each."""
    sources = rows["_source"].to_pylist() if "_source" in rows.column_names else [None] * rows.num_rows
    return pa.table({
        "table": pa.array([table] * rows.num_rows, pa.string()), "source": pa.array(sources, pa.string()),
        "key": rows[key].cast(pa.string()) if key in rows.column_names else pa.nulls(rows.num_rows, pa.string()),
        "reason": pa.array(reasons, pa.string()),
        "row": pa.array([json.dumps(_shown(row), ensure_ascii=False, default=str)[:QUARANTINED_CHARS]
                         for row in rows.to_pylist()], pa.string()),
    }).cast(QUARANTINE)


def _divide(rows: pa.Table, checks: Sequence[tuple[str, pa.ChunkedArray]], table: str,
            key: str) -> tuple[pa.Table, pa.Table]:
    """Rows that pass, and the others in quarantine under the first check they fail (`_error` before all)."""
    reasons = rows["_error"] if "_error" in rows.column_names else pa.nulls(rows.num_rows, pa.string())
    reasons = reasons.cast(pa.string())
    for reason, failed in checks:
        reasons = pc.if_else(pc.and_(pc.is_null(reasons), failed), pa.scalar(reason), reasons)
    good = pc.is_null(reasons)
    bad = rows.filter(pc.invert(good))
    return rows.filter(good), quarantine(bad, table, key, pc.drop_null(reasons).to_pylist())


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None and not name.startswith("_")}


def _cleaner(max_chars: int) -> Callable[[str | None], str | None]:
    return lambda text: clean_text(text, max_chars)


def _mapped(column: pa.ChunkedArray, fix: Callable[[str | None], str | None]) -> pa.Array:
    return pa.array(map(fix, column.to_pylist()), pa.string())


def _trimmed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    trimmed = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, pa.string()), trimmed)


def _empty(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.equal(pc.fill_null(pc.list_value_length(column), 0), 0)


def _texts(values: Iterable[str | None] | None, fix: Callable[[str | None], str | None]) -> list[str]:
    return [text for text in map(fix, values or ()) if text]


def _pairs(values: Iterable[tuple[str, str]] | None,
           fix: Callable[[str | None], str | None]) -> list[tuple[str, str]]:
    pairs = ((fix(name), fix(value)) for name, value in values or ())
    return [(name, value) for name, value in pairs if name and value]
