"""Search over dotted keys of a training configuration with Ray Tune: many short runs, judged on the validation pairs.

What is trained is a retriever, or the adapter of pictures (a configuration with `vectors`). The pairs
artefact holds no test split and the adapter is judged on the valid split, so a sweep opens no test data.
A trial writes below a directory named after its parameters: one that was killed, with its worker or
with the whole sweep, continues from its own last checkpoint when the same command is run again.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Discriminator, Field, Tag, model_validator

from recsys_ray import runtime
from recsys_ray.artifacts import write_text
from recsys_ray.config import Config, ConfigError, fingerprint
from recsys_ray.runtime import RayConfig
from recsys_ray.training.attribute_adapter import FinetuneAttributeAdapterConfig
from recsys_ray.training.bge import FinetuneBgeConfig

log = logging.getLogger(__name__)

METRIC = "valid"            # what a trial reports, higher is better
SAVE_EVERY_S = "10"         # how much of the sweep's own state a killed driver may lose
FILES = ("leaderboard.json", "best.yaml", "importance.png")


class Choice(Config):
    """One of several values."""

    choice: tuple[Any, ...] = Field(min_length=1)


class Uniform(Config):
    """A number between two bounds, evenly or (log) by its order of magnitude; whole numbers on request."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError(f"bounds {self.low:g} to {self.high:g}: low has to be below high, and above 0 with log")
        return self


Dimension = Annotated[Choice | Uniform, Field(union_mode="left_to_right")]


def _trained(values: Any) -> str:
    return "attribute_adapter" if "vectors" in (values if isinstance(values, dict) else dict(values)) else "retriever"


Training = Annotated[Annotated[FinetuneBgeConfig, Tag("retriever")]
                     | Annotated[FinetuneAttributeAdapterConfig, Tag("attribute_adapter")], Discriminator(_trained)]
AnyTraining = FinetuneBgeConfig | FinetuneAttributeAdapterConfig


class SweepConfig(Config):
    """What is searched, how long, and on how much of the machine."""

    finetune: Training                              # what every trial starts from; its output is not used
    space: dict[str, Dimension] = Field(min_length=1)   # dotted key of finetune -> what to try
    output: Path                                    # directory of the sweep
    trials: int = Field(default=12, ge=1)
    search: Literal["optuna", "random"] = "optuna"
    scheduler: Literal["asha", "none"] = "asha"
    grace: int = Field(default=2, ge=1)             # evaluations before ASHA may stop a trial
    reduction: int = Field(default=3, ge=2)         # one trial in so many goes on at each rung
    max_evaluations: int = Field(default=20, ge=1)
    concurrent: int = Field(default=2, ge=1)
    trial_cpus: float = Field(default=1, gt=0)
    trial_gpus: float = Field(default=0, ge=0)      # fractions share a GPU
    seed: int = 7
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _keys_exist(self) -> Self:
        for key, dimension in self.space.items():
            example = dimension.choice[0] if isinstance(dimension, Choice) else _number(dimension, dimension.low)
            _with(self.finetune, {key: example})
        return self


def sweep(config: SweepConfig) -> Path:
    """Run or continue the sweep; returns its leaderboard.

    Writes leaderboard.json (every trial, best first, and counts), best.yaml (a configuration that the
    training's own job takes) and importance.png below `output`. A trial that fails is counted and does not
    stop the others. Errors: `ConfigError` for a key that the training does not have, or when the
    directory holds a sweep over another space.
    """
    from ray import tune

    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", SAVE_EVERY_S)
    output = config.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    restored = _claim(output, config)
    with runtime.connected(config.ray):
        # trials run in directories of their own
        here = config.replace(finetune=config.finetune.resolved().model_dump(), output=output)
        trainable = tune.with_resources(tune.with_parameters(_trial, settings=here.model_dump(mode="json")),
                                        {"cpu": config.trial_cpus, "gpu": config.trial_gpus})
        results = _tuner(config, trainable, output).fit()
        rows = [_row(one) for one in results]
    rows.sort(key=lambda row: -math.inf if row[METRIC] is None else row[METRIC], reverse=True)
    return _write(config, output, rows, restored)


def _claim(output: Path, config: SweepConfig) -> bool:
    """Whether a sweep was begun here; `ConfigError` when it was another one."""
    own = fingerprint(config.model_dump(mode="json", exclude={"ray", "concurrent"}))
    marker = output / "sweep.json"
    if marker.is_file():
        if json.loads(marker.read_bytes())["fingerprint"] != own:
            raise ConfigError(f"{output}: holds a sweep of another configuration; give another output or delete it")
        return True
    write_text(marker, json.dumps({"fingerprint": own}))
    return False


def _tuner(config: SweepConfig, trainable: Any, output: Path) -> Any:
    from ray import tune

    state = output / "tune" / "state"
    if tune.Tuner.can_restore(str(state)):
        log.info("%s: going on with a sweep that was stopped", config.output)
        return tune.Tuner.restore(str(state), trainable, resume_unfinished=True, restart_errored=False,
                                  param_space=None)
    return tune.Tuner(
        trainable, param_space=None if config.search == "optuna" else _tune_space(config.space),
        tune_config=tune.TuneConfig(metric=METRIC, mode="max", num_samples=config.trials, search_alg=_search(config),
                                    scheduler=_scheduler(config), max_concurrent_trials=config.concurrent),
        run_config=tune.RunConfig(name="state", storage_path=str(output / "tune"), verbose=0,
                                  failure_config=tune.FailureConfig(max_failures=1)))


def _search(config: SweepConfig) -> Any:
    if config.search == "random":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        return BasicVariantGenerator(random_state=config.seed)
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(space=distributions(config.space), metric=METRIC, mode="max", seed=config.seed)


def _scheduler(config: SweepConfig) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if config.scheduler == "none":
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    return ASHAScheduler(time_attr="training_iteration", max_t=config.max_evaluations, grace_period=config.grace,
                         reduction_factor=config.reduction)


def distributions(space: Mapping[str, Choice | Uniform]) -> dict[str, Any]:
    """The space as Optuna's distributions."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for key, one in space.items():
        if isinstance(one, Choice):
            found[key] = CategoricalDistribution([_plain(value) for value in one.choice])
        elif one.whole:
            found[key] = IntDistribution(int(one.low), int(one.high), log=one.log)
        else:
            found[key] = FloatDistribution(one.low, one.high, log=one.log)
    return found


def _tune_space(space: Mapping[str, Choice | Uniform]) -> dict[str, Any]:
    from ray import tune

    found: dict[str, Any] = {}
    for key, one in space.items():
        if isinstance(one, Choice):
            found[key] = tune.choice([_plain(value) for value in one.choice])
        elif one.whole:
            found[key] = (tune.lograndint if one.log else tune.randint)(int(one.low), int(one.high) + 1)
        else:
            found[key] = (tune.loguniform if one.log else tune.uniform)(one.low, one.high)
    return found


def _plain(value: Any) -> Any:
    """A value that Optuna may hold: what is no scalar becomes JSON."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)


def _number(dimension: Uniform, value: float) -> float | int:
    return int(value) if dimension.whole else value


def _with(base: AnyTraining, values: Mapping[str, Any]) -> AnyTraining:
    """`base` with dotted keys replaced; an unknown key or a bad value raises, naming it."""
    document = base.model_dump(mode="json")
    for key, value in values.items():
        *path, last = key.split(".")
        place: Any = document
        for step in path:
            place = place.get(step) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last not in place:
            raise ValueError(f"space: {key!r} is no key of the training; {path[-1] if path else 'it'} has "
                             f"{', '.join(place) if isinstance(place, dict) else 'no keys'}")
        place[last] = json.loads(value) if isinstance(value, str) and value[:1] in "[{" else value
    return type(base).model_validate(document)


def trial_config(config: SweepConfig, values: Mapping[str, Any]) -> AnyTraining:
    """The training of one trial; equal parameters give the same directory, so a killed trial continues.

    A trial passes no gate: it is a figure to compare, and the best one is trained again to be published.
    """
    found = _with(config.finetune, values)
    ungated = {"force": True} if isinstance(found, FinetuneAttributeAdapterConfig) else {}
    return found.replace(output=config.output.resolve() / "trials" / fingerprint(dict(values))[:16], **ungated)


def _trial(values: dict[str, Any], settings: dict[str, Any]) -> None:
    from ray import tune

    from recsys_ray.training import attribute_adapter_run, launch

    config = SweepConfig.model_validate(settings)

    def report(step: int, value: float) -> None:
        tune.report({METRIC: value, "step": step})

    trial = trial_config(config, values)
    if isinstance(trial, FinetuneAttributeAdapterConfig):
        attribute_adapter_run.finetune_here(trial, report)
    else:
        launch.finetune_here(trial, report)


def _row(result: Any) -> dict[str, Any]:
    metrics = result.metrics or {}
    return {METRIC: metrics.get(METRIC), "step": metrics.get("step"), "evaluations": metrics.get("training_iteration"),
            "seconds": metrics.get("time_total_s"), "parameters": dict(result.config or {}),
            "error": None if result.error is None else str(result.error).strip().splitlines()[-1]}


def _write(config: SweepConfig, output: Path, rows: list[dict[str, Any]], restored: bool) -> Path:
    done = [row for row in rows if row[METRIC] is not None and row["error"] is None]
    board, best, picture = (output / name for name in FILES)
    importance = importances(config, done)
    write_text(board, json.dumps({"trials": len(rows), "errored": sum(row["error"] is not None for row in rows),
                                  "restored": restored, "importance": importance, "rows": rows}, indent=1) + "\n")
    if not done:
        raise RuntimeError(f"{board}: no trial ended well; the first error: {rows[0]['error'] if rows else 'none'}")
    if importance:
        _plot(importance, picture)
    chosen = _with(config.finetune, done[0]["parameters"])
    write_text(best, yaml.safe_dump(chosen.model_dump(mode="json"), sort_keys=False))
    log.info("%d trials, %d failed; best %.4f with %s", len(rows), len(rows) - len(done), done[0][METRIC],
             ", ".join(f"{key}={value}" for key, value in done[0]["parameters"].items()))
    return board


def importances(config: SweepConfig, rows: list[dict[str, Any]]) -> dict[str, float]:
    """How much of the variance over the trials each parameter explains (fANOVA, Hutter et al. 2014); {} for too few."""
    import optuna

    if len(rows) < 4 or len({row[METRIC] for row in rows}) < 2:
        return {}
    space = distributions(config.space)
    study = optuna.create_study(direction="maximize")
    for row in rows:
        study.add_trial(optuna.trial.create_trial(params=row["parameters"], distributions=space, value=row[METRIC]))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=config.seed)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: round(float(value), 4) for key, value in found.items()}


def _plot(importance: Mapping[str, float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.5 + 0.4 * len(importance)), layout="constrained")
    axes = figure.subplots()
    names = sorted(importance, key=lambda key: importance[key])
    axes.barh(names, [importance[name] for name in names], color="#3b6ea5")
    axes.set_xlabel("share of the variance over the trials")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
