"""Filters against a row-by-row reading of what they mean."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from recsys_ray.config import ConfigError, load_config
from recsys_ray.retrieval.filters import FilterColumns, Filters

ROWS = pa.table({
    "category": pa.array(["sofa", None, "lamp", "sofa", "", "lamp"]),
    "brand": pa.array(["A", "B", None, "B", "A", "C"]),
    "price_cents": pa.array([100, None, 0, 2500, 99, None], pa.int64()),
    "addresses": pa.array([["acne"], None, [], ["age", "acne"], ["age"], None], pa.list_(pa.string())),
})


def passes(row: dict[str, Any], filters: Filters) -> bool:
    price, low, high = row["price_cents"], filters.price_min_cents, filters.price_max_cents
    return ((filters.category is None or row["category"] in filters.category)
            and (filters.brand is None or row["brand"] in filters.brand)
            and (filters.concern is None or bool({*filters.concern} & {*(row["addresses"] or ())}))
            and ((low is None and high is None) or (price is not None and (low or 0) <= price
                                                    and (high is None or price <= high))))


@pytest.mark.parametrize("values", [
    {}, {"category": ["sofa"]}, {"category": ["sofa", "lamp"]}, {"category": []}, {"category": ["unknown"]},
    {"category": [""]}, {"brand": ["B"], "category": ["sofa"]}, {"price_min_cents": 0}, {"price_max_cents": 100},
    {"price_min_cents": 100, "price_max_cents": 100}, {"price_min_cents": 10**30}, {"price_max_cents": 10**30},
    {"brand": ["A"], "price_max_cents": 99}, {"brand": ["\ud800"]},
    {"concern": ["acne"]}, {"concern": ["age", "acne"], "brand": ["A"]}, {"concern": []}, {"concern": ["redness"]},
], ids=str)
def test_the_mask_is_what_the_filter_says(values: dict[str, Any]) -> None:
    filters = Filters.model_validate(values)
    expected = [passes(row, filters) for row in ROWS.to_pylist()]
    assert FilterColumns(ROWS).mask(filters).tolist() == expected
    assert filters.pass_all == (values == {})


def test_a_missing_price_never_passes_a_price_filter() -> None:
    mask = FilterColumns(ROWS).mask(Filters(price_min_cents=0))
    assert mask.tolist() == [True, False, True, True, True, False]


@pytest.mark.parametrize(("values", "message"), [
    ({"brnad": ["A"]}, "did you mean 'brand'"), ({"price_min_cents": -1}, "price_min_cents"),
    ({"price_min_cents": 5, "price_max_cents": 4}, "larger than"), ({"category": "sofa"}, "category"),
    ({"price_max_cents": float("nan")}, "price_max_cents"),
])
def test_what_is_no_filter_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        load_config(Filters, None, [f"{key}={value}" for key, value in values.items()])


def test_no_rows_and_no_values() -> None:
    assert FilterColumns(ROWS.slice(0, 0)).mask(Filters(brand=("A",))).tolist() == []
    empty = ROWS.set_column(1, "brand", pa.nulls(6, pa.string()))
    assert not FilterColumns(empty).mask(Filters(brand=("A",))).any()
