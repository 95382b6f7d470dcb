"""Where a run's figures go while it runs: the curve on disk, the terminal, TensorBoard, MLflow."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from recsys_ray.artifacts import write_text
from recsys_ray.config import Config, ConfigError

log = logging.getLogger(__name__)

TERMINAL_EVERY_S = 10.0
FOLLOW_EVERY_S = 2.0
MLFLOW_BATCH = 500


class MlflowConfig(Config):
    """Which MLflow server and experiment."""

    tracking_uri: str
    experiment: str = "recsys_ray"


class TrackersConfig(Config):
    """Who else is told, beside the curve on disk and the terminal."""

    tensorboard: bool = True
    mlflow: MlflowConfig | None = None


class Curve:
    """A JSON line for every step and every evaluation; what a resumed run will compute anew is cut off first."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in read_curve(path) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._stream = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add one line."""
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._stream.write(json.dumps({"step": step, **known}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Finish the file."""
        self._stream.close()


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The lines of a curve; a last one that was torn by a kill is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


class Terminal:
    """Progress as log lines, one every ten seconds, and each evaluation."""

    def __init__(self) -> None:
        self._logged = -math.inf

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Say how far the run is, if it is time to."""
        if "loss" not in values:
            log.info("step %d: %s", step, ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        elif time.monotonic() - self._logged > TERMINAL_EVERY_S:
            self._logged = time.monotonic()
            accuracy = f", accuracy {values['accuracy']:.3f}" if "accuracy" in values else ""
            speed = (f", {values['tokens'] / max(values['seconds'], 1e-9):.0f} tokens a second" if "tokens" in values
                     else "")
            log.info("step %d, %.0f %% done: loss %.4f%s, rate %.2e%s", step, 100 * values["progress"], values["loss"],
                     accuracy, values["learning_rate"], speed)

    def close(self) -> None:
        """Nothing to close."""


@contextmanager
def followed(curve: Path) -> Iterator[None]:
    """While the block runs, what other processes write to a curve is said in this one's terminal."""
    ended, terminal = threading.Event(), Terminal()

    def follow() -> None:
        said = len(read_curve(curve))
        while not ended.wait(FOLLOW_EVERY_S):
            lines = read_curve(curve)
            for line in lines[min(said, len(lines)):]:
                terminal.log(line["step"], {name: math.nan if value is None else value
                                            for name, value in line.items() if name != "step"})
            said = len(lines)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class TensorBoard:
    """Scalars as TensorBoard reads them."""

    def __init__(self, directory: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=step + 1, write_to_disk=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each scalar."""
        for name, value in values.items():
            prefix = "train/" if "loss" in values else "valid/"
            self._writer.add_scalar(prefix + name.replace("@", "_"), value, step)

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()


class Mlflow:
    """One MLflow run for a training run: resumed under the same name, it goes on in the same."""

    def __init__(self, config: MlflowConfig, name: str, parameters: Mapping[str, Any]) -> None:
        try:
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise ConfigError("trackers.mlflow: needs the package mlflow-skinny: "
                              "pip install 'recsys_ray[train]'") from None
        self._client = MlflowClient(config.tracking_uri)
        found = self._client.get_experiment_by_name(config.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(config.experiment)
        self._waiting: list[tuple[str, float, int, int]] = []
        runs = self._client.search_runs([experiment], filter_string=f"tags.fingerprint = '{name}'", max_results=1)
        if runs:
            self._run = runs[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._client.create_run(experiment, tags={"fingerprint": name}).info.run_id
            for key, value in parameters.items():
                self._client.log_param(self._run, key, value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each metric; sent some at a time."""
        prefix, now = "train_" if "loss" in values else "valid_", int(time.time() * 1000)
        self._waiting += [(prefix + name.replace("@", "_at_"), value, now, step) for name, value in values.items()]
        if len(self._waiting) >= MLFLOW_BATCH:
            self._send()

    def _send(self) -> None:
        from mlflow.entities import Metric

        some, self._waiting = self._waiting[:MLFLOW_BATCH], self._waiting[MLFLOW_BATCH:]
        try:
            self._client.log_batch(self._run, metrics=[Metric(*one) for one in some])
        except Exception as error:  # hours of training must not end with a server that is away
            log.warning("MLflow did not take %d figures (%s: %s); they are in the curve on disk", len(some),
                        type(error).__name__, error)

    def close(self) -> None:
        """Send what waits and say that the run is over."""
        while self._waiting:
            self._send()
        self._client.set_terminated(self._run)


class Trackers:
    """All of a run's trackers as one."""

    def __init__(self, config: TrackersConfig, directory: Path, step: int, name: str,
                 parameters: Mapping[str, Any]) -> None:
        """`step` is where the run goes on; `name` and `parameters` are for trackers that list runs."""
        self._all: list[Curve | Terminal | TensorBoard | Mlflow] = [Curve(directory / "metrics.jsonl", step),
                                                                    Terminal()]
        if config.tensorboard:
            self._all.append(TensorBoard(directory / "tensorboard", step))
        if config.mlflow is not None:
            self._all.append(Mlflow(config.mlflow, name, parameters))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Tell all of them."""
        for one in self._all:
            one.log(step, values)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *error: object) -> None:
        with ExitStack() as stack:  # one that cannot close must not keep the others open
            for one in self._all:
                stack.callback(one.close)
