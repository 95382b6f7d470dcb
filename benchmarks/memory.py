"""Memory of a whole process tree while it works: proportional set sizes, sampled from the kernel.

PSS divides a shared page among the processes that hold it, so that Ray's object store counts once;
the sum of resident sets counts it once for every worker.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path
from types import TracebackType

import psutil


class PeakMemory:
    """The largest PSS, in bytes, of a process and all its descendants while the block runs."""

    def __init__(self, root: int, interval_s: float = 0.5) -> None:
        self.peak = 0
        self.samples = 0
        self._interval = interval_s
        self._seen = {root: _started(root)}     # process id -> start time, which tells a reused id
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            self._sample()
            self._ended.wait(self._interval)

    def _sample(self) -> None:
        children = defaultdict(list)
        for process in psutil.process_iter(["ppid"]):   # once over all processes: cheap enough to sample often
            children[process.info["ppid"]].append(process.pid)
        # A process whose parent has ended is no longer below the root: once seen, it stays in the sum.
        self._seen = {pid: started for pid, started in self._seen.items() if started and _started(pid) == started}
        waiting = list(self._seen)
        while waiting:
            for child in children[waiting.pop()]:
                if child not in self._seen:
                    self._seen[child] = _started(child)
                    waiting.append(child)
        self.peak = max(self.peak, sum(map(pss_bytes, self._seen)))
        self.samples += 1


def _started(pid: int) -> float:
    """When a process started, in seconds since 1970; 0 when it has ended."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0


def pss_bytes(pid: int) -> int:
    """The proportional set size of one process; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
