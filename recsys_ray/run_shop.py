"""A whole shop, from its files to a search that answers: the flow, what reorders and looks, the report, the service."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
from pydantic import Field
from rich.console import Console
from rich.table import Table

from recsys_ray.config import Config
from recsys_ray.data.image_files import unpack_images
from recsys_ray.evaluation.report import ReportConfig, write_report
from recsys_ray.evaluation.retrieval import EvaluateConfig, evaluate, read_evaluation
from recsys_ray.evaluation.summary import terminal_summary
from recsys_ray.flow import FlowConfig, run_flow, stage_clock
from recsys_ray.ranking.train_gbdt import TrainGbdtConfig, train_gbdt
from recsys_ray.retrieval.embed_images import EmbedImagesConfig, embed_images
from recsys_ray.retrieval.hybrid_build import BuildHybridConfig, build_hybrid
from recsys_ray.runtime import connected
from recsys_ray.serving.app import serving, until_stopped
from recsys_ray.serving.config import ServeConfig

log = logging.getLogger(__name__)

WIDTH = 120     # of the tables; a terminal that is wider is used in full


class RunShopConfig(Config):
    """The flow, what to score, where the report goes, how to serve and what to ask."""

    flow: FlowConfig
    ranker: TrainGbdtConfig | None = None           # trees that reorder the flow's candidates; None: none
    images: EmbedImagesConfig | None = None         # the products' pictures
    image_files: Path | None = None                 # a folder for them as files, which the page can show
    hybrid: BuildHybridConfig | None = None         # search by pictures, of the flow's index and `images`
    evaluations: tuple[EvaluateConfig, ...] = ()
    report: ReportConfig
    serve: ServeConfig
    questions: tuple[str, ...] = Field(default=(), description="asked over HTTP once the service is up")
    answers: int = Field(default=5, ge=1)
    stay: bool = False          # leave the service running until SIGINT or SIGTERM


def run_shop(config: RunShopConfig) -> Path:
    """Run everything; returns the path of the report."""
    console = Console(width=max(WIDTH, Console().width))
    with connected(config.flow.ray):
        run_flow(config.flow)
        _reorder_and_look(config)
        for evaluation in config.evaluations:
            with stage_clock(f"evaluate {evaluation.name}"):
                summary = terminal_summary(read_evaluation(evaluate(evaluation)), WIDTH, brief=True)
            console.out(summary, highlight=False)
        with stage_clock("report"):
            report = write_report(config.report)
        with stage_clock("serve and ask"), serving(config.serve) as url:
            for question in config.questions:
                console.print(answers_table(question, ask(url, question, config.answers)))
            if config.stay:
                console.print(f"Serving at {url} (API documentation: {url}/docs). Stop with Ctrl-C.")
                with until_stopped():
                    threading.Event().wait()
    console.print(f"Report: {report.resolve().as_uri()}")
    return report


def _reorder_and_look(config: RunShopConfig) -> None:
    """The stages after retrieval that were asked for."""
    if config.ranker is not None:
        with stage_clock("trees"):
            train_gbdt(config.ranker)
    if config.images is not None:
        with stage_clock("embed pictures"):
            embed_images(config.images)
        if config.image_files is not None:
            unpack_images(config.images.images, config.image_files)
    if config.hybrid is not None:
        with stage_clock("search by pictures"):
            build_hybrid(config.hybrid)


def ask(url: str, question: str, k: int) -> dict[str, Any]:
    """The service's answer to one query; raises `httpx.HTTPStatusError` unless it is a success."""
    response = httpx.post(f"{url}/v1/search", json={"query": question, "k": k}, timeout=30)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


def answers_table(question: str, answer: dict[str, Any]) -> Table:
    """The items of one answer as a table for the terminal."""
    table = Table(title=f"“{question}”", title_justify="left")
    for heading, justify in (("", "right"), ("title", "left"), ("brand", "left"), ("price", "right"),
                             ("rating", "right"), ("score", "right")):
        table.add_column(heading, justify=justify, no_wrap=True, overflow="ellipsis",  # type: ignore[arg-type]
                         max_width=64)
    for row in _rows(answer["items"]):
        table.add_row(*row)
    took = sum(answer["took_ms"].values())
    table.caption = f"{answer['shards_answered']} of {answer['shards_total']} shards, {took:.0f} ms"
    return table


def _rows(items: Iterable[dict[str, Any]]) -> Iterable[tuple[str, ...]]:
    for item in items:
        price = "" if item["price"] is None else f"{item['price']:.2f}"
        rating = "" if item["rating"] is None else f"{item['rating']:.1f} ({item['num_reviews']})"
        yield str(item["rank"]), item["title"] or item["product_id"], item["brand"] or "", price, rating, \
            f"{item['score']:.3f}"
