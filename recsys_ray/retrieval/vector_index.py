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
LEVEL = 1e-5                # scores closer than this, relative to the lengths, may only differ by rounding
BALL_SPARE = 1.5            # rows fetched under a filter, times what an even spread of the allowed ones would need
BALL_GROWTH = 4             # when a ball holds too few allowed rows
FILTER_PROBES = 0.35        # of the lists: under a filter as many allowed rows are looked at as without, up to this
BALL_SHARE = 0.05           # of all rows: a larger ball costs more than a scan
TRAIN_ROWS_PER_LIST = 39    # what FAISS asks for
PQ_CENTROIDS = 256
READ_BYTES = 1 << 31        # what one array of a FAISS file may take, unless the file itself is larger


class VectorIndexError(ValueError):
    """Vectors or queries that do not fit the index; the message says what was expected."""


class VectorIndexConfig(Config):
    """Which index, and how hard it searches. Cosine or dot is the encoder's matter: vectors come ready."""

    kind: Literal["flat", "hnsw", "ivf", "sq8", "ivf_pq"] = "flat"
    hnsw_neighbours: int = Field(default=32, ge=2)
    hnsw_build_depth: int = Field(default=200, ge=8)
    hnsw_search_depth: int = Field(default=100, ge=8)
    ivf_lists: int | None = Field(default=None, ge=1)       # None: 4 * sqrt(rows)
    # of the lists, looked into for each query: 0.12 finds 97 % of the ten nearest of 100,000 product texts
    ivf_probe_share: float = Field(default=0.12, gt=0, le=1)
    pq_dimensions: int = Field(default=4, ge=1)             # dimensions a byte stands for
    rescore: int = Field(default=10, ge=1)                  # quantised kinds: candidates per answer scored exactly
    exact_below: float = Field(default=0.1, ge=0, le=1)    # share of allowed rows under which the scan is exact
    build_threads: int = Field(default=1, ge=1)             # more than one: a graph is no longer the same in each run
    seed: int = Field(default=7, ge=0)


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
        if config.kind == "ivf_pq" and vectors.shape[1] % config.pq_dimensions:
            raise VectorIndexError(f"vector.pq_dimensions is {config.pq_dimensions}, of which {vectors.shape[1]} "
                                   "dimensions are no multiple")
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
        vectors = np.load(vectors_path, mmap_mode="r", allow_pickle=False)
        if vectors.ndim != 2 or vectors.dtype != np.float32:
            raise VectorIndexError(f"{vectors_path}: {vectors.dtype} {vectors.shape} where rows of float32 belong")
        index = None if index_path is None else _read(index_path)
        if index is not None and (index.ntotal, index.d) != vectors.shape:
            raise VectorIndexError(f"{index_path}: holds {index.ntotal} x {index.d}, the vectors are {vectors.shape}")
        return cls(config, vectors, index)

    def search(self, queries: Vectors, k: int, allowed: Mask | None = None) -> tuple[Vectors, Positions]:
        """Scores and positions, both (Q, K), of the best allowed vectors, best first, equal scores by position.

        K is `k` or the number of allowed rows, whichever is less: every cell is an answer. Errors:
        `VectorIndexError` for queries or a mask of another shape, NaN, infinity and a negative `k`.
        """
        queries = self._check(queries)
        if k < 0:
            raise VectorIndexError(f"k is {k}; at least 0 is needed")
        if allowed is not None and (allowed.shape != (self.size,) or allowed.dtype != np.bool_):
            raise VectorIndexError(f"a mask of {allowed.dtype} {allowed.shape}; one bool for each of {self.size} rows "
                                   "is needed")
        count = self.size if allowed is None else int(allowed.sum())
        k = min(k, count)
        if k <= 0 or not len(queries):
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        if self._index is None or count < self.config.exact_below * self.size:
            return self._exact(queries, k, allowed, count)
        return self._best(queries, self._approximate(queries, k, allowed, count), k)

    def scores(self, query: Vectors, positions: Positions) -> Vectors:
        """The inner products of one query (D,) with the vectors at `positions`, float32 (P,).

        Computed row by row, so a score does not depend on which other rows are asked for.
        """
        step = max(1, SCAN_CELLS // self.dimension)
        parts = [np.einsum("pd,d->p", self.vectors[positions[start: start + step]], query)
                 for start in range(0, len(positions), step)]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def _check(self, queries: Vectors) -> Vectors:
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise VectorIndexError(f"queries of shape {queries.shape} for vectors of {self.dimension} dimensions")
        if not np.isfinite(queries).all():
            raise VectorIndexError("a query vector is not finite")
        return queries

    def _exact(self, queries: Vectors, k: int, allowed: Mask | None, count: int) -> tuple[Vectors, Positions]:
        fetch = min(k + TIES, count)
        positions = self._scan(queries, fetch, allowed)
        scores, chosen = self._best(queries, positions, k)
        if fetch < count:  # of more equal rows than were fetched, those fetched are any: take them all for such a query
            lowest = np.array([self.scores(query, positions[i, -1:])[0] for i, query in enumerate(queries)])
            margin = LEVEL * np.maximum(1e-30, np.linalg.norm(queries, axis=1) * self._longest(chosen))
            for i in np.flatnonzero(lowest > scores[:, -1] - margin):
                level = self._at_least(queries[i], scores[i, -1] - margin[i], allowed)
                scores[i], chosen[i] = self._best(queries[i][None], level[None], k)
        return scores, chosen

    def _longest(self, positions: Positions) -> Vectors:
        """The length of the last answer's vector for each query, shape (Q,)."""
        return np.asarray(np.linalg.norm(self.vectors[positions[:, -1]], axis=1), dtype=np.float32)

    def _at_least(self, query: Vectors, score: float, allowed: Mask | None) -> Positions:
        step = max(1, SCAN_CELLS // self.dimension)
        parts = [start + np.flatnonzero(self.vectors[start: start + step] @ query >= score)
                 for start in range(0, self.size, step)]
        found = np.concatenate(parts).astype(np.int64)
        return found if allowed is None else found[allowed[found]]

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

    def _approximate(self, queries: Vectors, k: int, allowed: Mask | None, count: int) -> Positions:
        """At least `k` allowed positions a query, (Q, W), padded with -1: from the index, or from a scan.

        A filter is applied to a ball, the nearest rows of all, grown until it holds enough allowed rows:
        then no nearer one can be missing, however the filter lies to the query. (A selector inside a graph
        or over a few lists gives no such sign: with filters that follow the subject it lost up to 40 % of
        the answers.) Where the ball would become a good part of the rows, a scan is cheaper and exact.
        """
        fetch = min(k + TIES, count)
        quantised = self.config.kind in ("sq8", "ivf_pq")
        wanted = min(max(fetch, self.config.rescore * k), count) if quantised else fetch
        if self.config.kind == "sq8":  # looks at every code, so a selector misses nothing
            return self._ask(queries, wanted, allowed)
        needed = k if allowed is None else min(count, 2 * fetch if quantised else fetch)
        ball = wanted if allowed is None else round(BALL_SPARE * wanted * self.size / count)
        positions = np.full((len(queries), wanted), -1, dtype=np.int64)
        open_ones = np.arange(len(queries))
        while len(open_ones) and ball <= BALL_SHARE * self.size:
            found = self._ask(queries[open_ones], ball, None, count / self.size)
            good = found >= 0 if allowed is None else (found >= 0) & allowed[found]
            order = np.argsort(~good, axis=1, kind="stable")[:, :wanted]
            best = np.where(np.take_along_axis(good, order, axis=1), np.take_along_axis(found, order, axis=1), -1)
            done = good.sum(axis=1) >= needed
            positions[open_ones[done]] = best[done]
            open_ones = open_ones[~done]
            ball *= BALL_GROWTH
        if len(open_ones):
            positions[open_ones, :fetch] = self._scan(queries[open_ones], fetch, allowed)
        return positions

    def _ask(self, queries: Vectors, fetch: int, allowed: Mask | None, share: float = 1.0) -> Positions:
        faiss = _faiss()
        assert self._index is not None
        selector = None if allowed is None else faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        _, positions = self._index.search(queries, fetch, params=self._parameters(selector, fetch, share))
        return np.asarray(positions, dtype=np.int64)

    def _parameters(self, selector: Any | None, fetch: int, allowed_share: float) -> Any:
        faiss = _faiss()
        if self.config.kind == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=max(self.config.hnsw_search_depth, round(1.2 * fetch)))
        if self.config.kind in ("ivf", "ivf_pq"):
            lists = int(self._index.nlist)  # type: ignore[union-attr]
            probes = self.config.ivf_probe_share
            probes = max(probes, min(FILTER_PROBES, probes / allowed_share))
            share = max(probes, 8 * fetch / self.size)  # rows looked at, of all
            kind = faiss.IVFPQSearchParameters if self.config.kind == "ivf_pq" else faiss.SearchParametersIVF
            return kind(nprobe=min(lists, max(1, round(lists * share))))
        return faiss.SearchParameters(**({} if selector is None else {"sel": selector}))

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
        for clustering in [index.cp, *([index.pq.cp] if config.kind == "ivf_pq" else [])]:
            clustering.seed, clustering.niter, clustering.max_points_per_centroid = config.seed, 12, 64
    with faiss_threads(config.build_threads):
        index.train(vectors)
        index.add(vectors)
    return index


def _read(path: Path) -> Any:
    """A FAISS index from a verified file; even so, no field of it may ask for much more memory than the file holds."""
    faiss = _faiss()
    before = faiss.get_deserialization_vector_byte_limit()
    faiss.set_deserialization_vector_byte_limit(max(READ_BYTES, 2 * path.stat().st_size))
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise VectorIndexError(f"{path}: not a FAISS index this version reads ({error}); rebuild the index") from None
    finally:
        faiss.set_deserialization_vector_byte_limit(before)


def _ivf(coarse: Any, dimension: int, lists: int, config: VectorIndexConfig, inner: Any) -> Any:
    faiss = _faiss()
    if config.kind == "ivf":
        return faiss.IndexIVFFlat(coarse, dimension, lists, inner)
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
