"""Cells of a benchmark's table: each a process of one thread and a file of its own, so a stopped run goes on.

A cell's file carries a fingerprint of what its figures depend on; one with another fingerprint is made again.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recsys_ray.artifacts import git_sha, write_text
from recsys_ray.config import fingerprint
from recsys_ray.evaluation.results import machine, versions

log = logging.getLogger(__name__)


def make_missing(script: str, names: Sequence[str], is_made: Callable[[str], bool], logs: Path, parallel: int) -> None:
    """Run `script`, with this process's arguments and `cell=NAME`, for the cells not made yet, `parallel` at a time.

    Errors: `RuntimeError` with the names of the cells that failed, once all others are made.
    """
    todo = [name for name in names if not is_made(name)]
    log.info("%d of %d cells to make", len(todo), len(names))
    running: dict[str, subprocess.Popen[bytes]] = {}
    logs.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    while todo or running:
        while todo and len(running) < parallel:
            name = todo.pop(0)
            with (logs / f"{name.replace('/', '-')}.log").open("wb") as stream:
                running[name] = subprocess.Popen([sys.executable, script, *sys.argv[1:], f"cell={name}"],
                                                 stdout=stream, stderr=stream,
                                                 env={**os.environ, "OMP_NUM_THREADS": "1"})
        for name in [name for name, process in running.items() if process.poll() is not None]:
            code = running.pop(name).returncode
            log.info("%s: %s; %d left", name, "made" if code == 0 else f"failed with {code}", len(todo) + len(running))
            if code:
                failed.append(name)
        time.sleep(0.5)
    if failed:
        raise RuntimeError(f"cells failed: {', '.join(failed)}; their logs are under {logs}")


def is_current(path: Path, identity: Any) -> bool:
    """Whether the cell's file is there and was made from `identity`."""
    return path.is_file() and bool(json.loads(path.read_bytes())["identity"] == fingerprint(identity))


def read_cell(path: Path) -> dict[str, Any]:
    """What a cell's file holds."""
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def write_cell(path: Path, identity: Any, values: dict[str, Any]) -> None:
    """Write a cell's file: its values, what they were made from, by which code and on which machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"identity": fingerprint(identity), "git_sha": git_sha(), "machine": machine(),
                                 "versions": versions(), **values}) + "\n")


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`one` with the keys of `other` over it, level by level."""
    return {**one, **{key: merged(one[key], value) if isinstance(value, dict) and isinstance(one.get(key), dict)
                      else value for key, value in other.items()}}
