"""The page of a concern evaluation: tables with intervals, pictures, what was withheld, recommended lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from recsys_ray.evaluation import concern_plots
from recsys_ray.evaluation.concerns import MACRO, METRICS
from recsys_ray.pages import render_page


def concern_page(document: Mapping[str, Any], rows: pa.Table) -> str:
    """The metrics.json of a concern evaluation, with its rows, as one HTML page that needs nothing else."""
    means = {(row["system"], row["concern"], row["metric"]): row for row in document["means"]}
    held = document["held_out"]
    return render_page(
        __name__, "concern_evaluation.html", document=document, means=means,
        macro=MACRO, metrics=list(METRICS), figures=concern_figures(document, rows),
        held={(row["system"], row["concern"], row["metric"]): row for row in held["means"]} if held else None)


def concern_figures(document: Mapping[str, Any], rows: pa.Table) -> list[dict[str, str]]:
    """Title, caption and SVG of each picture."""
    name = document["name"]
    concern = np.array(rows["concern"].to_pylist(), dtype=object)
    label = rows["label"].to_numpy().astype(np.float64)
    said = {system: rows[f"probability {system}"].to_numpy() for system in document["systems"]}
    panels = {}
    for one in document["concerns"]:
        own = concern == one
        if 0 < label[own].sum() < own.sum():
            panels[one] = (label[own], {system: probability[own] for system, probability in said.items()})
    figures = []
    if panels:
        figures.append({"title": "Precision and recall", "svg": concern_plots.precision_recall(
            panels, f"Precision by recall of each concern, {name}"),
            "caption": "Dashed: the prevalence, which any order by chance reaches."})
    figures.append({"title": "Calibration", "svg": concern_plots.reliability(
        {system: (label, probability) for system, probability in said.items()}, f"Calibration of each system, {name}"),
        "caption": "Share of positives among pairs with about the same probability, all concerns together; larger dots "
                   "are more pairs. Fuzzy search gives a likeness, no probability."})
    for system in document["own"] or document["systems"][:1]:
        figures.append({"title": f"Answers of {system}", "svg": concern_plots.confusion_matrices(
            document["confusion"][system], f"Confusion matrices of {system}, {name}"),
            "caption": "Its yes and no by column, what is right by row."})
    return figures
