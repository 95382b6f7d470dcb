"""Index types against brute force: recall under any filter, k answers whenever k rows match, ties, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from recsys_ray.retrieval.vector_index import TIES, VectorIndex, VectorIndexConfig, VectorIndexError

KINDS = ("flat", "hnsw", "ivf", "sq8", "ivf_pq")
ROWS, DIMENSION, GROUPS, K = 6000, 32, 12, 10
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


def config_of(kind: str, **changes: Any) -> VectorIndexConfig:
    return VectorIndexConfig.model_validate({"kind": kind, "hnsw_neighbours": 16, "hnsw_build_depth": 60, **changes})


def brute_force(vectors: Floats, queries: Floats, k: int, allowed: Mask | None = None) -> list[list[int]]:
    """Positions by score, equal scores by position; in float64, apart from FAISS and from our own scoring."""
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
    count = len(vectors) if allowed is None else int(allowed.sum())
    return [[int(one) for one in np.lexsort((np.arange(len(vectors)), -row))[: min(k, count)]] for row in scores]


def recall(found: npt.NDArray[np.int64], expected: list[list[int]]) -> float:
    return float(np.mean([len({*map(int, a)} & {*b}) / len(b) for a, b in zip(found, expected, strict=True)]))


@pytest.fixture(scope="module")
def grouped() -> tuple[Floats, npt.NDArray[np.int64], Floats]:
    """Unit vectors in groups, as products are in departments; the group of each; queries near single vectors."""
    rng = np.random.default_rng(3)
    group = rng.integers(0, GROUPS, ROWS)
    vectors = rng.normal(size=(GROUPS, DIMENSION))[group] + rng.normal(scale=0.8, size=(ROWS, DIMENSION))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    queries = vectors[rng.choice(ROWS, 60, replace=False)] + rng.normal(scale=0.05, size=(60, DIMENSION))
    return vectors, group, queries.astype(np.float32)


@pytest.fixture(scope="module")
def built(grouped: tuple[Floats, npt.NDArray[np.int64], Floats]) -> dict[str, VectorIndex]:
    return {kind: VectorIndex.build(grouped[0], config_of(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_recall_and_true_scores_without_a_filter(kind: str, built: Any, grouped: Any) -> None:
    vectors, _, queries = grouped
    scores, positions = built[kind].search(queries, K)
    assert scores.dtype == np.float32
    assert positions.dtype == np.int64
    assert recall(positions, brute_force(vectors, queries, K)) >= (1.0 if kind == "flat" else 0.95)
    true = np.take_along_axis(queries @ vectors.T, positions, axis=1)
    np.testing.assert_allclose(scores, true, atol=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()


@pytest.mark.parametrize("share", [0.001, 0.003, 0.01, 0.05, 0.1, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_recall_under_random_filters(kind: str, share: float, built: Any, grouped: Any) -> None:
    vectors, _, queries = grouped
    allowed = np.random.default_rng(5).random(ROWS) < share
    _, positions = built[kind].search(queries, K, allowed)
    assert positions.shape == (len(queries), min(K, int(allowed.sum())))
    assert allowed[positions].all()
    assert recall(positions, brute_force(vectors, queries, K, allowed)) >= 0.95


@pytest.mark.parametrize("groups", [1, 3, 6, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_recall_under_filters_that_follow_the_subject(kind: str, groups: int, built: Any, grouped: Any) -> None:
    """Shoppers who look for a lamp among the books: the allowed rows are far from the query."""
    vectors, group, queries = grouped
    allowed = group < groups
    _, positions = built[kind].search(queries, K, allowed)
    assert allowed[positions].all()
    assert recall(positions, brute_force(vectors, queries, K, allowed)) >= 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_k_answers_whenever_k_rows_match(kind: str, built: Any, grouped: Any) -> None:
    queries = grouped[2]
    for matches in (0, 1, 9, 10, 11, 700):
        allowed = np.zeros(ROWS, dtype=np.bool_)
        allowed[np.random.default_rng(matches).choice(ROWS, matches, replace=False)] = True
        scores, positions = built[kind].search(queries[:7], K, allowed)
        assert scores.shape == positions.shape == (7, min(K, matches))
        assert all(len(set(row)) == len(row) for row in positions.tolist())
        assert positions.size == 0 or positions.min() >= 0
    assert built[kind].search(queries[:2], ROWS + 5)[1].shape == (2, ROWS)
    assert built[kind].search(queries[:2], 0)[1].shape == (2, 0)
    assert built[kind].search(queries[:0], 5)[1].size == 0


@pytest.mark.parametrize("kind", KINDS)
def test_two_builds_answer_alike_and_files_come_back(kind: str, built: Any, grouped: Any, tmp_path: Path) -> None:
    vectors, _, queries = grouped
    again = VectorIndex.build(vectors, config_of(kind))
    paths = tmp_path / "vectors.npy", tmp_path / "vectors.faiss"
    has_index = again.save(*paths)
    assert has_index == (kind != "flat") == paths[1].exists()
    loaded = VectorIndex.load(config_of(kind), paths[0], paths[1] if has_index else None)
    for index in (again, loaded):
        for expected, found in zip(built[kind].search(queries, 20), index.search(queries, 20), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("copies", [TIES, 5 * TIES, 900])
def test_more_equal_rows_than_are_fetched_come_by_position(copies: int) -> None:
    rng = np.random.default_rng(11)
    vectors = rng.normal(size=(1000, 24)).astype(np.float32)
    same = np.sort(rng.choice(1000, copies, replace=False))
    vectors[same] = 3 * np.ones(24, np.float32)
    index = VectorIndex.build(vectors, VectorIndexConfig())
    queries = np.stack([np.ones(24), np.linspace(0.9, 1.1, 24)]).astype(np.float32)
    assert index.search(queries, K)[1].tolist() == [same[:K].tolist()] * 2
    allowed = np.ones(1000, dtype=np.bool_)
    allowed[same[:4]] = False
    assert index.search(queries, K, allowed)[1].tolist() == [same[4: 4 + K].tolist()] * 2


def test_a_score_does_not_depend_on_the_rows_asked_with_it(grouped: Any) -> None:
    vectors, _, queries = grouped
    index = VectorIndex.build(vectors, VectorIndexConfig())
    whole = index.scores(queries[0], np.arange(ROWS))
    rng = np.random.default_rng(1)
    for size in (0, 1, 2, 3, 7, 64, 501):
        some = rng.choice(ROWS, size, replace=False)
        np.testing.assert_array_equal(index.scores(queries[0], some), whole[some])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1, 3, 40])
def test_small_catalogues_are_searched_exactly(kind: str, rows: int) -> None:
    vectors = np.random.default_rng(2).normal(size=(rows, 16)).astype(np.float32)
    index = VectorIndex.build(vectors, config_of(kind))
    queries = np.random.default_rng(3).normal(size=(3, 16)).astype(np.float32)
    assert index.search(queries, 5)[1].tolist() == brute_force(vectors, queries, 5)


def test_what_does_not_fit_is_refused(grouped: Any) -> None:
    vectors = grouped[0][:50]
    index = VectorIndex.build(vectors, VectorIndexConfig())
    good = vectors[:2]
    cases: list[tuple[Any, int, Any, str]] = [
        (good[:, :-1], 3, None, "32 dimensions"), (good[0], 3, None, "32 dimensions"), (good, -1, None, "k is -1"),
        (np.where(np.arange(32) == 4, np.nan, good), 3, None, "not finite"),
        (np.where(np.arange(32) == 4, np.inf, good), 3, None, "not finite"),
        (good, 3, np.ones(49, dtype=np.bool_), "50 rows"), (good, 3, np.ones(50, dtype=np.int8), "one bool"),
    ]
    for queries, k, allowed, message in cases:
        with pytest.raises(VectorIndexError, match=message):
            index.search(queries, k, allowed)
    bad = vectors.copy()
    bad[7, 3] = np.nan
    with pytest.raises(VectorIndexError, match="first at row 7"):
        VectorIndex.build(bad, VectorIndexConfig())
    with pytest.raises(VectorIndexError, match="pq_dimensions is 5"):
        VectorIndex.build(vectors, config_of("ivf_pq", pq_dimensions=5))


def test_files_of_something_else_are_refused(grouped: Any, tmp_path: Path) -> None:
    vectors = grouped[0]
    small, large = (VectorIndex.build(vectors[:rows], config_of("hnsw")) for rows in (900, 1000))
    small.save(tmp_path / "a.npy", tmp_path / "a.faiss")
    large.save(tmp_path / "b.npy", tmp_path / "b.faiss")
    with pytest.raises(VectorIndexError, match=r"a\.faiss.*900 x 32"):
        VectorIndex.load(config_of("hnsw"), tmp_path / "b.npy", tmp_path / "a.faiss")
    np.save(tmp_path / "c.npy", vectors.astype(np.float64))
    with pytest.raises(VectorIndexError, match=r"c\.npy.*float64"):
        VectorIndex.load(config_of("flat"), tmp_path / "c.npy", None)
    (tmp_path / "d.faiss").write_bytes((tmp_path / "a.faiss").read_bytes()[:500])
    with pytest.raises(VectorIndexError, match=r"d\.faiss"):
        VectorIndex.load(config_of("hnsw"), tmp_path / "a.npy", tmp_path / "d.faiss")
