"""A retrieval problem of goodbooks: find the books that readers put on a shelf, from their other shelves.

The books' descriptions are not in the data. So the shelves of some books (neither rare nor broad) are halved by
hash: those of one half are queries, and the books that carry them are relevant; those of the other stand in the
books' texts, beside title, authors and the broad shelves. No shelf is both, though another spelling of it may be.
Some queries are readers' own ("wish list"): no text can answer them, for any of the methods.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_ray.artifacts import write_table
from recsys_ray.config import Config
from recsys_ray.data.pairs import draws


class ShelvesConfig(Config):
    """Which books and which of their shelves."""

    source: Path                    # goodbooks: books, tags and book_tags
    output: Path                    # folder for products, queries and judgments
    books: int = 5000               # the best known ones
    top_shelves: int = 20           # of a book, by how many readers used them
    fewest: int = 20                # books of a shelf that counts
    most: int = 300                 # of one that may be asked for; broader ones, to half of the books, are only shown
    queries: int = 120
    seed: int = 7


def write_shelves(config: ShelvesConfig) -> None:
    """Write products.parquet (product_id, title, brand, features), queries.parquet and judgments.parquet."""
    books = pq.read_table(config.source / "books.parquet",
                          columns=["book_id", "goodreads_book_id", "title", "authors"])
    books = books.sort_by("book_id").slice(0, config.books)
    tags = pq.read_table(config.source / "tags.parquet", columns=["tag_id", "tag_name"])
    names = dict(zip(tags["tag_id"].to_pylist(), tags["tag_name"].to_pylist(), strict=True))
    used = pq.read_table(config.source / "book_tags.parquet", columns=["goodreads_book_id", "tag_id", "count"])
    wanted = set(books["goodreads_book_id"].to_pylist())
    by_book: dict[int, list[tuple[int, str]]] = {}
    for book, tag, count in zip(*(used[name].to_pylist() for name in used.column_names), strict=True):
        if book in wanted:
            by_book.setdefault(book, []).append((count, names[tag]))
    shelves = [[name for _, name in sorted(by_book.get(book, []), reverse=True)[: config.top_shelves]]
               for book in books["goodreads_book_id"].to_pylist()]
    for name, table in shelf_tables(books, shelves, config).items():
        write_table(config.output, f"{name}.parquet", table)


def shelf_tables(books: pa.Table, shelves: list[list[str]], config: ShelvesConfig) -> dict[str, pa.Table]:
    """products, queries and judgments from the books and, parallel to them, their shelves."""
    count = Counter(name for own in shelves for name in set(own))
    named = sorted(name for name, of_books in count.items() if config.fewest <= of_books <= len(shelves) / 2
                   and name.replace("-", "").isalpha() and name.isascii())
    narrow = [name for name in named if count[name] <= config.most]
    order = [narrow[at] for at in np.argsort(draws(narrow, config.seed), kind="stable")]
    asked = sorted(order[: len(order) // 2][: config.queries])
    shown = set(named) - set(order[: len(order) // 2])
    ids = [str(one) for one in books["book_id"].to_pylist()]
    features = [[name.replace("-", " ") for name in own if name in shown] for own in shelves]
    relevant = [(name, book) for name in asked for book, own in zip(ids, shelves, strict=True) if name in own]
    return {
        "products": pa.table({"product_id": ids, "title": books["title"], "brand": books["authors"],
                              "features": pa.array(features, pa.list_(pa.string()))}),
        "queries": pa.table({"query_id": asked, "query": [name.replace("-", " ") for name in asked]}),
        "judgments": pa.table({"query_id": [one for one, _ in relevant], "product_id": [one for _, one in relevant],
                               "gain": pa.array(np.ones(len(relevant)), pa.float32())})}
