"""Where the data lies: one frozen configuration per family of sources, told apart by `format`.

Paths are local files, folders or globs, `s3://bucket/key` (any S3-compatible endpoint: `endpoint_url`
or AWS_ENDPOINT_URL) or `hf://datasets/owner/name/file`. Credentials come from the environment alone.
`docs/sources.md` has the tables of columns.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Literal, Self

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from recsys_ray import schema
from recsys_ray.config import Config

TABLES: dict[str, pa.Schema] = {
    "products": schema.RAW_PRODUCT, "reviews": schema.RAW_REVIEW, "queries": schema.QUERY,
    "judgments": schema.JUDGMENT, "interactions": schema.INTERACTION, "images": schema.IMAGE, "tags": schema.TAG,
    "events": schema.EVENT, "texts": schema.PRODUCT_WORDS,
}


class SourceError(ValueError):
    """Input that cannot be read as asked; the message names the file, the column and what was found."""


class _Source(Config):
    endpoint_url: str | None = None     # of an S3-compatible store; None: AWS_ENDPOINT_URL, else Amazon's own


class AmazonReviewsSource(_Source):
    """The files of Amazon Reviews 2023: `meta_<Category>.jsonl[.gz]` and `<Category>.jsonl[.gz]`.

    Both keys may name the same folder: files called `meta_*` are products, the others reviews.

        format: amazon_reviews
        products: hf://datasets/McAuley-Lab/Amazon-Reviews-2023/raw/meta_categories/meta_All_Beauty.jsonl
        reviews: s3://shop/raw/All_Beauty.jsonl.gz
    """

    format: Literal["amazon_reviews"] = "amazon_reviews"
    products: str
    reviews: str | None = None


class EsciSource(_Source):
    """A folder with ESCI's `products.parquet`, `queries.parquet` and `judgments.parquet`.

        format: esci
        path: ../shared/data/esci_us_subset
    """

    format: Literal["esci"] = "esci"
    path: str


class IcecatSource(_Source):
    """A folder with Icecat's `products.parquet`, `queries.parquet` and `ratings.parquet`.

        format: icecat
        path: ../shared/data/chorus_icecat
        attributes: true        # the specification sheet becomes `attributes` (and `color`)
    """

    format: Literal["icecat"] = "icecat"
    path: str
    attributes: bool = False


class GoodbooksSource(_Source):
    """A folder with goodbooks' `books`, `ratings`, `to_read`, `tags` and `book_tags` Parquet files.

        format: goodbooks
        path: ../shared/data/goodbooks
    """

    format: Literal["goodbooks"] = "goodbooks"
    path: str


class GoodreadsSource(_Source):
    """A folder with `reduced_books`, `reduced_interactions`, `new_authors` and `book_texts_reduced` Parquet files.

    The columns are those of the UCSD Book Graph: shelves and authors may be lists of names and ids or of
    {name, count} and {author_id, role}; a rating of 0 means that a book was shelved and not rated.

        format: goodreads
        path: s3://books/reranker
        endpoint_url: https://<account>.r2.cloudflarestorage.com
    """

    format: Literal["goodreads"] = "goodreads"
    path: str


class ClothingSource(_Source):
    """A folder with `images.parquet`, photographs of garments as JPEG bytes.

        format: clothing
        path: ../shared/data/clothing
    """

    format: Literal["clothing"] = "clothing"
    path: str


class TableSource(_Source):
    """Any CSV, TSV, JSONL (each also as .gz) or Parquet files, with a mapping of columns.

    A mapping says our column -> their column, and only for names that differ: a column that is not
    mapped is read from the column of the same name where the file has one. Lists (`features`,
    `categories`, `image_urls`) may be lists, JSON arrays or text divided by `list_separator`;
    `attributes` may be a struct, a map or a JSON object; times may be numbers in `time_unit`,
    ISO 8601 texts (UTC where they name no zone) or Parquet timestamps.

        format: table
        products: my_shop/products.csv
        product_columns: {product_id: sku, title: name, price: price_eur}
        reviews: my_shop/reviews-*.parquet
        review_columns: {product_id: sku, timestamp_ms: created_at}
        list_separator: ">"
    """

    format: Literal["table"] = "table"
    products: str | None = None
    reviews: str | None = None
    queries: str | None = None
    judgments: str | None = None
    interactions: str | None = None
    tags: str | None = None
    events: str | None = None
    product_columns: dict[str, str] = Field(default_factory=dict)
    review_columns: dict[str, str] = Field(default_factory=dict)
    query_columns: dict[str, str] = Field(default_factory=dict)
    judgment_columns: dict[str, str] = Field(default_factory=dict)
    interaction_columns: dict[str, str] = Field(default_factory=dict)
    tag_columns: dict[str, str] = Field(default_factory=dict)
    event_columns: dict[str, str] = Field(default_factory=dict)
    list_separator: str = Field(default="|", min_length=1)
    time_unit: Literal["ms", "s"] = "ms"
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)  # of CSV; None: tab for .tsv, else comma

    @model_validator(mode="after")
    def _has_a_table(self) -> Self:
        if not any(getattr(self, name) for name in self.table_names()):
            raise ValueError(f"name at least one of {', '.join(self.table_names())}")
        return self

    @field_validator("product_columns", "review_columns", "query_columns", "judgment_columns",
                     "interaction_columns", "tag_columns", "event_columns")
    @classmethod
    def _known_columns(cls, mapping: dict[str, str], info: object) -> dict[str, str]:
        table = str(getattr(info, "field_name", "")).removesuffix("_columns")
        check_columns(mapping, TABLES["queries" if table == "query" else table + "s"])
        return mapping

    @staticmethod
    def table_names() -> tuple[str, ...]:
        """The tables a column mapping can describe."""
        return ("products", "reviews", "queries", "judgments", "interactions", "tags", "events")

    def columns_of(self, table: str) -> dict[str, str]:
        """The mapping, our column -> their column, of one table."""
        mapping: dict[str, str] = getattr(self, ("query" if table == "queries" else table[:-1]) + "_columns")
        return mapping


SourceConfig = Annotated[
    AmazonReviewsSource | EsciSource | IcecatSource | GoodbooksSource | GoodreadsSource | ClothingSource | TableSource,
    Field(discriminator="format"),
]


def check_columns(mapping: dict[str, str], wanted: pa.Schema) -> None:
    """Nothing; raises `SourceError` for a key of `mapping` that is no column of `wanted` (with the nearest one)."""
    for ours in mapping:
        if ours not in wanted.names:
            near = difflib.get_close_matches(ours, wanted.names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(wanted.names)}"
            raise SourceError(f"{ours!r} is none of our columns; {hint} (a mapping says our column: their column)")
