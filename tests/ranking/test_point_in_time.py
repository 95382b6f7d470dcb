"""Statistics as of a moment: equal to a plain recomputation, and blind to everything later."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ray.data.buckets import ReviewStatistics
from recsys_ray.ranking.point_in_time import point_in_time

REVIEW = st.tuples(st.integers(0, 3), st.one_of(st.none(), st.sampled_from([1.0, 2.5, 4.3, 5.0])), st.booleans(),
                   st.one_of(st.none(), st.text(max_size=20)), st.integers(0, 12))
ASKED = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 13)), min_size=1, max_size=8)


def table(rows: list[tuple[Any, ...]]) -> pa.Table:
    schema = pa.schema([("row_id", pa.int64()), ("rating", pa.float32()), ("verified", pa.bool_()),
                        ("text", pa.string()), ("timestamp_ms", pa.int64())])
    return pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema=schema)


@settings(max_examples=60)
@given(st.lists(REVIEW, max_size=25), ASKED)
def test_they_are_those_of_the_earlier_reviews(rows: list[tuple[Any, ...]], asked: list[tuple[int, int]]) -> None:
    found = point_in_time(table(rows), *np.array(asked, np.int64).T).to_pylist()
    for (product, moment), one in zip(asked, found, strict=True):
        stats = ReviewStatistics(np.array([product], np.int64))
        mine = [row for row in rows if row[0] == product and row[4] < moment]
        stats.add(np.zeros(len(mine), np.int64), {
            "rating": np.array([np.nan if row[1] is None else np.float32(row[1]) for row in mine], np.float64),
            "verified": np.array([row[2] for row in mine], np.float64),
            "chars": np.array([len(row[3] or "") for row in mine], np.float64)},
            np.array([row[4] for row in mine], np.int64))
        expected = {name: column[0].as_py() for name, column in stats.columns().items()}
        assert (one["row_id"], one["as_of_ms"]) == (product, moment)
        for name, value in expected.items():
            assert one[name] == (None if value is None else pytest.approx(value, abs=1e-6)), name


@settings(max_examples=60)
@given(st.lists(REVIEW, max_size=25), st.lists(REVIEW, max_size=25), ASKED, st.randoms())
def test_a_shuffled_future_changes_not_one_bit(rows: list[tuple[Any, ...]], other: list[tuple[Any, ...]],
                                               asked: list[tuple[int, int]], random: Any) -> None:
    moment = 6
    row_ids, now = np.array([one for one, _ in asked], np.int64), np.full(len(asked), moment, np.int64)
    past = [row for row in rows if row[4] < moment]
    future = [row for row in other if row[4] >= moment]
    mixed = past + future
    random.shuffle(mixed)
    if len({(row[0], row[4]) for row in past}) == len(past):     # else rows of one moment may be added in any order
        assert point_in_time(table(mixed), row_ids, now).equals(point_in_time(table(past), row_ids, now))


def test_a_review_does_not_know_itself() -> None:
    found = point_in_time(table([(1, 5.0, True, "abc", 10)]), np.array([1, 1]), np.array([10, 11]))
    assert found["num_reviews"].to_pylist() == [0, 1]
    assert found["rating_mean"].to_pylist() == [None, 5.0]
    assert found["last_review_ms"].to_pylist() == [None, 10]


def test_nothing_asked_and_nothing_known() -> None:
    nothing = np.zeros(0, np.int64)
    assert point_in_time(table([]), nothing, nothing).num_rows == 0
    assert point_in_time(table([]), np.array([3]), np.array([4]))["num_reviews"].to_pylist() == [0]
