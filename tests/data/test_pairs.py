"""Which reviews become queries, what their positives are made of, and what a query may share with its positive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys_ray.data.keywords import review_keywords, top_keywords
from recsys_ray.data.pairs import (
    PRODUCT_FIELDS,
    Catalogue,
    PairError,
    PairsConfig,
    ReviewIndex,
    Said,
    add_random_negatives,
    choose_queries,
    choose_train,
    copied_share,
    known_before,
    pair_row,
    pair_table,
    product_pairs,
    review_queries,
    text_from,
    title_words,
)
from recsys_ray.data.product_text import ProductTextConfig, product_text
from recsys_ray.ids import row_id, row_ids
from recsys_ray.schema import PRODUCT, TRAINING_PAIR, conform

RULE = ProductTextConfig()


def products(*names: str, **change: Any) -> pa.Table:
    rows = [{"row_id": row_id(name), "product_id": name, "title": f"Title {name}", "group_id": row_id(name),
             "cold": False, **{key: values[number] for key, values in change.items()}}
            for number, name in enumerate(names)]
    return conform(pa.Table.from_pylist(rows, schema=PRODUCT), PRODUCT, "products").sort_by("row_id")


def catalogue(table: pa.Table, train_end_ms: int | None = None) -> Catalogue:
    texts = [product_text(one, (), RULE) for one in table.to_pylist()]
    return Catalogue(table, pa.table({"row_id": table["row_id"], "text": texts}), train_end_ms)


def reviews(*of: str, times: list[int] | None = None) -> ReviewIndex:
    return ReviewIndex([f"r{number}" for number in range(len(of))], row_ids(of),
                       np.array(times if times is not None else range(len(of)), dtype=np.int64))


# --- which reviews --------------------------------------------------------------------------------
def test_one_product_with_most_reviews_gives_no_more_queries_than_the_cap() -> None:
    index = reviews(*["big"] * 500, *["small"] * 3)
    chosen = choose_queries(index, PairsConfig(max_reviews_per_product=7), None)
    rows, counts = np.unique(index.row_ids[chosen], return_counts=True)
    assert dict(zip(rows.tolist(), counts.tolist(), strict=True)) == {row_id("big"): 7, row_id("small"): 3}


def test_a_sample_does_not_depend_on_the_order_of_the_files() -> None:
    index = reviews(*["a", "b", "c"] * 30)
    order = np.random.default_rng(0).permutation(90)
    shuffled = ReviewIndex([index.review_ids[i] for i in order], index.row_ids[order], index.times[order])
    config = PairsConfig(max_reviews_per_product=9)
    one = {index.review_ids[i] for i in choose_queries(index, config, 10)}
    other = {shuffled.review_ids[i] for i in choose_queries(shuffled, config, 10)}
    assert one == other
    assert len(one) == 10
    assert one != {index.review_ids[i] for i in choose_queries(index, config.replace(seed=8), 10)}


def test_the_left_out_review_is_replaced_by_the_next_that_would_have_fed_the_text() -> None:
    index = reviews(*["a"] * 6)
    first = sorted(range(6), key=lambda number: row_id(f"r{number}"))
    choice = choose_train(index, PairsConfig(), per_text=3, limit=None)
    fed = {int(query): feeders.tolist() for query, feeders in zip(choice.queries, choice.feeders, strict=True)}
    assert choice.indexed[row_id("a")].tolist() == first[:3]
    for query in range(6):
        assert fed[query] == [number for number in first if number != query][:3]


def test_as_of_time_takes_earlier_reviews_alone_and_full_takes_the_indexed_text() -> None:
    index = reviews(*["a"] * 5, times=[30, 10, 20, 20, 40])
    choice = choose_train(index, PairsConfig(positive_text="as_of_time"), per_text=50, limit=None)
    fed = {int(query): set(feeders.tolist()) for query, feeders in zip(choice.queries, choice.feeders, strict=True)}
    assert fed == {0: {1, 2, 3}, 1: set(), 2: {1}, 3: {1}, 4: {0, 1, 2, 3}}
    full = choose_train(index, PairsConfig(positive_text="full"), per_text=50, limit=None)
    assert all(len(one) == 0 for one in full.feeders)
    assert full.needed().tolist() == sorted(full.queries.tolist())


# --- queries and texts ----------------------------------------------------------------------------
def ask(text: str | None, title: str | None = None, **options: Any) -> list[tuple[str, str]]:
    return review_queries(Said(title, text), PairsConfig(**options))


def test_the_queries_of_a_review() -> None:
    said = "Great for dry skin.\nMy <b>daughter</b> uses it at night"
    assert ask(said, query_type="both") == [
        ("keywords", "dry skin daughter night"), ("review_text", "Great for dry skin. My daughter uses it at night")]
    assert ask(said, query_type="keywords", max_keywords=1) == [("keywords", "dry skin")]
    assert ask("  ", "Velvet couch", query_type="review_text") == [("review_text", "Velvet couch")]
    assert ask("love it!", query_type="both") == []
    stored = Said(None, said, ["teenage daughter", "winter"])
    assert review_queries(stored, PairsConfig(query_type="keywords")) == [("keywords", "teenage daughter winter")]
    assert stored.fed_keywords == ["teenage daughter", "winter"]
    assert Said("title", None).fed_keywords == []
    assert ask("love the lipstick", query_type="both", min_query_words=2) == []


def test_a_text_without_one_review_equals_that_of_a_shop_in_which_it_was_never_written() -> None:
    said = {"r0": "dry skin and winter", "r1": "winter nights", "r2": "greasy feeling in winter"}
    product = products("a").to_pylist()[0]
    others = [(one, text) for one, text in said.items() if one != "r0"]
    expected = product_text(product, top_keywords([review_keywords(text) for _, text in others], 20), RULE)
    assert text_from(product, [Said(None, text) for _, text in others], RULE) == expected
    assert "dry skin" not in expected
    assert "winter" in expected


def test_copied_share_counts_words_that_say_something() -> None:
    assert copied_share("great for dry winter skin", "[Title] Balm [Review Keywords] dry skin") == pytest.approx(2 / 3)
    assert copied_share("love it so much", "love it so much") is None


# --- pairs of the products themselves -------------------------------------------------------------
def test_a_query_taken_from_a_field_has_a_positive_without_that_field() -> None:
    table = products("a", title=["Oak table"], features=[["seats six people", "solid wood"]],
                     description=["A table for large families. It lasts."], brand=["Nordhem"])
    options = PairsConfig.model_validate({"product_queries": {"title": True, "features": 1, "description": True,
                                                              "title_words": 1}})
    rows = {row["query_type"]: row for row in product_pairs(catalogue(table), RULE, options)}
    assert {kind: row["query"] for kind, row in rows.items()} == {
        "title": "Oak table", "feature": "seats six people", "description": "A table for large families.",
        "title_words": "oak table"}
    assert "Oak table" not in rows["title"]["text"]
    assert "solid wood" in rows["feature"]["text"]
    assert "seats six" not in rows["feature"]["text"]
    assert "families" not in rows["description"]["text"]
    assert rows["title_words"]["text"] == rows["title"]["text"]
    assert {row["split"] for row in rows.values()} == {"train"}
    kept = PairsConfig.model_validate({"product_queries": {"title_words": 1, "keep_title": True}})
    assert [row["text"] for row in product_pairs(catalogue(table), RULE, kept)] == catalogue(table).texts


def test_products_nobody_knew_before_the_cut_give_no_pair() -> None:
    table = products("old", "new", "announced", cold=[False, True, True], released_ms=[None, None, 5])
    assert dict(zip(table["product_id"].to_pylist(), known_before(table, 10).tolist(), strict=True)) == {
        "old": True, "new": False, "announced": True}
    assert known_before(table, None).all()
    options = PairsConfig.model_validate({"product_queries": {"title_words": 1, "keep_title": True}})
    found = product_pairs(catalogue(table, 10), RULE, options)
    assert {row["product_id"] for row in found} == {"old", "announced"}


def test_words_of_a_title_are_some_of_its_words_in_their_order() -> None:
    title = "velvet three seater couch with washable cover and storage"
    found = {title_words(title, str(seed)) for seed in range(40)}
    places = {word: place for place, word in enumerate(title.split())}
    assert len(found) > 10
    for query in found:
        order = [places[word] for word in query.split()]
        assert order == sorted(order)
        assert 2 <= len(order) <= 4
        assert "with" not in query.split()
    assert title_words("Couch", "1") == ""
    assert title_words("(Low) Carb,", "1") == "low carb"


# --- negatives, tables ----------------------------------------------------------------------------
def test_random_negatives_are_other_groups_that_were_known_and_that_nobody_asked_the_same_of() -> None:
    names = [f"p{number}" for number in range(12)]
    group = [row_id("p0") if name in ("p0", "p1") else row_id(name) for name in names]
    table = products(*names, group_id=group, cold=[name == "p2" for name in names])
    shop = catalogue(table, 10)
    by_name = {row["product_id"]: row for row in table.to_pylist()}
    rows = [pair_row(f"{name}/{query}", query, "keywords", by_name[name], "text", "train")
            for name, query in (("p0", "one thing"), ("p3", "one thing"), ("p4", "another"))]
    add_random_negatives(rows, shop, 20, seed=1)
    names_of = {row["row_id"]: row["product_id"] for row in table.to_pylist()}
    found = [{names_of[one] for one in row["negative_row_ids"]} for row in rows]
    assert found[0] == found[1] == {f"p{number}" for number in range(4, 12)}
    assert found[2] == {"p0", "p1", "p3", *(f"p{number}" for number in range(5, 12))}
    texts = dict(zip(shop.row_ids.tolist(), shop.texts, strict=True))
    assert all(row["negative_texts"] == [texts[one] for one in row["negative_row_ids"]] for row in rows)
    before = [list(row["negative_row_ids"]) for row in rows]
    add_random_negatives(rows, shop, 20, seed=1)
    assert [row["negative_row_ids"] for row in rows] == before


def test_a_table_is_sorted_and_fits_its_schema() -> None:
    by_name = {row["product_id"]: row for row in products("a", "b").to_pylist()}
    rows = [pair_row(f"{name}/{number}", "q", "title", by_name[name], "t", "train")
            for name in "ba" for number in (1, 0)]
    table = pair_table(rows)
    assert table.schema == TRAINING_PAIR
    keys = list(zip(table["row_id"].to_pylist(), table["pair_id"].to_pylist(), strict=True))
    assert keys == sorted(keys)
    assert pair_table([]).num_rows == 0


def test_tables_that_do_not_belong_together_are_refused() -> None:
    table = products("a", "b")
    with pytest.raises(PairError, match="not the same rows"):
        Catalogue(table, pa.table({"row_id": [1, 2], "text": ["x", "y"]}), None)
    with pytest.raises(PairError, match="row id 5 "):
        catalogue(table).places(np.array([5]))
    assert set(PRODUCT_FIELDS) <= set(PRODUCT.names)
