"""Rates over a run, parameter groups, clipping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from recsys_ray.training.optim import OptimConfig, build_optimizer, clip, rate_at, set_rate


@pytest.mark.parametrize(("schedule", "middle", "end"), [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0),
                                                         ("constant", 1.0, 1.0)])
def test_the_rate_rises_and_falls(schedule: str, middle: float, end: float) -> None:
    config = OptimConfig.model_validate({"learning_rate": 1.0, "warmup": 0.2, "schedule": schedule})
    assert rate_at(0.0, config) == 0.0
    assert rate_at(0.1, config) == pytest.approx(0.5)
    assert rate_at(0.2, config) == pytest.approx(1.0)
    assert rate_at(0.6, config) == pytest.approx(middle)
    assert rate_at(1.0, config) == pytest.approx(end)
    assert rate_at(2.0, config) == pytest.approx(end)


def test_only_matrices_decay_and_frozen_ones_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1))
    decayed, plain = optimizer.param_groups
    assert decayed["params"] == [model[0].weight]
    assert decayed["weight_decay"] == 0.1
    assert len(plain["params"]) == 4
    assert plain["weight_decay"] == 0.0
    set_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


def test_a_part_of_a_model_has_a_rate_of_its_own() -> None:
    model = nn.ModuleDict({"head": nn.Linear(3, 2), "tower": nn.Linear(3, 3)})
    optimizer = build_optimizer(model, OptimConfig(), {"tower.": 0.01})
    set_rate(optimizer, 0.5)
    rates = {id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]}
    assert {rates[id(one)] for one in model["head"].parameters()} == {0.5}
    assert {rates[id(one)] for one in model["tower"].parameters()} == {0.005}
    assert len(rates) == 4


def test_long_gradients_are_cut_and_short_ones_are_left() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    for longest, wanted in ((1.0, [0.6, 0.8]), (10.0, [3.0, 4.0]), (None, [3.0, 4.0])):
        parameter.grad = torch.tensor([3.0, 4.0])
        assert clip([parameter], longest) == pytest.approx(5.0)
        assert torch.allclose(parameter.grad, torch.tensor(wanted), atol=1e-5)
    parameter.grad = torch.tensor([math.nan, 1.0])
    assert math.isnan(clip([parameter], 1.0))
