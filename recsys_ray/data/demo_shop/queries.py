"""Shoppers' queries in their own words, graded against every product of the shop.

A query asks for a kind of product with one to three attributes or a concern; grades:
3 = the kind with everything asked, 2 = the kind with all but one of two or more, 1 = another kind
of the same group with everything asked, 0 = looks like it and is not (a few per query are listed).
A concern counts only when the ingredients really help against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys_ray.data.demo_shop.catalogue import Catalogue
from recsys_ray.data.demo_shop.config import Clarity, DemoShopConfig
from recsys_ray.data.demo_shop.products import Product, products
from recsys_ray.data.demo_shop.reviews import shopper_word
from recsys_ray.data.demo_shop.streams import Dice, Integers, dice, permuted, uniforms
from recsys_ray.data.demo_shop.vocabulary import Department, departments, formulary, phrases

LABELS = {3: "exact", 2: "substitute", 1: "related", 0: "irrelevant"}
NEAR_MISSES = 20        # graded 0, of the same kind


@dataclass(frozen=True)
class Wish:
    """What a shopper wants: a kind, values of facets (position, value), concerns."""

    department: int
    kind: int
    values: tuple[tuple[int, int], ...]
    concerns: tuple[int, ...]


@dataclass(frozen=True)
class GradedQuery:
    """One query, whose products (numbers) have which grade."""

    text: str
    slices: tuple[str, ...]
    products: Integers
    grades: npt.NDArray[np.int8]


def graded_queries(catalogue: Catalogue, config: DemoShopConfig) -> Iterator[GradedQuery]:
    """The shop's queries, each made for one product that answers it fully."""
    rows = np.arange(config.queries)
    targets = (uniforms(config.seed, "query targets", rows, 1)[:, 0] * len(catalogue)).astype(np.int64)
    answered = targets
    if config.mode == "null" and config.queries > 1:        # the grades of some other query
        answered = targets[permuted(config.seed, "null queries", rows, config.queries)]
    rolls = dice(config.seed, "queries", rows, 32)
    asked = products(catalogue, targets)
    for row, (product, answer) in enumerate(zip(asked, products(catalogue, answered), strict=True)):
        wish = _wish(catalogue, product, rolls[row])
        text, slices = _text(wish, config.clarity, rolls[row])
        graded = wish if answer is product or answer.number == product.number else _wish(catalogue, answer, rolls[row])
        numbers, grades = grade(catalogue, graded, row, config.seed)
        yield GradedQuery(text, (product.department.key, *slices), numbers, grades)


def grade(catalogue: Catalogue, wish: Wish, row: int, seed: int) -> tuple[Integers, npt.NDArray[np.int8]]:
    """Product numbers with a grade above 0 and a few near misses, and their grades."""
    here = np.flatnonzero(catalogue.department == wish.department)
    misses = np.zeros(len(here), np.int64)
    for at, value in wish.values:
        misses += catalogue.facets[here, at] != value
    for concern in wish.concerns:
        misses += (catalogue.helps[here] >> concern & 1) == 0
    asked = len(wish.values) + len(wish.concerns)
    same = catalogue.kind[here] == wish.kind
    kinds = departments()[wish.department].kinds
    group = np.array([kind.group == kinds[wish.kind].group for kind in kinds])[catalogue.kind[here]]
    grades = np.where(same & (misses == 0), 3,
                      np.where(same & (misses == 1) & (asked > 1), 2, np.where(group & (misses == 0), 1, 0)))
    near = np.flatnonzero(same & (grades == 0))
    near = near[permuted(seed, f"misses/{row}", np.arange(min(NEAR_MISSES, len(near))), max(1, len(near)))] \
        if len(near) else near
    listed = np.concatenate([np.flatnonzero(grades > 0), near])
    return here[listed], grades[listed].astype(np.int8)


def _wish(catalogue: Catalogue, product: Product, roll: Dice) -> Wish:
    place = int(catalogue.department[product.number])
    present = [at for at, value in enumerate(product.values) if value >= 0]
    concerns: tuple[int, ...] = ()
    if product.helps and roll.chance(0.6):
        concerns = (roll.pick(product.helps),)
    count = roll.below(2) if concerns else 1 + roll.below(3)
    chosen: list[int] = []
    while len(chosen) < min(count, len(present)):
        at = roll.pick(present)
        if at not in chosen:
            chosen.append(at)
    values = tuple((at, product.values[at]) for at in sorted(chosen))
    return Wish(place, int(catalogue.kind[product.number]), values, concerns)


def _text(wish: Wish, clear: Clarity, roll: Dice) -> tuple[str, list[str]]:
    department = departments()[wish.department]
    spoken = phrases()
    kind_words = department.kinds[wish.kind].words
    kind = shopper_word(kind_words, clear, roll)
    asked = [shopper_word(department.facets[at].words[value], clear, roll) for at, value in wish.values]
    text = kind
    if asked:
        text = roll.pick(spoken["query_frames"]).replace("{f}", " ".join(asked)).replace("{t}", kind)
    for at in wish.concerns:
        concern = roll.mostly_first(formulary().concerns[at].words.shopper)
        text = roll.pick(spoken["concern_frames"]).replace("{c}", concern).replace("{t}", text)
    return text, _slices(department, wish, kind, asked)


def _slices(department: Department, wish: Wish, kind: str, asked: list[str]) -> list[str]:
    """What is hard about a query: a concern, a kind or an attribute that no listing calls so."""
    found = ["concern"] if wish.concerns else []
    if kind not in {word.lower() for word in department.kinds[wish.kind].words.catalogue}:
        found.append("other words")
    told = [department.facets[at].words[value].catalogue for at, value in wish.values]
    if any(word not in {one.lower() for one in known} for word, known in zip(asked, told, strict=True)):
        found.append("needs")
    return found
