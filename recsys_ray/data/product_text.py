"""The text of a product: the one template that search, training and serving share, versioned by name.

`seed-v1` is "[Title] .. [Review Keywords] .. [Description Summary] .. [Features] ..", each section only
when there is something in it. `fields-v1` joins the catalogue's own fields, for shops without reviews.
The lexical text repeats fields by weight, since BM25 knows no fields.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from recsys_ray.config import Config
from recsys_ray.data.keywords import top_keywords
from recsys_ray.schema import PRODUCT_TEXT

TEXT_FIELDS = ["row_id", "product_id", "title", "brand", "color", "category", "description", "summary", "features",
               "ingredients", "attributes"]     # of PRODUCT, that a text is made of
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class ProductTextConfig(Config):
    """Which template, and how much of each field."""

    template: Literal["seed-v1", "fields-v1"] = "seed-v1"
    max_keywords: int = Field(default=20, ge=0)
    summary_chars: int = Field(default=300, ge=0)
    max_features: int = Field(default=10, ge=0)
    attributes: bool = False            # fields-v1: the specification sheet at the end
    max_chars: int = Field(default=4000, ge=100)
    lexical_weights: dict[str, int] = Field(default_factory=lambda: {
        "title": 2, "brand": 1, "color": 1, "category": 0, "features": 1, "description": 1, "ingredients": 1,
        "attributes": 0, "keywords": 1})    # how often a field is repeated for BM25


def summary(description: str | None, max_chars: int) -> str:
    """The first sentences of a description that fit into `max_chars`, or its first words when none does."""
    text = description or ""
    if len(text) <= max_chars:
        return text
    taken = ""
    for sentence in _SENTENCE_END.split(text):
        longer = f"{taken} {sentence}".strip()
        if len(longer) > max_chars:
            break
        taken = longer
    return taken or text[:max_chars].rsplit(" ", 1)[0]


def product_text(product: Mapping[str, Any], keywords: Sequence[str], config: ProductTextConfig) -> str:
    """The text of one PRODUCT row and its review keywords under the configured template."""
    if config.template == "seed-v1":
        short = summary(product.get("summary") or product["description"], config.summary_chars)
        sections = [("Title", product["title"] or ""), ("Review Keywords", ", ".join(keywords[: config.max_keywords])),
                    ("Description Summary", short),
                    ("Features", ", ".join((product["features"] or [])[: config.max_features])
                     or summary(product["ingredients"], config.summary_chars))]
        return " ".join(f"[{name}] {text}" for name, text in sections if text)[: config.max_chars]
    fields = [product["title"], product["brand"], product["color"],
              ". ".join((product["features"] or [])[: config.max_features]),
              product["description"], product["ingredients"]]
    if config.attributes:
        fields.append(". ".join(f"{name}: {value}" for name, value in product["attributes"] or []))
    return ". ".join(field for field in fields if field)[: config.max_chars]


def lexical_text(product: Mapping[str, Any], keywords: Sequence[str], config: ProductTextConfig) -> str:
    """The fields of one product for BM25, each as often as its weight says."""
    fields = {
        **{name: product[name] or "" for name in ("title", "brand", "color", "category", "description", "ingredients")},
        "features": " ".join(product["features"] or []), "keywords": " ".join(keywords[: config.max_keywords]),
        "attributes": " ".join(f"{name} {value}" for name, value in product["attributes"] or []),
    }
    return " ".join(fields[name] for name, weight in config.lexical_weights.items()
                    for _ in range(weight) if fields[name])


def product_texts(products: pa.Table, keywords: Mapping[int, Sequence[tuple[str, Sequence[str]]]],
                  config: ProductTextConfig) -> pa.Table:
    """PRODUCT_TEXT rows of PRODUCT rows; `keywords` has (review id, its keywords) of each row id's train reviews."""
    rows = []
    for product in products.select(TEXT_FIELDS).to_pylist():
        reviews = keywords.get(product["row_id"], ())
        best = top_keywords([words for _, words in reviews], config.max_keywords)
        text = product_text(product, best, config)
        fed = [review for review, words in reviews if set(words) & set(best)]
        lexical = lexical_text(product, best, config)
        rows.append({"row_id": product["row_id"], "product_id": product["product_id"], "text": text,
                     "lexical_text": lexical, "text_hash": text_hash(text, config.template), "keywords": best,
                     "keyword_review_ids": fed})
    return pa.Table.from_pylist(rows, schema=PRODUCT_TEXT)


def text_hash(text: str, template: str) -> str:
    """32 hex digits that change with the text or its template."""
    return hashlib.blake2b(f"{template}\0{text}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
