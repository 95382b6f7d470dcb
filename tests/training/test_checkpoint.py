"""Checkpoints: whole ones come back as they were, torn ones are passed over."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recsys_ray.training.checkpoint import drop_later, latest_checkpoint, prune, save_checkpoint

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}


def save(directory: Path, step: int) -> Path:
    return save_checkpoint(directory, step, {name: one + step for name, one in WEIGHTS.items()},
                           {"optimizer": {"state": {0: {"exp_avg": torch.full((2,), float(step))}}}},
                           {"step": step, "best_value": 0.5})


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    save(tmp_path, 3)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.state) == (3, {"step": 3, "best_value": 0.5})
    assert torch.equal(found.weights()["a"], WEIGHTS["a"] + 3)
    assert found.optimizer()["optimizer"]["state"][0]["exp_avg"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("damage", ["truncated", "bit", "missing", "no_complete", "empty_complete"])
def test_a_torn_one_is_passed_over(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 100)
    newest = save(tmp_path, 200)
    weights, complete = newest / "model.safetensors", newest / "COMPLETE.json"
    content = bytearray(weights.read_bytes())
    if damage == "truncated":
        weights.write_bytes(content[:-1])
    elif damage == "bit":
        content[-3] ^= 4
        weights.write_bytes(content)
    elif damage == "missing":
        weights.unlink()
    elif damage == "no_complete":
        complete.unlink()
    else:
        complete.write_text("")
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 100


@pytest.mark.parametrize("point", ["checkpoint_before_complete", "checkpoint_after_complete"])
def test_a_kill_leaves_the_one_before_or_this_one(tmp_path: Path, point: str) -> None:
    save(tmp_path, 1)
    code = ("import torch; from pathlib import Path; from recsys_ray.training.checkpoint import save_checkpoint\n"
            f"save_checkpoint(Path({str(tmp_path)!r}), 2, {{'a': torch.ones(1)}}, {{}}, {{}})")
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, "RECSYS_CRASH_AT": point}, check=False)
    assert ended.returncode == 137
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == (1 if point == "checkpoint_before_complete" else 2)
    prune(tmp_path)
    assert not list(tmp_path.glob(".writing*"))


def test_two_are_kept_and_later_ones_can_be_dropped(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step)
    prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    drop_later(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    assert latest_checkpoint(tmp_path / "none") is None
