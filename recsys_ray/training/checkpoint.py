"""Whole states of a training run on disk: written beside, checked, renamed into place; a torn one is never read.

    step-00000200/
      model.safetensors   the weights
      optimizer.pt        what torch needs besides (loaded with weights_only)
      state.json          step, budget, best value and whatever else is small
      COMPLETE.json       size and SHA-256 of the three; written last

No random state is kept: whatever is drawn in a step is a function of (seed, step).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recsys_ray.artifacts import FileEntry, check_file, crash_point, file_entry

log = logging.getLogger(__name__)

KEPT = 2
NAME = re.compile(r"step-(\d{8})")
WEIGHTS, OPTIMIZER, STATE, COMPLETE = "model.safetensors", "optimizer.pt", "state.json", "COMPLETE.json"


@dataclass(frozen=True)
class Checkpoint:
    """One complete state."""

    path: Path
    step: int
    state: dict[str, Any]

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by name."""
        return load_file(self.path / WEIGHTS)

    def optimizer(self) -> dict[str, Any]:
        """The optimizer's state, and a gradient scaler's, as they were given."""
        found: dict[str, Any] = torch.load(self.path / OPTIMIZER, map_location="cpu", weights_only=True)
        return found


def save_checkpoint(directory: Path, step: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any],
                    state: Mapping[str, Any]) -> Path:
    """Write the state of `step`; returns the checkpoint's directory."""
    directory.mkdir(parents=True, exist_ok=True)
    target, partial = directory / f"step-{step:08d}", directory / f".writing-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file({name: one.detach().cpu().contiguous() for name, one in weights.items()}, partial / WEIGHTS)
    torch.save(dict(optimizer), partial / OPTIMIZER)
    (partial / STATE).write_text(json.dumps(dict(state)), encoding="utf-8")
    crash_point("checkpoint_before_complete")
    entries = [file_entry(partial, name).model_dump() for name in (WEIGHTS, OPTIMIZER, STATE)]
    (partial / COMPLETE).write_text(json.dumps(entries), encoding="utf-8")
    for path in partial.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    shutil.rmtree(target, ignore_errors=True)   # of the same step, written by a run that went on from before it
    os.replace(partial, target)
    crash_point("checkpoint_after_complete")
    return target


def latest_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are all whole; None when there is none."""
    for path in sorted(directory.glob("step-*"), reverse=True):
        if NAME.fullmatch(path.name) and (found := _read(path)) is not None:
            return found
    return None


def _read(path: Path) -> Checkpoint | None:
    try:
        for values in json.loads((path / COMPLETE).read_bytes()):
            entry = FileEntry.model_validate(values)
            check_file(path / entry.path, entry)
        return Checkpoint(path, int(path.name.removeprefix("step-")), json.loads((path / STATE).read_bytes()))
    except (OSError, ValueError) as error:
        log.warning("%s is not whole (%s); an earlier one is taken", path, error)
        return None


def prune(directory: Path) -> None:
    """Delete all but the newest two checkpoints, and what killed writers left."""
    for path in sorted(directory.glob("step-*"), reverse=True)[KEPT:]:
        shutil.rmtree(path, ignore_errors=True)
    for path in directory.glob(".writing-*"):
        shutil.rmtree(path, ignore_errors=True)


def drop_later(directory: Path, step: int) -> None:
    """Delete the checkpoints after `step`: the run will make them anew."""
    for path in directory.glob("step-*"):
        if NAME.fullmatch(path.name) and int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path, ignore_errors=True)
