"""Shares with intervals: how sure a proportion of a counted or weighted sample is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """A proportion, its interval, and from how many rows."""

    share: float
    low: float
    high: float
    rows: int


def wilson(hits: float, rows: float, z: float = 1.96) -> tuple[float, float]:
    """The score interval of a proportion (Wilson, J. Am. Stat. Assoc. 1927;22:209-212); (0, 1) of no rows."""
    if rows <= 0:
        return 0.0, 1.0
    share = hits / rows
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(0.0, centre - half), min(1.0, centre + half)


def weighted_share(hits: Sequence[bool], weights: Sequence[float]) -> Share | None:
    """The share of hits in what a stratified sample stands for; None of no rows.

    The interval is Wilson's at Kish's effective number of rows, (sum w)^2 / sum w^2 (Survey Sampling, 1965).
    """
    total = sum(weights)
    if total <= 0:
        return None
    share = sum(weight for hit, weight in zip(hits, weights, strict=True) if hit) / total
    effective = total * total / sum(weight * weight for weight in weights)
    low, high = wilson(share * effective, effective)
    return Share(share, low, high, len(hits))
