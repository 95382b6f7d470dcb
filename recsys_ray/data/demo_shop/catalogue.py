"""The latents of every product as arrays: what it is, whom it may please, how known it is, since when.

Some hundred bytes a product; texts and images are drawn from these numbers when they are written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys_ray.data.demo_shop.config import DemoShopConfig
from recsys_ray.data.demo_shop.formulas import effects, ingredients
from recsys_ray.data.demo_shop.streams import Floats, Integers, dice, shares, shop_ids, uniforms, weighted
from recsys_ray.data.demo_shop.vocabulary import MAX_FACETS, departments, formulary, names

BRANDS = 260            # in each department
COLD_FROM = 0.82        # of the reviews' time, by quantile: a little after the last training review
PARETO = 0.8            # reviews per product fall off with exponent 1 + 1 / PARETO
MAX_WEIGHT = 0.04       # of one product but the top one, as a multiple of the number of products: some percent of all


@dataclass(frozen=True)
class Fame:
    """How known N products are, how good, and since when."""

    weight: Floats      # popularity
    quality: Floats     # mean 0, standard deviation 1
    launch: Floats      # quantile of the reviews' time, 0 to 1
    top: int            # the product with a tenth of all reviews


@dataclass(frozen=True)
class Catalogue:
    """N products, told apart by their number 0 to N - 1. `content` is the number whose text a listing shows."""

    seed: int
    department: npt.NDArray[np.int8]    # (N,)
    kind: npt.NDArray[np.int16]         # (N,) within the department
    facets: npt.NDArray[np.int8]        # (N, MAX_FACETS) value numbers, -1: does not apply
    brand: npt.NDArray[np.int32]
    line: npt.NDArray[np.int32]
    price_cents: npt.NDArray[np.int64]
    price_level: Floats                 # 0 cheap to 1 dear, within its kind
    fame: Fame
    content: Integers                   # own number, or that of the product this listing repeats
    claims: npt.NDArray[np.uint8]       # concerns that the maker aims at, one bit each
    helps: npt.NDArray[np.uint8]        # concerns that the ingredients really help against
    shares: Floats                      # running sum of the departments' shares
    kind_counts: Integers               # kinds of each department
    value_counts: Integers              # (departments, MAX_FACETS) values of each facet

    def __len__(self) -> int:
        return len(self.department)

    def ids(self, numbers: npt.ArrayLike) -> list[str]:
        """The parent ids of products."""
        return shop_ids(self.seed, numbers)

    def variant_ids(self, numbers: npt.ArrayLike, variants: npt.ArrayLike) -> list[str]:
        """The ids of variants; variant 0 is the parent itself."""
        number, variant = np.asarray(numbers, np.int64), np.asarray(variants, np.int64)
        return shop_ids(self.seed, np.where(variant == 0, number, (1 << 40) + number * 8 + variant))


def build_catalogue(config: DemoShopConfig) -> Catalogue:
    """The planted products of a shop."""
    count, seed = config.products, config.seed
    rows = np.arange(count)
    drawn = uniforms(seed, "products", rows, 6 + MAX_FACETS)
    content = _content(drawn[:, 0], drawn[:, 1], config.clarity.duplicates)
    copied = drawn[content]             # a repeated listing shares what the product is
    department = weighted(shares({one.key: one.share for one in departments()}), copied[:, 2]).astype(np.int8)
    kind, facets = _kinds_and_facets(department, copied[:, 3], copied[:, 6:])
    price_level = copied[:, 4]
    medians = np.array([departments()[d].kinds[k].price for d, k in zip(department, kind, strict=True)])
    spread = np.exp(1.1 * (price_level - 0.5) + 0.08 * (drawn[:, 5] - 0.5))
    claims, helps = _concerns(config, department, kind, facets, content)
    names_drawn = uniforms(seed, "names", content, 2)
    lines = len(names()["lines"]) * len(names()["line_seconds"])
    return Catalogue(
        seed=seed, department=department, kind=kind, facets=facets,
        brand=(BRANDS * names_drawn[:, 0] ** 1.6).astype(np.int32), line=(names_drawn[:, 1] * lines).astype(np.int32),
        price_cents=np.round(medians * spread * 100).astype(np.int64), price_level=price_level,
        fame=draw_fame(config, (content == rows) & (department == 0)), content=content, claims=claims, helps=helps,
        **_sizes())


def draw_fame(config: DemoShopConfig, may_be_top: npt.NDArray[np.bool_]) -> Fame:
    """How known products are, for shape (N,) of which products may be the one that everybody reviews."""
    drawn = uniforms(config.seed, "fame", np.arange(len(may_be_top)), 4)
    cold = drawn[:, 1] < config.clarity.cold
    launch = np.where(cold, COLD_FROM + (0.98 - COLD_FROM) * drawn[:, 2], 0.75 * drawn[:, 2] ** 1.5)
    top = int(np.flatnonzero(may_be_top & ~cold)[0])
    launch[top] = 0.0
    if config.mode == "null":       # an older product has no more chances than a newer one
        launch[:] = 0.0
    weight = np.minimum(drawn[:, 0] ** -PARETO, MAX_WEIGHT * len(drawn))
    return Fame(weight, np.sqrt(12) * (drawn[:, 3] - 0.5), launch, top)


def _sizes() -> dict[str, npt.NDArray[Any]]:
    values = np.ones((len(departments()), MAX_FACETS), np.int64)
    for number, one in enumerate(departments()):
        values[number, :len(one.facets)] = [len(facet.values) for facet in one.facets]
    return {"shares": shares({one.key: one.share for one in departments()}), "value_counts": values,
            "kind_counts": np.array([len(one.kinds) for one in departments()])}


def _content(chance: Floats, which: Floats, share: float) -> Integers:
    """For each listing the number whose content it shows; a copy is never copied again."""
    rows = np.arange(len(chance))
    copies = chance < share
    target = (which * len(chance)).astype(np.int64)
    return np.where(copies & ~copies[target], target, rows)


def _kinds_and_facets(department: npt.NDArray[np.int8], kind_chance: Floats, facet_chance: Floats
                      ) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int8]]:
    kind = np.zeros(len(department), np.int16)
    facets = np.full((len(department), MAX_FACETS), -1, np.int8)
    for number, one in enumerate(departments()):
        mine = np.flatnonzero(department == number)
        kind[mine] = (kind_chance[mine] ** 1.2 * len(one.kinds)).astype(np.int16)
        for at, facet in enumerate(one.facets):
            skewed = facet_chance[mine, at] ** 1.35         # the first values are the common ones
            facets[mine, at] = (skewed * len(facet.values)).astype(np.int8)
            without = np.array([facet.key in one.kinds[k].lacks for k in range(len(one.kinds))])
            facets[mine[without[kind[mine]]], at] = -1
    return kind, facets


def _concerns(config: DemoShopConfig, department: npt.NDArray[np.int8], kind: npt.NDArray[np.int16],
              facets: npt.NDArray[np.int8], content: Integers
              ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    claims = np.zeros(len(department), np.uint8)
    helps = np.zeros(len(department), np.uint8)
    beauty = np.flatnonzero((department == 0) & (content == np.arange(len(department))))
    claims[beauty] = claimed(uniforms(config.seed, "claims", beauty, 3))
    for start in range(0, len(beauty), 4096):
        rows = beauty[start:start + 4096]
        for row, listed in zip(rows, recipes(config.seed, rows, kind, facets, claims), strict=True):
            found = effects(listed, formulary().concerns)
            helps[row] = sum(1 << bit for bit, effect in enumerate(found) if effect.helps)
    return claims[content], helps[content]


def claimed(chance: Floats) -> npt.NDArray[np.uint8]:
    """One to three concerns as bits, from three uniform numbers a product."""
    count = len(formulary().concerns)
    places = (chance * count).astype(np.uint8)
    bits = (np.uint8(1) << places[:, 0]) | np.where(chance[:, 2] < 0.45, np.uint8(1) << places[:, 1], 0)
    return bits.astype(np.uint8)


def recipes(seed: int, rows: Integers, kind: npt.NDArray[np.int16], facets: npt.NDArray[np.int8],
            claims: npt.NDArray[np.uint8]) -> list[list[str]]:
    """The ingredient lists of beauty products, which must be originals."""
    beauty = departments()[0]
    scent = beauty.facet("scent")
    made = []
    for row, one in zip(rows, dice(seed, "ingredients", rows, 24), strict=True):
        aims = [concern for bit, concern in enumerate(formulary().concerns) if claims[row] >> bit & 1]
        smell = beauty.facets[scent].values[facets[row, scent]]
        made.append(ingredients(one, beauty.kinds[kind[row]].base, smell, aims, formulary()))
    return made
