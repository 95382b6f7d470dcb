"""Lines and truth rows: what one chunk of products, reviews, queries or reviewers writes."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recsys_ray.data.demo_shop.config import DemoShopConfig
from recsys_ray.data.demo_shop.dirt import PRODUCT_DIRT, REVIEW_DIRT, dirty_product, dirty_review, write
from recsys_ray.data.demo_shop.people import Market, Purchases, purchases
from recsys_ray.data.demo_shop.queries import LABELS, GradedQuery
from recsys_ray.data.demo_shop.reviews import Told
from recsys_ray.data.demo_shop.stock import Stock
from recsys_ray.data.demo_shop.streams import Integers, bits, dice, user_ids
from recsys_ray.data.demo_shop.survey import Survey, chunks, time_ms
from recsys_ray.data.demo_shop.truth import TruthWriter
from recsys_ray.data.sources.blocks import review_id

log = logging.getLogger(__name__)

CATEGORY = "Demo_Shop"
QUERY_BATCH = 256


@contextmanager
def gzip_lines(path: Path) -> Iterator[gzip.GzipFile]:
    """A gzip file to write to, whose bytes depend on its content alone (no name, no time inside)."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=4, fileobj=raw, mtime=0) as stream:
        yield stream


def write_products(public: Path, stock: Stock, config: DemoShopConfig, survey: Survey, truth: TruthWriter
                   ) -> dict[str, int]:
    """Counts of the listings written to `meta_Demo_Shop.jsonl.gz`, with their images and their truth."""
    size, lines = len(stock.catalogue), 0
    imaged = stock.write_images(public / "images")
    with gzip_lines(public / f"meta_{CATEGORY}.jsonl.gz") as stream:
        for numbers in chunks(size):
            records = stock.listings(numbers, survey.standing)
            for number, record in zip(numbers.tolist(), records, strict=True):
                if number < imaged:
                    record["images"] = [_image(record["parent_asin"])]
            written, spoiled = _with_dirty_products(records, numbers, config)
            lines += len(written)
            stream.write(("\n".join(written) + "\n").encode())
            truth.add("dirty", spoiled)
            stock.tell_products(numbers, survey, imaged, truth)
            log.info("products %d of %d", numbers[-1] + 1, size)
    return {"products": size, "product_lines": lines, "images": imaged}


def _image(product_id: str) -> dict[str, Any]:
    return {"thumb": None, "large": f"images/{product_id}.jpg", "variant": "MAIN", "hi_res": None}


def _with_dirty_products(records: list[dict[str, Any]], numbers: Integers, config: DemoShopConfig
                         ) -> tuple[list[str], list[dict[str, Any]]]:
    lines: list[str] = []
    spoiled = []
    for record, roll in zip(records, dice(config.seed, "product dirt", numbers, 6), strict=True):
        if not roll.chance(config.clarity.dirty):
            lines.append(write(record))
            continue
        kind = roll.pick(PRODUCT_DIRT)
        lines += dirty_product(record, kind, roll)
        spoiled.append({"table": "products", "product_id": record["parent_asin"], "kind": kind})
    return lines, spoiled


def write_reviews(public: Path, stock: Stock, market: Market, config: DemoShopConfig, truth: TruthWriter
                  ) -> dict[str, int]:
    """Counts of the reviews written to `Demo_Shop.jsonl.gz`, with their truth."""
    lines = 0
    with gzip_lines(public / f"{CATEGORY}.jsonl.gz") as stream:
        for number, rows in enumerate(chunks(config.reviews)):
            bought = purchases(market, config, rows)
            told = stock.told(bought)
            records = review_records(stock, bought, told, config)
            rolls = dice(config.seed, "review dirt", rows, 6)
            written, kinds = [], []
            for at, roll in enumerate(rolls):
                kinds.append(roll.pick(REVIEW_DIRT) if roll.chance(config.clarity.dirty) else None)
                more: list[str] = []
                if kinds[-1]:
                    records[at], more = dirty_review(records[at], kinds[-1], roll)
                written += [write(records[at]), *more]
            lines += len(written)
            stream.write(("\n".join(written) + "\n").encode())
            _tell_reviews(stock, bought, told, records, kinds, truth)
            if number % 10 == 0 or rows[-1] + 1 == config.reviews:
                log.info("reviews %d of %d", rows[-1] + 1, config.reviews)
    return {"reviews": config.reviews, "review_lines": lines}


def review_records(stock: Stock, bought: Purchases, told: list[Told], config: DemoShopConfig) -> list[dict[str, Any]]:
    """The reviews in the format of Amazon Reviews 2023."""
    catalogue = stock.catalogue
    chance = bits(config.seed, "review facts", bought.row, 3)
    variants = (chance[:, 0] % np.uint64(7)).astype(np.int64) * (bought.product % 3 == 0) // 2   # 0 to 3
    helpful = np.where(chance[:, 1] % np.uint64(5) == 0, chance[:, 1] // np.uint64(5) % np.uint64(9), 0)
    columns = zip(bought.rating.tolist(), told, catalogue.variant_ids(bought.product, variants),
                  catalogue.ids(bought.product), user_ids(config.seed, bought.user), time_ms(bought.when).tolist(),
                  helpful.astype(int).tolist(), (chance[:, 2] % np.uint64(10) != 0).tolist(), strict=True)
    return [{"rating": float(rating), "title": words.title, "text": words.text, "images": [], "asin": asin,
             "parent_asin": parent, "user_id": user, "timestamp": when, "helpful_vote": votes,
             "verified_purchase": verified}
            for rating, words, asin, parent, user, when, votes, verified in columns]


def _tell_reviews(stock: Stock, bought: Purchases, told: list[Told], records: list[dict[str, Any]],
                  kinds: list[str | None], truth: TruthWriter) -> None:
    ids = [read_review_id(record) for record in records]
    truth.add_columns("reviews", {
        "review_id": ids, "product_id": [record["parent_asin"] for record in records],
        "user_id": [record["user_id"] for record in records],
        "timestamp_ms": [record["timestamp"] for record in records],
        "generic": [words.generic or kind == "empty" for words, kind in zip(told, kinds, strict=True)],
        "duplicate": [kind == "repeated" for kind in kinds], "says_kind": [words.says_kind for words in told],
        "facets": pa.array([words.facets for words in told], pa.list_(pa.string())),
        "concern": pa.array([words.concern for words in told], pa.string()),
        "about_product_id": stock.catalogue.ids(bought.about)})
    truth.add("dirty", [{"table": "reviews", "product_id": record["parent_asin"], "review_id": one, "kind": kind}
                        for record, one, kind in zip(records, ids, kinds, strict=True) if kind])


def read_review_id(record: dict[str, Any]) -> str:
    """The id that a reader of the review's line gives it."""
    return review_id({"user_id": record["user_id"], "product_id": record["parent_asin"], "variant_id": record["asin"],
                      "timestamp_ms": record["timestamp"], "title": record["title"], "text": record["text"]})


def write_queries(stock: Stock, truth: TruthWriter) -> dict[str, int]:
    """The number of graded queries and of judgments."""
    for number, batch in enumerate(batched(stock.queries(), QUERY_BATCH)):
        names = [f"q{number * QUERY_BATCH + at:05d}" for at in range(len(batch))]
        truth.add("queries", [{"query_id": name, "query": query.text, "unit_id": name, "slices": list(query.slices)}
                              for name, query in zip(names, batch, strict=True)])
        grades = np.concatenate([query.grades for query in batch])
        truth.add_columns("judgments", {
            "query_id": np.repeat(names, [len(query.grades) for query in batch]),
            "product_id": stock.catalogue.ids(np.concatenate([query.products for query in batch])),
            "gain": pa.array(grades, pa.float32()), "label": [LABELS[grade] for grade in grades.tolist()]})
    return {"queries": truth.rows["queries"], "judgments": truth.rows["judgments"]}


def batched(queries: Iterable[GradedQuery], size: int) -> Iterator[list[GradedQuery]]:
    """Lists of at most `size` queries."""
    stream = iter(queries)
    while batch := list(islice(stream, size)):
        yield batch


def write_users(stock: Stock, market: Market, truth: TruthWriter) -> None:
    """What every reviewer likes."""
    for users in chunks(market.users):
        stock.tell_users(users, truth)
