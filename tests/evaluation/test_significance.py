"""Intervals that cover, tests that keep their error rate, and corrections worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from recsys_ray.evaluation.significance import (
    Resampling,
    SignificanceError,
    Units,
    compare,
    holm,
    mean_intervals,
    resampled_means,
    sign_flip_p,
    worst_decile,
)

QUICK = Resampling(samples=400, permutations=400, seed=3)


def test_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.exponential(1.0, size=(120, 300))  # 300 independent experiments of 120 queries, true mean 1
    covered = [found.low <= 1.0 <= found.high for found in mean_intervals(samples, Units.rows(120), QUICK)]
    assert 0.90 <= np.mean(covered) <= 0.98  # 95 % within 3 standard errors of 300 trials, minus the percentile's bias


def test_clustered_rows_need_their_cluster_as_unit():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(40), 25)
    experiments = rng.normal(0, 1, size=(40, 200))[groups] + rng.normal(0, 0.3, size=(1000, 200))
    by_row = mean_intervals(experiments, Units.rows(1000), QUICK)
    by_group = mean_intervals(experiments, Units.of(groups), QUICK)
    assert np.mean([found.low <= 0 <= found.high for found in by_row]) < 0.6   # the trap
    assert np.mean([found.low <= 0 <= found.high for found in by_group]) > 0.89


def test_crossed_units_cover_when_both_matter():
    rng = np.random.default_rng(2)
    products, users = rng.integers(0, 40, 800), rng.integers(0, 60, 800)
    experiments = (rng.normal(0, 1, (40, 150))[products] + rng.normal(0, 1, (60, 150))[users]
                   + rng.normal(0, 1, (800, 150)))
    two_way = mean_intervals(experiments, Units.of(products, users), QUICK)
    one_way = mean_intervals(experiments, Units.of(products), QUICK)
    assert np.mean([found.low <= 0 <= found.high for found in two_way]) >= 0.92
    assert np.mean([found.low <= 0 <= found.high for found in one_way]) < 0.90


def test_training_seeds_widen_the_interval_and_cover():
    rng = np.random.default_rng(4)
    seeds, rows, experiments = 8, 200, 150
    values = (rng.normal(0, 0.5, (seeds, 1, experiments)) + rng.normal(0, 1, (1, rows, experiments))
              + rng.normal(0, 0.2, (seeds, rows, experiments)))
    covered = [found.low <= 0 <= found.high for found in mean_intervals(values, Units.rows(rows), QUICK)]
    pooled = [found.low <= 0 <= found.high for found in mean_intervals(values.mean(axis=0), Units.rows(rows), QUICK)]
    assert np.mean(covered) > 0.85     # eight seeds are few: the bootstrap loses some percent
    assert np.mean(pooled) < 0.65      # averaging the seeds first hides most of the spread


def test_seeds_meet_the_same_units():
    # both seeds have identical rows, so resampling seeds adds nothing: the spread must be that of one seed
    row = np.random.default_rng(5).normal(size=100)
    one = resampled_means(row[:, None], Units.rows(100), Resampling(samples=2000)).std()
    two = resampled_means(np.stack([row, row])[:, :, None], Units.rows(100), Resampling(samples=2000)).std()
    assert two == pytest.approx(one, rel=0.1)


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(6).gamma(2.0, size=150)
    ours = mean_intervals(values, Units.rows(150), Resampling(samples=8000))[0]
    theirs = stats.bootstrap((values,), np.mean, n_resamples=8000, method="percentile",
                             rng=np.random.default_rng(0)).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_rows_of_unequal_clusters_weigh_as_rows():
    # units 0 (rows 1, 1, 1) and 1 (row 5): draws 00, 01, 10, 11 give 1, 8/4, 8/4, 5: never the mean of unit means, 3
    means = resampled_means(np.array([1.0, 1.0, 1.0, 5.0]), Units.of([0, 0, 0, 1]), QUICK)
    assert sorted(set(np.round(means[:, 0], 9))) == [1.0, 2.0, 5.0]


def test_undefined_rows_are_left_out_and_counted():
    values = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan]])
    first, second = mean_intervals(values, Units.rows(3), QUICK)
    assert (first.mean, first.rows, first.units) == (2.0, 2, 2)
    assert second.rows == 0
    assert np.isnan(second.mean)


def test_sign_flip_equals_scipys_exact_test():
    difference = np.array([0.3, -0.1, 0.25, 0.4, -0.05, 0.2, 0.15, 0.1])
    exact = stats.permutation_test((difference,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p(difference, Units.rows(8))[0] == pytest.approx(exact.pvalue)


def test_sign_flip_by_hand():
    # three units, all positive: of 8 sign patterns only +++ and --- are as extreme: p = 2/8
    assert sign_flip_p(np.array([1.0, 2.0, 3.0]), Units.rows(3)) == 0.25
    # as rows of two units (1 + 2 and 3): patterns ++ and -- of 4: p = 1/2
    assert sign_flip_p(np.array([1.0, 2.0, 3.0]), Units.of(["a", "a", "b"])) == 0.5
    # crossed: the weaker of the two answers
    assert sign_flip_p(np.array([1.0, 2.0, 3.0]), Units.of(["a", "a", "b"], [0, 1, 2])) == 0.5
    assert sign_flip_p(np.zeros(5), Units.rows(5))[0] == 1.0


def test_sign_flip_keeps_its_error_rate_when_nothing_differs():
    rng = np.random.default_rng(8)
    p_values = [sign_flip_p(rng.exponential(1, 60) - rng.exponential(1, 60), Units.rows(60), QUICK) for _ in range(400)]
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.08


def test_comparison_of_a_clear_gain():
    rng = np.random.default_rng(9)
    baseline = rng.uniform(0, 1, 300)
    candidate = baseline + rng.normal(0.05, 0.1, 300)
    candidate[:30] = baseline[:30]
    found = compare(candidate, baseline, Units.rows(300), QUICK)
    assert 0 < found.difference.low < found.difference.mean < found.difference.high
    assert found.difference.mean == pytest.approx((candidate - baseline).mean())
    assert found.p_value < 0.01
    assert (found.wins + found.ties + found.losses, found.ties) == (300, 30)
    assert found.worst_decile == pytest.approx(np.sort(candidate - baseline)[:30].mean())
    # (1.96 + 0.84) standard errors of the mean difference
    standard_error = (candidate - baseline).std() / np.sqrt(300)
    assert found.detectable == pytest.approx(2.8 * standard_error, rel=0.15)


def test_detectable_effect_is_found_with_about_its_power():
    rng = np.random.default_rng(10)
    noise = rng.normal(0, 1, (100, 300))
    detectable = compare(noise[:, 0], np.zeros(100), Units.rows(100), QUICK).detectable
    found = mean_intervals(noise + 0.28, Units.rows(100), QUICK)  # 2.8 / sqrt(100)
    assert detectable == pytest.approx(0.28, rel=0.25)
    assert 0.70 <= np.mean([interval.low > 0 for interval in found]) <= 0.90


def test_equal_seed_equal_numbers():
    values = np.random.default_rng(11).normal(size=(50, 2))
    assert mean_intervals(values, Units.rows(50)) == mean_intervals(values, Units.rows(50))
    other = mean_intervals(values, Units.rows(50), Resampling(seed=8))
    assert other != mean_intervals(values, Units.rows(50))


def test_chunks_do_not_change_the_means(monkeypatch):
    values = np.random.default_rng(12).normal(size=(64, 2))
    whole = resampled_means(values, Units.rows(64), QUICK)
    monkeypatch.setattr("recsys_ray.evaluation.significance.CELLS_PER_CHUNK", 64 * 16)
    np.testing.assert_allclose(resampled_means(values, Units.rows(64), QUICK), whole)


def test_holm_worked_example():
    # sorted .01 .02 .03 .04 -> 4*.01 = .04; 3*.02 = .06; 2*.03 = .06; max(.06, 1*.04) = .06
    adjusted = holm({"d": 0.04, "a": 0.01, "c": 0.03, "b": 0.02})
    assert adjusted == pytest.approx({"d": 0.06, "a": 0.04, "c": 0.06, "b": 0.06})
    assert holm({"only": 0.03}) == {"only": 0.03}
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_worst_decile_by_hand():
    # 11 values: the lowest ceil(1.1) = 2 of them, -3 and -1
    assert worst_decile(np.array([-3.0, -1.0, *[5.0] * 9, np.nan])) == -2.0


def test_units_that_do_not_fit_are_refused():
    with pytest.raises(SignificanceError, match="different length"):
        Units.of([1, 2], [1, 2, 3])
    with pytest.raises(SignificanceError, match="rows of units"):
        mean_intervals(np.zeros(4), Units.rows(3))
