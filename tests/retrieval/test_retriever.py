"""The retriever: what is asked of the index, what each mode's score is, ranks, ties and bounded chunks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys_ray.ids import row_ids
from recsys_ray.retrieval.fusion import FusionConfig, fuse
from recsys_ray.retrieval.lexical import Bm25Segment, LexicalConfig, build_postings, global_statistics
from recsys_ray.retrieval.retriever import (
    Retriever,
    RetrieverConfig,
    RetrieverError,
    refuse_candidates,
)
from recsys_ray.retrieval.segments import SegmentHits
from recsys_ray.schema import CANDIDATE

TEXTS = ["red dress", "red shoes", "blue dress", "green hat", "red red dress", "oak table", "dress", "red dress"]
IDS = [f"p{i}" for i in range(len(TEXTS))]
ROWS = row_ids(IDS)


class LetterEncoder:
    """A vector of letter counts: texts that share letters are near."""

    def encode_queries(self, texts: list[str]) -> np.ndarray:
        counts = np.array([[text.count(letter) for letter in "abcdefghilnorstu"] for text in texts], dtype=np.float32)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


class SmallIndex:
    """The candidates of both lists with both scores, as an index of segments gives them."""

    def __init__(self) -> None:
        postings = build_postings(TEXTS, LexicalConfig())
        self.bm25 = Bm25Segment(postings, global_statistics([postings]), LexicalConfig())
        self.vectors = LetterEncoder().encode_queries(TEXTS)
        self.asked: list[int] = []

    def search(self, query_vectors: Any, query_texts: Any, depth: int, filters: Any,
               signals: Any = None) -> list[SegmentHits]:
        count = len(query_vectors if query_vectors is not None else query_texts)
        self.asked.append(count)
        answers = []
        for number in range(count):
            found: list[int] = []
            dense = np.full(len(TEXTS), np.nan, np.float32)
            lexical = np.zeros(len(TEXTS), np.float32)
            if query_vectors is not None:
                dense = self.vectors @ query_vectors[number]
                found += np.argsort(-dense, kind="stable")[:depth].tolist()
            if query_texts is not None:
                lexical = self.bm25.document_scores(query_texts[number])
                found += self.bm25.search(query_texts[number], depth)[1].tolist()
            rows = np.array(sorted(set(found)), dtype=np.int64)
            if filters is not None:
                rows = rows[[IDS[i] in filters for i in rows]]
            answers.append(SegmentHits(ROWS[rows], [IDS[i] for i in rows], dense[rows], lexical[rows]))
        return answers


def config(mode: str, **changes: Any) -> RetrieverConfig:
    return RetrieverConfig(mode=mode, depth=8, fusion=FusionConfig(window=4), **changes)


def retrieve(mode: str, queries: list[str], k: int = 8, filters: Any = None, **changes: Any) -> pa.Table:
    encoder = None if mode == "bm25" else LetterEncoder()
    ids = [f"q{i}" for i in range(len(queries))]
    return Retriever(encoder, SmallIndex(), config(mode, **changes)).retrieve(ids, queries, k, filters)


def test_bm25_ranks_only_what_matches_and_breaks_ties_by_row_id() -> None:
    table = retrieve("bm25", ["red dress"])
    assert table.schema.equals(CANDIDATE)
    rows = table.to_pylist()
    assert {row["product_id"] for row in rows} == {"p0", "p1", "p2", "p4", "p6", "p7"}
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(a["score"] >= b["score"] for a, b in pairwise(rows))
    tied = [row["row_id"] for row in rows if row["product_id"] in ("p0", "p7")]
    assert tied == sorted(tied)
    assert all(row["dense_score"] is None and row["lexical_score"] == row["score"] for row in rows)


def test_dense_scores_everything_and_asks_for_no_words() -> None:
    rows = retrieve("dense", ["green hat"], k=3).to_pylist()
    assert len(rows) == 3
    assert rows[0]["product_id"] == "p3"
    assert rows[0]["score"] == rows[0]["dense_score"] == pytest.approx(1)
    assert rows[0]["lexical_score"] is None


def test_hybrid_scores_are_the_fusion_of_both() -> None:
    table = retrieve("hybrid", ["red dress"])
    fused = fuse(table["dense_score"].to_numpy(), table["lexical_score"].to_numpy(), FusionConfig(window=4))
    np.testing.assert_array_equal(table["score"].to_numpy(), fused)
    assert (np.diff(fused) <= 0).all()
    assert table.num_rows == len(TEXTS)  # a product without any query word is found by its vector


def test_chunks_bound_what_is_asked_at_once_and_change_nothing() -> None:
    queries = ["red dress", "oak", "", "hat", "blue dress", "  "] * 3
    whole = retrieve("hybrid", queries, chunk_queries=100)
    index = SmallIndex()
    pieces = Retriever(LetterEncoder(), index, config("hybrid", chunk_queries=4)).retrieve(
        [f"q{i}" for i in range(len(queries))], queries, 8)
    assert pieces.equals(whole)
    assert index.asked == [4, 4, 4]
    assert set(whole["query_id"].to_pylist()) == {f"q{i}" for i, text in enumerate(queries) if text.strip()}


def test_filters_reach_the_index() -> None:
    assert set(retrieve("hybrid", ["red dress"], filters={"p1", "p6"})["product_id"].to_pylist()) == {"p1", "p6"}


def test_nothing_asked_is_an_empty_table() -> None:
    assert retrieve("hybrid", []).equals(CANDIDATE.empty_table())
    assert retrieve("hybrid", ["", "\n"]).equals(CANDIDATE.empty_table())
    assert retrieve("bm25", ["zzz"]).num_rows == 0


def test_vectors_need_an_encoder_and_a_window_needs_the_depth() -> None:
    with pytest.raises(RetrieverError, match="needs the encoder"):
        Retriever(None, SmallIndex(), config("hybrid"))
    with pytest.raises(RetrieverError, match="2 query ids for 1"):
        Retriever(None, SmallIndex(), config("bm25")).retrieve(["a", "b"], ["red"], 3)
    with pytest.raises(ValueError, match="raise depth"):
        RetrieverConfig(depth=50)
    assert RetrieverConfig(mode="bm25", depth=50).depth == 50


def test_candidates_fused_anew_equal_a_retrieval_with_that_weight() -> None:
    queries = ["red dress", "green hat", "oak", "dress"]
    other = FusionConfig(window=4, dense_weight=0.9)
    again = refuse_candidates(retrieve("hybrid", queries), other, 3)
    direct = Retriever(LetterEncoder(), SmallIndex(), RetrieverConfig(depth=8, fusion=other)).retrieve(
        [f"q{i}" for i in range(4)], queries, 3)
    assert again.equals(direct)
    assert again["score"].to_pylist() != retrieve("hybrid", queries, k=3)["score"].to_pylist()
    assert refuse_candidates(CANDIDATE.empty_table(), other, 3).num_rows == 0
    with pytest.raises(RetrieverError, match="dense_score"):
        refuse_candidates(retrieve("bm25", queries), other, 3)
