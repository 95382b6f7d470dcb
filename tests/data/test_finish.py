"""One bucket, finished without Ray: conflicts set aside, the leak check at work, a product with half of all reviews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_ray.data import buckets, finish
from recsys_ray.data.buckets import Part, scatter
from recsys_ray.data.finish import BucketJob, TextLimits, finish_bucket
from recsys_ray.data.preprocess import CLEAN_PRODUCT, CLEAN_REVIEW
from recsys_ray.data.product_text import ProductTextConfig
from recsys_ray.data.splits import LeakError
from recsys_ray.ids import row_id

TRAIN_END = 100
LETTERS = "abcdefghij"


def review(number: int, name: str, time: int, **change: Any) -> dict[str, Any]:
    word = "".join(LETTERS[int(digit)] for digit in f"{number:03d}")
    return {"review_id": f"r{number:03d}", "product_id": name, "row_id": row_id(name), "text": f"quite {word}word",
            "timestamp_ms": time, "rating": 4.0, "_source": f"r.jsonl:{number}", **change}


def part(rows: list[dict[str, Any]], schema: pa.Schema, directory: Path) -> list[Part]:
    table = pa.Table.from_pylist(rows, schema=schema)
    found = scatter(table, np.zeros(table.num_rows, np.int32), directory)
    return [found] if found else []


def job(root: Path, reviews: list[dict[str, Any]], *names: str, per_product: int = 50, blocks: int = 1) -> BucketJob:
    products = [{"product_id": name, "row_id": row_id(name), "title": f"Title {name}"} for name in names]
    parts = [one for at in range(blocks) for one in part(reviews[at::blocks], CLEAN_REVIEW, root / "reviews")]
    limits = TextLimits(ProductTextConfig(), per_product)
    catalogue = part(products, CLEAN_PRODUCT, root / "products")
    return BucketJob(str(root / "staging"), catalogue, parts, (TRAIN_END, 200), {}, limits)


def read(root: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(root / "staging" / name / "bucket-00000.parquet").to_pylist()


def test_reviews_that_contradict_each_other_under_one_id_are_set_aside(tmp_path: Path) -> None:
    rows = [review(1, "a", 5), review(1, "a", 5), review(1, "a", 5, text="something else", _source="r.jsonl:9"),
            review(2, "gone", 5)]
    result = finish_bucket(job(tmp_path, rows, "a"), 0)
    assert result.counts["rows", "reviews kept"] == 1
    assert result.counts["duplicates", "reviews, exact repetitions"] == 1
    assert {(row["source"], row["key"], row["reason"]) for row in read(tmp_path, "quarantine")} == {
        ("r.jsonl:9", "r001", "duplicate id"), ("r.jsonl:2", "r002", "unknown product")}


def test_later_reviews_feed_no_text_and_a_planted_leak_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [review(1, "a", 5), review(2, "a", 150), review(3, "a", 250)]
    finish_bucket(job(tmp_path / "clean", rows, "a"), 0)
    assert read(tmp_path / "clean", "product_text")[0]["keyword_review_ids"] == ["r001"]

    honest = finish._Reviews.keywords
    leak = [("r003", ["from the future"])]
    monkeypatch.setattr(finish._Reviews, "keywords", lambda self: {**honest(self), row_id("a"): leak})
    with pytest.raises(LeakError, match=r"bucket-00000.*r003"):
        finish_bucket(job(tmp_path / "leaky", rows, "a"), 0)


def test_cold_products_and_their_reviews_are_marked(tmp_path: Path) -> None:
    finish_bucket(job(tmp_path, [review(1, "a", TRAIN_END), review(2, "b", TRAIN_END + 1)], "a", "b", "c"), 0)
    assert {row["product_id"]: row["cold"] for row in read(tmp_path, "products")} == {"a": False, "b": True, "c": True}
    assert [row["cold"] for row in read(tmp_path, "reviews/valid")] == [True]


@pytest.mark.parametrize("blocks", [1, 7])
def test_a_product_with_half_of_all_reviews_is_read_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int,
) -> None:
    monkeypatch.setattr(buckets, "GATHERED_ROWS", 10)
    rows = [review(number, "big" if number % 2 else f"p{number % 10}", 5) for number in range(100)]
    names = ["big", *(f"p{digit}" for digit in range(0, 10, 2))]
    result = finish_bucket(job(tmp_path, rows, *names, per_product=3, blocks=blocks), 0)
    assert result.counts["splits", "train"] == 100
    texts = {row["product_id"]: row for row in read(tmp_path, "product_text")}
    # three by the hash of their ids, however the reviews were cut into blocks
    first = sorted((f"r{number:03d}" for number in range(1, 100, 2)), key=row_id)[:3]
    assert sorted(texts["big"]["keyword_review_ids"]) == sorted(first)
    stats = {row["row_id"]: row["num_reviews"] for row in read(tmp_path, "product_stats")}
    assert stats[row_id("big")] == 50


def test_a_bucket_without_anything_has_empty_tables(tmp_path: Path) -> None:
    result = finish_bucket(job(tmp_path, []), 0)
    assert read(tmp_path, "products") == read(tmp_path, "reviews/train") == []
    assert {entry.rows for entry in result.files} == {0}
