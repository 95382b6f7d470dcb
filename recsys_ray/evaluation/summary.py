"""An evaluation as text for a terminal: figures with intervals, comparisons with verdicts, definitions."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any


def terminal_summary(document: Mapping[str, Any], width: int = 160, *, brief: bool = False) -> str:
    """The tables of a metrics.json (`evaluation.retrieval.read_evaluation`) as plain text; brief: slice `all` alone."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    if brief:
        console.print(_figures(document, "all"))
        return str(console.file.getvalue())  # type: ignore[attr-defined]
    for slice_name in document["slices"]:
        console.print(_figures(document, slice_name))
    if document["comparisons"]:
        console.print(_comparisons(document))
    counts = {**document["counts"], **{f"without an answer from {system}": number
                                       for system, number in document["queries_without_answer"].items()}}
    console.print("; ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in counts.items()), markup=False)
    console.print(f"[..] {document['intervals']}", markup=False)
    for definition in document["definitions"].values():
        console.print(definition, markup=False)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def interval_text(row: Mapping[str, Any]) -> str:
    """`0.571 [0.520, 0.622]`, or a dash where nothing was defined."""
    return "-" if row["mean"] is None else f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _figures(document: Mapping[str, Any], slice_name: str) -> Any:
    from rich.table import Table

    rows = {(row["system"], row["metric"]): row for row in document["means"] if row["slice"] == slice_name}
    primary = rows[document["systems"][0], document["primary"]]
    title = f"{document['name']}: {slice_name} ({primary['rows']:,} queries, {primary['units']:,} units)"
    table = Table("metric", *document["systems"], title=title, title_justify="left")
    for metric in document["metrics"]:
        name = f"{metric} *" if metric == document["primary"] else metric
        table.add_row(name, *(interval_text(rows[system, metric]) for system in document["systems"]))
    return table


def _comparisons(document: Mapping[str, Any]) -> Any:
    from rich.table import Table

    title = f"against {document['baseline']} (all figures of slice all, else the primary metric; p after Holm)"
    heads = ("slice", "system", "metric", "difference", "p", "detectable", "win/tie/loss", "worst tenth", "verdict")
    table = Table(*heads, title=title, title_justify="left")
    for row in document["comparisons"]:
        if row["mean"] is None or not (row["primary"] or row["slice"] == "all"):
            continue
        difference = f"{row['mean']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
        table.add_row(row["slice"], row["system"], row["metric"] + (" *" if row["primary"] else ""), difference,
                      f"{row['p_adjusted']:.4f}", f"{row['detectable']:.4f}",
                      f"{row['wins']}/{row['ties']}/{row['losses']}", f"{row['worst_decile']:+.3f}", row["outcome"])
    return table
