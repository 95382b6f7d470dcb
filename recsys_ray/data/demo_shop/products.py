"""Listings: the metadata lines of products in the format of Amazon Reviews 2023."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from recsys_ray.data.demo_shop.catalogue import Catalogue, recipes
from recsys_ray.data.demo_shop.config import DemoShopConfig
from recsys_ray.data.demo_shop.streams import Dice, Integers, dice
from recsys_ray.data.demo_shop.vocabulary import Department, Kind, departments, formulary, names, phrases


@dataclass(frozen=True)
class Product:
    """One product as its texts see it."""

    number: int
    department: Department
    kind: Kind
    values: tuple[int, ...]         # of each facet, -1: does not apply
    brand: str
    line: str
    claims: tuple[int, ...]         # positions of the concerns it is meant against
    helps: tuple[int, ...]          # positions of those it helps against
    price_cents: int
    ingredients: tuple[str, ...]

    def catalogue_words(self, facet: str, roll: Dice) -> str | None:
        """How a listing says one attribute; None when it does not apply."""
        at = self.department.facet(facet)
        value = self.values[at]
        return None if value < 0 else roll.mostly_first(self.department.facets[at].words[value].catalogue)


def products(catalogue: Catalogue, numbers: Integers, *, with_recipes: bool = False) -> list[Product]:
    """The products of some numbers; ingredient lists only on demand."""
    content = catalogue.content[numbers]
    listed = _recipes_of(catalogue, content) if with_recipes else {}
    columns = zip(numbers.tolist(), catalogue.department[numbers].tolist(), catalogue.kind[numbers].tolist(),
                  catalogue.facets[numbers].tolist(), catalogue.brand[numbers].tolist(),
                  catalogue.line[numbers].tolist(), catalogue.claims[numbers].tolist(),
                  catalogue.helps[numbers].tolist(), catalogue.price_cents[numbers].tolist(), content.tolist(),
                  strict=True)
    found = []
    for number, place, kind, values, brand, line, claims, helps, price, original in columns:
        department = departments()[place]
        found.append(Product(number, department, department.kinds[kind], tuple(values[:len(department.facets)]),
                             brand_name(place, brand), line_name(place, line), set_bits(claims), set_bits(helps),
                             price, tuple(listed.get(original, ()))))
    return found


def _recipes_of(catalogue: Catalogue, content: Integers) -> dict[int, list[str]]:
    beauty = np.unique(content[catalogue.department[content] == 0])
    made = recipes(catalogue.seed, beauty, catalogue.kind, catalogue.facets, catalogue.claims)
    return dict(zip(beauty.tolist(), made, strict=True))


def set_bits(mask: int) -> tuple[int, ...]:
    """The positions of the ones among the lowest eight bits."""
    return tuple(bit for bit in range(8) if mask >> bit & 1)


def brand_name(department: int, brand: int) -> str:
    """An invented maker, or an author; different numbers of one department give different names."""
    known = names()
    first, second = ("author_first", "author_last") if departments()[department].key == "books" else \
        ("brand_first", "brand_second")
    place = (brand * 7919 + department * 331) % (len(known[first]) * len(known[second]))
    row, column = divmod(place, len(known[second]))
    joiner = " " if first == "author_first" else ""
    return known[first][row] + joiner + known[second][column]


def line_name(department: int, line: int) -> str:
    """The name of a product line, or of a book."""
    known = names()
    if departments()[department].key == "books":
        adjective, noun = divmod(line, len(known["title_nouns"]))
        adjectives = known["title_adjectives"]
        return f"The {adjectives[adjective % len(adjectives)]} {known['title_nouns'][noun]}"
    first, second = divmod(line, len(known["line_seconds"]))
    word = known["lines"][first % len(known["lines"])]
    return word if line % 3 == 0 else f"{word} {known['line_seconds'][second]}"


@dataclass(frozen=True)
class Standing:
    """What a crawl of the shop sees of each product's reviews, shape (N,) each."""

    reviews: Integers
    rating_sum: Integers


def listings(catalogue: Catalogue, config: DemoShopConfig, numbers: Integers, standing: Standing
             ) -> list[dict[str, Any]]:
    """The metadata records of some products."""
    content = catalogue.content[numbers]
    ids = catalogue.ids(numbers)
    rolls = dice(config.seed, "listing", content, 64)       # a repeated listing says what the original says
    own = dice(config.seed, "own listing", numbers, 16)
    many = products(catalogue, numbers, with_recipes=True)
    return [_listing(product, config, one, roll, mine, product.number != original, standing)
            for product, one, roll, mine, original in zip(many, ids, rolls, own, content.tolist(), strict=True)]


def _listing(product: Product, config: DemoShopConfig, product_id: str, roll: Dice, own: Dice, repeated: bool,
             standing: Standing) -> dict[str, Any]:
    clear = config.clarity
    title = title_of(product, roll, clear.title_facets)
    features = _features(product, roll) if roll.chance(clear.features) else []
    description = _description(product, roll) if roll.chance(clear.description) else []
    details = _details(product, roll, clear.ingredients)
    if repeated:
        title = _retold(title, own)
    reviews = int(standing.reviews[product.number])
    store = own.pick(names()["brand_first"]) + " Outlet" if repeated else product.brand
    return {
        "main_category": product.department.main_category, "title": title,
        "average_rating": round(int(standing.rating_sum[product.number]) / reviews, 1) if reviews else None,
        "rating_number": reviews, "features": features, "description": description,
        "price": product.price_cents / 100 if own.chance(clear.price) else None,
        "images": [], "videos": [],
        "store": store if own.chance(clear.store) else None,
        "categories": [product.department.main_category, product.kind.shelf, product.kind.words.catalogue[0] + "s"],
        "details": details, "parent_asin": product_id, "bought_together": None,
    }


def title_of(product: Product, roll: Dice, share: float) -> str:
    """A title of the parts that this maker names; the kind of product is always there."""
    parts = []
    for segment in product.department.title:
        slot = segment[segment.index("{") + 1:segment.index("}")]
        word = _title_word(product, slot, roll, share)
        if word:
            parts.append(segment.replace("{" + slot + "}", word))
    return " ".join(parts).strip(" -,")


def _title_word(product: Product, slot: str, roll: Dice, share: float) -> str | None:
    if slot == "type":
        return roll.mostly_first(product.kind.words.catalogue)
    if slot == "line":
        return product.line if product.department.key == "books" or roll.chance(0.8) else None
    if slot == "brand":
        return product.brand if roll.chance(0.75) else None
    if not roll.chance(share):
        return None
    if slot == "concern":
        concerns = formulary().concerns
        return concerns[roll.pick(product.claims)].words.catalogue[0] if product.claims else None
    return product.catalogue_words(slot, roll)


def _retold(title: str, own: Dice) -> str:
    """The same title with a seller's small changes."""
    words = title.split()
    if len(words) > 3 and own.chance(0.5):
        at = 1 + own.below(len(words) - 2)
        words[at - 1], words[at] = words[at], words[at - 1]
    if own.chance(0.7):
        words.append(own.pick(phrases()["title_suffixes"]))
    return " ".join(words)


def _said(product: Product, roll: Dice, share: float) -> list[tuple[str, str]]:
    """(facet, catalogue words) of the attributes a text gets to."""
    found = []
    for facet in product.department.facets:
        word = product.catalogue_words(facet.key, roll)
        if word and roll.chance(share):
            found.append((facet.key, word))
    return found


def _features(product: Product, roll: Dice) -> list[str]:
    spoken = phrases()
    lines = [f"{roll.pick(spoken['feature_leads'])}: {word} {facet}" for facet, word in _said(product, roll, 0.7)]
    lines += [f"{roll.pick(spoken['feature_leads'])}: {formulary().concerns[at].words.catalogue[0].lower()} care"
              for at in product.claims]
    lines.append(roll.pick(spoken["marketing"]))
    return lines


def _description(product: Product, roll: Dice) -> list[str]:
    spoken = phrases()
    said = _said(product, roll, 0.6)
    sentences = [f"{product.line} {product.kind.words.catalogue[0].lower()} by {product.brand}."]
    sentences += [f"Comes in {one[1]} and {two[1]}." for one, two in list(pairwise(said))[::2]]
    aims = [formulary().concerns[at].words.catalogue[-1].lower() for at in product.claims]
    sentences += [f"Formulated with {aim} action." for aim in aims]
    if product.ingredients and roll.chance(0.4):
        sentences.append("Ingredients: " + ", ".join(product.ingredients) + ".")
    sentences.append(roll.pick(spoken["marketing"]))
    return [" ".join(sentences)]


def _details(product: Product, roll: Dice, ingredients_share: float) -> dict[str, str]:
    details = {"Brand": product.brand} if roll.chance(0.6) else {}
    for facet, word in _said(product, roll, 0.25):
        details[facet.capitalize().replace("Colour", "Color")] = word
    if product.ingredients and roll.chance(ingredients_share):
        details["Ingredients"] = ", ".join(product.ingredients)
    details["Item Weight"] = f"{1 + roll.below(40)}.{roll.below(10)} ounces"
    if roll.chance(0.3):
        details["Is Discontinued By Manufacturer"] = "No"
    return details

