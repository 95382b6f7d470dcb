"""Result files: what a benchmark measured, on which machine, with which versions, as committed JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from recsys_ray.artifacts import git_sha, write_text

PACKAGES = ("ray", "torch", "transformers", "sentence-transformers", "faiss-cpu", "bm25s", "pyarrow", "numpy")


def write_result(path: Path, *, command: str, headline: Mapping[str, float | int | None],
                 tables: Mapping[str, Any], seeds: Sequence[int] = ()) -> Path:
    """Write `path` with the headline figures (flat names to numbers), the tables and where they were obtained."""
    document = {
        "name": path.stem, "command": command, "git_sha": git_sha(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "versions": versions(),
        "seeds": list(seeds), "headline": dict(headline), "tables": dict(tables),
    }
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path


def machine() -> dict[str, Any]:
    """CPU model, cores, RAM in GB and the load average at this moment."""
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "ram_gb": round(psutil.virtual_memory().total / 2**30, 1),
            "load": [round(value, 2) for value in os.getloadavg()]}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape the figures."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
