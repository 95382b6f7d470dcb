"""Figures of concern models: each against scikit-learn, intervals that draw groups, lists, and nothing undefined."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn import metrics as sk

from recsys_ray.data.concern_rulebook import load_rules
from recsys_ray.data.concerns import Labeller
from recsys_ray.evaluation import concern_baselines as baselines
from recsys_ray.evaluation.concern_baselines import Part
from recsys_ray.evaluation.concern_lists import compare_lists, duplicate_rate, ranked
from recsys_ray.evaluation.concerns import (
    MACRO,
    METRICS,
    ConcernMetricError,
    ConcernScores,
    ConcernSheet,
    calibration_error,
    compare_macro,
    confusion,
    held_out_sheet,
    measure,
    scores_of_table,
    sheet_of_labels,
    weighted_metrics,
)
from recsys_ray.evaluation.significance import Resampling
from recsys_ray.schema import CONCERN_LABEL, CONCERN_PRODUCT

FEW = Resampling(samples=100)
NAN = float("nan")


def sheet(target: Any, groups: Any = None) -> ConcernSheet:
    matrix = np.array(target, dtype=np.float64)
    names = tuple("abcdefg"[: matrix.shape[1]])
    return ConcernSheet(tuple(f"p{one}" for one in range(len(matrix))),
                        np.arange(len(matrix)) if groups is None else np.array(groups), names, matrix)


def scores(probability: Any, threshold: float = 0.5) -> ConcernScores:
    matrix = np.array(probability, dtype=np.float64)
    return ConcernScores(matrix, np.full(matrix.shape[1], threshold))


def figures(rows: list[dict[str, Any]], system: str, concern: str) -> dict[str, float | None]:
    return {row["metric"]: row["mean"] for row in rows if (row["system"], row["concern"]) == (system, concern)}


def test_weighted_figures_are_scikit_learns_on_repeated_rows() -> None:
    rng = np.random.default_rng(3)
    for case in range(20):
        count = 40
        label = (rng.random(count) < 0.3).astype(np.int64)
        label[:2] = 0, 1
        probability = np.round(rng.random(count), 1 if case % 2 else 6)     # with and without ties
        weight = rng.integers(0, 3, count)
        weight[:2] = 1
        values = weighted_metrics(label, probability, 0.4, weight[None].astype(float))[0]
        found = dict(zip(METRICS, values, strict=True))
        many, p = np.repeat(label, weight), np.repeat(probability, weight)
        said = (p >= 0.4).astype(int)
        expected = {
            "AP": sk.average_precision_score(many, p), "AP lift": sk.average_precision_score(many, p) / many.mean(),
            "ROC AUC": sk.roc_auc_score(many, p), "precision": sk.precision_score(many, said, zero_division=0),
            "recall": sk.recall_score(many, said), "F1": sk.f1_score(many, said),
            "MCC": sk.matthews_corrcoef(many, said), "accuracy": sk.accuracy_score(many, said),
            "Brier": sk.brier_score_loss(many, p), "ECE": calibration_error(many, p)}
        assert found == pytest.approx(expected, abs=1e-12)


def test_a_worked_example() -> None:
    """Order by probability: 1 0 1 0, so AP = (1/1 + 2/3) / 2 = 5/6, AUC = 3 of 4 pairs right."""
    rows = measure(sheet([[1], [0], [1], [0]]), {"x": scores([[0.9], [0.8], [0.6], [0.1]])}, FEW)
    found = figures(rows, "x", "a")
    assert found["AP"] == pytest.approx(5 / 6)
    assert found["AP lift"] == pytest.approx(5 / 3)
    assert found["ROC AUC"] == pytest.approx(3 / 4)
    assert (found["precision"], found["recall"], found["accuracy"]) == pytest.approx((2 / 3, 1, 3 / 4))
    assert found["Brier"] == pytest.approx((0.01 + 0.64 + 0.16 + 0.01) / 4)
    assert found["ECE"] == pytest.approx((0.1 + 0.8 + 0.4 + 0.1) / 4)
    assert figures(rows, "x", MACRO) == pytest.approx(found)


def test_calibration_error_of_one_bin() -> None:
    assert calibration_error(np.array([1, 0, 0, 0]), np.full(4, 0.65)) == pytest.approx(0.4)
    assert calibration_error(np.array([1]), np.array([1.0])) == 0


def test_what_is_undefined_is_none_and_never_nan() -> None:
    target = [[0, NAN, 1], [0, NAN, 0], [0, NAN, 1], [0, NAN, 0]]
    rows = measure(sheet(target), {"x": scores(np.full((4, 3), 0.2))}, FEW)
    json.dumps(rows, allow_nan=False)
    none = figures(rows, "x", "a")
    assert none["AP"] is None
    assert none["F1"] is None
    assert none["accuracy"] == 1
    assert set(figures(rows, "x", "b").values()) == {None}
    assert figures(rows, "x", MACRO)["AP"] == pytest.approx(0.5)
    defined = {row["metric"]: row["concerns"] for row in rows if row["concern"] == MACRO}
    assert (defined["AP"], defined["accuracy"]) == (1, 2)


def test_intervals_draw_groups_and_not_products() -> None:
    """Twenty copies of each product say no more than the product: the interval does not shrink."""
    rng = np.random.default_rng(0)
    label, probability = (rng.random(30) < 0.4).astype(float)[:, None], rng.random((30, 1))
    few = measure(sheet(label), {"x": scores(probability)}, Resampling(samples=400))
    copies = sheet(np.repeat(label, 20, axis=0), np.repeat(np.arange(30), 20))
    many = measure(copies, {"x": scores(np.repeat(probability, 20, axis=0))}, Resampling(samples=400))
    width = [next(row["high"] - row["low"] for row in rows if row["metric"] == "accuracy") for rows in (few, many)]
    assert width[1] == pytest.approx(width[0])
    assert {row["units"] for row in many} == {30}
    ungrouped = measure(sheet(np.repeat(label, 20, axis=0)),
                        {"x": scores(np.repeat(probability, 20, axis=0))}, Resampling(samples=400))
    assert next(row["high"] - row["low"] for row in ungrouped if row["metric"] == "accuracy") < width[0] / 2


def test_a_comparison_with_oneself_is_nothing() -> None:
    rng = np.random.default_rng(1)
    right, one = sheet((rng.random((40, 2)) < 0.4).astype(float)), scores(rng.random((40, 2)))
    found = compare_macro(right, one, one, FEW)
    assert found["AP"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    better = scores(np.where(right.target == 1, 0.9, 0.1))
    assert (compare_macro(right, better, one, FEW)["AP"]["low"] or 0) > 0


def test_confusion() -> None:
    assert confusion(sheet([[1], [0], [1], [0], [NAN]]), scores([[0.9], [0.8], [0.2], [0.1], [0.9]])) == {
        "a": {"true_yes": 1, "false_yes": 1, "false_no": 1, "true_no": 1}}


def table(rows: list[tuple[str, str, float]]) -> pa.Table:
    return pa.table({"product_id": [one for one, _, _ in rows], "concern": [one for _, one, _ in rows],
                     "probability": [one for _, _, one in rows]})


@pytest.mark.parametrize(("rows", "message"), [
    ([("p0", "a", 0.5)], r"sys: no probability for product 'p1' and 'a' \(1 such pairs\)"),
    ([("p0", "a", 0.5), ("p1", "a", 1.5)], r"sys: probability 1\.5 for product 'p1'"),
])
def test_scores_that_do_not_fit_are_named(rows: list[tuple[str, str, float]], message: str) -> None:
    with pytest.raises(ConcernMetricError, match=message):
        scores_of_table(sheet([[1], [0]]), table(rows), "sys")


def labels(*rows: tuple[str, int | None, bool]) -> tuple[pa.Table, pa.Table]:
    products = [{"product_id": one, "row_id": at, "title": one, "ingredients": None, "category": None, "group_id": at,
                 "split": "test"} for at, (one, _, _) in enumerate(rows)]
    told = [{"product_id": one, "concern": "a", "label": label, "rules": [], "conflict": False, "held_out": held_out,
             "split": "test"} for one, label, held_out in rows]
    return pa.Table.from_pylist(products, schema=CONCERN_PRODUCT), pa.Table.from_pylist(told, schema=CONCERN_LABEL)


def test_the_sheet_of_withheld_rules_leaves_other_positives_out() -> None:
    products, told = labels(("known", 1, False), ("withheld", 1, True), ("no", 0, False), ("silent", None, False))
    seed = held_out_sheet(products, told, ["a"], "seed")
    np.testing.assert_array_equal(seed.target[:, 0], [NAN, 1, 0, 0])
    np.testing.assert_array_equal(held_out_sheet(products, told, ["a"], "positive_unlabelled").target[:, 0],
                                  [NAN, 1, 0, NAN])
    np.testing.assert_array_equal(sheet_of_labels(products, told, ["a"], "seed").target[:, 0], [1, 1, 0, 0])


def test_lists_side_by_side() -> None:
    right = sheet([[1], [1], [0], [0], [NAN]], [0, 0, 1, 2, 3])
    ours, theirs = np.array([[0.9], [0.8], [0.2], [0.1], [1.0]]), np.array([[0.1], [0.7], [0.9], [0.8], [1.0]])
    row = compare_lists(right, ours, theirs, 2)[0]
    assert row == {"concern": "a", "k": 2, "relevant": 2, "best": 1.0, "overlap": 0.0, "precision model": 1.0,
                   "duplicates model": 0.5, "precision rules": 0.0, "duplicates rules": 0.0}
    assert ranked(np.array([0.5, NAN, 0.9]), 5).tolist() == [2, 0]
    assert duplicate_rate(np.zeros(3), np.zeros(0, np.int64)) is None
    empty = compare_lists(sheet([[NAN]]), np.array([[0.5]]), np.array([[0.5]]), 3)[0]
    assert empty["precision model"] is None


# --- baselines ------------------------------------------------------------------------------------
def part(count: int = 60) -> Part:
    listed = [f"Aqua, {'Retinol' if at % 3 == 0 else 'Glycerin'}, Filler {at}" for at in range(count)]
    products = pa.table({
        "product_id": [f"p{at}" for at in range(count)], "ingredients": listed, "category": ["Serums"] * count,
        "title": ["wrinkles cream" if at % 3 == 0 else "soap" for at in range(count)]})
    target = np.array([[float(at % 3 == 0), 0.0] for at in range(count)])
    return Part(products, ConcernSheet(tuple(products["product_id"].to_pylist()), np.arange(count),
                                       ("wrinkle", "acne"), target))


BOOK = load_rules().select(["wrinkle", "acne"])


def test_baselines_find_what_they_look_at() -> None:
    known = part()
    asked = known.products
    bag = baselines.bag_of_ingredients(known, known, asked, BOOK.synonyms)
    assert figures(measure(known.sheet, {"x": bag}, FEW), "x", "wrinkle")["AP"] == 1
    assert set(bag.probability[:, 1]) == {0.0}                  # nothing but negatives in training: no model
    fuzzy = baselines.fuzzy_search({"wrinkle": ["wrinkles", "lines"], "acne": ["acne"]}, known, asked)
    assert figures(measure(known.sheet, {"x": fuzzy}, FEW), "x", "wrinkle")["F1"] == 1
    most = baselines.majority(known, asked)
    assert most.probability[0].tolist() == pytest.approx([1 / 3, 0])
    assert figures(measure(known.sheet, {"x": most}, FEW), "x", "wrinkle")["AP"] == pytest.approx(1 / 3)
    assert figures(measure(known.sheet, {"x": most}, FEW), "x", "wrinkle")["AP lift"] == pytest.approx(1)


def test_rules_as_a_score() -> None:
    asked = pa.table({"product_id": ["a", "b", "c"], "title": ["t"] * 3, "category": ["Serums", "Serums", "Shampoos"],
                      "ingredients": ["Aqua, Retinol, Bakuchiol", "Aqua, Retinol", "Aqua, Retinol"]})
    found = baselines.rules(Labeller(BOOK), asked).probability[:, 0]
    assert found.tolist() == pytest.approx([2 / 3, 1 / 2, 0])
    withheld = baselines.rules(Labeller(BOOK), asked, ["ingredient/retinoids"]).probability[:, 0]
    assert withheld.tolist() == pytest.approx([1 / 2, 0, 0])


def test_the_planted_oracle() -> None:
    truth = pa.table({"product_id": ["a", "b"], "concern": ["acne"] * 2, "strength": [0.5, 2.0]})
    assert baselines.planted_oracle(truth, ["b", "a"], ["acne"]).probability.tolist() == [[0.8], [0.5]]
    with pytest.raises(ValueError, match=r"no strength of \('c', 'acne'\)"):
        baselines.planted_oracle(truth, ["c"], ["acne"])
