"""Masks by hash: the asked share, no pattern, and the same for the same text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recsys_ray.models.counter_dropout import keep_mask, keep_scale, masked_, token_keys

TEXTS = [np.arange(start, start + 64, dtype=np.int32) for start in range(64)]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_the_asked_share_is_dropped_everywhere(rate: float) -> None:
    kept = -keep_mask(token_keys(TEXTS, 3), 4, 384, rate).float()
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    assert kept.mean() == pytest.approx(1 - rate, abs=0.001)
    for axis in (0, 1):     # five standard deviations of a column's and a row's share
        spread = 5 * (rate * (1 - rate) / kept.shape[axis]) ** 0.5
        assert (kept.mean(axis) - (1 - rate)).abs().max() <= spread + 1e-4
    assert kept.mean() * keep_scale(rate) == pytest.approx(1.0, abs=0.001 / (1 - rate))


def test_decisions_do_not_go_together() -> None:
    """Neighbours in a row, in a column, in a 64-bit word, of other places, seeds and texts are uncorrelated."""
    keys = token_keys(TEXTS, 3)
    one = keep_mask(keys, 4, 384, 0.5).float() + 0.5
    others = [one.roll(1, 0), *(one.roll(shift, 1) for shift in (1, 2, 3, 4)), keep_mask(keys, 5, 384, 0.5) + 0.5,
              keep_mask(token_keys(TEXTS, 4), 4, 384, 0.5) + 0.5, one.roll(64, 0)]
    for other in others:
        assert abs((one * other).mean() * 4) < 5 / one.numel() ** 0.5


def test_a_text_has_its_mask_in_any_company() -> None:
    alone = keep_mask(token_keys(TEXTS[5:6], 1), 2, 30, 0.3)
    company = keep_mask(token_keys(TEXTS, 1), 2, 30, 0.3)
    assert torch.equal(company[5 * 64:6 * 64], alone)
    assert not torch.equal(company[6 * 64:7 * 64], alone)
    assert torch.equal(keep_mask(token_keys(TEXTS, 1), 2, 44, 0.3)[:, :30], company)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_masking_zeroes_and_keeps_exactly(dtype: torch.dtype) -> None:
    keep = keep_mask(token_keys(TEXTS, 1), 0, 384, 0.4)
    values = torch.randn(keep.shape).to(dtype)
    assert torch.equal(masked_(values.clone(), keep), values * (keep != 0))
