"""The preparation as a whole: one small dirty shop, every row accounted for, nothing from after the cut."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys_ray.artifacts import Artifact
from recsys_ray.data.pipeline import PrepareConfig, prepare, reason_kind
from recsys_ray.data.sources import SourceError
from recsys_ray.data.splits import HOUR_MS

CUTS = {"train_end_ms": 1_500_000_000_000 + 80 * HOUR_MS, "valid_end_ms": 1_500_000_000_000 + 90 * HOUR_MS}
WORDS = ["clay", "blue", "mug", "handle", "tea", "kitchen", "warm", "gift", "dishwasher", "safe", "glaze", "round"]


def product(number: int, **change: Any) -> dict[str, Any]:
    return {"parent_asin": f"P{number}", "title": f"Mug {number}", "description": [f"{word}{number}" for word in WORDS],
            "features": [], "price": "12.50", "average_rating": 1.2345, "rating_number": 98765, **change}


def review(number: int, of: int, **change: Any) -> dict[str, Any]:
    return {"parent_asin": f"P{of}", "asin": f"V{of}-{number % 2}", "user_id": f"U{number}", "rating": 1.0 + number % 5,
            "title": "t", "text": f"phrase{'abcdefghij'[number % 10]}word is here",
            "verified_purchase": number % 3 == 0, "timestamp": 1_500_000_000_000 + number * HOUR_MS, "helpful_vote": 0,
            **change}


PRODUCTS = [*(product(number) for number in range(20)), product(3), product(4, title="Other title, longer than it"),
            product(20, description=product(5)["description"], title="Mug 5"),      # a near-duplicate of P5
            product(21, title=None, description=None), product(22, parent_asin=None)]
# Half of the hundred reviews are of one product, P0; P19 has only late ones, P18 none at all.
REVIEWS = [*(review(number, 0 if number % 2 else 1 + number % 17) for number in range(95)),
           *(review(number, 19) for number in range(95, 100)), review(7, 0), review(30, 999),
           review(31, 2, text=" ", title=None), review(32, 2, timestamp=None)]


def write_lines(path: Path, rows: list[dict[str, Any]], *more: str) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "".join(f"{line}\n" for line in more))


@dataclass(frozen=True)
class Shop:
    config: PrepareConfig
    artifact: Artifact

    def rows(self, prefix: str) -> list[dict[str, Any]]:
        return rows_of(self.artifact, prefix)


def rows_of(artifact: Artifact, prefix: str) -> list[dict[str, Any]]:
    return [row for table in artifact.tables(prefix) for row in table.to_pylist()]


def config_for(folder: Path, output: Path, **change: Any) -> PrepareConfig:
    return PrepareConfig.model_validate({
        "source": {"format": "amazon_reviews", "products": str(folder / "meta_Shop.jsonl"),
                   "reviews": str(folder / "Shop.jsonl")},
        "output": output, "num_buckets": 3, "split": CUTS, "ray": {"progress": False}, **change})


@pytest.fixture(scope="module")
def shop(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("shop")
    write_lines(folder / "meta_Shop.jsonl", PRODUCTS)
    write_lines(folder / "Shop.jsonl", REVIEWS, "{broken")
    config = config_for(folder, folder / "prepared")
    return Shop(config, prepare(config))


@pytest.mark.ray
def test_every_row_is_accounted_for(shop: Shop) -> None:
    counts = shop.artifact.manifest.facts["counts"]
    for table, read, kept, repeated in (("products", 25, 21, 1), ("reviews", 105, 100, 1)):
        aside = [row for row in shop.rows("quarantine/") if row["table"] == table]
        told = sum(count for name, count in counts.items() if name.startswith(f"rows/{table} set aside"))
        assert counts[f"rows/{table} read"] == read
        assert counts[f"rows/{table} kept"] == kept
        assert counts[f"duplicates/{table}, exact repetitions"] == repeated
        assert told == len(aside) == read - kept - repeated
    found = {(row["source"].rsplit("/")[-1], reason_kind(row["reason"])) for row in shop.rows("quarantine/")}
    assert {("meta_Shop.jsonl:24", "no text"), ("meta_Shop.jsonl:25", "no product id"),
            ("meta_Shop.jsonl:5", "duplicate id"), ("Shop.jsonl:102", "unknown product"),
            ("Shop.jsonl:103", "no text"), ("Shop.jsonl:104", "no timestamp")} <= found
    assert any(source == "Shop.jsonl:105" for source, _ in found)


@pytest.mark.ray
def test_statistics_are_those_of_train_reviews_alone(shop: Shop) -> None:
    stats = {row["row_id"]: row for row in shop.rows("product_stats/")}
    early = [one for one in REVIEWS[:100] if one["timestamp"] <= CUTS["train_end_ms"]]
    for one in shop.rows("products/"):
        mine = [review for review in early if review["parent_asin"] == one["product_id"]]
        row = stats[one["row_id"]]
        assert row["num_reviews"] == len(mine)
        assert row["as_of_ms"] == CUTS["train_end_ms"]
        assert one["cold"] == (not mine)
        if not mine:
            assert row["rating_mean"] is None
            assert row["last_review_ms"] is None
            continue
        ratings = np.array([review["rating"] for review in mine])
        assert row["rating_mean"] == pytest.approx(ratings.mean(), rel=1e-6)
        assert row["rating_std"] == pytest.approx(ratings.std(), abs=1e-6)
        assert row["verified_share"] == pytest.approx(np.mean([review["verified_purchase"] for review in mine]))
        assert row["mean_review_chars"] == pytest.approx(np.mean([len(review["text"]) for review in mine]))
        assert row["last_review_ms"] == max(review["timestamp"] for review in mine)


@pytest.mark.ray
def test_reviews_are_split_by_time_and_variants_folded(shop: Shop) -> None:
    for split, size in (("train", 81), ("valid", 10), ("test", 9)):     # hours 0-80, 81-90, 91-99
        rows = shop.rows(f"reviews/{split}/")
        assert len(rows) == size
        assert {row["split"] for row in rows} == {split}
    assert {row["product_id"] for row in shop.rows("reviews/") if row["cold"]} == {"P19"}
    products = {row["product_id"]: row for row in shop.rows("products/")}
    assert products["P0"]["variant_ids"] == ["V0-1"]
    assert products["P19"]["variant_ids"] == ["V19-0", "V19-1"]
    assert products["P18"]["variant_ids"] == []
    assert products["P4"]["title"] == "Other title, longer than it"     # of two listings the one that says more


@pytest.mark.ray
def test_texts_come_from_train_reviews_and_files_are_sorted(shop: Shop) -> None:
    train = {row["review_id"] for row in shop.rows("reviews/train/")}
    texts = {row["product_id"]: row for row in shop.rows("product_text/")}
    assert set().union(*(row["keyword_review_ids"] for row in texts.values())) <= train
    assert "[Review Keywords]" in texts["P0"]["text"]
    assert texts["P18"]["keywords"] == texts["P19"]["keywords"] == []
    for prefix in ("products/", "product_text/", "product_stats/", "reviews/"):
        for table in shop.artifact.tables(prefix, ["row_id"]):
            assert table["row_id"].to_pylist() == sorted(table["row_id"].to_pylist())


@pytest.mark.ray
def test_near_duplicates_share_a_group(shop: Shop) -> None:
    groups = {row["product_id"]: row["group_id"] for row in shop.rows("products/")}
    assert groups["P5"] == groups["P20"]
    assert len(set(groups.values())) == len(groups) - 1


@pytest.mark.ray
def test_nothing_counted_at_crawl_time_is_in_any_table(shop: Shop) -> None:
    for name in shop.artifact.names():
        table = shop.artifact.table(name)
        assert not {"average_rating", "rating_number", "ratings_count"} & set(table.column_names)
        if not name.startswith("quarantine/"):
            assert "98765" not in json.dumps(table.to_pylist(), default=str)
            assert "1.2345" not in json.dumps(table.to_pylist(), default=str)


@pytest.mark.ray
def test_a_second_run_reuses_and_another_folder_gets_the_same_tables(shop: Shop, tmp_path: Path) -> None:
    again = prepare(shop.config)
    assert again.manifest.version == shop.artifact.manifest.version
    other = prepare(shop.config.replace(output=tmp_path / "other"))
    assert other.names() == shop.artifact.names()
    assert all(other.table(name).equals(shop.artifact.table(name)) for name in other.names())


@pytest.mark.ray
def test_changed_input_is_prepared_again_and_later_reviews_change_no_text(shop: Shop, tmp_path: Path) -> None:
    write_lines(tmp_path / "meta_Shop.jsonl", PRODUCTS)
    write_lines(tmp_path / "Shop.jsonl", [*REVIEWS, review(99, 3, text="late leakword here", user_id="U-late")])
    changed = prepare(config_for(tmp_path, tmp_path / "prepared"))
    assert changed.manifest.fingerprint != shop.artifact.manifest.fingerprint
    assert changed.manifest.rows("reviews/test/") == shop.artifact.manifest.rows("reviews/test/") + 1
    for prefix in ("product_text/", "product_stats/"):
        assert rows_of(changed, prefix) == shop.rows(prefix)


@pytest.mark.ray
def test_a_catalogue_without_one_usable_product_is_an_error(local_ray: None, tmp_path: Path) -> None:
    write_lines(tmp_path / "meta_Shop.jsonl", [product(1, title=" ", description=None)])
    write_lines(tmp_path / "Shop.jsonl", [review(1, 1)])
    with pytest.raises(SourceError, match=r"not one usable product.*products set aside: no text: 1"):
        prepare(config_for(tmp_path, tmp_path / "prepared"))


@pytest.mark.ray
def test_a_catalogue_without_reviews_has_texts_and_no_cuts(local_ray: None, tmp_path: Path) -> None:
    (tmp_path / "products.csv").write_text("sku,name\n1,Blue mug\n2,Red mug\n")
    artifact = prepare(PrepareConfig.model_validate({
        "source": {"format": "table", "products": str(tmp_path / "products.csv"),
                   "product_columns": {"product_id": "sku", "title": "name"}},
        "output": tmp_path / "prepared", "num_buckets": 2, "ray": {"progress": False}}))
    assert artifact.manifest.facts["cuts"] is None
    assert {row["text"] for row in rows_of(artifact, "product_text/")} == {"[Title] Blue mug", "[Title] Red mug"}
    assert {row["cold"] for row in rows_of(artifact, "products/")} == {None}
    assert not artifact.names("reviews/")


def test_an_empty_file_is_an_error_before_any_work(tmp_path: Path) -> None:
    for name in ("meta_Shop.jsonl", "Shop.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(SourceError, match=r"meta_Shop\.jsonl"):
        prepare(config_for(tmp_path, tmp_path / "prepared"))


@pytest.mark.parametrize(("reason", "kind"), [
    ("not JSON at character 109 (Unterminated string starting at)", "not JSON"),
    ("rating: expected a number", "rating"),
    ("no product id", "no product id"), ("unknown product", "unknown product"), ("expected 'x'", "expected")])
def test_reasons_are_counted_without_what_is_particular_to_a_row(reason: str, kind: str) -> None:
    assert reason_kind(reason) == kind
