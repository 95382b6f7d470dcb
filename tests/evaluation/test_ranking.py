"""Figures of score tables against scikit-learn, a worked example, and drawn ties."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import average_precision_score, ndcg_score, roc_auc_score

from recsys_ray.evaluation.metrics import score_all
from recsys_ray.evaluation.ranking import (
    POOLED,
    SPECS,
    RankingError,
    measure,
    measure_whole,
    pooled_draws,
    scored_pairs,
    whole_ranking,
)
from recsys_ray.evaluation.significance import Resampling

FEW = Resampling(samples=200, permutations=200)


def drawn_table(queries: int = 30, items: int = 12, seed: int = 1) -> pa.Table:
    """Three positives of `items` a query; scores that see them through noise, some of them equal."""
    generator = np.random.default_rng(seed)
    rows = [{"query_id": f"q{q}", "product_id": f"p{p}", "label": int(p < 3),
             "good": float(np.round(generator.normal() + (p < 3), 1)), "noise": float(generator.normal())}
            for q in range(queries) for p in range(items)]
    generator.shuffle(rows)
    return pa.Table.from_pylist(rows)


def test_a_worked_example() -> None:
    """One user, order by score: +, -, +, - with positives at ranks 1 and 3.

    AUC: of the 4 (positive, negative) pairs 3 are in order. AP = MAP = (1/1 + 2/3) / 2 = 5/6.
    nDCG@3 = (1 + 1/log2(4)) / (1 + 1/log2(3)) = 1.5 / 1.63093.
    """
    table = pa.table({"query_id": ["u"] * 4, "product_id": list("abcd"), "label": [1, 0, 1, 0],
                      "s": [4.0, 3.0, 2.0, 1.0]})
    found = measure(scored_pairs(table), FEW)
    assert found.mean("s", "ROC AUC") == pytest.approx(0.75)
    assert found.mean("s", "AP") == pytest.approx(5 / 6)
    assert found.mean("s", "MAP") == pytest.approx(5 / 6)
    assert found.mean("s", "nDCG@3") == pytest.approx(1.5 / (1 + 1 / math.log2(3)))


def test_figures_are_those_of_scikit_learn() -> None:
    table = drawn_table()
    found = measure(scored_pairs(table), FEW)
    for system in ("good", "noise"):
        labels, scores = table["label"].to_numpy(), table[system].to_numpy()
        assert found.mean(system, "ROC AUC") == pytest.approx(roc_auc_score(labels, scores))
        assert found.mean(system, "AP") == pytest.approx(average_precision_score(labels, scores))
    of_user = [table.filter(pa.compute.equal(table["query_id"], one)) for one in table["query_id"].unique()]
    for metric, oracle in (("MAP", average_precision_score), ("nDCG@5", lambda y, s: ndcg_score([y], [s], k=5))):
        mean = np.mean([oracle(rows["label"].to_numpy(), rows["noise"].to_numpy()) for rows in of_user])
        assert found.mean("noise", metric) == pytest.approx(mean)


def test_a_draw_of_users_is_scikit_learns_figure_with_their_weights() -> None:
    pairs = scored_pairs(drawn_table())
    one = Resampling(samples=1, seed=5)
    for system in ("good", "noise"):
        drawn = pooled_draws(pairs.label, pairs.scores[system], pairs.query, one)[1]
        users = len(pairs.query_ids)
        weight = np.random.default_rng(5).multinomial(users, np.full(users, 1 / users), size=1)[0][pairs.query]
        assert drawn[0] == pytest.approx(roc_auc_score(pairs.label, pairs.scores[system], sample_weight=weight))
        assert drawn[1] == pytest.approx(average_precision_score(pairs.label, pairs.scores[system],
                                                                 sample_weight=weight))


def test_differences_are_paired_and_a_system_does_not_differ_from_itself() -> None:
    found = measure(scored_pairs(drawn_table(200)), FEW)
    gain = found.compare("good", "noise")
    assert set(gain) == {*POOLED, *(spec.name for spec in SPECS)}
    assert all(0 < one["low"] < one["mean"] < one["high"] for one in gain.values())
    assert all(one["low"] == one["mean"] == one["high"] == 0 for one in found.compare("good", "good").values())
    assert found.best(["noise", "good", "random"], "AP") == "good"
    assert found.mean("random", "ROC AUC") == pytest.approx(0.5, abs=0.05)


def test_equal_scores_win_nothing_wherever_the_positives_were_listed() -> None:
    table = drawn_table(300).append_column("same", pa.array(np.zeros(3600)))
    found = measure(scored_pairs(table), FEW)
    assert found.mean("same", "ROC AUC") == 0.5
    assert found.mean("same", "nDCG@10") == pytest.approx(0.533, abs=0.03)      # of 3 among 12 in random order


def test_the_whole_ranking_counts_what_stands_above_and_may_be_shown() -> None:
    scores = np.array([[0.9, 0.8, 0.7, 0.6, 0.5]])
    allowed = np.array([[True, False, True, True, True]])
    ranked = whole_ranking(["u"], scores, [[2, 4]], allowed)
    assert ranked.rank.tolist() == [2, 4]       # item 1 is known to the user and no candidate
    assert ranked.length.tolist() == [4]
    (values,) = score_all(ranked, SPECS)
    assert values[0] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert measure_whole({"s": ranked}, FEW).mean("s", "MAP") == pytest.approx(0.5)
    with pytest.raises(RankingError, match="not among the allowed"):
        whole_ranking(["u"], scores, [[1]], allowed)


def test_the_whole_ranking_is_that_of_a_table_of_all_items() -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 50, (20, 40)) + generator.random((20, 40)) * 0.5
    relevant = [list(generator.choice(40, 3, replace=False)) for _ in range(20)]
    queries = [f"q{one:02d}" for one in range(20)]
    whole = measure_whole({"s": whole_ranking(queries, scores, relevant, np.ones((20, 40), bool))}, FEW)
    table = pa.Table.from_pylist([
        {"query_id": queries[q], "product_id": f"{i:02d}", "label": int(i in relevant[q]), "s": scores[q, i]}
        for q in range(20) for i in range(40)])
    np.testing.assert_allclose(whole.values["s"], measure(scored_pairs(table), FEW).values["s"])


@pytest.mark.parametrize(("change", "message"), [
    ({"label": [2, 0]}, "label: 2"), ({"s": [None, 1.0]}, "s: 1 rows without a score"),
    ({"product_id": ["a", "a"]}, "listed twice"), ({"label": None}, "no column label")])
def test_tables_that_cannot_be_compared_are_refused(change: dict[str, list[float] | None], message: str) -> None:
    columns = {"query_id": ["q", "q"], "product_id": ["a", "b"], "label": [1, 0], "s": [0.5, 0.1], **change}
    table = pa.table({name: pa.array(values) for name, values in columns.items() if values is not None})
    with pytest.raises(RankingError, match=message):
        scored_pairs(table)
