"""Queries -> answers without Ray or HTTP: what a shard does, what is done with the shards' answers, and
`Recommender`, which does both in one process.

The service and the offline evaluation share every step: shards search with `Index.search`, their
hits are merged with `merge_hits` and scored with `score_hits`, whether they lie in one process or many,
and the order of both is `Reranker.order`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from recsys_ray.data.interactions import ContextConfig, favoured, likes_text
from recsys_ray.data.preprocess import clean_query
from recsys_ray.ids import row_ids
from recsys_ray.models.text_encoder import TextEncoder
from recsys_ray.models.token_signals import Encoding
from recsys_ray.ranking.features import FEATURE_COLUMNS
from recsys_ray.ranking.rerank import Reranker
from recsys_ray.retrieval.filters import FilterError, Filters, refuse_unknown_concerns
from recsys_ray.retrieval.fusion import ranking
from recsys_ray.retrieval.retriever import RetrieverConfig, asked_signals, score_hits
from recsys_ray.retrieval.segments import Index, SegmentHits, merge_hits
from recsys_ray.serving.answers import Hit, Product
from recsys_ray.serving.api import RankedRequest, RecommendRequest, SearchRequest, Sort, System
from recsys_ray.serving.errors import ApiError
from recsys_ray.serving.first_stage import FirstStage, Suggestion
from recsys_ray.serving.picture_api import PictureRequest
from recsys_ray.serving.reranking import (
    Ints,
    Ordered,
    Ranked,
    Row,
    Shortlist,
    as_found,
    explanation,
    order_with,
    reordered,
)

log = logging.getLogger(__name__)

CARD = ("row_id", "product_id", "title", "brand", "category", "price_cents", "rating_mean", "num_reviews", "image_url",
        "concerns", "addresses", "because")


@dataclass(frozen=True)
class Query:
    """What every shard is asked."""

    text: str
    config: RetrieverConfig
    filters: Filters | None = None


@dataclass(frozen=True)
class ShardAnswer:
    """A shard's candidates and, in the same order, what is shown of them: both from one version."""

    hits: SegmentHits
    cards: list[Row]


@dataclass(frozen=True)
class NoEncoding:
    """In the place of the encoding of a text that could not be encoded."""

    reason: str
    bad_text: bool      # else it is the encoder's failure, and the same text may succeed later


def search_query(request: SearchRequest, config: RetrieverConfig, concerns: Sequence[str]) -> Query:
    """The shards' question for a search request: always the full depth, so that all pages fit together.

    `config` is that of the service, asked by words alone where the request says so; `concerns` are the index's.

    Errors: `ApiError` 422 when nothing of the query is left after cleaning, e.g. of an empty HTML tag, and for a
    filter by a concern that the index does not know.
    """
    filters = known_filters(request, concerns)
    text = clean_query(request.query)
    if not text:
        raise ApiError(422, "invalid_request", "query holds no words", "query")
    return Query(text, retriever_of(request.system, config), filters)


def known_filters(request: RankedRequest, concerns: Sequence[str]) -> Filters:
    """The request's conditions; `ApiError` 422 when one is on a concern that the index does not know."""
    filters = request.filters.to_filters()
    try:
        refuse_unknown_concerns(filters.concern, concerns)
    except FilterError as error:
        raise ApiError(422, "invalid_request", f"filters.{error}", "filters.concern") from None
    return filters


def retriever_of(system: System, config: RetrieverConfig) -> RetrieverConfig:
    """What the first stage of a system asks."""
    return config.replace(mode="bm25") if system == "bm25" else config


def similar_query(row: Row, k: int, config: RetrieverConfig, *, dense: bool) -> Query:
    """The shards' question for products like `row`: its own text, by meaning when there is an encoder."""
    mode = "dense" if dense else "bm25"
    text = row["text"] if dense else row["lexical_text"]
    return Query(text or row["title"] or row["product_id"], config.replace(mode=mode, depth=k + 1))


def ask_shard(index: Index, query: Query, encoding: Encoding | None) -> ShardAnswer:
    """The best candidates among the index's segments, with their cards; `encoding` is that of the one query."""
    dense = query.config.mode != "bm25"
    if dense and encoding is None:
        raise ValueError(f"mode {query.config.mode!r} needs the query's vector")
    vectors, signals = None, None
    if dense and encoding is not None:
        vectors, signals = encoding.dense, asked_signals(encoding.signals, query.config)
    hits = index.search(vectors, [query.text] if query.config.mode != "dense" else None, query.config.depth,
                        query.filters, signals)[0]
    return ShardAnswer(hits, index.products(hits.row_ids, CARD))


def ask_rows(index: Index, row_ids: Ints) -> pa.Table:
    """What rankers read of these products."""
    return index.rows(row_ids, FEATURE_COLUMNS)


def ask_cards(index: Index, row_ids: Ints, filters: Filters) -> list[Row]:
    """The cards of those of the products that live in the index's segments and meet the filters, in any order."""
    found: list[Row] = []
    for segment in index.segments:
        places = segment.places(row_ids)
        places = places[segment.allowed(filters)[places]]
        found += segment.rows.select(CARD).take(pa.array(places)).to_pylist()
    return found


def shortlist(answers: Sequence[ShardAnswer], query: Query) -> Shortlist:
    """The candidates of all shards, best first: merged and scored as offline."""
    merged = merge_hits([answer.hits for answer in answers], query.config.depth)
    scores = score_hits(merged, query.config)
    cards = {card["row_id"]: card for answer in answers for card in answer.cards}
    order = ranking(scores, merged.row_ids, query.config.depth)
    asked = {"dense": merged.dense_scores if query.config.mode != "bm25" else None,
             "lexical": merged.lexical_scores if query.config.mode != "dense" else None,
             "sparse": merged.sparse_scores, "multi": merged.multi_scores, "fused": scores}
    return Shortlist({name: None if one is None else one[order] for name, one in asked.items()},
                     [cards[int(row_id)] for row_id in merged.row_ids[order]])


def rank(answers: Sequence[ShardAnswer], query: Query) -> list[Ranked]:
    """The candidates of all shards, best first."""
    return as_found(shortlist(answers, query))


def page(found: Shortlist, ordered: Ordered | None, request: SearchRequest | PictureRequest) -> dict[str, Any]:
    """`items`, `candidates` and `facets` of one page; without `ordered` in the order of the first stage."""
    ranked = as_found(found) if ordered is None else reordered(found, ordered)
    chosen = sort_ranked(ranked, request.sort)[request.offset: request.offset + request.k]
    return {"items": _hits(chosen, request.offset, (found, ordered) if request.explain else None),
            "candidates": len(ranked),
            "facets": {name: facet_counts(ranked, name) for name in ("category", "brand")} | {
                "concern": concern_counts(ranked)}}


# --- recommendations ------------------------------------------------------------------------------
def suggested(suggestion: Suggestion, cards: Sequence[Row], seen: Sequence[str], depth: int) -> Shortlist:
    """The at most `depth` best items that the index has, that meet the filters and were not seen."""
    by_id = {card["product_id"]: card for card in cards}
    hidden = set(seen)
    kept = [place for place, one in enumerate(suggestion.product_ids) if one in by_id and one not in hidden][:depth]
    return Shortlist({"fused": np.asarray(suggestion.scores, dtype=np.float32)[kept]},
                     [by_id[suggestion.product_ids[place]] for place in kept])


def history_query(history: Sequence[str], cards: Sequence[Row]) -> str:
    """A history as the cross-encoder reads it: its latest titles and favoured categories, as `make_reranker_pairs`
    writes the contexts of a shop's customers."""
    by_id, config = {card["product_id"]: card for card in cards}, ContextConfig()
    known = [by_id[one] for one in dict.fromkeys(reversed(history)) if one in by_id]
    latest = [f"{one['title']} by {one['brand']}" if one["brand"] else str(one["title"]) for one in known]
    counts = Counter(one["category"] for one in known if one["category"])
    return likes_text(latest[:config.titles], favoured(counts, config.genres))


def context_of(index: Index, history: Sequence[str]) -> str:
    """`history_query` over an index that is open here."""
    return history_query(history, ask_cards(index, row_ids(history), Filters()))


def first_list(index: Index, first: FirstStage, history: Sequence[str], seen: Sequence[str], filters: Filters,
               depth: int) -> tuple[Suggestion, Shortlist]:
    """(what the recommender says of a history, the at most `depth` best of it that may be shown)."""
    count = depth
    while True:
        suggestion = first.suggest(history, count)
        found = suggested(suggestion, ask_cards(index, row_ids(suggestion.product_ids), filters), seen, depth)
        if len(found.cards) == depth or suggestion.complete:
            return suggestion, found
        count *= 4


def recommended(found: Shortlist, ordered: Ordered | None, suggestion: Suggestion, request: RecommendRequest
                ) -> dict[str, Any]:
    """The fields of an answer to a history."""
    ranked = as_found(found) if ordered is None else reordered(found, ordered)
    return {"items": _hits(ranked[:request.k], 0, (found, ordered) if request.explain else None),
            "candidates": len(ranked), "source": suggestion.source, "fallback": not suggestion.known,
            "known": suggestion.known}


# --- lists ----------------------------------------------------------------------------------------
def sort_ranked(ranked: Sequence[Ranked], sort: Sort) -> list[Ranked]:
    """The candidates in the order of `sort`, equal or missing values by relevance, missing ones last."""
    if sort == "relevance":
        return list(ranked)
    column = "rating_mean" if sort == "rating" else "price_cents"
    sign = 1 if sort == "price_asc" else -1

    def key(one: Ranked) -> tuple[bool, float]:
        value = one.card[column]
        missing = value is None or value != value
        return missing, 0.0 if missing else sign * float(value)

    return sorted(ranked, key=key)


def facet_counts(ranked: Sequence[Ranked], column: str) -> list[dict[str, Any]]:
    """How many candidates have each value of `column`, most frequent first, equal counts by value."""
    return _counted(Counter(one.card[column] for one in ranked if one.card[column]))


def _counted(counts: Counter[str]) -> list[dict[str, Any]]:
    in_order = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return [{"value": value, "count": count} for value, count in in_order]


def concern_counts(ranked: Sequence[Ranked]) -> list[dict[str, Any]]:
    """How many candidates address each concern, most frequent first."""
    return _counted(Counter(concern for one in ranked for concern in one.card["addresses"] or ()))


def similar_hits(ranked: Sequence[Ranked], product_id: str, k: int) -> list[Hit]:
    """The first `k` candidates other than the product itself."""
    return _hits([one for one in ranked if one.card["product_id"] != product_id][:k], 0, None)


def to_product(row: Row) -> Product:
    """A product as it is shown; what is not a finite number is left out."""
    return Product(**_shown(row))


def _hits(ranked: Sequence[Ranked], offset: int, why: tuple[Shortlist, Ordered | None] | None) -> list[Hit]:
    return [Hit(**_shown(one.card), rank=offset + place, score=one.score,
                explanation=None if why is None else explanation(one, *why)) for place, one in enumerate(ranked, 1)]


def _shown(row: Row) -> dict[str, Any]:
    cents, rating = row["price_cents"], row["rating_mean"]
    return {"product_id": row["product_id"], "title": row["title"], "brand": row["brand"], "category": row["category"],
            "price": None if cents is None else cents / 100, "num_reviews": row["num_reviews"],
            "rating": None if rating is None or not np.isfinite(rating) else round(float(rating), 3),
            "image_url": row["image_url"], "concerns": row["addresses"]}


def query_encoding(encoder: TextEncoder, config: RetrieverConfig, texts: Sequence[str]) -> Encoding:
    """What the index is asked with for these queries: vectors, and signals only where they have a weight."""
    return encoder.encode_all_queries(texts) if config.asks_signals else Encoding(encoder.encode_queries(texts))


def document_encoding(encoder: TextEncoder, texts: Sequence[str]) -> Encoding:
    """What the index is asked with for products like these: their vectors."""
    return Encoding(encoder.encode_documents(texts))


def encode_each(encode: Callable[[Sequence[str]], Encoding], texts: Sequence[str]) -> list[Encoding | NoEncoding]:
    """The encoding of each text alone, or why there is none: one bad text never costs the others theirs.

    The batch is tried as a whole; when that fails, the texts are tried one by one. A `ValueError` or
    numbers that are not finite are the text's fault.
    """
    try:
        found = encode(texts)
        good = found.signals.finite(len(texts))
        if found.dense is not None:
            good &= np.isfinite(found.dense).all(axis=1)
        return [found.take(np.array([place])) if good[place] else NoEncoding("it is not finite", bad_text=True)
                for place in range(len(texts))]
    except Exception as error:
        if len(texts) > 1:
            log.warning("a batch of %d texts failed (%s); encoding them one by one", len(texts), type(error).__name__)
            return [answer for text in texts for answer in encode_each(encode, [text])]
        log.warning("a text of %d characters cannot be encoded", len(texts[0]), exc_info=True)
        return [NoEncoding(type(error).__name__, bad_text=isinstance(error, ValueError))]


class Recommender:
    """The whole service in one process: the same answers as over HTTP, for notebooks, jobs and tests."""

    def __init__(self, index: Index, encoder: TextEncoder | None, config: RetrieverConfig,
                 reranker: Reranker | None = None) -> None:
        if encoder is None and config.mode != "bm25":
            raise ValueError(f"mode {config.mode!r} needs a text encoder; without one use mode 'bm25'")
        if reranker is not None:
            reranker.refuse_foreign(index.artifact.manifest)
        self.index, self.encoder, self.config, self.reranker = index, encoder, config, reranker

    def search(self, request: SearchRequest) -> dict[str, Any]:
        """`items`, `candidates` and `facets` of one page."""
        query = search_query(request, self.config, self.index.concerns)
        encoding = (None if self.encoder is None or query.config.mode == "bm25"
                    else query_encoding(self.encoder, query.config, [query.text]))
        found = shortlist([ask_shard(self.index, query, encoding)], query)
        if self.reranker is None or request.system != "full":
            return page(found, None, request)
        found = found.head(self.reranker.config.depth)
        return page(found, self._ordered(self.reranker, query.text, found, [], request.explain), request)

    def recommend(self, first: FirstStage, request: RecommendRequest, depth: int, reranker: Reranker | None = None
                  ) -> dict[str, Any]:
        """What follows a history: `items`, `candidates`, `source`, `fallback`, `known`."""
        filters = known_filters(request, self.index.concerns)
        suggestion, found = first_list(self.index, first, request.history, request.seen, filters, depth)
        if reranker is None:
            return recommended(found, None, suggestion, request)
        found, context = found.head(reranker.config.depth), ""
        if suggestion.known:
            context = context_of(self.index, request.history)
        else:       # popular products have nothing to be compared with: the rules alone decide
            reranker = Reranker(reranker.config.rules())
        ordered = self._ordered(reranker, context, found, request.history, request.explain)
        return recommended(found, ordered, suggestion, request)

    def _ordered(self, reranker: Reranker, query: str, found: Shortlist, seen: Sequence[str], explain: bool) -> Ordered:
        candidates = found.candidates(ask_rows(self.index, found.row_ids))
        return order_with(reranker, query, candidates, reranker.cross(query, candidates), seen, explain)

    def product(self, product_id: str) -> Product | None:
        """One product, or None when the index has none of that id."""
        row = self.index.product(product_id)
        return None if row is None else to_product(row)

    def similar(self, product_id: str, k: int) -> list[Hit]:
        """The `k` products nearest to a product; `KeyError` when the index has none of that id."""
        row = self.index.product(product_id)
        if row is None:
            raise KeyError(product_id)
        query = similar_query(row, k, self.config, dense=self.encoder is not None)
        encoding = None if self.encoder is None else document_encoding(self.encoder, [query.text])
        return similar_hits(rank([ask_shard(self.index, query, encoding)], query), product_id, k)
