"""Cleaning: what a text, a price and a date become, and where rows go that cannot be used."""

from __future__ import annotations

import json
import unicodedata
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_ray.data.preprocess import (
    CleaningConfig,
    clean_products,
    clean_query,
    clean_reviews,
    clean_text,
    parse_price_cents,
    parse_time_ms,
)
from recsys_ray.data.sources.blocks import block_schema
from recsys_ray.schema import RAW_PRODUCT, RAW_REVIEW

CONFIG = CleaningConfig()
DIRT = st.lists(st.one_of(
    st.text(max_size=6), st.characters(categories=["Cs", "Cc", "Cf", "Zs"]),
    st.sampled_from(["<b>", "</", "<!--", "-->", ">", "&amp;", "&lt;", "&#60;", "&#0;", "&#xD800;", "amp;", "lt;", "&",
                     "Ã©", "â€™", "â\x80\x99", "\u2019", "ﬁ", "＜", "＆", "e\u0301", "  ", "\x85", "\x1c", "\u200b"]),
), max_size=12).map("".join)


def utc_ms(*when: int) -> int:
    return int(datetime(*when, tzinfo=UTC).timestamp() * 1000)  # type: ignore[misc,arg-type]


def products(*rows: dict[str, object]) -> pa.Table:
    return pa.Table.from_pylist([dict(row) for row in rows], schema=block_schema(RAW_PRODUCT))


def reviews(*rows: dict[str, object]) -> pa.Table:
    return pa.Table.from_pylist([dict(row) for row in rows], schema=block_schema(RAW_REVIEW))


@pytest.mark.parametrize(("dirty", "clean"), [
    ("Plain title, 5 < 6 & 7 > 3", "Plain title, 5 < 6 & 7 > 3"),
    ("Great!<br />Really <b>great</b>", "Great! Really great"),
    ("salt &amp; pepper &#39;set&#39;", "salt & pepper 'set'"),
    ("&amp;lt;b&amp;gt;bold", "bold"),                      # escaped twice
    ("AT&T and R&LTD", "AT&T and R&LTD"),                   # no semicolon, no entity
    ("CafÃ© doesnâ€™t", "Café doesn't"),                    # UTF-8 read as Windows-1252
    ("\u201cI\u2019m\u201d", '"I\'m"'),
    ("e\u0301", "é"),
    ("a\x00b\ud800c\u200bd\x81", "abcd"),
    ("one\n\ttwo \u00a0 three\x1cfour", "one two three four"),
    ("＜b＞wide＜/b＞", "wide"),
    ("<!-- note -->", None), ("  \n ", None), ("", None), (None, None),
])
def test_a_text_becomes_one_clean_line(dirty: str | None, clean: str | None) -> None:
    assert clean_text(dirty) == clean


@given(DIRT)
def test_cleaning_twice_changes_nothing(dirty: str) -> None:
    once = clean_text(dirty)
    assert clean_text(once) == once


@given(DIRT)
def test_no_control_characters_surrogates_or_spare_spaces_are_left(dirty: str) -> None:
    clean = clean_text(dirty) or ""
    assert not {unicodedata.category(letter) for letter in clean} & {"Cc", "Cs", "Zl", "Zp"}
    assert clean == " ".join(clean.split())
    clean.encode("utf-8")


@given(DIRT)
def test_composed_and_decomposed_texts_are_equal(dirty: str) -> None:
    assert clean_text(unicodedata.normalize("NFC", dirty)) == clean_text(unicodedata.normalize("NFD", dirty))


@given(st.text(alphabet="ab <>&;", max_size=60), st.integers(1, 20))
def test_a_cut_text_has_at_most_its_length_and_no_loose_end(dirty: str, limit: int) -> None:
    clean = clean_text(dirty, limit) or ""
    assert len(clean) <= limit
    assert clean == clean.strip()


def test_markup_nested_without_end_is_given_up() -> None:
    assert clean_text("&" + "amp;" * 1000 + "lt;") == "amp;" * (1000 - 8) + "lt;"


@pytest.mark.parametrize(("price", "cents"), [
    ("12.99", 1299), ("$1,299.00", 129_900), ("12,99 EUR", 1299), ("1.299,00 €", 129_900), ("from 5.99", 599),
    ("5.99 - 9.99", 599), ("1 299,50", 129_950), ("1\u00a0299", 129_900), ("1'299.50", 129_950), ("1,299", 129_900),
    ("1,299,000", None), ("19.99 200 ml", 1999), ("12.", 1200), ("0.001", 1), ("1e-05", 1), ("99999.99", 9_999_999),
    ("0", None), ("-5.00", None), ("\u22125", None), ("$-5", None), ("free", None), ("", None), (None, None),
    ("nan", None), ("inf", None), ("1e16", None), ("9" * 400, None), ("100000.01", None),
])
def test_prices_become_cents(price: str | None, cents: int | None) -> None:
    assert parse_price_cents(price) == cents


@given(st.text(max_size=30))
def test_any_price_is_null_or_within_the_limit(price: str) -> None:
    cents = parse_price_cents(price, max_price=500)
    assert cents is None or 1 <= cents <= 50_000


@pytest.mark.parametrize(("text", "moment"), [
    ("1588687728", utc_ms(2020, 5, 5, 14, 8, 48)), ("1588687728923", 1_588_687_728_923),
    ("2019-06-03", utc_ms(2019, 6, 3)), ("2019-06-03T10:00:00+02:00", utc_ms(2019, 6, 3, 8)),
    ("June 3, 2019", utc_ms(2019, 6, 3)), ("3 Jun 2019", utc_ms(2019, 6, 3)), ("20190603", utc_ms(2019, 6, 3)),
    ("2019", utc_ms(2019, 1, 1)), ("1595", utc_ms(1595, 1, 1)), (" 2019-06 ", utc_ms(2019, 6, 1)),
    ("Monday", None), ("5", None), ("10:30", None), ("soon", None), ("2019-13-45", None), ("", None), (None, None),
])
def test_dates_become_milliseconds(text: str | None, moment: int | None) -> None:
    assert parse_time_ms(text) == moment


@pytest.mark.filterwarnings("ignore")
@given(st.text(alphabet="0123456789-:./ +TZaepmJunMon", max_size=24))
def test_no_date_is_an_error(text: str) -> None:
    assert isinstance(parse_time_ms(text), int | None)


def test_a_product_is_cleaned_field_by_field() -> None:
    clean, bad = clean_products(products({
        "product_id": " B01 ", "title": "Mug<br>", "description": "Holds 300&nbsp;ml", "features": ["blue ", "", None],
        "brand": "Ac\u0301me", "categories": ["Home", "Mugs"], "attributes": [("Material", "clay"), ("Empty", " ")],
        "price": "$12.50", "released": "June 3, 2019", "image_urls": ["https://x/1.jpg"], "_source": "meta.jsonl:1",
    }), CONFIG)
    (row,) = clean.to_pylist()
    assert bad.num_rows == 0
    assert {name: row[name] for name in ("product_id", "title", "description", "features", "brand", "category",
                                         "attributes", "price_cents", "released_ms")} == {
        "product_id": "B01", "title": "Mug", "description": "Holds 300 ml", "features": ["blue"], "brand": "Aćme",
        "category": "Home", "attributes": [("Material", "clay")], "price_cents": 1250,
        "released_ms": utc_ms(2019, 6, 3)}


def test_unusable_products_are_set_aside_with_place_and_reason() -> None:
    clean, bad = clean_products(products(
        {"product_id": "B01", "title": "kept", "_source": "meta.jsonl:1"},
        {"product_id": "  ", "title": "nameless", "_source": "meta.jsonl:2"},
        {"product_id": "B03", "title": "<br>", "features": [" "], "_source": "meta.jsonl:3"},
        {"_error": "not JSON: {", "_source": "meta.jsonl:4"}), CONFIG)
    assert clean["product_id"].to_pylist() == ["B01"]
    found = {row["source"]: (row["table"], row["key"], row["reason"]) for row in bad.to_pylist()}
    assert found == {"meta.jsonl:2": ("products", "  ", "no product id"),
                     "meta.jsonl:3": ("products", "B03", "no text"),
                     "meta.jsonl:4": ("products", None, "not JSON: {")}
    shown = next(row["row"] for row in bad.to_pylist() if row["source"] == "meta.jsonl:2")
    assert json.loads(shown) == {"product_id": "  ", "title": "nameless"}


def test_unusable_reviews_are_set_aside_with_place_and_reason() -> None:
    good = {"product_id": "B01", "text": "fine", "timestamp_ms": 1_500_000_000_000}
    clean, bad = clean_reviews(reviews(*({**good, **change, "review_id": f"r{at}", "_source": f"r.jsonl:{at}"}
                                         for at, change in enumerate([
        {}, {"product_id": None}, {"timestamp_ms": None}, {"timestamp_ms": 5}, {"timestamp_ms": 2**60},
        {"text": "<p></p>"}, {"text": None, "title": "Nice"}, {"_error": "broken", "product_id": None}]))), CONFIG)
    assert clean["review_id"].to_pylist() == ["r0", "r6"]
    assert {row["source"]: row["reason"] for row in bad.to_pylist()} == {
        "r.jsonl:1": "no product id", "r.jsonl:2": "no timestamp", "r.jsonl:3": "impossible timestamp",
        "r.jsonl:4": "impossible timestamp", "r.jsonl:5": "no text", "r.jsonl:7": "broken"}


@given(st.lists(st.fixed_dictionaries({
    "product_id": st.sampled_from(["a", " ", None]), "title": st.sampled_from(["t", "<b>", None]),
    "_error": st.sampled_from([None, None, "bad"])}), max_size=12))
def test_every_product_is_kept_or_set_aside(rows: list[dict[str, object]]) -> None:
    clean, bad = clean_products(products(*rows), CONFIG)
    assert clean.num_rows + bad.num_rows == len(rows)
    assert bad["reason"].null_count == 0


def test_queries_are_cleaned_like_products() -> None:
    assert clean_query("  r&eacute;d\n dress\t ") == clean_query("réd dress")
    assert clean_query("<b></b>") == ""
