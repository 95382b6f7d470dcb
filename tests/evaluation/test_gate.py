"""Three outcomes, and the third never passes."""

from __future__ import annotations

import numpy as np
import pytest

from recsys_ray.evaluation.gate import GateConfig, GateError, decide, require
from recsys_ray.evaluation.significance import Comparison, Interval, Units, compare


def comparison(mean: float, half: float, units: int = 100, p_value: float = 0.001) -> Comparison:
    return Comparison(Interval(mean, mean - half, mean + half, units, units), p_value, 1.43 * half, 60, 10, 30, -0.1)


@pytest.mark.parametrize(("found", "outcome"), [
    (comparison(0.05, 0.02), "improved"),
    (comparison(-0.05, 0.02), "worse"),
    (comparison(0.01, 0.02), "undecidable"),                     # the interval holds 0
    (comparison(0.05, 0.02, units=29), "undecidable"),           # too few units, whatever the figures
    (comparison(0.05, 0.02, p_value=0.2), "undecidable"),        # the test does not agree with the interval
])
def test_outcomes(found, outcome):
    assert decide(found, GateConfig()).outcome == outcome


def test_margin_moves_both_borders():
    gate = GateConfig(margin=0.04)
    assert decide(comparison(0.05, 0.02), gate).outcome == "undecidable"    # [.03, .07] reaches below .04
    assert decide(comparison(0.07, 0.02), gate).outcome == "improved"
    assert decide(comparison(-0.07, 0.02), gate).outcome == "worse"
    assert "no difference beyond the margin" in decide(comparison(0.01, 0.02), gate).reason


def test_a_corrected_p_value_replaces_the_raw_one():
    assert decide(comparison(0.05, 0.02), GateConfig(), p_value=0.06).outcome == "undecidable"


def test_undecidable_names_the_effect_that_could_have_been_seen():
    assert "0.0286 could have been seen" in decide(comparison(0.01, 0.02), GateConfig()).reason


def test_only_an_improvement_passes():
    require("hybrid", decide(comparison(0.05, 0.02), GateConfig()))
    with pytest.raises(GateError, match="hybrid: undecidable"):
        require("hybrid", decide(comparison(0.01, 0.02), GateConfig()))
    with pytest.raises(GateError, match="hybrid: worse"):
        require("hybrid", decide(comparison(-0.05, 0.02), GateConfig()))


def test_a_candidate_equal_to_its_baseline_is_undecidable():
    values = np.random.default_rng(0).uniform(size=200)
    assert decide(compare(values, values, Units.rows(200)), GateConfig()).outcome == "undecidable"
