"""The text template: its sections, its limits, and the text without one review."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from recsys_ray.data.keywords import top_keywords
from recsys_ray.data.pairs import Said, text_from
from recsys_ray.data.product_text import (
    ProductTextConfig,
    lexical_text,
    product_text,
    product_texts,
    summary,
    text_hash,
)
from recsys_ray.schema import PRODUCT, PRODUCT_TEXT

SEED = ProductTextConfig()
FIELDS = ProductTextConfig(template="fields-v1")
MUG: dict[str, Any] = {
    "row_id": 7, "product_id": "B01", "title": "Clay Mug", "description": "Holds tea. Keeps warm.", "brand": "Acme",
    "features": ["blue", "handmade"], "color": "blue", "category": "Home", "ingredients": None,
    "attributes": [("Material", "clay")],
}
REVIEWS = [("r1", ["morning tea", "big handle"]), ("r2", ["morning tea"]), ("r3", ["gift"])]


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([{"group_id": row["row_id"], **row} for row in rows], schema=PRODUCT)


def test_seed_template() -> None:
    assert product_text(MUG, ["morning tea", "gift"], SEED) == (
        "[Title] Clay Mug [Review Keywords] morning tea, gift [Description Summary] Holds tea. Keeps warm. "
        "[Features] blue, handmade")


def test_empty_sections_leave_no_label() -> None:
    bare = {**MUG, "description": None, "features": []}
    assert product_text(bare, [], SEED) == "[Title] Clay Mug"
    assert product_text({**bare, "ingredients": "Water, Salt"}, [], SEED) == "[Title] Clay Mug [Features] Water, Salt"


def test_fields_template_joins_the_catalogue_and_on_request_the_sheet() -> None:
    plain = "Clay Mug. Acme. blue. blue. handmade. Holds tea. Keeps warm."
    assert product_text(MUG, ["ignored"], FIELDS) == plain
    assert product_text(MUG, [], FIELDS.replace(attributes=True)) == f"{plain}. Material: clay"


def test_lexical_text_repeats_fields_by_weight() -> None:
    config = SEED.replace(lexical_weights={"title": 2, "brand": 0, "keywords": 1, "color": 1})
    assert lexical_text(MUG, ["morning tea"], config) == "Clay Mug Clay Mug morning tea blue"


def test_summary_takes_whole_sentences_that_fit() -> None:
    text = "One two. Three four. Five."
    assert summary(text, 100) == text
    assert summary(text, 20) == "One two. Three four."      # exactly 20 characters
    assert summary(text, 19) == "One two."
    assert summary("Wonderful things", 12) == "Wonderful"   # no sentence fits: whole words
    assert summary(None, 10) == ""


@given(st.text(alphabet="ab. !", max_size=80), st.integers(0, 40))
def test_a_summary_keeps_its_limit(text: str, limit: int) -> None:
    assert len(summary(text, limit)) <= limit


def test_rows_name_the_reviews_that_fed_them() -> None:
    limited = SEED.replace(max_keywords=2)
    rows = product_texts(table(MUG, {**MUG, "row_id": 8, "product_id": "B02"}), {7: REVIEWS}, limited).to_pylist()
    assert rows[0]["keywords"] == ["morning tea", "big handle"]     # two reviews, then the longer of the others
    assert rows[0]["keyword_review_ids"] == ["r1", "r2"]
    assert rows[0]["text_hash"] == text_hash(rows[0]["text"], "seed-v1")
    assert rows[1]["keywords"] == rows[1]["keyword_review_ids"] == []
    assert product_texts(table(), {}, SEED).schema == PRODUCT_TEXT


PHRASES = st.lists(st.sampled_from(["tea", "big handle", "gift", "blue", "desk"]), max_size=4)


@given(st.lists(PHRASES, min_size=1, max_size=6), st.integers(0, 5), st.data())
def test_leaving_a_review_out_equals_never_having_had_it(
    phrases: list[list[str]], limit: int, data: st.DataObject,
) -> None:
    config = SEED.replace(max_keywords=limit)
    reviews = [(f"r{number}", words) for number, words in enumerate(phrases)]
    out = data.draw(st.sampled_from(reviews))
    others = [one for one in reviews if one != out]
    rebuilt = product_texts(table(MUG), {7: others}, config)["text"][0].as_py()
    others = [Said(None, None, words) for own, words in reviews if own != out[0]]
    assert text_from(MUG, others, config) == rebuilt


@given(st.lists(PHRASES, min_size=1, max_size=6), st.integers(1, 5))
def test_reviews_not_named_as_feeding_a_text_have_no_part_in_it(phrases: list[list[str]], limit: int) -> None:
    reviews = [(f"r{number}", words) for number, words in enumerate(phrases)]
    row = product_texts(table(MUG), {7: reviews}, SEED.replace(max_keywords=limit)).to_pylist()[0]
    fed = [words for review, words in reviews if review in row["keyword_review_ids"]]
    assert top_keywords(fed, limit) == row["keywords"]


def test_the_hash_knows_the_template() -> None:
    assert text_hash("a", "seed-v1") != text_hash("a", "fields-v1") != text_hash("b", "fields-v1")
