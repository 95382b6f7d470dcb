"""Clients of a service under measurement: so many at once, or so many requests a second whoever waits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from recsys_ray.runtime import free_ports

SIDES = Path(__file__).resolve().with_name("serve_sides.py")


@dataclass(frozen=True)
class Answered:
    """One request: when it was due, in seconds from the start, how long it took, and what came back."""

    due_s: float
    took_s: float
    status: int         # 0: no answer at all
    body: dict[str, Any]


@dataclass(frozen=True)
class Side:
    """A side that runs: its URL and the processes behind it."""

    url: str
    process: subprocess.Popen[bytes]

    def cpu_s(self) -> float:
        """CPU-seconds of the side so far, of all its processes that live."""
        return sum(sum(times[:2]) for times in self._each(lambda one: one.cpu_times()))

    def rss_mb(self) -> dict[str, float]:
        """Resident memory of its processes, those of one name taken together."""
        found = Counter[str]()
        for name, rss in self._each(lambda one: (process_name(one), one.memory_info().rss)):
            found[name] += rss
        return {name: rss / 2**20 for name, rss in found.items()}

    def _each(self, ask: Any) -> list[Any]:
        found = []
        root = psutil.Process(self.process.pid)
        for one in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                found.append(ask(one))
        return found


def process_name(process: psutil.Process) -> str:
    """What a process is: the title it gave itself, else its program or the script that it runs."""
    words = [word for word in process.cmdline() if word and not word.startswith("-")]
    if not words:
        return process.name()
    scripts = [Path(word).stem for word in words[1:] if word.endswith(".py")]
    own = words[0].split()[0]
    if own.startswith("ray::"):
        return own.partition(".")[0]    # behind the dot is what it does just now
    return scripts[0] if scripts else Path(own).name


@contextlib.contextmanager
def running(task: Mapping[str, Any], directory: Path, env: Mapping[str, str]) -> Iterator[Side]:
    """A side of `serve_sides.py`, ready; it ends with the block. Its log is `directory/<name>.log`."""
    directory.mkdir(parents=True, exist_ok=True)
    path, log = directory / f"{task['name']}.json", directory / f"{task['name']}.log"
    path.write_text(json.dumps({**task, "port": free_ports(1)[0]}), encoding="utf-8")
    with log.open("ab") as stream:
        process = subprocess.Popen([sys.executable, str(SIDES), str(path)], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=stream, env={**os.environ, **env})
    try:
        assert process.stdout is not None
        line = b""
        while not line.startswith(b"READY"):
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"side {task['name']} did not start; its log is {log}:\n"
                                   + log.read_text(errors="replace")[-2000:])
        threading.Thread(target=process.stdout.read, daemon=True).start()   # what it prints must not fill the pipe
        yield Side(line.decode().split()[1], process)
    finally:
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def closed_loop(url: str, bodies: Sequence[bytes], clients: int) -> list[Answered]:
    """All bodies sent once, by `clients` that each wait for their answer before they send the next."""
    waiting, found = iter(bodies), list[Answered]()
    start = time.perf_counter()

    async def client(http: httpx.AsyncClient) -> None:
        for body in waiting:
            found.append(await _sent(http, body, time.perf_counter() - start))

    async with _http(url, clients) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return found


def wait_until_answered(url: str, body: bytes, seconds: float = 60.0) -> None:
    """Return when a request succeeds: a proxy may need a moment to learn of the replicas; `RuntimeError` after that."""
    until = time.monotonic() + seconds
    while (status := asyncio.run(closed_loop(url, [body], 1))[0].status) != 200:
        if time.monotonic() > until:
            raise RuntimeError(f"{url} answers {status}")
        time.sleep(0.2)


async def open_loop(url: str, bodies: Iterator[bytes], rate: float, seconds: float, seed: int) -> list[Answered]:
    """Requests at random moments, `rate` a second, sent when they are due whether or not others wait."""
    rng, start, found = np.random.default_rng(seed), time.perf_counter(), list[Answered]()
    due, tasks = 0.0, set[asyncio.Task[None]]()

    async def send(http: httpx.AsyncClient, body: bytes, due: float) -> None:
        answer = await _sent(http, body, due)
        found.append(Answered(due, time.perf_counter() - start - due, answer.status, answer.body))

    async with _http(url, 1000) as http:
        while (due := due + float(rng.exponential(1 / rate))) < seconds:
            await asyncio.sleep(max(0.0, due - (time.perf_counter() - start)))
            task = asyncio.create_task(send(http, next(bodies), due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
    return found


def _http(url: str, connections: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(base_url=url, timeout=300, limits=limits)


async def _sent(http: httpx.AsyncClient, body: bytes, due: float) -> Answered:
    begun = time.perf_counter()
    try:
        answer = await http.post("/v1/search", content=body, headers={"content-type": "application/json"})
    except httpx.HTTPError:
        return Answered(due, time.perf_counter() - begun, 0, {})
    took = time.perf_counter() - begun
    try:
        return Answered(due, took, answer.status_code, answer.json())
    except ValueError:
        return Answered(due, took, answer.status_code, {})


def percentiles(answers: Sequence[Answered]) -> dict[str, float]:
    """p50, p95 and p99 of the answers' times, in milliseconds."""
    values = np.percentile([one.took_s * 1000 for one in answers], [50, 95, 99])
    return dict(zip(("p50_ms", "p95_ms", "p99_ms"), map(float, values), strict=True))
