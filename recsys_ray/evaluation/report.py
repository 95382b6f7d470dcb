"""The report: one self-contained HTML page, and the same numbers as JSON.

Figures and tables depend only on the artefacts, so a rerun on unchanged inputs repeats them to the
last digit; whatever carries a time (versions, creation dates) stands apart under "run".
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from recsys_ray.artifacts import Artifact, Manifest, git_sha, open_artifact, write_text
from recsys_ray.config import Config
from recsys_ray.evaluation import plots
from recsys_ray.evaluation.baselines import ORACLE, POPULARITY
from recsys_ray.evaluation.concern_section import ConcernSectionConfig, concern_section, section_figures
from recsys_ray.evaluation.examples import example_rows
from recsys_ray.evaluation.lineage import lineage, lineage_svg, lineage_table
from recsys_ray.evaluation.ranker_figures import explanation_figures
from recsys_ray.evaluation.retrieval import read_evaluation
from recsys_ray.pages import render_page

log = logging.getLogger(__name__)

RANKED = ("Recall", "MRR", "nDCG")   # break ties of the primary metric among example queries
VOLATILE = ("version", "created", "git_sha", "parents")  # of the lineage: differ between equal runs


class ExamplesConfig(Config):
    """Which answers to show, and by which evaluation they are judged."""

    system: str
    candidates: Path
    evaluation: int = 0     # position in `evaluations`
    each: int = Field(default=3, ge=1, le=20)


class ReportConfig(Config):
    """What the report is about."""

    title: str
    prepared: Path
    evaluations: tuple[Path, ...] = ()  # none: a catalogue without judgments
    examples: ExamplesConfig | None = None
    index: Path | None = None
    ranker: Path | None = None          # trees of train_gbdt: what they read
    concerns: ConcernSectionConfig | None = None    # what was found about beauty concerns
    benchmarks: Path | None = None      # folder of result files to list
    output: Path


def write_report(config: ReportConfig) -> Path:
    """Write `output/report.json` and `output/index.html`; returns the page.

    Errors: `ArtifactError` for an artefact that is missing or damaged.
    """
    prepared = open_artifact(config.prepared, "prepared")
    evaluations = [open_artifact(root, "evaluation") for root in config.evaluations]
    documents = [read_evaluation(artifact) for artifact in evaluations]
    concerns = config.concerns.opened() if config.concerns else {}
    nodes = lineage([prepared.manifest, *(one.manifest for one in (*evaluations, *concerns.values())),
                     *_others(config, evaluations)])
    artefacts = lineage_table(nodes)
    report: dict[str, Any] = {
        "title": config.title,
        "headline": _headline(prepared, documents),
        "tables": {
            "evaluations": documents, "audit": _audit(prepared), "benchmarks": _benchmarks(config.benchmarks),
            "examples": _examples(config, prepared, evaluations, documents), "ranker": _ranker(config),
            "concerns": concern_section(concerns, config.concerns.each) if config.concerns else None,
            "artefacts": [{key: value for key, value in row.items() if key not in VOLATILE} for row in artefacts],
        },
        "run": {"created": datetime.now(UTC).isoformat(timespec="seconds"), "git_sha": git_sha(),
                "artefacts": [{key: row[key] for key in ("kind", *VOLATILE)} for row in artefacts]},
    }
    output = config.output.resolve()
    write_text(output / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    figures = _figures(prepared, evaluations, documents) | {"lineage": lineage_svg(nodes)}
    if report["tables"]["ranker"] is not None:
        figures["ranker"] = explanation_figures(report["tables"]["ranker"])
    if report["tables"]["concerns"] is not None:
        figures["concerns"] = section_figures(report["tables"]["concerns"], concerns)
    write_text(output / "index.html", render(report, figures, artefacts, config))
    log.info("report: %s", output / "index.html")
    return output / "index.html"


def _others(config: ReportConfig, evaluations: list[Artifact]) -> list[Manifest]:
    """Manifests of the index and of every candidates artefact that the evaluations name and that can be opened."""
    roots = {("candidates", Path(root)) for one in evaluations for root in one.manifest.facts["candidates"].values()}
    roots |= {("candidates", config.examples.candidates)} if config.examples else set()
    roots |= {("index", config.index)} if config.index else set()
    roots |= {("gbdt", config.ranker)} if config.ranker else set()
    siblings = {("embeddings", config.index.parent / "embeddings")} if config.index else set()
    found = [open_artifact(root, kind).manifest for kind, root in sorted(roots | siblings, key=str)
             if (root / "CURRENT").is_file()]
    return list({manifest.reference: manifest for manifest in found}.values())


def _headline(prepared: Artifact, documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cards at the top: the size of the shop, then each evaluation's best system by its primary metric."""
    cards: list[dict[str, Any]] = [{"label": "products", "value": prepared.manifest.rows("products/"), "note": "clean"}]
    if reviews := prepared.manifest.rows("reviews/"):
        cards.append({"label": "reviews", "value": reviews, "note": "train, valid and test"})
    if quarantined := prepared.manifest.rows("quarantine/"):
        cards.append({"label": "rows in quarantine", "value": quarantined, "note": "each with its reason"})
    for document in documents:
        rows = [row for row in document["means"] if row["slice"] == "all" and row["metric"] == document["primary"]
                and row["mean"] is not None and row["system"] not in (ORACLE, POPULARITY)]
        best = max(rows, key=lambda row: (row["mean"], row["system"]))
        verdict = next((row for row in document["comparisons"] if row["primary"] and row["slice"] == "all"
                        and row["system"] == best["system"]), None)
        against = f"{verdict['outcome']} against {document['baseline']}" if verdict else "the baseline"
        cards.append({"label": f"{document['primary']}, {document['name']}", "value": round(best["mean"], 4),
                      "low": round(best["low"], 4), "high": round(best["high"], 4),
                      "note": f"{best['system']}: {against}"})
    return cards


def _audit(prepared: Artifact) -> list[dict[str, Any]]:
    return [row for table in prepared.tables("audit/") for row in table.to_pylist()]


def _ranker(config: ReportConfig) -> dict[str, Any] | None:
    """What the trees read, as `train_gbdt` wrote it."""
    if config.ranker is None:
        return None
    found: dict[str, Any] = json.loads(open_artifact(config.ranker, "gbdt").file("explanation.json").read_bytes())
    return found


def _benchmarks(folder: Path | None) -> list[dict[str, Any]]:
    """The headline figures of every result file in `folder`."""
    found = []
    for path in sorted(folder.glob("*.json")) if folder else ():
        document = json.loads(path.read_text(encoding="utf-8"))
        found.append({"name": document["name"], "command": document["command"], "headline": document["headline"]})
    return found


def _examples(config: ReportConfig, prepared: Artifact, evaluations: list[Artifact],
              documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if config.examples is None:
        return []
    evaluation, document = evaluations[config.examples.evaluation], documents[config.examples.evaluation]
    answers = open_artifact(config.examples.candidates, "candidates")
    metrics = [document["primary"], *(one for one in document["metrics"] if one.startswith(RANKED))]
    metrics = list(dict.fromkeys(metrics))
    columns = ["query_id", "query", *metrics]
    return example_rows(
        evaluation.table(f"per_query/{config.examples.system}.parquet", columns), evaluation.table("judgments.parquet"),
        answers.tables("candidates-", ["query_id", "product_id", "rank", "score"]), prepared, metrics,
        document["relevant_gain"], config.examples.each)


def _figures(prepared: Artifact, evaluations: list[Artifact], documents: list[dict[str, Any]]) -> dict[str, Any]:
    """SVG texts: of the shop, and per evaluation a list in the order of `documents`."""
    figures: dict[str, Any] = {"evaluations": [_evaluation_figures(one, document) for one, document
                                               in zip(evaluations, documents, strict=True)]}
    counts = [table["num_reviews"].to_numpy() for table in prepared.tables("product_stats/", ["num_reviews"])]
    together: npt.NDArray[np.int64] = np.concatenate(counts) if counts else np.zeros(0, np.int64)
    if (together > 0).any():
        figures["review_counts"] = plots.review_counts(
            together, f"Distribution of reviews over products: {int((together > 0).sum()):,} products with reviews, "
                      f"at most {int(together.max()):,} reviews")
    months = _months(prepared)
    if months:
        figures["timeline"] = plots.timeline(months, f"Reviews per month from {min(months)} to {max(months)} by split")
    return figures


def _months(prepared: Artifact) -> dict[str, dict[str, int]]:
    months: dict[str, dict[str, int]] = {}
    for split in ("train", "valid", "test"):
        for table in prepared.tables(f"reviews/{split}/", ["timestamp_ms"]):
            days, numbers = np.unique(table["timestamp_ms"].to_numpy() // 86_400_000, return_counts=True)
            for day, number in zip(days, numbers, strict=True):
                month = months.setdefault(plots.month_of(int(day) * 86_400_000), {})
                month[split] = month.get(split, 0) + int(number)
    return months


def _evaluation_figures(artifact: Artifact, document: Mapping[str, Any]) -> list[dict[str, str]]:
    """Title, caption and SVG of each figure of one evaluation."""
    primary, name = document["primary"], document["name"]
    means = {(row["slice"], row["system"], row["metric"]): row for row in document["means"]}
    figures = []
    prefix = "Recall@"
    cuts = {metric: int(metric.removeprefix(prefix)) for metric in document["metrics"] if metric.startswith(prefix)}
    if len(cuts) >= 3:
        curves = {system: {k: _point(means["all", system, metric]) for metric, k in cuts.items()}
                  for system in document["systems"]}
        figures.append({"title": "Recall by depth", "svg": plots.recall_curves(curves, f"Recall by depth, {name}"),
                        "caption": "How often the right products are among the first k; bands are 95 % intervals."})
    slices = document["slices"]
    if len(slices) > 1 or len(cuts) < 3:
        series = {system: [_point(means[part, system, primary]) for part in slices] for system in document["systems"]}
        labels = [f"{part} ({means[part, document['systems'][0], primary]['rows']:,})" for part in slices]
        figures.append({"title": f"{primary} by slice",
                        "caption": "Mean and 95 % interval; number of queries in brackets.",
                        "svg": plots.dot_plot(labels, series, primary, f"{primary} by slice and system, {name}")})
    for row in document["comparisons"]:
        if row["primary"] and row["slice"] == "all" and row["mean"] is not None:
            figures.append(_win_loss(artifact, document, row))
    return figures


def _win_loss(artifact: Artifact, document: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, str]:
    primary, system, baseline = document["primary"], row["system"], document["baseline"]
    ours, theirs = (artifact.table(f"per_query/{one}.parquet", [primary])[primary].to_numpy().astype(np.float64)
                    for one in (system, baseline))
    title = f"{system} against {baseline}, query by query"
    svg = plots.win_loss(ours - theirs, f"difference in {primary}", f"{title}, {document['name']}")
    return {"title": title, "svg": svg,
            "caption": f"{row['wins']:,} queries better, {row['ties']:,} equal, {row['losses']:,} worse; "
                       f"mean {row['mean']:+.4f}, the worst tenth {row['worst_decile']:+.3f}."}


def _point(row: Mapping[str, Any]) -> tuple[float, float, float]:
    return (row["mean"] or 0.0, row["low"] or 0.0, row["high"] or 0.0)


def render(report: Mapping[str, Any], figures: Mapping[str, Any], artefacts: list[dict[str, Any]],
           config: ReportConfig) -> str:
    """The page as HTML text; everything but our own SVG is escaped."""
    return render_page(
        __name__, "report.html", report=report, figures=figures, artefacts=artefacts, config=config.to_yaml())
