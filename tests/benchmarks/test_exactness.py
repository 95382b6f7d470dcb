"""The comparison of training steps finds none apart, and says so where one is."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def exactness() -> ModuleType:
    return import_module("exactness")


def config_of(exactness: ModuleType, folder: Path) -> Any:
    return exactness.JobConfig(result=folder / "exactness.json", work=folder / "work", bodies=["xlm-roberta"],
                               workers=[1], mini_batches=[2], queries=5)


def test_one_worker_is_exact(exactness: ModuleType, tmp_path: Path) -> None:
    exactness.run(config_of(exactness, tmp_path))
    found = json.loads((tmp_path / "exactness.json").read_text())
    assert found["headline"]["comparisons"] == 2 * 2 * 2 * 2 * 2 + 4
    assert found["headline"]["max_abs_diff_grad"] < 1e-9
    assert all(row["diff_loss"] > 1e-3 and row["diff_grad"] > 1e-3 for row in found["tables"]["other_steps"])
    assert {row["dropout"] for row in found["tables"]["by_setting"]} == {"off", "keyed", "drawn"}


def test_a_step_that_is_off_by_a_millionth_fails(exactness: ModuleType, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    right = exactness.contrastive_backward

    def wrong(*args: Any, **given: Any) -> Any:
        return right(*args, **{**given, "scale": 1.000001})

    monkeypatch.setattr(exactness, "contrastive_backward", wrong)
    with pytest.raises(ValueError, match="float64: further from the plain full batch than 1e-09"):
        exactness.run(config_of(exactness, tmp_path))
