"""Figures of reranking: what was never retrieved counts 0, and the conditional figures say that they are."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from recsys_ray.evaluation.ranker_figures import explanation, explanation_figures, explanation_page
from recsys_ray.evaluation.reranking import figure, reranking_figures, reranking_values
from recsys_ray.evaluation.significance import Resampling, Units
from recsys_ray.schema import JUDGMENT, conform

FEW = Resampling(samples=200, permutations=200)


def answer(lists: dict[str, str]) -> list[pa.Table]:
    rows = [(query, product, rank) for query, products in lists.items() for rank, product in enumerate(products, 1)]
    return [pa.table({"query_id": [row[0] for row in rows], "product_id": [row[1] for row in rows],
                      "rank": pa.array([row[2] for row in rows], pa.int32())})]


def test_a_query_without_its_product_counts_nothing() -> None:
    judgments = conform(pa.table({"query_id": ["q1", "q2", "q3"], "product_id": list("axa"), "gain": [1.0] * 3}),
                        JUDGMENT, "j")
    measured = reranking_values(judgments, {"retrieval": answer({"q1": "ba", "q2": "ab"}),
                                            "ours": answer({"q1": "ab", "q2": "ba"})}, ["q1", "q2", "q3"])
    assert measured.found.tolist() == [True, False, False]      # q2 misses x, q3 has no answer
    table = reranking_figures(measured, "retrieval", resampling=FEW)
    # nDCG@5 of q1: 1 / log2(3) at rank 2, 1 at rank 1; the others 0
    assert figure(table, "systems", "retrieval")["mean"] == pytest.approx(1 / np.log2(3) / 3)
    assert figure(table, "systems", "ours", "MRR")["mean"] == pytest.approx(1 / 3)
    conditional = {(row["system"], row["metric"]): row["mean"] for row in table["systems"]
                   if row["scope"] == "conditional"}
    assert conditional["ours", "MRR"] == 1
    assert conditional["retrieval", "MRR"] == 0.5
    assert figure(table, "differences", "ours")["difference"]["mean"] == pytest.approx((1 - 1 / np.log2(3)) / 3)
    assert (table["queries"], table["found"]) == (3, 1)


def test_units_are_resampled_together() -> None:
    rows = pa.table({"query_id": ["q1", "q2"], "product_id": ["a", "a"], "gain": [1.0] * 2})
    judgments = conform(rows, JUDGMENT, "j")
    measured = reranking_values(judgments, {"retrieval": answer({"q1": "ab", "q2": "ba"})}, ["q1", "q2"])
    one_unit = reranking_figures(measured, "retrieval", Units.of(["a", "a"]), FEW)
    row = figure(one_unit, "systems", "retrieval", "MRR")
    assert row["low"] == row["high"] == row["mean"] == 0.75


def test_what_the_trees_read_is_drawn() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 3)).astype(np.float32)
    features[::7, 2] = np.nan
    moved = np.stack([features[:, 0] * 2, features[:, 1], np.zeros(300)], axis=1).astype(np.float32)
    document = explanation(["a", "b", "c"], {"one": ["a", "b"], "two": ["c"]}, {"a": 0.75, "b": 0.25}, features, moved)
    assert [one["name"] for one in document["features"]] == ["a", "b", "c"]
    assert document["families"]["one"]["gain_share"] == 1
    assert document["families"]["two"]["mean_contribution"] == 0
    dots = document["dots"]["a"]
    assert len(dots["contribution"]) == len(dots["value"]) <= 150
    assert np.corrcoef(dots["contribution"], dots["value"])[0, 1] > 0.9      # high values push up
    assert all(0 <= one <= 1 for name in "abc" for one in document["dots"][name]["value"])
    svgs = [one["svg"] for one in explanation_figures(document)]
    assert len(set(svgs)) == 2
    assert all("<title>" in svg and "var(--series-1)" in svg for svg in svgs)
    page = explanation_page("Trees <1>", document)
    assert "Trees &lt;1&gt;" in page
    assert page.count("<svg") == 2
    assert page == explanation_page("Trees <1>", document)
