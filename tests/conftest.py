"""Fixtures of the whole suite: one local Ray, the real data sets, and small well-formed tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One local Ray with 4 logical CPUs for the whole run."""
    from recsys_ray.runtime import RayConfig, connected

    with connected(RayConfig(num_cpus=4, progress=False)):
        yield


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """`real_data("esci_us_subset")`: the folder of a real data set, or a skip that says what is missing."""
    root = Path(os.environ.get("RECSYS_DATA", REPO.parent / "shared" / "data"))

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"real data set {name!r} not found; set RECSYS_DATA to the folder that holds it")
        return root / name

    return folder
