"""Lists of a period: statistics of the query's moment, labels, late cross-encoders, and no look into the future."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from small_period import IDS, Period, candidates_of, reviews, title, write_period, write_prepared

from recsys_ray.artifacts import open_artifact
from recsys_ray.ranking.asked_lists import (
    Asked,
    AskedError,
    Labelled,
    as_lists,
    asked_lists,
    queries_of,
    query_times,
    reranked,
    retrieved,
)
from recsys_ray.ranking.features import FEATURES, feature_table
from recsys_ray.ranking.rerank import RerankConfig, Reranker
from recsys_ray.retrieval.segments import open_index
from recsys_ray.schema import JUDGMENT, conform


@pytest.fixture(scope="module")
def period(tmp_path_factory: pytest.TempPathFactory) -> Period:
    return write_period(tmp_path_factory.mktemp("period"))


def asked(period: Period, prepared: Path, depth: int = 12) -> list[Asked]:
    found, shop = open_artifact(period.valid, "candidates"), open_artifact(prepared, "prepared")
    texts = queries_of(found)
    return list(asked_lists(candidates_of(found), texts, open_index(period.index), depth, shop,
                            query_times(shop, list(texts))))


def tables(some: list[Asked]) -> np.ndarray:
    return np.concatenate([feature_table(one.query, one.candidates, one.cross, one.as_of_ms) for one in some])


def test_rows_statistics_and_scores_stand_side_by_side(period: Period) -> None:
    for one in asked(period, period.prepared)[:20]:
        assert [title(IDS.index(product)) for product in one.product_ids] == one.candidates.rows["title"].to_pylist()
        assert (np.diff(one.candidates.fused) <= 0).all()
        told = {product: [review for review in reviews() if review["product_id"] == product
                          and review["timestamp_ms"] < (one.as_of_ms or 0)] for product in one.product_ids}
        assert one.candidates.rows["num_reviews"].to_pylist() == [len(told[product]) for product in one.product_ids]
        assert [None if mean is None else pytest.approx(mean) for mean in one.candidates.rows["rating_mean"].to_pylist()
                ] == [np.mean([review["rating"] for review in told[product]]) if told[product] else None
                      for product in one.product_ids]


def test_a_shuffled_future_changes_no_feature(period: Period, tmp_path: Path) -> None:
    """Each query alone: everything written at or after its moment is replaced by other reviews of other products."""
    before = asked(period, period.prepared)
    for number in (0, 40, 80):
        moment, query_id = before[number].as_of_ms or 0, before[number].query_id
        future = [row for row in reviews(seed=9) if row["timestamp_ms"] >= moment and row["review_id"] != query_id]
        past = [row for row in reviews() if row["timestamp_ms"] < moment or row["review_id"] == query_id]
        known = {row["review_id"] for row in past}
        mixed = past + [{**row, "review_id": f"x{row['review_id']}"} for row in future]
        assert len(known) + len(future) > 100
        shop = open_artifact(write_prepared(tmp_path / str(number), mixed), "prepared")
        found = open_artifact(period.valid, "candidates")
        rows = candidates_of(found)
        rows = rows.filter(pa.array([one == query_id for one in rows["query_id"].to_pylist()]))
        (after,) = asked_lists(rows, queries_of(found), open_index(period.index), 12, shop, {query_id: moment})
        assert np.array_equal(tables([after]), tables([before[number]]), equal_nan=True)
        reviewed = FEATURES.index("num_reviews")
        assert tables([after])[:, reviewed].any()


def test_only_the_head_is_kept_and_mixed_rows_are_refused(period: Period) -> None:
    assert {len(one.product_ids) for one in asked(period, period.prepared, depth=5)} == {5}
    found = open_artifact(period.valid, "candidates")
    rows = candidates_of(found)
    mixed = rows.take(pa.array(np.random.default_rng(0).permutation(rows.num_rows)))
    with pytest.raises(AskedError, match="sort them"):
        list(asked_lists(mixed, queries_of(found), open_index(period.index), 12))


def test_queries_that_are_no_reviews_are_named(period: Period) -> None:
    with pytest.raises(AskedError, match="'nobody'"):
        query_times(open_artifact(period.prepared, "prepared"), ["valid-001", "nobody"])


def test_labels_follow_their_products(period: Period) -> None:
    some = asked(period, period.prepared)[:30]
    judgments = open_artifact(period.valid, "candidates").table("judgments.parquet")
    lists, gains, names = as_lists(some, Labelled.of(judgments))
    wanted = dict(zip(judgments["query_id"].to_pylist(), judgments["product_id"].to_pylist(), strict=True))
    assert gains == (0.0, 1.0)
    assert names == [one.query_id for one in some]
    own = [product == wanted[one.query_id] for one in some for product in one.product_ids]
    assert lists.labels.tolist() == [int(one) for one in own]
    assert np.array_equal(lists.features, tables(some), equal_nan=True)


def test_some_queries_are_learned_without_the_cross_encoder(period: Period) -> None:
    some = [Asked(**{**one.__dict__, "cross": np.ones(len(one.product_ids), np.float32)})
            for one in asked(period, period.prepared)]
    nothing = Labelled.of(conform(pa.table({"query_id": ["x"], "product_id": ["p"], "gain": [1.0]}), JUDGMENT, "j"))
    lists, _, _ = as_lists(some, nothing, without_cross=0.3)
    late = np.split(np.isnan(lists.features[:, FEATURES.index("cross_score")]), np.cumsum(lists.sizes)[:-1])
    assert all(one.all() or not one.any() for one in late)      # whole lists
    assert 0.15 < np.mean([one.all() for one in late]) < 0.45
    assert not np.isnan(as_lists(some, nothing)[0].features[:, FEATURES.index("cross_score")]).any()


def test_what_was_not_shown_is_not_learned_from(period: Period) -> None:
    one = asked(period, period.prepared)[0]
    shown = {one.product_ids[3]: 1, one.product_ids[5]: 2}
    lists, gains, _ = as_lists([one], Labelled({one.query_id: {one.product_ids[5]: 2.0}}, {one.query_id: shown}))
    assert lists.sizes.tolist() == [2]
    assert lists.positions is not None
    assert lists.positions.tolist() == [1, 2]
    assert lists.labels.tolist() == [0, 1]
    assert gains == (0.0, 2.0)


def test_answers_are_the_places_of_the_reranker(period: Period) -> None:
    one = asked(period, period.prepared)[0]
    assert retrieved(one)["product_id"].to_pylist() == one.product_ids
    answer = reranked(one, Reranker(RerankConfig(one_title=False)))
    assert answer["product_id"].to_pylist() == one.product_ids
    assert answer["rank"].to_pylist() == list(range(1, len(one.product_ids) + 1))
