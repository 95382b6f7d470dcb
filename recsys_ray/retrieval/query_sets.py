"""Query sets: what a batch retrieval asks, from a table or from the reviews of a split.

The review protocol takes each review as a query whose one relevant product is the product it was
written about. Its slices: `warm` or `cold` (the product has no review in train) and `answerable` or
`generic` (too few or too common words to tell any product from the others).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from recsys_ray.config import Config
from recsys_ray.data.keywords import keyword_query, review_keywords
from recsys_ray.data.preprocess import clean_query
from recsys_ray.data.sources.tables import load_table
from recsys_ray.ids import row_ids
from recsys_ray.retrieval.lexical import LexicalConfig, LexicalStatistics, term_weights
from recsys_ray.schema import JUDGMENT, QUERY, TEXTS, conform

REVIEW_COLUMNS = ("review_id", "product_id", "title", "text", "cold", "keywords")


class QuerySetError(ValueError):
    """Queries that cannot be asked; the message names the source and the mend."""


class TableQueries(Config):
    """The queries of a Parquet, CSV or JSONL file under its own column names."""

    format: Literal["table"] = "table"
    path: str
    columns: dict[str, str] = Field(default_factory=dict)    # our column -> theirs, of query_id, query, unit_id, slices
    endpoint_url: str | None = None                         # of an S3-compatible store


class AnswerableRule(Config):
    """When a text says enough to find a product by; what says less is generic.

    One product among N is ln N nats away; terms that were independent would bring their inverse
    document frequencies. As they are not, some multiple of ln N is asked for.
    """

    min_terms: int = Field(default=3, ge=1)             # different terms that the catalogue knows
    min_information: float = Field(default=2.0, ge=0)   # sum of their inverse document frequencies, over ln N


class ReviewQueries(Config):
    """The reviews of one split as queries."""

    format: Literal["reviews"] = "reviews"
    prepared: Path
    split: Literal["train", "valid", "test"] = "test"
    text: Literal["review_text", "keywords"] = "review_text"
    max_queries: int | None = Field(default=None, ge=1)     # None: all; else a seeded sample
    seed: int = 7
    answerable: AnswerableRule = AnswerableRule()


QuerySource = Annotated[TableQueries | ReviewQueries, Field(discriminator="format")]


@dataclass(frozen=True)
class QuerySet:
    """Queries to ask, what is known to be relevant, and how many could not be asked."""

    queries: pa.Table               # QUERY, sorted by query id
    judgments: pa.Table | None      # JUDGMENT; None when the source judges apart
    skipped: int                    # rows without a text


def table_query_set(config: TableQueries) -> QuerySet:
    """The query set of a file; slices and units only where the file has such columns."""
    return query_set_of(load_table(config.path, config.columns, QUERY, endpoint_url=config.endpoint_url), config.path)


def query_set_of(table: pa.Table, name: str) -> QuerySet:
    """The query set of a QUERY table, each query once however often it was asked; `name` is for the errors."""
    asked = _once(table.filter(_has_text(table["query"])))
    if not asked.num_rows:
        raise QuerySetError(f"{name}: holds no query with a text ({table.num_rows} rows read)")
    if (twice := asked.num_rows - len(asked["query_id"].unique())):
        raise QuerySetError(f"{name}: {twice} query ids occur more than once; give each query its own id")
    return QuerySet(asked.sort_by("query_id"), None, int(pc.sum(pc.invert(_has_text(table["query"]))).as_py() or 0))


def _once(table: pa.Table) -> pa.Table:
    """The first row of each (query id, query): a service logs what it is asked as often as it is asked."""
    pairs = pa.table({"query_id": table["query_id"], "query": table["query"], "row": np.arange(table.num_rows)})
    first = pairs.group_by(["query_id", "query"]).aggregate([("row", "min")])["row_min"]
    return table.take(first)


def review_query_set(buckets: Iterable[pa.Table], config: ReviewQueries, statistics: LexicalStatistics,
                     lexical: LexicalConfig) -> QuerySet:
    """The query set of REVIEW tables of one split, read one at a time; at most `max_queries` rows are kept.

    The sample is drawn by a hash of seed and review id, so it does not depend on files or order.
    """
    kept, skipped, read = pa.table({name: pa.array([], kind) for name, kind in _KEPT}), 0, 0
    for bucket in buckets:
        chosen = bucket.filter(pc.or_(_has_text(bucket["text"]), _has_text(bucket["title"])))
        skipped += bucket.num_rows - chosen.num_rows
        read += bucket.num_rows
        kept = _sample(pa.concat_tables([kept, _with_draw(chosen, config.seed)]), config.max_queries)
    if not kept.num_rows:
        raise QuerySetError(f"{config.prepared}: split {config.split!r} holds no review with a text ({read} read)")
    kept = kept.sort_by("review_id")
    texts = _query_texts(kept, config)
    slices = _slices(kept["cold"], texts, config.answerable, statistics, lexical)
    queries = conform(pa.table({
        "query_id": kept["review_id"], "query": pa.array(texts, pa.string()), "unit_id": kept["product_id"],
        "slices": pa.array(slices, TEXTS),
    }), QUERY, "review queries")
    judgments = conform(pa.table({
        "query_id": kept["review_id"], "product_id": kept["product_id"],
        "gain": pa.array(np.ones(kept.num_rows), pa.float32()),
    }), JUDGMENT, "review judgments")
    return QuerySet(queries, judgments, skipped)


_KEPT = (("review_id", pa.string()), ("product_id", pa.string()), ("title", pa.string()), ("text", pa.string()),
         ("cold", pa.bool_()), ("keywords", TEXTS), ("draw", pa.int64()))


def _has_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(pc.match_substring_regex(column.cast(pa.string()), r"\S"), False)


def _with_draw(reviews: pa.Table, seed: int) -> pa.Table:
    draw = row_ids(f"{seed}:{one}" for one in reviews["review_id"].to_pylist())
    return conform(reviews.append_column("draw", pa.array(draw, pa.int64())), pa.schema(_KEPT), "reviews")


def _sample(reviews: pa.Table, limit: int | None) -> pa.Table:
    if limit is None or reviews.num_rows <= limit:
        return reviews
    return reviews.sort_by([("draw", "ascending"), ("review_id", "ascending")]).slice(0, limit)


def _query_texts(reviews: pa.Table, config: ReviewQueries) -> list[str]:
    """The text of each review, or its title when it has no text, or the keywords of that."""
    texts = [str(text if text and text.strip() else title)
             for title, text in zip(reviews["title"].to_pylist(), reviews["text"].to_pylist(), strict=True)]
    return texts if config.text == "review_text" else keyword_queries(texts, reviews["keywords"].to_pylist())


def keyword_queries(texts: Sequence[str], stored: Sequence[list[str] | None]) -> list[str]:
    """The keywords of each text as a query, stored ones or the offline extractor's; the whole text without any."""
    return [keyword_query(review_keywords(clean_query(text)) if words is None else words) or text
            for text, words in zip(texts, stored, strict=True)]


def _slices(cold: pa.ChunkedArray, texts: Sequence[str], rule: AnswerableRule, statistics: LexicalStatistics,
            lexical: LexicalConfig) -> list[list[str]]:
    answerable = answerable_texts(texts, rule, statistics, lexical)
    return [["cold" if one else "warm", "answerable" if enough else "generic"]
            for one, enough in zip(cold.to_pylist(), answerable, strict=True)]


def answerable_texts(texts: Sequence[str], rule: AnswerableRule, statistics: LexicalStatistics,
                     lexical: LexicalConfig) -> npt.NDArray[np.bool_]:
    """Whether each text has enough different, rare enough terms of the catalogue, shape (N,)."""
    weights = term_weights([clean_query(text) for text in texts], statistics, lexical)
    needed = rule.min_information * float(np.log(max(statistics.documents, 2)))
    return np.array([len(one) >= rule.min_terms and float(one.sum()) >= needed for one in weights], dtype=bool)
