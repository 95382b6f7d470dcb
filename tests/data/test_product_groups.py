"""Which listings are views of one product, by what they share."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from recsys_ray.data.product_groups import GroupConfig, base_id, find_groups, group_keys, image_stem


@pytest.mark.parametrize(("one", "base", "source"), [
    ("AB12_view1", "ab12", "id, named view"), ("AB12-front", "ab12", "id, named view"),
    ("AB12_A", "ab12", "id, letter or number"), ("AB12_03", "ab12", "id, letter or number"), ("AB12", "ab12", None),
])
def test_the_base_of_an_id(one: str, base: str, source: str | None) -> None:
    assert base_id(one) == (base, source)


def test_the_stem_of_an_address() -> None:
    same = {"https://cdn.shop/x/81kd9a2_front.jpg?w=300", "https://cdn.shop/y/81kd9a2_back-300x400.jpg", "81kd9a2.png",
            "https://m.media/I/81kd9a2._AC_SL1500_.jpg"}
    assert {image_stem(one) for one in same} == {"81kd9a2"}
    assert image_stem("https://cdn.shop/noimage.jpg") == ""


def shop(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([{"title": "Shirt", "brand": "B", **row} for row in rows])


@pytest.mark.parametrize(("rows", "confidence"), [
    ([{"product_id": "a1b_view1"}, {"product_id": "a1b_view2"}], 0.95),
    ([{"product_id": "a1b_A"}, {"product_id": "a1b_B"}], 0.7),
    ([{"product_id": "x", "attributes": [("Item model number", "K-77120")]},
      {"product_id": "y", "attributes": [("SKU", "k-77120")]}], 0.85),
    ([{"product_id": "x", "image_urls": ["http://a/img9001_front.jpg"]},
      {"product_id": "y", "image_urls": ["http://b/img9001_back.jpg"]}], 0.8),
    ([{"product_id": "x", "title": "Red shirt, Style no. KX2201"},
      {"product_id": "y", "title": "Blue shirt (style #kx2201)"}], 0.6),
    ([{"product_id": "x", "group_id": 5}, {"product_id": "y", "group_id": 5}], 0.5),
])
def test_what_two_listings_share_joins_them(rows: list[dict[str, Any]], confidence: float) -> None:
    keys, confidences = group_keys(shop([*rows, {"product_id": "other"}]))
    assert keys[0] == keys[1] == rows[0]["product_id"]
    assert confidences == [confidence, confidence, None]


def test_joins_are_transitive_and_pictures_help() -> None:
    """x and y share a base id, y and z a picture: one product, so one split."""
    products = shop([{"product_id": "k17_front"}, {"product_id": "k17_back"}, {"product_id": "z"}, {"product_id": "w"}])
    images = pa.table({"image_id": ["img9001_A", "img9001_B", "img777"], "product_id": ["k17_back", "z", "w"]})
    found = find_groups(products, images)
    assert found.keys == ["k17_back", "k17_back", "k17_back", None]
    assert found.sources == ["id, named view", "id, named view", "image", None]


def test_a_key_that_everybody_has_is_refused() -> None:
    rows = [{"product_id": f"p{number}x", "image_urls": ["http://a/soon2024.jpg"]} for number in range(30)]
    found = find_groups(shop(rows))
    assert found.refused == {"image": 1}
    assert set(found.keys) == {None}
    assert len(set(find_groups(shop(rows), config=GroupConfig(max_group=40)).keys)) == 1
