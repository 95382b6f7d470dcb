"""A small real index with three segments, an encoder without a model, and the requests that must be refused."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from fastapi import FastAPI

from recsys_ray.artifacts import Artifact, stage
from recsys_ray.config import Config
from recsys_ray.ids import row_ids
from recsys_ray.models.cross_encoder import CrossEncoderConfig, cross_encoder_identity
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.models.token_signals import Encoding
from recsys_ray.ranking.features import FEATURES, Candidates
from recsys_ray.ranking.gbdt import MODEL, GbdtConfig, Lists, fit, model_text
from recsys_ray.ranking.recommenders import EaseConfig, fit_recommender, user_items
from recsys_ray.ranking.rerank import RerankConfig, Reranker
from recsys_ray.retrieval.catalogue_rows import row_hashes
from recsys_ray.retrieval.filters import Filters
from recsys_ray.retrieval.fusion import FusionConfig
from recsys_ray.retrieval.lexical import LexicalConfig, Postings, global_statistics
from recsys_ray.retrieval.retriever import RetrieverConfig
from recsys_ray.retrieval.segments import LEXICON, ROWS, Index, open_index, segment_files, write_segment
from recsys_ray.retrieval.vector_index import VectorIndexConfig
from recsys_ray.schema import conform
from recsys_ray.serving.api import Limits
from recsys_ray.serving.calls import CrossCalls, EncoderCalls, RankerCalls, RecommenderCalls, ShardCalls
from recsys_ray.serving.cascade import Cascade
from recsys_ray.serving.event_log import EventLog
from recsys_ray.serving.first_stage import FirstStage, Suggestion
from recsys_ray.serving.gateway import Gateway, Recommending
from recsys_ray.serving.loading import PartStatus
from recsys_ray.serving.recommender import (
    NoEncoding,
    Query,
    Recommender,
    Row,
    ShardAnswer,
    ask_cards,
    ask_rows,
    ask_shard,
    encode_each,
    query_encoding,
)
from recsys_ray.serving.reranking import CrossScores, Floats, Ints, Ordered, order_with, score_each
from recsys_ray.serving.routes import create_api

SEGMENTS = ("seg-a", "seg-b", "seg-c")
RETRIEVER = RetrieverConfig(depth=60, fusion=FusionConfig(window=20))
LIMITS = Limits(max_k=50, max_window=60)
CONCERNS: dict[int, dict[str, object]] = {      # of every tenth product
    0: {"concerns": [("acne", 0.9), ("age", 0.7)], "addresses": ["acne", "age"],
        "because": [("acne", ["salicylic acid", "zinc pca"])]},
    1: {"concerns": [("acne", 0.1), ("age", 0.2)], "addresses": [], "because": None}}
DEPTH = 60          # of recommendations and of what is reordered
NOUNS = ("sofa", "lamp", "chair", "table", "shelf", "mirror")
COLOURS = ("red", "blue", "green", "oak", "white")
BRANDS = ("Nord", "Haus", None)


class WordEncoder:
    """Bag-of-words vectors by hashing: deterministic, no model; refuses texts that hold "poison"."""

    dimension = 32
    identity = {"model": "words", "dimension": 32}  # noqa: RUF012 - a constant

    def encode_queries(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit vectors (N, 32)."""
        if any("poison" in text for text in texts):
            raise ValueError("poison")
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for place, text in enumerate(texts):
            for word in text.lower().split():
                vectors[place, zlib.crc32(word.encode()) % self.dimension] += 1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)

    encode_documents = encode_queries

    def encode_all_documents(self, texts: Sequence[str]) -> Encoding:
        """The same, as an encoder with signals gives them."""
        return Encoding(self.encode_documents(texts))


def catalogue() -> list[dict[str, object]]:
    """120 products; some without price, brand or rating."""
    rows: list[dict[str, object]] = []
    for number in range(120):
        noun, colour = NOUNS[number % len(NOUNS)], COLOURS[number % len(COLOURS)]
        title = f"{colour} {noun} number{number}"
        rows.append({
            "product_id": f"P{number:03d}" if number != 7 else "odd/id 7", "title": title,
            "brand": BRANDS[number % 3], "category": "seating" if noun in ("sofa", "chair") else "home",
            "price_cents": None if number % 5 == 4 else 1000 + 137 * number,
            "rating_mean": None if number % 7 == 3 else 1.0 + (number * 7 % 40) / 10, "num_reviews": number % 5,
            "image_url": None, "text": f"[Title] {title}", "lexical_text": title, **CONCERNS.get(number % 10, {})})
    return rows


def build_small_index(root: Path, encoder: WordEncoder | None = None, identity: dict[str, object] | None = None,
                      ) -> Artifact:
    """Publish the catalogue as an index of three segments; vectors and signals from `encoder`."""
    encoder = encoder or WordEncoder()
    products = catalogue()
    lexical, vector = LexicalConfig(), VectorIndexConfig(kind="flat")
    with stage(root, "index", "small") as staging:
        entries, postings = [], []
        for part, name in enumerate(SEGMENTS):
            chosen = products[part::len(SEGMENTS)]
            columns = {column: pa.array([row.get(column) for row in chosen], ROWS.field(column).type)
                       for column in {**chosen[0], **CONCERNS[0]}}
            table = pa.table({"row_id": row_ids([str(row["product_id"]) for row in chosen]), **columns})
            table = conform(table.sort_by("row_id"), pa.schema([one for one in ROWS if one.name != "row_hash"]), "rows")
            table = table.append_column("row_hash", row_hashes(table)).cast(ROWS)
            encoding = encoder.encode_all_documents(table["text"].to_pylist())
            entries += write_segment(staging.path, name, table, encoding, vector, lexical)
            postings.append(Postings.load(staging.path / segment_files(name)[1]))
        global_statistics(postings).save(staging.path / LEXICON)
        entries.append(staging.entry(LEXICON))
        return staging.commit(entries, config=Config(), facts={
            "encoder": identity or encoder.identity, "segments": list(SEGMENTS), "live_rows": len(products),
            "concerns": {"names": ["acne", "age"], "model": {"weights_sha256": "c0"}},
            "vector": vector.model_dump(mode="json"), "lexical": lexical.model_dump(mode="json")})


def publish_small_trees(root: Path, cross: CrossEncoderConfig | None) -> Artifact:
    """Trees that like what the cross-encoder likes, if there is one, and else what costs little."""
    rng = np.random.default_rng(3)
    features = rng.random((600, len(FEATURES))).astype(np.float32) * 10 - 5
    told = features[:, FEATURES.index("cross_score" if cross is not None else "price_rank")]
    lists = Lists(features, (told > 2).astype(np.int64), np.full(30, 20))
    config = GbdtConfig(rounds=8, min_leaf=5)
    with stage(root, "gbdt", "small") as staging:
        (staging.path / MODEL).write_text(model_text(fit(lists, lists, config, [0, 1])))
        return staging.commit([staging.entry(MODEL)], config=config, facts={
            "features": list(FEATURES), "start": 0.0, "trained_with": {"depth": DEPTH, "cross_top": 20},
            "concern_model": None,
            "cross_encoder": None if cross is None else cross_encoder_identity(cross)})


def small_reranker(root: Path, cross: CrossEncoderConfig | None, **changes: object) -> Reranker:
    """Trees below `root`, over the cross-encoder."""
    publish_small_trees(root, cross)
    return Reranker(RerankConfig(gbdt=root, cross_encoder=cross, depth=DEPTH).replace(**changes))


def small_first_stage() -> FirstStage:
    """EASE over users who each have products of one noun."""
    rows = [(f"{noun}{user}", f"P{number:03d}") for noun in range(6) for user in range(5)
            for number in range(noun, 120, 6) if (number // 6 + user) % 3 and number != 7]
    histories = user_items([user for user, _ in rows], [item for _, item in rows])
    return FirstStage(fit_recommender(histories, EaseConfig(regularisation=5.0)), "ease")


@dataclass
class Parts:
    """What a local gateway is made of; tests bend single parts."""

    indexes: list[Index]
    encoder: WordEncoder
    delays: dict[int | str, float]      # of a shard by its number, or of "cross", "ranker", "recommender"
    broken: set[int | str]
    reranker: Reranker | None = None
    first: FirstStage | None = None
    events: EventLog | None = None

    def gateway(self, deadline_s: float = 2.0) -> Gateway:
        """A gateway over indexes in this process, one shard each."""
        recommending = None if self.first is None else Recommending(self._recommender(self.first), DEPTH,
                                                                    self._cascade(deadline_s))
        return Gateway([self._shard(number) for number in range(len(self.indexes))], self._encoder_calls(),
                       config=RETRIEVER, index_version=self.indexes[0].version,
                       concerns=self.indexes[0].concerns, deadline_s=deadline_s,
                       cascade=self._cascade(deadline_s), recommending=recommending, events=self.events)

    async def _answers(self, stage: int | str) -> None:
        await asyncio.sleep(self.delays.get(stage, 0))
        if stage in self.broken:
            raise RuntimeError(f"{stage} is broken")

    def _cascade(self, deadline_s: float) -> Cascade | None:
        if self.reranker is None:
            return None
        reranker = self.reranker

        async def score(query: str, texts: list[str]) -> CrossScores:
            await self._answers("cross")
            return score_each(reranker.cross_encoder.score, [(query, texts)])[0]

        async def order(query: str, candidates: Candidates, cross: Floats | None, seen: list[str], explain: bool
                        ) -> Ordered:
            await self._answers("ranker")
            return order_with(reranker, query, candidates, cross, seen, explain)

        cross = None if reranker.config.cross_encoder is None else CrossCalls(score, ready)
        return Cascade(reranker.config, cross, RankerCalls(order, ready), deadline_s)

    def _recommender(self, first: FirstStage) -> RecommenderCalls:
        async def suggest(history: list[str], count: int) -> Suggestion:
            await self._answers("recommender")
            return first.suggest(history, count)

        return RecommenderCalls(suggest, ready)

    def _shard(self, number: int) -> ShardCalls:
        async def answers() -> Index:
            await self._answers(number)
            return self.indexes[number]

        async def search(query: Query, encoding: Encoding | None) -> ShardAnswer:
            return ask_shard(await answers(), query, encoding)

        async def rows(row_ids: Ints) -> pa.Table:
            await self._answers("rows")
            return ask_rows(await answers(), row_ids)

        async def cards(row_ids: Ints, filters: Filters) -> list[Row]:
            return ask_cards(await answers(), row_ids, filters)

        async def product(product_id: str) -> Row | None:
            return (await answers()).product(product_id)

        async def status() -> PartStatus:
            await answers()
            return PartStatus(True)

        return ShardCalls(search, rows, cards, product, status)

    def _encoder_calls(self) -> EncoderCalls:
        async def encode(text: str) -> Encoding | NoEncoding:
            return encode_each(partial(query_encoding, self.encoder, RETRIEVER), [text])[0]  # type: ignore[arg-type]

        return EncoderCalls(encode, encode, ready)


async def ready() -> PartStatus:
    """The status of a part that has loaded."""
    return PartStatus(True)


def open_parts(root: Path) -> Parts:
    """Two shards: the first segment, and the other two."""
    return Parts([open_index(root, segments=SEGMENTS[:1]), open_index(root, segments=SEGMENTS[1:])], WordEncoder(), {},
                 set())


def local_app(parts: Parts, key_sha256: str | None = None, deadline_s: float = 2.0) -> FastAPI:
    """The HTTP application over `parts`."""
    return create_api(parts.gateway(deadline_s), LIMITS, key_sha256)


def client(app: FastAPI) -> httpx.AsyncClient:
    """A client that calls the application without a socket; an unhandled exception becomes a test failure."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop")


def body(**fields: object) -> bytes:
    """A search body; surrogates and non-finite numbers are written as Python's json writes them."""
    return json.dumps({"query": "red sofa", **fields}).encode()


class RealIndex:
    """The small catalogue with vectors of the configured encoder, and the same service in one process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.encoder = build_text_encoder(TextEncoderConfig())
        build_small_index(root, self.encoder, self.encoder.identity)  # type: ignore[arg-type]
        index = open_index(root, encoder_identity=self.encoder.identity)
        self.recommender = Recommender(index, self.encoder, RETRIEVER)


# What must be refused: name -> (method, path, body, expected status, expected field).
Refusal = tuple[str, str, bytes | None, int, str | None]
POST, GET, SEARCH = "POST", "GET", "/v1/search"
REFUSED: dict[str, Refusal] = {
    "no body": (POST, SEARCH, b"", 400, None),
    "broken JSON": (POST, SEARCH, b'{"query": "a"', 400, None),
    "not JSON": (POST, SEARCH, b"query=sofa&k=3", 400, None),
    "invalid UTF-8": (POST, SEARCH, b'{"query": "\xff\xfe"}', 400, None),
    "lone surrogate": (POST, SEARCH, b'{"query": "\\ud800"}', 400, None),
    "reversed surrogates": (POST, SEARCH, b'{"query": "\\udc00\\ud800"}', 400, None),
    "surrogate in a key": (POST, SEARCH, b'{"query": "a", "\\ud800": 1}', 400, None),
    "20,000 nested lists": (POST, SEARCH, b'{"query": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", 400, None),
    # not of searches, which may carry a picture
    "100,000 nested lists": (POST, "/v1/recommend", b"[" * 100_000 + b"]" * 100_000, 413, None),
    "100,000 nested objects": (POST, "/v1/recommend", b'{"query":' * 100_000 + b"1" + b"}" * 100_000, 413, None),
    "a list": (POST, SEARCH, b"[1, 2]", 422, None),
    "a string": (POST, SEARCH, b'"sofa"', 422, None),
    "null": (POST, SEARCH, b"null", 422, None),
    "no query": (POST, SEARCH, b"{}", 422, "query"),
    "query null": (POST, SEARCH, body(query=None), 422, "query"),
    "query a number": (POST, SEARCH, body(query=5), 422, "query"),
    "query empty": (POST, SEARCH, body(query=""), 422, "query"),
    "query of spaces": (POST, SEARCH, body(query=" \t\n\u3000"), 422, "query"),
    "query of an empty tag": (POST, SEARCH, body(query="<br>"), 422, "query"),
    "query of 10,000 characters": (POST, SEARCH, body(query="a" * 10_000), 422, "query"),
    "query with NUL": (POST, SEARCH, body(query="a\0b"), 422, "query"),
    "query that the encoder refuses": (POST, SEARCH, body(query="poison"), 422, "query"),
    "k = 0": (POST, SEARCH, body(k=0), 422, "k"),
    "k negative": (POST, SEARCH, body(k=-1), 422, "k"),
    "k NaN": (POST, SEARCH, b'{"query": "a", "k": NaN}', 422, "k"),
    "k infinite": (POST, SEARCH, b'{"query": "a", "k": Infinity}', 422, "k"),
    "k 1e400": (POST, SEARCH, b'{"query": "a", "k": 1e400}', 422, "k"),
    "k 10^9": (POST, SEARCH, body(k=10**9), 422, None),
    "k of 5,000 digits": (POST, SEARCH, b'{"query": "a", "k": ' + b"9" * 5000 + b"}", 400, None),
    "k a fraction": (POST, SEARCH, body(k=1.5), 422, "k"),
    "k a string": (POST, SEARCH, body(k="5"), 422, "k"),
    "k true": (POST, SEARCH, body(k=True), 422, "k"),
    "k null": (POST, SEARCH, body(k=None), 422, "k"),
    "offset negative": (POST, SEARCH, body(offset=-1), 422, "offset"),
    "offset huge": (POST, SEARCH, body(offset=10**18), 422, None),
    "offset beyond the window": (POST, SEARCH, body(offset=55, k=10), 422, None),
    "unknown sort": (POST, SEARCH, body(sort="newest"), 422, "sort"),
    "unknown key": (POST, SEARCH, body(limit=5), 422, "limit"),
    "key with a newline": (POST, SEARCH, body(**{"a\nb": 5}), 422, None),
    "unknown concern": (POST, SEARCH, body(filters={"concern": ["acne", "spots"]}), 422, "filters.concern"),
    "unknown filter": (POST, SEARCH, body(filters={"colour": ["red"]}), 422, "filters.colour"),
    "filters a list": (POST, SEARCH, body(filters=[]), 422, "filters"),
    "filters null": (POST, SEARCH, body(filters=None), 422, "filters"),
    "category a string": (POST, SEARCH, body(filters={"category": "home"}), 422, "filters.category"),
    "category without values": (POST, SEARCH, body(filters={"category": []}), 422, "filters.category"),
    "category of 51 values": (POST, SEARCH, body(filters={"category": ["a"] * 51}), 422, "filters.category"),
    "category empty": (POST, SEARCH, body(filters={"category": [""]}), 422, "filters.category"),
    "brand too long": (POST, SEARCH, body(filters={"brand": ["a" * 300]}), 422, "filters.brand"),
    "brand with NUL": (POST, SEARCH, body(filters={"brand": ["a\0"]}), 422, "filters.brand"),
    "price negative": (POST, SEARCH, body(filters={"price_min": -1}), 422, "filters.price_min"),
    "price NaN": (POST, SEARCH, b'{"query": "a", "filters": {"price_max": NaN}}', 422, "filters.price_max"),
    "price 1e400": (POST, SEARCH, b'{"query": "a", "filters": {"price_max": 1e400}}', 422, "filters.price_max"),
    "price a string": (POST, SEARCH, body(filters={"price_max": "9"}), 422, "filters.price_max"),
    "prices reversed": (POST, SEARCH, body(filters={"price_min": 9, "price_max": 8}), 422, "filters"),
    "unknown query parameter": (POST, SEARCH + "?k=3", body(), 422, "k"),
    "search by GET": (GET, SEARCH, None, 405, None),
    "unknown path": (GET, "/v2/search", None, 404, None),
    "unknown product": (GET, "/v1/products/P999", None, 404, "product_id"),
    "similar to an unknown product": (GET, "/v1/products/P999/similar", None, 404, "product_id"),
    "no product id": (GET, "/v1/products/", None, 422, "product_id"),
    "product id with NUL": (GET, "/v1/products/a%00b", None, 422, "product_id"),
    "product id of invalid UTF-8": (GET, "/v1/products/%ff%fe", None, 404, "product_id"),
    "product id too long": (GET, "/v1/products/" + "a" * 300, None, 422, "product_id"),
    "similar k = 0": (GET, "/v1/products/P001/similar?k=0", None, 422, "k"),
    "similar k NaN": (GET, "/v1/products/P001/similar?k=NaN", None, 422, "k"),
    "similar k 10^9": (GET, "/v1/products/P001/similar?k=1000000000", None, 422, "k"),
    "similar k of 5,000 digits": (GET, "/v1/products/P001/similar?k=" + "9" * 5000, None, 422, "k"),
    "similar unknown parameter": (GET, "/v1/products/P001/similar?limit=5", None, 422, "limit"),
    "product unknown parameter": (GET, "/v1/products/P001?fields=title", None, 422, "fields"),
}
