"""Query sets: which texts are asked, what is relevant, and that a sample depends on nothing but its seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_ray.retrieval.lexical import LexicalConfig, build_postings, global_statistics
from recsys_ray.retrieval.query_sets import (
    AnswerableRule,
    QuerySetError,
    ReviewQueries,
    TableQueries,
    answerable_texts,
    review_query_set,
    table_query_set,
)

CATALOGUE = [*(f"product number{i} love it great serum" for i in range(60)), "vitamin c serum dropper", "retinol oil"]
STATISTICS = global_statistics([build_postings(CATALOGUE, LexicalConfig())])


def reviews(first: int, last: int) -> pa.Table:
    numbers = range(first, last)
    return pa.table({
        "review_id": [f"r{i}" for i in numbers], "product_id": [f"p{i % 5}" for i in numbers],
        "title": [f"Title {i}" if i % 4 else None for i in numbers],
        "text": pa.array([f"vitamin dropper number{i}" if i % 3 else None for i in numbers], pa.string()),
        "cold": [i % 2 == 0 for i in numbers],
    })


def query_set(config: ReviewQueries, *buckets: pa.Table):
    return review_query_set(buckets, config, STATISTICS, LexicalConfig())


def test_each_review_with_words_is_a_query_for_its_product() -> None:
    found = query_set(ReviewQueries(prepared=Path("x")), reviews(0, 6), reviews(6, 13))
    rows = {row["query_id"]: row for row in found.queries.to_pylist()}
    assert found.skipped == 2  # 0 and 12 have neither text nor title
    assert sorted(rows) == sorted(f"r{i}" for i in range(13) if i not in (0, 12))
    assert rows["r1"]["query"] == "vitamin dropper number1"
    assert rows["r3"]["query"] == "Title 3"  # no text
    assert rows["r7"]["unit_id"] == "p2"
    judged = {row["query_id"]: (row["product_id"], row["gain"]) for row in found.judgments.to_pylist()}
    assert judged["r7"] == ("p2", 1.0)
    assert set(judged) == set(rows)


def test_slices() -> None:
    found = query_set(ReviewQueries(prepared=Path("x")), reviews(0, 13))
    slices = {row["query_id"]: row["slices"] for row in found.queries.to_pylist()}
    assert slices["r2"] == ["cold", "answerable"]
    assert slices["r7"] == ["warm", "answerable"]
    assert slices["r3"] == ["warm", "generic"]


def test_a_sample_depends_on_the_seed_and_not_on_the_buckets() -> None:
    def ids(seed: int, *buckets: pa.Table) -> list[str]:
        config = ReviewQueries(prepared=Path("x"), max_queries=20, seed=seed)
        return query_set(config, *buckets).queries["query_id"].to_pylist()

    whole = ids(7, reviews(0, 200))
    assert len(whole) == 20
    assert ids(7, reviews(150, 200), reviews(0, 40), reviews(40, 150)) == whole
    assert ids(8, reviews(0, 200)) != whole


def test_keywords_as_queries() -> None:
    table = pa.table({"review_id": ["a", "b"], "product_id": ["p", "p"], "title": ["x", "y"], "cold": [False, True],
                      "text": ["I really love this <b>gentle retinol serum</b> for dry skin!", "Loved it"]})
    found = query_set(ReviewQueries(prepared=Path("x"), text="keywords"), table)
    queries = {row["query_id"]: row["query"] for row in found.queries.to_pylist()}
    assert queries["a"] == "gentle retinol serum dry skin"
    assert queries["b"] == "Loved it"  # no keyword: what was said


def test_answerable_needs_enough_and_rare_enough_words() -> None:
    texts = ["love it", "great great great love", "vitamin dropper number3", "", "zzz qqq unheard www"]
    rule = AnswerableRule()
    assert answerable_texts(texts, rule, STATISTICS, LexicalConfig()).tolist() == [False, False, True, False, False]
    assert answerable_texts(texts[2:3], AnswerableRule(min_information=3), STATISTICS,
                            LexicalConfig()).tolist() == [False]


def test_a_split_without_words_is_an_error() -> None:
    empty = reviews(0, 1)
    with pytest.raises(QuerySetError, match="'test' holds no review"):
        query_set(ReviewQueries(prepared=Path("x")), empty)


def test_a_table_under_its_own_column_names(tmp_path: Path) -> None:
    path = tmp_path / "asked.parquet"
    pq.write_table(pa.table({"number": np.arange(4), "words": ["sofa", " ", "", "tee"]}), path)
    found = table_query_set(TableQueries(path=str(path), columns={"query_id": "number", "query": "words"}))
    assert found.queries.select(["query_id", "query"]).to_pylist() == [
        {"query_id": "0", "query": "sofa"}, {"query_id": "3", "query": "tee"}]
    assert found.judgments is None
    assert found.skipped == 2


def test_a_query_that_was_asked_twice_is_asked_once(tmp_path: Path) -> None:
    path = tmp_path / "asked.csv"
    path.write_text("query_id,query\nb,tee\na,sofa\nb,tee\nc, \n")
    found = table_query_set(TableQueries(path=str(path)))
    assert found.queries["query"].to_pylist() == ["sofa", "tee"]
    assert found.skipped == 1


def test_repeated_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "asked.csv"
    path.write_text("query_id,query\na,sofa\na,tee\n")
    with pytest.raises(QuerySetError, match="more than once"):
        table_query_set(TableQueries(path=str(path)))


def test_the_real_query_table_has_all_its_queries(real_data) -> None:
    found = table_query_set(TableQueries(path=str(real_data("esci_us_subset") / "queries.parquet")))
    assert found.queries.num_rows == 150
    assert found.skipped == 0


def test_stored_keywords_are_the_query_where_there_are_any() -> None:
    told = [["oily skin", "night"], [], None, None, None]
    stored = reviews(1, 6).append_column("keywords", pa.array(told, pa.list_(pa.string())))
    found = query_set(ReviewQueries(prepared=Path("x"), text="keywords"), stored)
    assert {row["query_id"]: row["query"] for row in found.queries.to_pylist()} == {
        "r1": "oily skin night", "r2": "vitamin dropper number2", "r3": "title",
        "r4": "vitamin dropper number", "r5": "vitamin dropper number"}
