"""Kills at random moments of an embedding and index run; the result must equal an uninterrupted one.

    python benchmarks/chaos.py --config configs/chaos/full.yaml

A worker, the driver, or the driver with the whole Ray it started is ended by SIGKILL; a dead run is
started again until it finishes. All the while a reader opens and verifies whatever CURRENT names.
Moments and victims come from the seed.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pyarrow as pa
from pydantic import Field

from recsys_ray.artifacts import ArtifactError, current_version, open_artifact
from recsys_ray.config import Config, main
from recsys_ray.evaluation.results import write_result
from recsys_ray.models.text_encoder import TextEncoderConfig

log = logging.getLogger(__name__)

DRIVER = Path(__file__).resolve().with_name("chaos_driver.py")
KINDS = {"embeddings": "embeddings", "index": "index"}
Victim = Literal["worker", "driver", "ray"]


class JobConfig(Config):
    """What is run and how often it is killed."""

    products: Path                                      # Parquet with product_id, title, brand, bullet_points
    work: Path = Path("runs/chaos")
    result: Path = Path("benchmarks/results/chaos.json")
    encoder: TextEncoderConfig = TextEncoderConfig(device="cpu")
    rows: int = Field(default=6000, ge=10)
    earlier_rows: int = Field(default=300, ge=1)        # of the version that readers see meanwhile
    num_buckets: int = Field(default=16, ge=1)
    unit_rows: int = Field(default=48, ge=1)            # small, so that something is committed every second
    rows_per_segment: int = Field(default=400, ge=1)
    workers: int = Field(default=2, ge=1)
    kills_worker: int = Field(default=8, ge=0)
    kills_driver: int = Field(default=6, ge=0)
    kills_ray: int = Field(default=6, ge=0)
    early_kills: int = Field(default=2, ge=0)           # while the first run still starts
    index_kills: int = Field(default=2, ge=0)           # after the vectors are published
    jitter_s: float = Field(default=1.0, ge=0)
    seed: int = 11


@dataclass(frozen=True)
class Kill:
    """One planned kill: the victim, and after how much progress and then how many seconds."""

    victim: Victim
    phase: Literal["start", "embed", "index"]
    shards: int         # finished shards to wait for
    delay_s: float


@dataclass
class Storm:
    """One driver after the other on the same output, and what was done to them."""

    task: Path
    root: Path
    environment: dict[str, str]
    earlier: dict[str, str | None]
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    done: list[dict[str, Any]] = field(default_factory=list)

    def alive(self) -> bool:
        """Whether a driver runs now."""
        return self.process is not None and self.process.poll() is None

    def finished(self) -> bool:
        """Whether a driver ended by itself and well."""
        return self.process is not None and self.process.poll() == 0

    def ensure(self) -> None:
        """Start a driver unless one runs."""
        if not self.alive():
            self.starts += 1
            with (self.root / "driver.log").open("ab") as stream:
                self.process = subprocess.Popen([sys.executable, str(DRIVER), "run", str(self.task)], stdout=stream,
                                                stderr=stream, env=self.environment, start_new_session=True)

    def shards(self) -> int:
        """Shards finished so far; once the vectors are out, more than any plan waits for."""
        if self.published("embeddings"):
            return 1 << 30
        return len(list((self.root / "embeddings" / "staging").glob("*/shards/*.json")))

    def published(self, name: str) -> bool:
        """Whether CURRENT has moved on from the version that was there before the storm."""
        return current_version(self.root / name) != self.earlier[name]


def run(config: JobConfig) -> Path:
    """Run calmly, run through the kills, compare, write the result file."""
    shutil.rmtree(config.work, ignore_errors=True)
    work = config.work.resolve()
    work.mkdir(parents=True)
    temp = tempfile.mkdtemp(prefix="rc-")  # short: Ray's socket paths lie below it
    environment = {**os.environ, "TMPDIR": temp}
    try:
        _prepare(config, work, config.earlier_rows)
        _calm(config, work, "calm", environment)
        shutil.copytree(work / "calm", work / "storm")
        _prepare(config, work, config.rows)
        calm_s = _calm(config, work, "calm", environment)
        begun = time.monotonic()
        storm, torn = _through_the_storm(config, work, environment)
        storm_s = time.monotonic() - begun
        headline, tables = _compare(work, storm, torn)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    tables |= {"kills": storm.done, "driver_starts": storm.starts, "calm_s": calm_s, "storm_s": storm_s,
               "setting": config.model_dump(mode="json")}
    return write_result(config.result, command=f"python benchmarks/chaos.py {' '.join(sys.argv[1:])}",
                        headline=headline, tables=tables, seeds=[config.seed])


def _prepare(config: JobConfig, work: Path, rows: int) -> None:
    task = {"products": str(config.products.resolve()), "prepared": str(work / "prepared"), "rows": rows,
            "num_buckets": config.num_buckets}
    _write_task(work / "prepare.json", task)
    subprocess.run([sys.executable, str(DRIVER), "prepare", str(work / "prepare.json")], check=True)


def _task(config: JobConfig, work: Path, name: str) -> Path:
    return _write_task(work / f"{name}.json", {
        "prepared": str(work / "prepared"), "root": str(work / name), "encoder": config.encoder.model_dump(mode="json"),
        "workers": config.workers, "unit_rows": config.unit_rows, "rows_per_segment": config.rows_per_segment})


def _write_task(path: Path, task: dict[str, Any]) -> Path:
    path.write_text(json.dumps(task), encoding="utf-8")
    return path


def _calm(config: JobConfig, work: Path, name: str, environment: dict[str, str]) -> float:
    begun = time.monotonic()
    (work / name).mkdir(exist_ok=True)
    with (work / name / "driver.log").open("ab") as stream:
        subprocess.run([sys.executable, str(DRIVER), "run", str(_task(config, work, name))], check=True, stdout=stream,
                       stderr=stream, env=environment)
    return time.monotonic() - begun


# --- the storm ------------------------------------------------------------------------------------
def _plan(config: JobConfig) -> list[Kill]:
    """All kills in the order of progress; victims are shuffled over them."""
    chance = random.Random(config.seed)
    victims: list[Victim] = [*["worker"] * config.kills_worker, *["driver"] * config.kills_driver,  # type: ignore[list-item]
                             *["ray"] * config.kills_ray]
    chance.shuffle(victims)
    units = (config.rows - config.earlier_rows) // config.unit_rows
    middle = len(victims) - config.early_kills - config.index_kills
    marks = sorted(chance.randint(1, int(units * 0.95)) for _ in range(middle))
    waits: list[tuple[Literal["start", "embed", "index"], int, float]] = [
        *(("start", 0, chance.uniform(0.5, 6.0)) for _ in range(config.early_kills)),
        *(("embed", mark, chance.uniform(0, config.jitter_s)) for mark in marks),
        *(("index", 1 << 30, chance.uniform(0, config.jitter_s)) for _ in range(config.index_kills))]
    return [Kill(victim, *wait) for victim, wait in zip(victims, waits, strict=True)]


def _through_the_storm(config: JobConfig, work: Path, environment: dict[str, str]) -> tuple[Storm, list[str]]:
    root = work / "storm"
    storm = Storm(_task(config, work, "storm"), root, environment,
                  {name: current_version(root / name) for name in KINDS})
    torn: list[str] = []
    stop = threading.Event()
    reader = threading.Thread(target=_read_all_the_while, args=(root, torn, stop), daemon=True)
    reader.start()
    for kill in _plan(config):
        if not _wait_for(storm, kill):
            break
        _strike(storm, kill)
    while not storm.finished():
        storm.ensure()
        assert storm.process is not None
        storm.process.wait()
        if storm.starts > 4 * len(storm.done) + 5:
            raise RuntimeError(f"the run does not finish; see {root / 'driver.log'}")
    stop.set()
    reader.join()
    _verify(root, torn)
    return storm, torn


def _wait_for(storm: Storm, kill: Kill) -> bool:
    """Wait for the moment of `kill`; False when the run finished before."""
    while True:
        if storm.finished():
            return False
        storm.ensure()
        if kill.phase == "start" or storm.shards() >= kill.shards:
            break
        time.sleep(0.02)
    time.sleep(kill.delay_s)
    return not storm.finished()


def _strike(storm: Storm, kill: Kill) -> None:
    storm.ensure()
    assert storm.process is not None
    driver = psutil.Process(storm.process.pid)
    tree = driver.children(recursive=True)
    struck = [driver, *tree] if kill.victim == "ray" else [driver]
    if kill.victim == "worker":
        struck = _busy_workers(storm, driver)[:1]
    if not struck:
        return  # the run ended while a worker was looked for: the kill is not counted
    between = (storm.shards() > 0) and not storm.published("index")
    for process in struck:
        _end(process)
    phase = "index" if storm.published("embeddings") else "embed"
    storm.done.append({"victim": kill.victim, "phase": phase, "between_commits": between, "processes": len(struck),
                       "shards": min(storm.shards(), 1 << 20)})
    log.info("kill %d: %s (%s)", len(storm.done), kill.victim, phase)
    if kill.victim != "worker":
        storm.process.wait()
        _, left = psutil.wait_procs(tree, timeout=15)  # what belongs to a dead driver ends by itself; insist
        for process in left:
            _end(process)


def _busy_workers(storm: Storm, driver: psutil.Process) -> list[psutil.Process]:
    """The Ray workers of this driver at work, those that embed first; waits until there is one."""
    while storm.alive():
        found: dict[bool, list[psutil.Process]] = {True: [], False: []}
        for process in driver.children(recursive=True):
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if line.startswith("ray::") and "IDLE" not in line and "StatsActor" not in line:
                found["UnitEmbedder" in line].append(process)
        if found[True] or found[False]:
            return [*found[True], *found[False]]
        time.sleep(0.02)
    return []


def _end(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)  # psutil checks that the id still belongs to the same process
    except psutil.NoSuchProcess:
        return


# --- what readers see -----------------------------------------------------------------------------
def _read_all_the_while(root: Path, torn: list[str], stop: threading.Event) -> None:
    while not stop.wait(0.3):
        _verify(root, torn)


def _verify(root: Path, torn: list[str]) -> None:
    for name, kind in KINDS.items():
        try:
            open_artifact(root / name, kind).verify()
        except (ArtifactError, OSError) as error:
            torn.append(f"{name}: {error}")


def _compare(work: Path, storm: Storm, torn: list[str]) -> tuple[dict[str, float], dict[str, Any]]:
    calm_rows, storm_rows = _vectors(work / "calm"), _vectors(work / "storm")
    calm_index, storm_index = _indexed(work / "calm"), _indexed(work / "storm")
    facts = open_artifact(work / "storm" / "embeddings", "embeddings").manifest.facts
    lost = len(set(calm_rows[0]) - set(storm_rows[0])) + len(set(calm_index) - set(storm_index))
    extra = len(set(storm_rows[0]) - set(calm_rows[0])) + len(set(storm_index) - set(calm_index))
    twice = sum(len(rows) - len(set(rows)) for rows in (storm_rows[0], storm_index))
    same = len(storm_rows[0]) == len(calm_rows[0]) and storm_rows[0] == calm_rows[0]
    different = int((storm_rows[1] != calm_rows[1]).any(axis=1).sum()) if same else len(calm_rows[0])
    kills = storm.done
    headline: dict[str, float] = {
        "kills": len(kills), "kills_between_commits": sum(bool(one["between_commits"]) for one in kills),
        **{f"kills_{victim}": sum(one["victim"] == victim for one in kills) for victim in ("worker", "driver", "ray")},
        "lost": lost, "duplicated": twice + extra, "different_vectors": different, "torn_visible": len(torn),
        "work_done_twice": facts["units_recomputed"] / facts["units"],
    }
    return headline, {"facts": facts, "torn": torn[:20]}


def _vectors(root: Path) -> tuple[list[int], np.ndarray[Any, np.dtype[np.float32]]]:
    """(row ids, vectors (N, D)) in the order of the ids, duplicates kept."""
    artifact = open_artifact(root / "embeddings", "embeddings")
    table = pa.concat_tables(artifact.tables("vectors/", ["row_id", "vector"])).sort_by("row_id")
    flat = table.column("vector").combine_chunks().flatten().to_numpy()
    return table.column("row_id").to_pylist(), flat.reshape(table.num_rows, -1)


def _indexed(root: Path) -> list[int]:
    """The live row ids of the index, duplicates kept."""
    artifact = open_artifact(root / "index", "index")
    found: list[int] = []
    for name in artifact.names("segments/"):
        if name.endswith("rows.parquet"):
            rows = artifact.table(name, ["row_id"]).column("row_id").to_numpy()
            tombstones = f"tombstones/{name.split('/')[1]}.npy"
            if tombstones in artifact.names("tombstones/"):
                rows = np.delete(rows, np.load(artifact.file(tombstones), allow_pickle=False))  # positions
            found += rows.tolist()
    return found


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
