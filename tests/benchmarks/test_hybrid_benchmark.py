"""What the hybrid benchmark asks: other pictures of the same things, judged by what can be seen of them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest

from recsys_ray.data.demo_shop import DemoShopConfig
from recsys_ray.data.demo_shop.catalogue import build_catalogue
from recsys_ray.data.demo_shop.images import draw
from recsys_ray.data.demo_shop.products import products
from recsys_ray.data.demo_shop.streams import uniforms


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return import_module("hybrid")


def test_a_photograph_shows_the_product_on_another_day(benchmark: ModuleType, tmp_path: Path) -> None:
    shop = DemoShopConfig(output=tmp_path, products=500, reviews=1000, image_products=5)
    numbers = np.arange(5)
    taken = benchmark.photographs(shop, numbers)
    catalogue = build_catalogue(shop)
    listed = [draw(product, shop.image_side, shop.clarity.image_noise, chance, shop.seed) for product, chance in zip(
        products(catalogue, numbers), uniforms(shop.seed, "images", numbers, 4), strict=True)]
    distance = np.array([[np.abs(one.astype(float) - other).mean() for other in listed] for one in taken])
    assert (np.argmin(distance, axis=1) == numbers).all()
    assert (np.diag(distance) > 1).all()


def test_likeness_is_by_kind_and_what_can_be_seen(benchmark: ModuleType) -> None:
    columns = {"product_id": list("abcdef"), "kind": ["gown", "gown", "gown", "frock", "gown", "gown"],
               "kind_group": ["dress"] * 6, "colour": ["red", "red", "red", "red", "blue", "blue"],
               "pattern": ["dots", "dots", "dots", "dots", "dots", "check"],
               "neckline": ["v", "v", "crew", "v", "crew", "crew"],
               "sleeve": ["cap", "long", "long", "cap", "cap", None]}
    found = benchmark.planted_likeness(pa.table(columns), np.array([0]), ["q"])
    gains = dict(zip(found["product_id"].to_pylist(), found["gain"].to_pylist(), strict=True))
    assert gains == {"a": 3, "b": 3, "c": 2, "d": 1, "e": 2}


def test_alpha_is_measured_on_other_queries_than_it_was_chosen_on(benchmark: ModuleType) -> None:
    alphas = (0.0, 0.5, 1.0)
    asked = benchmark.Asked(alphas)
    random = np.random.default_rng(0)
    values = random.random((3, 40))
    values[:, 3] = np.nan
    asked.add(values)
    systems, chosen = asked.systems(7)
    assert systems.shape == (39, 3)
    kept = values[:, ~np.isnan(values[0])]
    np.testing.assert_array_equal(systems[:, 0], kept[2])
    np.testing.assert_array_equal(systems[:, 1], kept[0])
    assert systems[:, 2].mean() < kept.max(axis=0).mean()
    assert set(chosen) <= set(alphas)


def test_words_beside_a_photograph_ask_for_what_it_does_not_show(benchmark: ModuleType, tmp_path: Path) -> None:
    shop = DemoShopConfig(output=tmp_path, products=500, reviews=1000)
    fashion = np.flatnonzero(build_catalogue(shop).department == 1)[:3]
    said = benchmark.words(shop, fashion, "occasion")
    assert all(" for " in one for one in said)
    columns = {"product_id": list("abc"), "kind": ["gown"] * 3, "kind_group": ["dress"] * 3, "colour": ["red"] * 3,
               "pattern": ["dots"] * 3, "neckline": ["v", "v", "v"], "sleeve": ["cap", "cap", "long"],
               "attributes": [[("occasion", one)] for one in ("gym", "gym", "office")]}
    found = benchmark.planted_likeness(pa.table(columns), np.array([0]), ["q"], "occasion")
    gains = dict(zip(found["product_id"].to_pylist(), found["gain"].to_pylist(), strict=True))
    assert gains == {"a": 3, "b": 3, "c": 1}
