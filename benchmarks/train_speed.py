"""How fast a retriever is trained, beside sentence-transformers' own trainer.

    python benchmarks/train_speed.py --config configs/bench_train_speed/full.yaml

Every side trains the same model on the same pairs, truncation and batch size for one epoch, in its own
process with as many threads; the rounds alternate (A B C ..., then backwards). CPU time is that of the
process for tokenising and for all steps, with the model loaded and after a warm-up run of one batch. A
side's speed is its real tokens, without padding, over its CPU seconds. Two workers and Ray are timed by
the wall clock of their steps, after the first two.
"""

from __future__ import annotations

import json
import logging
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
from memory import PeakMemory
from pydantic import Field

from recsys_ray.config import Config, main
from recsys_ray.evaluation.results import write_result

log = logging.getLogger(__name__)

SIDES = Path(__file__).resolve().with_name("train_sides.py")
WARM_STEPS = 2      # of a distributed run, not counted: the first ones set up communication


class JobConfig(Config):
    """What is trained on, how and how often."""

    products: Path                                      # ESCI products.parquet: titles as queries, texts as products
    work: Path = Path("runs/bench_train_speed")
    result: Path = Path("benchmarks/results/train_speed.json")
    model: str = "minilm"
    batch_size: int = Field(default=64, ge=2)
    batches: int = Field(default=12, ge=1)              # of an epoch of one side
    distributed_batches: int = Field(default=20, ge=WARM_STEPS + 1)
    max_tokens: int = Field(default=128, ge=8)          # of queries and of products
    mini_batch: int = Field(default=32, ge=1)           # of the cached forms
    rounds: int = Field(default=3, ge=1)
    distributed_rounds: int = Field(default=3, ge=1)
    threads: int = Field(default=1, ge=1)
    seed: int = 7


def run(config: JobConfig) -> Path:
    """Measure all sides and write the result file; returns its path."""
    shutil.rmtree(config.work, ignore_errors=True)
    config.work.mkdir(parents=True)
    measured: dict[str, list[dict[str, Any]]] = {}
    single: dict[str, dict[str, Any]] = {
        "ours": {"side": "ours"},
        "st_fp32": {"side": "st", "bf16": False, "grouped": False},
        "st_bf16": {"side": "st", "bf16": True, "grouped": False},
        "st_bf16_grouped": {"side": "st", "bf16": True, "grouped": True},
        "ours_cached": {"side": "ours", "mini_batch": config.mini_batch},
        "st_bf16_cached": {"side": "st", "bf16": True, "grouped": True, "mini_batch": config.mini_batch},
    }
    distributed: dict[str, dict[str, Any]] = {
        "one_worker": {"side": "torchrun", "workers": 1}, "torchrun": {"side": "torchrun", "workers": 2},
        "ray": {"side": "ray", "workers": 2}}
    for sides, rounds, batches in ((single, config.rounds, config.batches),
                                   (distributed, config.distributed_rounds, config.distributed_batches)):
        pairs = _pairs(config, batches)
        for number in range(rounds):
            for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
                found = _side(config, pairs, **sides[name])
                measured.setdefault(name, []).append(found)
                log.info("%-16s %8.2f CPU-s %8.2f s, %.0f MB at most", name, found["cpu_s"], found["wall_s"],
                         found["peak_mb"])
    headline, tables = _figures(config, measured)
    shutil.rmtree(config.work)
    return write_result(config.result, command=f"python benchmarks/train_speed.py {' '.join(sys.argv[1:])}",
                        headline=headline, tables=tables, seeds=[config.seed])


def _pairs(config: JobConfig, batches: int) -> list[tuple[str, str]]:
    """(title, the rest of the product's text) of different products."""
    table = pq.read_table(config.products, columns=["title", "brand", "bullet_points", "description"]).to_pylist()
    order = np.random.default_rng(config.seed).permutation(len(table))
    wanted = (batches + 1) * config.batch_size      # one batch more, for the warm-up
    found: dict[str, tuple[str, str]] = {}
    for place in order:
        row = table[place]
        text = " ".join(str(row[name]) for name in ("brand", "bullet_points", "description") if row[name])
        if row["title"] and text:
            found.setdefault(text, (str(row["title"]), text))
        if len(found) == wanted:
            return list(found.values())
    raise ValueError(f"{config.products}: {len(found)} products with a title and a text, {wanted} are needed")


def _side(config: JobConfig, pairs: list[tuple[str, str]], **settings: Any) -> dict[str, Any]:
    directory = config.work.resolve() / "side"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    task = {"pairs": pairs, "directory": str(directory), **config.model_dump(
        mode="json", include={"model", "batch_size", "max_tokens", "threads", "seed"}), "mini_batch": None, **settings}
    (directory / "task.json").write_text(json.dumps(task), encoding="utf-8")
    with (directory / "log").open("wb") as stream:
        side = psutil.Popen([sys.executable, str(SIDES), str(directory / "task.json")], stdout=stream,
                            stderr=subprocess.STDOUT)
        with PeakMemory(side.pid) as memory:
            ended = side.wait()
    if ended:
        raise RuntimeError(f"side {settings} failed:\n" + (directory / "log").read_text(errors="replace")[-4000:])
    found: dict[str, Any] = json.loads((directory / "measured.json").read_bytes())
    return {**found, "peak_mb": memory.peak / 2**20}


def _figures(config: JobConfig, measured: dict[str, list[dict[str, Any]]]) -> tuple[dict[str, float], dict[str, Any]]:
    def pairs_of(of: str, to: str, ratio: Callable[[dict[str, Any], dict[str, Any]], float]) -> list[float]:
        return [ratio(a, b) for a, b in zip(measured[of], measured[to], strict=True)]

    def speed(a: dict[str, Any], b: dict[str, Any]) -> float:
        return float(a["tokens"] / a["cpu_s"] / (b["tokens"] / b["cpu_s"]))

    def step_time(a: dict[str, Any], b: dict[str, Any]) -> float:
        return float(a["step_s"] / b["step_s"])

    best = max(("st_bf16", "st_bf16_grouped"), key=lambda name: statistics.median(
        one["tokens"] / one["cpu_s"] for one in measured[name]))
    pairs = {
        "ratio_vs_st_fp32": pairs_of("ours", "st_fp32", speed),
        "ratio_vs_st_bf16": pairs_of("ours", best, speed),
        "ratio_vs_st_cached_bf16": pairs_of("ours_cached", "st_bf16_cached", speed),
        "cached_over_plain": [1 / value for value in pairs_of("ours_cached", "ours", speed)],
        "scaling_2_workers": pairs_of("one_worker", "torchrun", step_time),
        "ray_overhead": [value - 1 for value in pairs_of("ray", "torchrun", step_time)],
        "peak_memory_ratio_vs_st_bf16": pairs_of("ours", best, lambda a, b: float(a["peak_mb"] / b["peak_mb"])),
    }
    headline = {name: statistics.median(values) for name, values in pairs.items()}
    speeds = {name: [one["tokens"] / one["cpu_s"] for one in runs] for name, runs in measured.items()
              if "tokens" in runs[0]}
    headline["tokens_per_cpu_second"] = statistics.median(speeds["ours"])
    tables = {
        "pairs": {name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
                  for name, values in pairs.items()},
        "tokens_per_cpu_second": {name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
                                  for name, values in speeds.items()},
        "best_st_bf16": best, "sides": measured, "setting": config.model_dump(mode="json"),
    }
    return headline, tables


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
