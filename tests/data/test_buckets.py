"""Scattering and gathering, the first reviews of each product, and statistics that add up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_ray.data import buckets
from recsys_ray.data.buckets import ReviewStatistics, first_per_group, gather, gather_all, scatter


def rows_of(numbers: list[int]) -> pa.Table:
    return pa.table({"row_id": pa.array(numbers, pa.int64()), "text": [f"row {number}" for number in numbers]})


def parts_of(directory: Path, *blocks: list[int]) -> list[buckets.Part]:
    found = [scatter(rows_of(block), (np.array(block) % 4).astype(np.int32), directory) for block in blocks]
    return [part for part in found if part is not None]


def test_what_is_scattered_is_gathered_bucket_by_bucket(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, [9, 4, 5, 8], [1, 2], [])
    schema = rows_of([]).schema
    assert [part.buckets for part in parts] == [(0, 1), (1, 2)]
    rows = [gather_all(parts, bucket, schema)["row_id"].to_pylist() for bucket in range(4)]
    assert rows == [[4, 8], [9, 5, 1], [2], []]
    assert gather_all(parts, 3, schema, ["text"]).schema == pa.schema([schema.field("text")])
    assert gather_all(parts, 2, schema, ["text"])["text"].to_pylist() == ["row 2"]


def test_a_retry_writes_the_same_file(tmp_path: Path) -> None:
    assert parts_of(tmp_path, [1, 2, 3]) == parts_of(tmp_path, [1, 2, 3])
    assert len(list(tmp_path.iterdir())) == 1


def test_a_bucket_is_gathered_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "GATHERED_ROWS", 4)
    parts = parts_of(tmp_path, *([4 * at, 4 * at + 4, 4 * at + 8] for at in range(5)))
    assert [block.num_rows for block in gather(parts, 0)] == [6, 6, 3]


def test_the_first_of_each_group() -> None:
    groups, keys = np.array([7, 3, 7, 7, 3]), np.array([5, 9, 1, 3, 2])
    assert first_per_group(groups, keys, 2).tolist() == [4, 1, 2, 3]    # group 3: keys 2, 9; group 7: keys 1, 3
    assert first_per_group(groups, keys, 0).tolist() == []
    assert first_per_group(np.array([], np.int64), np.array([], np.int64), 2).tolist() == []


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 10**6)), max_size=40, unique_by=lambda row: row[1]),
       st.integers(0, 40), st.integers(0, 4))
def test_choosing_block_by_block_equals_choosing_at_once(rows: list[tuple[int, int]], at: int, limit: int) -> None:
    both = np.array(rows, dtype=np.int64).reshape(-1, 2)
    once = both[first_per_group(both[:, 0], both[:, 1], limit)]
    head = both[:at][first_per_group(both[:at, 0], both[:at, 1], limit)]
    joined = np.concatenate([head, both[at:]])
    assert joined[first_per_group(joined[:, 0], joined[:, 1], limit)].tolist() == once.tolist()


REVIEW = st.tuples(st.integers(0, 2), st.one_of(st.none(), st.sampled_from([1.0, 2.5, 5.0])), st.booleans(),
                   st.integers(0, 900), st.integers(0, 10**12))


@given(st.lists(REVIEW, max_size=30), st.integers(0, 30))
def test_statistics_equal_a_plain_recomputation(rows: list[tuple[int, float | None, bool, int, int]], at: int) -> None:
    stats = ReviewStatistics(np.arange(3, dtype=np.int64))
    for block in (rows[:at], rows[at:]):
        places, ratings, verified, chars, times = (list(column) for column in zip(*block, strict=True)) if block \
            else ([], [], [], [], [])
        stats.add(np.array(places, np.int64), {
            "rating": np.array([np.nan if rating is None else rating for rating in ratings], np.float64),
            "verified": np.array(verified, np.float64), "chars": np.array(chars, np.float64),
        }, np.array(times, np.int64))
    found = {name: column.to_pylist() for name, column in stats.columns().items()}
    for place in range(3):
        mine = [row for row in rows if row[0] == place]
        rated = np.array([row[1] for row in mine if row[1] is not None])
        assert found["num_reviews"][place] == len(mine)
        assert found["last_review_ms"][place] == max((row[4] for row in mine), default=None)
        expected = {"rating_mean": rated.mean() if len(rated) else None,
                    "rating_std": rated.std() if len(rated) else None,
                    "verified_share": np.mean([row[2] for row in mine]) if mine else None,
                    "mean_review_chars": np.mean([row[3] for row in mine]) if mine else None}
        for name, value in expected.items():
            assert found[name][place] == (None if value is None else pytest.approx(value, abs=1e-6))
