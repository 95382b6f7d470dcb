"""Reviewers and their tastes: who likes what, and who buys which product when."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys_ray.data.demo_shop.catalogue import Catalogue
from recsys_ray.data.demo_shop.config import DemoShopConfig
from recsys_ray.data.demo_shop.streams import Floats, Integers, permuted, uniforms, weighted
from recsys_ray.data.demo_shop.vocabulary import MAX_FACETS, formulary

CONSIDERED = 16         # products a shopper looks at before buying one
FAITHFUL = 0.8          # share of purchases in a reviewer's own department
PRODUCT_FIRST = 0.85    # of the products are sure of one review
TASTE_FOR_KIND, TASTE_FOR_PRICE, TASTE_FOR_HELP = 1.0, 1.2, 1.2
RATING_STEPS = (-1.30, -0.95, -0.62, -0.10)     # of satisfaction: J-shaped, as in real shops


@dataclass(frozen=True)
class Tastes:
    """What U reviewers like."""

    department: npt.NDArray[np.int8]        # (U,) where they mostly shop
    values: Floats                          # (U, MAX_FACETS): the place of the liked value among a facet's values
    weights: Floats                         # (U, MAX_FACETS): how much each facet matters
    kind: Floats                            # (U,): the place of the liked kind among a department's kinds
    price: Floats                           # (U,): liked price level
    concerns: npt.NDArray[np.uint8]         # (U,): what they want help against


@dataclass(frozen=True)
class Purchases:
    """R reviews without their words."""

    row: Integers           # number of the review
    user: Integers
    product: Integers
    when: Floats            # quantile of the reviews' time, 0 to 1
    rating: npt.NDArray[np.int8]
    generic: npt.NDArray[np.bool_]
    about: Integers         # the product the words are about: `product`, but in the null mode any


@dataclass(frozen=True)
class Market:
    """A catalogue ready to be shopped: products of a department by popularity."""

    catalogue: Catalogue
    members: list[Integers]         # product numbers of each department
    cumulative: list[Floats]        # running sum of their popularity
    users: int


def open_market(catalogue: Catalogue, config: DemoShopConfig) -> Market:
    """The market of a catalogue."""
    members = [np.flatnonzero(catalogue.department == number) for number in range(len(catalogue.shares))]
    users = max(50, int(config.reviews / config.clarity.reviews_per_user))
    return Market(catalogue, members, [np.cumsum(catalogue.fame.weight[mine]) for mine in members], users)


def tastes(catalogue: Catalogue, users: npt.ArrayLike) -> Tastes:
    """The tastes of some reviewers, by their numbers."""
    drawn = uniforms(catalogue.seed, "tastes", users, 6 + 2 * MAX_FACETS)
    department = weighted(catalogue.shares, drawn[:, 0]).astype(np.int8)
    bit = (drawn[:, 3:5] * len(formulary().concerns)).astype(np.uint8)
    concerns = (np.uint8(1) << bit[:, 0]) | np.where(drawn[:, 5] < 0.4, np.uint8(1) << bit[:, 1], 0)
    return Tastes(department, drawn[:, 6:6 + MAX_FACETS], drawn[:, 6 + MAX_FACETS:] ** 2 * 2, drawn[:, 1],
                  drawn[:, 2], concerns.astype(np.uint8))


def purchases(market: Market, config: DemoShopConfig, rows: Integers) -> Purchases:
    """Some reviews of the shop, by their numbers: who, what, when and how content."""
    catalogue, seed = market.catalogue, config.seed
    user_chance, any_product, moment, later, favourite, generic, about_chance = uniforms(seed, "purchases", rows, 7).T
    user = _active(market, user_chance)
    if config.mode == "null":
        product, about = (np.floor(chance * len(catalogue)).astype(np.int64) for chance in (any_product, about_chance))
    else:
        product = _chosen(market, config, rows, user, moment)
        place = permuted(seed, "order", rows, config.reviews)
        product_first = place < min(PRODUCT_FIRST * len(catalogue), config.reviews // 2)
        given = permuted(seed, "one review each", place % len(catalogue), len(catalogue))
        product = np.where(product_first, given, product)
        user[product_first] = _buyers(market, config, rows[product_first], given[product_first])
        about = product = np.where(favourite < config.top_share, catalogue.fame.top, product)
    affinity = affinities(catalogue, tastes(catalogue, user), product[:, None])[:, 0]
    rating = _ratings(catalogue, config, product, affinity, uniforms(seed, "ratings", rows, 3))
    launch = catalogue.fame.launch[product]
    when = np.where(moment > launch, moment, launch + (1 - launch) * later)
    return Purchases(rows, user, product, when, rating, generic < config.clarity.generic_share, about)


def affinities(catalogue: Catalogue, who: Tastes, products: Integers) -> Floats:
    """How well products (U, C) fit the tastes of U reviewers, shape (U, C); higher is better."""
    department = catalogue.department[products]
    liked = (who.values[:, None, :] * catalogue.value_counts[department]).astype(np.int8)
    fits = (catalogue.facets[products] == liked) * who.weights[:, None, :]
    kind = (who.kind[:, None] * catalogue.kind_counts[department]).astype(np.int16)
    overlap = np.bitwise_count(catalogue.helps[products] & who.concerns[:, None]).astype(np.float64)
    return np.asarray(fits.sum(axis=2) + TASTE_FOR_KIND * (catalogue.kind[products] == kind)
                      - TASTE_FOR_PRICE * np.abs(catalogue.price_level[products] - who.price[:, None])
                      + TASTE_FOR_HELP * overlap, np.float64)


def _active(market: Market, chance: Floats) -> Integers:
    """Reviewers, some of them far more active than others."""
    return (market.users * chance ** 2.2).astype(np.int64)


def _chosen(market: Market, config: DemoShopConfig, rows: Integers, user: Integers, moment: Floats) -> Integers:
    """Of some products met by their popularity, the one that fits the reviewer best, by a noisy judgement."""
    catalogue = market.catalogue
    who = tastes(catalogue, user)
    faithful, any_shelf = uniforms(config.seed, "department", rows, 2).T
    shelf = np.where(faithful < FAITHFUL, who.department, weighted(catalogue.shares, any_shelf))
    met = np.zeros((len(rows), CONSIDERED), np.int64)
    chance = uniforms(config.seed, "met", rows, CONSIDERED)
    for number, (mine, cumulative) in enumerate(zip(market.members, market.cumulative, strict=True)):
        here = np.flatnonzero(shelf == number)
        met[here] = mine[weighted(cumulative, chance[here])]
    not_yet = catalogue.fame.launch[met] > moment[:, None]
    worth = config.clarity.taste * affinities(catalogue, who, met) + _whims(config, rows) - 50.0 * not_yet
    return np.asarray(met[np.arange(len(rows)), worth.argmax(axis=1)])


def _buyers(market: Market, config: DemoShopConfig, rows: Integers, product: Integers) -> Integers:
    """For each product the reviewer, of some met, whom it fits best, by a noisy judgement."""
    catalogue = market.catalogue
    met = _active(market, uniforms(config.seed, "buyers", rows, CONSIDERED))
    who = tastes(catalogue, met.ravel())
    fit = affinities(catalogue, who, np.repeat(product, CONSIDERED)[:, None]).reshape(met.shape)
    own = who.department.reshape(met.shape) == catalogue.department[product][:, None]
    worth = config.clarity.taste * (fit + own) + _whims(config, rows)
    return np.asarray(met[np.arange(len(rows)), worth.argmax(axis=1)])


def _whims(config: DemoShopConfig, rows: Integers) -> Floats:
    """Gumbel noise, which turns the best into a draw with odds exp(worth)."""
    return np.asarray(-np.log(-np.log(uniforms(config.seed, "whims", rows, CONSIDERED))))


def _ratings(catalogue: Catalogue, config: DemoShopConfig, product: Integers, affinity: Floats, chance: Floats
             ) -> npt.NDArray[np.int8]:
    planted = 0.0 if config.mode == "null" else 1.0
    noise = np.sqrt(12 / 3) * (chance.sum(axis=1) - 1.5)        # nearly standard normal
    satisfaction = planted * (0.5 * catalogue.fame.quality[product] + 0.15 * (affinity - 1.0)) + 0.9 * noise
    return np.asarray(1 + np.searchsorted(RATING_STEPS, satisfaction), np.int8)
