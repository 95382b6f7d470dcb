"""Who liked what: histories of users, genres from shelves, and contexts that do not give the answer away.

A context is what the reranker knows of a user: a few titles with their authors and the favoured genres.
Where interactions have times, nothing later than the candidate is in it. In either form no book is in the
context of a candidate with its title, another edition included.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from recsys_ray.config import Config
from recsys_ray.ids import row_ids
from recsys_ray.schema import ITEM, TEXTS, conform

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
NO_TIME = -1
_SERIES = re.compile(r"\s*\([^()]*#[^()]*\)\s*$")       # "Catching Fire (The Hunger Games, #2)"
_NOT_WORD = re.compile(r"[\W_]+")

# Shelves are whatever readers call them; these name a kind of book, and several names mean one kind.
GENRES: dict[str, str] = {
    one: genre for genre, names in {
        "fantasy": "fantasy", "young adult": "young-adult ya ya-fiction young-adult-fiction teen ya-lit ya-books",
        "classics": "classics classic classic-literature", "romance": "romance", "mystery": "mystery mysteries",
        "non-fiction": "non-fiction nonfiction", "historical fiction": "historical-fiction historical",
        "science fiction": "science-fiction sci-fi scifi sf", "paranormal": "paranormal supernatural",
        "contemporary": "contemporary contemporary-fiction realistic-fiction", "horror": "horror",
        "urban fantasy": "urban-fantasy", "graphic novels": "graphic-novels graphic-novel comics comics-graphic-novels",
        "children's": "childrens children children-s children-s-books childrens-books kids kids-books juvenile",
        "thriller": "thriller thrillers suspense mystery-thriller mystery-suspense", "vampires": "vampires vampire",
        "adventure": "adventure action-adventure action", "history": "history", "humor": "humor humour funny comedy",
        "dystopia": "dystopian dystopia", "chick lit": "chick-lit", "literary fiction": "literary-fiction literary",
        "paranormal romance": "paranormal-romance pnr", "crime": "crime crime-fiction detective true-crime",
        "memoir": "memoir memoirs autobiography", "biography": "biography biographies biography-memoir",
        "manga": "manga", "philosophy": "philosophy", "science": "science", "new adult": "new-adult",
        "poetry": "poetry", "picture books": "picture-books picture-book", "plays": "plays drama theatre",
        "contemporary romance": "contemporary-romance", "short stories": "short-stories",
        "middle grade": "middle-grade middle-school", "psychology": "psychology", "mythology": "mythology",
        "business": "business economics", "war": "war", "epic fantasy": "epic-fantasy high-fantasy",
        "religion": "religion christian christianity spirituality christian-fiction", "erotica": "erotica",
        "historical romance": "historical-romance", "self-help": "self-help", "politics": "politics",
        "post-apocalyptic": "post-apocalyptic", "werewolves": "werewolves shifters", "travel": "travel",
        "steampunk": "steampunk", "time travel": "time-travel", "magical realism": "magical-realism",
        "lgbt": "lgbt lgbtq", "fairy tales": "fairy-tales", "zombies": "zombies", "food": "food cooking cookbooks",
        "gothic": "gothic", "art": "art", "essays": "essays", "music": "music", "sports": "sports",
        "coming of age": "coming-of-age", "western": "western westerns", "spy": "espionage spy",
    }.items() for one in names.split()}
PLAIN_ITEMS = pa.schema([("product_id", pa.string()), ("title", pa.string()), ("author", pa.string()),
                         ("description", pa.string()), ("categories", TEXTS)])
GENRE_ROWS = pa.schema([("product_id", pa.string()), ("genre", pa.string()), ("count", pa.int64())])


# --- genres ---------------------------------------------------------------------------------------
def genre_rows(tags: pa.Table) -> pa.Table:
    """(product_id, genre, count) of the TAG rows that name a genre; a shelf without a count counts 1."""
    found = [(product, GENRES[tag], 1 if count is None else count)
             for product, tag, count in zip(tags["product_id"].to_pylist(), tags["tag"].to_pylist(),
                                            tags["count"].to_pylist(), strict=True) if tag in GENRES]
    return pa.Table.from_pylist([dict(zip(GENRE_ROWS.names, row, strict=True)) for row in found], schema=GENRE_ROWS)


def top_genres(rows: pa.Table, most: int) -> dict[str, list[str]]:
    """The `most` genres of each product with the highest counts, equal ones by name."""
    counts: dict[str, Counter[str]] = {}
    for product, genre, count in zip(*(rows[name].to_pylist() for name in GENRE_ROWS.names), strict=True):
        counts.setdefault(product, Counter())[genre] += count
    return {product: favoured(found, most) for product, found in counts.items()}


# --- the catalogue --------------------------------------------------------------------------------
def item_text(title: str, author: str | None, genres: Sequence[str], description: str | None = None) -> str:
    """The text of a candidate: "<title> by <author>. Genres: <genres>. <description>"."""
    parts = [f"{title} by {author}." if author else f"{title}."]
    if genres:
        parts.append(f"Genres: {', '.join(genres)}.")
    return " ".join([*parts, description] if description else parts)


def title_key(title: str) -> str:
    """What editions of one book share: the title without series, case, punctuation."""
    return _NOT_WORD.sub(" ", _SERIES.sub("", title).casefold()).strip()


def plain_items(raw: pa.Table) -> pa.Table:
    """(product_id, title, author, description, categories) of RAW_PRODUCT rows; a nameless one's title is empty."""
    rows = [{"product_id": product, "title": _line(title), "author": _line(brand) or None,
             "description": _line(description) or None, "categories": categories or []}
            for product, title, brand, description, categories in zip(
                *(raw[name].to_pylist() for name in ("product_id", "title", "brand", "description", "categories")),
                strict=True)]
    return pa.Table.from_pylist(rows, schema=PLAIN_ITEMS)


def named_items(items: pa.Table) -> pa.Table:
    """Those of `plain_items` that have a title: of a nameless one a reader could be told nothing."""
    return items.filter(pc.not_equal(items["title"], ""))


def catalogue_table(products: pa.Table, genres: Mapping[str, list[str]] | None, texts: pa.Table | None,
                    eligible: Sequence[str] | None, most_genres: int) -> pa.Table:
    """ITEM rows by product id, each product once, of `named_items`; popularity is 0.

    Without shelves the categories stand in for genres. `texts` (PRODUCT_WORDS) replace those made of the fields.
    """
    own = {} if texts is None else dict(zip(texts["product_id"].to_pylist(), texts["text"].to_pylist(), strict=True))
    allowed = None if eligible is None else set(eligible)
    rows: dict[str, dict[str, object]] = {}
    for row in products.sort_by([("product_id", "ascending"), ("title", "ascending")]).to_pylist():
        product = row["product_id"]
        kinds = (genres.get(product, []) if genres is not None else row["categories"])[:most_genres]
        text = _line(own.get(product)) or item_text(row["title"], row["author"], kinds, row["description"])
        rows.setdefault(product, {"product_id": product, "title": row["title"], "author": row["author"],
                                  "genres": kinds, "text": text, "popularity": 0,
                                  "eligible": allowed is None or product in allowed})
    return pa.Table.from_pylist(list(rows.values()), schema=ITEM)


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


class Items:
    """A catalogue by place, 0 to N - 1."""

    def __init__(self, table: pa.Table) -> None:
        """`table` are ITEM rows."""
        self.table = conform(table, ITEM, "items")
        self.product_ids: list[str] = self.table["product_id"].to_pylist()
        self.titles: list[str] = self.table["title"].to_pylist()
        self.authors: list[str | None] = self.table["author"].to_pylist()
        self.genres: list[list[str]] = self.table["genres"].to_pylist()
        self.texts = self.table["text"]
        self.popularity: Ints = self.table["popularity"].to_numpy()
        self.eligible: Bools = self.table["eligible"].to_numpy()
        self.places = {product: place for place, product in enumerate(self.product_ids)}

    @cached_property
    def title_groups(self) -> Ints:
        """A number for each item, equal for those with one title key, (N,)."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(title_key(one), len(numbers)) for one in self.titles], dtype=np.int64)


# --- histories ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class History:
    """One user's items, each once: place in the catalogue, rating (NaN: none), time in ms (NO_TIME: none)."""

    user_id: str
    places: Ints
    ratings: Floats
    times: Ints
    kinds: tuple[str, ...]

    @property
    def dated(self) -> Bools:
        """Which of them have a time, (N,)."""
        found: Bools = self.times != NO_TIME
        return found

    @property
    def timed(self) -> bool:
        """Whether there are times: what has none then may have come at any moment, and is neither asked nor told."""
        return bool(self.dated.any())


def user_histories(interactions: pa.Table, places: Mapping[str, int]) -> Iterator[History]:
    """The history of each user of INTERACTION rows, users by id, items by place.

    Of an item a user met more than once the rated and then the latest row counts; items outside the
    catalogue are left out.
    """
    rows: dict[str, dict[int, tuple[bool, int, float, str]]] = {}
    columns = [interactions[name].to_pylist() for name in ("user_id", "product_id", "kind", "rating", "timestamp_ms")]
    for user, product, kind, rating, time in zip(*columns, strict=True):
        place = places.get(product)
        if place is None:
            continue
        found = (rating is not None, NO_TIME if time is None else time, np.nan if rating is None else rating, kind)
        known = rows.setdefault(user, {})
        if place not in known or found[:2] > known[place][:2] or (found[:2] == known[place][:2]
                                                                  and found[2] > known[place][2]):
            known[place] = found
    for user in sorted(rows):
        places_in = sorted(rows[user])
        values = [rows[user][place] for place in places_in]
        yield History(user, np.array(places_in, dtype=np.int64), np.array([one[2] for one in values], dtype=np.float64),
                      np.array([one[1] for one in values], dtype=np.int64), tuple(one[3] for one in values))


def liked(history: History, min_rating: float) -> Ints:
    """Where in the history the user's rating is at least `min_rating`."""
    with np.errstate(invalid="ignore"):
        return np.flatnonzero(history.ratings >= min_rating)


def draw_order(user_id: str, names: Sequence[str], seed: int) -> Ints:
    """A seeded number for each of a user's items: the order in which they are drawn, whatever else changes."""
    return row_ids(f"{seed}:{user_id}:{name}" for name in names)


# --- contexts -------------------------------------------------------------------------------------
class ContextConfig(Config):
    """What of a user a query says.

    fixed: from items that are candidates of the user in no row. leave_one_out: from all liked items but the
    candidate itself, so the other positives stand in it, and the negatives of a positive share its context.
    """

    form: Literal["fixed", "leave_one_out"] = "fixed"
    titles: int = Field(default=5, ge=1)
    genres: int = Field(default=5, ge=0)


def context_text(history: History, chosen: Ints, items: Items, config: ContextConfig, seed: int) -> str:
    """"Likes: <title> by <author>; ... Genres: ...": the best rated of the `chosen` rows of a history.

    Equal ratings: the latest first, then by draw. Genres are counted over all of `chosen`.
    """
    places = history.places[chosen]
    draws = draw_order(history.user_id, [items.product_ids[place] for place in places], seed)
    ratings = np.nan_to_num(history.ratings[chosen], nan=-np.inf)
    order = places[np.lexsort((draws, -history.times[chosen], -ratings))]
    counts = Counter(genre for place in sorted(places.tolist()) for genre in items.genres[place])
    return likes_text([book(items, place) for place in order[:config.titles].tolist()], favoured(counts, config.genres))


def favoured(counts: Mapping[str, int], most: int) -> list[str]:
    """The `most` genres that were counted most, equal ones by name."""
    return sorted(counts, key=lambda one: (-counts[one], one))[:most]


def likes_text(named: Sequence[str], genres: Sequence[str] = ()) -> str:
    """The text of a context: items as `book` names them, and genres."""
    return f"Likes: {'; '.join(named)}." + (f" Genres: {', '.join(genres)}." if genres else "")


def book(items: Items, place: int) -> str:
    """How a context names an item."""
    author = items.authors[place]
    return f"{items.titles[place]} by {author}" if author else items.titles[place]


def names_item(context: str, title: str, author: str | None) -> bool:
    """Whether a context lists the item itself: the check of its text, whatever made it."""
    listed = context.removeprefix("Likes: ")
    said = f"{title} by {author}" if author else title
    at = listed.find(said)
    while at >= 0:
        behind = listed[at + len(said):]
        if (at == 0 or listed[:at].endswith("; ")) and behind.startswith((";", ".")):
            return True
        at = listed.find(said, at + 1)
    return False


def known_before(history: History, rows: Ints, candidates: Ints, items: Items) -> Ints:
    """The `rows` of a history that a context for its rows `candidates` may use.

    Not the candidates, nothing with one of their titles, and, where there are times, nothing from the
    time of the first candidate on.
    """
    groups = items.title_groups
    usable = ~np.isin(rows, candidates) & ~np.isin(groups[history.places[rows]], groups[history.places[candidates]])
    if history.timed and len(candidates):
        usable &= history.dated[rows] & (history.times[rows] < history.times[candidates].min())
    return rows[usable]
