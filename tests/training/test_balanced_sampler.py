"""Boosts, caps and groups of the balanced sampler, and that a batch is a function of its number alone."""

from __future__ import annotations

import numpy as np
import pytest

from recsys_ray.config import ConfigError
from recsys_ray.training.balanced_sampler import BalancedConfig, BalancedSampler, pair_weights

VALUES = {"category2": ("cardigan", "tee"), "neckline": ("crew", "v_neck")}


def codes(count: int = 1000) -> np.ndarray:
    """Nine tees in ten; the neckline of every other one is known."""
    random = np.random.default_rng(0)
    neckline = np.where(np.arange(count) % 2, random.integers(0, 2, count), -1)
    return np.stack([(np.arange(count) % 10 > 0).astype(np.int64), neckline], axis=1)


def sampler(**settings: object) -> BalancedSampler:
    table = codes()
    return BalancedSampler(BalancedConfig.model_validate({"batch_size": 50, **settings}), 7, VALUES, table,
                           np.arange(len(table)) // 2)


def test_weights_multiply_and_a_star_means_known() -> None:
    found = pair_weights({"category2": {"cardigan": 3}, "neckline": {"*": 2}}, VALUES,
                         np.array([[0, -1], [1, 0], [0, 1], [-1, -1]]))
    assert found.tolist() == [3, 2, 6, 1]
    with pytest.raises(ConfigError, match="'colour' is no attribute; there are category2, neckline"):
        pair_weights({"colour": {"red": 2}}, VALUES, np.zeros((1, 2), np.int64))


def test_a_boosted_value_comes_more_often_and_a_capped_one_never_above_its_share() -> None:
    plain, pushed = sampler(), sampler(boosts={"category2": {"cardigan": 3}}, caps={"category2": {"tee": 0.6}})
    share = {name: np.mean([one.shares(one.batch(step)).get("share category2=tee", np.nan) for step in range(40)])
             for name, one in {"plain": sampler(boosts={"category2": {"tee": 1}}), "pushed": pushed}.items()}
    assert share["plain"] == pytest.approx(0.9, abs=0.02)
    assert share["pushed"] <= 0.6
    boosted = sampler(boosts={"category2": {"cardigan": 3}})
    cardigans = np.mean([boosted.shares(boosted.batch(step))["share category2=cardigan"] for step in range(40)])
    assert cardigans == pytest.approx(0.3 / 1.2, abs=0.04)     # 0.1 x 3 against 0.9 x 1
    assert plain.steps_per_epoch == 20


def test_a_batch_is_whole_without_repeats_and_with_each_group_once() -> None:
    one = sampler(caps={"category2": {"tee": 0.6}})
    for step in range(10):
        batch = one.batch(step)
        assert len(set(batch.tolist())) == len(batch) == 50
        assert len(set((batch // 2).tolist())) == 50
    tight = sampler(caps={"category2": {"tee": 0.01, "cardigan": 0.01}})   # cannot be kept, and the batch is whole
    assert len(set(tight.batch(0).tolist())) == 50


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    once, again = sampler(), sampler()
    assert [again.batch(step).tolist() for step in (25, 3)] == [once.batch(step).tolist() for step in (25, 3)]
    assert once.batch(3).tolist() != once.batch(23).tolist()       # the same place of the next epoch


def test_numbers_that_are_no_shares_are_refused() -> None:
    with pytest.raises(ValueError, match=r"caps.material.cotton: 30 is not above 0 and up to 1"):
        BalancedConfig(caps={"material": {"cotton": 30}})
