"""The service on a real Serve while its replicas die or hang: no request may fail because one process did."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from small_shop import LIMITS, RETRIEVER, body

from recsys_ray.runtime import free_ports
from recsys_ray.serving.app import serving
from recsys_ray.serving.config import ServeConfig, Stage, Stages

pytestmark = pytest.mark.ray
DEADLINE_S = 5.0
CLIENTS = 4


@pytest.fixture(scope="module")
def url(local_ray: None, small_index: Path) -> Iterator[str]:
    """A service without an encoder: two shards of two replicas each."""
    port = free_ports(1)[0]
    config = ServeConfig(index=small_index, encoder=None, retriever=RETRIEVER.replace(mode="bm25"), limits=LIMITS,
                         shards=2, stages=Stages(shard=Stage(replicas=2)), port=port,
                         deadline_ms=int(DEADLINE_S * 1000))
    with serving(config) as url:
        yield url


def replicas(shard: int) -> list[psutil.Process]:
    """The processes of a shard, all of them descendants of this one."""
    found = []
    for one in psutil.Process().children(recursive=True):
        try:
            title = (one.cmdline() or [""])[0]     # ray::ServeReplica:<application>:<deployment>[.<method>]
        except psutil.Error:
            continue
        if title.split(".")[0].endswith(f":shard-{shard}"):
            found.append(one)
    return found


def wait_for_replicas(shard: int, count: int, seconds: float = 40) -> list[psutil.Process]:
    deadline = time.monotonic() + seconds
    while len(found := replicas(shard)) != count:
        assert time.monotonic() < deadline, f"{len(found)} replicas of shard {shard}, not {count}"
        time.sleep(0.2)
    return found


async def ask_while(url: str, events: list[tuple[float, Any]], seconds: float) -> list[httpx.Response]:
    """All answers that some clients got in this time, one request after another; `events`: (when, what to do)."""
    until = time.monotonic() + seconds

    async def ask() -> list[httpx.Response]:
        got = []
        async with httpx.AsyncClient(base_url=url, timeout=30) as http:
            while time.monotonic() < until:
                got.append(await http.post("/v1/search", content=body(query="red sofa", k=5)))
                await asyncio.sleep(0.02)
        return got

    async def act(when: float, event: Any) -> None:
        await asyncio.sleep(when)
        event()

    *answers, _ = await asyncio.gather(*(ask() for _ in range(CLIENTS)), asyncio.gather(*(act(*one) for one in events)))
    return [answer for some in answers for answer in some]


def shards_answered(answers: list[httpx.Response]) -> set[tuple[int, int]]:
    return {(answer.json()["shards_answered"], answer.json()["shards_total"]) for answer in answers}


def test_a_killed_replica_costs_no_answer_and_is_replaced(url: str) -> None:
    first, second = wait_for_replicas(0, 2), wait_for_replicas(1, 2)
    events = [(1.0, first[0].suspend), (1.3, first[0].kill), (2.0, second[0].suspend), (2.3, second[0].kill)]
    answers = asyncio.run(ask_while(url, events, 5.0))  # suspended first: it has requests in hand when it dies
    assert not first[0].is_running() or first[0].status() == psutil.STATUS_ZOMBIE
    assert len(answers) > 5 * CLIENTS
    assert {answer.status_code for answer in answers} == {200}
    assert shards_answered(answers) == {(2, 2)}
    assert {one.pid for one in wait_for_replicas(0, 2)} != {one.pid for one in first}


@contextmanager
def stopped(processes: list[psutil.Process]) -> Iterator[None]:
    """The processes hang for the time of the block."""
    for one in processes:
        os.kill(one.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for one in processes:
            os.kill(one.pid, signal.SIGCONT)


def test_a_shard_that_hangs_is_left_out_at_the_deadline(url: str) -> None:
    search = body(query="red sofa", k=50)
    complete = httpx.post(f"{url}/v1/search", content=search, timeout=30).json()
    with stopped(wait_for_replicas(1, 2)):
        began = time.monotonic()
        answer = httpx.post(f"{url}/v1/search", content=search, timeout=30)
        took = time.monotonic() - began
        ready = httpx.get(f"{url}/readyz", timeout=30)
    assert answer.status_code == 200
    assert shards_answered([answer]) == {(1, 2)}
    assert DEADLINE_S <= took < DEADLINE_S + 5
    found, all_found = ({item["product_id"] for item in one["items"]} for one in (answer.json(), complete))
    assert found
    assert found < all_found
    assert (ready.status_code, ready.json()["problems"]) == (503, ["shard 1: does not answer"])
    deadline = time.monotonic() + 20
    while shards_answered([httpx.post(f"{url}/v1/search", content=search, timeout=30)]) != {(2, 2)}:
        assert time.monotonic() < deadline, "the shard did not come back"
