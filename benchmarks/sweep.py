"""A sweep on the demo shop that is killed in the middle and run again, with its leaderboard.

    python benchmarks/sweep.py --config configs/bench_sweep/full.yaml
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from recsys_ray.config import Config, main
from recsys_ray.data.demo_shop import DemoShopConfig, make_demo_shop
from recsys_ray.data.demo_shop.identity import GENERATOR_VERSION, generator_hash
from recsys_ray.data.pipeline import PrepareConfig, prepare
from recsys_ray.data.training_pairs import MakePairsConfig, make_pairs
from recsys_ray.evaluation.results import write_result
from recsys_ray.training.sweep import SweepConfig

log = logging.getLogger(__name__)

JOB = Path(__file__).resolve().parents[1] / "jobs" / "tune.py"


class JobConfig(Config):
    """Which shop, which sweep, and when its driver is killed."""

    shop: DemoShopConfig
    prepare: PrepareConfig
    pairs: MakePairsConfig
    sweep: SweepConfig
    work: Path = Path("runs/bench_sweep")           # deleted before the run
    kill_after: int = Field(default=4, ge=1)        # finished trials
    result: Path = Path("benchmarks/results/sweep.json")


def run(config: JobConfig) -> Path:
    """Sweep, kill, sweep again; returns the path of the result file."""
    shutil.rmtree(config.work, ignore_errors=True)
    make_demo_shop(config.shop)
    prepare(config.prepare)
    make_pairs(config.pairs)
    settings = config.work / "tune.yaml"
    settings.write_text(config.sweep.to_yaml(), encoding="utf-8")
    command = [sys.executable, str(JOB), "--config", str(settings)]
    finished_before = _killed(command, config)
    started = time.monotonic()
    subprocess.run(command, check=True)
    board: dict[str, Any] = json.loads((config.sweep.output / "leaderboard.json").read_bytes())
    headline = {"trials": board["trials"], "errored": board["errored"], "restored": int(board["restored"]),
                "finished_before_the_kill": finished_before, "best": board["rows"][0]["valid"],
                "worst": min(row["valid"] for row in board["rows"] if row["valid"] is not None)}
    tables = {"leaderboard": board["rows"], "importance": board["importance"],
              "seconds_after_the_kill": round(time.monotonic() - started, 1),
              "objective": config.sweep.finetune.validation.objective,
              "generator": [GENERATOR_VERSION, generator_hash()], "setting": config.model_dump(mode="json")}
    return write_result(config.result, command=f"python benchmarks/sweep.py {' '.join(sys.argv[1:])}",
                        headline=headline, tables=tables, seeds=[config.sweep.seed])


def _killed(command: list[str], config: JobConfig) -> int:
    """Start the sweep in a process group of its own and kill all of it; returns the trials that had surely ended.

    A trial that was stopped early publishes nothing, so those that have begun are counted: all but the concurrent
    ones have ended.
    """
    driver = subprocess.Popen(command, start_new_session=True)
    while (ended := _begun(config) - config.sweep.concurrent) < config.kill_after:
        if driver.poll() is not None:
            raise RuntimeError(f"the sweep ended with {driver.returncode} before it could be killed")
        time.sleep(0.5)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    log.info("killed the driver after %d trials", ended)
    return ended


def _begun(config: JobConfig) -> int:
    trials = config.sweep.output / "trials"
    return len([path for path in trials.iterdir() if path.is_dir()]) if trials.is_dir() else 0


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
