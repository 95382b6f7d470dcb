"""Rule tables and the labels they make: what fires where, what is unlabelled, what contradicts, what is withheld."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from recsys_ray.data.concern_rulebook import RuleError, load_rules
from recsys_ray.data.concerns import LABELS, Labeller, label_products, targets
from recsys_ray.schema import CONCERN_LABEL

BOOK = load_rules()
SEVEN = ["redness", "eyebag", "acne", "oiliness", "wrinkle", "age", "moisture"]
FACE = "Beauty & Personal Care > Skin Care > Serums"


def verdicts(ingredients: str, category: str | None = FACE, title: str = "x") -> dict[str, Any]:
    return Labeller(BOOK).read({"ingredients": ingredients, "category": category, "title": title})


def label(concern: str, ingredients: str, category: str | None = FACE) -> int | None:
    found: int | None = verdicts(ingredients, category)[concern].label
    return found


def test_the_packaged_tables_are_whole() -> None:
    assert list(BOOK.concerns) == SEVEN
    for concern in SEVEN:
        assert [rule for rule in BOOK.rules.values() if concern in rule.speaks_for], concern
        assert [one for one in (*BOOK.rules.values(), *BOOK.kinds.values()) if concern in one.against], concern
        assert BOOK.concerns[concern].paraphrases
    assert all(BOOK.synonyms.find(name) == name for name in BOOK.active_names)
    assert "lines" in BOOK.concerns["wrinkle"].paraphrases


def test_the_rules_share_no_table_with_the_demo_shop() -> None:
    """Labels made of the generator's own table would be the truth they are measured by."""
    planted = yaml.safe_load((Path(__file__).parents[2] / "recsys_ray/data/demo_shop/tables/concerns.yaml").read_text())
    for concern in SEVEN:
        actives = {BOOK.synonyms.find(one) or one.lower() for one in planted["concerns"][concern]["actives"]}
        ours = {name for rule in BOOK.rules.values() if concern in rule.speaks_for for name in rule.ingredients}
        assert ours != actives
        assert len(ours) > 1.5 * len(actives)


@pytest.mark.parametrize(("category", "kinds"), [
    ("Beauty & Personal Care > Skin Care > Eye Creams", ("eye care",)),
    ("Beauty > Skin Care > Eye Serum", ("eye care",)),                      # not a serum for the face
    ("Body Washs", ("body wash",)), ("Skin Care > Face > Cleansers > Washes", ("cleanser",)),
    ("Hair Masks", ("hair care",)), ("Sun Care > Sunscreen SPF 50s", ("sunscreen",)),
    ("Home & Kitchen > Sofas", ()),
])
def test_the_kind_of_a_category(category: str, kinds: tuple[str, ...]) -> None:
    assert Labeller(BOOK).kinds(category, "a night cream") == kinds


def test_without_a_category_the_title_tells_the_kind() -> None:
    assert Labeller(BOOK).kinds(None, "Aurora Night Cream 50 ml") == ("night cream",)


def test_rules_speak_only_where_they_hold() -> None:
    salicylic = "Aqua, Salicylic Acid, Phenoxyethanol"
    assert label("acne", salicylic) == 1
    assert label("acne", salicylic, "Shampoos") == 0            # hair: not a product for the skin's acne
    assert label("acne", salicylic, "Eye Creams") == 0          # the category excludes it, so the acid does not speak
    assert label("acne", "Aqua, Salicylic Acid 0.2%") is None   # as a preservative
    assert label("acne", "Aqua. May contain: Salicylic Acid") is None
    assert label("oiliness", "Aqua, Kaolin, Phenoxyethanol") == 1
    assert label("oiliness", "Aqua, Phenoxyethanol, Kaolin") is None        # below 1 %
    assert label("oiliness", "Aqua, Phenoxyethanol, Kaolin 5%") == 1        # as it says itself
    assert label("wrinkle", "Aqua, Retinol", None) is None      # no category, no kind, no rule


def test_every_label_has_the_rules_that_made_it_and_contradictions_are_surfaced() -> None:
    found = verdicts("Aqua, Alcohol Denat., Centella Asiatica Extract, Phenoxyethanol")["redness"]
    assert found.conflict
    assert found.label is None
    assert set(found.rules) == {"ingredient/centella", "ingredient/drying alcohol"}
    assert verdicts("Aqua")["acne"].rules == ()


def products(*rows: tuple[str, str]) -> pa.Table:
    return pa.table({"product_id": [f"p{number}" for number in range(len(rows))], "title": ["t"] * len(rows),
                     "category": [category for category, _ in rows], "ingredients": [listed for _, listed in rows]})


def test_labels_of_withheld_rules_are_held_out() -> None:
    table = products((FACE, "Aqua, Bakuchiol"), (FACE, "Aqua, Bakuchiol, Retinol"), ("Eye Creams", "Aqua, Bakuchiol"))
    rows = [row for row in label_products(table, Labeller(BOOK), ["ingredient/bakuchiol"]).to_pylist()
            if row["concern"] == "wrinkle"]
    assert [(row["label"], row["held_out"]) for row in rows] == [(1, True), (1, False), (1, False)]
    with pytest.raises(RuleError, match="unknown rule 'ingredient/bakuchol'; did you mean 'ingredient/bakuchiol'"):
        label_products(table, Labeller(BOOK), ["ingredient/bakuchol"])


def test_targets_of_the_two_modes() -> None:
    rows = [(1, False, False, "train"), (None, False, False, "train"), (None, True, False, "train"),
            (0, False, False, "train"), (1, False, True, "train"), (1, False, True, "valid"), (1, False, True, "test")]
    table = pa.Table.from_pylist([
        {"product_id": "p", "concern": "acne", "label": label, "rules": [], "conflict": conflict, "held_out": held_out,
         "split": split} for label, conflict, held_out, split in rows], schema=CONCERN_LABEL)
    nan = np.nan
    np.testing.assert_array_equal(targets(table, "seed"), [1, 0, nan, 0, nan, nan, 1])
    np.testing.assert_array_equal(targets(table, "positive_unlabelled"), [1, nan, nan, 0, nan, nan, 1])


def test_no_products_give_no_labels() -> None:
    assert label_products(products(), Labeller(BOOK)).schema == LABELS


# --- tables of one's own --------------------------------------------------------------------------
def folder(tmp_path: Path, **files: Any) -> Path:
    for name, values in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


SOURCE = "a review that can be found"


def test_a_further_concern_is_a_folder_and_no_code(tmp_path: Path) -> None:
    own = folder(tmp_path, concerns={"concerns": {"dandruff": {"query": "dandruff", "paraphrases": ["flakes"]}}},
                 ingredients={"rules": {"zinc pyrithione": {"ingredients": ["zinc pyrithione"], "for": ["dandruff"],
                                                            "where": ["hair"], "source": SOURCE}}})
    book = load_rules(["packaged", own])
    assert list(book.concerns) == [*SEVEN, "dandruff"]
    row = {"ingredients": "Aqua, Zinc Pyrithione", "category": "Shampoos", "title": "t"}
    found = Labeller(book.select(["dandruff"])).read(row)
    assert {name: one.label for name, one in found.items()} == {"dandruff": 1}
    assert book.digest != BOOK.digest


def test_an_unknown_concern_names_the_known_ones() -> None:
    with pytest.raises(RuleError, match="unknown concern 'cellulite'; the rule tables know redness, eyebag, acne"):
        BOOK.select(["acne", "cellulite"])


def rule(**changes: Any) -> dict[str, Any]:
    one = {"ingredients": ["retinol"], "for": ["acne"], "where": ["face"], "source": SOURCE, **changes}
    return {"ingredients": {"rules": {"x": {key: value for key, value in one.items() if value is not None}}}}


@pytest.mark.parametrize(("files", "message"), [
    (rule(source=None), r"rules\.x\.source"),
    (rule(**{"for": ["acnee"]}), "ingredient/x: unknown concern 'acnee'"),
    (rule(where=["feet"]), "ingredient/x: unknown use 'feet'"),
    (rule(against=["acne"]), "for and against 'acne'"),
    (rule(**{"for": []}), "speaks neither for nor against"),
    ({"synonyms": {"groups": [{"source": SOURCE, "names": {"sorbitol": ["vitamin c"]}}]}},
     "'vitamin c' is a spelling of both 'ascorbic acid' and 'sorbitol'"),
    ({"ingredients": {"ruels": {}}}, "unknown key 'ruels'"),
    ({"rules": {}}, r"rules\.yaml: not a rule table"),
    ({}, "no rule table"),
])
def test_tables_that_cannot_be_used_are_named(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(RuleError, match=message):
        load_rules(["packaged", folder(tmp_path, **files)])


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match="no such folder of rules"):
        load_rules([tmp_path / "none"])
