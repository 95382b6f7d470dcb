"""(query, positive text) pairs to train a retriever on: TRAINING_PAIR rows of one bucket of a prepared shop.

A review is a query whose answer is its product. The product's text is made from reviews, so the
query's own review is left out of it: else the model learns to find copied words, which a later query
never has. `copied_share` measures what is still copied; train and later queries must look alike.
Catalogues without reviews give pairs from the products themselves (`product_pairs`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from recsys_ray.config import Config
from recsys_ray.data.buckets import first_per_group
from recsys_ray.data.keywords import content_words, keyword_query, review_keywords, top_keywords
from recsys_ray.data.preprocess import clean_query
from recsys_ray.data.product_text import TEXT_FIELDS, ProductTextConfig, product_text
from recsys_ray.ids import row_ids
from recsys_ray.schema import TRAINING_PAIR

Ints = npt.NDArray[np.int64]
PRODUCT_FIELDS = [*TEXT_FIELDS, "group_id"]
_PUNCTUATION = "\"'.,;:!?()[]|&*-"
SLICE_PRODUCTS = 4096   # held as Python objects at once
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class PairError(ValueError):
    """Pairs that cannot be made; the message names the file or the key and the mend."""


class ProductQueries(Config):
    """Queries made from the products themselves; a positive lacks the field its query was taken from."""

    title: bool = False                             # the title -> the text without title
    features: int = Field(default=0, ge=0)          # so many bullet points -> the text without that bullet
    description: bool = False                       # the first sentence of the description -> the text without it
    title_words: int = Field(default=0, ge=0)       # so many short queries of some words of the title
    keep_title: bool = False    # in the positives of title_words; with it they copy every word, real queries about 60 %

    @property
    def any(self) -> bool:
        """Whether there are such queries at all."""
        return bool(self.title or self.features or self.description or self.title_words)


class PairsConfig(Config):
    """Which pairs are made of a prepared shop."""

    query_type: Literal["keywords", "review_text", "both"] = "both"
    max_keywords: int = Field(default=20, ge=1)     # of a keyword query
    form: Literal["pair", "triplet"] = "pair"       # triplet: with random negatives; mined ones come from their own job
    negatives: int = Field(default=1, ge=1)         # of a triplet
    # leave_one_out: the text as if the query's review had never been written; as_of_time: from earlier reviews
    # only; full: as indexed, the own review inside (a leak, kept for comparison with recipes that have it)
    positive_text: Literal["leave_one_out", "as_of_time", "full"] = "leave_one_out"
    max_reviews_per_product: int = Field(default=20, ge=1)  # that become queries: one product may hold a tenth of all
    max_train_reviews: int | None = Field(default=None, ge=1)   # that become queries, about; None: all
    max_valid_reviews: int = Field(default=5000, ge=0)      # the same of valid, and of the audit of later queries
    min_query_words: int = Field(default=1, ge=1)   # different words that say something; shorter queries are left out
    product_queries: ProductQueries = ProductQueries()
    max_copied_gap: float = Field(default=0.1, ge=0, le=1)  # between train and later queries before the audit warns
    seed: int = 7

    @property
    def review_types(self) -> tuple[str, ...]:
        """The kinds of query that one review gives."""
        return ("keywords", "review_text") if self.query_type == "both" else (self.query_type,)


class Catalogue:
    """The products of one bucket, by row id."""

    def __init__(self, products: pa.Table, texts: pa.Table, train_end_ms: int | None) -> None:
        self.row_ids: Ints = products["row_id"].to_numpy()
        self.groups: Ints = products["group_id"].to_numpy()
        self.texts: list[str] = texts["text"].to_pylist()
        self.known = known_before(products, train_end_ms)
        self._products = products.select(PRODUCT_FIELDS)
        if not np.array_equal(self.row_ids, texts["row_id"].to_numpy()):
            raise PairError("products and their texts are not the same rows; prepare the data again")

    def places(self, row_ids: Ints) -> Ints:
        """The positions of products; `PairError` when one is not in this bucket."""
        places = np.searchsorted(self.row_ids, row_ids)
        known = places < len(self.row_ids)
        known[known] = self.row_ids[places[known]] == row_ids[known]
        if not known.all():
            raise PairError(f"row id {row_ids[~known][0]} is of no product of this bucket; prepare the data again")
        return places.astype(np.int64)

    def products(self, places: Ints) -> list[dict[str, Any]]:
        """The fields that the texts at these positions are made of."""
        rows: list[dict[str, Any]] = self._products.take(pa.array(places)).to_pylist()
        return rows


def known_before(products: pa.Table, train_end_ms: int | None) -> npt.NDArray[np.bool_]:
    """Which products were known before the cut: reviewed or released by then; all of them without a cut."""
    if train_end_ms is None:
        return np.ones(products.num_rows, dtype=np.bool_)
    cold = products["cold"].fill_null(True).to_numpy(zero_copy_only=False).astype(np.bool_)
    released = products["released_ms"].fill_null(train_end_ms + 1).to_numpy() <= train_end_ms
    known: npt.NDArray[np.bool_] = ~cold | released
    return known


@dataclass(frozen=True)
class Said:
    """What one review says, and its stored keywords (None: the offline extractor's serve)."""

    title: str | None
    text: str | None
    keywords: list[str] | None = None

    @cached_property
    def fed_keywords(self) -> list[str]:
        """The keywords by which the review feeds its product's text."""
        return review_keywords(self.text) if self.keywords is None else self.keywords


@dataclass(frozen=True)
class ReviewIndex:
    """The reviews of one bucket without their texts: ids, products and times, in file order."""

    review_ids: list[str]
    row_ids: Ints
    times: Ints


@dataclass(frozen=True)
class Choice:
    """Which reviews become queries, and for each of them the reviews that feed its positive's text."""

    queries: Ints               # positions in the ReviewIndex, by product and draw
    feeders: list[Ints]         # parallel; empty where the prepared text serves
    indexed: dict[int, Ints]    # the reviews that fed the prepared text of each product, by row id

    def needed(self) -> Ints:
        """Positions whose texts have to be read, ascending."""
        return np.unique(np.concatenate([self.queries, *self.feeders, *self.indexed.values()])).astype(np.int64)


def draws(ids: Iterable[str], seed: int) -> Ints:
    """A seeded number for each id: the order in which rows are sampled, whatever files they lie in."""
    return row_ids(f"{seed}:{one}" for one in ids)


def choose_queries(reviews: ReviewIndex, config: PairsConfig, limit: int | None) -> Ints:
    """Positions of the reviews that become queries: capped per product, at most `limit`, sampled by hash."""
    draw = draws(reviews.review_ids, config.seed)
    chosen = first_per_group(reviews.row_ids, draw, config.max_reviews_per_product)
    if limit is not None and len(chosen) > limit:
        kept = np.sort(np.argsort(draw[chosen], kind="stable")[:limit])
        chosen = chosen[kept]
    return chosen


def choose_train(reviews: ReviewIndex, config: PairsConfig, per_text: int, limit: int | None) -> Choice:
    """The query reviews of train with the reviews, at most `per_text`, that feed each positive."""
    queries = choose_queries(reviews, config, limit)
    if config.positive_text == "full":
        return Choice(queries, [np.zeros(0, np.int64)] * len(queries), {})
    order = row_ids(reviews.review_ids)     # the order in which preparation picks the reviews of a text
    by_product = np.lexsort((order, reviews.row_ids))
    sorted_rows = reviews.row_ids[by_product]
    feeders, indexed = [], {}
    for query, row in zip(queries, reviews.row_ids[queries].tolist(), strict=True):
        start, end = np.searchsorted(sorted_rows, [row, row + 1])
        mine = by_product[start:end].astype(np.int64)
        indexed[row] = mine[:per_text]
        if config.positive_text == "as_of_time":
            mine = mine[reviews.times[mine] < reviews.times[query]]
        else:
            mine = mine[: per_text + 1]     # one more than feed the indexed text: it takes the left-out one's place
            mine = mine[mine != query]
        feeders.append(mine[:per_text])
    return Choice(queries, feeders, indexed)


def review_queries(said: Said, config: PairsConfig) -> list[tuple[str, str]]:
    """(query type, query) of one review, as an evaluation would ask it; too short ones are left out."""
    whole = clean_query(str(said.text if said.text and said.text.strip() else said.title or ""))
    words = review_keywords(whole) if said.keywords is None else said.keywords
    found = []
    for kind in config.review_types:
        query = whole if kind == "review_text" else keyword_query(words, config.max_keywords)
        if len(content_words(query)) >= config.min_query_words:
            found.append((kind, query))
    return found


def text_from(product: Mapping[str, Any], feeders: Iterable[Said], rule: ProductTextConfig) -> str:
    """The text of a product as these reviews alone would feed it."""
    return product_text(product, top_keywords([one.fed_keywords for one in feeders], rule.max_keywords), rule)


def pair_row(pair_id: str, query: str, kind: str, product: Mapping[str, Any], text: str, split: str) -> dict[str, Any]:
    """One TRAINING_PAIR row without negatives."""
    return {"pair_id": pair_id, "query": query, "query_type": kind, "row_id": product["row_id"],
            "product_id": product["product_id"], "group_id": product["group_id"], "text": text,
            "negative_row_ids": [], "negative_texts": [], "negative_group_ids": [], "split": split}


def product_pairs(catalogue: Catalogue, rule: ProductTextConfig, config: PairsConfig) -> list[dict[str, Any]]:
    """TRAINING_PAIR rows of the products' own fields: title, bullets, description, words of the title.

    Only of products known before the cut.
    """
    rows = []
    places = np.flatnonzero(catalogue.known).astype(np.int64)
    for start in range(0, len(places), SLICE_PRODUCTS):
        some = places[start:start + SLICE_PRODUCTS]
        for place, product in zip(some.tolist(), catalogue.products(some), strict=True):
            for name, kind, query, positive in _own_queries(product, catalogue.texts[place], rule, config):
                query = clean_query(query)
                if positive.strip() and len(content_words(query)) >= config.min_query_words:
                    rows.append(pair_row(f"{product['product_id']}/{name}", query, kind, product, positive, "train"))
    return rows


def _own_queries(product: Mapping[str, Any], text: str, rule: ProductTextConfig, config: PairsConfig
                 ) -> Iterable[tuple[str, str, str, str]]:
    wanted, features = config.product_queries, list(product["features"] or ())
    title, description = product["title"] or "", product["description"] or ""

    def rest(**without: Any) -> str:
        return product_text({**product, **without}, (), rule)

    if wanted.title and title:
        yield "title", "title", title, rest(title=None)
    for number, feature in enumerate(features[: wanted.features]):
        yield f"feature-{number}", "feature", feature, rest(features=features[:number] + features[number + 1:])
    if wanted.description and description:
        first = _SENTENCE_END.split(description, maxsplit=1)[0]
        yield "description", "description", first, rest(description=None, summary=None)
    for number in range(wanted.title_words):
        if query := title_words(title, f"{config.seed}:{product['product_id']}:{number}"):
            yield f"title_words-{number}", "title_words", query, text if wanted.keep_title else rest(title=None)


def title_words(title: str, seed: str) -> str:
    """Two to four words of a title in their order, drawn by `seed`: as short and plain as what shoppers type."""
    words = [word for word in (one.strip(_PUNCTUATION).lower() for one in title.split()) if content_words(word)]
    if len(words) < 2:
        return ""
    random = np.random.default_rng(int(row_ids([seed])[0]))
    size = min(len(words), int(random.integers(2, 5)))
    return " ".join(words[place] for place in np.sort(random.choice(len(words), size, replace=False)))


def add_random_negatives(rows: Sequence[dict[str, Any]], catalogue: Catalogue, count: int, seed: int) -> None:
    """Fill each row's negatives with known products of its own bucket, which is a random part of the catalogue.

    Never a product of the positive's group, nor one that the same query is paired with.
    """
    known = np.flatnonzero(catalogue.known)
    paired: dict[str, set[int]] = {}
    for row in rows:
        paired.setdefault(row["query"], set()).add(row["group_id"])
    for row in rows:
        random = np.random.default_rng(int(draws([row["pair_id"]], seed)[0]))
        order = known[random.permutation(len(known))[: count + 16]] if len(known) < 4096 else np.unique(
            random.choice(known, count + 16))
        wrong = paired[row["query"]]
        places = [place for place in order.tolist() if int(catalogue.groups[place]) not in wrong][:count]
        row["negative_row_ids"] = [int(catalogue.row_ids[place]) for place in places]
        row["negative_texts"] = [catalogue.texts[place] for place in places]
        row["negative_group_ids"] = [int(catalogue.groups[place]) for place in places]


def pair_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """TRAINING_PAIR rows sorted by product and pair id."""
    ordered = sorted(rows, key=lambda row: (row["row_id"], row["pair_id"]))
    return pa.Table.from_pylist(ordered, schema=TRAINING_PAIR)


def copied_share(query: str, text: str) -> float | None:
    """The share of a query's different informative words that stand in the text; None without such a word."""
    words = content_words(query)
    if not words:
        return None
    return len(words & content_words(text)) / len(words)
