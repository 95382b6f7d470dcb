"""The time split and the check that nothing of later reviews is in the texts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from recsys_ray.data.splits import (
    HOUR_MS,
    LeakError,
    SplitConfig,
    check_no_leak,
    find_cuts,
    hour_histogram,
    split_names,
)


def test_shares_are_reached_at_the_end_of_an_hour() -> None:
    times = np.arange(100, dtype=np.int64) * HOUR_MS + 5        # one review in each of 100 hours
    cuts = find_cuts([hour_histogram(times[:30]), hour_histogram(times[30:])], SplitConfig())
    assert cuts == (80 * HOUR_MS - 1, 90 * HOUR_MS - 1)
    names = split_names(times, cuts).to_pylist()
    assert [names.count(name) for name in ("train", "valid", "test")] == [80, 10, 10]


def test_given_cuts_are_used_to_the_millisecond() -> None:
    config = SplitConfig(train_end_ms=1621867671638, valid_end_ms=1643212573029)
    assert find_cuts([], config) == (1621867671638, 1643212573029)
    times = np.array([1621867671638, 1621867671639, 1643212573029, 1643212573030])
    assert split_names(times, (1621867671638, 1643212573029)).to_pylist() == ["train", "valid", "valid", "test"]


def test_no_reviews_no_cuts() -> None:
    assert find_cuts([], SplitConfig()) is None
    assert find_cuts([hour_histogram(np.array([], dtype=np.int64))], SplitConfig()) is None


@given(st.lists(st.integers(0, 10**13), min_size=1, max_size=60), st.integers(0, 60))
def test_split_follows_time_and_any_division_into_files_gives_the_same(times: list[int], at: int) -> None:
    stamps = np.array(times, dtype=np.int64)
    cuts = find_cuts([hour_histogram(stamps)], SplitConfig())
    assert cuts == find_cuts([hour_histogram(stamps[at:]), hour_histogram(stamps[:at])], SplitConfig())
    assert cuts is not None
    names = np.array(split_names(stamps, cuts).to_pylist())
    assert (stamps[names == "train"] <= cuts[0]).all()
    assert (stamps[names != "train"] > cuts[0]).all()
    assert (names == "train").sum() >= 0.8 * len(times) - 1e-9


@pytest.mark.parametrize("wrong", [{"train_end_ms": 5}, {"train_end_ms": 9, "valid_end_ms": 9},
                                   {"train_share": 0.9, "valid_share": 0.1}, {"train_share": 0}])
def test_inconsistent_splits_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        SplitConfig.model_validate(wrong)


def test_a_leak_is_an_error_that_names_the_reviews() -> None:
    check_no_leak(["r1", "r2"], {"r3"}, "product_text/bucket-00000.parquet")
    with pytest.raises(LeakError, match=r"product_text/bucket-00000.*1 valid or test review.*r2"):
        check_no_leak(["r1", "r2"], {"r2", "r3"}, "product_text/bucket-00000.parquet")
