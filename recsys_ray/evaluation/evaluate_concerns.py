"""Probabilities of concerns of several systems, and of baselines, against labels: figures, pictures, one page.

The baselines `majority` and `fuzzy` are always in the table. Where rules were withheld, a second table asks only for
what they alone say, and the lists each system recommends are laid beside those of the remaining rules.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

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
from recsys_ray.config import fingerprint
from recsys_ray.data.concern_data import KIND as LABELS_KIND
from recsys_ray.data.concern_data import LabelConcernsConfig, LabelError, OwnLabels, read_given
from recsys_ray.data.concern_rulebook import load_rules
from recsys_ray.data.concerns import Labeller
from recsys_ray.data.sources import load_rows, load_table
from recsys_ray.evaluation import concern_baselines as baselines
from recsys_ray.evaluation.concern_baselines import Part
from recsys_ray.evaluation.concern_lists import compare_lists
from recsys_ray.evaluation.concerns import (
    MACRO,
    METRICS,
    ConcernMetricError,
    ConcernScores,
    ConcernSheet,
    checked,
    compare_macro,
    confusion,
    held_out_sheet,
    measure,
    scores_of_table,
    sheet_of_labels,
    sheet_of_table,
)
from recsys_ray.evaluation.evaluation_config import EvaluationConfig
from recsys_ray.evaluation.significance import Resampling
from recsys_ray.evaluation.summary import interval_text

log = logging.getLogger(__name__)

KIND = "concern_evaluation"
SCORES_KIND = "concern_scores"      # of the score_concerns job
CODE_VERSION = 1                    # raise it when the figures of an unchanged input change
MAJORITY, FUZZY, RULES, INGREDIENTS = "majority", "fuzzy", "rules", "ingredients"
_ROW = pa.schema([pa.field("product_id", pa.string(), nullable=False), pa.field("concern", pa.string(), nullable=False),
                  pa.field("probability", pa.float64(), nullable=False), pa.field("threshold", pa.float64())])
Systems = dict[str, ConcernScores]


class EvaluateConcernsConfig(EvaluationConfig):
    """Which probabilities are compared with which labels."""

    task: Literal["concerns"] = "concerns"
    name: str
    labels: Path                                    # artefact root of label_concerns
    output: Path
    systems: dict[str, Path] = Field(default_factory=dict)  # name -> artefact of score_concerns, or a table of rows
    split: Literal["valid", "test"] = "test"
    concerns: tuple[str, ...] = ()                  # none named: all of the labels
    truth: OwnLabels | None = None                  # what is right, in place of the labels (planted, or an expert's)
    baselines: tuple[Literal["ingredients", "rules"], ...] = ("ingredients",)   # beside majority and fuzzy
    baseline: str = "ingredients"                   # what every system is compared with
    list_length: int = Field(default=20, ge=1)      # products of a recommended list
    samples: int = Field(default=1000, ge=100)
    seed: int = 7

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        taken = {MAJORITY, FUZZY, *self.baselines}
        if wrong := sorted(set(self.systems) & {MAJORITY, FUZZY, RULES, INGREDIENTS}):
            raise ValueError(f"{wrong[0]!r} is the name of a baseline; give the system another one")
        if self.baseline not in {*taken, *self.systems}:
            raise ValueError(f"baseline {self.baseline!r} is not among {', '.join([*self.systems, *sorted(taken)])}")
        return self


def evaluate_concerns(config: EvaluateConcernsConfig) -> Artifact:
    """The `concern_evaluation` artefact: metrics.json with every figure, per_product.parquet, and index.html.

    Errors: `ArtifactError` for missing input, `ConcernMetricError` for a product or concern without a probability,
    `LabelError` for a truth that cannot be used.
    """
    labels = open_artifact(config.labels, LABELS_KIND)
    parents = {"labels": labels.manifest, **{f"scores {name}": open_artifact(path, SCORES_KIND).manifest
                                             for name, path in config.systems.items() if _is_artifact(path)}}
    tables = [path for path in config.systems.values() if not _is_artifact(path)]
    files = [*tables, *([Path(config.truth.path)] if config.truth else [])]
    key = fingerprint({"code": CODE_VERSION, "config": config.model_dump(mode="json", exclude={"output", "task"}),
                       "files": [sha256_of(path) for path in files if path.is_file()],
                       "parents": {name: one.fingerprint for name, one in parents.items()}})
    if (done := find_artifact(config.output, KIND, key)) is not None:
        return done
    document, rows = _measured(config, labels)
    with stage(config.output.resolve(), KIND, key) as staging:
        from recsys_ray.evaluation.concern_page import concern_page

        entry = staging.write_table("per_product.parquet", rows)
        write_text(staging.path / "metrics.json", json.dumps(document, indent=1, allow_nan=False) + "\n")
        write_text(staging.path / "index.html", concern_page(document, rows))
        facts = {"name": config.name, "systems": document["systems"], "counts": document["counts"]}
        return staging.commit([entry, staging.entry("metrics.json"), staging.entry("index.html")], config=config,
                              parents=parents, facts=facts)


def _is_artifact(path: Path) -> bool:
    return current_version(path) is not None


# --- what is compared -----------------------------------------------------------------------------
def _measured(config: EvaluateConcernsConfig, labels: Artifact) -> tuple[dict[str, Any], pa.Table]:
    concerns = _concerns(config, labels.manifest)
    mode = labels.manifest.facts["mode"]
    products, told = labels.table("products.parquet"), labels.table("labels.parquet")
    parts = {split: products.filter(pc.equal(products["split"], split)).sort_by("row_id")
             for split in ("train", "valid", config.split)}
    asked = parts[config.split]
    sheet = sheet_of_labels(asked, told, concerns, mode) if config.truth is None else _truth(config, asked, concerns)
    if not np.isfinite(sheet.target).any():
        raise ConcernMetricError(f"{config.labels}: no label counts in {config.split}, so there is nothing to measure")
    known = {split: Part(parts[split], sheet_of_labels(parts[split], told, concerns, mode))
             for split in ("train", "valid")}
    systems = {name: _scores(path, sheet, name) for name, path in config.systems.items()}
    systems |= _baselines(config, labels.manifest, known, asked, concerns)
    draws = Resampling(samples=config.samples, seed=config.seed)
    document = _document(config, labels.manifest, sheet, systems, draws)
    held = held_out_sheet(asked, told, concerns, mode)
    if config.split == "test" and labels.manifest.facts["withheld_rules"] and (held.target == 1).any():
        document["held_out"] = _held_out(config, labels.manifest, held, asked, systems, draws)
    return document, _per_product(sheet, systems)


def _concerns(config: EvaluateConcernsConfig, manifest: Manifest) -> tuple[str, ...]:
    known = manifest.facts["concerns"]
    for name in config.concerns:
        if name not in known:
            raise ConcernMetricError(f"concerns: unknown concern {name!r}; the labels have {', '.join(known)}")
    return config.concerns or tuple(known)


def _truth(config: EvaluateConcernsConfig, asked: pa.Table, concerns: tuple[str, ...]) -> ConcernSheet:
    if config.truth is None:
        raise LabelError("no truth is given")
    given = read_given(config.truth, read=partial(load_rows, allow_truth=True))
    unknown = set(asked["product_id"].to_pylist()) - {product for product, _ in given}
    if unknown:
        log.warning("%s says nothing of %d of %d products, e.g. %s: they are not counted", config.truth.path,
                    len(unknown), asked.num_rows, min(unknown))
    rows = pa.table({"product_id": [product for product, _ in given], "concern": [concern for _, concern in given],
                     "label": [label for label, _ in given.values()]})
    return sheet_of_table(asked, rows, concerns)


def _scores(path: Path, sheet: ConcernSheet, name: str) -> ConcernScores:
    """The scores of an artefact (a column a concern) or of a table (a row a product and concern)."""
    if not _is_artifact(path):
        return scores_of_table(sheet, load_table(str(path), {}, _ROW), name)
    artifact = open_artifact(path, SCORES_KIND)
    has = artifact.manifest.facts["concerns"]
    if missing := [one for one in sheet.concerns if one not in has]:
        raise ConcernMetricError(f"{name}: no probabilities of {missing[0]!r}; it has {', '.join(has)}. Name those "
                                 "to evaluate under concerns")
    place = {one: at for at, one in enumerate(sheet.product_ids)}
    probability = np.full((len(place), len(sheet.concerns)), np.nan)
    for table in artifact.tables("scores/", ["product_id", *sheet.concerns]):
        chosen = [(row, place[one]) for row, one in enumerate(table["product_id"].to_pylist()) if one in place]
        values = np.stack([table[concern].to_numpy() for concern in sheet.concerns], axis=1)
        for row, at in chosen:
            probability[at] = values[row]
    thresholds = artifact.manifest.facts["model"]["card"]["calibration"]["thresholds"]
    threshold = np.array([float(thresholds.get(one, 0.5)) for one in sheet.concerns])
    return checked(sheet, ConcernScores(probability.astype(np.float64), threshold), name)


def _baselines(config: EvaluateConcernsConfig, manifest: Manifest, known: Mapping[str, Part], asked: pa.Table,
               concerns: tuple[str, ...]) -> Systems:
    words = {name: [manifest.facts["concerns"][name]["query"], *manifest.facts["concerns"][name]["paraphrases"]]
             for name in concerns}
    found = {MAJORITY: baselines.majority(known["train"], asked),
             FUZZY: baselines.fuzzy_search(words, known["valid"], asked)}
    if INGREDIENTS in config.baselines:
        found[INGREDIENTS] = baselines.bag_of_ingredients(known["train"], known["valid"], asked,
                                                          _labeller(manifest, concerns).rulebook.synonyms, config.seed)
    if RULES in config.baselines:
        found[RULES] = baselines.rules(_labeller(manifest, concerns), asked, manifest.facts["withheld_rules"])
    return found


def _labeller(manifest: Manifest, concerns: tuple[str, ...]) -> Labeller:
    """The rules the labels were made with, as they are now."""
    return Labeller(load_rules(LabelConcernsConfig.model_validate(manifest.config).rules).select(concerns))


def _held_out(config: EvaluateConcernsConfig, manifest: Manifest, held: ConcernSheet, asked: pa.Table,
              systems: Systems, draws: Resampling) -> dict[str, Any]:
    """Figures on what only withheld rules say, and lists beside those of the remaining rules."""
    remaining = baselines.rules(_labeller(manifest, held.concerns), asked, manifest.facts["withheld_rules"])
    lists = {name: compare_lists(held, scores.probability, remaining.probability, config.list_length)
             for name, scores in systems.items() if name != RULES}
    return {"rules": manifest.facts["withheld_rules"], "means": measure(held, systems, draws), "lists": lists,
            "positives": int((held.target == 1).sum())}


def _document(config: EvaluateConcernsConfig, manifest: Manifest, sheet: ConcernSheet, systems: Systems,
              draws: Resampling) -> dict[str, Any]:
    positives = np.nansum(sheet.target, axis=0)
    rivals = [name for name in systems if name not in (config.baseline, MAJORITY, FUZZY)]
    return {
        "name": config.name, "split": config.split, "mode": manifest.facts["mode"], "baseline": config.baseline,
        "against": "labels" if config.truth is None else config.truth.path, "systems": list(systems),
        "own": list(config.systems), "concerns": list(sheet.concerns), "definitions": METRICS,
        "intervals": f"{draws.level:.0%} percentile bootstrap over groups of products (near-duplicates, one formula), "
                     f"{draws.samples} samples, seed {draws.seed}",
        "counts": {"products": len(sheet.product_ids), "groups": len(np.unique(sheet.group_ids)),
                   "labels": int(np.isfinite(sheet.target).sum()), "positives": int(positives.sum())},
        "without_positives": [one for one, count in zip(sheet.concerns, positives, strict=True) if not count],
        "means": measure(sheet, systems, draws),
        "comparisons": {name: compare_macro(sheet, systems[name], systems[config.baseline], draws) for name in rivals},
        "confusion": {name: confusion(sheet, scores) for name, scores in systems.items()},
        "held_out": None,
    }


def _per_product(sheet: ConcernSheet, systems: Systems) -> pa.Table:
    """One row for each counted product and concern: label, and of each system its probability and threshold."""
    at, concern = np.nonzero(np.isfinite(sheet.target))
    columns: dict[str, Any] = {
        "product_id": [sheet.product_ids[one] for one in at], "group_id": sheet.group_ids[at],
        "concern": [sheet.concerns[one] for one in concern], "label": sheet.target[at, concern].astype(np.int8)}
    for name, scores in systems.items():
        columns[f"probability {name}"] = scores.probability[at, concern]
        columns[f"threshold {name}"] = scores.threshold[concern]
    return pa.table(columns)


# --- for a terminal -------------------------------------------------------------------------------
def concern_summary(document: Mapping[str, Any], width: int = 150) -> str:
    """The figures of a metrics.json as plain text: macro by metric, AP by concern, what was withheld."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    rows = {(row["system"], row["concern"], row["metric"]): row for row in document["means"]}
    counts = document["counts"]
    table = Table("macro", *document["systems"], title_justify="left",
                  title=f"{document['name']}: {counts['products']:,} products, {counts['groups']:,} groups")
    for metric in METRICS:
        table.add_row(metric, *(interval_text(rows[system, MACRO, metric]) for system in document["systems"]))
    console.print(table)
    table = Table("AP", "positives", *document["systems"])
    for concern in document["concerns"]:
        cells = [rows[system, concern, "AP"] for system in document["systems"]]
        table.add_row(concern, f"{cells[0]['positives']}/{cells[0]['rows']}", *map(interval_text, cells))
    console.print(table)
    if document["held_out"]:
        means = {(row["system"], row["metric"]): row for row in document["held_out"]["means"]
                 if row["concern"] == MACRO}
        table = Table("withheld rules, macro", *document["systems"])
        for metric in ("AP", "AP lift", "ROC AUC"):
            table.add_row(metric, *(interval_text(means[system, metric]) for system in document["systems"]))
        console.print(table)
    for concern in document["without_positives"]:
        console.print(f"{concern}: no positive in {document['split']}, so nothing was measured", markup=False)
    console.print(f"[..] {document['intervals']}", markup=False)
    return str(console.file.getvalue())  # type: ignore[attr-defined]
