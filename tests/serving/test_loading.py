"""Loading in the background: not yet, there, and never."""

from __future__ import annotations

import threading
import time

import pytest

from recsys_ray.artifacts import ArtifactError
from recsys_ray.serving.loading import Background, NotLoadedError, PartStatus


def wait_for(loading: Background[int]) -> PartStatus:
    deadline = time.monotonic() + 10
    while not (status := loading.status()).ready and status.problem is None and time.monotonic() < deadline:
        time.sleep(0.005)
    return loading.status()


def test_a_value_is_there_once_it_is_loaded() -> None:
    gate = threading.Event()
    loading = Background("number", lambda: 7 if gate.wait(10) else 0)
    assert loading.status() == PartStatus(False)
    with pytest.raises(NotLoadedError, match="still loading"):
        loading.get()
    gate.set()
    assert wait_for(loading) == PartStatus(True)
    assert loading.get() == 7


def test_a_failure_is_kept_and_named() -> None:
    def damaged() -> int:
        raise ArtifactError("vectors.npy: SHA-256 differs")

    loading = Background("shard 0", damaged)
    assert wait_for(loading) == PartStatus(False, "vectors.npy: SHA-256 differs")
    with pytest.raises(NotLoadedError, match="SHA-256 differs"):
        loading.get()


def test_an_unforeseen_failure_keeps_its_details_in_the_log() -> None:
    loading = Background("shard 0", lambda: 1 // 0)
    assert wait_for(loading).problem == "ZeroDivisionError; see the log"
