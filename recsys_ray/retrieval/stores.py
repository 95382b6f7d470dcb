"""One collection of product vectors in FAISS files, in Chroma or in Pinecone, written and asked alike.

A collection is a table of COLLECTION rows: product id, what can be filtered by, and a vector whose inner product with
a query is the score. Writing an id again replaces it, so a batch may be written any number of times. A product without
a price or a category never meets a condition on it, in any store.
"""

from __future__ import annotations

import os
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from recsys_ray.artifacts import write_table
from recsys_ray.config import Config
from recsys_ray.retrieval.filters import Filters
from recsys_ray.retrieval.vector_index import VectorIndex, VectorIndexConfig

Floats = npt.NDArray[np.float32]
FILTERED = ("category", "brand", "price_cents")
REQUEST_BYTES, REQUEST_ROWS = 1_800_000, 100    # of one request to Pinecone, which takes 2 MB
NUMBER_BYTES, ROW_BYTES = 22, 1500              # of a float in JSON; of an id with its metadata
PLAIN = string.ascii_letters + string.digits + string.punctuation.replace("%", "")    # of an id, sent as it is


class StoreError(ValueError):
    """A store that cannot be reached or used as configured; the message names it and the mend."""


class FaissStoreConfig(Config):
    """Files in a directory, searched by FAISS in this process."""

    kind: Literal["faiss"] = "faiss"
    path: Path
    vector: VectorIndexConfig = VectorIndexConfig()


class ChromaStoreConfig(Config):
    """A collection of an embedded Chroma; needs the `stores` extra."""

    kind: Literal["chroma"]
    path: Path
    collection: str = Field(default="products", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]$")


class PineconeStoreConfig(Config):
    """A namespace of an existing Pinecone index (metric dotproduct, the vectors' dimension); needs the `stores` extra.

    The index's host stands in Pinecone's console. The key comes from the environment.
    """

    kind: Literal["pinecone"]
    host: str
    namespace: str = "products"
    api_key_env: str = "PINECONE_API_KEY"


StoreConfig = Annotated[FaissStoreConfig | ChromaStoreConfig | PineconeStoreConfig, Field(discriminator="kind")]


@dataclass(frozen=True)
class Match:
    """A product in an answer."""

    product_id: str
    score: float


class VectorStore(Protocol):
    """What each store can do."""

    def upsert(self, rows: pa.Table) -> None:
        """Write COLLECTION rows; an id that is there already is replaced."""

    def delete(self, product_ids: Sequence[str]) -> None:
        """Take products out; unknown ids are passed over."""

    def count(self) -> int:
        """Products in the collection."""

    def search(self, vectors: Floats, k: int, filters: Filters | None = None) -> list[list[Match]]:
        """For each query (Q, D) the at most `k` products of the highest inner product, best first."""


def collection_schema(dimension: int) -> pa.Schema:
    """COLLECTION: product_id, category, brand, price_cents, vector."""
    return pa.schema([pa.field("product_id", pa.string(), nullable=False), pa.field("category", pa.string()),
                      pa.field("brand", pa.string()), pa.field("price_cents", pa.int64()),
                      pa.field("vector", pa.list_(pa.float32(), dimension))])


def open_store(config: StoreConfig) -> VectorStore:
    """The store of a configuration; `StoreError` when its package or key is missing."""
    kinds: dict[str, Any] = {"faiss": FaissStore, "chroma": ChromaStore, "pinecone": PineconeStore}
    store: VectorStore = kinds[config.kind](config)
    return store


def conditions(filters: Filters | None) -> dict[str, Any] | None:
    """The filters in the language that Chroma and Pinecone share; None without any."""
    if filters is None or filters.pass_all:
        return None
    if getattr(filters, "concern", None) is not None:
        raise StoreError("concern: a vector store holds no concerns; ask the index of the shop")
    found: list[dict[str, Any]] = [{name: {"$in": list(values)}} for name in ("category", "brand")
                                   if (values := getattr(filters, name)) is not None]
    found += [{"price_cents": {operator: value}} for operator, value in (
        ("$gte", filters.price_min_cents), ("$lte", filters.price_max_cents)) if value is not None]
    return found[0] if len(found) == 1 else {"$and": found}


def _vectors(rows: pa.Table) -> Floats:
    column = rows["vector"].combine_chunks()
    found = column.flatten().to_numpy().reshape(len(rows), -1)
    if not np.isfinite(found).all():
        raise StoreError("a vector is not finite; stores would keep it and never find it")
    return np.asarray(found, np.float32)


def _metadata(rows: pa.Table) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if value is not None}
            for row in rows.select(FILTERED).to_pylist()]


class FaissStore:
    """Batches as Parquet files, of which the later wins; a row without a vector says that its product is gone."""

    def __init__(self, config: FaissStoreConfig) -> None:
        self.config = config
        self._open: tuple[list[str], pa.Table, VectorIndex | None] | None = None

    def upsert(self, rows: pa.Table) -> None:
        """Write COLLECTION rows as one more file."""
        _vectors(rows)
        self._append(rows)

    def delete(self, product_ids: Sequence[str]) -> None:
        """Write one more file that says so."""
        if len(product_ids) and (files := self._files()):
            schema = pq.read_schema(files[0])
            self._append(pa.Table.from_pylist([{"product_id": one} for one in product_ids], schema=schema))

    def count(self) -> int:
        """Products in the collection."""
        return len(self._load()[0])

    def search(self, vectors: Floats, k: int, filters: Filters | None = None) -> list[list[Match]]:
        """The best products of each query; exact unless `vector` says otherwise."""
        conditions(filters)     # refuses what no store can
        ids, rows, index = self._load()
        if index is None:
            return [[] for _ in vectors]
        allowed = None
        if filters is not None and not filters.pass_all:
            allowed = _passing(rows, filters)
        scores, places = index.search(np.asarray(vectors, np.float32), k, allowed)
        return [[Match(ids[place], float(score)) for place, score in zip(*answer, strict=True)]
                for answer in zip(places, scores, strict=True)]

    def compact(self) -> None:
        """One file in place of all: first the new one, which wins; then the old ones go, the oldest first."""
        old = self._files()
        if len(old) > 1:
            rows = self._load()[1]
            self._append(rows)
            for path in old:
                path.unlink()

    def _files(self) -> list[Path]:
        return sorted(self.config.path.glob("[0-9]*.parquet"))

    def _append(self, rows: pa.Table) -> None:
        files = self._files()
        number = int(files[-1].stem) + 1 if files else 0
        write_table(self.config.path, f"{number:09d}.parquet", rows)
        self._open = None

    def _load(self) -> tuple[list[str], pa.Table, VectorIndex | None]:
        if self._open is None:
            tables = [pq.read_table(path) for path in self._files()]
            if not tables:
                return [], collection_schema(1).empty_table(), None
            rows = pa.concat_tables(tables)
            last = {one: place for place, one in enumerate(rows["product_id"].to_pylist())}
            rows = rows.take(pa.array(sorted(last.values()), pa.int64()))
            rows = rows.filter(rows["vector"].is_valid())
            index = VectorIndex.build(_vectors(rows), self.config.vector) if len(rows) else None
            self._open = rows["product_id"].to_pylist(), rows, index
        return self._open


def _passing(rows: pa.Table, filters: Filters) -> npt.NDArray[np.bool_]:
    mask = np.ones(len(rows), bool)
    for name in ("category", "brand"):
        if (values := getattr(filters, name)) is not None:
            mask &= np.isin(np.array(rows[name].to_pylist(), object), list(values))
    price = rows["price_cents"].cast(pa.float64()).to_numpy()       # NaN where there is none, which passes nothing
    if filters.price_min_cents is not None:
        mask &= price >= filters.price_min_cents
    if filters.price_max_cents is not None:
        mask &= price <= filters.price_max_cents
    return mask


class ChromaStore:
    """A collection of an embedded Chroma, by inner product."""

    def __init__(self, config: ChromaStoreConfig) -> None:
        try:
            import chromadb
            from chromadb.config import Settings
        except ImportError:
            raise StoreError("the chromadb package is not installed; install the extra: pip install "
                             "'recsys_ray[stores]'") from None
        config.path.mkdir(parents=True, exist_ok=True)
        client = chromadb.PersistentClient(str(config.path), Settings(anonymized_telemetry=False))
        self._batch = client.get_max_batch_size()
        self._collection: Any = client.get_or_create_collection(
            config.collection, embedding_function=None, configuration={"hnsw": {"space": "ip"}})

    def upsert(self, rows: pa.Table) -> None:
        """Write COLLECTION rows."""
        for start in range(0, len(rows), self._batch):
            some = rows.slice(start, self._batch)
            ids = some["product_id"].to_pylist()
            self._collection.upsert(ids, embeddings=_vectors(some), metadatas=[     # one without any is refused
                {"product_id": one, **known} for one, known in zip(ids, _metadata(some), strict=True)])

    def delete(self, product_ids: Sequence[str]) -> None:
        """Take products out."""
        for start in range(0, len(product_ids), self._batch):
            self._collection.delete(list(product_ids[start:start + self._batch]))

    def count(self) -> int:
        """Products in the collection."""
        return int(self._collection.count())

    def search(self, vectors: Floats, k: int, filters: Filters | None = None) -> list[list[Match]]:
        """The best products of each query by Chroma's graph."""
        wanted = conditions(filters)
        found = self._collection.query(query_embeddings=np.asarray(vectors, np.float32),
                                       n_results=max(1, min(k, self.count())), include=["distances"],
                                       **({} if wanted is None else {"where": wanted}))
        return [[Match(one, 1 - distance) for one, distance in zip(ids, distances, strict=True)]     # of Chroma's "ip"
                for ids, distances in zip(found["ids"], found["distances"], strict=True)]


class PineconeStore:
    """A namespace of a Pinecone index."""

    def __init__(self, config: PineconeStoreConfig) -> None:
        try:
            import pinecone
        except ImportError:
            raise StoreError("the pinecone package is not installed; install the extra: pip install "
                             "'recsys_ray[stores]'") from None
        key = os.environ.get(config.api_key_env)
        if not key:
            raise StoreError(f"{config.host}: no key; set {config.api_key_env}")
        self.config, self._errors = config, pinecone.PineconeError
        self._index: Any = pinecone.Pinecone(api_key=key).index(host=config.host)

    def upsert(self, rows: pa.Table) -> None:
        """Write COLLECTION rows, as many a request as it takes."""
        vectors = _vectors(rows)
        step = max(1, min(REQUEST_ROWS, REQUEST_BYTES // (NUMBER_BYTES * max(1, vectors.shape[1]) + ROW_BYTES)))
        ids, known = rows["product_id"].to_pylist(), _metadata(rows)
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            self._ask("upsert", vectors=[
                {"id": sent_id(one), "values": values.tolist(), "metadata": metadata}
                for one, values, metadata in zip(ids[part], vectors[part], known[part], strict=True)])

    def delete(self, product_ids: Sequence[str]) -> None:
        """Take products out."""
        for start in range(0, len(product_ids), REQUEST_ROWS):
            self._ask("delete", ids=[sent_id(one) for one in product_ids[start:start + REQUEST_ROWS]])

    def count(self) -> int:
        """Products in the namespace, as far as Pinecone has counted them yet."""
        spaces = self._ask("describe_index_stats", namespace=None).namespaces
        return int(spaces[self.config.namespace].vector_count) if self.config.namespace in spaces else 0

    def search(self, vectors: Floats, k: int, filters: Filters | None = None) -> list[list[Match]]:
        """The best products of each query, one request a query."""
        wanted = conditions(filters)
        answers = [self._ask("query", vector=vector.tolist(), top_k=k, **({} if wanted is None else {"filter": wanted}))
                   for vector in np.asarray(vectors, np.float32)]
        return [[Match(unquote(one.id), float(one.score)) for one in answer.matches] for answer in answers]

    def _ask(self, method: str, **arguments: Any) -> Any:
        arguments = {"namespace": self.config.namespace, **arguments}
        try:
            return getattr(self._index, method)(**{name: one for name, one in arguments.items() if one is not None})
        except self._errors as error:
            raise StoreError(f"{self.config.host}, namespace {self.config.namespace}: {method} failed: "
                             f"{type(error).__name__}: {str(error)[:300]}") from None


def sent_id(product_id: str) -> str:
    """A product id in ASCII, as Pinecone wants it; `unquote` reads it back."""
    return quote(product_id, safe=PLAIN)
