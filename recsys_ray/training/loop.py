"""One training loop for every model: steps, budgets, evaluation, early stop, checkpoints, on one worker or many.

A run that was killed and goes on computes what an uninterrupted one would have: the data of a step,
its dropout and every other random number are functions of (seed, step), and the rest is in the checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import nn

from recsys_ray.artifacts import crash_point
from recsys_ray.config import Config
from recsys_ray.training.checkpoint import drop_later, latest_checkpoint, prune, save_checkpoint
from recsys_ray.training.distributed import rank, world_size
from recsys_ray.training.optim import OptimConfig, build_optimizer, clip, rate_at, set_rate
from recsys_ray.training.trackers import Trackers, TrackersConfig

log = logging.getLogger(__name__)

Report = Callable[[int, float], None]       # (step, value of the objective) at each evaluation
NoSync = Callable[[], AbstractContextManager[object]]


class LoopConfig(Config):
    """How long a run is, how it learns and when it is judged."""

    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)               # whichever of the limits comes first
    max_cpu_seconds: float | None = Field(default=None, gt=0)       # of the first worker's process, in training steps
    accumulate: int = Field(default=1, ge=1)        # batches whose gradients make one step
    optim: OptimConfig = OptimConfig()
    evaluations: int = Field(default=10, ge=1)      # of the run, evenly spread
    evaluate_every: int | None = Field(default=None, ge=1)          # steps, in the place of `evaluations`
    patience: int | None = Field(default=None, ge=1)                # evaluations without a better one; None: never stop
    checkpoint_every: int = Field(default=200, ge=1)                # steps
    seed: int = Field(default=7, ge=0, lt=1 << 31)
    trackers: TrackersConfig = TrackersConfig()


@dataclass(frozen=True)
class Task:
    """What is trained: the loop knows nothing else about it."""

    model: nn.Module                            # whose parameters are trained and kept
    batches_per_epoch: int
    backward: Callable[[int, float], Mapping[str, float]]  # (batch number, factor of the loss) -> values of the batch
    evaluate: Callable[[], Mapping[str, float]] | None     # on the first worker only
    objective: str                              # the name among those values that is to grow
    begin: Callable[[int], None]                # told the batch number before each batch
    no_sync: NoSync = nullcontext              # held where gradients of workers are not yet to be averaged
    half: bool = False                          # products in float16: the loss is scaled
    rates: Mapping[str, float] = field(default_factory=dict)    # beginning of parameters' names -> factor of their rate


@dataclass
class Progress:
    """Where a run is; all of it goes into checkpoints."""

    step: int = 0
    cpu_seconds: float = 0.0        # of the first worker, in steps
    base_value: float | None = None
    best_value: float | None = None
    best_step: int = 0
    evaluations_since: int = 0      # the best one
    stopped: bool = False           # early
    sums: dict[str, float] = field(default_factory=dict)    # of the values of all steps


@dataclass(frozen=True)
class RunFiles:
    """Where a run keeps its state; the best weights are a checkpoint of their own."""

    directory: Path

    @property
    def checkpoints(self) -> Path:
        """The last two whole states."""
        return self.directory / "checkpoints"

    @property
    def best(self) -> Path:
        """The weights of the best evaluation."""
        return self.directory / "best"

    @property
    def curve(self) -> Path:
        """A line for every step and every evaluation."""
        return self.directory / "metrics.jsonl"


class Loop:
    """One worker's part in a run."""

    def __init__(self, task: Task, config: LoopConfig, files: RunFiles, name: str,
                 parameters: Mapping[str, Any], report: Report | None = None) -> None:
        """`name` and `parameters` are for trackers; `report` is told each evaluation, on the first worker."""
        self.task, self.config, self.files, self.report = task, config, files, report
        self.device = next(task.model.parameters()).device
        self.optimizer = build_optimizer(task.model, config.optim, task.rates)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=task.half)
        steps = max(1, round(config.epochs * task.batches_per_epoch / config.accumulate))
        self.total_steps = min(steps, config.max_steps or steps)
        self.progress = self._restore()
        begun = self.progress.step or -1    # before step 0 there is its evaluation
        self._trackers = None if rank() else Trackers(config.trackers, files.directory, begun, name, parameters)

    def run(self) -> Progress:
        """Train until a limit is reached; the model then has its last weights, the best ones are on disk."""
        with self._trackers or nullcontext():
            if self.progress.step == 0:
                self._evaluate()
            while not self._finished():
                before = self.share_done()
                self._step()
                step, last = self.progress.step, self._finished()
                if last or self._is_due(before):
                    self._evaluate()
                if step % self.config.checkpoint_every == 0 or last or self.progress.stopped:
                    self._save()
                crash_point(f"step_{step}")
        return self.progress

    def share_done(self) -> float:
        """How much of the run is done, 0 to 1, by the limit that is nearest."""
        shares = [self.progress.step / self.total_steps]
        if self.config.max_cpu_seconds is not None:
            shares.append(self.progress.cpu_seconds / self.config.max_cpu_seconds)
        return min(1.0, max(shares))

    def _is_due(self, before: float) -> bool:
        if self.config.evaluate_every is not None:
            return self.progress.step % self.config.evaluate_every == 0
        count = self.config.evaluations
        return int(count * self.share_done()) > int(count * before)

    def _finished(self) -> bool:
        return self.progress.stopped or self.share_done() >= 1.0

    def _step(self) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        config, task, done = self.config, self.task, self.share_done()
        rate = rate_at(min(1.0, done + 0.5 / self.total_steps), config.optim)
        factor = float(self.scaler.scale(torch.ones((), device=self.device))) / config.accumulate
        task.model.train()
        found: dict[str, float] = {}
        for part in range(config.accumulate):
            number = self.progress.step * config.accumulate + part
            torch.manual_seed((config.seed << 32) + number * world_size() + rank())
            task.begin(number)
            with nullcontext() if part == config.accumulate - 1 else task.no_sync():
                values = task.backward(number, factor)
            for name, value in values.items():
                found[name] = found.get(name, 0.0) + (value if name == "tokens" else value / config.accumulate)
        self.scaler.unscale_(self.optimizer)
        norm = clip(task.model.parameters(), config.optim.max_grad_norm)
        set_rate(self.optimizer, rate)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.progress.step += 1
        self.progress.cpu_seconds = self._of_first(self.progress.cpu_seconds + time.process_time() - cpu)
        for name, value in found.items():
            self.progress.sums[name] = self.progress.sums.get(name, 0.0) + value
        if self._trackers is not None:
            self._trackers.log(self.progress.step, {
                **found, "learning_rate": rate, "gradient_norm": norm, "progress": self.share_done(),
                "cpu_seconds": self.progress.cpu_seconds, "seconds": time.perf_counter() - wall})

    def _evaluate(self) -> None:
        if self.task.evaluate is None:
            return
        progress, value = self.progress, 0.0
        if self._trackers is not None:
            self.task.model.eval()
            values = self.task.evaluate()
            self._trackers.log(progress.step, values)
            value = values[self.task.objective]
        value = self._of_first(value)
        if progress.step == 0:
            progress.base_value = value
        if progress.best_value is None or value > progress.best_value:
            progress.best_value, progress.best_step, progress.evaluations_since = value, progress.step, 0
            if rank() == 0:
                save_checkpoint(self.files.best, progress.step, self.task.model.state_dict(), {}, {"value": value})
        else:
            progress.evaluations_since += 1
            progress.stopped = (self.config.patience is not None
                                and progress.evaluations_since >= self.config.patience)
        if self.report is not None and rank() == 0:
            self.report(progress.step, value)

    def _of_first(self, value: float) -> float:
        """The first worker's value, on all of them."""
        if world_size() == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return float(shared)

    # --- states -----------------------------------------------------------------------------------
    def _save(self) -> None:
        if rank() == 0:
            save_checkpoint(self.files.checkpoints, self.progress.step, self.task.model.state_dict(),
                            {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()},
                            asdict(self.progress))
            prune(self.files.checkpoints)
            prune(self.files.best)      # only now: a run that goes on from the state before needs its own best

    def _restore(self) -> Progress:
        """The progress of the newest whole checkpoint, its state loaded; all workers take the same."""
        found = latest_checkpoint(self.files.checkpoints)
        step = int(self._of_first(found.step if found else -1))
        if step < 0:
            return Progress()
        if found is None or found.step != step:
            raise RuntimeError(f"{self.files.checkpoints}: this worker does not see the first worker's checkpoint of "
                               f"step {step}; the directory has to be shared by all nodes")
        if rank() == 0:
            drop_later(self.files.best, step)
        self.task.model.load_state_dict(found.weights())
        states = found.optimizer()
        self.optimizer.load_state_dict(states["optimizer"])
        self.scaler.load_state_dict(states["scaler"])
        log.info("going on from step %d", step)
        return Progress(**found.state)


def best_weights(files: RunFiles) -> dict[str, torch.Tensor] | None:
    """The weights of the best evaluation; None when nothing was evaluated."""
    found = latest_checkpoint(files.best)
    return None if found is None else found.weights()
