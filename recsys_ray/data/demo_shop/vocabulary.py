"""The tables as typed values: departments with their kinds and facets, concerns, phrases, names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from recsys_ray.data.demo_shop.config import TABLES

DEPARTMENTS = ("beauty", "fashion", "furniture", "books")
MAX_FACETS = 7


@dataclass(frozen=True)
class Words:
    """How the catalogue and how shoppers call one thing; the first of each is the usual way."""

    catalogue: tuple[str, ...]
    shopper: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of product, such as an armchair."""

    key: str
    words: Words
    shelf: str                  # second level of the categories
    group: str                  # kinds of one group can stand in for each other
    price: float                # median, in dollars
    base: str                   # of the ingredients; empty outside beauty
    lacks: frozenset[str]       # facets that make no sense for it


@dataclass(frozen=True)
class Facet:
    """An attribute and its values, in the order of their numbers."""

    key: str
    values: tuple[str, ...]
    words: tuple[Words, ...]
    sayings: tuple[str, ...]    # sentences of reviews with a slot {w}


@dataclass(frozen=True)
class Department:
    """One department's kinds, facets and the way its titles are built."""

    key: str
    main_category: str
    share: float
    title: tuple[str, ...]
    kinds: tuple[Kind, ...]
    facets: tuple[Facet, ...]
    visible: frozenset[str]     # facets that an image shows

    def facet(self, key: str) -> int:
        """The position of a facet."""
        return [facet.key for facet in self.facets].index(key)


@dataclass(frozen=True)
class Concern:
    """What a beauty product may help against, with the ingredients that do and that spoil it."""

    key: str
    words: Words
    actives: tuple[str, ...]
    antagonists: frozenset[str]
    works: tuple[str, ...]
    fails: tuple[str, ...]


@dataclass(frozen=True)
class Formulary:
    """Everything ingredient lists are made of."""

    concerns: tuple[Concern, ...]
    bases: Mapping[str, tuple[str, ...]]
    fillers: tuple[str, ...]
    preservatives: tuple[str, ...]
    scents: Mapping[str, tuple[str, ...]]


def table(name: str) -> dict[str, Any]:
    """One table file as plain values."""
    values: dict[str, Any] = yaml.safe_load((TABLES / f"{name}.yaml").read_text(encoding="utf-8"))
    return values


@cache
def departments() -> tuple[Department, ...]:
    """The departments in the order of DEPARTMENTS."""
    return tuple(_department(table(key)) for key in DEPARTMENTS)


@cache
def formulary() -> Formulary:
    """The ingredients and concerns."""
    values = table("concerns")
    concerns = tuple(
        Concern(key, words(one["words"]), tuple(one["actives"]), frozenset(one["antagonists"]),
                tuple(one["works"]), tuple(one["fails"]))
        for key, one in values["concerns"].items())
    return Formulary(concerns, _tuples(values["bases"]), tuple(values["fillers"]), tuple(values["preservatives"]),
                     _tuples(values["scents"]))


@cache
def phrases() -> dict[str, Any]:
    """What is said beside attributes."""
    return table("phrases")


@cache
def names() -> dict[str, list[str]]:
    """Parts of invented names."""
    return table("names")


@cache
def palette() -> dict[str, tuple[int, int, int]]:
    """Red, green, blue of each colour value."""
    return {name: (red, green, blue) for name, (red, green, blue) in table("palette").items()}


def words(text: str) -> Words:
    """`Sofa, Settee | couch, sofa` as two lists."""
    catalogue, shopper = ([word.strip() for word in side.split(",")] for side in text.split("|"))
    return Words(tuple(catalogue), tuple(shopper))


def _department(values: dict[str, Any]) -> Department:
    kinds = tuple(Kind(key, words(one["words"]), one["shelf"], one["group"], float(one["price"]), one.get("base", ""),
                       frozenset(one.get("lacks", ())))
                  for key, one in values["types"].items())
    facets = tuple(Facet(key, tuple(one), tuple(words(text) for text in one.values()), tuple(values["sayings"][key]))
                   for key, one in values["facets"].items())
    return Department(values["department"], values["categories"][0], values["share"], tuple(values["title"]), kinds,
                      facets, frozenset(values["visible"]))


def _tuples(values: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    return {key: tuple(one) for key, one in values.items()}
