"""Batches as a pure function of seed, epoch and step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ray.config import ConfigError
from recsys_ray.training.sampler import BatchSampler, SamplerConfig, spread


def sampler(pairs: int = 1000, seed: int = 1, groups: np.ndarray | None = None, **options: object) -> BatchSampler:
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 300, pairs)
    groups = np.arange(pairs) if groups is None else groups
    return BatchSampler(SamplerConfig.model_validate({"batch_size": 16, "window_batches": 8, **options}), seed, lengths,
                        groups, np.arange(pairs))


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_takes_every_pair_once_but_for_the_rest(grouped: bool) -> None:
    one = sampler(length_grouped=grouped)
    assert one.steps_per_epoch == 62
    for epoch in (0, 3):
        taken = np.concatenate([one.batch(epoch * 62 + step) for step in range(62)])
        assert len(np.unique(taken)) == len(taken) == 62 * 16


def test_a_step_is_the_same_whatever_was_asked_before() -> None:
    wanted = {step: sampler().batch(step).tolist() for step in (0, 7, 61, 62, 200)}
    other = sampler()
    for step in (200, 61, 7, 0, 62, 7):
        assert other.batch(step).tolist() == wanted[step]
    assert sampler(seed=2).batch(0).tolist() != wanted[0]
    assert wanted[0] != wanted[62]


def test_workers_share_a_step_evenly() -> None:
    one = sampler()
    for workers in (1, 2, 3, 5):
        shares = [one.share(9, rank, workers) for rank in range(workers)]
        assert sorted(np.concatenate(shares).tolist()) == sorted(one.batch(9).tolist())
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    two = [one._lengths[one.share(9, rank, 2)].sum() for rank in range(2)]
    assert abs(two[0] - two[1]) < 0.1 * sum(two)


def test_grouped_batches_hold_like_lengths() -> None:
    def spans(one: BatchSampler) -> float:
        return float(np.mean([np.ptp(one._lengths[one.batch(step)]) for step in range(62)]))

    assert spans(sampler(length_grouped=True)) < 0.3 * spans(sampler())


def test_no_product_comes_twice_while_others_are_left() -> None:
    groups = np.random.default_rng(1).integers(0, 200, 1000)
    plain, distinct = (sampler(groups=groups, distinct_groups=wanted) for wanted in (False, True))

    def repeats(one: BatchSampler) -> int:
        return sum(16 - len(np.unique(groups[one.batch(step)])) for step in range(62))

    assert repeats(plain) > 20
    assert repeats(distinct) == 0


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 30), st.integers(0, 1000))
def test_spreading_loses_and_repeats_nothing(batches: int, size: int, kinds: int, seed: int) -> None:
    keys = np.random.default_rng(seed).integers(0, kinds, batches * size)
    found = spread([keys], batches, size)
    assert [len(one) for one in found] == [size] * batches
    assert sorted(np.concatenate(found).tolist()) == list(range(batches * size))


def test_when_only_repetitions_are_left_they_are_taken() -> None:
    keys = np.array([0, 0, 0, 0, 1, 2, 3, 4, 5])
    found = [sorted(keys[places].tolist()) for places in spread([keys], 3, 3)]
    assert sum(len(set(batch)) for batch in found) == 8
    assert [0 in batch for batch in found] == [True, True, True]


def test_too_few_pairs_for_a_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sampler\.batch_size: 16 .* only 15"):
        sampler(pairs=15)
