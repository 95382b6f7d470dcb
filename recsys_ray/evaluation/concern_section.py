"""What was found about beauty concerns, for the report: labels by rule, probabilities, figures, products and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from recsys_ray.artifacts import Artifact, open_artifact
from recsys_ray.config import Config
from recsys_ray.data.concern_data import KIND as LABELS_KIND
from recsys_ray.evaluation.concern_page import concern_figures
from recsys_ray.evaluation.concern_plots import shares
from recsys_ray.evaluation.concerns import MACRO
from recsys_ray.evaluation.evaluate_concerns import KIND as EVALUATION_KIND
from recsys_ray.retrieval.concern_columns import REASONS_KIND, SCORES_KIND, Reasons, read_reasons
from recsys_ray.retrieval.segments import refuse_other_concerns

RULES = 8       # that made most labels
BINS = 10       # of probabilities
Row = dict[str, Any]


class ConcernSectionConfig(Config):
    """Which artefacts about concerns the report shows."""

    labels: Path                        # of label_concerns
    scores: Path                        # of score_concerns
    evaluation: Path | None = None      # of evaluate with task: concerns
    reasons: Path | None = None         # of explain_concerns
    each: int = Field(default=3, ge=1, le=20)   # products shown of a concern

    def opened(self) -> dict[str, Artifact]:
        """The artefacts by name; `IndexMismatch` when the explanations are by another model than the scores."""
        named = {"labels": (self.labels, LABELS_KIND), "scores": (self.scores, SCORES_KIND),
                 "evaluation": (self.evaluation, EVALUATION_KIND), "reasons": (self.reasons, REASONS_KIND)}
        found = {name: open_artifact(root, kind) for name, (root, kind) in named.items() if root is not None}
        if "reasons" in found:
            refuse_other_concerns(found["scores"].manifest.facts["model"], found["reasons"].manifest.facts["model"],
                                  f"{found['reasons'].path}: explanations by")
        return found


def concern_section(artifacts: Mapping[str, Artifact], each: int) -> Row:
    """The section as plain values: counts, a row a concern, the busiest rules, and the surest products."""
    audit = json.loads(artifacts["labels"].file("audit.json").read_bytes())
    scores = pa.concat_tables(artifacts["scores"].tables("scores/"))
    names: list[str] = artifacts["scores"].manifest.facts["concerns"]
    evaluation = None
    if "evaluation" in artifacts:
        evaluation = json.loads(artifacts["evaluation"].file("metrics.json").read_bytes())
    read = scores.filter(scores["has_ingredients"]) if "has_ingredients" in scores.column_names \
        else scores.filter(pc.is_null(scores["note"]))
    labelled = {row["concern"]: row for row in audit["concerns"]}
    reasons = read_reasons(artifacts.get("reasons"))
    return {
        "counts": {"products with ingredients and a known kind": audit["counts"]["products"],
                   "labels by rule": audit["counts"]["labels"], "set aside": audit["counts"]["set_aside"],
                   "products scored": scores.num_rows, "of them with ingredients": read.num_rows},
        "concerns": [{
            "concern": name, **{key: labelled[name][key] if name in labelled else None
                                for key in ("positives", "negatives", "unlabelled", "conflicts")},
            "addressed": _addressing(read, name).num_rows, "ap": _average_precision(evaluation, name),
            "bins": np.histogram(read[name].to_numpy(), bins=BINS, range=(0, 1))[0].tolist(),
            "surest": _surest(artifacts["labels"], reasons, read, name, each)} for name in names],
        "macro_ap": _average_precision(evaluation, MACRO), "evaluation": evaluation and evaluation["name"],
        "rules": [{key: row[key] for key in ("rule", "for", "against", "labels", "source", "verified")}
                  for row in audit["rules"][:RULES] if row["labels"]],
    }


def _addressing(scores: pa.Table, name: str) -> pa.Table:
    return scores.filter(pa.array([name in one for one in scores["addresses"].to_pylist()], pa.bool_()))


def _average_precision(evaluation: Row | None, concern: str) -> list[Row]:
    """AP of every system with its interval, in their order; none where nothing was evaluated."""
    return [] if evaluation is None else [
        {key: row[key] for key in ("system", "mean", "low", "high", "positives", "rows")}
        for row in evaluation["means"] if (row["concern"], row["metric"]) == (concern, "AP")]


def _surest(labels: Artifact, reasons: Reasons, scores: pa.Table, name: str, each: int) -> list[Row]:
    """Of the products of a known kind the surest to address the concern: title, what the rules say, and why."""
    products = labels.table("products.parquet", ["product_id", "row_id", "title"])
    titled = {row["product_id"]: row for row in products.to_pylist()}
    rows = labels.table("labels.parquet", ["product_id", "concern", "label"])
    rows = rows.filter(pc.equal(rows["concern"], name))
    label = dict(zip(rows["product_id"].to_pylist(), rows["label"].to_pylist(), strict=True))
    found = _addressing(scores.filter(pc.is_in(scores["product_id"], products["product_id"].combine_chunks())), name)
    first = found.sort_by([(name, "descending"), ("product_id", "ascending")]).slice(0, each)
    return [{"product_id": one, "title": titled[one]["title"], "probability": round(probability, 4),
             "label": label.get(one), "because": reasons.get(titled[one]["row_id"], {}).get(name, [])}
            for one, probability in zip(first["product_id"].to_pylist(), first[name].to_pylist(), strict=True)]


def section_figures(section: Row, artifacts: Mapping[str, Artifact]) -> list[dict[str, str]]:
    """Title, caption and SVG of each picture of the section."""
    bins = {row["concern"]: row["bins"] for row in section["concerns"]}
    figures = [{"title": "Probabilities", "svg": shares(bins, "Products by probability of each concern"),
                "caption": "Products with ingredients by what the model says; one that knows has most at the ends."}]
    if "evaluation" not in artifacts:
        return figures
    document = json.loads(artifacts["evaluation"].file("metrics.json").read_bytes())
    return figures + concern_figures(document, artifacts["evaluation"].table("per_product.parquet"))
