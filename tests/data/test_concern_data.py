"""The stage: products and labels in, splits without leaks, what is set aside, and errors that name the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest

from recsys_ray.artifacts import Artifact
from recsys_ray.config import ConfigError, load_config
from recsys_ray.data.concern_data import LabelConcernsConfig, LabelError, label_concerns
from recsys_ray.data.concern_rulebook import RuleError
from recsys_ray.data.concern_splits import ConcernSplitConfig, formula_groups, stratified_split
from recsys_ray.data.sources import SourceError
from recsys_ray.schema import CONCERN_LABEL, CONCERN_PRODUCT

ACTIVES = ["Retinol", "Salicylic Acid", "Caffeine", "Niacinamide", "Ubiquinone", "Sodium Hyaluronate", "Allantoin"]
KINDS = ["Serums", "Eye Creams", "Shampoos", "Night Creams", "Face Oils"]


def shop(count: int = 120) -> list[dict[str, Any]]:
    return [{"sku": f"s{number}", "name": f"Line {number} {KINDS[number % 5]}",
             "kind": f"Beauty > {KINDS[number % 5]}",
             "inci": ", ".join(["Aqua", ACTIVES[number % 7], *(f"Plant{number}{one}" for one in "abcdefgh"), "Parfum"])}
            for number in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


COLUMNS = {"product_id": "sku", "title": "name", "category": "kind", "ingredients": "inci"}


def run(tmp_path: Path, rows: list[dict[str, Any]] | None, **options: Any) -> Artifact:
    path = tmp_path / "shop.jsonl"
    if rows is not None:
        write(path, rows)
    products = {"path": str(path), "columns": COLUMNS, **options.pop("products", {})}
    return label_concerns(LabelConcernsConfig.model_validate(
        {"products": products, "output": str(tmp_path / "out"), **options}))


def test_a_table_with_its_own_columns_is_labelled_split_and_audited(tmp_path: Path) -> None:
    made = run(tmp_path, shop())
    products, labels = made.table("products.parquet"), made.table("labels.parquet")
    assert products.schema.equals(CONCERN_PRODUCT)
    assert labels.schema.equals(CONCERN_LABEL)
    assert (products.num_rows, labels.num_rows) == (120, 120 * 7)
    split = dict(zip(products["product_id"].to_pylist(), products["split"].to_pylist(), strict=True))
    assert all(split[row["product_id"]] == row["split"] for row in labels.to_pylist())
    assert {row["label"] is None for row in labels.to_pylist() if not row["rules"]} == {True}
    assert {row["label"] is not None or row["conflict"] for row in labels.to_pylist() if row["rules"]} == {True}
    facts = made.manifest.facts
    assert facts["concerns"]["wrinkle"]["query"] == "wrinkles"
    assert facts["mode"] == "positive_unlabelled"
    assert 0 < facts["prevalence"]["acne"] < 1
    flat = pacsv.read_csv(made.file("labels.csv"))
    assert flat.num_rows == labels.num_rows
    assert "ingredient/retinoids" in set(flat["rules"].to_pylist())
    page = made.file("audit.html").read_text("utf-8")
    assert "ingredient/retinoids" in page
    assert "<script" not in page
    again = run(tmp_path, None)
    assert again.manifest.version == made.manifest.version      # nothing changed, nothing made


def test_near_duplicates_and_one_formula_stay_together(tmp_path: Path) -> None:
    rows = shop(60)
    rows += [{**row, "sku": f"copy-{row['sku']}", "name": f"Another name for {row['name']} of another house entirely"}
             for row in rows]
    made = run(tmp_path, rows).table("products.parquet")
    groups: dict[int, set[str]] = {}
    for row in made.to_pylist():
        groups.setdefault(row["group_id"], set()).add(row["split"])
    assert len(groups) == 60
    assert all(len(splits) == 1 for splits in groups.values())
    assert {split for splits in groups.values() for split in splits} == {"train", "valid", "test"}


def test_formula_groups_join_what_shares_a_group_or_a_list() -> None:
    rows = np.array([5, 3, 9, 7, 1])
    found = formula_groups(rows, np.array([5, 5, 9, 7, 1]), [list("abcd"), list("bcde"), list("bcde"), [], []])
    assert found.tolist() == [3, 3, 3, 7, 1]
    short = formula_groups(rows, rows, [["retinol"]] * 5)
    assert short.tolist() == rows.tolist()


def test_each_concern_is_spread_over_the_splits() -> None:
    rng = np.random.default_rng(0)
    groups = np.arange(400) // 2
    marks = np.repeat(rng.random((200, 5)) < np.array([0.02, 0.05, 0.1, 0.3, 0.5]), 2, axis=0)
    split = np.array(stratified_split(groups, marks, ConcernSplitConfig()))
    for group in range(200):
        assert len(set(split[groups == group])) == 1
    for name, share in zip(("train", "valid", "test"), (0.7, 0.15, 0.15), strict=True):
        assert abs((split == name).mean() - share) < 0.03
        found = marks[split == name].sum(axis=0) / marks.sum(axis=0)
        assert np.abs(found - share).max() < 0.15               # of 8 positives one group is a quarter
    assert marks[split == "test", 0].sum() > 0


def test_what_cannot_be_used_is_set_aside_with_its_reason(tmp_path: Path) -> None:
    rows = [*shop(40),
            {"sku": "no-list", "name": "Serum", "kind": "Beauty > Serums", "inci": None},
            {"sku": "endless", "name": "Serum", "kind": "Serums",
             "inci": ", ".join(map("Oil {}".format, range(3000)))},
            {"sku": "korean", "name": "Serum", "kind": "Serums",
             "inci": "정제수, 글리세린, 부틸렌글라이콜, 판테놀, 향료"},
            {"sku": "sofa", "name": "Sofa", "kind": "Home > Sofas", "inci": "Wood, Aqua"},
            {"sku": "s1", "name": "Twice", "kind": "Serums", "inci": "Aqua"}, {"name": "No id", "kind": "Serums"}]
    made = run(tmp_path, rows)
    aside = {row["key"]: row["reason"] for row in made.table("quarantine.parquet").to_pylist()}
    assert aside["no-list"] == "no ingredients"
    assert aside["endless"].startswith("not an ingredient list: too long for a list: 3,000 ingredients")
    assert "another language" in aside["korean"]
    assert aside["sofa"] == "no kind of product in its category: Home > Sofas"
    assert aside["s1"] == "a second row with this id"
    assert "product_id is missing" in aside[None]
    assert made.table("products.parquet").num_rows == 40


def test_ingredients_may_be_found_in_the_text_or_do_without(tmp_path: Path) -> None:
    listless = {"name": "Serum", "kind": "Serums", "inci": None}
    rows = [*shop(30), {**listless, "sku": "text", "words": "With retinol and caffeine."},
            {**listless, "sku": "none", "words": "Lovely."}]
    options = {"columns": {**COLUMNS, "text": "words"}, "find_in_text": True, "without_ingredients": "keep"}
    table = run(tmp_path, rows, products=options).table("products.parquet")
    made = {row["product_id"]: row for row in table.to_pylist()}
    assert made["text"]["ingredients"] == "retinol, caffeine"
    assert made["none"]["ingredients"] is None


def test_withheld_rules_and_chosen_concerns(tmp_path: Path) -> None:
    made = run(tmp_path, shop(), concerns=["wrinkle", "acne"], withheld_rules=["ingredient/retinoids"], mode="seed")
    labels = made.table("labels.parquet").to_pylist()
    assert {row["concern"] for row in labels} == {"wrinkle", "acne"}
    held = [row for row in labels if row["held_out"]]
    assert held
    assert {(row["concern"], row["label"], *row["rules"]) for row in held} == {
        ("wrinkle", 1, "ingredient/retinoids")}
    assert "test" in {row["split"] for row in held}


def test_a_concern_without_positives_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**row, "kind": "Shampoos"} for row in shop(30)]
    made = run(tmp_path, rows, concerns=["acne", "moisture"])
    assert made.manifest.facts["without_positives"] == ["acne", "moisture"]
    assert made.manifest.facts["prevalence"] == {"acne": 0.0, "moisture": None}
    assert "acne has no positive product" in caplog.text


# --- labels of one's own --------------------------------------------------------------------------
def own(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> Artifact:
    write(tmp_path / "labels.jsonl", rows)
    labels = {"path": str(tmp_path / "labels.jsonl"), "columns": {"product_id": "sku"}}
    return run(tmp_path, shop(), labels=labels, **options)


def test_labels_of_ones_own(tmp_path: Path) -> None:
    rows = [{"sku": f"s{number}", "concern": "acne", "label": number % 3 == 0} for number in range(90)]
    rows += [{"sku": "s1", "concern": "age", "label": "1"}, {"sku": "gone", "concern": "acne", "label": 0}]
    made = own(tmp_path, rows)
    labels = made.table("labels.parquet").to_pylist()
    assert {row["concern"] for row in labels} == {"acne", "age"}
    assert len(labels) == 180
    assert sum(row["label"] == 1 for row in labels if row["concern"] == "acne") == 30
    assert {tuple(row["rules"]) for row in labels if row["label"] is not None} == {("own label",)}
    aside = made.table("quarantine.parquet").to_pylist()
    assert [(row["table"], row["key"]) for row in aside] == [("labels", "gone")]


@pytest.mark.parametrize(("bad", "message"), [
    ({"sku": "s1", "concern": "acne", "label": 2}, r"labels\.jsonl:2: label '2'; it is 1"),
    ({"sku": "s1", "concern": "acne"}, r"labels\.jsonl:2: label is missing"),
    ({"sku": "s1", "concern": "cellulite", "label": 1}, r"labels\.jsonl:2: unknown concern 'cellulite'; known are"),
    ({"sku": "s0", "concern": "acne", "label": 0}, r"labels\.jsonl:2: 's0' has label 0 for acne, and 1 in .*:1"),
])
def test_a_bad_label_names_file_and_row(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(LabelError, match=message):
        own(tmp_path, [{"sku": "s0", "concern": "acne", "label": 1}, bad])


def test_labels_of_other_products_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="none of its 1 labels is of a product that can be used"):
        own(tmp_path, [{"sku": "x", "concern": "acne", "label": 1}])


def test_unknown_concerns_rules_and_products_are_errors(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match="unknown concern 'cellulite'"):
        run(tmp_path, shop(10), concerns=["cellulite"])
    with pytest.raises(RuleError, match="unknown rule"):
        run(tmp_path, shop(10), withheld_rules=["ingredient/none"])
    with pytest.raises(LabelError, match=r"no product is left to label: 2 set aside \(no ingredients\)"):
        run(tmp_path, [{**row, "inci": None} for row in shop(2)])
    truth = tmp_path / "truth"
    truth.mkdir()
    with pytest.raises(SourceError, match="truth"):
        run(truth, shop(10))


def test_products_come_from_one_place(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("output: x\nproducts: {}\n")
    with pytest.raises(ConfigError, match="give either prepared"):
        load_config(LabelConcernsConfig, tmp_path / "c.yaml")


def test_the_split_leaves_something_for_test() -> None:
    with pytest.raises(ValueError, match="leave nothing for test"):
        ConcernSplitConfig(train=0.9, valid=0.1)
    assert stratified_split(np.zeros(0, np.int64), np.zeros((0, 3), bool), ConcernSplitConfig()) == []
    assert pa.array(stratified_split(np.arange(3), np.zeros((3, 0), bool), ConcernSplitConfig())).null_count == 0
