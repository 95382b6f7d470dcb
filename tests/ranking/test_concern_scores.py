"""Scoring of any table against concerns: columns, notes, quarantine, resuming, on Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch

from recsys_ray.config import load_config
from recsys_ray.data.concern_rulebook import load_rules
from recsys_ray.data.concerns import Labeller
from recsys_ray.models.bt_bert import BtBert, BtBertCard, Calibration, Concern
from recsys_ray.models.bt_bert_scorer import BtBertConfig, BtBertScorer
from recsys_ray.models.trainable_bert import TrainableOptions
from recsys_ray.ranking.concern_scores import (
    ScoreConcernsConfig,
    ScoredTable,
    score_bucket,
    score_concerns,
    score_products,
)
from recsys_ray.schema import PRODUCT, RAW_PRODUCT, conform

LABELLER = Labeller(load_rules())
DEMO = Path(__file__).resolve().parents[2] / "configs/score_concerns/demo.yaml"     # scoring any table is one command
LISTS = ["aqua, zinc", None, "   ", "\u6c34, \u30b0\u30ea\u30bb\u30ea\u30f3", ", ".join(["aqua"] * 3000),
         ", ".join(f"substance {number}" for number in range(3000)),
         "\u0432\u043e\u0434\u0430, \u0430, \u0431, \u0432, \u0433"]
TITLES = ["gel", "balm", None, "\u30af\u30ea\u30fc\u30e0", "cream", "cream", "\u043a\u0440\u0435\u043c"]


@pytest.fixture(scope="module")
def folder(tiny_text_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    card = BtBertCard(max_tokens=48, concerns=(Concern(name="acne", query="ac"), Concern(name="redness", query="re")))
    model = BtBert.load(str(tiny_text_model()), card, TrainableOptions(), "float32", "cpu")
    root = tmp_path_factory.mktemp("model")
    model.save(root, Calibration(thresholds={"acne": 0.0, "redness": 1.0}))
    return root


def test_every_row_gets_finite_numbers_and_a_reason_to_doubt_them(folder: Path) -> None:
    scorer = BtBertScorer(BtBertConfig(model=str(folder), device="cpu"))
    names = [f"p{number}" for number in range(len(LISTS))]
    products = pa.table({"product_id": names, "title": TITLES, "ingredients": LISTS})
    found = score_products(scorer, conform(products, RAW_PRODUCT, "products"), ScoredTable(path="own"), LABELLER)
    assert found["product_id"].to_pylist() == names
    assert all(np.isfinite(found[name].to_numpy()).all() for name in ("acne", "redness"))
    assert found["addresses"].to_pylist() == [["acne"]] * len(LISTS)     # thresholds 0 and 1
    assert found["note"].to_pylist()[:5] == [None, "no ingredients", "neither ingredients nor a title", None, None]
    assert found["note"][5].as_py() == "too long for a list: 3,000 ingredients, more than 300"
    assert "another language" in found["note"][6].as_py()


def test_a_bucket_is_scored_by_row_id_and_says_where_ingredients_are(folder: Path) -> None:
    scorer = BtBertScorer(BtBertConfig(model=str(folder), device="cpu"))
    products = conform(pa.table({
        "product_id": ["a", "b", "c"], "row_id": [3, 1, 2], "group_id": [3, 1, 2], "title": ["gel", "serum", "lamp"],
        "ingredients": ["aqua, zinc", None, " "],
        "description": [None, "With 2 % salicylic acid.", "Free of mineral oil."]}), PRODUCT, "products")
    found = score_bucket(scorer, products, ScoredTable(path="shop", find_in_text=True), LABELLER)
    assert found["row_id"].to_pylist() == [1, 2, 3]
    assert found["has_ingredients"].to_pylist() == [True, False, True]
    assert found["note"].to_pylist() == ["ingredients found in its text", "no ingredients", None]
    kept = score_bucket(scorer, products, ScoredTable(path="shop", without_ingredients="leave_out"), LABELLER)
    assert kept["product_id"].to_pylist() == ["a"]
    assert kept["acne"][0] == found["acne"][2]


def test_a_tables_texts_may_be_read_and_rows_left_out(folder: Path) -> None:
    scorer = BtBertScorer(BtBertConfig(model=str(folder), device="cpu"))
    products = conform(pa.table({
        "product_id": ["a", "b", "c"], "title": ["gel", "serum", "lamp"], "ingredients": ["aqua, zinc", None, ""],
        "description": [None, "With 2 % salicylic acid.", None]}), RAW_PRODUCT, "products")
    options = ScoredTable(path="own", find_in_text=True, without_ingredients="leave_out")
    found = score_products(scorer, products, options, LABELLER)
    assert found["product_id"].to_pylist() == ["a", "b"]
    assert found["note"].to_pylist() == [None, "ingredients found in its text"]


def test_concerns_are_asked_for_in_other_words(folder: Path, tmp_path: Path) -> None:
    scorer = BtBertScorer(BtBertConfig(model=str(folder), device="cpu"))
    products = conform(pa.table({"product_id": ["a"], "title": ["gel"], "ingredients": ["aqua, zinc"]}), RAW_PRODUCT,
                       "products")
    options, words = ScoredTable(path="own"), [Concern(name="acne", query="re"), Concern(name="redness", query="re")]
    found, plain = (score_products(scorer, products, options, LABELLER, asked) for asked in (words, None))
    assert found["acne"] == plain["redness"]
    assert found["acne"] != plain["acne"]
    config = ScoreConcernsConfig.model_validate({"products": {"path": "none.csv"}, "output": tmp_path / "out",
                                                 "model": {"model": str(folder)}, "queries": {"cellulite": "dimples"}})
    with pytest.raises(ValueError, match="unknown concern 'cellulite'; the model knows acne, redness"):
        score_concerns(config)


def test_a_shop_of_all_kinds_is_asked_for_the_known_ones(folder: Path) -> None:
    scorer = BtBertScorer(BtBertConfig(model=str(folder), device="cpu"))
    products = conform(pa.table({
        "product_id": ["a", "b", "c"], "title": ["face serum", "gummies", "mud"], "ingredients": ["ascorbic acid"] * 3,
        "categories": [None, None, ["Beauty", "Clay Masks"]]}), RAW_PRODUCT, "products")
    found = score_products(scorer, products, ScoredTable(path="own", kinds_only=True), LABELLER)
    assert found["product_id"].to_pylist() == ["a", "c"]


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_table_is_scored_piece_by_piece_and_resumed(folder: Path, tmp_path: Path, local_ray: object) -> None:
    for part in range(2):
        pa_csv.write_csv(pa.table({"sku": [f"p{part}{number}" for number in range(7)], "name": ["gel"] * 7,
                                   "inci": ["aqua, zinc"] * 7}), tmp_path / f"products-{part}.csv")
    with (tmp_path / "products-1.csv").open("a") as stream:
        stream.write("p99,too,many,columns\np17,bare,\n")
    config = load_config(ScoreConcernsConfig, DEMO, [
        f"products.path={tmp_path}/products-*.csv",
        "products.columns={product_id: sku, title: name, ingredients: inci}", f"output={tmp_path}/scores",
        f"model.model={folder}", "model.device=cpu", "workers=2"])
    artifact = score_concerns(config)
    artifact.verify()
    rows = pa.concat_tables(artifact.tables("scores/"))
    assert sorted(rows["product_id"].to_pylist()) == sorted([*(f"p{part}{number}" for part in range(2)
                                                               for number in range(7)), "p17"])
    assert dict(zip(rows["product_id"].to_pylist(), rows["note"].to_pylist(), strict=True))["p17"] == "no ingredients"
    assert artifact.manifest.facts["concerns"] == ["acne", "redness"]
    assert artifact.manifest.facts["quarantined"] == 1
    quarantine = artifact.table("quarantine.parquet").to_pylist()
    assert "products-1.csv:9" in quarantine[0]["source"]
    written = pa_csv.read_csv(artifact.file("bt_bert_outputs.csv"))
    assert written.num_rows == 15
    np.testing.assert_allclose(written["acne"].to_numpy(), rows["acne"].to_numpy(), rtol=1e-5)
    assert score_concerns(config).manifest.version == artifact.manifest.version
    assert pq.read_schema(artifact.file("scores/part-00000.parquet")).names == ["product_id", "acne", "redness",
                                                                                "addresses", "note"]
