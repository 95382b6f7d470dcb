"""The loop on a small regression: budgets, early stop, best weights, accumulation, resuming."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from recsys_ray.training.loop import Loop, LoopConfig, Progress, RunFiles, Task, best_weights
from recsys_ray.training.trackers import read_curve

DATA = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
TARGET = DATA @ torch.tensor([1.0, -2.0, 0.5])


class Regression:
    """Batches of four rows; `values` are what the evaluations find, else the negative error."""

    def __init__(self, values: list[float] | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.values, self.evaluated = values, 0

    def task(self) -> Task:
        return Task(self.model, 16, self.backward, self.evaluate, "value", lambda number: None)

    def backward(self, number: int, scale: float) -> Mapping[str, float]:
        rows = slice(4 * (number % 16), 4 * (number % 16) + 4)
        noisy = DATA[rows] + 0.01 * torch.randn(4, 3)       # what a step draws has to come again when it is repeated
        loss = ((self.model(noisy)[:, 0] - TARGET[rows]) ** 2).mean()
        (loss * scale).backward()
        return {"loss": float(loss.detach()), "accuracy": 0.0, "tokens": 4.0}

    def evaluate(self) -> Mapping[str, float]:
        self.evaluated += 1
        if self.values is not None:
            return {"value": self.values[min(self.evaluated, len(self.values)) - 1]}
        with torch.no_grad():
            return {"value": -float(((self.model(DATA)[:, 0] - TARGET) ** 2).mean())}


def run(directory: Path, regression: Regression | None = None, stop_at: int | None = None, **settings: object
        ) -> tuple[Progress, Loop]:
    config = LoopConfig.model_validate({
        "optim": {"learning_rate": 0.05}, "trackers": {"tensorboard": False}, "checkpoint_every": 5, **settings})
    loop = Loop((regression or Regression()).task(), config, RunFiles(directory), "name", {})
    if stop_at is not None:     # as a kill between two steps leaves it
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("recsys_ray.training.loop.crash_point", lambda name: (_ for _ in ()).throw(
                KeyboardInterrupt) if name == f"step_{stop_at}" else None)
            with pytest.raises(KeyboardInterrupt):
                loop.run()
        return loop.progress, loop
    return loop.run(), loop


def losses(directory: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_curve(directory / "metrics.jsonl") if "loss" in line]


def test_it_learns_for_as_many_epochs_as_asked(tmp_path: Path) -> None:
    progress, loop = run(tmp_path, epochs=6)
    assert progress.step == 96
    assert progress.best_value > -0.05 > progress.base_value
    assert [step for step, _ in losses(tmp_path)] == list(range(1, 97))
    assert torch.equal(best_weights(loop.files)["weight"], loop.task.model.state_dict()["weight"])


@pytest.mark.parametrize("stop_at", [3, 5, 12, 19])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(tmp_path: Path, stop_at: int) -> None:
    whole, loop = run(tmp_path / "whole", max_steps=20, epochs=9, evaluate_every=3)
    run(tmp_path / "cut", stop_at=stop_at, max_steps=20, epochs=9, evaluate_every=3)
    resumed, again = run(tmp_path / "cut", max_steps=20, epochs=9, evaluate_every=3)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert torch.equal(again.task.model.weight, loop.task.model.weight)
    assert (resumed.best_value, resumed.best_step) == (whole.best_value, whole.best_step)
    assert len(list((tmp_path / "cut" / "checkpoints").iterdir())) <= 2


def test_accumulated_batches_make_one_step_of_their_mean(tmp_path: Path) -> None:
    one, two = Regression(), Regression()
    run(tmp_path / "a", one, max_steps=1, accumulate=2, optim={"schedule": "constant", "warmup": 0.0})
    assert losses(tmp_path / "a")[0][1] > 0
    config = LoopConfig.model_validate({"seed": 7})
    gradients = torch.zeros_like(two.model.weight)
    for number in range(2):
        torch.manual_seed((config.seed << 32) + number)
        two.model.zero_grad()
        two.backward(number, 0.5)
        gradients += two.model.weight.grad
    lines = read_curve(tmp_path / "a" / "metrics.jsonl")
    found = next(line["gradient_norm"] for line in lines if "gradient_norm" in line)
    assert found >= float(gradients.norm()) * 0.999     # the bias has a part in it too


def test_early_stop_keeps_the_best_weights(tmp_path: Path) -> None:
    progress, loop = run(tmp_path, Regression([0.1, 0.5, 0.4, 0.3, 0.2, 0.9]), epochs=4, evaluate_every=2, patience=2)
    assert (progress.step, progress.best_step, progress.stopped) == (6, 2, True)
    assert not torch.equal(best_weights(loop.files)["weight"], loop.task.model.weight)
    assert run(tmp_path, Regression([0.9]), epochs=4, evaluate_every=2, patience=2)[0].step == 6


def test_a_budget_of_cpu_seconds_ends_a_run(tmp_path: Path) -> None:
    progress, loop = run(tmp_path, epochs=100_000, max_cpu_seconds=0.2)
    assert 0.2 <= progress.cpu_seconds < 0.5
    assert 0 < progress.step < loop.total_steps
    evaluations = [line for line in read_curve(loop.files.curve) if "value" in line]
    assert 5 <= len(evaluations) <= 12
    rates = [line["learning_rate"] for line in read_curve(loop.files.curve) if "loss" in line]
    assert rates[-1] < 0.1 * max(rates)


def test_without_evaluation_the_last_weights_stand(tmp_path: Path) -> None:
    regression = Regression()
    task = Task(regression.model, 16, regression.backward, None, "value", lambda number: None)
    loop = Loop(task, LoopConfig.model_validate({"trackers": {"tensorboard": False}}), RunFiles(tmp_path), "name", {})
    assert loop.run().best_value is None
    assert best_weights(loop.files) is None
