"""The demo shop's files: format, sizes, determinism, dirt, skew, and the agreement of truth and public files."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from recsys_ray.config import ConfigError, load_config
from recsys_ray.data.demo_shop import DemoShopConfig, DemoShopError, generator_hash, make_demo_shop
from recsys_ray.data.demo_shop.truth import TABLES
from recsys_ray.data.sources.adapters import amazon_review
from recsys_ray.data.sources.blocks import review_id
from recsys_ray.schema import IMAGE

SMALL: dict[str, Any] = {"products": 600, "reviews": 4000, "queries": 60, "image_products": 40, "image_side": 40}


def lines(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return stream.read().splitlines()


def readable(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in lines(path):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def digests(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo_shop(DemoShopConfig(output=tmp_path_factory.mktemp("shop") / "shop", **SMALL))


def truth(shop: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(shop / "truth" / f"{name}.parquet").to_pylist()


def test_the_same_configuration_gives_the_same_bytes(shop: Path, tmp_path: Path) -> None:
    again = make_demo_shop(DemoShopConfig(output=tmp_path / "again", **SMALL))
    assert digests(again) == digests(shop)
    other = make_demo_shop(DemoShopConfig(output=tmp_path / "other", seed=8, **SMALL))
    assert digests(other)["public/Demo_Shop.jsonl.gz"] != digests(shop)["public/Demo_Shop.jsonl.gz"]


def test_a_finished_shop_is_reused_and_a_changed_one_replaced(tmp_path: Path) -> None:
    config = DemoShopConfig(output=tmp_path / "shop", **{**SMALL, "image_products": 0})
    make_demo_shop(config)
    before = (tmp_path / "shop" / "public" / "shop.json").stat().st_mtime_ns
    make_demo_shop(config)
    assert (tmp_path / "shop" / "public" / "shop.json").stat().st_mtime_ns == before
    make_demo_shop(config.replace(seed=9))
    document = json.loads((tmp_path / "shop" / "public" / "shop.json").read_text())
    assert document["config"]["seed"] == 9
    assert document["generator_hash"] == generator_hash()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["shop"]


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not lose me")
    with pytest.raises(DemoShopError, match="no demo shop"):
        make_demo_shop(DemoShopConfig(output=tmp_path, **SMALL))
    assert (tmp_path / "thesis.txt").read_text() == "do not lose me"


def test_the_lines_have_the_fields_of_amazon_reviews_2023(shop: Path) -> None:
    product = readable(shop / "public/meta_Demo_Shop.jsonl.gz")[0]
    review = readable(shop / "public/Demo_Shop.jsonl.gz")[0]
    assert set(product) == {"main_category", "title", "average_rating", "rating_number", "features", "description",
                            "price", "images", "videos", "store", "categories", "details", "parent_asin",
                            "bought_together"}
    assert set(review) == {"rating", "title", "text", "images", "asin", "parent_asin", "user_id", "timestamp",
                           "helpful_vote", "verified_purchase"}
    assert 1 <= review["rating"] <= 5
    assert 1.3e12 < review["timestamp"] < 1.7e12


def test_truth_names_every_review_as_its_reader_will(shop: Path) -> None:
    known = {row["review_id"] for row in truth(shop, "reviews")}
    assert len(known) == SMALL["reviews"]
    read = {review_id(amazon_review(record)) for record in readable(shop / "public/Demo_Shop.jsonl.gz")
            if record["parent_asin"] and 1.3e12 < record["timestamp"] < 1.7e12}
    assert read == known


def test_every_truth_table_is_there_and_keys_agree(shop: Path) -> None:
    assert {path.stem for path in (shop / "truth").glob("*.parquet")} == set(TABLES)
    listed = {record["parent_asin"] for record in readable(shop / "public/meta_Demo_Shop.jsonl.gz")} - {None, "", "  "}
    planted = {row["product_id"] for row in truth(shop, "products")}
    assert planted == listed
    assert {row["product_id"] for row in truth(shop, "judgments")} <= planted
    assert {row["query_id"] for row in truth(shop, "judgments")} == {row["query_id"] for row in truth(shop, "queries")}
    assert {row["user_id"] for row in truth(shop, "reviews")} <= {row["user_id"] for row in truth(shop, "users")}


def test_one_product_has_a_tenth_of_the_reviews_and_the_rest_a_long_tail(shop: Path) -> None:
    counts = sorted(Counter(row["product_id"] for row in truth(shop, "reviews")).values(), reverse=True)
    assert counts[0] / SMALL["reviews"] == pytest.approx(0.10, abs=0.03)
    assert counts[1] < counts[0] / 2
    assert np.median(counts) <= 0.6 * np.mean(counts)
    assert len(counts) > 0.85 * SMALL["products"]


def test_cold_products_are_first_reviewed_after_the_training_time(shop: Path) -> None:
    reviews, products = truth(shop, "reviews"), truth(shop, "products")
    cut = np.quantile([row["timestamp_ms"] for row in reviews], 0.8)
    first: dict[str, int] = {}
    for row in reviews:
        first[row["product_id"]] = min(first.get(row["product_id"], 1 << 62), row["timestamp_ms"])
    cold = {row["product_id"] for row in products if row["cold"]}
    assert 0.03 < len(cold) / len(products) < 0.25
    day = 86_400_000
    for name, when in first.items():
        if abs(when - cut) > 5 * day:      # the cut is known to a 65,536th of the time
            assert (when > cut) == (name in cold)


def test_every_kind_of_dirt_is_planted_and_counted(tmp_path: Path) -> None:
    shop = make_demo_shop(DemoShopConfig(output=tmp_path / "shop", change={"dirty": 0.2},
                                         **{**SMALL, "image_products": 0}))
    kinds = Counter((row["table"], row["kind"]) for row in truth(shop, "dirty"))
    raw = lines(shop / "public/meta_Demo_Shop.jsonl.gz")
    records = readable(shop / "public/meta_Demo_Shop.jsonl.gz")
    extra = sum(kinds["products", kind] for kind in ("repeated id", "broken line", "missing id"))
    assert len(raw) == SMALL["products"] + extra
    assert len(raw) - len(records) == kinds["products", "broken line"] > 0
    assert sum(not (record["parent_asin"] or "").strip() for record in records) == kinds["products", "missing id"] > 0
    assert sum(not (record["title"] or "").strip() for record in records) == kinds["products", "missing title"] > 0
    assert sum("\u00c3" in (record["title"] or "") or "\u00e2" in (record["title"] or "") for record in records) > 0
    assert sum("<p>" in "".join(record["description"]) for record in records) == kinds["products", "html"] > 0
    reviews = readable(shop / "public/Demo_Shop.jsonl.gz")
    assert sum(not (record["text"] or "").strip() for record in reviews) == kinds["reviews", "empty"] > 0
    assert all(kinds["reviews", kind] for kind in ("repeated", "broken line", "missing id", "impossible time"))


def test_field_coverage_follows_the_preset(tmp_path: Path) -> None:
    shop = make_demo_shop(DemoShopConfig(output=tmp_path / "shop", products=3000, reviews=3000, queries=0,
                                         change={"dirty": 0}))
    records = readable(shop / "public/meta_Demo_Shop.jsonl.gz")
    for name, share in {"price": 0.157, "features": 0.154, "description": 0.17, "store": 0.899}.items():
        assert np.mean([bool(record[name]) for record in records]) == pytest.approx(share, abs=0.03), name


def test_repeated_listings_share_what_the_product_is_under_another_id(shop: Path) -> None:
    rows = {row["product_id"]: row for row in truth(shop, "products")}
    copies = [row for row in rows.values() if row["duplicate_group"] != row["product_id"]]
    assert len(copies) >= 5
    for row in copies:
        original = rows[row["duplicate_group"]]
        assert original["duplicate_group"] == original["product_id"]
        for name in ("kind", "attributes", "helps", "line"):
            assert row[name] == original[name]


def test_images_are_small_decodable_pictures_of_listed_products(shop: Path) -> None:
    table = pq.read_table(shop / "public/images")
    assert table.schema.equals(IMAGE, check_metadata=False)
    assert table.num_rows == SMALL["image_products"]
    for data in table["data"].to_pylist():
        assert Image.open(io.BytesIO(data)).size == (40, 40)
    records = readable(shop / "public/meta_Demo_Shop.jsonl.gz")
    named = {image["large"] for record in records for image in record["images"]}
    assert {f"images/{one}" for one in table["image_id"].to_pylist()} == named
    visible = pc.sum(pq.read_table(shop / "truth/products.parquet")["visible"]).as_py()
    assert visible == SMALL["image_products"]


@pytest.mark.parametrize("override", ["products=10", "mode=semi_synthetic", "change.taste=-1", "preset=fantastic"])
def test_impossible_configurations_are_refused_before_any_work(override: str) -> None:
    with pytest.raises(ConfigError):
        load_config(DemoShopConfig, None, ["output=somewhere", override])


def test_missing_real_texts_are_named(tmp_path: Path) -> None:
    config = DemoShopConfig(output=tmp_path / "shop", mode="semi_synthetic",
                            texts={"family": "esci", "path": tmp_path / "nowhere"})
    with pytest.raises(DemoShopError, match="nowhere"):
        make_demo_shop(config)
