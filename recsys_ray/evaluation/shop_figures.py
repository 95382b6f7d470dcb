"""Figures of a shop from its own files: sizes, coverage, lengths, skew; one pass, one line in memory at a time."""

from __future__ import annotations

import gzip
import hashlib
import heapq
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recsys_ray.data.sources.adapters import amazon_product
from recsys_ray.data.sources.blocks import review_id

COVERED = ("title", "brand", "price", "features", "description", "ingredients", "image_urls")
TAIL_FROM = 5       # reviews from which on the tail is fitted


@dataclass
class Products:
    """The listings of a shop: their texts' parts and how often each field is filled."""

    ids: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)    # title, brand, description, features, ingredients
    filled: Counter[str] = field(default_factory=Counter)
    bad_lines: int = 0

    def coverage(self) -> dict[str, float]:
        """The share of listings that have each field."""
        return {name: self.filled[name] / max(1, len(self.ids)) for name in COVERED}


@dataclass
class Reviews:
    """The reviews of a shop in numbers, and a sample of them."""

    per_product: Counter[str] = field(default_factory=Counter)
    per_user: Counter[str] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)        # review length in words -> reviews
    sample: list[tuple[int, str, str, str]] = field(default_factory=list)   # hash, review id, product id, text
    bad_lines: int = 0

    @property
    def total(self) -> int:
        """All usable reviews."""
        return sum(self.per_product.values())


def read_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a gzipped JSONL file; None for a line that is none."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            yield value if isinstance(value, dict) else None


def read_products(path: Path) -> Products:
    """The listings of a metadata file, the first line of each id."""
    found, seen = Products(), set()
    for record in read_lines(path):
        product = amazon_product(record) if record else {}
        name = str(product.get("product_id") or "").strip()
        if not name or name in seen:
            found.bad_lines += 1
            continue
        seen.add(name)
        for one in COVERED:
            found.filled[one] += _is_filled(product.get(one))
        found.ids.append(name)
        description = " ".join(product["description"] or [])
        found.rows.append({"title": (product["title"] or "").strip(), "brand": product["brand"],
                           "description": description, "features": product["features"] or [],
                           "ingredients": product["ingredients"], "color": product["color"], "attributes": None})
    return found


def _is_filled(value: Any) -> bool:
    return bool(str(value).strip()) if isinstance(value, str) else value not in (None, [], {})


def read_reviews(path: Path, sample: int) -> Reviews:
    """The numbers of a review file, and the `sample` reviews with text whose hash is smallest."""
    found = Reviews()
    for record in read_lines(path):
        product = str((record or {}).get("parent_asin") or "")
        if not record or not product:
            found.bad_lines += 1
            continue
        text = record.get("text") or ""
        found.per_product[product] += 1
        found.per_user[str(record.get("user_id"))] += 1
        found.words[len(text.split())] += 1
        if not text.strip():
            continue
        name = review_id({"user_id": record["user_id"], "product_id": product, "variant_id": record["asin"],
                          "timestamp_ms": record["timestamp"], "title": record["title"], "text": record["text"]})
        rank = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
        entry = (-rank, name, product, text)
        if len(found.sample) < sample:
            heapq.heappush(found.sample, entry)
        elif entry > found.sample[0]:
            heapq.heapreplace(found.sample, entry)
    found.sample.sort(reverse=True)
    return found


def tail_exponent(counts: Sequence[int], start: int = TAIL_FROM) -> float:
    """The exponent of a power law fitted to the counts from `start` on; NaN for fewer than ten of them.

    The discrete maximum-likelihood estimate of Clauset, Shalizi and Newman (2009), equation 3.7.
    """
    tail = np.array([count for count in counts if count >= start], np.float64)
    return float(1 + len(tail) / np.log(tail / (start - 0.5)).sum()) if len(tail) >= 10 else math.nan


def weighted_quantile(counts: Counter[int], share: float) -> int:
    """The value below or at which this share of the counted things lies."""
    left = share * sum(counts.values())
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            return value
    return 0
