"""The realism card: its figures on hand-made input, and the whole card on a small shop."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recsys_ray.data.demo_shop import DemoShopConfig, generator_hash, make_demo_shop
from recsys_ray.evaluation.realism import RealismConfig, card, title_overlap, write_card
from recsys_ray.evaluation.shop_figures import read_products, read_reviews, tail_exponent, weighted_quantile
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.retrieval.lexical import LexicalConfig


def test_the_exponent_of_a_power_law_is_found() -> None:
    counts = np.random.default_rng(1).zipf(2.3, 60_000)
    assert tail_exponent(counts.tolist()) == pytest.approx(2.3, abs=0.06)
    assert math.isnan(tail_exponent([1, 2, 3]))


def test_quantiles_of_counted_values() -> None:
    assert weighted_quantile(Counter({1: 5, 10: 4, 100: 1}), 0.5) == 1
    assert weighted_quantile(Counter({1: 5, 10: 4, 100: 1}), 0.9) == 10
    assert weighted_quantile(Counter({3: 1}), 0.5) == 3


def test_title_overlap_is_the_mean_share_of_the_query_terms() -> None:
    # "red", "shoe" (stemmed), without the stop word: the first title has both, the second one of two.
    assert title_overlap("the red shoes", ["Red leather shoe", "Blue shoes"], LexicalConfig()) == pytest.approx(0.75)
    assert title_overlap("the", ["Red"], LexicalConfig()) == 0.0


def test_coverage_counts_the_first_readable_line_of_each_product(tmp_path: Path) -> None:
    path = tmp_path / "meta.jsonl.gz"
    records = [{"parent_asin": "a", "title": "One", "price": 3.0, "features": [], "description": ["d"]},
               {"parent_asin": "a", "title": "again"}, {"parent_asin": None, "title": "x"},
               {"parent_asin": "b", "title": " ", "details": {"Ingredients": "Aqua"}}]
    with gzip.open(path, "wt") as stream:
        stream.write("\n".join(map(json.dumps, records)) + '\n{"parent_asin": "c", "tit')
    products = read_products(path)
    assert products.ids == ["a", "b"]
    assert products.bad_lines == 3
    coverage = products.coverage()
    assert (coverage["title"], coverage["price"], coverage["features"], coverage["ingredients"]) == (0.5, 0.5, 0, 0.5)


def test_the_sample_of_reviews_does_not_depend_on_their_order(tmp_path: Path) -> None:
    records = [{"parent_asin": f"p{at % 7}", "asin": f"p{at % 7}", "user_id": f"u{at}", "title": "t", "timestamp": at,
                "text": f"words number {at}"} for at in range(60)]
    samples = []
    for name, ordered in (("one", records), ("two", records[::-1])):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as stream:
            stream.write("\n".join(map(json.dumps, ordered)))
        reviews = read_reviews(tmp_path / f"{name}.jsonl.gz", 10)
        samples.append(reviews.sample)
        assert reviews.total == 60
        assert reviews.words == Counter({3: 60})
    assert samples[0] == samples[1]
    assert len(samples[0]) == 10


def test_the_card_sets_the_shop_beside_what_others_have() -> None:
    rows = card({"price": 0.15704, "nothing": math.nan}, {"all_beauty": {"price": 0.157}, "esci": {}})
    assert rows == [{"figure": "price", "demo_shop": 0.157, "all_beauty": 0.157, "esci": None},
                    {"figure": "nothing", "demo_shop": None, "all_beauty": None, "esci": None}]


def test_the_card_of_a_small_shop(tmp_path: Path, tiny_text_model: Callable[..., Path]) -> None:
    shop = make_demo_shop(DemoShopConfig(output=tmp_path / "shop", products=500, reviews=3000, queries=20))
    write_card(RealismConfig(shop=shop, output=tmp_path / "realism.json", sample=60,
                             encoder=TextEncoderConfig(model=str(tiny_text_model()))))
    document = json.loads((tmp_path / "realism.json").read_text())
    headline = document["headline"]
    assert document["tables"]["shop"]["generator_hash"] == generator_hash()
    assert document["seeds"] == [7]
    assert headline["products"] == 500
    assert headline["queries"] == 20
    assert headline["top_product_share"] == pytest.approx(0.1, abs=0.03)
    assert headline["generic_share"] == pytest.approx(0.28, abs=0.06)
    assert headline["bm25_recall100_answerable"] > headline["bm25_recall100"] > 100 / 500
    found = sum(headline[f"found_{name}"] for name in ("only_by_bm25", "only_by_dense", "by_both"))
    assert 0 < found <= 1
