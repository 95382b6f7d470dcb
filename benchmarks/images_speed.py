"""How fast pictures are decoded and embedded, beside a plain PyTorch DataLoader loop with the same network.

    python benchmarks/images_speed.py --config configs/bench_images_speed/full.yaml

Both sides read the same Parquet files of JPEGs, frame each picture alike, and (end to end) run the same weights in the
same precision and keep the vectors. Each run is a process of its own; the rounds alternate (A B, then B A). A side is
timed as a whole job on all pictures and just before on a few of them, with as many workers; the difference is what the
pictures cost, which leaves out starting Ray, starting workers and loading the network on both sides. Pictures per
second of wall time; the median over the rounds of the ratio of neighbours.
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
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from recsys_ray.config import Config, main
from recsys_ray.evaluation.results import write_result
from recsys_ray.models.image_encoder import ImageEncoderConfig

log = logging.getLogger(__name__)

SIDES = Path(__file__).resolve().with_name("images_sides.py")
WHOLE, DECODE = "end to end", "decode only"


class JobConfig(Config):
    """Which pictures, and how often."""

    images: Path                            # Parquet with image_id and jpeg
    work: Path = Path("runs/bench_images_speed")
    result: Path = Path("benchmarks/results/images_speed.json")
    encoder: ImageEncoderConfig = ImageEncoderConfig(device="cpu")
    pictures: int = Field(default=2000, ge=16)
    decoded: int = Field(default=20_000, ge=16)         # of decode only; the pictures again and again
    few: int = Field(default=64, ge=4)
    shard_rows: int = Field(default=200, ge=1)          # pictures a file: what a worker takes at a time
    rounds: int = Field(default=3, ge=1)
    workers: int = Field(default=2, ge=1)


def run(config: JobConfig) -> Path:
    """Measure both sides and write the result file; returns its path."""
    shutil.rmtree(config.work, ignore_errors=True)
    data = config.work.resolve()
    sizes = {WHOLE: config.pictures, DECODE: config.decoded}
    for task, size in sizes.items():
        _write(config, data / task, size)
    _write(config, data / "few", config.few)
    measured: dict[tuple[str, str], list[dict[str, Any]]] = {}
    few: dict[tuple[str, str], list[float]] = {}
    _side(config, "loader", WHOLE, data / "few")        # reads libraries and weights from the disk for all that follow
    for number in range(config.rounds):
        for task in (WHOLE, DECODE):
            for side in ("ray", "loader") if number % 2 == 0 else ("loader", "ray"):
                few.setdefault((side, task), []).append(_side(config, side, task, data / "few")["wall_s"])
                found = _side(config, side, task, data / task)
                found["rate"] = (sizes[task] - config.few) / max(1e-3, found["wall_s"] - few[side, task][-1])
                measured.setdefault((side, task), []).append(found)
                log.info("%-7s %-10s %6.1f pictures/s  %6.1f CPU-s", side, task, found["rate"], found["cpu_s"])
    headline, tables = _figures(config, measured, few)
    shutil.rmtree(config.work)
    return write_result(config.result, command=f"python benchmarks/images_speed.py {' '.join(sys.argv[1:])}",
                        headline=headline, tables=tables)


def _write(config: JobConfig, folder: Path, count: int) -> None:
    """`count` pictures in shards of a table that the job reads."""
    folder.mkdir(parents=True)
    table = pq.read_table(config.images, columns=["jpeg"])
    order = np.random.default_rng(7).permutation(len(table))
    for shard, start in enumerate(range(0, count, config.shard_rows)):
        rows = order[np.arange(start, min(start + config.shard_rows, count)) % len(order)]
        part = pa.table({"image_id": [f"{start + at:07d}" for at in range(len(rows))],
                         "data": table["jpeg"].take(pa.array(rows)).cast(pa.large_binary())})
        pq.write_table(part, folder / f"part-{shard:05d}.parquet", compression="none")


def _side(config: JobConfig, side: str, task: str, images: Path) -> dict[str, Any]:
    directory = config.work.resolve() / "side"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    asked = {"side": side, "decode_only": task == DECODE, "images": str(images), "workers": config.workers,
             "encoder": config.encoder.model_dump(mode="json"), "directory": str(directory)}
    (directory / "task.json").write_text(json.dumps(asked), encoding="utf-8")
    with (directory / "log").open("wb") as stream:
        done = subprocess.run([sys.executable, str(SIDES), str(directory / "task.json")], stdout=stream, stderr=stream)
    if done.returncode:
        raise RuntimeError(f"side {side} failed:\n" + (directory / "log").read_text(errors="replace")[-3000:])
    found: dict[str, Any] = json.loads((directory / "measured.json").read_bytes())
    if (directory / "vectors.npy").exists():
        found["vectors"] = np.load(directory / "vectors.npy")
    return found


def _figures(config: JobConfig, measured: dict[tuple[str, str], list[dict[str, Any]]],
             few: dict[tuple[str, str], list[float]]) -> tuple[dict[str, float], dict[str, Any]]:
    def ratios(task: str, key: str) -> list[float]:
        values = [(ours[key], theirs[key]) for ours, theirs in zip(measured["ray", task], measured["loader", task],
                                                                   strict=True)]
        return [ours / theirs if key == "rate" else theirs / ours for ours, theirs in values]

    def rate(side: str, task: str) -> float:
        return statistics.median(one["rate"] for one in measured[side, task])

    headline = {
        "ratio_vs_dataloader": statistics.median(ratios(WHOLE, "rate")),
        "ratio_decode_only": statistics.median(ratios(DECODE, "rate")),
        "pictures_per_second": rate("ray", WHOLE), "pictures_per_second_dataloader": rate("loader", WHOLE),
        "decoded_per_second": rate("ray", DECODE), "decoded_per_second_dataloader": rate("loader", DECODE),
        "min_cosine": _min_cosine(measured["ray", WHOLE][0]["vectors"], measured["loader", WHOLE][0]["vectors"])}
    tables = {
        "ratios": {f"{task}, {key}": ratios(task, key) for task in (WHOLE, DECODE) for key in ("rate", "cpu_s")},
        "sides": {f"{side}, {task}": [{key: value for key, value in one.items() if key != "vectors"} for one in runs]
                  for (side, task), runs in measured.items()},
        "wall seconds of a few pictures": {f"{side}, {task}": wall for (side, task), wall in few.items()},
        "setting": config.model_dump(mode="json")}
    return headline, tables


def _min_cosine(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(axis=1) / lengths).min())


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
