"""Vectors of an artefact -> figures, near-duplicates, drift since another version, and a page that shows them."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import model_validator

from recsys_ray.artifacts import Artifact, find_artifact, list_versions, stage, write_text
from recsys_ray.config import Config, fingerprint
from recsys_ray.evaluation.embedding_analysis import (
    AnalysisError,
    AnalysisOptions,
    Drift,
    DriftLimits,
    EmbeddingAnalyser,
    drift,
)
from recsys_ray.evaluation.plots import histogram
from recsys_ray.pages import render_page
from recsys_ray.retrieval.vector_tables import VectorTable, read_vectors

log = logging.getLogger(__name__)

KIND = "embedding_analysis"
STAGE_VERSION = 1
PAIR = pa.schema([pa.field("first", pa.string()), pa.field("second", pa.string()), pa.field("cosine", pa.float64())])
SHOWN_PAIRS = 30


class AnalyseConfig(Config):
    """Which vectors, compared with which."""

    vectors: Path                           # embeddings, image_vectors, index or hybrid_index
    version: str | None = None              # None: the current one
    against: Path | None = None             # another artefact; None: the version before this one, if there is one
    against_version: str | None = None
    output: Path
    options: AnalysisOptions = AnalysisOptions()
    limits: DriftLimits = DriftLimits()
    fail_on_drift: bool = False             # leave with an error when a limit is passed: the trigger of a pipeline

    @model_validator(mode="after")
    def _a_version_of_something(self) -> AnalyseConfig:
        if self.against is not None and self.against_version is None and self.against == self.vectors:
            raise ValueError("against is the artefact itself; leave it out for the version before, or name "
                             "against_version")
        return self


def analyse_embeddings(config: AnalyseConfig) -> Artifact:
    """The `embedding_analysis` artefact: analysis.json, near_duplicates.parquet, index.html.

    Errors: `AnalysisError` with the reasons when `fail_on_drift` and a limit is passed; the artefact is there then.
    """
    after = read_vectors(config.vectors, config.version)
    before = _before(config, after)
    key = fingerprint({"stage": STAGE_VERSION, "after": after.reference, "before": before and before.reference,
                       "options": config.options.model_dump(mode="json"),
                       "limits": config.limits.model_dump(mode="json")})
    artifact = find_artifact(config.output, KIND, key) or _publish(config, key, after, before)
    reasons = (artifact.manifest.facts["drift"] or {}).get("reasons", [])
    for reason in reasons:
        log.warning("retrain: %s", reason)
    if reasons and config.fail_on_drift:
        raise AnalysisError(f"{after.reference} drifted from {before and before.reference}: {'; '.join(reasons)}")
    return artifact


def _publish(config: AnalyseConfig, key: str, after: VectorTable, before: VectorTable | None) -> Artifact:
    analyser = _analyser(after, config.options)
    change = None if before is None else drift(_analyser(before, config.options), analyser, config.limits,
                                               same_encoder=before.encoder == after.encoder)
    figures = analyser.figures()
    document = {"vectors": after.reference, "against": before and before.reference, "figures": figures,
                "drift": None if change is None else change.as_dict(), "limits": config.limits.model_dump(mode="json"),
                "options": config.options.model_dump(mode="json")}
    pairs = pa.Table.from_pylist([asdict(one) for one in analyser.near_duplicates()], schema=PAIR)
    for name, value in figures.items():
        log.info("%-24s %.4g", name.replace("_", " "), value)
    with stage(config.output.resolve(), KIND, key) as staging:
        files = [staging.write_table("near_duplicates.parquet", pairs)]
        write_text(staging.path / "analysis.json", json.dumps(document, indent=1))
        write_text(staging.path / "index.html", page(document, analyser, pairs, change))
        files += [staging.entry(name) for name in ("analysis.json", "index.html")]
        return staging.commit(files, config=config, facts={
            "figures": figures, "drift": document["drift"], "vectors": after.reference})


def _analyser(table: VectorTable, options: AnalysisOptions) -> EmbeddingAnalyser:
    lengths = np.linalg.norm(table.vectors, axis=1)
    good = np.flatnonzero(np.isfinite(lengths) & (lengths > 0))     # a hybrid vector without any half is all zeros
    rows = table.rows.take(pa.array(good))
    return EmbeddingAnalyser(table.vectors[good], rows["product_id"].to_pylist(), rows["category"].to_pylist(), options)


def _before(config: AnalyseConfig, after: VectorTable) -> VectorTable | None:
    if config.against is not None or config.against_version is not None:
        return read_vectors(config.against or config.vectors, config.against_version)
    names = [one.version for one in list_versions(config.vectors)]
    place = names.index(after.reference.partition("/")[2])
    return read_vectors(config.vectors, names[place - 1]) if place else None


def page(document: dict[str, Any], analyser: EmbeddingAnalyser, pairs: pa.Table, change: Drift | None) -> str:
    """The analysis as one HTML page that needs nothing else."""
    figures = [
        {"title": "Random pairs", "svg": histogram(analyser.similarities(), "cosine", "Cosines of random pairs"),
         "caption": "A good space is wide: most pairs have little to do with each other."},
        {"title": "Hubs", "svg": histogram(analyser.occurrences().astype(float), f"times among the "
                                           f"{analyser.options.k} nearest of others", "How often each is a neighbour"),
         "caption": "A long tail to the right: few vectors are everybody's neighbour, and many are nobody's."}]
    return render_page(
        __name__, "embedding_analysis.html", document=document,
        figures=figures, pairs=pairs.slice(0, SHOWN_PAIRS).to_pylist(), pair_count=len(pairs),
        change=change)

