"""What preparing a shop costs at growing sizes: seconds per million reviews and the peak memory of all processes.

    python benchmarks/scale.py --config configs/bench_scale/full.yaml

For each size a demo shop is generated (not timed), then `jobs/prepare.py` runs in a process of its own:
read, clean, split by time, keywords, texts, statistics, audit, with Ray's start in the time. Peak memory
is the proportional set size summed over the whole process tree, sampled twice a second, Ray included.
Seconds of a small size are mostly Ray's start; what a million more reviews cost from one size to the next
stands in the table. A peak above the declared budget fails the run, after the result is written.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from memory import PeakMemory
from pydantic import Field, field_validator

from recsys_ray.artifacts import open_artifact
from recsys_ray.config import Config, main
from recsys_ray.data.demo_shop import GENERATOR_VERSION, DemoShopConfig, generator_hash, make_demo_shop
from recsys_ray.data.pipeline import KIND, PrepareConfig
from recsys_ray.data.sources import AmazonReviewsSource
from recsys_ray.evaluation.results import write_result
from recsys_ray.runtime import RayConfig

log = logging.getLogger(__name__)

JOB = Path(__file__).resolve().parents[1] / "jobs" / "prepare.py"
REVIEWS_PER_PRODUCT = 701_528 / 112_590    # of All_Beauty


class JobConfig(Config):
    """Which sizes, and how much memory they may take."""

    reviews: tuple[int, ...] = Field(default=(10_000, 100_000, 700_000), min_length=1)    # growing
    budget_gb: float = Field(default=4.0, gt=0)         # declared: of all processes together, at any size
    num_buckets: int = Field(default=16, ge=1)
    seed: int = 7
    work: Path = Path("runs/bench_scale")
    result: Path = Path("benchmarks/results/scale.json")
    ray: RayConfig = RayConfig(progress=False)

    @field_validator("reviews")
    @classmethod
    def _growing(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if list(sizes) != sorted(set(sizes)):
            raise ValueError("give the sizes from small to large, each once")
        return sizes


def run(config: JobConfig) -> Path:
    """Measure every size and write the result file; returns its path. Errors: `ValueError` above the budget."""
    rows = [_measure(config, reviews) for reviews in config.reviews]
    for smaller, larger in pairwise(rows):
        more = larger["reviews"] - smaller["reviews"]
        larger["seconds_per_million_more"] = round((larger["seconds"] - smaller["seconds"]) * 1e6 / more, 1)
    headline: dict[str, float | int | None] = {}
    for row in rows:
        name = _short(row["reviews"])
        headline[f"seconds_per_million_rows_{name}"] = row["seconds_per_million_rows"]
        headline[f"peak_rss_gb_{name}"] = row["peak_pss_gb"]
    headline["budget_gb"] = config.budget_gb
    peak = max(row["peak_pss_gb"] for row in rows)
    headline["within_budget"] = int(peak <= config.budget_gb)
    shop = {"generator_version": GENERATOR_VERSION, "generator_hash": generator_hash()}
    written = write_result(config.result, command=f"python benchmarks/scale.py {' '.join(sys.argv[1:])}".strip(),
                           headline=headline, tables={"sizes": rows, "shop": shop}, seeds=[config.seed])
    if peak > config.budget_gb:
        raise ValueError(f"{written}: {peak} GB at the peak, above the declared budget_gb={config.budget_gb}")
    return written


def _measure(config: JobConfig, reviews: int) -> dict[str, Any]:
    folder = config.work / _short(reviews)
    shop = DemoShopConfig(output=folder / "shop", seed=config.seed, reviews=reviews, queries=0,
                          products=max(500, round(reviews / REVIEWS_PER_PRODUCT)))
    public = make_demo_shop(shop) / "public"
    prepared = folder / "prepared"
    shutil.rmtree(prepared, ignore_errors=True)
    job = PrepareConfig(source=AmazonReviewsSource(products=str(public / "meta_Demo_Shop.jsonl.gz"),
                                                   reviews=str(public / "Demo_Shop.jsonl.gz")),
                        output=prepared, num_buckets=config.num_buckets, ray=config.ray)
    settings = folder / "prepare.yaml"
    settings.write_text(job.to_yaml(), encoding="utf-8")
    started = time.perf_counter()
    with (folder / "prepare.log").open("wb") as output:
        child = subprocess.Popen([sys.executable, str(JOB), "--config", str(settings)],
                                 stdout=output, stderr=subprocess.STDOUT)
        with PeakMemory(child.pid) as memory:
            status = child.wait()
    seconds = time.perf_counter() - started
    if status:
        raise RuntimeError(f"preparing {reviews} reviews ended with status {status}; see {folder / 'prepare.log'}")
    counts = open_artifact(prepared, KIND).manifest.facts["counts"]
    row = {"reviews": reviews, "reviews_read": counts["rows/reviews read"], "products": counts["rows/products read"],
           "seconds": round(seconds, 2), "seconds_per_million_rows": round(seconds * 1e6 / reviews, 1),
           "peak_pss_gb": round(memory.peak / 2**30, 3), "memory_samples": memory.samples}
    log.info("%s", row)
    return row


def _short(reviews: int) -> str:
    return f"{reviews // 1000}k" if reviews % 1000 == 0 else str(reviews)


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
