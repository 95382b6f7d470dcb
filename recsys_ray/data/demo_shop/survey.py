"""What all reviews together say of each product: counted chunk by chunk before a word is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys_ray.data.demo_shop.config import DemoShopConfig
from recsys_ray.data.demo_shop.people import Market, purchases
from recsys_ray.data.demo_shop.products import Standing
from recsys_ray.data.demo_shop.streams import Floats, Integers

CHUNK = 8192
START_MS, END_MS = 1_325_376_000_000, 1_693_526_400_000     # January 2012 to September 2023
GROWTH = 2.4                                                # more reviews every year
TRAIN_SHARE = 0.8
TIME_BINS = 1 << 16


@dataclass(frozen=True)
class Survey:
    """Counts of each product's reviews, and where the time of training ends."""

    standing: Standing
    first_seen: Floats          # (N,) quantile of time of the first review, infinite without one
    train_end: float            # quantile of time before which 80 % of the reviews fall
    cold: npt.NDArray[np.bool_]     # (N,) the first review comes after the training reviews


def chunks(count: int) -> Iterator[Integers]:
    """Row numbers 0 to `count` - 1, some thousand at a time."""
    for start in range(0, count, CHUNK):
        yield np.arange(start, min(start + CHUNK, count))


def time_ms(when: Floats) -> Integers:
    """Milliseconds since 1970 of quantiles of the reviews' time: a growing shop has its median late."""
    return (START_MS + (END_MS - START_MS) * when ** (1 / GROWTH)).astype(np.int64)


def take_survey(market: Market, config: DemoShopConfig) -> Survey:
    """The counts of all reviews, from who buys what alone."""
    size = len(market.catalogue)
    reviews, rating_sum = np.zeros(size, np.int64), np.zeros(size, np.int64)
    first, bins = np.full(size, np.inf), np.zeros(TIME_BINS, np.int64)
    for rows in chunks(config.reviews):
        bought = purchases(market, config, rows)
        reviews += np.bincount(bought.product, minlength=size)
        rating_sum += np.bincount(bought.product, bought.rating, minlength=size).astype(np.int64)
        np.minimum.at(first, bought.product, bought.when)
        bins += np.bincount((bought.when * TIME_BINS).astype(np.int64), minlength=TIME_BINS)
    train_end = float(np.searchsorted(np.cumsum(bins), TRAIN_SHARE * config.reviews) + 1) / TIME_BINS
    return Survey(Standing(reviews, rating_sum), first, train_end, np.isfinite(first) & (first >= train_end))
