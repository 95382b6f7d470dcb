"""A concern model and some products -> which ingredients spoke for each concern: CSV, JSON and a page of highlights."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from pydantic import Field

from recsys_ray.artifacts import Artifact, find_artifact, stage, write_text
from recsys_ray.config import Config, fingerprint
from recsys_ray.data.concern_products import ConcernProducts, read_concern_products
from recsys_ray.data.concern_rulebook import load_rules
from recsys_ray.data.concerns import Labeller
from recsys_ray.data.ingredients import parse_ingredients
from recsys_ray.data.rule_files import PACKAGED
from recsys_ray.evaluation.explain import (
    AttentionReader,
    Floats,
    Listed,
    attended_tokens,
    occlusion,
    order_of,
    ranked_attention,
)
from recsys_ray.models.bt_bert import KIND as MODEL_KIND
from recsys_ray.models.bt_bert import Concern
from recsys_ray.models.bt_bert_scorer import BtBertConfig, BtBertScorer, bt_bert_identity
from recsys_ray.models.sentence_layout import find_model
from recsys_ray.pages import render_page

log = logging.getLogger(__name__)

KIND = "concern_explanations"
STAGE_VERSION = 2       # raise it when the same inputs would give other explanations
METHODS = {"occlusion": "how much the logit falls without the ingredient",
           "attention": "what the query's tokens attend to in the layer before the last"}
TABLE = pa.schema([("product_id", pa.string()), ("concern", pa.string()), ("probability", pa.float64()),
                   ("method", pa.string()), ("rank", pa.int32()), ("ingredient", pa.string()),
                   ("weight", pa.float64())])
Row = dict[str, Any]


class ExplainConcernsConfig(Config):
    """Which answers of which model are explained."""

    products: ConcernProducts
    model: BtBertConfig
    output: Path
    rules: tuple[str, ...] = (PACKAGED,)            # whose synonyms tell ingredients apart
    kinds_only: bool = False                        # no products of no kind that the rules know
    most_products: int = Field(default=100, ge=1)   # drawn of those there are
    top: int = Field(default=5, ge=1)               # ingredients of each answer
    attended: int = Field(default=1, ge=1)          # tokens of each row of attention, in the published explanation
    shown: int = Field(default=12, ge=0)            # answers on the page
    seed: int = 7


def explain_concerns(config: ExplainConcernsConfig) -> Artifact:
    """The `concern_explanations` artefact, of every answer that is a yes: a probability from its threshold on.

    explanations.csv and .parquet (the first `top` ingredients of each answer and method), explanations.json (all of
    them, and the published set of sub-words) and index.html.
    Facts: model (identity), products, answers, methods. Errors: `ValueError` when no product has an ingredient list.
    """
    book = load_rules(config.rules)
    identity = bt_bert_identity(config.model)
    key = fingerprint({
        "stage": STAGE_VERSION, "model": identity, "rules": book.digest,
        "options": config.model_dump(mode="json", exclude={"output", "model", "rules"}),
        "products": config.products.states(),
        "parents": {name: one.fingerprint for name, one in config.products.parents().items()}})
    if (done := find_artifact(config.output, KIND, key)) is not None:
        return done
    products, _ = read_concern_products(config.products, Labeller(book), config.kinds_only)
    rows = [row for row in products.to_pylist() if row["ingredients"]]
    if not rows:
        raise ValueError("no product has an ingredient list, so there is nothing to explain")
    chosen = np.sort(np.random.default_rng(config.seed).permutation(len(rows))[:config.most_products])
    listed = {rows[place]["product_id"]: Listed(
        tuple(one.written for one in parse_ingredients(rows[place]["ingredients"], book.synonyms)),
        rows[place]["title"]) for place in chosen}
    answers = list(_answers(config, listed))
    log.info("%d products, %d answers explained", len(listed), len(answers))
    with stage(config.output.resolve(), KIND, key) as staging:
        write_text(staging.path / "explanations.json", json.dumps(answers, ensure_ascii=False, indent=1))
        table = _table(answers, config.top)
        pa_csv.write_csv(table, staging.path / "explanations.csv")
        write_text(staging.path / "index.html", _page(answers[:config.shown]))
        files = [staging.write_table("explanations.parquet", table),
                 *(staging.entry(name) for name in ("explanations.json", "explanations.csv", "index.html"))]
        return staging.commit(files, config=config, parents=config.products.parents(), facts={
            "model": identity, "products": len(listed), "answers": len(answers), "methods": list(METHODS)})


def _answers(config: ExplainConcernsConfig, listed: dict[str, Listed]) -> Iterator[Row]:
    """Every answer that is a yes, the surest first, with the weights of all ingredients by each method."""
    scorer = BtBertScorer(config.model)
    reader = AttentionReader(find_model(config.model.model, MODEL_KIND), scorer.tokenizer)
    found_NC = scorer.score([one.text() for one in listed.values()], [one.title for one in listed.values()])
    concerns, thresholds = scorer.card.concerns, scorer.card.calibration.thresholds
    yes = [(float(found_NC[place, column]), name, concern) for place, name in enumerate(listed)
           for column, concern in enumerate(concerns) if found_NC[place, column] >= thresholds.get(concern.name, 0.5)]
    for probability, name, concern in sorted(yes, key=lambda one: (-one[0], one[1], one[2].name)):
        weights, attended = _explained(scorer, reader, concern, listed[name], config.attended)
        yield {"product_id": name, "title": listed[name].title, "concern": concern.name,
               "probability": round(probability, 4), "ingredients": list(listed[name].ingredients),
               "weights": {method: [round(float(one), 5) for one in found] for method, found in weights.items()},
               "attended": attended}


def _explained(scorer: BtBertScorer, reader: AttentionReader, concern: Concern, listed: Listed, k: int
               ) -> tuple[dict[str, Floats], list[str]]:
    """(the weights of all ingredients by each method, the published set of sub-words)."""
    pair, owners = reader.pair(concern, listed)
    attention_HLL = reader.attention(pair.ids)
    weights = {"occlusion": occlusion(scorer, concern, listed),
               "attention": ranked_attention(attention_HLL, pair, owners, len(listed.ingredients))}
    return weights, attended_tokens(attention_HLL, reader.tokens(pair.ids), reader.special, k)


def _table(answers: list[Row], top: int) -> pa.Table:
    """The first `top` ingredients of each answer and method, one a row."""
    rows = [{"product_id": answer["product_id"], "concern": answer["concern"], "probability": answer["probability"],
             "method": method, "rank": rank, "ingredient": answer["ingredients"][place], "weight": weights[place]}
            for answer in answers for method, weights in answer["weights"].items()
            for rank, place in enumerate(order_of(np.array(weights))[:top].tolist(), start=1)]
    return pa.Table.from_pylist(rows, schema=TABLE)


def _page(answers: list[Row]) -> str:
    shown = [{**one, "rows": [{"method": method, "cells": _cells(one["ingredients"], np.array(weights))}
                              for method, weights in one["weights"].items()]} for one in answers]
    return render_page(__name__, "concern_explanations.html", methods=METHODS, answers=shown)


def _cells(ingredients: list[str], weights: Floats) -> list[Row]:
    """Each ingredient with its weight as a share of the largest, 0 to 1; what speaks against is below 0."""
    largest = max(float(np.abs(weights).max(initial=0.0)), 1e-9)
    return [{"ingredient": one, "share": round(float(weight) / largest, 3), "weight": round(float(weight), 3)}
            for one, weight in zip(ingredients, weights, strict=True)]
