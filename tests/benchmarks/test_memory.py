"""Peak memory of a process tree: grandchildren count, a shared page counts once, the end is no error."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

MB = 1 << 20
pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the kernel tells no PSS here")

# Maps 64 MB, fills them, forks three children that read them, tells when all have, and waits to be ended.
SHARED = """
import mmap, os, sys, time
memory = mmap.mmap(-1, 64 << 20)
memory.write(b"x" * (64 << 20))
for _ in range(3):
    if os.fork() == 0:
        sum(memory[at] for at in range(0, 64 << 20, 4096))
        os.write(1, b".")
        time.sleep(60)
        os._exit(0)
sys.stdin.read()
os.killpg(0, 9)
"""
PRIVATE = """
import subprocess, sys
held = "held = bytearray(b'x') * (80 << 20); print('ready', flush=True); input()"
subprocess.run([sys.executable, "-c", held])
"""


@pytest.fixture(scope="module")
def memory() -> ModuleType:
    return import_module("memory")


def start(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            start_new_session=True)


def read(process: subprocess.Popen[bytes], size: int) -> bytes:
    assert process.stdout is not None
    return process.stdout.read(size)


def test_a_grandchild_counts(memory: ModuleType) -> None:
    process = start(PRIVATE)
    with memory.PeakMemory(process.pid, interval_s=0.02) as peak:
        assert read(process, 5) == b"ready"
        time.sleep(0.3)
        process.communicate(b"\n")
    assert 80 * MB < peak.peak < 200 * MB
    assert peak.samples > 3


def test_memory_that_four_processes_share_counts_once(memory: ModuleType) -> None:
    process = start(SHARED)
    with memory.PeakMemory(process.pid, interval_s=0.02) as peak:
        assert read(process, 3) == b"..."
        time.sleep(0.3)
        process.communicate()
    assert 64 * MB < peak.peak < 200 * MB   # counted four times it would be 256 and more


def test_a_process_that_has_ended_has_no_memory(memory: ModuleType) -> None:
    process = start("")
    process.communicate()
    with memory.PeakMemory(process.pid, interval_s=0.01) as peak:
        time.sleep(0.05)
    assert peak.peak == memory.pss_bytes(process.pid) == 0
    assert peak.samples > 0
