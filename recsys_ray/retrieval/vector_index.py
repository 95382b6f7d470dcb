"""Nearest vectors by inner product: FAISS's index types behind one class, exact wherever they fall short.

The vectors themselves are always kept (float32, memory-mapped), which makes three things possible: an
exact scan when a filter leaves few rows, true scores for quantised indexes, and `k` answers whenever
`k` rows are allowed, even where a graph or an inverted list found fewer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from recsys_ray.config import Config

Vectors = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

TIES = 16                   # fetched beyond k, so that equal scores at the end are cut by position, not by chance
SCAN_CELLS = 1 << 25        # floats of allowed vectors copied at once (128 MB)
TRAIN_ROWS_PER_LIST = 39    # what FAISS asks for
PQ_CENTROIDS = 256


class VectorIndexError(ValueError):
    """Vectors or queries that do not fit the index; the message says what was expected."""


class VectorIndexConfig(Config):
    """Which index, and how hard it searches. Cosine or dot is the encoder's matter: vectors come ready."""

    kind: Literal["flat", "hnsw", "ivf", "sq8", "ivf_pq"] = "flat"
    hnsw_neighbours: int = Field(default=32, ge=2)
    hnsw_build_depth: int = Field(default=200, ge=8)
    hnsw_search_depth: int = Field(default=100, ge=8)
    ivf_lists: int | None = Field(default=None, ge=1)       # None: 4 * sqrt(rows)
    ivf_probe_share: float = Field(default=0.06, gt=0, le=1)    # of the lists, looked into for each query
    pq_dimensions: int = Field(default=4, ge=1)             # dimensions a byte stands for
    rescore: int = Field(default=10, ge=1)                  # quantised kinds: candidates per answer scored exactly
    exact_below: float = Field(default=0.25, ge=0, le=1)    # share of allowed rows under which the scan is exact
    seed: int = 7


class VectorIndex:
    """N vectors of D dimensions and, unless the kind is flat, a FAISS index over them."""

    def __init__(self, config: VectorIndexConfig, vectors: Vectors, index: Any | None) -> None:
        self.config, self.vectors, self._index = config, vectors, index
        self.size, self.dimension = vectors.shape

    @classmethod
    def build(cls, vectors: Vectors, config: VectorIndexConfig) -> VectorIndex:
        """The index of `vectors`, shape (N, D); raises `VectorIndexError` for NaN or infinite values.

        A catalogue too small to train lists or codes is searched exactly, whatever the kind.
        """
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.ndim != 2:
            raise VectorIndexError(f"vectors of shape {vectors.shape}; (rows, dimensions) is needed")
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise VectorIndexError(f"{len(bad)} vectors are not finite, the first at row {bad[0]}")
        return cls(config, vectors, _build(vectors, config))

    def save(self, vectors_path: Path, index_path: Path) -> bool:
        """Write the vectors (.npy) and, if there is one, the FAISS index; returns whether there was one."""
        faiss = _faiss()
        np.save(vectors_path, self.vectors, allow_pickle=False)
        if self._index is not None:
            faiss.write_index(self._index, str(index_path))
        return self._index is not None

    @classmethod
    def load(cls, config: VectorIndexConfig, vectors_path: Path, index_path: Path | None) -> VectorIndex:
        """An index from files whose checksums were verified; the vectors stay on disk until they are read."""
        faiss = _faiss()
        vectors = np.load(vectors_path, mmap_mode="r", allow_pickle=False)
        index = None if index_path is None else faiss.read_index(str(index_path))
        if index is not None and (index.ntotal, index.d) != vectors.shape:
            raise VectorIndexError(f"{index_path}: holds {index.ntotal} x {index.d}, the vectors are {vectors.shape}")
        return cls(config, vectors, index)

    def search(self, queries: Vectors, k: int, allowed: Mask | None = None) -> tuple[Vectors, Positions]:
        """Scores and positions, both (Q, K), of the best allowed vectors, best first, equal scores by position.

        K is `k` or the number of allowed rows, whichever is less: every cell is an answer.
        """
        queries = self._check(queries)
        count = self.size if allowed is None else int(allowed.sum())
        k = min(k, count)
        if k <= 0 or not len(queries):
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        if self._index is None or count < self.config.exact_below * self.size:
            found = self._scan(queries, min(k + TIES, count), allowed)
        else:
            found = self._approximate(queries, min(k + TIES, count), k, allowed, count)
        return self._best(queries, found, k)

    def scores(self, query: Vectors, positions: Positions) -> Vectors:
        """The inner products of one query (D,) with the vectors at `positions`, float32 (P,).

        Computed row by row, so a score does not depend on which other rows are asked for.
        """
        return np.asarray(np.einsum("pd,d->p", self.vectors[positions], query), dtype=np.float32)

    def _check(self, queries: Vectors) -> Vectors:
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise VectorIndexError(f"queries of shape {queries.shape} for vectors of {self.dimension} dimensions")
        if not np.isfinite(queries).all():
            raise VectorIndexError("a query vector is not finite")
        return queries

    def _scan(self, queries: Vectors, k: int, allowed: Mask | None) -> Positions:
        faiss = _faiss()
        rows = None if allowed is None else np.flatnonzero(allowed)
        total = self.size if rows is None else len(rows)
        step = max(k, SCAN_CELLS // self.dimension)
        scores, positions = [], []
        for start in range(0, total, step):
            part = np.arange(start, min(start + step, total)) if rows is None else rows[start: start + step]
            block = self.vectors[start: start + step] if rows is None else self.vectors[part]
            found, places = faiss.knn(queries, np.ascontiguousarray(block), min(k, len(part)),
                                      metric=faiss.METRIC_INNER_PRODUCT)
            scores.append(found)
            positions.append(part[places])
        order = np.argsort(-np.concatenate(scores, axis=1), axis=1, kind="stable")[:, :k]
        return np.take_along_axis(np.concatenate(positions, axis=1), order, axis=1)

    def _approximate(self, queries: Vectors, fetch: int, k: int, allowed: Mask | None, count: int) -> Positions:
        faiss = _faiss()
        assert self._index is not None
        if self.config.kind in ("sq8", "ivf_pq"):
            fetch = min(max(fetch, self.config.rescore * k), count)
        selector = None if allowed is None else faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        _, positions = self._index.search(queries, fetch, params=self._parameters(selector, fetch, count))
        short = np.flatnonzero((positions >= 0).sum(axis=1) < k)
        if len(short):
            positions[short] = self._scan(queries[short], fetch, allowed)
        return np.asarray(positions, dtype=np.int64)

    def _parameters(self, selector: Any | None, fetch: int, count: int) -> Any:
        faiss = _faiss()
        options: dict[str, Any] = {} if selector is None else {"sel": selector}
        effort = self.size / count  # the fewer rows are allowed, the more have to be looked at
        if self.config.kind == "hnsw":
            depth = max(self.config.hnsw_search_depth, fetch)
            return faiss.SearchParametersHNSW(efSearch=int(depth * effort), **options)
        if self.config.kind in ("ivf", "ivf_pq"):
            lists = int(self._index.nlist)
            probes = min(lists, max(1, round(lists * self.config.ivf_probe_share * effort)))
            kind = faiss.IVFPQSearchParameters if self.config.kind == "ivf_pq" else faiss.SearchParametersIVF
            return kind(nprobe=probes, **options)
        return faiss.SearchParameters(**options)

    def _best(self, queries: Vectors, positions: Positions, k: int) -> tuple[Vectors, Positions]:
        scores, chosen = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        for number, query in enumerate(queries):
            found = np.unique(positions[number][positions[number] >= 0])
            values = self.scores(query, found)
            order = np.lexsort((found, -values))[:k]
            scores[number], chosen[number] = values[order], found[order]
        return scores, chosen


def _faiss() -> Any:
    """The library, imported by who needs it; untyped, because its stubs lack half of its interface."""
    import faiss

    return faiss


def _build(vectors: Vectors, config: VectorIndexConfig) -> Any | None:
    faiss = _faiss()
    rows, dimension = vectors.shape
    lists = config.ivf_lists or max(1, round(4 * rows ** 0.5))
    needed = {"ivf": TRAIN_ROWS_PER_LIST * lists if config.ivf_lists else 1000, "ivf_pq": 4 * PQ_CENTROIDS}
    if config.kind == "flat" or rows < needed.get(config.kind, 1):
        return None
    lists = min(lists, max(1, rows // TRAIN_ROWS_PER_LIST))
    inner = faiss.METRIC_INNER_PRODUCT
    if config.kind == "hnsw":
        index = faiss.IndexHNSWFlat(dimension, config.hnsw_neighbours, inner)
        index.hnsw.efConstruction = config.hnsw_build_depth
    elif config.kind == "sq8":
        index = faiss.IndexScalarQuantizer(dimension, faiss.ScalarQuantizer.QT_8bit, inner)
    else:
        coarse = faiss.IndexFlatIP(dimension)
        index = _ivf(coarse, dimension, lists, config, inner)
        index.own_fields = True
        coarse.this.disown()
        index.cp.seed = config.seed
        index.cp.max_points_per_centroid = 64
    index.train(vectors)
    index.add(vectors)
    return index


def _ivf(coarse: Any, dimension: int, lists: int, config: VectorIndexConfig, inner: Any) -> Any:
    faiss = _faiss()
    if config.kind == "ivf":
        return faiss.IndexIVFFlat(coarse, dimension, lists, inner)
    if dimension % config.pq_dimensions:
        raise VectorIndexError(f"vector.pq_dimensions: {dimension} is not a multiple of {config.pq_dimensions}")
    return faiss.IndexIVFPQ(coarse, dimension, lists, dimension // config.pq_dimensions, 8, inner)


@contextmanager
def faiss_threads(count: int) -> Iterator[None]:
    """FAISS with `count` threads inside the block."""
    faiss = _faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
