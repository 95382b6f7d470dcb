"""The realism card: a demo shop's figures beside those of real shops, from the files as they were written.

The texts are the listings alone (no review keywords): title, description, features or ingredients.
Real figures are measured the same way where the data are at hand; All_Beauty's are published ones.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from pydantic import Field

from recsys_ray.config import Config
from recsys_ray.data.product_text import ProductTextConfig, product_text
from recsys_ray.evaluation.results import write_result
from recsys_ray.evaluation.shop_figures import (
    Products,
    Reviews,
    read_products,
    read_reviews,
    tail_exponent,
    weighted_quantile,
)
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.retrieval.lexical import Bm25Segment, LexicalConfig, build_postings, global_statistics, tokenize

log = logging.getLogger(__name__)

ALL_BEAUTY = {      # published: the data set's own counts; coverage and base encoder of a retriever trained on it
    "products": 112_590, "reviews": 701_528, "users": 631_986, "price": 0.157, "features": 0.154, "description": 0.17,
    "brand": 0.899, "dense_recall100": 0.2015,
}
DEPTH = 100
DOCUMENTS_A_CALL = 4096
Ranking = Callable[[Sequence[str]], list[npt.NDArray[np.int64]]]


class RealismConfig(Config):
    """Which shop, beside which real ones."""

    shop: Path                          # a demo shop's directory
    output: Path                        # the result file
    real: Path | None = None            # the folder with esci_us_subset and chorus_icecat; None: without them
    encoder: TextEncoderConfig = TextEncoderConfig()
    sample: int = Field(default=2000, ge=10)        # reviews asked as queries
    lexical: LexicalConfig = LexicalConfig()
    text: ProductTextConfig = ProductTextConfig()


@dataclass(frozen=True)
class Questions:
    """Queries with the positions of their relevant texts."""

    texts: list[str]
    relevant: list[list[int]]


def write_card(config: RealismConfig) -> Path:
    """The result file with the card's figures."""
    identity = json.loads((config.shop / "public" / "shop.json").read_text(encoding="utf-8"))
    products = read_products(config.shop / "public" / "meta_Demo_Shop.jsonl.gz")
    reviews = read_reviews(config.shop / "public" / "Demo_Shop.jsonl.gz", config.sample)
    texts = [product_text(row, [], config.text) for row in products.rows]
    bm25, dense = _bm25(texts, config.lexical), _dense(texts, config.encoder)
    figures = {**_shape(products, reviews), **_review_search(config, products, reviews, bm25, dense)}
    figures |= _planted_queries(config, products, bm25, dense)
    real = {name: _real(config, name) for name in ("esci", "icecat")} if config.real else {}
    headline = {**figures, **{f"{name}_{key}": value for name, one in real.items() for key, value in one.items()},
                **{f"all_beauty_{key}": value for key, value in ALL_BEAUTY.items()}}
    command = " ".join(["python", "jobs/realism_card.py", *sys.argv[1:]])
    return write_result(config.output, command=command, headline=_rounded(headline),
                        tables={"card": card(figures, {"all_beauty": ALL_BEAUTY, **real}), "shop": identity},
                        seeds=[identity["config"]["seed"]])


def card(figures: Mapping[str, float], others: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """One row for each figure: the shop's value and those of the real shops that have it."""
    return [{"figure": name, "demo_shop": _round(value),
             **{other: _round(known.get(name)) for other, known in others.items()}} for name, value in figures.items()]


def _rounded(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _round(value) for name, value in values.items()}


def _round(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), 4)


def _shape(products: Products, reviews: Reviews) -> dict[str, float]:
    counts = np.array(list(reviews.per_product.values()))
    lengths = [len(row["title"].split()) for row in products.rows]
    return {
        "products": len(products.ids), "reviews": reviews.total, "users": len(reviews.per_user),
        "reviews_per_user": reviews.total / len(reviews.per_user), "reviews_per_product": counts.mean(),
        "median_reviews_per_product": float(np.median(counts)), "one_review_share": (counts == 1).mean(),
        "tail_exponent": tail_exponent(counts.tolist()), "top_product_share": counts.max() / reviews.total,
        **products.coverage(), "title_words": float(np.mean(lengths)),
        "review_words_median": weighted_quantile(reviews.words, 0.5),
        "review_words_p90": weighted_quantile(reviews.words, 0.9),
        "bad_lines": products.bad_lines + reviews.bad_lines,
    }


def _review_search(config: RealismConfig, products: Products, reviews: Reviews, bm25: Ranking, dense: Ranking
                   ) -> dict[str, float]:
    """How well a review finds its product in the whole catalogue."""
    place = {name: at for at, name in enumerate(products.ids)}
    table = pq.read_table(config.shop / "truth" / "reviews.parquet", columns=["review_id", "generic"])
    flags = dict(zip(table["review_id"].to_pylist(), table["generic"].to_pylist(), strict=True))
    sample = [entry for entry in reviews.sample if entry[1] in flags]   # the others are planted dirt
    generic = np.array([flags[name] for _, name, _, _ in sample])
    right = [place[product] for _, _, product, _ in sample]
    texts = [text for _, _, _, text in sample]
    found: dict[str, float] = {}
    for name, ranking in (("bm25", bm25), ("dense", dense)):
        hit = np.array([one in ranked for one, ranked in zip(right, ranking(texts), strict=True)])
        found |= {f"{name}_recall100": hit.mean(), f"{name}_recall100_answerable": hit[~generic].mean()}
        log.info("%s: Recall@100 of raw reviews %.3f", name, hit.mean())
    return {"generic_share": float(np.mean(table["generic"].to_numpy(zero_copy_only=False))), **found}


def _planted_queries(config: RealismConfig, products: Products, bm25: Ranking, dense: Ranking) -> dict[str, float]:
    place = {name: at for at, name in enumerate(products.ids)}
    queries = pq.read_table(config.shop / "truth" / "queries.parquet").to_pylist()[: config.sample]
    judged = pq.read_table(config.shop / "truth" / "judgments.parquet", filters=[("gain", ">=", 3)]).to_pylist()
    titles = [row["title"] for row in products.rows]
    return _query_figures(_questions(queries, judged, place), titles, bm25, dense, config)


def _real(config: RealismConfig, name: str) -> dict[str, float]:
    """The figures of ESCI (exact products) or Icecat (rating 2 or 3), on their open queries."""
    assert config.real is not None
    folder = config.real / {"esci": "esci_us_subset", "icecat": "chorus_icecat"}[name]
    rows = pq.read_table(folder / "products.parquet").to_pylist()
    queries = pq.read_table(folder / "queries.parquet").to_pylist()
    judged = pq.read_table(folder / ("judgments.parquet" if name == "esci" else "ratings.parquet")).to_pylist()
    good = [row for row in judged if (row["esci_label"] == "E" if name == "esci" else row["rating"] >= 2)]
    parts = [_esci_product(row) if name == "esci" else _icecat_product(row) for row in rows]
    texts = [product_text(one, [], config.text) for one in parts]
    questions = _questions(queries, good, {row["product_id"]: at for at, row in enumerate(rows)})
    figures = _query_figures(questions, [one["title"] for one in parts], _bm25(texts, config.lexical),
                             _dense(texts, config.encoder), config)
    return {"products": len(rows), "title_words": float(np.mean([len(one["title"].split()) for one in parts])),
            **figures}


def _esci_product(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"title": row["title"] or "", "description": row["description"], "ingredients": None,
            "features": (row["bullet_points"] or "").splitlines()}


def _icecat_product(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"title": row["title"] or "", "description": row["short_description"], "features": [], "ingredients": None}


def _questions(queries: Sequence[Mapping[str, Any]], judged: Sequence[Mapping[str, Any]], place: Mapping[str, int]
               ) -> Questions:
    relevant: dict[Any, list[int]] = {}
    for row in judged:
        if row["product_id"] in place:
            relevant.setdefault(row["query_id"], []).append(place[row["product_id"]])
    asked = [row for row in queries if row["query_id"] in relevant]
    return Questions([row["query"] for row in asked], [relevant[row["query_id"]] for row in asked])


def _query_figures(asked: Questions, titles: Sequence[str], bm25: Ranking, dense: Ranking, config: RealismConfig
                   ) -> dict[str, float]:
    """Length, overlap with the titles of relevant products, and which retriever finds those in its first hundred."""
    overlap, shares = [], []
    for query, right, lexical, vector in zip(asked.texts, asked.relevant, bm25(asked.texts), dense(asked.texts),
                                             strict=True):
        overlap.append(title_overlap(query, [titles[at] for at in right], config.lexical))
        by_bm25, by_dense = np.isin(right, lexical), np.isin(right, vector)
        shares.append([(by_bm25 & ~by_dense).mean(), (by_dense & ~by_bm25).mean(), (by_bm25 & by_dense).mean()])
    only_bm25, only_dense, both = np.mean(shares, axis=0) if shares else (np.nan,) * 3
    return {"queries": len(asked.texts), "query_words": float(np.mean([len(one.split()) for one in asked.texts])),
            "relevant_per_query": float(np.mean([len(one) for one in asked.relevant])),
            "title_overlap": float(np.mean(overlap)), "found_only_by_bm25": only_bm25,
            "found_only_by_dense": only_dense, "found_by_both": both}


def title_overlap(query: str, titles: Sequence[str], config: LexicalConfig) -> float:
    """The share of a query's terms (stemmed, without stop words) that a title has, averaged over titles."""
    token_ids, _ = tokenize([query, *titles], config)
    asked = set(token_ids[0])
    return float(np.mean([len(asked & set(one)) / len(asked) for one in token_ids[1:]])) if asked and titles else 0.0


def _bm25(texts: Sequence[str], config: LexicalConfig) -> Ranking:
    postings = build_postings(texts, config)
    segment = Bm25Segment(postings, global_statistics([postings]), config)
    return lambda queries: [segment.search(query, DEPTH)[1] for query in queries]


def _dense(texts: Sequence[str], config: TextEncoderConfig) -> Ranking:
    encoder = build_text_encoder(config)
    parts = []
    for start in range(0, len(texts), DOCUMENTS_A_CALL):
        parts.append(encoder.encode_documents(texts[start:start + DOCUMENTS_A_CALL]))
        log.info("embedded %d of %d", start + len(parts[-1]), len(texts))
    vectors = np.concatenate(parts)

    def ranked(queries: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        asked = encoder.encode_queries(queries)
        depth = min(DEPTH, len(vectors))
        return [row for start in range(0, len(asked), 128)
                for row in np.argpartition(-(asked[start:start + 128] @ vectors.T), depth - 1, axis=1)[:, :depth]]

    return ranked
