"""Explanations of a model's answers for a table of products: files, order, and the page."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pytest
import torch

from recsys_ray.evaluation.explain_concerns import ExplainConcernsConfig, explain_concerns
from recsys_ray.models.bt_bert import BtBert, BtBertCard, Calibration, Concern
from recsys_ray.models.trainable_bert import TrainableOptions


@pytest.fixture(scope="module")
def config(tiny_text_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ExplainConcernsConfig:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("explained")
    card = BtBertCard(max_tokens=64, concerns=(Concern(name="acne", query="ac"), Concern(name="redness", query="re")))
    model = BtBert.load(str(tiny_text_model()), card, TrainableOptions(), "float32", "cpu")
    model.save(root / "model", Calibration(thresholds={"acne": 0.0, "redness": 1.0}))   # always yes, and never
    pa_csv.write_csv(pa.table({
        "product_id": ["a", "b", "c"], "title": ["<b>gel</b> & more", "balm", "soap"],
        "ingredients": ["Aqua, Salicylic Acid 2%, Glycerin", "Aqua, Zinc Oxide, Parfum", None]}), root / "products.csv")
    return ExplainConcernsConfig.model_validate({
        "products": {"path": str(root / "products.csv")}, "output": root / "explanations", "top": 2,
        "model": {"model": str(root / "model"), "device": "cpu", "dtype": "float32"}})


def test_every_yes_is_explained_by_whole_ingredients(config: ExplainConcernsConfig) -> None:
    artifact = explain_concerns(config)
    answers = json.loads(artifact.file("explanations.json").read_bytes())
    assert [answer["concern"] for answer in answers] == ["acne", "acne"]
    assert {answer["product_id"] for answer in answers} == {"a", "b"}   # c has no ingredients to point at
    assert answers[0]["probability"] >= answers[1]["probability"]
    of_a = next(answer for answer in answers if answer["product_id"] == "a")
    assert [one.split(" ")[0] for one in of_a["ingredients"]] == ["Aqua", "Salicylic", "Glycerin"]
    assert {method: len(weights) for method, weights in of_a["weights"].items()} == {"occlusion": 3, "attention": 3}
    assert of_a["attended"]     # the published set: sub-words without the special ones
    assert not {"[CLS]", "[SEP]", "[PAD]", ","} & set(of_a["attended"])
    assert explain_concerns(config).manifest.version == artifact.manifest.version


def test_the_table_has_the_first_ingredients_of_each_method(config: ExplainConcernsConfig) -> None:
    artifact = explain_concerns(config)
    with artifact.file("explanations.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * 2 * 2
    for method in ("occlusion", "attention"):
        own = [row for row in rows if row["method"] == method and row["product_id"] == "a"]
        assert [row["rank"] for row in own] == ["1", "2"]
        assert float(own[0]["weight"]) >= float(own[1]["weight"])


def test_the_page_shows_the_list_and_no_markup_of_the_shop(config: ExplainConcernsConfig) -> None:
    page = explain_concerns(config).file("index.html").read_text()
    assert "Salicylic Acid" in page
    assert "&lt;b&gt;gel&lt;/b&gt;" in page
    assert "<b>gel</b>" not in page


def test_a_table_without_lists_is_refused(config: ExplainConcernsConfig, tmp_path: Path) -> None:
    pa_csv.write_csv(pa.table({"product_id": ["a"], "title": ["gel"], "ingredients": pa.array([None], pa.string())}),
                     tmp_path / "none.csv")
    with pytest.raises(ValueError, match="nothing to explain"):
        explain_concerns(config.replace(products={"path": str(tmp_path / "none.csv")}, output=tmp_path / "none"))
