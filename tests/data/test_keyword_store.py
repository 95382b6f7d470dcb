"""Stored keywords: found by review, empty where none are stored, refused for other buckets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from recsys_ray.artifacts import Artifact, ArtifactError, stage
from recsys_ray.config import Config
from recsys_ray.data.keyword_store import StoredKeywords, content_of, open_keywords
from recsys_ray.schema import PRODUCT_SUMMARY, QUARANTINE, REVIEW_KEYWORDS, conform


def store(root: Path, keywords: dict[str, list[str]], summaries: dict[int, str], aside: int = 0) -> Artifact:
    told = [{"review_id": review, "row_id": 1, "product_id": "p", "split": "train", "keywords": words,
             "content_key": review} for review, words in keywords.items()]
    short = [{"row_id": row, "product_id": "p", "summary": text, "content_key": text}
             for row, text in summaries.items()]
    bad = [{"table": "reviews", "reason": "why"}] * aside
    tables: dict[str, tuple[list[dict[str, Any]], pa.Schema]] = {
        "keywords": (told, REVIEW_KEYWORDS), "summaries": (short, PRODUCT_SUMMARY), "quarantine": (bad, QUARANTINE)}
    with stage(root, "keywords", "0" * 16) as staging:
        files = [staging.write_table(f"{name}/bucket-00000.parquet",
                                     conform(pa.Table.from_pylist(rows, schema=schema), schema, name))
                 for name, (rows, schema) in tables.items()]
        return staging.commit(files, config=Config(), facts={"num_buckets": 2})


def test_keywords_are_found_by_review_and_missing_ones_are_counted(tmp_path: Path) -> None:
    stored = StoredKeywords(store(tmp_path, {"a": ["dry skin"], "b": [], "c": ["gift", "winter"]}, {}), "bucket-00000")
    found, missing = stored.of_reviews(pa.chunked_array([["c", "gone"], ["a", "b"]]))
    assert found.to_pylist() == [["gift", "winter"], [], ["dry skin"], []]
    assert missing == 1
    assert stored.of_reviews(pa.chunked_array([[]], pa.string()))[0].to_pylist() == []


def test_a_bucket_without_files_has_nothing_stored(tmp_path: Path) -> None:
    stored = StoredKeywords(store(tmp_path, {"a": ["x"]}, {1: "short"}), "bucket-00001")
    found, missing = stored.of_reviews(pa.chunked_array([["a"]]))
    assert (found.to_pylist(), missing) == ([[]], 1)
    assert stored.summaries([1]) == [None]


def test_summaries_are_found_by_product(tmp_path: Path) -> None:
    stored = StoredKeywords(store(tmp_path, {}, {1: "one", 3: "three"}), "bucket-00000")
    assert stored.summaries([3, 2, 1]) == ["three", None, "one"]


def test_content_is_what_is_stored_not_when_or_what_was_set_aside(tmp_path: Path) -> None:
    same = [store(tmp_path / name, {"a": ["x"]}, {1: "s"}, aside) for name, aside in (("one", 0), ("two", 3))]
    other = store(tmp_path / "three", {"a": ["y"]}, {1: "s"})
    assert content_of(same[0]) == content_of(same[1]) != content_of(other)


def test_other_buckets_are_refused(tmp_path: Path) -> None:
    store(tmp_path, {}, {})
    assert open_keywords(tmp_path, 2).manifest.kind == "keywords"
    with pytest.raises(ArtifactError, match="2 buckets where the shop has 5"):
        open_keywords(tmp_path, 5)
