"""What trees read: the share of each feature in their gain, and how its values move the score (TreeSHAP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys_ray.evaluation import plots
from recsys_ray.pages import render_page

Floats = npt.NDArray[np.float32]
SHOWN = 20          # features of a figure
DOTS = 150          # of each feature


def explanation(names: Sequence[str], families: Mapping[str, Sequence[str]], importance: Mapping[str, float],
                features_NF: Floats, contributions_NF: Floats) -> dict[str, Any]:
    """Plain values for JSON: importance and mean absolute contribution of features and families, and some dots.

    `features_NF` and `contributions_NF` are the same rows, columns `names`.
    """
    family_of = {name: family for family, some in families.items() for name in some}
    moved = dict(zip(names, np.abs(contributions_NF).mean(axis=0).tolist(), strict=True))
    order = sorted(names, key=lambda name: (-moved[name], name))
    rows = np.unique(np.linspace(0, len(features_NF) - 1, min(DOTS, len(features_NF))).astype(int))
    dots = {}
    for name in order[:SHOWN]:
        column = names.index(name)
        values = features_NF[rows, column]
        known = np.isfinite(values)
        tone = np.full(len(rows), 0.5)
        if known.any():
            tone[known] = np.searchsorted(np.sort(values[known]), values[known], side="left") / max(1, known.sum() - 1)
        dots[name] = {"contribution": _rounded(contributions_NF[rows, column]), "value": _rounded(np.minimum(tone, 1))}
    return {
        "features": [{"name": name, "family": family_of[name], "gain_share": round(importance.get(name, 0.0), 6),
                      "mean_contribution": round(moved[name], 6)} for name in order],
        "families": {family: {"gain_share": round(sum(importance.get(name, 0.0) for name in some), 6),
                              "mean_contribution": round(sum(moved[name] for name in some), 6)}
                     for family, some in families.items()},
        "rows": len(features_NF), "dots": dots}


def _rounded(values: npt.NDArray[np.floating[Any]]) -> list[float]:
    return [round(float(one), 4) for one in values]


def explanation_figures(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """Title, caption and SVG of each figure."""
    by_gain = sorted(document["features"], key=lambda one: (-one["gain_share"], one["name"]))[:SHOWN]
    return [
        {"title": "What the trees read", "caption": "Share of each feature in the gain of all splits.",
         "svg": plots.bars({one["name"]: one["gain_share"] for one in by_gain}, "share of the gain",
                           "Share of each feature in the gain of all splits")},
        {"title": "How features move the score",
         "caption": f"Each dot is a candidate: how much the feature added to its score (TreeSHAP; {document['rows']:,} "
                    "candidates, of which some are drawn).",
         "svg": plots.swarm({name: (one["contribution"], one["value"]) for name, one in document["dots"].items()},
                            "added to the score", "How the values of each feature move the score")}]


def explanation_page(title: str, document: Mapping[str, Any]) -> str:
    """The figures and the table of families as a page of their own."""
    ranker = {"document": document, "figures": explanation_figures(document)}
    return render_page(__name__, "ranker.html", title=title, ranker=ranker)
