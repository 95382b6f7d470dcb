"""BM25: equal to bm25s on one corpus, however the texts are divided, filtered or stored."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import bm25s
import numpy as np
import pytest
import Stemmer

from recsys_ray.retrieval.lexical import (
    Bm25Segment,
    LexicalConfig,
    LexicalError,
    LexicalStatistics,
    Postings,
    best_positions,
    build_postings,
    global_statistics,
    term_weights,
)

TEXTS = [
    "Red summer dress with floral print, a dress for the beach", "Blue denim jacket for men", "Red leather shoes",
    "", "the of and", "Summer hat, straw hat, wide brim hat", "Running shoes for men, breathable running shoe",
    "Crème brûlée torch", "Denim dress", "Red red red lipstick", "Shoe rack", "Floral curtains for the living room",
]
QUERIES = ["red dress", "running shoes", "red red shoes", "hat for summer", "crème torch", "floral denim dresses men"]


def segments(texts: list[str], cuts: list[int], config: LexicalConfig) -> list[Bm25Segment]:
    edges = [0, *cuts, len(texts)]
    postings = [build_postings(texts[start:end], config) for start, end in pairwise(edges)]
    statistics = global_statistics(postings)
    return [Bm25Segment(one, statistics, config) for one in postings]


def plain_bm25s(texts: list[str], query: str, config: LexicalConfig) -> np.ndarray:
    stemmer = Stemmer.Stemmer("english") if config.stem else None
    stop_words = "english" if config.remove_stop_words else []
    tokens = bm25s.tokenize(texts, stopwords=stop_words, stemmer=stemmer, show_progress=False)
    engine = bm25s.BM25(k1=config.k1, b=config.b, method=config.method)
    engine.index(tokens, show_progress=False)
    words = bm25s.tokenize(query, stopwords=stop_words, stemmer=stemmer, return_ids=False, show_progress=False)[0]
    return engine.get_scores(words)


@pytest.mark.parametrize("cuts", [[], [5], [1, 4, 9]])
@pytest.mark.parametrize("config", [
    LexicalConfig(), LexicalConfig(stem=False, k1=1.5, b=0.5), LexicalConfig(method="robertson"),
    LexicalConfig(method="robertson", remove_stop_words=False, k1=0.9),
], ids=lambda config: config.method + str(config.k1))
def test_any_division_into_segments_scores_like_one_bm25s_index(cuts: list[int], config: LexicalConfig) -> None:
    parts = segments(TEXTS, cuts, config)
    for query in QUERIES:
        ours = np.concatenate([part.document_scores(query) for part in parts])
        expected = plain_bm25s(TEXTS, query, config)
        assert expected.max() > 0
        np.testing.assert_array_equal(ours, expected)


def test_worked_example() -> None:
    # "shoe" is in texts 2, 6 (twice) and 10 of 12; the length of text 2 is 3 (red leather shoe).
    (segment,) = segments(TEXTS, [], LexicalConfig())
    lengths = [7, 4, 3, 0, 0, 7, 6, 3, 2, 4, 2, 4]
    mean = sum(lengths) / 12
    postings = build_postings(TEXTS, LexicalConfig())
    assert postings.lengths.tolist() == lengths
    idf = np.log(1 + (12 - 3 + 0.5) / (3 + 0.5))
    expected = idf * 1 / (1.2 * (0.25 + 0.75 * 3 / mean) + 1)
    assert segment.document_scores("shoes")[2] == pytest.approx(expected, rel=1e-6)


def test_only_matches_are_hits_best_first_and_ties_by_position() -> None:
    (segment,) = segments(["red hat", "blue", "red hat", "red red hat", "green"], [], LexicalConfig(b=0))
    scores, positions = segment.search("red", k=50)
    assert positions.tolist() == [3, 0, 2]
    assert scores[0] > scores[1] == scores[2] > 0
    assert segment.search("red", k=2)[1].tolist() == [3, 0]
    assert segment.search("red", k=0)[1].tolist() == []


@pytest.mark.parametrize("query", ["", "   ", "the of and", "!!", "zzzunknown", "x" * 10_000])
def test_a_query_without_known_terms_has_no_hits(query: str) -> None:
    (segment,) = segments(TEXTS, [], LexicalConfig())
    scores, positions = segment.search(query, k=5)
    assert len(scores) == len(positions) == 0
    assert positions.dtype == np.int64
    assert segment.scores(query, np.array([0, 1])).tolist() == [0, 0]


def test_a_mask_keeps_scores_and_drops_rows() -> None:
    (segment,) = segments(TEXTS, [], LexicalConfig())
    allowed = np.zeros(len(TEXTS), dtype=bool)
    allowed[[2, 9, 11]] = True
    scores, positions = segment.search("red shoes", k=10, allowed=allowed)
    assert positions.tolist() == [2, 9]
    np.testing.assert_array_equal(scores, segment.scores("red shoes", positions))


def test_deleted_rows_weigh_nothing() -> None:
    alive = np.ones(len(TEXTS), dtype=bool)
    alive[[0, 2, 6]] = False
    config = LexicalConfig()
    postings = build_postings(TEXTS, config)
    statistics = global_statistics([postings], [alive])
    survivors = [text for text, lives in zip(TEXTS, alive, strict=True) if lives]
    fresh = global_statistics([build_postings(survivors, config)])
    assert statistics.terms.equals(fresh.terms)
    assert statistics.average_length == fresh.average_length
    for query in QUERIES:
        ours = Bm25Segment(postings, statistics, config).document_scores(query)[alive]
        np.testing.assert_array_equal(ours, plain_bm25s(survivors, query, config))


def test_best_positions_equals_a_full_sort() -> None:
    rng = np.random.default_rng(3)
    scores = rng.integers(-1, 6, size=500).astype(np.float32)
    for k in (1, 7, 100, 400, 1000):
        expected = [i for i in sorted(range(500), key=lambda i: (-scores[i], i)) if scores[i] > 0][:k]
        values, positions = best_positions(scores, k)
        assert positions.tolist() == expected
        np.testing.assert_array_equal(values, scores[expected])


def test_files_round_trip_and_are_the_same_in_every_run(tmp_path: Path) -> None:
    postings = build_postings(TEXTS, LexicalConfig())
    postings.save(tmp_path / "postings.npz")
    loaded = Postings.load(tmp_path / "postings.npz")
    assert loaded.terms.equals(postings.terms)
    assert postings.terms.to_pylist() == sorted(postings.terms.to_pylist())
    for name in ("offsets", "positions", "counts", "lengths"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(postings, name))
    statistics = global_statistics([postings])
    statistics.save(tmp_path / "lexicon.npz")
    again = LexicalStatistics.load(tmp_path / "lexicon.npz")
    assert (again.documents, again.average_length) == (statistics.documents, statistics.average_length)
    assert again.terms.equals(statistics.terms)
    np.testing.assert_array_equal(again.document_frequencies, statistics.document_frequencies)


def test_postings_without_any_term(tmp_path: Path) -> None:
    postings = build_postings(["", "the"], LexicalConfig())
    postings.save(tmp_path / "postings.npz")
    loaded = Postings.load(tmp_path / "postings.npz")
    segment = Bm25Segment(loaded, global_statistics([loaded]), LexicalConfig())
    assert segment.search("anything", 3)[1].tolist() == []
    assert global_statistics([]).documents == 0


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04torn"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "postings.npz"
    path.write_bytes(content)
    with pytest.raises(LexicalError, match=r"postings\.npz"):
        Postings.load(path)


def test_statistics_are_not_postings(tmp_path: Path) -> None:
    path = tmp_path / "lexicon.npz"
    global_statistics([build_postings(TEXTS, LexicalConfig())]).save(path)
    with pytest.raises(LexicalError, match="offsets"):
        Postings.load(path)


def test_term_weights_are_of_different_known_terms() -> None:
    statistics = global_statistics([build_postings(TEXTS, LexicalConfig())])
    weights = term_weights(["red shoes red unheard-of", "", "denim"], statistics, LexicalConfig())
    red, shoe, denim = (np.log(1 + (12 - n + 0.5) / (n + 0.5)) for n in (3, 3, 2))
    assert sorted(weights[0]) == pytest.approx(sorted([red, shoe]))
    assert weights[1].tolist() == []
    assert weights[2] == pytest.approx([denim])
