"""Pairs of a small prepared shop: nothing of the query in its positive, nothing twice, nothing from later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from recsys_ray.artifacts import Artifact, open_artifact
from recsys_ray.data import pair_buckets, pairs, training_pairs
from recsys_ray.data.pair_buckets import (
    LEAKY,
    BucketPairs,
    PairJob,
    audit_rows,
    copied_shares,
    copy_warning,
    make_bucket,
)
from recsys_ray.data.pairs import PairError, PairsConfig
from recsys_ray.data.pipeline import PrepareConfig, prepare
from recsys_ray.data.splits import HOUR_MS
from recsys_ray.data.training_pairs import MakePairsConfig, make_pairs

START = 1_500_000_000_000
CUTS = {"train_end_ms": START + 160 * HOUR_MS, "valid_end_ms": START + 180 * HOUR_MS}
LETTERS = "abcdefghij"


def word(number: int) -> str:
    return "own" + "".join(LETTERS[int(digit)] for digit in f"{number:03d}")


def write_shop(folder: Path, reviews: bool = True) -> dict[str, Any]:
    """Eleven products, two of them near-duplicates; two hundred reviews, half of P0, each with a word of its own."""
    details = "made of grey stoneware for tea coffee soup and everything warm on the table"
    lines = [{"parent_asin": f"P{number}", "title": f"Mug {word(number + 900)}",
              "description": [f"{details} {' '.join(word(number * 7 + k + 500) for k in range(12))}"],
              "features": ["dishwasher safe", f"holds {number} cups"]} for number in range(10)]
    lines.append({**lines[3], "parent_asin": "P3-copy"})
    (folder / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = [{"parent_asin": "P0" if number % 2 else f"P{1 + number % 9}", "asin": "V", "user_id": f"U{number}",
             "rating": 5.0, "title": "t", "text": f"shared{'abcd'[number % 4]}word, and {word(number)} too",
             "verified_purchase": True, "timestamp": START + number * HOUR_MS, "helpful_vote": 0}
            for number in range(200)]
    (folder / "reviews.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    source = {"format": "amazon_reviews", "products": str(folder / "meta.jsonl")}
    return {**source, "reviews": str(folder / "reviews.jsonl")} if reviews else source


@pytest.fixture(scope="module")
def prepared(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("shop")
    config = {"source": write_shop(folder), "output": folder / "prepared", "num_buckets": 3, "split": CUTS,
              "max_reviews_per_product": 6, "ray": {"progress": False}}
    return prepare(PrepareConfig.model_validate(config))


def rows_of(artifact: Artifact, split: str) -> list[dict[str, Any]]:
    return [row for table in artifact.tables(f"pairs/{split}/") for row in table.to_pylist()]


def config_for(prepared: Artifact, output: Path, **change: Any) -> MakePairsConfig:
    return MakePairsConfig.model_validate({"prepared": prepared.path.parents[1], "output": output,
                                           "ray": {"progress": False}, **change})


@pytest.mark.ray
def test_no_positive_holds_the_own_words_of_its_query(prepared: Artifact, tmp_path: Path) -> None:
    artifact = make_pairs(config_for(prepared, tmp_path / "pairs"))
    rows = rows_of(artifact, "train")
    texts = {row["row_id"]: row["text"] for table in prepared.tables("product_text/") for row in table.to_pylist()}
    own = {row["pair_id"]: next(one for one in row["query"].split() if one.strip(".,").startswith("own"))
           for row in rows}
    assert all(own[row["pair_id"]] not in row["text"] for row in rows)
    assert any(own[row["pair_id"]] in texts[row["row_id"]] for row in rows)     # as it is indexed it is there
    by_product = {name: sum(row["product_id"] == name for row in rows) for name in ("P0", "P5")}
    assert by_product["P0"] == 2 * 20       # two kinds of query of the twenty reviews that the cap leaves
    assert 0 < by_product["P5"] < 2 * 20
    assert len({row["pair_id"] for row in rows}) == len(rows)
    assert {row["query_type"] for row in rows} == {"keywords", "review_text"}
    groups = {row["product_id"]: row["group_id"] for row in rows}
    near = {row["product_id"]: row["group_id"] for table in prepared.tables("products/") for row in table.to_pylist()}
    assert all(groups[name] == near[name] for name in groups)
    assert near["P3"] == near["P3-copy"]


@pytest.mark.ray
def test_train_pairs_are_of_train_and_valid_pairs_have_the_indexed_text(prepared: Artifact, tmp_path: Path) -> None:
    artifact = make_pairs(config_for(prepared, tmp_path / "pairs"))
    split_of = {row["review_id"]: row["split"] for name in ("train", "valid", "test")
                for table in prepared.tables(f"reviews/{name}/") for row in table.to_pylist()}
    texts = {row["row_id"]: row["text"] for table in prepared.tables("product_text/") for row in table.to_pylist()}
    for split in ("train", "valid"):
        rows = rows_of(artifact, split)
        assert rows
        assert {split_of[row["pair_id"].split("/")[0]] for row in rows} == {split}
        assert {row["split"] for row in rows} == {split}
    assert all(row["text"] == texts[row["row_id"]] for row in rows_of(artifact, "valid"))
    assert not artifact.names("pairs/test/")


@pytest.mark.ray
def test_the_audit_tells_a_leak_from_none(prepared: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clean = make_pairs(config_for(prepared, tmp_path / "pairs")).manifest.facts
    assert clean["copied_token_share"]["train"] < 0.6 < clean["copied_token_share"][LEAKY]
    assert not [record for record in caplog.records if "learn to copy" in record.message]
    leaky = make_pairs(config_for(prepared, tmp_path / "leaky", positive_text="full"))
    shares = leaky.manifest.facts["copied_token_share"]
    assert shares["train"] == shares[LEAKY]
    assert leaky.manifest.facts["copied_token_gap"] > 0.1
    assert [record for record in caplog.records if "learn to copy" in record.message]
    rows = [row for row in leaky.table("audit/audit.parquet").to_pylist() if row["name"].startswith("gap")]
    assert rows[0]["note"].startswith("WARNING")


@pytest.mark.ray
def test_as_of_time_knows_earlier_reviews_alone(prepared: Artifact, tmp_path: Path) -> None:
    artifact = make_pairs(config_for(prepared, tmp_path / "pairs", positive_text="as_of_time"))
    times = {row["review_id"]: row["timestamp_ms"] for table in prepared.tables("reviews/train/")
             for row in table.to_pylist()}
    number_of = {word(number): number for number in range(200)}
    for row in rows_of(artifact, "train"):
        said = [one.strip(",") for one in row["text"].split("[Description")[0].split() if one.strip(",") in number_of]
        asked = times[row["pair_id"].split("/")[0]]
        assert all(START + number_of[one] * HOUR_MS < asked for one in said)


@pytest.mark.ray
def test_a_second_run_reuses_a_killed_one_continues(
    prepared: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_for(prepared, tmp_path / "pairs", form="triplet", negatives=2)
    first = make_pairs(config)
    assert make_pairs(config).manifest.version == first.manifest.version
    short = [row for row in rows_of(first, "train") + rows_of(first, "valid") if len(row["negative_texts"]) < 2]
    assert len(short) == first.manifest.facts["counts"]["pairs with fewer negatives than asked for"]
    assert len(short) < len(rows_of(first, "train")) / 2

    again = config.replace(output=tmp_path / "again")
    monkeypatch.setattr(training_pairs, "_publish", lambda *_: 1 / 0)     # dies when every bucket is done
    with pytest.raises(ZeroDivisionError):
        make_pairs(again)
    monkeypatch.undo()
    staged = next((tmp_path / "again/staging").iterdir())
    damaged = staged / "pairs/train/bucket-00001.parquet"
    kept = staged / "pairs/train/bucket-00000.parquet"
    before = kept.stat().st_mtime_ns
    damaged.write_bytes(damaged.read_bytes()[:-1])
    second = make_pairs(again)
    assert (second.path / "pairs/train/bucket-00000.parquet").stat().st_mtime_ns == before
    assert second.names() == first.names()
    assert all(second.table(name).equals(first.table(name)) for name in first.names())


@pytest.mark.ray
def test_texts_of_another_preparation_are_refused(prepared: Artifact, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "review_keywords", lambda text: ["other"])
    job = PairJob(str(prepared.path.parents[1]), prepared.manifest.version, str(tmp_path), PairsConfig())
    with pytest.raises(PairError, match="cannot be made again"):
        _ = [make_bucket(job, Path(name).stem) for name in prepared.names("products/")]


@pytest.mark.ray
def test_a_limit_of_the_whole_holds_and_draws_the_same_again(prepared: Artifact, tmp_path: Path) -> None:
    small = make_pairs(config_for(prepared, tmp_path / "a", max_train_reviews=9, max_valid_reviews=3,
                                  query_type="review_text"))
    every = make_pairs(config_for(prepared, tmp_path / "b", query_type="review_text"))
    assert 0 < len(rows_of(small, "train")) <= 9
    assert 0 < len(rows_of(small, "valid")) <= 3
    assert {row["pair_id"] for row in rows_of(small, "train")} <= {row["pair_id"] for row in rows_of(every, "train")}


@pytest.mark.ray
def test_a_catalogue_without_reviews_needs_other_queries(local_ray: None, tmp_path: Path) -> None:
    found = prepare(PrepareConfig.model_validate({
        "source": write_shop(tmp_path, reviews=False), "output": tmp_path / "prepared", "num_buckets": 2,
        "text": {"template": "fields-v1"}, "ray": {"progress": False}}))
    with pytest.raises(PairError, match="no training pair"):
        make_pairs(config_for(found, tmp_path / "none"))
    made = make_pairs(config_for(found, tmp_path / "pairs", product_queries={"title": True, "features": 2}))
    rows = rows_of(made, "train")
    assert {kind: sum(row["query_type"] == kind for row in rows) for kind in ("title", "feature")} == {
        "title": 11, "feature": 22}
    assert made.manifest.facts["copied_token_gap"] is None
    assert all(row["query"] not in row["text"] for row in rows)


def test_shares_are_weighted_and_the_gap_is_the_worst_kind() -> None:
    result = BucketPairs(copied={"train/keywords": [3.0, 10.0], "train/review_text": [20.0, 40.0],
                                 "test/keywords": [2.0, 10.0], "test/review_text": [30.0, 40.0],
                                 "train/title": [0.0, 500.0]})
    shares, gap = copied_shares(result)
    assert shares == {"train": pytest.approx(23 / 50), "test": pytest.approx(32 / 50)}
    assert gap == pytest.approx(0.25)
    assert audit_rows(result, 0.3)[-1]["note"].startswith("train and later")
    assert audit_rows(result, 0.2)[-1]["note"].startswith("WARNING")
    assert copied_shares(BucketPairs(copied={"train/title": [1.0, 4.0]})) == ({"train": 0.25}, None)


def test_a_gap_to_valid_queries_is_told_where_there_are_no_later_ones() -> None:
    judged = BucketPairs(copied={"train/judged": [8.0, 10.0], "valid/judged": [2.0, 10.0]})
    shares, gap = copied_shares(judged)
    assert gap == pytest.approx(0.6)
    assert "share 80% of their words with their positives, later ones 20%" in copy_warning(shares)


def test_reviews_are_read_by_their_place_in_the_file(prepared: Artifact, tmp_path: Path) -> None:
    name = prepared.names("reviews/train/")[0]
    table = prepared.table(name)
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path, row_group_size=7)
    blocks = list(pair_buckets._blocks(path, ["text"]))
    assert [start for start, _ in blocks] == list(np.arange(0, table.num_rows, 7))
    assert [text for _, block in blocks for text in block["text"].to_pylist()] == table["text"].to_pylist()


def test_the_job_of_one_bucket_needs_an_artefact(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run its job first"):
        open_artifact(tmp_path, training_pairs.KIND)
