"""The search space of a sweep and what is made of its trials; a real sweep, killed and continued, in the Ray tier."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from small_pairs import write_pairs

from recsys_ray.config import load_config
from recsys_ray.training.attribute_adapter import FinetuneAttributeAdapterConfig
from recsys_ray.training.bge import FinetuneBgeConfig
from recsys_ray.training.sweep import SweepConfig, importances, trial_config

SPACE = {"optim.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
         "contrastive.mask_same_product": {"choice": [True, False]},
         "sampler.batch_size": {"low": 8, "high": 32, "whole": True}}


def config_of(tmp_path: Path, **changes: Any) -> SweepConfig:
    return SweepConfig.model_validate({
        "finetune": {"pairs": tmp_path / "pairs", "output": tmp_path / "unused", "encoder": {"device": "cpu"}},
        "space": SPACE, "output": tmp_path / "sweep", **changes})


@pytest.mark.parametrize(("space", "message"), [
    ({"optim.learnin_rate": {"low": 1, "high": 2}}, "'optim.learnin_rate' is no key of the training; optim has"),
    ({"nothing.at_all": {"choice": [1]}}, "'nothing.at_all' is no key of the training"),
    ({"optim.learning_rate": {"low": -1.0, "high": 1.0}}, "learning_rate"),
    ({"optim.learning_rate": {"low": 2, "high": 1}}, "low has to be below high"),
    ({"optim.learning_rate": {"low": 0, "high": 1, "log": True}}, "above 0 with log"),
    ({"sampler.batch_size": {"choice": []}}, "choice"),
])
def test_a_space_that_does_not_fit_fails_before_any_work(tmp_path: Path, space: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, space=space)


def test_equal_parameters_give_one_directory(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    one = trial_config(config, {"optim.learning_rate": 3e-4, "sampler.batch_size": 16})
    assert (one.optim.learning_rate, one.sampler.batch_size) == (3e-4, 16)
    assert one.contrastive == config.finetune.contrastive
    assert one.output == trial_config(config, {"sampler.batch_size": 16, "optim.learning_rate": 3e-4}).output
    assert one.output != trial_config(config, {"optim.learning_rate": 3e-4, "sampler.batch_size": 8}).output


def test_the_adapter_of_pictures_is_searched_over_boosts_and_weights_of_the_loss(tmp_path: Path) -> None:
    config = SweepConfig.model_validate({
        "finetune": {"vectors": tmp_path / "vectors", "output": tmp_path / "unused",
                     "sampler": {"boosts": {"material": {"denim": 3}}}},
        "space": {"sampler.boosts.material.denim": {"low": 1, "high": 5}, "loss.attributes": {"choice": [0.1, 0.3]},
                  "loss.attribute_weights.neckline": {"choice": [1, 2, 4]}}, "output": tmp_path / "sweep"})
    one = trial_config(config, {"sampler.boosts.material.denim": 4.5, "loss.attributes": 0.1})
    assert isinstance(one, FinetuneAttributeAdapterConfig)
    assert (one.sampler.boosts["material"]["denim"], one.loss.attributes, one.force) == (4.5, 0.1, True)
    with pytest.raises(ValueError, match=r"'sampler.boosts.material.demin' is no key of the training; material has"):
        SweepConfig.model_validate({**config.model_dump(), "space": {"sampler.boosts.material.demin": {"choice": [1]}}})


def test_the_parameter_that_decides_is_the_important_one(tmp_path: Path) -> None:
    rows = [{"valid": rate * 100, "parameters": {"optim.learning_rate": rate, "contrastive.mask_same_product": even,
                                                 "sampler.batch_size": size}}
            for rate in (1e-5, 1e-4, 5e-4, 9e-4) for even in (True, False) for size in (8, 16, 32)]
    found = importances(config_of(tmp_path), rows)
    assert found["optim.learning_rate"] > 0.9
    assert importances(config_of(tmp_path), rows[:3]) == {}


@pytest.mark.ray
@pytest.mark.timeout(280)
def test_a_sweep_goes_on_after_its_driver_was_killed(tmp_path: Path, tiny_text_model: Callable[..., Path]) -> None:
    """Six trials of two evaluations; the driver is killed after the first trial has ended."""
    write_pairs(tmp_path / "pairs")
    settings = {
        "finetune": {"pairs": str(tmp_path / "pairs"), "output": str(tmp_path / "unused"),
                     "shards": str(tmp_path / "shards"),
                     "encoder": {"model": str(tiny_text_model()), "device": "cpu"}, "max_steps": 6, "evaluate_every": 3,
                     "query_tokens": 16, "document_tokens": 16, "sampler": {"batch_size": 8},
                     "validation": {"queries": 20, "products": 50}},
        "space": {"optim.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}, "contrastive.symmetric": {
            "choice": [True, False]}},
        "output": str(tmp_path / "sweep"), "trials": 6, "concurrent": 1, "scheduler": "none",
        "ray": {"progress": False}}
    file = tmp_path / "tune.yaml"
    file.write_text(yaml.safe_dump(settings))
    job = Path(__file__).resolve().parents[2] / "jobs" / "tune.py"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"TUNE_GLOBAL_CHECKPOINT_S": "1", "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([sys.executable, str(job), "--config", str(file)], env=environment, cwd=job.parents[1])
    while not list((tmp_path / "sweep" / "trials").glob("*/CURRENT")) and first.poll() is None:
        time.sleep(0.1)
    time.sleep(2)
    assert first.poll() is None, "the sweep ended before it could be killed"
    first.send_signal(signal.SIGKILL)
    first.wait()
    subprocess.run([sys.executable, str(job), "--config", str(file)], env=environment, cwd=job.parents[1], check=True)
    board = json.loads((tmp_path / "sweep" / "leaderboard.json").read_text())
    assert (board["trials"], board["errored"], board["restored"]) == (6, 0, True)
    values = [row["valid"] for row in board["rows"]]
    assert values == sorted(values, reverse=True)
    assert (tmp_path / "sweep" / "importance.png").read_bytes()[:4] == b"\x89PNG"
    best = load_config(FinetuneBgeConfig, tmp_path / "sweep" / "best.yaml")
    assert best.optim.learning_rate == board["rows"][0]["parameters"]["optim.learning_rate"]
