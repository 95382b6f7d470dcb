"""Ten minutes at 80 % of what the service can do, with malformed requests among the others: errors and memory.

    python benchmarks/load.py --config configs/bench_load/full.yaml

Capacity is the highest rate, of requests that come at random moments whether or not others wait, at which the p99 stays
below a second and nobody is sent away; it is found by doubling and halving. Memory is that of all processes of the
service, sampled through the run; its slope is the least-squares line after `settle_s`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field
from serve_clients import Answered, Side, closed_loop, open_loop, percentiles, running

from recsys_ray.config import Config, main
from recsys_ray.evaluation.results import write_result
from recsys_ray.serving.config import ServeConfig

log = logging.getLogger(__name__)

MALFORMED = (b"", b"{", b'{"query": ""}', b'{"query": "\\ud800"}', b'{"query": "a", "k": NaN}',
             b'{"query": "a", "k": 1e400}', b'{"query": "a", "k": -1}',
             b'{"query": "a", "filters": {"colour": ["red"]}}',
             b"[" * 20_000, b"x" * 70_000)
P99_S = 1.0
Sample = tuple[float, dict[str, float]]     # seconds from the start, MB of the processes by name


class JobConfig(Config):
    """Which service, how it is asked, and for how long."""

    serve: ServeConfig
    queries: tuple[Path, ...]                           # files with a `query` column, asked in turn
    result: Path = Path("benchmarks/results/load.json")
    work: Path = Path("runs/bench_load")
    minutes: float = Field(default=10.0, gt=0)
    share: float = Field(default=0.8, gt=0, le=1)       # of the capacity
    malformed: float = Field(default=0.01, ge=0, lt=1)  # share of the requests
    settle_s: float = Field(default=120.0, ge=0)        # memory before is not counted
    sample_s: float = Field(default=5.0, gt=0)
    trial_s: float = Field(default=20.0, gt=0)          # of each rate that is tried
    first_rate: float = Field(default=2.0, gt=0)        # requests a second
    halvings: int = Field(default=3, ge=0)              # between a rate that went well and one that did not
    seed: int = 7


def run(config: JobConfig) -> Path:
    """Find the capacity, hold the load, write the result file; returns its path."""
    task = {"name": "load", "side": "ours", "logical_cpus": 6,
            "config": config.serve.model_dump(mode="json", exclude_defaults=True)}
    with running(task, config.work, {}) as side:
        asyncio.run(closed_loop(side.url, list(itertools.islice(bodies(config, 0.0), 8)), 2))
        trials = list[dict[str, float]]()
        capacity = find_capacity(side, config, trials)
        log.info("capacity %.2f requests a second", capacity)
        samples = list[Sample]()
        with sampled(side, samples, config.sample_s):
            answers = asyncio.run(open_loop(side.url, bodies(config, config.malformed), config.share * capacity,
                                            60 * config.minutes, config.seed))
    statuses = Counter(one.status for one in answers)
    good = [one for one in answers if one.status == 200]
    slope = slope_per_min([(seconds, sum(mb.values())) for seconds, mb in samples], config.settle_s)
    headline: dict[str, float | None] = {
        "requests": len(answers),
        "status_5xx": sum(count for status, count in statuses.items() if status >= 500 or not status),
        "rss_slope_mb_per_min": slope, "capacity_per_s": capacity, "p99_ms": percentiles(good)["p99_ms"],
        "degraded": sum(bool(one.body.get("degraded")) for one in good)}
    tables = {"statuses": {str(status): count for status, count in sorted(statuses.items())}, "trials": trials,
              "minutes": by_minute(answers, samples), "processes": by_process(samples, config.settle_s),
              "setting": config.model_dump(mode="json")}
    return write_result(config.result, command=f"python benchmarks/load.py {' '.join(sys.argv[1:])}",
                        headline=headline, tables=tables, seeds=[config.seed])


def bodies(config: JobConfig, malformed: float) -> Iterator[bytes]:
    """Requests without an end: the queries in turn, a drawn share of them malformed."""
    texts = [text for path in config.queries for text in pq.read_table(path, columns=["query"])["query"].to_pylist()
             if text and text.strip()]
    rng, bad = np.random.default_rng(config.seed), itertools.cycle(MALFORMED)
    for text in itertools.cycle(texts):
        yield next(bad) if rng.random() < malformed else json.dumps({"query": text[:500]}).encode()


def find_capacity(side: Side, config: JobConfig, trials: list[dict[str, float]]) -> float:
    """The highest rate tried that went well; every trial is added to `trials`."""
    requests = bodies(config, 0.0)

    def went_well(rate: float) -> bool:
        answers = asyncio.run(open_loop(side.url, requests, rate, config.trial_s, config.seed))
        found = {"per_s": rate, "refused": float(sum(one.status != 200 for one in answers)), **percentiles(answers)}
        trials.append(found)
        log.info("%.2f/s: p99 %.0f ms, %d refused", rate, found["p99_ms"], found["refused"])
        return not found["refused"] and found["p99_ms"] <= 1000 * P99_S

    good, bad = 0.0, config.first_rate
    while went_well(bad):
        good, bad = bad, 2 * bad
    for _ in range(config.halvings):
        middle = (good + bad) / 2
        good, bad = (middle, bad) if went_well(middle) else (good, middle)
    if not good:
        raise RuntimeError(f"the service does not keep its p99 below {P99_S} s at {bad:.2f} requests a second; lower "
                           "first_rate, or give it more to compute with")
    return good


class sampled:  # noqa: N801 - reads as what it does
    """Memory of a side while the block runs."""

    def __init__(self, side: Side, samples: list[Sample], every_s: float) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(side, samples, every_s), daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self, side: Side, samples: list[Sample], every_s: float) -> None:
        start = time.monotonic()
        while not self._ended.wait(every_s):
            samples.append((time.monotonic() - start, side.rss_mb()))


def slope_per_min(samples: Sequence[tuple[float, float]], settle_s: float) -> float | None:
    """MB a minute of the samples after `settle_s`; None of fewer than two."""
    kept = [(seconds / 60, mb) for seconds, mb in samples if seconds >= settle_s]
    if len(kept) < 2:
        return None
    minutes, mb = np.array(kept).T
    return float(np.polyfit(minutes, mb, 1)[0])


def by_process(samples: Sequence[Sample], settle_s: float) -> list[dict[str, Any]]:
    """Where the memory is and where it grew: of each kind of process, the largest first."""
    kept = [(seconds, mb) for seconds, mb in samples if seconds >= settle_s]
    names = {name for _, mb in kept for name in mb}
    found = [{"process": name, "first_mb": kept[0][1].get(name, 0.0), "last_mb": kept[-1][1].get(name, 0.0),
              "slope_mb_per_min": slope_per_min([(seconds, mb.get(name, 0.0)) for seconds, mb in kept], 0.0)}
             for name in names]
    return sorted(found, key=lambda one: (-one["last_mb"], one["process"]))


def by_minute(answers: Sequence[Answered], samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Requests, p99 and memory of each minute."""
    found = []
    for minute in range(int(max(one.due_s for one in answers) // 60) + 1):
        mine = [one for one in answers if one.due_s // 60 == minute and one.status == 200]
        memory = [sum(mb.values()) for seconds, mb in samples if seconds // 60 == minute]
        found.append({"minute": minute + 1, "answered": len(mine), **(percentiles(mine) if mine else {}),
                      "rss_mb": float(np.mean(memory)) if memory else None})
    return found


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
