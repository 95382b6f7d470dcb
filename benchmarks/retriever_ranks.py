"""Where each query's own product stands in a whole catalogue: the rank by one encoder, by BM25, by both, by popularity.

One positive a query, so a rank says everything: Recall@k is rank <= k, the reciprocal rank 1 / rank. The
ranks are kept, and every figure, slice and interval is made from them later.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_ray.artifacts import open_artifact
from recsys_ray.evaluation.judgments import TruthConfig, generic_flags
from recsys_ray.retrieval.fusion import FusionConfig, fuse
from recsys_ray.retrieval.lexical import Bm25Segment, LexicalConfig, build_postings, global_statistics
from recsys_ray.retrieval.query_sets import ReviewQueries, review_query_set

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
QUERIES_A_BLOCK = 64
DOCUMENTS_A_CALL = 4096


@dataclass(frozen=True)
class Catalogue:
    """N products in the order of their row ids."""

    row_ids: Ints
    product_ids: list[str]
    texts: list[str]
    lexical_texts: list[str]
    num_reviews: Ints

    @cached_property
    def bm25(self) -> Bm25Segment:
        """BM25 over the lexical texts."""
        config = LexicalConfig()
        postings = build_postings(self.lexical_texts, config)
        return Bm25Segment(postings, global_statistics([postings]), config)


@dataclass(frozen=True)
class Asked:
    """Q queries, the position of the product of each, and what to slice and resample by."""

    texts: list[str]
    target: Ints
    cold: npt.NDArray[np.bool_]
    generic: npt.NDArray[np.bool_]
    products: list[str]
    users: list[str]

    def as_table(self) -> dict[str, Any]:
        """What figures are made from, JSON-able."""
        codes = {name: np.unique(np.array(values), return_inverse=True)[1].tolist()
                 for name, values in (("product", self.products), ("user", self.users))}
        return {"cold": self.cold.astype(int).tolist(), "generic": self.generic.astype(int).tolist(), **codes}


def read_catalogue(prepared: Path) -> Catalogue:
    """The catalogue of a prepared shop."""
    artifact = open_artifact(prepared, "prepared")
    texts = pa.concat_tables(artifact.tables("product_text/")).sort_by("row_id")
    stats = pa.concat_tables(artifact.tables("product_stats/", ["row_id", "num_reviews"]))
    counts = dict(zip(stats["row_id"].to_pylist(), stats["num_reviews"].to_pylist(), strict=True))
    rows = texts["row_id"].to_numpy()
    plain = texts["text"].to_pylist()
    lexical = [own or text for own, text in zip(texts["lexical_text"].to_pylist(), plain, strict=True)]
    return Catalogue(rows, texts["product_id"].to_pylist(), plain, lexical,
                     np.array([counts.get(row, 0) for row in rows.tolist()], np.int64))


def read_queries(prepared: Path, truth: Path, split: str, limit: int, seed: int, catalogue: Catalogue) -> Asked:
    """A seeded sample of the reviews of one split, as they were written."""
    artifact = open_artifact(prepared, "prepared")
    lexical = LexicalConfig()
    statistics = global_statistics([build_postings(catalogue.lexical_texts, lexical)])
    config = ReviewQueries.model_validate({"prepared": prepared, "split": split, "max_queries": limit, "seed": seed})
    asked = review_query_set(artifact.tables(f"reviews/{split}/"), config, statistics, lexical)
    assert asked.judgments is not None
    ids = asked.queries["query_id"].to_pylist()
    reviews = pa.concat_tables(artifact.tables(f"reviews/{split}/", ["review_id", "user_id"]))
    users = dict(zip(reviews["review_id"].to_pylist(), reviews["user_id"].to_pylist(), strict=True))
    place = {name: at for at, name in enumerate(catalogue.product_ids)}
    products = [str(one) for one in asked.queries["unit_id"].to_pylist()]
    return Asked(asked.queries["query"].to_pylist(), np.array([place[name] for name in products], np.int64),
                 np.array(["cold" in one for one in asked.queries["slices"].to_pylist()]),
                 generic_flags(TruthConfig(path=truth / "reviews.parquet"), ids), products,
                 [str(users[one]) for one in ids])


def encoder_ranks(encoder: Any, catalogue: Catalogue, asked: Asked, fusion: FusionConfig) -> dict[str, list[int]]:
    """Ranks by the encoder alone (dense) and fused with BM25 (hybrid)."""
    documents = np.concatenate([encoder.encode_documents(catalogue.texts[start:start + DOCUMENTS_A_CALL])
                                for start in range(0, len(catalogue.texts), DOCUMENTS_A_CALL)])
    queries = encoder.encode_queries(asked.texts)
    found: dict[str, list[int]] = {"dense": [], "hybrid": []}
    for start in range(0, len(queries), QUERIES_A_BLOCK):
        block = queries[start:start + QUERIES_A_BLOCK] @ documents.T
        for at, dense in enumerate(block, start):
            lexical = catalogue.bm25.document_scores(asked.texts[at])
            target = int(asked.target[at])
            found["dense"].append(rank_of(dense, target))
            found["hybrid"].append(rank_of(fuse(dense, lexical, fusion), target))
    return found


def bm25_ranks(catalogue: Catalogue, asked: Asked) -> list[int]:
    """Ranks by BM25; a product without any word of the query stands last."""
    return [rank_of(scores, int(target)) if (scores := catalogue.bm25.document_scores(text))[target] > 0
            else len(catalogue.texts) for text, target in zip(asked.texts, asked.target, strict=True)]


def popularity_ranks(catalogue: Catalogue, asked: Asked) -> list[int]:
    """Ranks by the number of reviews in train."""
    order = np.lexsort((catalogue.row_ids, -catalogue.num_reviews))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    return [int(one) for one in rank[asked.target]]


def oracle_ranks(catalogue: Catalogue, asked: Asked) -> list[int]:
    """The most that reading a query can give: first where its words can name the product, else popularity."""
    guess = popularity_ranks(catalogue, asked)
    return [rank if generic else 1 for rank, generic in zip(guess, asked.generic, strict=True)]


def rank_of(scores: Floats, target: int) -> int:
    """1 + the products that score higher, or as high with a smaller row id (positions follow the row ids)."""
    own = scores[target]
    return 1 + int((scores > own).sum()) + int((scores[:target] == own).sum())


def write_ranks(path: Path, table: dict[str, Any]) -> None:
    """The per-query ranks beside a cell's figures, as Parquet."""
    pq.write_table(pa.table(table), path)
