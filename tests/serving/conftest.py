"""Fixtures of the serving tests: the small index, and the directory on the path for `small_shop`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def small_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a published index of 120 products in three segments."""
    from small_shop import build_small_index

    root = tmp_path_factory.mktemp("small") / "index"
    build_small_index(root)
    return root
