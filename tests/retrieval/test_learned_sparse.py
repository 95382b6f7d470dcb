"""Learned token weights: the inverted index answers as a dictionary for each text, in any division."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recsys_ray.models.token_signals import SparseRows
from recsys_ray.retrieval.learned_sparse import LearnedSparseError, SparsePostings


def random_rows(count: int, seed: int, tokens: int = 60) -> SparseRows:
    rng = np.random.default_rng(seed)
    ids = [np.sort(rng.choice(tokens, rng.integers(0, 9), replace=False)) for _ in range(count)]
    flat = np.concatenate([np.zeros(0, int), *ids]).astype(np.int32)
    offsets = np.cumsum([0, *map(len, ids)]).astype(np.int64)
    return SparseRows(offsets, flat, rng.uniform(0.1, 2, len(flat)).astype(np.float32))


def brute(query: tuple[np.ndarray, np.ndarray], rows: SparseRows) -> list[float]:
    words = dict(zip(query[0].tolist(), query[1].tolist(), strict=True))
    texts = [dict(zip(*(one.tolist() for one in rows.row(i)), strict=True)) for i in range(len(rows))]
    return [sum(words[token] * text[token] for token in words if token in text) for text in texts]


def test_scores_and_search_equal_brute_force() -> None:
    rows, queries = random_rows(300, 1), random_rows(40, 2, tokens=80)
    postings = SparsePostings.build(rows)
    allowed = np.random.default_rng(3).uniform(size=300) < 0.5
    for number in range(len(queries)):
        expected = brute(queries.row(number), rows)
        np.testing.assert_allclose(postings.document_scores(*queries.row(number)), expected, rtol=1e-5)
        for mask in (None, allowed):
            scores, places = postings.search(*queries.row(number), 10, mask)
            candidates = [i for i in range(300) if expected[i] > 0 and (mask is None or mask[i])]
            assert places.tolist() == sorted(candidates, key=lambda i: (-np.float32(round(expected[i], 5)), i))[:10] \
                or np.allclose(scores, sorted((expected[i] for i in candidates), reverse=True)[:10], rtol=1e-5)
            assert set(places.tolist()) <= set(candidates)
            assert len(places) == min(10, len(candidates))


def test_any_division_gives_the_same_bits() -> None:
    rows, queries = random_rows(200, 4), random_rows(20, 5)
    whole = SparsePostings.build(rows)
    owner = np.random.default_rng(6).integers(0, 4, 200)
    for part in range(4):
        places = np.flatnonzero(owner == part)
        segment = SparsePostings.build(rows.take(places))
        for number in range(len(queries)):
            np.testing.assert_array_equal(segment.document_scores(*queries.row(number)),
                                          whole.document_scores(*queries.row(number))[places])


@pytest.mark.parametrize("count", [0, 1, 50])
def test_a_round_trip_keeps_every_text(count: int, tmp_path: Path) -> None:
    rows = random_rows(count, 7)
    SparsePostings.build(rows).save(tmp_path / "sparse.npz")
    again = SparsePostings.load(tmp_path / "sparse.npz")
    assert len(again) == count
    for name in ("offsets", "token_ids", "weights"):
        np.testing.assert_array_equal(getattr(again.rows(), name), getattr(rows, name))
    nothing = again.document_scores(np.zeros(0, np.int32), np.zeros(0, np.float32))
    assert nothing.tolist() == [0.0] * count


@pytest.mark.parametrize("harm", ["torn", "foreign", "offsets", "positions", "missing"])
def test_a_file_that_is_not_one_is_refused(harm: str, tmp_path: Path) -> None:
    path = tmp_path / "sparse.npz"
    postings = SparsePostings.build(random_rows(30, 8))
    postings.save(path)
    arrays = dict(np.load(path))
    if harm == "torn":
        path.write_bytes(path.read_bytes()[:100])
    elif harm == "foreign":
        path.write_bytes(b"no archive")
    else:
        arrays |= {"offsets": {"offsets": arrays["offsets"][:-1]}, "missing": {},
                   "positions": {"positions": arrays["positions"] + 30}}[harm]
        np.savez(path, **{name: array for name, array in arrays.items() if harm != "missing" or name != "weights"})
    with pytest.raises(LearnedSparseError, match=r"sparse\.npz"):
        SparsePostings.load(path)
