"""value@10 against worked examples and brute force, chance, collapse, slices judged together, shuffled rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys_ray.evaluation.attributes import (
    AttributeMetricError,
    aligned,
    attribute_figures,
    average_precisions,
    chance_level,
    chance_precision,
    slice_gate,
    top_products,
)
from recsys_ray.evaluation.significance import Resampling
from recsys_ray.evaluation.slice_gate import SliceError, Target, scoreboard, stack
from recsys_ray.schema import ATTRIBUTE_ROW, conform

KINDS = ("dress", "shirt", "coat")


def rows_of(**columns: Any) -> pa.Table:
    count = len(next(iter(columns.values())))
    return conform(pa.table({"product_id": [f"p{at}" for at in range(count)], "evidence": [[]] * count, **columns}),
                   ATTRIBUTE_ROW, "rows")


def shop(count: int = 300, seed: int = 3, noise: float = 0.5) -> tuple[np.ndarray, pa.Table]:
    """Vectors that tell the kind (and less of it the neckline) of products in random order."""
    random = np.random.default_rng(seed)
    kind, neck = random.integers(0, 3, count), random.integers(0, 2, count)
    centres = random.normal(size=(5, 8))
    vectors = centres[kind] + 0.6 * centres[3 + neck] + noise * random.normal(size=(count, 8))
    return vectors.astype(np.float32), rows_of(category2=[KINDS[one] for one in kind],
                                               neckline=[("crew", "v neck")[one] for one in neck])


def test_a_worked_example() -> None:
    """On a line of angles the neighbours of p0 are p1, p2, p3 in this order; p1 is of its group."""
    angles = np.radians([0, 1, 2, 3, 40])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    rows = rows_of(category2=["dress", "dress", "dress", "shirt", "graphic"],
                   material=["silk", "silk", None, "wool", "silk"], group_key=["g", "g", None, None, None])
    found = attribute_figures(vectors, rows, vectors, rows, depth=2)
    assert found["category2"][0] == 0.5         # p2 a dress, p3 a shirt
    assert found["material"][0] == 0.5          # p3 wool, p4 silk: p2's material is not known
    assert np.isnan(found["category2"][4])      # graphic is no kind
    assert np.isnan(found["sleeve"]).all()
    assert attribute_figures(vectors, rows, vectors, rows, depth=2, leave_out="product")["category2"][0] == 1.0
    assert attribute_figures(vectors, rows, vectors, rows, depth=9)["category2"][0] == 0.5      # all there are
    assert top_products(vectors, rows, vectors, rows, depth=4)[0].tolist() == [2, 3, 4, -1]
    # the order p2 (dress), p3, p4 is not asked: one relevant at rank 1
    assert average_precisions(vectors, rows, vectors, rows)[0] == 1.0
    chance = chance_level(rows, rows)
    assert chance["category2"][0] == 0.5        # p2 of {p2, p3}
    assert chance["category2"][2] == pytest.approx(2 / 3)
    assert chance["material"][0] == 0.5         # p4 of {p3, p4}


def test_figures_equal_a_plain_loop() -> None:
    vectors, rows = shop(80)
    found = attribute_figures(vectors, rows, vectors, rows)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for name in ("category2", "neckline"):
        own = rows[name].to_pylist()
        for at in range(80):
            order = [one for one in np.argsort(-(unit @ unit[at])).tolist() if one != at][:10]
            assert found[name][at] == pytest.approx(np.mean([own[one] == own[at] for one in order]))


def test_collapsed_vectors_reach_chance_and_no_more() -> None:
    """Rows sorted by kind would flatter vectors that are all the same, if ties fell by the order of rows."""
    _, rows = shop()
    rows = rows.sort_by("category2")
    for collapsed in (np.ones((300, 8), np.float32), np.zeros((300, 8), np.float32)):
        found = attribute_figures(collapsed, rows, collapsed, rows)
        np.testing.assert_allclose(found["category2"], chance_level(rows, rows)["category2"])


def test_the_average_precision_of_chance_is_that_of_random_orders() -> None:
    _, rows = shop(9)
    random = np.random.default_rng(0)
    drawn = np.mean([average_precisions(noise, rows, noise, rows) for noise in random.normal(
        size=(1200, 9, 16)).astype(np.float32)], axis=0)
    np.testing.assert_allclose(chance_precision(rows, rows), drawn, atol=0.03)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda vectors: np.where(np.arange(8) == 2, np.nan, vectors), "vector of p0"),
    (lambda vectors: vectors[:-1], "shape"),
])
def test_vectors_that_are_none_are_refused(spoil: Any, message: str) -> None:
    vectors, rows = shop()
    with pytest.raises(AttributeMetricError, match=message):
        attribute_figures(spoil(vectors), rows, vectors, rows)


# --- alignment ------------------------------------------------------------------------------------
def test_shuffled_rows_are_caught() -> None:
    vectors, rows = shop(800)
    assert aligned(vectors, rows)
    random = np.random.default_rng(0)
    shuffled = rows.take(pa.array(random.permutation(800)))
    assert "not those of the vectors" in aligned(vectors, shuffled).reason
    assert not aligned(vectors, rows, ids=shuffled["product_id"].to_pylist())
    assert not aligned(np.ones_like(vectors), rows)                     # collapsed


def test_a_shifted_part_is_caught_and_named() -> None:
    vectors, rows = shop(1600)
    order = np.arange(1600)
    order[1200:] = np.roll(order[1200:], 1)
    found = aligned(vectors, rows.take(pa.array(order)))
    assert not found
    assert all(first >= 1200 for first, _ in found.bad_rows)
    assert found.bad_rows


def test_rows_in_order_of_kind_or_without_values_are_no_misalignment() -> None:
    vectors, rows = shop(1600)
    order = np.argsort(rows["category2"].to_numpy(zero_copy_only=False), kind="stable")
    assert aligned(vectors[order], rows.take(pa.array(order)))
    silent = [None if at < 400 else one for at, one in enumerate(rows["category2"].to_pylist())]
    assert aligned(vectors, rows_of(category2=silent))


# --- the gate -------------------------------------------------------------------------------------
def gate(drop: float, units: int = 200, rows: int = 600, seed: int = 0, **options: Any) -> dict[str, str]:
    random = np.random.default_rng(seed)
    unit = random.integers(0, units, rows)
    frozen = random.uniform(0.3, 0.7, rows)
    half = np.arange(rows) < rows // 2
    trained = frozen + random.normal(0, 0.05, rows) + np.where(half, drop, 0.2)
    tiny = np.arange(rows) < 5
    found = slice_gate(frozen, trained, unit, {"a": half, "b": ~half, "tiny": tiny}, **options)
    return {one.slice: one.outcome for one in found}


def test_a_slice_below_the_frozen_model_is_worse_and_a_small_one_undecidable() -> None:
    assert gate(-0.1, margin=0.03) == {"a": "worse", "b": "improved", "tiny": "undecidable"}
    assert gate(0.0, margin=0.03) == {"a": "kept", "b": "improved", "tiny": "undecidable"}
    assert gate(-0.03, margin=0.03)["a"] == "undecidable"


def test_rows_of_one_sender_are_one_unit() -> None:
    """The same figures from 20 senders instead of 300 decide nothing."""
    assert gate(-0.1, units=20, margin=0.03)["a"] == "undecidable"


def test_several_trainings_are_judged_together() -> None:
    """One collapse among three seeds is a loss, and a wider interval than three equal ones have."""
    random = np.random.default_rng(2)
    frozen, noise = random.uniform(0.3, 0.7, 300), random.normal(0, 0.02, (3, 300))
    whole = {"all": np.ones(300, bool)}
    same, = slice_gate(frozen, frozen + noise + 0.05, np.arange(300), whole)
    mixed, = slice_gate(frozen, frozen + noise + np.array([[0.05], [0.05], [-0.4]]), np.arange(300), whole)
    assert (same.outcome, mixed.outcome) == ("improved", "undecidable")
    assert mixed.high - mixed.low > 5 * (same.high - same.low)


def test_bounds_hold_for_all_slices_at_once() -> None:
    """Of experiments with 20 slices each and no difference at all, about one in twenty finds one, not two in three."""
    random = np.random.default_rng(1)
    slices = {f"s{number}": np.arange(1200) % 20 == number for number in range(20)}
    unit = np.arange(1200) // 20 * 20 + np.arange(1200) % 20
    wrong = 0
    for _ in range(40):
        noise = random.normal(0, 1, 1200)
        found = slice_gate(np.zeros(1200), noise, unit, slices, margin=0.0, draws=Resampling(samples=300))
        wrong += any(one.outcome in ("worse", "improved") for one in found)
    assert wrong <= 9


def test_slices_are_named_and_unknown_ones_refused() -> None:
    vectors, rows = shop(90)
    figures = {"frozen": attribute_figures(vectors, rows, vectors, rows)}
    stacked = stack(figures, rows, range(90), ["neckline", "category2=coat", "neckline of category2=coat"])
    assert stacked.masks["neckline"].sum() == 90
    assert stacked.masks["category2=coat"].sum() == stacked.masks["neckline of category2=coat"].sum()
    assert {"category2=dress", "neckline=crew"} <= set(stack(figures, rows, range(90)).masks)
    for wrong in ("colour", "category2=cape", "neckline of dress"):
        with pytest.raises(SliceError, match="slice"):
            stack(figures, rows, range(90), [wrong])


def test_the_scoreboard_has_chance_frozen_and_trained_beside_each_other() -> None:
    vectors, rows = shop(400, noise=1.5)
    better, _ = shop(400, noise=0.3)
    frozen, trained = (attribute_figures(one, rows, one, rows) for one in (vectors, better))
    board = scoreboard(frozen, trained, chance_level(rows, rows), rows, range(400), targets=[
        Target("neckline", 0.05), Target("category2=coat", 0.9), Target("material=denim", 0.1)])
    first = next(row for row in board["rows"] if row["slice"] == "category2")
    assert first["chance"]["mean"] == pytest.approx(1 / 3, abs=0.02)
    assert first["chance"]["mean"] < first["frozen"]["low"] <= first["frozen"]["mean"] < first["trained"]["mean"]
    assert first["verdict"]["outcome"] == "improved"
    assert [one["outcome"] for one in board["targets"]] == ["reached", "missed", "not measured"]
    assert board["gate"]["passed"]
    collapsed = np.ones_like(vectors)
    board = scoreboard(frozen, attribute_figures(collapsed, rows, collapsed, rows), chance_level(rows, rows), rows,
                       range(400))
    assert not board["gate"]["passed"]
    assert "category2" in board["gate"]["worse"]
