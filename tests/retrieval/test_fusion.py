"""Fusion: worked examples, what must not change a ranking, and weights chosen without looking at the answer."""

from __future__ import annotations

import numpy as np
import pytest

from recsys_ray.retrieval.fusion import FusionConfig, FusionError, fuse, normalised, ranking, tune_dense_weight


def test_convex_worked_example() -> None:
    # Window 3: dense .8 -> 1, .4 -> (.4 - .2)/(.8 - .2) = 1/3, .2 -> 0, .1 -> .001 * (.1 - .2)/(.8 - .2);
    # lexical 10 -> 1, 5 -> (5 - 4)/(10 - 4) = 1/6, 4 -> 0, none -> .001 * (0 - 4)/(10 - 4).
    dense, lexical = np.array([0.8, 0.4, 0.2, 0.1]), np.array([0.0, 10.0, 5.0, 4.0])
    fused = fuse(dense, lexical, FusionConfig(dense_weight=0.25, window=3))
    np.testing.assert_allclose(fused, [0.25 - 0.75e-3 * 2 / 3, 0.25 / 3 + 0.75, 0.75 / 6, -0.25e-3 / 6], rtol=1e-6)
    assert fused.dtype == np.float32


def test_the_lexical_floor_is_zero_while_the_window_is_not_full_of_matches() -> None:
    fused = fuse(np.zeros(4), np.array([0.0, 8.0, 6.0, 0.0]), FusionConfig(dense_weight=0, window=3))
    np.testing.assert_allclose(fused, [0, 1, 0.75, 0])


def test_rrf_worked_example() -> None:
    # dense ranks 1, 2, 3; lexical ranks -, 1, 2 (no query term in the first)
    config = FusionConfig(method="rrf", dense_weight=0.25, rrf_k=10)
    fused = fuse(np.array([0.8, 0.4, 0.2]), np.array([0.0, 10.0, 5.0]), config)
    np.testing.assert_allclose(fused, [0.25 / 11, 0.25 / 12 + 0.75 / 11, 0.25 / 13 + 0.75 / 12], rtol=1e-6)


def test_all_four_scores_worked_example() -> None:
    dense, lexical = np.array([0.8, 0.4, 0.2]), np.array([0.0, 10.0, 5.0])
    sparse, multi = np.array([3.0, 0.0, 6.0]), np.array([0.5, np.nan, 0.3])
    weights = {"dense_weight": 0.4, "sparse_weight": 0.1, "multi_weight": 0.2, "window": 3, "rrf_k": 10}
    # convex: dense 1, 1/3, 0; lexical 0, 1, .5; sparse .5, 0, 1; multi 1, 0 (unknown), 0
    fused = fuse(dense, lexical, FusionConfig(**weights), sparse, multi)
    np.testing.assert_allclose(fused, [0.4 + 0.05 + 0.2, 0.4 / 3 + 0.3, 0.15 + 0.1], rtol=1e-6)
    # ranks: dense 1, 2, 3; lexical -, 1, 2; sparse 2, -, 1; multi 1, -, 2
    fused = fuse(dense, lexical, FusionConfig(method="rrf", **weights), sparse, multi)
    np.testing.assert_allclose(fused, [0.4 / 11 + 0.1 / 12 + 0.2 / 11, 0.4 / 12 + 0.3 / 11,
                                       0.4 / 13 + 0.3 / 12 + 0.1 / 11 + 0.2 / 12], rtol=1e-6)
    # sum: the scores as they are, an unknown one as the lowest
    fused = fuse(dense, lexical, FusionConfig(method="sum", **weights), sparse, multi)
    np.testing.assert_allclose(fused, [0.32 + 0.3 + 0.1, 0.16 + 3 + 0.06, 0.08 + 1.5 + 0.6 + 0.06], rtol=1e-6)


def test_a_score_with_a_weight_must_be_there_and_weights_leave_a_rest() -> None:
    with pytest.raises(FusionError, match=r"sparse_weight is 0\.2"):
        fuse(np.zeros(2), np.zeros(2), FusionConfig(sparse_weight=0.2), multi=np.zeros(2))
    with pytest.raises(FusionError, match="each other score"):
        fuse(np.zeros(2), np.zeros(2), FusionConfig(multi_weight=0.2), multi=np.zeros(3))
    with pytest.raises(ValueError, match="sum to more than 1"):
        FusionConfig(dense_weight=0.5, sparse_weight=0.3, multi_weight=0.3)
    assert FusionConfig(dense_weight=0.435, sparse_weight=0.13, multi_weight=0.435).lexical_weight == 0
    without = fuse(np.array([0.1, 0.9]), np.array([3.0, 2.0]), FusionConfig())
    with_unused = fuse(np.array([0.1, 0.9]), np.array([3.0, 2.0]), FusionConfig(), np.ones(2), np.ones(2))
    np.testing.assert_array_equal(without, with_unused)


@pytest.mark.parametrize("method", ["convex", "rrf"])
@pytest.mark.parametrize(("weight", "scores"), [(1.0, "dense"), (0.0, "lexical")])
def test_the_end_weights_are_the_single_retrievers(method: str, weight: float, scores: str) -> None:
    rng = np.random.default_rng(0)
    given = {"dense": rng.uniform(0.01, 1, 40), "lexical": rng.uniform(0.01, 9, 40)}
    fused = fuse(given["dense"], given["lexical"], FusionConfig(method=method, dense_weight=weight))
    row_ids = np.arange(40)
    np.testing.assert_array_equal(ranking(fused, row_ids, 40), ranking(given[scores], row_ids, 40))


@pytest.mark.parametrize("method", ["convex", "rrf"])
def test_the_units_of_bm25_do_not_matter_and_order_of_candidates_neither(method: str) -> None:
    rng = np.random.default_rng(1)
    dense, lexical = rng.uniform(size=30), rng.uniform(size=30) * (rng.uniform(size=30) > 0.4)
    config = FusionConfig(method=method)
    fused = fuse(dense, lexical, config)
    np.testing.assert_allclose(fuse(dense, lexical * 7.5, config), fused, rtol=1e-6)
    shuffled = rng.permutation(30)
    np.testing.assert_allclose(fuse(dense[shuffled], lexical[shuffled], config), fused[shuffled], rtol=1e-6)


def test_convex_scores_stay_when_worse_candidates_join() -> None:
    """A deeper candidate list, or one with extra candidates from other segments, cannot reorder the top."""
    rng = np.random.default_rng(2)
    dense, lexical = rng.uniform(0.5, 1, 50), rng.uniform(4, 9, 50)
    longer = fuse(np.append(dense, rng.uniform(0, 0.4, 30)), np.append(lexical, np.zeros(30)), FusionConfig(window=20))
    np.testing.assert_array_equal(longer[:50], fuse(dense, lexical, FusionConfig(window=20)))


@pytest.mark.parametrize("method", ["convex", "rrf"])
def test_degenerate_scores(method: str) -> None:
    config = FusionConfig(method=method)
    assert fuse(np.zeros(0), np.zeros(0), config).tolist() == []
    assert np.isfinite(fuse(np.array([-0.5, -0.5]), np.zeros(2), config)).all()
    lacking = fuse(np.array([np.nan, 0.3]), np.array([2.0, 2.0]), config)
    assert lacking[1] > lacking[0] > 0
    assert np.isfinite(fuse(np.full(2, np.nan), np.array([2.0, 1.0]), config)).all()
    with pytest.raises(FusionError, match="both"):
        fuse(np.zeros(2), np.zeros(3), config)


def test_normalised_scores_keep_their_order_and_the_tail_weighs_next_to_nothing() -> None:
    scores = np.random.default_rng(4).normal(size=60)
    parts = normalised(scores, 25)
    assert parts.max() == 1
    assert (parts > 0).sum() == 24
    assert parts.min() > -0.01
    np.testing.assert_array_equal(np.argsort(-parts), np.argsort(-scores))
    assert normalised(np.array([0.3, 0.3, 0.1]), 2).tolist() == [1, 1, 0]
    assert normalised(np.array([-0.4]), 9).tolist() == [1]


def test_equal_scores_are_ordered_by_row_id() -> None:
    scores, row_ids = np.array([1.0, 3.0, 1.0, 1.0]), np.array([9, 8, 2, 5])
    assert row_ids[ranking(scores, row_ids, 10)].tolist() == [8, 2, 5, 9]
    assert row_ids[ranking(scores, row_ids, 2)].tolist() == [8, 2]
    assert ranking(scores, row_ids, 0).tolist() == []


def test_tuning_finds_the_peak_and_reports_what_unseen_queries_get() -> None:
    rng = np.random.default_rng(5)
    weights = np.linspace(0, 1, 11)
    peak = 0.6 - (weights[:, None] - 0.3) ** 2 + rng.normal(0, 0.02, (11, 200))
    tuned = tune_dense_weight(weights, peak)
    assert tuned.weight == pytest.approx(0.3, abs=0.11)
    assert np.abs(tuned.query_weights - 0.3).max() <= 0.2
    assert tuned.out_of_fold.mean() <= tuned.in_sample + 0.005


def test_out_of_fold_values_of_pure_noise_show_no_gain() -> None:
    """Choosing the best of many weights on the queries it is reported on would look like a gain here."""
    gains = []
    for seed in range(30):
        noise = np.random.default_rng(seed).normal(0, 1, (40, 50))
        gains.append(tune_dense_weight(np.linspace(0, 1, 40), noise, seed=seed).out_of_fold.mean())
    assert abs(np.mean(gains)) < 3 / np.sqrt(30 * 50)


def test_each_query_is_scored_with_the_weight_of_its_fold_and_gaps_stay_gaps() -> None:
    values = np.stack([np.full(20, 0.2), np.full(20, 0.9), np.full(20, 0.3)])
    values[:, 4] = np.nan
    tuned = tune_dense_weight([0.0, 0.5, 1.0], values, folds=4)
    assert tuned.weight == 0.5
    assert np.isnan(tuned.out_of_fold[4])
    assert np.nanmin(tuned.out_of_fold) == 0.9
    values = tuned.as_dict()
    assert values.pop("fold_weights") == [0.5]
    assert values == pytest.approx({"weight": 0.5, "out_of_fold": 0.9, "in_sample": 0.9})


@pytest.mark.parametrize(("weights", "shape", "folds", "message"), [
    ([0.1], (2, 9), 3, "one row per weight"), ([0.1, 0.2], (2, 3), 5, "folds"), ([], (0, 9), 3, "weights"),
])
def test_tuning_refuses_what_does_not_fit(weights: list[float], shape: tuple[int, int], folds: int,
                                          message: str) -> None:
    with pytest.raises(FusionError, match=message):
        tune_dense_weight(weights, np.zeros(shape), folds=folds)
