"""Features: each family by hand, no crawl-time fields, the same for any order of the candidates."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from small_candidates import DAY, candidates, many

from recsys_ray.ranking.concern_words import named_concerns
from recsys_ray.ranking.features import (
    FAMILIES,
    FEATURE_COLUMNS,
    FEATURES,
    Candidates,
    FeatureError,
    feature_table,
    ranks_of,
)
from recsys_ray.ranking.text_match import price_limit, words
from recsys_ray.retrieval.segments import ROWS

CRAWLED = {"average_rating", "rating_number", "helpful_votes", "bought_together", "rank", "sales_rank"}


def of(table: np.ndarray, name: str) -> list[float]:
    return [round(float(one), 4) for one in table[:, FEATURES.index(name)]]


def test_there_are_more_than_forty_features_each_in_one_family() -> None:
    assert len(FEATURES) == len(set(FEATURES)) > 40
    assert sum(map(len, FAMILIES.values())) == len(FEATURES)


def test_only_columns_of_the_index_are_read_and_none_that_a_crawl_counted() -> None:
    assert set(FEATURE_COLUMNS) <= set(ROWS.names)
    assert not CRAWLED & set(FEATURE_COLUMNS)


def test_words_meet_fields() -> None:
    found = feature_table("soft red sofas 16 inch under $50", candidates([
        {"title": "Red Sofa, soft", "brand": "Acme", "category": "sofas", "text": "16 inch", "price_cents": 10_000},
        {"title": "Blue lamp", "brand": "Red", "text": "a very soft red sofa", "price_cents": 2_500},
        {"title": None, "text": None}], [3, 2, 1]))
    # the query's words: soft red sofa 16 inch under 50 (stop words gone, stemmed) = 7
    assert of(found, "query_words") == [7, 7, 7]
    assert of(found, "title_coverage") == [round(3 / 7, 4), 0, 0]
    assert of(found, "title_said") == pytest.approx([1, 0, np.nan], nan_ok=True)
    assert of(found, "title_order") == [round(1 / 6, 4), 0, 0]       # red sofa
    assert of(found, "text_order") == [round(1 / 6, 4), round(2 / 6, 4), 0]
    assert of(found, "text_first")[:2] == [0, round(1 / 4, 4)]       # of "veri soft red sofa"
    assert of(found, "number_coverage") == [0.5, 0, 0]               # 16 of 16 and 50
    assert of(found, "brand_named") == pytest.approx([0, 1, np.nan], nan_ok=True)
    assert of(found, "brand_conflict") == pytest.approx([1, 0, np.nan], nan_ok=True)
    assert of(found, "category_named")[0] == 1
    assert of(found, "price_over_limit")[:2] == [round(np.log(2), 4), round(np.log(0.5), 4)]


def test_a_rare_word_weighs_more_than_a_common_one() -> None:
    found = feature_table("blue sofa", candidates([{"title": "sofa"}, {"title": "sofa"}, {"title": "blue"}], [3, 2, 1]))
    rare = of(found, "title_rare_coverage")
    assert rare[2] > 0.5 > rare[0] == rare[1] > 0


def test_bm25_of_a_field_is_that_of_bm25s_over_the_candidates() -> None:
    import bm25s

    titles = ["soft red sofa", "red red lamp with a red shade", "blue sofa", "a lamp"]
    retriever = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    retriever.index([list(words(title).listed) for title in titles], show_progress=False)
    expected = retriever.get_scores(list(words("red sofa").listed))
    found = feature_table("red sofa", candidates([{"title": title, "text": None} for title in titles], [4, 3, 2, 1]))
    np.testing.assert_allclose(found[:, FEATURES.index("title_bm25")], expected, rtol=1e-6)
    assert np.isnan(found[:, FEATURES.index("brand_bm25")]).all()


def test_bm25_looks_at_one_field_and_weighs_words_by_all() -> None:
    found = feature_table("red sofa", candidates([{"title": "sofa", "text": "red"}, {"title": "red", "text": "sofa"},
                                                  {"title": "lamp", "text": "red lamp"}], [3, 2, 1]))
    title = of(found, "title_bm25")
    assert title[0] > title[1] > title[2] == 0      # red stands in every candidate, in its text if not in its title


def test_scores_ranks_and_gaps() -> None:
    found = feature_table("x", candidates([{}] * 4, [4, 3, 3, 1], dense=[0.5, 0.9, np.nan, 0.7], lexical=[2, 0, 4, 0]),
                          cross=np.array([1, np.nan, 3, np.nan], np.float32))
    assert of(found, "dense_rank") == pytest.approx([3, 1, np.nan, 2], nan_ok=True)
    assert of(found, "dense_gap") == pytest.approx([0.4, 0, np.nan, 0.2], nan_ok=True)
    assert of(found, "lexical_rank") == pytest.approx([2, np.nan, 1, np.nan], nan_ok=True)   # 0 is no match
    assert of(found, "lexical_score") == [2, 0, 4, 0]
    assert of(found, "lexical_share") == [0.5, 0, 1, 0]
    assert of(found, "query_matches") == [0.5] * 4
    assert of(found, "fused_rank") == [1, 2, 2, 4]
    assert of(found, "fused_lead") == [1, 0, 2, 0]
    assert of(found, "cross_gap") == pytest.approx([2, np.nan, 0, np.nan], nan_ok=True)
    assert of(found, "best_rank") == [2, 1, 1, 2]
    assert of(found, "rank_spread") == [1, 0, 0, 0]
    assert of(found, "heads") == [2, 1, 1, 1]
    assert np.isnan(found[:, FEATURES.index("sparse_score")]).all()


def test_product_statistics() -> None:
    found = feature_table("x", candidates([
        {"num_reviews": 5, "rating_mean": 5.0, "last_review_ms": 8 * DAY, "price_cents": 200},
        {"num_reviews": 0, "price_cents": 100}, {"num_reviews": 5, "rating_mean": 3.0, "last_review_ms": 2 * DAY}],
        [3, 2, 1]), as_of_ms=10 * DAY)
    assert of(found, "review_age_days") == pytest.approx([2, np.nan, 8], nan_ok=True)
    assert of(found, "rating_smoothed") == [4.5, 4, 3.5]     # half its own, half the mean of 4
    assert of(found, "price_rank") == pytest.approx([2, 1, np.nan], nan_ok=True)
    assert of(found, "reviews_rank") == [1, 3, 1]


def test_without_a_time_reviews_are_as_old_as_the_latest_one_makes_them() -> None:
    found = feature_table("x", candidates([{"last_review_ms": 8 * DAY}, {"last_review_ms": 2 * DAY}], [2, 1]))
    assert of(found, "review_age_days") == [0, 6]


def test_the_order_of_the_candidates_changes_nothing() -> None:
    some = many(30)
    order = np.random.default_rng(1).permutation(30)
    assert np.array_equal(feature_table("red sofa", some.take(order)), feature_table("red sofa", some)[order],
                          equal_nan=True)


def test_odd_input_gives_a_table() -> None:
    assert feature_table("x", many(0)).shape == (0, len(FEATURES))
    for query in ("", "the of and", "🛋 \ud800", "a" * 5000):
        assert feature_table(query, many(3)).shape == (3, len(FEATURES))
    assert np.isfinite(feature_table("red", many(5))).any(axis=0).sum() > 40


def test_candidates_that_do_not_fit_are_refused() -> None:
    some = many(3)
    with pytest.raises(FeatureError, match="fused"):
        Candidates(some.row_ids, {"dense": some.fused}, some.rows)
    with pytest.raises(FeatureError, match="2 dense"):
        Candidates(some.row_ids, {**some.scores, "dense": some.fused[:2]}, some.rows)
    with pytest.raises(FeatureError, match="verified_share"):
        Candidates(some.row_ids, some.scores, some.rows.drop_columns(["verified_share"]))


def test_ranks_share_places() -> None:
    assert ranks_of(np.array([2, 5, 2, np.nan], np.float32)).tolist() == pytest.approx([2, 1, 2, np.nan], nan_ok=True)


def test_words_and_limits() -> None:
    assert words("The Running-Shoes, 2").listed == ("run", "shoe", "2")
    assert price_limit("a lamp under $39.99") == 39.99
    assert np.isnan(price_limit("underwear 40"))


def test_rows_may_hold_more_columns() -> None:
    some = many(2)
    more = some.rows.append_column("image_url", pa.nulls(2, pa.string()))
    assert np.array_equal(feature_table("red", Candidates(some.row_ids, some.scores, more)),
                          feature_table("red", some), equal_nan=True)


def test_probabilities_of_the_concerns_that_a_query_names() -> None:
    some = candidates([{"concerns": [("acne", 0.2), ("age", 0.9)]}, {"concerns": [("acne", 0.7), ("age", 0.1)]}, {}],
                      [3, 2, 1])
    found = feature_table("face wash for pimples", some)
    np.testing.assert_allclose(of(found, "concern_named"), [0.2, 0.7, np.nan], rtol=1e-6)
    assert of(found, "concern_named_rank")[:2] == [2, 1]
    np.testing.assert_allclose(of(found, "concern_surest"), [0.9, 0.7, np.nan], rtol=1e-6)
    assert np.isnan(of(feature_table("red sofa", some), "concern_named")).all()
    assert np.isnan(of(feature_table("pimples", many(3)), "concern_surest")).all()


@pytest.mark.parametrize(("query", "concerns"), [
    ("cream for fine lines and crow's feet", {"wrinkle"}), ("age spots", {"age"}), ("Spots!", {"acne"}),
    ("oily skin and dry skin", {"oiliness", "moisture"}), ("hair_loss serum", {"hair_loss"}),
    ("hair loss serum", {"hair_loss"}), ("lamp", set())])
def test_a_query_names_concerns_in_its_own_words(query: str, concerns: set[str]) -> None:
    known = {"acne", "age", "wrinkle", "oiliness", "moisture", "hair_loss"}
    assert named_concerns(query, known) == concerns
    assert not named_concerns(query, ())
