"""Histories, genres and contexts; no context gives its candidate away, whatever the history."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ray.data.interactions import (
    ContextConfig,
    Items,
    catalogue_table,
    context_text,
    genre_rows,
    item_text,
    known_before,
    liked,
    named_items,
    names_item,
    plain_items,
    title_key,
    top_genres,
    user_histories,
)
from recsys_ray.schema import INTERACTION, ITEM, RAW_PRODUCT, TAG


def items_of(count: int = 8, **changes: Any) -> Items:
    rows = [{"product_id": f"p{place}", "title": f"Title {place}", "author": f"Author {place % 3}",
             "genres": ["fantasy"] if place % 2 else ["war", "history"], "text": f"text {place}",
             "popularity": place, "eligible": True, **{name: values[place] for name, values in changes.items()}}
            for place in range(count)]
    return Items(pa.Table.from_pylist(rows, schema=ITEM))


def interactions(*rows: tuple[str, str, float | None, int | None]) -> pa.Table:
    return pa.Table.from_pylist([{"user_id": user, "product_id": product, "kind": "rating" if rating else "to_read",
                                  "rating": rating, "timestamp_ms": time} for user, product, rating, time in rows],
                                schema=INTERACTION)


def test_histories_hold_each_item_once_the_rated_and_latest_row() -> None:
    items = items_of()
    table = interactions(("u", "p1", 3, 10), ("u", "p1", 5, 20), ("u", "p2", None, 99), ("u", "p2", 4, 1),
                         ("u", "zzz", 5, 1), ("a", "p0", 1, None))
    first, second = user_histories(table, items.places)
    assert (first.user_id, first.timed) == ("a", False)
    assert second.places.tolist() == [1, 2]
    assert second.ratings.tolist() == [5, 4]
    assert second.times.tolist() == [20, 1]
    assert liked(second, 4.5).tolist() == [0]


def test_contexts_are_the_best_rated_with_their_genres() -> None:
    items = items_of()
    history = next(user_histories(interactions(("u", "p1", 4, None), ("u", "p3", 5, None), ("u", "p4", 4.5, None)),
                                  items.places))
    text = context_text(history, np.arange(3), items, ContextConfig(titles=2, genres=2), 7)
    assert text == "Likes: Title 3 by Author 0; Title 4 by Author 1. Genres: fantasy, history."
    assert context_text(history, np.arange(1), items, ContextConfig(genres=0), 7) == "Likes: Title 1 by Author 1."


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 5), st.integers(0, 5)), min_size=2, max_size=8,
                unique_by=lambda one: one[0]), st.booleans(), st.data())
@settings(max_examples=200)
def test_no_context_names_its_candidates_or_the_future(rows: list[tuple[int, int, int]], timed: bool, data: Any
                                                       ) -> None:
    titles = ["Emma", "Emma (Classics, #3)", "It", "It's It", "Emma; Persuasion", "It by It", "A. B.", "emma!"]
    items = items_of(title=titles)
    history = next(user_histories(interactions(
        *[("u", f"p{place}", rating, time if timed else None) for place, rating, time in rows]), items.places))
    everything = np.arange(len(history.places))
    chosen = np.array(sorted(data.draw(st.sets(st.sampled_from(everything.tolist()), min_size=1, max_size=3))))
    known = known_before(history, everything, chosen, items)
    assert not set(known) & set(chosen)
    keys = {title_key(titles[place]) for place in history.places[chosen]}
    assert not keys & {title_key(titles[place]) for place in history.places[known]}
    if timed:
        assert (history.times[known] < history.times[chosen].min()).all()
    text = context_text(history, known, items, ContextConfig(titles=10), 7)
    assert not [place for place in history.places[chosen].tolist()
                if names_item(text, titles[place], items.authors[place])]


def test_the_check_of_the_text_sees_an_item_that_is_named() -> None:
    context = "Likes: Title 1 by Author 1; Emma by Jane Austen. Genres: war."
    assert names_item(context, "Emma", "Jane Austen")
    assert names_item(context, "Title 1", "Author 1")
    assert not names_item(context, "Title", "Author 1")
    assert not names_item(context, "mma", "Jane Austen")
    assert not names_item(context, "Emma", "Jane")


def test_shelves_become_genres_by_count() -> None:
    tags = pa.Table.from_pylist([{"product_id": "1", "tag": tag, "count": count} for tag, count in (
        ("to-read", 900), ("sci-fi", 5), ("science-fiction", 5), ("fantasy", 7), ("war", None))], schema=TAG)
    assert top_genres(genre_rows(tags), 5) == {"1": ["science fiction", "fantasy", "war"]}
    assert top_genres(genre_rows(tags), 1) == {"1": ["science fiction"]}


def test_the_catalogue_has_each_item_once_and_its_own_text_where_there_is_one() -> None:
    raw = pa.Table.from_pylist([
        {"product_id": "2", "title": "Dune ", "brand": "Frank\nHerbert", "categories": ["Books", "Sand"]},
        {"product_id": "1", "title": "Emma", "brand": None, "description": "A\tnovel."},
        {"product_id": "1", "title": "Emma", "brand": None}, {"product_id": "3", "title": " "}], schema=RAW_PRODUCT)
    plain = named_items(plain_items(raw))
    assert (plain_items(raw).num_rows, plain.num_rows) == (4, 3)     # the nameless one can be counted
    rows = catalogue_table(plain, None, None, ["2"], 5).to_pylist()
    assert [(row["product_id"], row["eligible"]) for row in rows] == [("1", False), ("2", True)]
    assert rows[1]["text"] == "Dune by Frank Herbert. Genres: Books, Sand."
    assert rows[0]["text"].startswith("Emma.")
    texts = pa.table({"product_id": ["2"], "text": ["their own  words"]})
    rows = catalogue_table(plain, {"1": ["classics"]}, texts, None, 5).to_pylist()
    assert rows[1]["text"] == "their own words"
    assert (rows[0]["genres"], rows[1]["genres"]) == (["classics"], [])
    assert item_text("T", None, []) == "T."


@pytest.mark.parametrize(("one", "other", "same"), [
    ("Catching Fire (The Hunger Games, #2)", "catching fire", True), ("Emma", "Emma!", True),
    ("The Stand (Uncut)", "The Stand", False), ("1984", "1985", False)])
def test_editions_share_a_title_key(one: str, other: str, same: bool) -> None:
    assert (title_key(one) == title_key(other)) is same
