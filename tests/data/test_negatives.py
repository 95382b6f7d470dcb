"""Which candidates become negatives: never a product that would have done as well."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from recsys_ray.data.negatives import (
    Candidates,
    MiningCounts,
    NegativesConfig,
    PairedGroups,
    ceiling,
    choose_mined,
    choose_random,
    query_hashes,
    with_negatives,
)
from recsys_ray.data.pairs import pair_row, pair_table


def candidates(dense: list[float], lexical: list[float] | None = None, groups: list[int] | None = None) -> Candidates:
    ids = np.arange(100, 100 + len(dense), dtype=np.int64)
    return Candidates(ids, ids if groups is None else np.array(groups, np.int64), np.array(dense, np.float32),
                      np.array(lexical if lexical is not None else [0.0] * len(dense), np.float32))


def choose(found: Candidates, positive: float, wrong: set[int] | None = None, **change: object) -> list[int]:
    config = NegativesConfig.model_validate({"mined": 3, "max_score_ratio": 0.9, **change})
    return choose_mined(found, positive, wrong or set(), config, "pair", MiningCounts()).tolist()


@pytest.mark.parametrize(("positive", "expected"), [(0.8, 0.72), (0.0, 0.0), (-0.5, -0.55)])
def test_the_ceiling_lies_below_the_positive_whatever_its_sign(positive: float, expected: float) -> None:
    assert ceiling(positive, 0.9) == pytest.approx(expected)
    assert ceiling(positive, 0.9, 0.1) == pytest.approx(expected - 0.1)


def test_the_hardest_below_the_ceiling_are_taken() -> None:
    found = candidates([0.95, 0.6, 0.71, 0.72, 0.3, 0.65])
    assert choose(found, 0.8) == [2, 5, 1]      # 0.72 is the ceiling itself
    assert choose(found, 0.8, max_score_ratio=2.0) == [0, 3, 2]
    assert choose(found, 0.1) == []


def test_ranks_are_counted_without_what_is_never_a_negative() -> None:
    found = candidates([0.9, 0.8, 0.7, 0.6, 0.5], groups=[1, 2, 3, 4, 5])
    assert choose(found, 10.0, {1}, first_rank=2, last_rank=3) == [2, 3]
    assert choose(found, 10.0, {1, 2, 3, 4, 5}) == []


def test_one_negative_of_a_group_is_enough() -> None:
    assert choose(candidates([0.9, 0.8, 0.7, 0.6], groups=[7, 7, 7, 8]), 10.0) == [0, 3]


def test_bm25_adds_its_window_and_the_dense_score_judges_it() -> None:
    found = candidates([0.9, 0.1, 0.2, 0.95], lexical=[0.0, 5.0, 0.0, 9.0])
    assert choose(found, 1.0, last_rank=1) == []    # the first of both lists is too close
    assert choose(found, 1.0, last_rank=2) == [1]   # as is the second of the dense list, not the second of BM25's
    assert choose(found, 1.0, last_rank=2, max_score_ratio=0.91) == [0, 1]
    assert choose(found, 1.0, last_rank=2, max_score_ratio=0.91, lexical=False) == [0]


def test_a_draw_from_the_window_is_seeded_by_the_pair() -> None:
    found = candidates([i / 100 for i in range(60)])
    config = NegativesConfig(mined=5, pick="random", max_score_ratio=1.0)
    drawn = [choose_mined(found, 1.0, set(), config, name, MiningCounts()).tolist() for name in ("a", "a", "b")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) <= set(range(10, 60))      # the fifty best


@given(st.lists(st.floats(-1, 1, width=32), max_size=40), st.floats(-1, 1, width=32),
       st.lists(st.integers(0, 9), min_size=40, max_size=40), st.sets(st.integers(0, 9)))
def test_no_choice_breaks_a_rule(dense: list[float], positive: float, groups: list[int], wrong: set[int]) -> None:
    found = candidates(dense, [abs(score) for score in dense], groups[: len(dense)])
    counts = MiningCounts()
    config = NegativesConfig(last_rank=20, min_margin=0.01)
    chosen = choose_mined(found, positive, wrong, config, "pair", counts)
    assert (found.dense_scores[chosen] < positive).all()
    assert not wrong & set(found.groups[chosen].tolist())
    assert len(set(found.groups[chosen].tolist())) == len(chosen) <= config.mined
    assert counts.mined == len(chosen)
    assert counts.too_close <= counts.in_window
    assert list(counts.kept_at.values()) == sorted(counts.kept_at.values())


def test_counts_say_what_each_fraction_would_keep() -> None:
    counts = MiningCounts()
    choose_mined(candidates([0.99, 0.85, 0.75, 0.65]), 1.0, set(), NegativesConfig(mined=4), "a", counts)
    total = MiningCounts()
    total.add(counts)
    total.add(MiningCounts(**json.loads(json.dumps(asdict(counts)))))
    assert total.pairs == 2
    assert total.summary()["kept_at"] == {"0.6": 0, "0.7": 0.25, "0.8": 0.5, "0.9": 0.75, "0.95": 0.75, "1": 1.0}
    assert total.summary()["refused_share"] == 0.25
    assert total.summary()["short_share"] == 1.0


def test_random_negatives_are_of_other_groups_and_repeat() -> None:
    pool = np.arange(50, dtype=np.int64)
    groups = pool // 2
    chosen = choose_random(pool, groups, {0, 1, 2}, 6, "pair", 1)
    assert len({int(groups[place]) for place in chosen}) == 6
    assert not {0, 1, 2} & {int(groups[place]) for place in chosen}
    assert chosen.tolist() == choose_random(pool, groups, {0, 1, 2}, 6, "pair", 1).tolist()
    assert chosen.tolist() != choose_random(pool, groups, {0, 1, 2}, 6, "other", 1).tolist()
    assert choose_random(pool[:2], groups[:2], {0}, 6, "pair", 1).tolist() == []
    assert choose_random(pool[:0], groups[:0], set(), 6, "pair", 1).tolist() == []


def test_a_query_paired_with_several_products_knows_them_all() -> None:
    hashes = query_hashes(pa.chunked_array([["Love it", "a couch", "love  IT", "love it"]]))
    assert len(set(hashes.tolist())) == 2
    paired = PairedGroups.of(hashes, np.array([5, 6, 7, 5], np.int64))
    again = PairedGroups(*(column.to_numpy() for column in paired.table().columns))
    assert again.of_query(int(hashes[0])) == {5, 7}
    assert again.of_query(int(hashes[1])) == set()
    assert PairedGroups.of(np.zeros(0, np.int64), np.zeros(0, np.int64)).of_query(3) == set()


def test_negatives_are_filled_in_or_added() -> None:
    row = pair_row("p", "q", "title", {"row_id": 1, "product_id": "a", "group_id": 1}, "t", "train")
    pairs = pair_table([{**row, "negative_row_ids": [3], "negative_texts": ["x"], "negative_group_ids": [3]}])
    added = [([4, 5], ["y", "z"], [4, 4])]
    assert with_negatives(pairs, added, keep=True)["negative_row_ids"].to_pylist() == [[3, 4, 5]]
    replaced = with_negatives(pairs, added, keep=False)
    assert replaced["negative_texts"].to_pylist() == [["y", "z"]]
    assert replaced.schema == pairs.schema


@pytest.mark.parametrize(("values", "message"), [({"first_rank": 9, "last_rank": 8}, "lies before"),
                                                 ({"mined": 0, "random": 0}, "nothing would be added")])
def test_a_window_without_ranks_is_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        NegativesConfig.model_validate(values)
