"""Every shipped YAML loads into the configuration of the job or benchmark its folder is named after."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from recsys_ray.config import Config, load_config

REPO = Path(__file__).resolve().parents[1]
CONFIGS = sorted((REPO / "configs").rglob("*.yaml"))
JOBS = sorted(path for path in (REPO / "jobs").glob("*.py"))
BENCHMARKS = {path.name for path in (REPO / "configs").glob("bench_*")} | {"chaos"}


def entry_point(folder: str) -> ModuleType:
    path = REPO / "jobs" / f"{folder}.py"
    if not path.is_file():
        path = REPO / "benchmarks" / f"{folder.removeprefix('bench_')}.py"
    assert path.is_file(), f"configs/{folder}: neither a job nor a benchmark of that name"
    spec = importlib.util.spec_from_file_location(f"entry_{folder}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module     # pydantic looks names up there
    sys.path.insert(0, str(path.parent))    # as when it is run: a benchmark imports its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def test_configs_and_jobs_were_found() -> None:
    assert len(CONFIGS) >= 15
    assert len(JOBS) >= 8


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(REPO / "configs").as_posix())
def test_a_shipped_configuration_loads(path: Path) -> None:
    job_config = entry_point(path.relative_to(REPO / "configs").parts[0]).JobConfig
    assert isinstance(load_config(job_config, path), Config)


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_every_job_has_a_demo_configuration_and_says_how_to_submit_it(job: Path) -> None:
    assert (REPO / "configs" / job.stem / "demo.yaml").is_file()
    text = job.read_text("utf-8")
    assert "ray job submit" in text
    assert len(text.splitlines()) <= 45
