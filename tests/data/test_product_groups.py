"""Which listings are views of one product, by what they share."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_ray.artifacts import stage
from recsys_ray.config import Config
from recsys_ray.data.attribute_audit import group_audit
from recsys_ray.data.attribute_data import LabelAttributesConfig, label_attributes, open_attributes
from recsys_ray.data.product_groups import GroupConfig, Groups, base_id, find_groups, group_keys, image_stem


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
    assert {image_stem(f"https://cdn.shop/{one}.jpg") for one in ("noimage", "image1", "photo_02", "IMG-123")} == {""}


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


def test_a_year_is_no_style_number() -> None:
    rows = [{"product_id": "x", "title": "Shirt, style: 2023"}, {"product_id": "y", "title": "Coat, style: 2023"}]
    assert group_keys(shop(rows))[0] == [None, None]


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


# --- whether groups hold together -----------------------------------------------------------------
def audited(kinds: list[str], size: int = 2) -> dict[str, Any]:
    """The audit of groups of `size` neighbours each."""
    count = len(kinds)
    groups = Groups([f"g{at // size}" for at in range(count)], [0.8] * count, ["image"] * count)
    rows = [{"category2": kind, "material": None, "pattern": None, "neckline": None, "sleeve": None} for kind in kinds]
    return group_audit(rows, groups)


def test_groups_that_agree_may_be_used_and_others_not() -> None:
    good = audited([kind for kind in ("dress", "coat", "tee", "skirt") * 10 for _ in range(2)])
    assert good["agreement"][0] | {"low": 0, "high": 0} == {
        "attribute": "category2", "groups": 40, "agree": 1.0, "low": 0, "high": 0, "chance": 0.25}
    assert good["advice"].startswith("Use them")
    assert good["by_source"][0]["agree"] == 1.0
    assert audited(["dress", "coat"] * 40)["advice"].startswith("Do not use them")
    assert audited(["dress", "dress", "coat", "coat"])["advice"].startswith("Too few")
    assert audited(["graphic"] * 80)["advice"].startswith("No group")       # graphic is no kind to agree in


class _Nothing(Config):
    pass


def test_names_of_pictures_join_listings_and_the_sample_shows_them(tmp_path: Path) -> None:
    table = pa.table({"product_id": ["a", "b", "c"], "title": ["Red dress", "@Blue dress", "Coat"]})
    pq.write_table(table, tmp_path / "shop.parquet")
    with stage(tmp_path / "images", "image_vectors", "v") as staging:
        staging.commit([staging.write_table("vectors/part-00000.parquet", pa.table({
            "image_id": ["shot4711_front", "shot4711_back", "shot4712"], "product_id": ["a", "b", "c"]}))],
            config=_Nothing())
    made = label_attributes(LabelAttributesConfig.model_validate({
        "products": {"path": str(tmp_path / "shop.parquet")}, "image_vectors": tmp_path / "images",
        "output": tmp_path / "out"}))
    assert open_attributes(tmp_path / "out")[1]["group_key"].to_pylist() == ["a", "a", None]
    sample = list(csv.DictReader(io.StringIO(made.file("groups.csv").read_text("utf-8"))))
    assert [(row["group_key"], row["found by"], row["title"]) for row in sample] == [
        ("a", "image", "Red dress"), ("a", "image", "'@Blue dress")]
    assert made.manifest.parents["images"].startswith("image_vectors/")
