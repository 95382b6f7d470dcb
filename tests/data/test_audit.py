"""The audit's figures: counts that add up, shares of fields, drift."""

from __future__ import annotations

from math import log

import pyarrow as pa
import pytest

from recsys_ray.data.audit import (
    audit_table,
    category_counts,
    field_counts,
    merged,
    review_counts,
    stability_index,
    unused_values,
)
from recsys_ray.schema import AUDIT, PRODUCT, REVIEW

PRODUCTS = pa.Table.from_pylist([
    {"row_id": 1, "product_id": "a", "group_id": 1, "title": "Mug", "features": ["x"], "attributes": [("k", "v")],
     "price_cents": 5},
    {"row_id": 2, "product_id": "b", "group_id": 2, "title": "Cup", "features": [], "attributes": []},
    {"row_id": 3, "product_id": "c", "group_id": 3},
], schema=PRODUCT)


def reviews(*rows: tuple[str, float | None, str | None, bool]) -> pa.Table:
    return pa.Table.from_pylist([
        {"review_id": str(at), "row_id": 1, "product_id": "a", "timestamp_ms": 1, "split": split, "rating": rating,
         "text": text, "cold": cold} for at, (split, rating, text, cold) in enumerate(rows)], schema=REVIEW)


def test_fields_that_are_empty_are_missing() -> None:
    counts = field_counts(PRODUCTS)
    assert {name: counts["fields", name] for name in ("title", "features", "attributes", "price_cents", "brand")} == {
        "title": 2, "features": 1, "attributes": 1, "price_cents": 1, "brand": 0}
    assert set(field_counts(PRODUCTS.slice(0, 0)).values()) == {0}


def test_reviews_are_counted_by_split_rating_and_length() -> None:
    counts = review_counts(reviews(("train", 5.0, "x" * 19, False), ("train", None, None, True),
                                   ("test", 4.0, "x" * 20, True)))
    assert counts["splits", "train"] == 2
    assert counts["splits", "train, of cold products"] == 1
    assert counts["splits", "valid"] == 0
    assert counts["length", "train/0"] == 2     # 0 and 19 characters
    assert counts["length", "test/1"] == 1      # 20 belongs to the next bin
    assert counts["rating", "train/5"] == counts["rating", "train/0"] == counts["rating", "test/4"] == 1


def test_stability_index_by_hand() -> None:
    # (3, 0) and (0, 3) with half a count in each: p = 7/8, 1/8 and q the other way: 2 * 6/8 * ln 7
    assert stability_index({"a": 3}, {"b": 3}) == pytest.approx(1.5 * log(7))
    assert stability_index({"a": 4, "b": 2}, {"a": 4, "b": 2}) == 0
    assert stability_index({}, {"a": 1}) is None


def test_table_has_shares_counts_and_drift() -> None:
    two = reviews(("train", 5.0, "a", False), ("valid", 1.0, "a", False))
    counts = merged([field_counts(PRODUCTS), review_counts(two)])
    counts["rows", "products kept"] = 3
    counts["values", "prices not used"] = 2
    counts.update(category_counts(pa.chunked_array([["train", "train", "test"]]), pa.array(["Mugs", None, "Mugs"])))
    table = audit_table(counts, 3)
    assert table.schema == AUDIT
    rows = {(row["section"], row["name"]): row for row in table.to_pylist()}
    assert rows["fields", "title"]["value"] == pytest.approx(2 / 3)
    assert rows["rows", "products kept"]["note"] is None
    assert "absurd" in rows["values", "prices not used"]["note"]
    # Mugs and none: 1.5/3 each in train, 1.5/2 and .5/2 in test
    assert rows["drift", "review category, test"]["value"] == pytest.approx(.25 * log(1.5) - .25 * log(.5))
    assert not any(section == "category" for section, _ in rows)
    assert rows["drift", "review length, valid"]["value"] == 0
    assert rows["drift", "review rating, valid"]["value"] == pytest.approx(log(3))     # 1.5/2 and .5/2: 2 * .5 * ln 3
    assert ("drift", "review rating, test") not in rows        # no test reviews


def test_counts_of_buckets_add_up() -> None:
    counts = review_counts(reviews(("train", 5.0, "a", False)))
    assert merged([counts, counts])["splits", "train"] == 2


def test_values_that_were_given_and_not_used_are_counted_for_kept_rows_alone() -> None:
    raw = pa.table({"_source": ["f:1", "f:2", "f:3", "f:4", "f:5"], "price": ["$5", "0", "None", None, "-3"],
                    "released": ["2019", "week 3", "", None, "week 9"]})
    clean = pa.table({"_source": ["f:1", "f:2", "f:3", "f:4"], "price_cents": pa.array([500, None, None, None]),
                      "released_ms": pa.array([1, None, None, None])})     # f:5 was set aside
    assert unused_values(raw, clean) == {("values", "prices not used"): 1, ("values", "dates not used"): 1}
    assert set(unused_values(raw.slice(0, 0), clean.slice(0, 0)).values()) == {0}
