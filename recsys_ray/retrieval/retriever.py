"""Queries -> CANDIDATE table: clean, encode, search the index, score, rank, a bounded number at a time.

`score_hits` is the one place where a candidate gets its score, offline and in the service.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

from recsys_ray.config import Config
from recsys_ray.data.preprocess import clean_query
from recsys_ray.models.token_signals import Signals
from recsys_ray.retrieval.fusion import FusionConfig, fuse, ranking
from recsys_ray.schema import CANDIDATE

if TYPE_CHECKING:
    from recsys_ray.models.text_encoder import TextEncoder
    from recsys_ray.retrieval.filters import Filters
    from recsys_ray.retrieval.segments import Index, SegmentHits

Mode = Literal["dense", "bm25", "hybrid"]
Floats = npt.NDArray[np.float32]


class RetrieverError(ValueError):
    """A retrieval that cannot be done as configured; the message names the key and the mend."""


class RetrieverConfig(Config):
    """Which retrievers are asked, how deep, and how their scores become one."""

    mode: Mode = "hybrid"
    depth: int = Field(default=200, ge=1)           # candidates that each retriever contributes
    fusion: FusionConfig = FusionConfig()
    chunk_queries: int = Field(default=256, ge=1)   # queries encoded and searched at once: bounds the memory

    @model_validator(mode="after")
    def _deep_enough(self) -> Self:
        if self.mode == "hybrid" and self.fusion.method == "convex" and self.depth < self.fusion.window:
            raise ValueError(f"depth {self.depth} is less than fusion.window {self.fusion.window}: the scores at its "
                             "end would be unknown; raise depth or lower fusion.window")
        return self

    @property
    def asks_signals(self) -> bool:
        """Whether learned token weights or token vectors of the queries are needed."""
        return self.mode == "hybrid" and self.fusion.asks_signals


class Retriever:
    """An index, the encoder of its vectors (None suffices for BM25) and how to ask them."""

    def __init__(self, encoder: TextEncoder | None, index: Index, config: RetrieverConfig) -> None:
        if encoder is None and config.mode != "bm25":
            raise RetrieverError(f"retriever.mode {config.mode!r} needs the encoder of the index; "
                                 "configure encoder, or set retriever.mode to bm25")
        self.encoder, self.index, self.config = encoder, index, config

    def retrieve(self, query_ids: Sequence[str], queries: Sequence[str], k: int,
                 filters: Filters | None = None) -> pa.Table:
        """CANDIDATE rows, at most `k` for each query, in the order of the queries and then of the ranks.

        A query that is empty after cleaning gets none. A score that was not asked for is null.
        """
        if len(query_ids) != len(queries):
            raise RetrieverError(f"{len(query_ids)} query ids for {len(queries)} queries")
        kept = [(one, text) for one, text in zip(query_ids, map(clean_query, queries), strict=True) if text]
        size = self.config.chunk_queries
        tables = [self._chunk(kept[start: start + size], k, filters) for start in range(0, len(kept), size)]
        return pa.concat_tables(tables) if tables else CANDIDATE.empty_table()

    def _encoded(self, texts: Sequence[str]) -> tuple[Floats | None, Signals | None]:
        if self.encoder is None or self.config.mode == "bm25":
            return None, None
        if not self.config.asks_signals:
            return self.encoder.encode_queries(texts), None
        encoding = self.encoder.encode_all_queries(texts)
        return encoding.dense, asked_signals(encoding.signals, self.config)

    def _chunk(self, queries: Sequence[tuple[str, str]], k: int, filters: Filters | None) -> pa.Table:
        texts = [text for _, text in queries]
        mode = self.config.mode
        vectors, signals = self._encoded(texts)
        answers = self.index.search(vectors, texts if mode != "dense" else None, max(self.config.depth, k), filters,
                                    signals)
        return pa.concat_tables([candidate_table(query_id, hits, self.config, k)
                                 for (query_id, _), hits in zip(queries, answers, strict=True)])


def asked_signals(signals: Signals, config: RetrieverConfig) -> Signals | None:
    """Of a query's signals those that the configuration asks the index for; `RetrieverError` when one is missing."""
    if not config.asks_signals:
        return None
    for name, option, found in (("sparse", "sparse", signals.sparse), ("multi", "multi_vector", signals.multi)):
        if getattr(config.fusion, f"{name}_weight") > 0 and found is None:
            raise RetrieverError(f"fusion.{name}_weight is above 0, but the encoder does not give what it weighs; "
                                 f"set encoder.{option} to true, here and for the embeddings")
    return Signals(signals.sparse if config.fusion.sparse_weight > 0 else None,
                   signals.multi if config.fusion.multi_weight > 0 else None)


def score_hits(hits: SegmentHits, config: RetrieverConfig) -> Floats:
    """The score by which the hits of one query are ranked, shape (C,)."""
    if config.mode == "dense":
        return np.asarray(hits.dense_scores, dtype=np.float32)
    if config.mode == "bm25":
        return np.asarray(hits.lexical_scores, dtype=np.float32)
    return fuse(hits.dense_scores, hits.lexical_scores, config.fusion, hits.sparse_scores, hits.multi_scores)


def candidate_table(query_id: str, hits: SegmentHits, config: RetrieverConfig, k: int) -> pa.Table:
    """The at most `k` best hits of one query as CANDIDATE rows, rank 1 first, equal scores by row id."""
    scores = score_hits(hits, config)
    order = ranking(scores, hits.row_ids, k)
    asked = {"dense_score": config.mode != "bm25", "lexical_score": config.mode != "dense"}
    parts = {"dense_score": hits.dense_scores, "lexical_score": hits.lexical_scores,
             "sparse_score": hits.sparse_scores, "multi_score": hits.multi_scores}
    return pa.table({
        "query_id": pa.repeat(pa.scalar(query_id, pa.string()), len(order)),
        "row_id": pa.array(hits.row_ids[order], pa.int64()),
        "product_id": pa.array([hits.product_ids[i] for i in order], pa.string()),
        "rank": pa.array(np.arange(1, len(order) + 1), pa.int32()),
        "score": pa.array(scores[order], pa.float32()),
        **{name: pa.array(scores[order], pa.float32(), from_pandas=True)
           if scores is not None and asked.get(name, True) else pa.nulls(len(order), pa.float32())
           for name, scores in parts.items()},
    }, schema=CANDIDATE)


def refuse_candidates(candidates: pa.Table, fusion: FusionConfig, k: int) -> pa.Table:
    """The CANDIDATE rows of a hybrid retrieval ranked anew under another fusion; all its scores must be there.

    Used to try weights without searching again: exact as far as the candidates reach.
    """
    query_of_row, starts = _groups(candidates)
    dense, lexical = _known_scores(candidates, "dense_score"), _known_scores(candidates, "lexical_score")
    sparse = _known_scores(candidates, "sparse_score") if fusion.sparse_weight > 0 else None
    multi = _known_scores(candidates, "multi_score") if fusion.multi_weight > 0 else None
    row_ids = candidates["row_id"].to_numpy()
    taken, ranks, scores = [], [], []
    for rows in np.split(query_of_row, starts):
        fused = fuse(dense[rows], lexical[rows], fusion, None if sparse is None else sparse[rows],
                     None if multi is None else multi[rows])
        order = ranking(fused, row_ids[rows], k)
        taken.append(rows[order])
        ranks.append(np.arange(1, len(order) + 1))
        scores.append(fused[order])
    table = candidates.take(pa.array(np.concatenate(taken), pa.int64()))
    table = table.set_column(table.column_names.index("rank"), CANDIDATE.field("rank"),
                             pa.array(np.concatenate(ranks), pa.int32()))
    return table.set_column(table.column_names.index("score"), CANDIDATE.field("score"),
                            pa.array(np.concatenate(scores), pa.float32()))


def _groups(candidates: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row numbers query by query, and where each query but the first begins among them."""
    codes = candidates["query_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    return order, np.flatnonzero(np.diff(codes[order])) + 1


def _known_scores(candidates: pa.Table, name: str) -> Floats:
    column = candidates[name]
    if column.null_count == len(column) and len(column):
        raise RetrieverError(f"the candidates have no {name}; retrieve them with retriever.mode hybrid")
    return np.asarray(column.to_numpy(), dtype=np.float32)


