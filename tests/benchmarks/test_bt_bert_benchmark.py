"""The cells of the concern benchmark: which there are, which begin from others' models, and what is made again."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from recsys_ray.artifacts import stage
from recsys_ray.config import Config, load_config

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return import_module("bt_bert")


def config_of(benchmark: ModuleType, tmp_path: Path, *overrides: str) -> Any:
    return load_config(benchmark.JobConfig, REPO / "configs/bench_bt_bert/full.yaml", [
        f"work={tmp_path}/work", f"cells={tmp_path}/cells", *overrides])


def make(benchmark: ModuleType, config: Any, name: str) -> None:
    benchmark.write_cell(benchmark.cell_file(config, name), benchmark._identity(config, name), {"cell": name})


def test_every_cell_has_a_model_to_begin_from_before_it(benchmark: ModuleType, tmp_path: Path) -> None:
    config = config_of(benchmark, tmp_path)
    names = benchmark.names(config)
    assert len(names) == len(set(names))
    assert names[-1].startswith("speed/")       # alone on the machine
    for first, others in benchmark.dependants(config).items():
        assert all(names.index(first) < names.index(other) for other in others)


def test_a_cell_is_made_again_for_other_settings_and_for_a_model_that_others_still_need(
        benchmark: ModuleType, tmp_path: Path) -> None:
    config = config_of(benchmark, tmp_path)
    assert not benchmark.is_made(config, "new/base")
    make(benchmark, config, "new/base")
    assert not benchmark.is_made(config, "new/base")        # its model is gone, and two cells begin from it
    with stage(config.work / "models/new/base", "bt_bert", "x") as staging:
        staging.commit([], config=Config())
    assert benchmark.is_made(config, "new/base")
    other = config_of(benchmark, tmp_path, "finetune.optim.learning_rate=1.0e-5")
    assert not benchmark.is_made(other, "new/base")
    for name in ("new/replay", "new/forget"):
        make(benchmark, config, name)
    elsewhere = config.replace(work=tmp_path / "elsewhere")
    assert benchmark.is_made(elsewhere, "new/base")         # nothing begins from it any more


def test_a_recipe_may_have_a_budget_of_its_own(benchmark: ModuleType, tmp_path: Path) -> None:
    config = config_of(benchmark, tmp_path)
    for name in ("model/affine16/1", "model/logodds/1"):
        make(benchmark, config, name)
    other = config_of(benchmark, tmp_path, "row_cpu_seconds.affine16=7")
    assert (benchmark.budget(other, "affine16"), benchmark.budget(other, "explicit")) == (7, config.cpu_seconds)
    assert not benchmark.is_made(other, "model/affine16/1")
    assert benchmark.is_made(other, "model/logodds/1")
