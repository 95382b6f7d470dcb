"""The clients and figures of the serving benchmarks: who waits for whom, and what is made of it."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys_ray.runtime import free_ports

REPO = Path(__file__).resolve().parents[2]


clients, speed, load_test, pareto = (import_module(name) for name in ("serve_clients", "serve_speed", "load", "pareto"))


@pytest.fixture
def slow_server() -> Iterator[tuple[str, list[int]]]:
    """A server that takes 0.2 s a request, and how many it had at hand at each."""
    at_hand, most = [0], list[int]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            at_hand[0] += 1
            most.append(at_hand[0])
            body = self.rfile.read(int(self.headers["content-length"]))
            time.sleep(0.2)
            at_hand[0] -= 1
            answer = json.dumps({"said": len(body)}).encode()
            self.send_response(200 if body != b"bad" else 422)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", most
    server.shutdown()


def test_in_a_closed_loop_each_client_waits_for_its_answer(slow_server: tuple[str, list[int]]) -> None:
    url, most = slow_server
    answers = asyncio.run(clients.closed_loop(url, [b"a", b"bb", b"bad", b"dddd", b"e", b"f"], 2))
    assert max(most) <= 2
    assert sorted(one.body["said"] for one in answers) == [1, 1, 1, 2, 3, 4]
    assert sorted(one.status for one in answers) == [200] * 5 + [422]
    assert all(one.took_s >= 0.19 for one in answers)


def test_in_an_open_loop_nobody_waits_for_another(slow_server: tuple[str, list[int]]) -> None:
    url, most = slow_server
    answers = asyncio.run(clients.open_loop(url, itertools.repeat(b"a"), 40.0, 1.0, 7))
    assert max(most) > 3
    assert 20 < len(answers) < 65
    assert all(0 < one.due_s < 1 for one in answers)
    assert min(one.took_s for one in answers) >= 0.19


def test_a_server_that_is_not_there_is_no_answer() -> None:
    (answer,) = asyncio.run(clients.closed_loop(f"http://127.0.0.1:{free_ports(1)[0]}", [b"{}"], 1))
    assert answer.status == 0


def test_ratios_are_those_of_one_round() -> None:
    def side(*rates: float) -> list[dict[str, Any]]:
        return [{str(n): {"per_s": rate, "p50_ms": 100 / rate, "p99_ms": 300 / rate} for n in (1, 8, 32)}
                for rate in rates]

    measured = {"naive_fp32": side(1, 2, 1), "naive_bf16": side(2, 2, 2), "same_work": side(3, 6, 4),
                "cascade": side(10, 10, 20)}
    hops = {"uvicorn": {"p50_ms": 1.0}, "default_0": {"p50_ms": 6.0}, "throughput_0": {"p50_ms": 1.5}}
    config = speed.JobConfig(index=REPO, queries=(), same_work={"cross_encoder": {"model": "m"}, "cross_top": 200},
                             cascade={}, quality={"index": REPO, "judged": {"queries": "q", "judgments": "j"}},
                             retriever={"depth": 100}, clients={1: 1, 8: 1, 32: 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "open_artifact", lambda *_: type("A", (), {"manifest": type("M", (), {
            "facts": {"live_rows": 7}})}))
        headline, _ = speed.figures(config, measured, hops, {"cascade": 0.59, "naive_fp32": 0.6})
    assert headline == pytest.approx({
        "same_work_ratio_vs_naive": 3.0, "throughput_ratio_vs_naive": 10.0, "throughput_ratio_vs_naive_bf16": 5.0,
        "ndcg_kept": 0.59 / 0.6, "p50_ms_1_client": 10.0, "p99_ms_8_clients": 30.0, "hop_ms_default": 5.0,
        "hop_ms_throughput": 0.5})


def test_a_run_with_a_degraded_answer_is_refused() -> None:
    good = clients.Answered(0, 1, 200, {"items": [1], "took_ms": {}})
    speed._check("x", [good])
    for bad in ({"items": [1], "degraded": True}, {"items": []}, {}):
        with pytest.raises(RuntimeError, match="1 of 2 answers"):
            speed._check("x", [good, clients.Answered(0, 1, 200, bad)])


def test_the_slope_is_that_after_the_service_settled() -> None:
    samples = [(float(second), 1000.0 if second < 60 else 500 + second / 60 * 3) for second in range(0, 300, 5)]
    assert load_test.slope_per_min(samples, 60) == pytest.approx(3.0)
    assert load_test.slope_per_min(samples[:3], 60) is None


def test_capacity_is_the_highest_rate_that_went_well(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answers(url: str, bodies: Any, rate: float, seconds: float, seed: int) -> list[Any]:
        return [clients.Answered(0, 0.1 if rate <= 11 else 2.0, 200, {})] * 10

    monkeypatch.setattr(load_test, "open_loop", answers)
    config = load_test.JobConfig(serve={"index": REPO}, queries=(), first_rate=2, halvings=3)
    monkeypatch.setattr(load_test, "bodies", lambda *_: iter(()))
    trials: list[dict[str, float]] = []
    assert load_test.find_capacity(type("S", (), {"url": ""}), config, trials) == 11.0     # 2 4 8 16: 12 10 11
    assert [one["per_s"] for one in trials] == [2, 4, 8, 16, 12, 10, 11]
    with pytest.raises(RuntimeError, match="lower first_rate"):
        load_test.find_capacity(type("S", (), {"url": ""}), config.replace(first_rate=100.0, halvings=0), [])


def test_the_front_holds_what_nothing_cheaper_beats() -> None:
    values = {name: np.full(5, quality) for name, quality in (("a", 0.5), ("b", 0.4), ("c", 0.7), ("d", 0.7))}
    config = pareto.JobConfig(quality={"index": REPO, "judged": {"queries": "q", "judgments": "j"}}, cascades={},
                              cpu_hour_price=0.036)
    rows = pareto.table(values, {"a": [9.0, 5.0], "b": [10.0], "c": [100.0], "d": [200.0]}, config)
    assert [(row["cascade"], row["front"]) for row in rows] == [("a", True), ("b", False), ("c", True), ("d", False)]
    assert rows[0]["cpu_ms"] == 5.0
    assert rows[2]["price_per_million"] == pytest.approx(1.0)    # a million times 100 ms are 27.8 hours
