"""The semi-synthetic stock: real product texts, and planted reviewers who like words of their titles.

A product's latents are the words of its title: each word belongs to one of seven slots and has one of
twelve values there, by its hash, so a reviewer who likes a value likes the same words everywhere.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from recsys_ray.data.demo_shop.catalogue import Catalogue, draw_fame
from recsys_ray.data.demo_shop.config import Clarity, DemoShopConfig, DemoShopError, RealTexts
from recsys_ray.data.demo_shop.people import Purchases, tastes
from recsys_ray.data.demo_shop.products import Standing
from recsys_ray.data.demo_shop.queries import NEAR_MISSES, GradedQuery
from recsys_ray.data.demo_shop.reviews import Told, generic_review, mood_of, register
from recsys_ray.data.demo_shop.streams import Dice, Integers, dice, permuted, uniforms, user_ids
from recsys_ray.data.demo_shop.survey import Survey, time_ms
from recsys_ray.data.demo_shop.truth import TruthWriter
from recsys_ray.data.demo_shop.vocabulary import MAX_FACETS, phrases

log = logging.getLogger(__name__)

VALUES, KINDS = 12, 40
COMMON, RARE = 0.10, 3      # a topic is in at most a tenth of the titles, and in three at least
COLUMNS = {
    "esci": {"title": "title", "description": "description", "features": "bullet_points", "store": "brand",
             "categories": "category_path", "price": "price"},
    "icecat": {"title": "title", "description": "short_description", "store": "supplier", "price_cents": "price_cents"},
    "goodbooks": {"title": "title", "store": "authors"},
}
_WORD = re.compile(r"[a-z][a-z0-9'-]{2,}")
_STOP = frozenset(("the", "and", "for", "with", "from", "that", "this", "you", "your", "are", "not", "its", "our",
                   "all", "can", "has", "new", "per", "set", "inch", "pack", "over", "i'm"))


@dataclass(frozen=True)
class RealProduct:
    """One real product's texts, and the words of its title that some others have but not most (if any; else all)."""

    title: str
    description: str | None
    features: list[str]
    store: str | None
    categories: list[str]
    price_cents: int | None
    topics: tuple[str, ...]


class RealStock:
    """Real texts, planted people."""

    def __init__(self, config: DemoShopConfig) -> None:
        if config.texts is None:
            raise DemoShopError("texts: name the family and path of the real product texts")
        self.config = config
        self.products = read_real_products(config.texts, config.products, config.seed)
        self.catalogue = _latents(config, self.products)
        self._titles: dict[str, list[int]] = {}
        for number, product in enumerate(self.products):
            for topic in product.topics:
                self._titles.setdefault(topic, []).append(number)

    def listings(self, numbers: Integers, standing: Standing) -> list[dict[str, Any]]:
        """The metadata records of some products: the real texts under ids of this shop."""
        return [_listing(self.products[number], name, number, standing)
                for number, name in zip(numbers.tolist(), self.catalogue.ids(numbers), strict=True)]

    def told(self, bought: Purchases) -> list[Told]:
        """The words of some reviews, some of them words of the product's title."""
        rolls = dice(self.config.seed, "words", bought.row)
        return [generic_review(rating, roll) if generic or not self.products[about].topics
                else _told(self.products[about], self.products, rating, self.config.clarity, roll)
                for about, rating, generic, roll in zip(bought.about.tolist(), bought.rating.tolist(),
                                                        bought.generic.tolist(), rolls, strict=True)]

    def queries(self) -> Iterator[GradedQuery]:
        """Two or three words of a title; grade 3 has all of them, 2 all but one of three, 1 one of two."""
        rows = np.arange(self.config.queries)
        targets = (uniforms(self.config.seed, "query targets", rows, 1)[:, 0] * len(self.products)).astype(np.int64)
        for row, target, roll in zip(rows.tolist(), targets.tolist(), dice(self.config.seed, "queries", rows, 16),
                                     strict=True):
            topics = self.products[target].topics
            if len(topics) >= 2:
                first = roll.below(len(topics))
                asked = [topics[(first + step) % len(topics)] for step in range(min(len(topics), 2 + roll.below(2)))]
                yield self._graded(row, asked)

    def _graded(self, row: int, asked: Sequence[str]) -> GradedQuery:
        shared = np.bincount(np.concatenate([self._titles[topic] for topic in asked]), minlength=len(self.products))
        missing = len(asked) - shared
        grades = np.where(missing == 0, 3, np.where((missing == 1) & (len(asked) > 2), 2,
                                                    np.where((missing == 1) & (shared > 0), 1, 0)))
        others = np.flatnonzero(grades == 0)
        near = others[permuted(self.config.seed, f"misses/{row}", np.arange(min(NEAR_MISSES, len(others))),
                               max(1, len(others)))] if len(others) else others
        listed = np.concatenate([np.flatnonzero(grades > 0), near])
        family = self.config.texts.family if self.config.texts else ""
        return GradedQuery(" ".join(asked), (family,), listed, grades[listed].astype(np.int8))

    def tell_products(self, numbers: Integers, survey: Survey, imaged: int, truth: TruthWriter) -> None:
        """Write the planted part of some products: their topics, their fame."""
        truth.add("products", [self._truth_row(number, name, survey) for number, name
                               in zip(numbers.tolist(), self.catalogue.ids(numbers), strict=True)])

    def _truth_row(self, number: int, name: str, survey: Survey) -> dict[str, Any]:
        product = self.products[number]
        seen = float(survey.first_seen[number])
        return {"product_id": name, "department": self.config.texts.family if self.config.texts else None,
                "kind": str(self.catalogue.kind[number]), "visible": False,
                "attributes": [(f"topic {at}", topic) for at, topic in enumerate(product.topics)],
                "brand": product.store, "price_cents": product.price_cents,
                "quality": float(self.catalogue.fame.quality[number]), "duplicate_group": name,
                "cold": bool(survey.cold[number]), "num_reviews": int(survey.standing.reviews[number]),
                "first_review_ms": int(time_ms(np.array([seen]))[0]) if np.isfinite(seen) else None,
                "claims": [], "helps": []}

    def tell_users(self, users: Integers, truth: TruthWriter) -> None:
        """Write which value of each slot some reviewers like, and how much the slot matters."""
        who = tastes(self.catalogue, users)
        truth.add("users", [{
            "user_id": name, "department": self.config.texts.family if self.config.texts else None,
            "kind": str(int(who.kind[at] * KINDS)), "price_level": float(who.price[at]), "concerns": [],
            "likes": [(f"slot {slot}", str(int(who.values[at, slot] * VALUES))) for slot in range(MAX_FACETS)],
            "weights": [(f"slot {slot}", float(who.weights[at, slot])) for slot in range(MAX_FACETS)]}
            for at, name in enumerate(user_ids(self.config.seed, users))])

    def write_images(self, folder: Path) -> int:
        """0: these texts come without pictures."""
        return 0


def read_real_products(texts: RealTexts, count: int, seed: int) -> list[RealProduct]:
    """At most `count` products of a real data set, drawn at random; `DemoShopError` when it cannot be read."""
    path = texts.file
    columns = COLUMNS[texts.family]
    if not path.is_file():
        raise DemoShopError(f"texts.path: {path} is missing; name the folder with {texts.family}'s {path.name}")
    table = pq.read_table(path, columns=list(columns.values()))
    chosen = np.sort(permuted(seed, "real products", np.arange(min(count, table.num_rows)), table.num_rows))
    if count > table.num_rows:
        log.warning("%s has %d products, not %d: taking all of them", path, table.num_rows, count)
    rows = [{ours: row[theirs] for ours, theirs in columns.items()} for row in table.take(chosen).to_pylist()]
    words = [list(dict.fromkeys(word for word in _WORD.findall((row["title"] or "").lower()) if word not in _STOP))
             for row in rows]
    titles = Counter(word for one in words for word in one)
    known = {word for word, many in titles.items() if RARE <= many <= COMMON * len(rows)}
    return [_product(row, tuple([word for word in one if word in known] or one)[:10], texts.family)
            for row, one in zip(rows, words, strict=True)]


def _product(row: Mapping[str, Any], topics: tuple[str, ...], family: str) -> RealProduct:
    price = row.get("price")
    cents = row.get("price_cents") if price is None else _cents(price)
    categories = list(row.get("categories") or []) or ["Books" if family == "goodbooks" else "Electronics"]
    return RealProduct(row["title"] or "", row.get("description"), (row.get("features") or "").splitlines(),
                       row.get("store"), categories, cents, topics)


def _cents(price: Any) -> int | None:
    digits = re.search(r"\d+(?:\.\d+)?", str(price).replace(",", ""))
    return round(float(digits.group()) * 100) if digits else None


def _latents(config: DemoShopConfig, products: Sequence[RealProduct]) -> Catalogue:
    count = len(products)
    facets = np.full((count, MAX_FACETS), -1, np.int8)
    kind = np.array([_hash(product.categories[-1]) % KINDS for product in products], np.int16)
    for number, product in enumerate(products):
        for topic in product.topics:
            value = _hash(topic)
            facets[number, value % MAX_FACETS] = value // MAX_FACETS % VALUES
    prices = np.array([product.price_cents or 0 for product in products], np.int64)
    level: npt.NDArray[np.float64] = (np.argsort(np.argsort(prices, kind="stable")) + 0.5) / max(1, count)
    nothing = np.zeros(count, np.uint8)
    return Catalogue(
        seed=config.seed, department=np.zeros(count, np.int8), kind=kind, facets=facets,
        brand=np.zeros(count, np.int32), line=np.zeros(count, np.int32), price_cents=prices, price_level=level,
        fame=draw_fame(config, np.ones(count, bool)), content=np.arange(count), claims=nothing, helps=nothing,
        shares=np.ones(1), kind_counts=np.array([KINDS]), value_counts=np.full((1, MAX_FACETS), VALUES))


def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "little")


def _listing(product: RealProduct, name: str, number: int, standing: Standing) -> dict[str, Any]:
    reviews = int(standing.reviews[number])
    return {
        "main_category": product.categories[0], "title": product.title,
        "average_rating": round(int(standing.rating_sum[number]) / reviews, 1) if reviews else None,
        "rating_number": reviews, "features": product.features,
        "description": [product.description] if product.description else [],
        "price": product.price_cents / 100 if product.price_cents else None, "images": [], "videos": [],
        "store": product.store, "categories": product.categories, "details": {}, "parent_asin": name,
        "bought_together": None,
    }


def _told(product: RealProduct, others: Sequence[RealProduct], rating: int, clear: Clarity, roll: Dice) -> Told:
    spoken, mood = phrases(), mood_of(rating)
    said = [topic for topic in product.topics if roll.chance(clear.say_facets / len(product.topics))]
    said = said or [roll.pick(product.topics)]
    names_it = roll.chance(clear.say_type)
    opener = roll.pick(spoken["real_openers"]).replace("{w}", said[0]) if names_it else \
        roll.pick(spoken["plain_openers"][mood])
    sentences = [opener]
    for topic in said[names_it:]:
        other = roll.pick(others).topics if roll.chance(clear.wrong_facet) else ()
        sentences.append(roll.pick(spoken["real_sayings"]).replace("{w}", roll.pick(other) if other else topic))
    if product.store and roll.chance(clear.say_brand):
        sentences.append(roll.pick(spoken["brand_sayings"]).replace("{b}", product.store))
    while roll.chance(clear.filler) and len(sentences) < 8:
        sentences.append(roll.pick(spoken["generic_more"]))
    return Told(roll.pick(spoken["titles"][mood]), register(" ".join(sentences), roll, clear.typo), names_it,
                tuple(said), None)
