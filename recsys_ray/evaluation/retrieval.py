"""The evaluation of retrieval: answers of several systems against judgments, as one artefact of figures.

Reads "candidates" artefacts (and the judgments, by path and column mapping if need be); publishes an
"evaluation" artefact: metrics.json with every mean, interval, comparison and definition, and one
Parquet file per system with the value of every metric for every query, and the judgments as used.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from recsys_ray.artifacts import Artifact, Manifest, find_artifact, open_artifact, sha256_of, stage, write_text
from recsys_ray.config import fingerprint
from recsys_ray.evaluation.baselines import ORACLE, POPULARITY, oracle_values, popularity_ranks
from recsys_ray.evaluation.evaluation_config import EvaluationConfig
from recsys_ray.evaluation.gate import GateConfig, decide, require
from recsys_ray.evaluation.judgments import (
    JudgmentSource,
    Problem,
    ReviewJudgments,
    TableJudgments,
    TruthConfig,
    asked_queries,
    build_problem,
    generic_flags,
    read_judgments,
)
from recsys_ray.evaluation.metrics import MetricSpec, rank_judgments, score_all
from recsys_ray.evaluation.significance import (
    Comparison,
    Resampling,
    compare_columns,
    holm,
    mean_intervals,
    worst_decile,
)

log = logging.getLogger(__name__)

CODE_VERSION = 1    # raise it when the figures of an unchanged input change
METRICS = "metrics.json"
SYSTEM_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")   # they become file names
Values = dict[str, npt.NDArray[np.float64]]     # system -> (queries, metrics)


class EvaluateConfig(EvaluationConfig):
    """What to score, by which metrics, against which baseline."""

    task: Literal["retrieval"] = "retrieval"
    name: str
    output: Path
    systems: dict[str, Path] = Field(default_factory=dict)      # name -> root of its candidates artefact
    judgments: JudgmentSource
    metrics: tuple[MetricSpec, ...]
    primary: MetricSpec                                         # the one metric this table decides by
    baseline: str                                               # the system the others are compared with
    relevant_gain: float = Field(default=1.0, gt=0)             # binary metrics: relevant from this gain
    unit: Literal["query", "unit_id", "product_and_user"] = "query"
    prepared: Path | None = None    # the catalogue: finds judged products it lacks, and ranks by popularity
    popularity: bool = False        # a further system: the products with most reviews, for every query
    truth: TruthConfig | None = None
    gate: GateConfig = GateConfig()
    required: tuple[str, ...] = ()  # systems that must be an improvement, or the command fails
    samples: int = Field(default=2000, ge=100)
    seed: int = 7
    flow: dict[str, Any] | None = None  # a FlowConfig: makes the candidates that are missing

    @field_validator("flow", mode="before")
    @classmethod
    def _check_flow(cls, value: Any) -> Any:
        if value is None:
            return None
        from recsys_ray.flow import FlowConfig  # Ray is needed only by who asks for the flow

        return FlowConfig.model_validate(value).model_dump(mode="json")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.systems and self.flow is None:
            raise ValueError("name the candidates of at least one system under systems, or give a flow that makes them")
        if self.popularity and self.prepared is None:
            raise ValueError("popularity needs prepared, which holds the number of reviews")
        wrong = [name for name in self.systems if not SYSTEM_NAME.fullmatch(name) or name in (POPULARITY, ORACLE)]
        if wrong:
            raise ValueError(f"{wrong} cannot name systems: use letters, digits, - and _, not {POPULARITY} or {ORACLE}")
        names = [spec.name for spec in self.all_metrics()]
        if len(set(names)) < len(names):
            raise ValueError(f"metrics named twice: {sorted(name for name in set(names) if names.count(name) > 1)}")
        return self

    def all_metrics(self) -> tuple[MetricSpec, ...]:
        """The primary metric first, then the others, and Judged@10 in any case."""
        wanted = (self.primary, *(spec for spec in self.metrics if spec != self.primary))
        judged = MetricSpec.parse("Judged@10")
        return wanted if judged in wanted else (*wanted, judged)


def evaluate(config: EvaluateConfig) -> Artifact:
    """The "evaluation" artefact of `config`, reused when nothing it depends on changed.

    Errors: `ArtifactError` for missing or damaged candidates, `JudgmentError` and `MetricError` for
    judgments that do not fit, `GateError` when a required system did not improve on the baseline
    (the artefact is published before).
    """
    systems = _open_systems(config)
    parents = {f"candidates {name}": artifact.manifest for name, artifact in systems.items()}
    prepared = _prepared_root(config)
    if prepared is not None:
        parents["prepared"] = open_artifact(prepared, "prepared").manifest
    identity = _identity(config, parents)
    artifact = find_artifact(config.output, "evaluation", identity)
    if artifact is None:
        document, tables = _measure(config, systems)
        roots = {name: str(one.path.parent.parent) for name, one in systems.items()}
        artifact = _publish(config, identity, parents, document, tables, roots)
    for name in config.required:
        _require(read_evaluation(artifact), name)
    return artifact


def read_evaluation(artifact: Artifact) -> dict[str, Any]:
    """The metrics.json of an "evaluation" artefact."""
    document: dict[str, Any] = json.loads(artifact.file(METRICS).read_text(encoding="utf-8"))
    return document


def _open_systems(config: EvaluateConfig) -> dict[str, Artifact]:
    systems: dict[str, Artifact] = {}
    if config.flow is not None:
        from recsys_ray.flow import FlowConfig, ensure_candidates

        systems |= ensure_candidates(FlowConfig.model_validate(config.flow))
    systems |= {name: open_artifact(root, "candidates") for name, root in config.systems.items()}
    if config.baseline not in {*systems, *([POPULARITY] if config.popularity else [])}:
        raise ValueError(f"baseline {config.baseline!r} is not among the systems: {', '.join(systems)}")
    return systems


def _prepared_root(config: EvaluateConfig) -> Path | None:
    if config.prepared is None and isinstance(config.judgments, ReviewJudgments):
        return config.judgments.prepared
    return config.prepared


def _identity(config: EvaluateConfig, parents: Mapping[str, Manifest]) -> str:
    files = {str(path): sha256_of(path) for path in _input_files(config) if path.is_file()}
    settings = config.model_dump(mode="json", exclude={"output", "flow", "required", "task"})
    inputs = {name: parent.fingerprint for name, parent in parents.items()}
    return fingerprint({"config": settings, "files": files, "parents": inputs, "code": CODE_VERSION})


def _input_files(config: EvaluateConfig) -> list[Path]:
    files = [config.judgments.path] if isinstance(config.judgments, TableJudgments) else []
    return files + ([config.truth.path] if config.truth else [])


def _measure(config: EvaluateConfig, systems: Mapping[str, Artifact]) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    judgments, reviews = read_judgments(config.judgments, next(iter(systems.values())))
    problem = build_problem(judgments, asked_queries(systems.values()), reviews, config.truth, config.unit,
                            config.relevant_gain)
    specs, values, unanswered = config.all_metrics(), Values(), dict[str, int]()
    for name, artifact in systems.items():
        columns = ["query_id", "product_id", "rank"]
        ranked = rank_judgments(problem.judgments, artifact.tables("candidates-", columns), problem.query_ids)
        values[name] = score_all(ranked, specs, config.relevant_gain)
        unanswered[name] = int((ranked.length == 0).sum())
    if config.prepared is not None:
        depth = max(spec.k or 0 for spec in specs) or 100
        ranked, missing = popularity_ranks(config.prepared, problem, depth)
        problem.counts.not_in_catalogue = missing
        if missing:
            log.warning("judged products that are not in the catalogue, counted as not found: %d", missing)
        if config.popularity:
            values[POPULARITY] = score_all(ranked, specs, config.relevant_gain)
    if config.truth is not None:
        generic = generic_flags(config.truth, problem.query_ids)
        values[ORACLE] = oracle_values(problem, specs, config.relevant_gain, generic, values.get(POPULARITY))
    document = _document(config, problem, values, unanswered)
    tables = {f"per_query/{name}.parquet": _per_query(problem, specs, columns) for name, columns in values.items()}
    return document, {"judgments.parquet": problem.judgments, **tables}


def _document(config: EvaluateConfig, problem: Problem, values: Values,
              unanswered: Mapping[str, int]) -> dict[str, Any]:
    specs = config.all_metrics()
    return {
        "name": config.name, "primary": config.primary.name, "baseline": config.baseline, "unit": config.unit,
        "relevant_gain": config.relevant_gain, "systems": list(values), "slices": list(problem.slices),
        "metrics": [spec.name for spec in specs],
        "definitions": {spec.name: spec.definition(config.relevant_gain) for spec in specs},
        "intervals": f"95 % percentile bootstrap over {config.unit.replace('_', ' ')}, {config.samples} samples, "
                     f"seed {config.seed}",
        "counts": problem.counts.as_dict(), "queries_without_answer": dict(unanswered),
        "means": _means(config, problem, values),
        "comparisons": _comparisons(config, problem, values),
    }


def _means(config: EvaluateConfig, problem: Problem, values: Values) -> list[dict[str, Any]]:
    """One row per slice, system and metric."""
    specs, rows = config.all_metrics(), []
    for slice_name, mask in problem.slices.items():
        columns = np.concatenate([of[mask] for of in values.values()], axis=1)
        found = iter(mean_intervals(columns, problem.units.take(mask), _resampling(config)))
        for system, of in values.items():
            for column, spec in enumerate(specs):
                worst = worst_decile(of[mask, column])
                rows.append({"slice": slice_name, "system": system, "metric": spec.name,
                             **_finite(asdict(next(found))), **_finite({"worst_decile": worst})})
    return rows


def _comparisons(config: EvaluateConfig, problem: Problem, values: Values) -> list[dict[str, Any]]:
    """One row per slice, system and metric against the baseline; Holm within primary and within secondary figures.

    The primary metric is corrected over the systems, the others over systems and metrics; each slice
    is a table of its own. The oracle is a ceiling and no candidate.
    """
    specs, rows = [spec for spec in config.all_metrics() if spec.measure != "Judged"], []
    metrics = [config.all_metrics().index(spec) for spec in specs]
    candidates = [name for name in values if name not in (config.baseline, ORACLE, POPULARITY)]
    for slice_name, mask in problem.slices.items():
        units, found = problem.units.take(mask), dict[tuple[str, str], Comparison]()
        base = values[config.baseline][mask][:, metrics]
        for system in candidates:
            results = compare_columns(values[system][mask][:, metrics], base, units, _resampling(config))
            found |= {(system, spec.name): one for spec, one in zip(specs, results, strict=True)}
        adjusted = _adjusted({key: one.p_value for key, one in found.items()}, config.primary.name)
        for (system, metric), one in found.items():
            verdict = decide(one, config.gate, adjusted[system, metric])
            rows.append({"slice": slice_name, "system": system, "baseline": config.baseline, "metric": metric,
                         "primary": metric == config.primary.name, **_flat(one), "p_adjusted": adjusted[system, metric],
                         "outcome": verdict.outcome, "reason": verdict.reason})
    return rows


def _adjusted(p_values: Mapping[tuple[str, str], float], primary: str) -> dict[tuple[str, str], float]:
    adjusted: dict[tuple[str, str], float] = {}
    for wanted in (True, False):
        keys = [key for key in p_values if (key[1] == primary) == wanted]
        corrected = holm({str(position): p_values[key] for position, key in enumerate(keys)})
        adjusted |= {key: corrected[str(position)] for position, key in enumerate(keys)}
    return adjusted


def _flat(one: Comparison) -> dict[str, Any]:
    values = one.as_dict()
    return _finite({**values.pop("difference"), **values})


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """NaN becomes null: JSON has no NaN."""
    return {key: value if not isinstance(value, float) or np.isfinite(value) else None for key, value in values.items()}


def _resampling(config: EvaluateConfig) -> Resampling:
    return Resampling(samples=config.samples, seed=config.seed)


def _per_query(problem: Problem, specs: Sequence[MetricSpec], values: npt.NDArray[np.float64]) -> pa.Table:
    names = [[name for name, mask in problem.slices.items() if mask[row]] for row in range(len(problem.query_ids))]
    columns: dict[str, Any] = {"query_id": problem.query_ids, "query": problem.texts, "slices": names}
    columns |= {spec.name: pa.array(values[:, column], from_pandas=True) for column, spec in enumerate(specs)}
    return pa.table(columns)


def _publish(config: EvaluateConfig, identity: str, parents: Mapping[str, Manifest], document: Mapping[str, Any],
             tables: Mapping[str, pa.Table], roots: Mapping[str, str]) -> Artifact:
    with stage(config.output, "evaluation", identity) as staging:
        files = [staging.write_table(name, table) for name, table in tables.items()]
        write_text(staging.path / METRICS, json.dumps(document, indent=1, allow_nan=False) + "\n")
        facts = {"name": config.name, "primary": config.primary.name, "counts": document["counts"],
                 "candidates": dict(roots)}
        return staging.commit([*files, staging.entry(METRICS)], config=config, parents=dict(parents), facts=facts)


def _require(document: Mapping[str, Any], system: str) -> None:
    from recsys_ray.evaluation.gate import Verdict

    row = next((row for row in document["comparisons"]
                if row["system"] == system and row["slice"] == "all" and row["primary"]), None)
    if row is None:
        raise ValueError(f"required: {system!r} was not compared with {document['baseline']!r}")
    require(f"{system} against {row['baseline']} by {row['metric']}", Verdict(row["outcome"], row["reason"]))
