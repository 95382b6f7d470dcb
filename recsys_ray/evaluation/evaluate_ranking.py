"""A table of scores -> a "ranking" artefact: metrics.json (every figure and comparison) and per_query/*.parquet."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from recsys_ray.artifacts import (
    Artifact,
    Manifest,
    current_version,
    find_artifact,
    open_artifact,
    sha256_of,
    stage,
    write_text,
)
from recsys_ray.config import Config, fingerprint
from recsys_ray.evaluation.ranking import RANDOM, SPECS, Measured, RankingError, measure, scored_pairs
from recsys_ray.evaluation.significance import Resampling

log = logging.getLogger(__name__)

KIND = "ranking"
CODE_VERSION = 1    # raise it when the figures of an unchanged input change
METRICS = "metrics.json"


class EvaluateRankingConfig(Config):
    """Which scores, compared with which system."""

    scores: Path                        # Parquet: query_id, product_id, label, scores; or the root of recommenders
    output: Path
    systems: tuple[str, ...] = ()       # columns; none named: all of floats
    baseline: str                       # what the others are compared with
    samples: int = Field(default=1000, ge=100)
    seed: int = 7


def evaluate_ranking(config: EvaluateRankingConfig) -> Artifact:
    """The `ranking` artefact: pooled ROC AUC and AP, per-query MAP and nDCG, with intervals over queries.

    Errors: `RankingError` for a table that cannot be compared, or a baseline that is not in it.
    """
    path, parents = _table(config.scores)
    key = fingerprint({"code": CODE_VERSION, "scores": sha256_of(path),
                       "config": config.model_dump(mode="json", exclude={"scores", "output"})})
    if (done := find_artifact(config.output, KIND, key)) is not None:
        return done
    pairs = scored_pairs(pq.ParquetFile(path, page_checksum_verification=True).read(), config.systems, config.seed)
    if config.baseline not in pairs.scores:
        raise RankingError(f"baseline: no system {config.baseline!r}; there are {', '.join(pairs.scores)}")
    found = measure(pairs, Resampling(samples=config.samples, seed=config.seed))
    with stage(config.output, KIND, key) as staging:
        files = [staging.write_table(f"per_query/{name}.parquet", pa.table(
            {"query_id": pairs.query_ids, **{spec.name: values[:, column] for column, spec in enumerate(SPECS)}}))
            for name, values in found.values.items()]
        document = _document(config, found, len(pairs.label), len(pairs.query_ids))
        write_text(staging.path / METRICS, json.dumps(document, indent=1, allow_nan=False) + "\n")
        facts = {"rows": len(pairs.label), "queries": len(pairs.query_ids), "systems": list(pairs.scores)}
        return staging.commit([*files, staging.entry(METRICS)], config=config, parents=parents, facts=facts)


def _table(scores: Path) -> tuple[Path, dict[str, Manifest]]:
    if current_version(scores) is None:
        if not scores.is_file():
            raise RankingError(f"{scores}: neither a Parquet file nor the root of an artefact with scores")
        return scores, {}
    artifact = open_artifact(scores, "recommenders")
    return artifact.file("scores.parquet"), {"scores": artifact.manifest}


def _document(config: EvaluateRankingConfig, found: Measured, rows: int, queries: int) -> dict[str, Any]:
    others = [name for name in found.values if name not in (config.baseline, RANDOM)]
    for name in found.values:
        log.info("%s: %s", name, ", ".join(f"{metric} {one.mean:.4f}" for metric, one in found.intervals[name].items()))
    return {"baseline": config.baseline, "rows": rows, "queries": queries, "means": found.rows(),
            "definitions": [spec.definition() for spec in SPECS],
            "comparisons": {name: found.compare(name, config.baseline) for name in others}}
