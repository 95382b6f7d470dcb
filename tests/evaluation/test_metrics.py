"""Every metric against a naive reading of its definition, a public library, and a worked example."""

from __future__ import annotations

import math

import ir_measures
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from recsys_ray.evaluation.metrics import (
    MetricError,
    MetricSpec,
    average_precision,
    rank_judgments,
    roc_auc,
    score,
    score_all,
)
from recsys_ray.schema import CANDIDATE, JUDGMENT

Judgments = dict[str, dict[str, float]]
Answers = dict[str, list[str]]

SPECS = [
    "nDCG@10", "nDCG", "nDCG(gain=exponential)@10", "nDCG(discount=1/rank)@3", "nDCG(ideal=constant,ideal_gain=3)@10",
    "nDCG(gain=exponential,discount=1/rank,ideal=constant,ideal_gain=2)@10", "nDCG(unjudged=skip)@10",
    "nDCG(scope=judged)", "nDCG(scope=judged)@2", "nDCG(no_relevant=zero)@10",
    "Recall@1", "Recall@5", "Recall(relevant_gain=2)@10", "Recall(unjudged=skip)@2", "Precision@3",
    "Precision(scope=judged)@3", "MRR", "MRR@2", "MRR(unjudged=skip)@2", "MAP", "MAP@3", "MAP(no_relevant=zero)",
    "Judged@10",
]


def judgment_table(judgments: Judgments) -> pa.Table:
    rows = [{"query_id": q, "product_id": p, "gain": g} for q, of in judgments.items() for p, g in of.items()]
    return pa.Table.from_pylist(rows, schema=JUDGMENT)


def candidate_table(answers: Answers) -> pa.Table:
    rows = [{"query_id": q, "row_id": 0, "product_id": p, "rank": rank, "score": -float(rank)}
            for q, products in answers.items() for rank, p in enumerate(products, 1)]
    return pa.Table.from_pylist(rows, schema=CANDIDATE)


def measured(judgments: Judgments, answers: Answers, name: str) -> list[float]:
    ranked = rank_judgments(judgment_table(judgments), [candidate_table(answers)])
    return list(score(ranked, MetricSpec.parse(name)))


def naive(spec: MetricSpec, judged: dict[str, float], answer: list[str]) -> float:
    """The definition, word for word, for one query."""
    k = spec.k or 10**9
    if spec.measure == "Judged":
        return sum(1 for p in answer[:k] if p in judged) / k
    if spec.scope == "judged" or spec.unjudged == "skip":
        answer = [p for p in answer if p in judged]
    if spec.scope == "judged":
        answer = answer + sorted((p for p in judged if p not in answer), key=lambda p: judged[p])
    undefined = 0.0 if spec.no_relevant == "zero" else math.nan
    if spec.measure == "nDCG":
        return naive_ndcg(spec, judged, answer, k, undefined)
    relevant = {p for p, gain in judged.items() if gain >= (spec.relevant_gain or 1.0)}
    if not relevant:
        return undefined
    hits = [rank for rank, p in enumerate(answer[:k], 1) if p in relevant]
    if spec.measure == "Recall":
        return len(hits) / len(relevant)
    if spec.measure == "Precision":
        return len(hits) / k
    if spec.measure == "MRR":
        return 1 / hits[0] if hits else 0.0
    return sum(number / rank for number, rank in enumerate(hits, 1)) / len(relevant)


def naive_ndcg(spec: MetricSpec, judged: dict[str, float], answer: list[str], k: int, undefined: float) -> float:
    def gain(value: float) -> float:
        return value if spec.gain == "linear" else 2**value - 1

    def dcg(gains: list[float]) -> float:
        return sum(gain(g) / (math.log2(1 + r) if spec.discount == "log2" else r) for r, g in enumerate(gains[:k], 1))

    best = sorted(judged.values(), reverse=True) if spec.ideal == "query" else [spec.ideal_gain or 0.0] * k
    return dcg([judged.get(p, 0.0) for p in answer]) / dcg(best) if dcg(best) else undefined


products = st.sampled_from([f"p{i}" for i in range(12)])
one_judged = st.dictionaries(products, st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=1)
one_answer = st.lists(products, unique=True)
problems = st.lists(st.tuples(one_judged, one_answer), min_size=1, max_size=6)


@pytest.mark.parametrize("name", SPECS)
@given(problem=problems)
@settings(max_examples=25)
def test_equals_the_definition_read_naively(name, problem):
    judgments = {f"q{i}": judged for i, (judged, _) in enumerate(problem)}
    answers = {f"q{i}": answer for i, (_, answer) in enumerate(problem)}
    spec = MetricSpec.parse(name)
    expected = [naive(spec, judgments[q], answers[q]) for q in sorted(judgments)]
    np.testing.assert_allclose(measured(judgments, answers, name), expected, atol=1e-6)


@given(problem=problems)
@settings(max_examples=25)
def test_ndcg_equals_trec_eval(problem):
    judgments = {f"q{i}": judged for i, (judged, _) in enumerate(problem)}
    answers = {f"q{i}": answer for i, (_, answer) in enumerate(problem) if answer}
    run = {q: {p: -float(r) for r, p in enumerate(answer)} for q, answer in answers.items()}
    qrels = {q: {p: int(gain) for p, gain in of.items()} for q, of in judgments.items()}
    values = ir_measures.iter_calc([ir_measures.nDCG @ 5], qrels, run) if run else ()
    found = {one.query_id: one.value for one in values}
    ours = dict(zip(sorted(judgments), measured(judgments, answers, "nDCG(no_relevant=zero)@5"), strict=True))
    assert found == pytest.approx({q: ours[q] for q in found}, abs=1e-6)


@given(gains=st.lists(st.sampled_from([0.0, 0.01, 0.1, 1.0]), min_size=2, max_size=12), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_ndcg_with_fractional_gains_equals_scikit_learn(gains, seed):
    order = np.random.default_rng(seed).permutation(len(gains))
    judgments = {"q": {f"p{i}": gain for i, gain in enumerate(gains)}}
    expected = ndcg_score([gains], [[-float(np.flatnonzero(order == i)[0]) for i in range(len(gains))]], k=4)
    ours = measured(judgments, {"q": [f"p{i}" for i in order]}, "nDCG(no_relevant=zero)@4")[0]
    assert ours == pytest.approx(expected, abs=1e-6)


# Judged: a=3, b=2, c=1, d=0. Answer: x (unjudged), b, a, d. Relevant from gain 1: a, b, c.
WORKED = {
    # linear DCG = 0/log2(2) + 2/log2(3) + 3/log2(4) + 0 = 1.2618595 + 1.5; best = 3 + 2/log2(3) + 1/log2(4) = 4.7618595
    "nDCG@10": 2.7618595 / 4.7618595,
    # gains 3 and 7: DCG = 3/log2(3) + 7/2 = 5.3927893; ideal = 7 + 3/log2(3) + 1/2 = 9.3927893
    "nDCG(gain=exponential)@10": 5.3927893 / 9.3927893,
    # DCG = 2/2 + 3/3 = 2; ideal = 3 + 2/2 + 1/3 = 4.3333333
    "nDCG(discount=1/rank)@10": 2 / 4.3333333,
    # the ideal is 3 + 3/2 + 3/3 = 5.5 for k = 3, whatever was judged; DCG@3 = 2/2 + 3/3 = 2
    "nDCG(discount=1/rank,ideal=constant,ideal_gain=3)@3": 2 / 5.5,
    # without x the answer is b, a, d: DCG = 2 + 3/log2(3) = 3.8927893
    "nDCG(unjudged=skip)@10": 3.8927893 / 4.7618595,
    # judged only: b, a, d, then c at rank 4: DCG = 3.8927893 + 1/log2(5) = 4.3234658
    "nDCG(scope=judged)@10": 4.3234658 / 4.7618595,
    "Recall@2": 1 / 3, "Recall@3": 2 / 3, "Recall(relevant_gain=3)@3": 1.0, "Precision@3": 2 / 3, "Precision@10": 0.2,
    "MRR": 1 / 2, "MRR@1": 0.0, "MAP": (1 / 2 + 2 / 3) / 3, "MAP@2": (1 / 2) / 3,
    "Judged@4": 3 / 4, "Judged@10": 3 / 10,
}


@pytest.mark.parametrize(("name", "expected"), WORKED.items())
def test_worked_example(name, expected):
    judgments = {"q": {"a": 3.0, "b": 2.0, "c": 1.0, "d": 0.0}}
    assert measured(judgments, {"q": ["x", "b", "a", "d"]}, name)[0] == pytest.approx(expected, abs=1e-6)


def test_ndcg_is_at_most_one_and_one_for_the_best_order():
    judgments = {"q": {"a": 3.0, "b": 2.0, "c": 0.0}}
    assert measured(judgments, {"q": ["a", "b", "c"]}, "nDCG@10") == [pytest.approx(1.0)]
    assert measured(judgments, {"q": ["b", "a", "c"]}, "nDCG@10")[0] < 1.0


def test_a_query_without_an_answer_counts_zero_and_one_without_a_relevant_product_is_named():
    judgments = {"answered": {"a": 1.0}, "hopeless": {"a": 0.0}, "silent": {"a": 1.0}}
    for name in ("nDCG@10", "Recall@10", "MRR", "MAP", "Precision@1"):
        values = measured(judgments, {"answered": ["a"], "hopeless": ["a"]}, name)
        assert values[0] == 1.0
        assert math.isnan(values[1])
        assert values[2] == 0.0


def test_gain_threshold_holds_for_fractions_that_float32_cannot_store():
    judgments = {"q": {"a": 0.1, "b": 0.01}}
    assert measured(judgments, {"q": ["a", "b"]}, "Recall(relevant_gain=0.01)@1") == [0.5]
    assert measured(judgments, {"q": ["a", "b"]}, "Recall(relevant_gain=0.1)@1") == [1.0]


def test_answers_in_pieces_and_many_queries_equal_one_piece(monkeypatch):
    rng = np.random.default_rng(5)
    judgments = {f"q{i:03d}": {f"p{j}": float(rng.integers(0, 4)) for j in rng.choice(50, 6, replace=False)}
                 for i in range(40)}
    answers = {q: [f"p{j}" for j in rng.choice(50, 20, replace=False)] for q in judgments}
    table, specs = candidate_table(answers), [MetricSpec.parse(name) for name in SPECS]
    whole = score_all(rank_judgments(judgment_table(judgments), [table]), specs)
    shuffled = table.take(pa.array(rng.permutation(table.num_rows)))
    pieces = [shuffled.slice(start, 77) for start in range(0, table.num_rows, 77)]
    monkeypatch.setattr("recsys_ray.evaluation.metrics.QUERIES_PER_CALL", 7)
    np.testing.assert_array_equal(score_all(rank_judgments(judgment_table(judgments), pieces), specs), whole)


@pytest.mark.parametrize("name", SPECS)
def test_a_name_reads_back_to_the_same_metric(name):
    spec = MetricSpec.parse(name)
    assert MetricSpec.parse(spec.name) == spec
    assert MetricSpec.model_validate(spec.model_dump()) == spec
    assert spec.name in spec.definition()


@pytest.mark.parametrize(("name", "says"), [
    ("nDGC@10", "no such metric"), ("Recall", "cut-off"), ("Recall(gain=exponential)@5", "belong to nDCG"),
    ("nDCG(ideal=constant)@10", "ideal_gain"), ("nDCG@0", "greater than or equal to 1"),
    ("nDCG(gian=linear)@5", "Extra"),
])
def test_a_wrong_name_says_what_is_wrong(name, says):
    with pytest.raises(MetricError, match=says):
        MetricSpec.parse(name)


def test_impossible_tables_are_refused():
    judged = judgment_table({"q": {"a": 1.0}})
    with pytest.raises(MetricError, match="judged more than once"):
        rank_judgments(pa.concat_tables([judged, judged]), [])
    with pytest.raises(MetricError, match="gains are >= 0"):
        rank_judgments(judgment_table({"q": {"a": -1.0}}), [])
    with pytest.raises(MetricError, match="listed 2 times"):
        rank_judgments(judged, [candidate_table({"q": ["a", "b", "a"]})])
    with pytest.raises(MetricError, match="without gaps"):
        rank_judgments(judged, [candidate_table({"q": ["a", "b"]}).slice(1)])
    zero = candidate_table({"q": ["a"]}).set_column(3, "rank", pa.array([0], pa.int32()))
    with pytest.raises(MetricError, match="rank below 1"):
        rank_judgments(judged, [zero])


def test_roc_auc_and_average_precision():
    # positives 0.8 and 0.4 against negatives 0.6 and 0.4: pairs won 2 + 0 + half of one tie = 2.5 of 4
    assert roc_auc([1, 0, 1, 0], [0.8, 0.6, 0.4, 0.4]) == 0.625
    # thresholds .8: recall 1/2, precision 1; .6: recall stays; .4: recall 1, precision 2/4 -> 1/2*1 + 1/2*1/2
    assert average_precision([1, 0, 1, 0], [0.8, 0.6, 0.4, 0.4]) == 0.75
    with pytest.raises(MetricError, match="both present"):
        roc_auc([1, 1], [0.1, 0.2])
