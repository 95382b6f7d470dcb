"""Learning curves of two runs that must be the same run: equal but for the rounding of threads and kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from recsys_ray.artifacts import Artifact
from recsys_ray.training.trackers import read_curve

ROUNDING = 1e-4     # relative: a resumed process may add the same numbers in another order

Curve = Sequence[Mapping[str, float]]


def curve(artifact: Artifact) -> list[dict[str, float]]:
    """Steps and evaluations without what depends on the clock."""
    return [{name: value for name, value in line.items() if name not in ("seconds", "cpu_seconds")}
            for line in read_curve(artifact.file("metrics.jsonl"))]


def assert_same_curve(found: Curve, wanted: Curve, relative: float = ROUNDING) -> None:
    assert [line.keys() for line in found] == [line.keys() for line in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=relative, abs=relative)


def assert_same_weights(found: Path, wanted: Path) -> None:
    one, other = load_file(found), load_file(wanted)
    assert one.keys() == other.keys()
    for name in other:
        np.testing.assert_allclose(one[name], other[name], rtol=ROUNDING, atol=1e-5, err_msg=name)
