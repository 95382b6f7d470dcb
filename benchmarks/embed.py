"""How fast products are embedded, beside sentence-transformers and the usual Ray Data pipeline.

    python benchmarks/embed.py --config configs/bench_embed/full.yaml

Every side runs in its own process on the same texts, model, truncation and cores; the rounds alternate
(A B C ..., then backwards). CPU time is that of the whole process tree. A side without Ray is timed
after its model is loaded and warm. A side with Ray is timed as a whole job and once more on a handful
of texts, with as many workers; the difference is what the texts cost. Ray's own share is that of the
job beyond the same stage functions in a pool of plain processes.
"""

from __future__ import annotations

import json
import logging
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from pydantic import Field

from recsys_ray.config import Config, main
from recsys_ray.evaluation.results import write_result
from recsys_ray.models.text_encoder import TextEncoderConfig

log = logging.getLogger(__name__)

SIDES = Path(__file__).resolve().with_name("embed_sides.py")
FEW = 8  # texts of the run that shows what a Ray job costs without work


class JobConfig(Config):
    """What is embedded and how often."""

    products: Path                                      # ESCI products.parquet: real product texts
    work: Path = Path("runs/bench_embed")
    result: Path = Path("benchmarks/results/embed.json")
    encoder: TextEncoderConfig = TextEncoderConfig(device="cpu")
    texts: int = Field(default=800, ge=FEW)
    short_texts: int = Field(default=100_000, ge=FEW)
    short_words: int = Field(default=6, ge=1)
    rounds: int = Field(default=3, ge=1)
    overhead_rounds: int = Field(default=1, ge=1)
    workers: int = Field(default=2, ge=1)
    usual_batch_size: int = Field(default=10, ge=1)     # of map_batches and encode: Ray's own published benchmark
    large_batch_size: int = Field(default=1024, ge=1)   # the same pipeline with batches worth sorting
    seed: int = 7


def run(config: JobConfig) -> Path:
    """Measure all sides and write the result file; returns its path."""
    shutil.rmtree(config.work, ignore_errors=True)
    config.work.mkdir(parents=True)
    texts, short = _texts(config)
    measured: dict[str, list[dict[str, Any]]] = {}

    def measure(side: str, some: list[str], name: str | None = None, **settings: Any) -> dict[str, Any]:
        found = _side(config, side, some, **settings)
        measured.setdefault(name or side, []).append(found)
        log.info("%-22s %7.2f CPU-s %7.2f s", name or side, found["cpu_s"], found["wall_s"])
        return found

    ceiling = _side(config, "ceiling", [])
    sides: list[tuple[str, str, dict[str, Any]]] = [
        ("plain", "plain", {}), ("encode_fp32", "encode", {"dtype": "float32"}),
        ("encode_bf16", "encode", {"dtype": "bfloat16"}), ("ray", "ray", {}),
        ("usual_ray", "usual_ray", {"batch_size": config.usual_batch_size})]
    for number in range(config.rounds):
        for name, side, settings in sides if number % 2 == 0 else sides[::-1]:
            measure(side, texts, name, **settings)
    for name, side, settings in sides[3:]:
        measure(side, texts[:FEW], f"{name}_few", **settings)
    measure("usual_ray", texts, "usual_ray_large", batch_size=config.large_batch_size)
    measure("usual_ray", texts[:FEW], "usual_ray_large_few", batch_size=config.large_batch_size)
    for _ in range(config.overhead_rounds):
        measure("plain_job", short)
        measure("ray", short, "ray_short")
    headline, tables = _figures(config, measured, ceiling)
    shutil.rmtree(config.work)
    return write_result(config.result, command=f"python benchmarks/embed.py {' '.join(sys.argv[1:])}",
                        headline=headline, tables=tables, seeds=[config.seed])


def _texts(config: JobConfig) -> tuple[list[str], list[str]]:
    """(product texts, as many different short ones as asked for)."""
    table = pq.read_table(config.products, columns=["title", "brand", "bullet_points", "description"]).to_pylist()
    order = np.random.default_rng(config.seed).permutation(len(table))
    rows = [table[place] for place in order]
    long = [" ".join(str(row[name]) for name in row if row[name]) for row in rows]
    short: list[str] = []
    for number in range(config.short_texts):
        words = str(rows[number % len(rows)]["title"]).split()
        start = number // len(rows) % max(1, len(words) - config.short_words)
        short.append(" ".join([*words[start:start + config.short_words], str(number)]))
    return long[:config.texts], short


def _side(config: JobConfig, side: str, texts: list[str], **settings: Any) -> dict[str, Any]:
    directory = config.work.resolve() / "side"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    task = {"side": side, "texts": texts, "encoder": config.encoder.model_dump(mode="json"), "workers": config.workers,
            "directory": str(directory), **settings}
    (directory / "task.json").write_text(json.dumps(task), encoding="utf-8")
    with (directory / "log").open("wb") as stream:
        command = [sys.executable, str(SIDES), str(directory / "task.json")]
        finished = subprocess.run(command, stdout=stream, stderr=stream)
    if finished.returncode:
        raise RuntimeError(f"side {side} failed:\n" + (directory / "log").read_text(errors="replace")[-3000:])
    found: dict[str, Any] = json.loads((directory / "measured.json").read_bytes())
    if (directory / "vectors.npy").exists():
        found["vectors"] = np.load(directory / "vectors.npy")
    return found


def _figures(config: JobConfig, measured: dict[str, list[dict[str, Any]]], ceiling: dict[str, Any]
             ) -> tuple[dict[str, float], dict[str, Any]]:
    def ratios(of: str, to: str, key: str) -> list[float]:
        return [a[key] / b[key] for a, b in zip(measured[of], measured[to], strict=True)]

    def without_start(name: str) -> list[float]:
        return [one["cpu_s"] - measured[f"{name}_few"][0]["cpu_s"] for one in measured[name]]

    own_ray, few = without_start("ray"), measured["plain"][0]
    usual = [a / b for a, b in zip(without_start("usual_ray"), own_ray, strict=True)]
    pairs = {
        "ratio_vs_encode_cpu": ratios("encode_fp32", "plain", "cpu_s"),
        "ratio_vs_encode_wall": ratios("encode_fp32", "plain", "wall_s"),
        "ratio_vs_encode_bf16_cpu": ratios("encode_bf16", "plain", "cpu_s"),
        "ratio_vs_encode_bf16_wall": ratios("encode_bf16", "plain", "wall_s"),
        "ratio_vs_ray_encode_cpu": usual,
        "ratio_vs_ray_encode_whole_job_cpu": ratios("usual_ray", "ray", "cpu_s"),
        "ratio_vs_ray_encode_wall": ratios("usual_ray", "ray", "wall_s"),
        "ray_overhead": [ratio - 1 for ratio in ratios("ray_short", "plain_job", "wall_s")],
    }
    reference = measured["encode_fp32"][0]["vectors"]
    cosines = {name: _min_cosine(reference, measured[name][0]["vectors"]) for name in ("plain", "ray", "encode_bf16")}
    flops = few["flops"] / statistics.median(one["cpu_s"] for one in measured["plain"]) / 1e9
    headline = {name: statistics.median(values) for name, values in pairs.items()}
    headline |= {
        "ratio_vs_ray_encode_large_batch_cpu": without_start("usual_ray_large")[0] / statistics.median(own_ray),
        "min_cosine": min(cosines["plain"], cosines["ray"]), "matmul_gflops_fp32": ceiling["float32"],
        "matmul_gflops_bf16": ceiling["bfloat16"], "share_of_ceiling": flops / ceiling[few["dtype"]],
    }
    tables = {
        "pairs": {name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
                  for name, values in pairs.items()},
        "sides": {name: [{key: value for key, value in one.items() if key != "vectors"} for one in runs]
                  for name, runs in measured.items()},
        "min_cosine_to_encode_fp32": cosines, "ceiling_gflops_one_thread": ceiling, "encoder_gflops": flops,
        "setting": config.model_dump(mode="json"),
    }
    return headline, tables


def _min_cosine(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(axis=1) / lengths).min())


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
