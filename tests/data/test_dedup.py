"""Duplicates: bands, groups, and which of several rows with one id stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys_ray.data.dedup import (
    BANDS,
    NearDuplicateConfig,
    band_keys,
    close_pairs,
    groups_of_pairs,
    one_row_per_id,
    pairs_of_bands,
    signature_text,
)
from recsys_ray.data.preprocess import CLEAN_PRODUCT
from recsys_ray.ids import row_id

CONFIG = NearDuplicateConfig()


def groups(texts: list[str], config: NearDuplicateConfig = CONFIG) -> dict[int, int]:
    bands = band_keys(texts, np.arange(len(texts), dtype=np.int64), config)
    pairs, _ = pairs_of_bands(bands, config.max_bucket)
    return groups_of_pairs([close_pairs(pairs, config.shared_bands())])


def pair_with(similarity: float, number: int) -> list[str]:
    """Two texts of 60 words each whose word sets have this Jaccard similarity: s / (120 - s) for s shared words."""
    shared = round(120 * similarity / (1 + similarity))
    both = [f"w{number}x{at}" for at in range(shared)]
    return [" ".join([*both, *(f"{side}{number}x{at}" for at in range(60 - shared))]) for side in ("left", "right")]


def found_share(similarity: float, pairs: int = 60) -> float:
    texts = [text for number in range(pairs) for text in pair_with(similarity, number)]
    found = groups(texts)
    assert all(found[row] // 2 == row // 2 for row in found), "texts of different pairs have no word in common"
    return len(found) / len(texts)


def test_similar_texts_are_found_and_others_are_not() -> None:
    # A pair shares 32 s^8 bands on average (5 asked for): 14 at .9, 5 at .8, .1 at .5.
    assert found_share(0.9) > 0.9
    assert 0.25 < found_share(0.8) < 0.85
    assert found_share(0.5) == 0


def test_bands_asked_for_are_those_of_a_pair_at_the_threshold() -> None:
    assert CONFIG.shared_bands() == 5           # 32 * .8^8 = 5.4
    assert NearDuplicateConfig(threshold=0.01).shared_bands() == 1


def test_word_order_and_case_do_not_matter_and_short_texts_are_left_alone() -> None:
    assert groups(["one two three four five six", "SIX five four three two one", "a b", "a b"]) == {0: 0, 1: 0}
    assert band_keys(["a b c"], np.array([1]), CONFIG).equals(BANDS.empty_table())


def test_a_full_band_stays_linear_and_still_finds_repeated_listings() -> None:
    texts = ["the very same listing again and again"] * 50
    bands = band_keys(texts, np.arange(50, dtype=np.int64), CONFIG)
    pairs, overfull = pairs_of_bands(bands, max_bucket=10)
    assert overfull == CONFIG.bands
    assert pairs.num_rows == 49                 # each with the first, not 50 * 49 / 2
    assert groups_of_pairs([close_pairs(pairs, CONFIG.shared_bands())]) == dict.fromkeys(range(50), 0)
    assert pairs_of_bands(bands, max_bucket=50)[1] == 0


def test_groups_join_chains_over_tables() -> None:
    def pairs(*rows: tuple[int, int, int]) -> pa.Table:
        return pa.table({"left": [row[0] for row in rows], "right": [row[1] for row in rows],
                         "shared": pa.array([row[2] for row in rows], pa.int64())})

    # 5-9 shares 2 + 1 bands, 9-12 shares 3; 20-21 shares too few.
    close = close_pairs(pairs((5, 9, 2), (20, 21, 2), (5, 9, 1), (9, 12, 3)), 3)
    assert sorted(close["shared"].to_pylist()) == [3, 3]
    assert groups_of_pairs([close.slice(0, 1), close.slice(1)]) == {5: 5, 9: 5, 12: 5}
    assert groups_of_pairs([]) == groups_of_pairs([pairs_of_bands(BANDS.empty_table(), 5)[0]]) == {}


def product(name: str, title: str, source: str, row: int | None = None) -> dict[str, Any]:
    return {"product_id": name, "row_id": row_id(name) if row is None else row, "title": title, "_source": source}


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=CLEAN_PRODUCT)


ROWS = [product("a", "short", "f:1"), product("a", "a longer title", "f:2"), product("a", "short", "f:3"),
        product("b", "only", "f:4"), product("a", "a longer title", "f:5")]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]])
def test_one_row_per_id_whatever_the_order(order: list[int]) -> None:
    kept, conflicts, repeated = one_row_per_id(table(*(ROWS[at] for at in order)))
    assert kept["row_id"].to_pylist() == sorted([row_id("a"), row_id("b")])
    assert {row["product_id"]: row["_source"] for row in kept.to_pylist()} == {"a": "f:2", "b": "f:4"}
    assert conflicts["_source"].to_pylist() == ["f:1"]      # said once, in conflict; f:3 and f:5 repeat
    assert repeated == 2
    assert kept.num_rows + conflicts.num_rows + repeated == len(ROWS)


def test_an_empty_bucket_has_no_rows() -> None:
    kept, conflicts, repeated = one_row_per_id(table())
    assert (kept.num_rows, conflicts.num_rows, repeated) == (0, 0, 0)


def test_two_products_with_one_row_id_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"'a' and 'b' have the same row id 5"):
        one_row_per_id(table(product("b", "x", "f:1", 5), product("a", "y", "f:2", 5)))


def test_signature_text_has_what_describes() -> None:
    fields = {"title": "Mug", "description": None, "features": ["blue", "clay"], "ingredients": "water"}
    assert signature_text(fields) == "Mug blue clay water"
