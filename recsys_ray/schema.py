"""The Arrow schema and column names of every table that crosses a stage.

`RAW_*` tables come from a source: the shop's own strings under our column names, nothing parsed.
The others are clean: units in the column name (`price_cents`, `timestamp_ms`), int64 row ids
(`recsys_ray.ids`) beside the shop's string ids. `conform` is the only border control: it casts,
adds missing nullable columns on purpose, and names the column when a table does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

TEXTS = pa.list_(pa.string())
ATTRIBUTES = pa.map_(pa.string(), pa.string())


def _schema(*fields: tuple[str, pa.DataType], required: tuple[str, ...] = ()) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name not in required) for name, kind in fields])


# --- what a source yields -------------------------------------------------------------------------
RAW_PRODUCT = _schema(
    ("product_id", pa.string()), ("title", pa.string()), ("description", pa.string()), ("features", TEXTS),
    ("brand", pa.string()), ("color", pa.string()), ("categories", TEXTS), ("ingredients", pa.string()),
    ("attributes", ATTRIBUTES), ("price", pa.string()), ("released", pa.string()), ("image_urls", TEXTS),
)
RAW_REVIEW = _schema(
    ("review_id", pa.string()), ("product_id", pa.string()), ("variant_id", pa.string()), ("user_id", pa.string()),
    ("rating", pa.float32()), ("title", pa.string()), ("text", pa.string()), ("timestamp_ms", pa.int64()),
    ("verified", pa.bool_()), ("helpful_votes", pa.int32()),
)

# --- clean tables ---------------------------------------------------------------------------------
PRODUCT = _schema(
    ("row_id", pa.int64()), ("product_id", pa.string()), ("title", pa.string()), ("description", pa.string()),
    ("features", TEXTS), ("brand", pa.string()), ("color", pa.string()), ("categories", TEXTS),
    ("category", pa.string()),          # the first level of `categories`: the facet and the filter
    ("ingredients", pa.string()), ("attributes", ATTRIBUTES),
    ("price_cents", pa.int64()), ("released_ms", pa.int64()), ("image_urls", TEXTS), ("variant_ids", TEXTS),
    ("group_id", pa.int64()),           # smallest row id of its near-duplicate group
    ("cold", pa.bool_()),               # no review before the train cut
    ("summary", pa.string()),           # of a long description, where a language model wrote one
    required=("row_id", "product_id", "group_id"),
)
REVIEW = _schema(
    ("review_id", pa.string()), ("row_id", pa.int64()), ("product_id", pa.string()), ("variant_id", pa.string()),
    ("user_id", pa.string()), ("rating", pa.float32()), ("title", pa.string()), ("text", pa.string()),
    ("timestamp_ms", pa.int64()), ("verified", pa.bool_()), ("helpful_votes", pa.int32()),
    ("split", pa.string()),             # train | valid | test
    ("cold", pa.bool_()),               # its product has no review in train
    ("keywords", TEXTS),                # stored ones; null: the offline extractor's serve
    required=("review_id", "row_id", "product_id", "timestamp_ms", "split"),
)
PRODUCT_TEXT = _schema(
    ("row_id", pa.int64()), ("product_id", pa.string()), ("text", pa.string()), ("lexical_text", pa.string()),
    ("text_hash", pa.string()),         # 32 hex digits: decides whether a product is embedded again
    ("keywords", TEXTS), ("keyword_review_ids", TEXTS),  # the reviews that fed the text: the leak check reads them
    required=("row_id", "product_id", "text", "text_hash"),
)
PRODUCT_STATS = _schema(                # as of `as_of_ms`, from earlier reviews only; never crawl-time fields
    ("row_id", pa.int64()), ("as_of_ms", pa.int64()), ("num_reviews", pa.int64()), ("verified_share", pa.float32()),
    ("rating_mean", pa.float32()), ("rating_std", pa.float32()), ("mean_review_chars", pa.float32()),
    ("last_review_ms", pa.int64()),
    required=("row_id", "as_of_ms", "num_reviews"),
)
REVIEW_KEYWORDS = _schema(
    ("review_id", pa.string()), ("row_id", pa.int64()), ("product_id", pa.string()), ("split", pa.string()),
    ("keywords", TEXTS),                # who, when and why in this order, each phrase once
    ("who", TEXTS), ("when", TEXTS), ("why", TEXTS),
    ("content_key", pa.string()),       # of text, prompt and model: an answer is asked for once
    required=("review_id", "row_id", "product_id", "split", "keywords", "content_key"),
)
PRODUCT_SUMMARY = _schema(
    ("row_id", pa.int64()), ("product_id", pa.string()), ("summary", pa.string()), ("content_key", pa.string()),
    required=("row_id", "product_id", "summary", "content_key"),
)
TEACHER_SCORES = _schema(               # beside TRAINING_PAIR, where a teacher scored the pairs
    ("teacher_positive", pa.float32()), ("teacher_negatives", pa.list_(pa.float32())),  # parallel to the negatives
    required=("teacher_positive", "teacher_negatives"),
)
TRAINING_PAIR = _schema(                # products of one group are never each other's negatives
    ("pair_id", pa.string()), ("query", pa.string()),
    ("query_type", pa.string()),        # keywords | review_text | title | feature | description | title_words | judged
    ("row_id", pa.int64()), ("product_id", pa.string()), ("group_id", pa.int64()),
    ("text", pa.string()),              # the positive's, without what the query's own review put into it
    ("negative_row_ids", pa.list_(pa.int64())), ("negative_texts", TEXTS),      # parallel, both may be empty
    ("negative_group_ids", pa.list_(pa.int64())),
    ("split", pa.string()),             # train | valid
    required=("pair_id", "query", "query_type", "row_id", "product_id", "group_id", "text", "negative_row_ids",
              "negative_texts", "negative_group_ids", "split"),
)
RERANKER_PAIR = _schema(                # rows of one (query_id, query) follow one another: they are ranked together
    ("query_id", pa.string()),          # the user, or the shop's query
    ("query", pa.string()),             # the user's context, or the words
    ("product_id", pa.string()), ("text", pa.string()),
    ("label", pa.float32()),            # 1 and 0, or a judgment's gain
    ("origin", pa.string()),            # positive | uniform | popularity_matched | mined | judged
    ("split", pa.string()),             # train | valid | test
    required=("query_id", "query", "product_id", "text", "label", "origin", "split"),
)
HISTORY = _schema(                      # what is known of users; held_out: their positives, which it must not give away
    ("user_id", pa.string()), ("product_id", pa.string()), ("kind", pa.string()), ("rating", pa.float32()),
    ("timestamp_ms", pa.int64()), ("held_out", pa.bool_()), ("split", pa.string()),
    required=("user_id", "product_id", "kind", "held_out", "split"),
)
CONCERN_PRODUCT = _schema(              # what a concern model reads of a product
    ("product_id", pa.string()), ("row_id", pa.int64()), ("title", pa.string()),
    ("ingredients", pa.string()),       # as written; null when there are none
    ("category", pa.string()),
    ("group_id", pa.int64()),           # near-duplicates share it, and so a split
    ("split", pa.string()),             # train | valid | test
    required=("product_id", "row_id", "title", "group_id", "split"),
)
CONCERN_LABEL = _schema(                # one row per product and concern
    ("product_id", pa.string()), ("concern", pa.string()),
    ("label", pa.int8()),               # 1 | 0; null: no rule spoke (unlabelled)
    ("rules", TEXTS),                   # the rules that made the label
    ("conflict", pa.bool_()),           # rules spoke for and against
    ("held_out", pa.bool_()),           # made by withheld rules alone: masked in train and valid, counted in test
    ("split", pa.string()),
    required=("product_id", "concern", "rules", "conflict", "held_out", "split"),
)
CONCERN_PROBABILITIES = pa.map_(pa.string(), pa.float32())      # by concern
CONCERN_REASONS = pa.map_(pa.string(), TEXTS)                   # by concern, the ingredients it rests on
ATTRIBUTE_ROW = _schema(                # what a product's words say of its looks; null: not said
    ("product_id", pa.string()), ("category2", pa.string()),        # the kind of garment, or "graphic" (a pattern)
    ("material", pa.string()), ("pattern", pa.string()), ("neckline", pa.string()), ("sleeve", pa.string()),
    ("group_key", pa.string()), ("group_confidence", pa.float32()), # views and colours of one product share a key
    ("evidence", TEXTS),                # "material: denim, in title", one entry for each value
    required=("product_id", "evidence"),
)
ATTRIBUTE_PAIR_KINDS = ("strong_group", "strong_attributes", "medium", "weak", "hard_material", "hard_neckline",
                        "hard_pattern", "easy")
ATTRIBUTE_PAIR = _schema(
    ("anchor_id", pa.string()), ("other_id", pa.string()),          # products
    ("kind", pa.string()),              # one of ATTRIBUTE_PAIR_KINDS
    ("label", pa.int8()),               # 1: alike (strong, medium, weak) | 0: not (hard, easy)
    required=("anchor_id", "other_id", "kind", "label"),
)
ITEM = _schema(                         # a catalogue as the reranker sees it
    ("product_id", pa.string()), ("title", pa.string()), ("author", pa.string()), ("genres", TEXTS),
    ("text", pa.string()), ("popularity", pa.int64()),  # liked by so many training users
    ("eligible", pa.bool_()),           # may be a positive or a negative
    required=("product_id", "title", "genres", "text", "popularity", "eligible"),
)
PRODUCT_WORDS = _schema(
    ("product_id", pa.string()), ("text", pa.string()), required=("product_id", "text"),
)
INTERACTION = _schema(
    ("user_id", pa.string()), ("product_id", pa.string()), ("kind", pa.string()), ("rating", pa.float32()),
    ("timestamp_ms", pa.int64()), required=("user_id", "product_id", "kind"),
)
IMAGE = _schema(
    ("image_id", pa.string()), ("product_id", pa.string()), ("group_id", pa.string()), ("label", pa.string()),
    ("width", pa.int32()), ("height", pa.int32()), ("data", pa.large_binary()), required=("image_id", "data"),
)
TAG = _schema(
    ("product_id", pa.string()), ("tag", pa.string()), ("count", pa.int64()), required=("product_id", "tag"),
)
EVENT_KINDS = ("impression", "click", "cart", "purchase")
EVENT = _schema(
    ("event_id", pa.string()), ("kind", pa.string()), ("timestamp_ms", pa.int64()), ("user_id", pa.string()),
    ("query_id", pa.string()), ("list_id", pa.string()), ("product_id", pa.string()),
    ("position", pa.int32()),           # 1 is the top of the list; null for anything but an impression
    ("propensity", pa.float32()),       # probability that the position was examined, in (0, 1]
    required=("event_id", "kind", "timestamp_ms", "product_id"),
)

# --- evaluation -----------------------------------------------------------------------------------
QUERY = _schema(
    ("query_id", pa.string()), ("query", pa.string()), ("unit_id", pa.string()), ("slices", TEXTS),
    required=("query_id", "query"),     # unit_id: what the bootstrap resamples (default: the query)
)
JUDGMENT = _schema(
    ("query_id", pa.string()), ("product_id", pa.string()), ("gain", pa.float32()), ("label", pa.string()),
    required=("query_id", "product_id", "gain"),
)
CANDIDATE = _schema(
    ("query_id", pa.string()), ("row_id", pa.int64()), ("product_id", pa.string()), ("rank", pa.int32()),
    ("score", pa.float32()), ("dense_score", pa.float32()), ("lexical_score", pa.float32()),
    ("sparse_score", pa.float32()), ("multi_score", pa.float32()),  # null where nothing asked for them
    required=("query_id", "row_id", "product_id", "rank", "score"),
)

# --- bookkeeping ----------------------------------------------------------------------------------
QUARANTINE = _schema(                   # every row that was not used, and why
    ("table", pa.string()), ("source", pa.string()), ("key", pa.string()), ("reason", pa.string()),
    ("row", pa.string()),               # the row as JSON, cut at 2,000 characters
    required=("table", "reason"),
)
AUDIT = _schema(
    ("section", pa.string()), ("name", pa.string()), ("value", pa.float64()), ("note", pa.string()),
    required=("section", "name"),
)


def embedding_schema(dimension: int, signals: Sequence[pa.Field[Any]] = ()) -> pa.Schema:
    """EMBEDDING: row_id, product_id, text_hash, vector (plain FixedSizeList<float32>, never Ray's tensor type).

    `signals` are the fields of what the encoder gives besides (`token_signals.signal_fields`).
    """
    fields = _schema(
        ("row_id", pa.int64()), ("product_id", pa.string()), ("text_hash", pa.string()),
        ("vector", pa.list_(pa.float32(), dimension)), required=("row_id", "product_id", "text_hash", "vector"),
    )
    return pa.schema([*fields, *signals])


class SchemaError(ValueError):
    """A table that does not fit its declared schema; the message names table, column, expected and found."""


def conform(table: pa.Table, schema: pa.Schema, name: str) -> pa.Table:
    """`table` with exactly the columns, order and types of `schema`; `name` is for the error message.

    Nullable columns that are absent become null; a required column that is absent or holds a null,
    or a value that cannot be cast without loss, raises `SchemaError`. Further columns are left out.
    """
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            if not field.nullable:
                raise SchemaError(f"{name}: required column {field.name!r} ({field.type}) is missing; "
                                  f"the table has {', '.join(table.column_names)}")
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        try:
            column = table.column(field.name).cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            found = table.schema.field(field.name).type
            raise SchemaError(f"{name}: column {field.name!r} should be {field.type}, found {found}: {error}") from None
        if not field.nullable and column.null_count:
            raise SchemaError(f"{name}: required column {field.name!r} holds {column.null_count} null(s)")
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)
