"""The benchmarks of the adapter of pictures: folds of senders, and the table on worked cells."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys_ray.training.attribute_gate import SliceGateConfig

REPO = Path(__file__).resolve().parents[2]


def test_a_sender_is_in_one_fold_and_folds_are_about_even() -> None:
    senders = np.random.default_rng(0).integers(0, 60, 1000)
    folds = import_module("clothing").folds_of(senders, 5)
    assert all(len(set(folds[senders == one].tolist())) == 1 for one in range(60))
    assert np.bincount(folds).min() > 150


def cell(gain: float, noise: np.ndarray, **more: Any) -> dict[str, Any]:
    """Hits of 200 queries: 0.3 on average and `gain` more for necklines and denim."""
    denim = np.arange(200) % 2 == 0
    return {"hits": {"category2": (0.3 + noise).tolist(), "neckline": (0.3 + noise + gain).tolist(),
                     "material": (0.3 + noise + gain * denim).tolist()}, **more}


def test_the_table_finds_what_was_gained_and_what_was_lost() -> None:
    noise = np.random.default_rng(0).normal(0, 0.02, 200)
    frozen = cell(0, noise, chance={}, groups=[f"g{number}" for number in range(200)], planted={
        "category2": ["cardigan"] * 200, "material": ["denim", "leather"] * 100})
    trained = {"training": {}, "gate": [], "refused": False}
    cells = {"frozen/0": frozen, "ours/1": cell(0.1, noise, **trained), "source/1": cell(
        -0.1, noise, **{**trained, "refused": True}),
        "faults/1": {"caught": {"collapse": True, "other": False}, "nothing_to_lose": [],
                     "shuffled_metadata_caught": True}}
    headline, tables = import_module("attribute_adapter_table").summary(
        cells, (1,), ("cardigan",), ("denim", "leather"), SliceGateConfig())
    assert headline["neckline10_gain"] == pytest.approx(0.1)
    assert headline["rare_material_gain_min"] == pytest.approx(0.0, abs=1e-9)      # leather
    assert headline["slices_decidably_below_frozen"] == 0
    assert headline["slices_below_frozen_source"] == 3      # neckline, material, denim
    assert (headline["injected_collapse_caught"], headline["gate_refuses_source"]) == (0.5, 1.0)
    denim = next(line for line in tables["slices"] if line["slice"] == "material=denim")
    assert (denim["queries"], denim["ours"]) == (100, pytest.approx(denim["frozen"] + 0.1))
