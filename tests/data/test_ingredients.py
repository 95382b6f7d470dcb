"""Ingredient lists as they are written: what divides, what is one name, what is a known name."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ray.data.concern_rulebook import load_rules
from recsys_ray.data.ingredients import MANY, Synonyms, ingredients_in_text, list_flags, parse_ingredients

BOOK = load_rules()
KNOWN = sorted({BOOK.synonyms.find(name) or "" for name in BOOK.active_names})


def names(text: str) -> list[str]:
    return [one.name for one in parse_ingredients(text, BOOK.synonyms)]


@pytest.mark.parametrize(("text", "found"), [
    ("Ingredients: Water/Aqua/Eau, Glycerin", ["aqua", "glycerin"]),
    ("Aqua (Water), Parfum (Fragrance)", ["aqua", "parfum"]),
    ("Aqua, 1,2-Hexanediol, Glycerin,1,2-Hexanediol", ["aqua", "1,2-hexanediol", "glycerin"]),
    ("Caprylic/Capric Triglyceride, Acrylates/C10-30 Alkyl Acrylate Crosspolymer",
     ["caprylic/capric triglyceride", "acrylates/c10-30 alkyl acrylate crosspolymer"]),
    ("Dimethicone/Vinyl Dimethicone Crosspolymer", ["dimethicone/vinyl dimethicone crosspolymer"]),
    ("Butyrospermum Parkii (Shea) Butter*, Cera Alba/Beeswax/Cire d'abeille",
     ["butyrospermum parkii butter", "cera alba"]),
    ("Alcohol Denat., SULPHUR; Ceramide 3; Vitamin B3", ["alcohol denat.", "sulfur", "ceramide np", "niacinamide"]),
    ("• Aqua\n• Glycerin\n• Retinol", ["aqua", "glycerin", "retinol"]),
    ("Aqua, Butyrospermum\nParkii Butter, Retinol", ["aqua", "butyrospermum parkii butter", "retinol"]),
    ("1. Aqua 2. Glycerin 3. Retinol", ["aqua", "glycerin", "retinol"]),
    ("AQUA - GLYCERIN - Palmitoyl Tripeptide-1 - RETINOL", ["aqua", "glycerin", "palmitoyl tripeptide-1", "retinol"]),
    ("Water. Glycerin. Retinol.", ["aqua", "glycerin", "retinol"]),
    ("Parfum (Linalool, Limonene), Retinol", ["parfum", "linalool", "limonene", "retinol"]),
    ("Dimethicone (and) Dimethiconol", ["dimethicone", "dimethiconol"]),
    ("Hyaluronic Acid & Vitamin E", ["hyaluronic acid", "tocopherol"]),
    ("CI 77891, C.I. 77947, 77491", ["titanium dioxide", "zinc oxide", "iron oxides"]),
    ("A serum for all. Ingredients: Aqua, Retinol. Directions: apply, daily", ["aqua", "retinol"]),
    ("Aqua, Retinol. *organic farming", ["aqua", "retinol"]),
    ("Aqua&nbsp;&amp; Glycerin<br>Retinol", ["aqua", "glycerin", "retinol"]),
    ("Aqua, aqua, WATER, Eau", ["aqua"]),
    ("100% Pure Argan Oil", ["argania spinosa kernel oil"]),
    ("Glycerin (open, Panthenol", ["glycerin open", "panthenol"]),
    ("", []), (" ,;,, ( ) [ ]", []), ("2 %, 3 %", []),
])
def test_lists_are_read_as_written(text: str, found: list[str]) -> None:
    assert names(text) == found


@pytest.mark.parametrize(("text", "percent"), [
    ("Niacinamide 10%", 10.0), ("10% Niacinamide", 10.0), ("Niacinamide (2.5 % w/w)", 2.5),
    ("Niacinamide, 2,5%", 2.5), ("Vitamin B3 (Niacinamide) 4 %", 4.0), ("Niacinamide", None),
    ("Niacinamide 400%", None),
])
def test_percentages(text: str, percent: float | None) -> None:
    found = parse_ingredients(text, BOOK.synonyms)
    assert [(one.name, one.percent) for one in found] == [("niacinamide", percent)]


def test_active_and_inactive_ingredients_are_one_list() -> None:
    found = parse_ingredients("Drug facts. Active ingredients: Zinc Oxide 20% (sunscreen). Inactive ingredients: "
                              "Purified Water; Dimethicone", BOOK.synonyms)
    assert [(one.name, one.percent) for one in found] == [("zinc oxide", 20.0), ("aqua", None), ("dimethicone", None)]


@pytest.mark.parametrize("text", [
    "Aqua, [+/- CI 77891 (Titanium Dioxide), Mica], Retinol", "Aqua, Retinol, May Contain: CI 77891, Mica",
    "Aqua, Retinol, (May contain/Peut contenir +/-): CI 77891, Mica", "Aqua, Retinol. (+/-) Titanium Dioxide, Mica",
])
def test_what_a_product_may_contain_is_marked_and_comes_last(text: str) -> None:
    found = parse_ingredients(text, BOOK.synonyms)
    assert [(one.name, one.may_contain) for one in found] == [
        ("aqua", False), ("retinol", False), ("titanium dioxide", True), ("mica", True)]


def test_a_list_that_is_none_is_flagged_and_costs_little() -> None:
    started = time.process_time()
    endless = parse_ingredients(", ".join(f"Ingredient {number}" for number in range(3000)), BOOK.synonyms)
    assert time.process_time() - started < 2
    assert len(endless) == 3000
    assert list_flags(endless, BOOK.synonyms)[0] == f"too long for a list: 3,000 ingredients, more than {MANY}"
    assert list_flags([], BOOK.synonyms) == ["no ingredient was found"]
    korean = parse_ingredients("정제수, 글리세린, 부틸렌글라이콜, 나이아신아마이드, 판테놀", BOOK.synonyms)
    assert "another language" in list_flags(korean, BOOK.synonyms)[0]
    assert not list_flags(parse_ingredients("Wasser, Glycerin, Duft", BOOK.synonyms), BOOK.synonyms)


def test_hostile_brackets_and_markers_end_quickly() -> None:
    started = time.process_time()
    for text in ("(" * 50_000 + ")" * 50_000, "(a" * 50_000, "may contain " * 10_000, "a,1,2" * 30_000, "<" * 100_000):
        parse_ingredients(text, BOOK.synonyms)
    assert time.process_time() - started < 10


def test_ingredients_found_in_a_description() -> None:
    prose = "This serum has hyaluronic acid and 10% Benzoyl Peroxide, plus shea butter."
    assert ingredients_in_text(prose, BOOK.synonyms, BOOK.active_names) == (
        "hyaluronic acid, benzoyl peroxide, butyrospermum parkii butter")
    listed = ingredients_in_text("Soft. Ingredients: AQUA/WATER/EAU, GLYCERIN, CARBOMER", BOOK.synonyms, frozenset())
    assert listed is not None
    assert names(listed) == ["aqua", "glycerin", "carbomer"]
    free = "Sulfur-free. With cetyl alcohol and squalane, without mineral oil or retinol. No menthol. Caffeine!"
    assert ingredients_in_text(free, BOOK.synonyms, BOOK.active_names) == "squalane, caffeine"
    assert ingredients_in_text("Ingredients: made from natural resin mainly", BOOK.synonyms, frozenset()) is None


def test_one_spelling_has_one_name() -> None:
    with pytest.raises(ValueError, match="'Vitamin C' is a spelling of both 'ascorbic acid' and 'citric acid'"):
        Synonyms({"ascorbic acid": ["vitamin c"], "citric acid": ["Vitamin C"]})


@settings(max_examples=60)
@given(st.text(max_size=400))
def test_any_text_gives_unique_lower_case_names(text: str) -> None:
    found = names(text)
    assert len(found) == len(set(found))
    assert all(name and name == name.strip() for name in found)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(KNOWN), unique=True, max_size=30), st.sampled_from([", ", "; ", "\n", " • ", " | "]))
def test_known_names_keep_their_order_whatever_divides_them(chosen: list[str], separator: str) -> None:
    assert names(separator.join(chosen)) == chosen
    assert names(separator.join(name.upper() for name in chosen)) == chosen


@settings(max_examples=60)
@given(st.lists(st.sampled_from(KNOWN), unique=True, min_size=1, max_size=10), st.text(max_size=60))
def test_reading_what_was_read_changes_nothing(chosen: list[str], noise: str) -> None:
    once = [name for name in names(", ".join(chosen)) if BOOK.synonyms.knows(name)]
    assert names(", ".join(once)) == once
    assert names(noise) == names(noise)
