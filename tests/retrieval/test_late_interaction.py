"""Late interaction against loops over tokens; vectors that stay in their file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recsys_ray.models.token_signals import MultiVectors
from recsys_ray.retrieval.late_interaction import (
    LateInteractionError,
    load_multi_vectors,
    max_sim,
    save_multi_vectors,
)


def vectors(seed: int, lengths: list[int], dtype: str = "float32") -> MultiVectors:
    flat = np.random.default_rng(seed).normal(size=(sum(lengths), 6))
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    return MultiVectors(np.cumsum([0, *lengths]).astype(np.int64), flat.astype(dtype))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_scores_equal_loops_and_do_not_depend_on_the_company(dtype: str, tmp_path: Path) -> None:
    documents, query = vectors(1, [3, 1, 0, 7, 2, 1], dtype), vectors(2, [4], dtype).vectors
    save_multi_vectors(documents, tmp_path / "o.npy", tmp_path / "v.npy")
    stored = load_multi_vectors(tmp_path / "o.npy", tmp_path / "v.npy")
    assert isinstance(stored.vectors, np.memmap)
    assert stored.vectors.dtype == np.dtype(dtype)
    places = np.array([4, 0, 2, 3, 0])
    found = max_sim(query, stored, places)
    for place, score in zip(places, found, strict=True):
        own = documents.row(int(place)).astype(float)
        if not len(own):
            assert np.isnan(score)
            continue
        expected = sum(max(float(q @ d) for d in own) for q in query.astype(float)) / len(query)
        assert score == pytest.approx(expected, abs=1e-5)
        assert max_sim(query, stored, np.array([place]))[0] == score
    assert max_sim(query, stored, np.zeros(0, np.int64)).shape == (0,)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    documents = vectors(1, [3, 2])
    for query in (np.zeros((2, 5)), np.zeros((0, 6)), np.zeros(6)):
        with pytest.raises(LateInteractionError, match="query vectors of shape"):
            max_sim(query, documents, np.array([0]))
    save_multi_vectors(documents, tmp_path / "o.npy", tmp_path / "v.npy")
    for offsets in (np.array([0, 3]), np.array([0, 6, 5]), np.array([], np.int64), np.array([0.0, 5.0])):
        np.save(tmp_path / "bad.npy", offsets)
        with pytest.raises(LateInteractionError, match=r"v\.npy.*does not fit"):
            load_multi_vectors(tmp_path / "bad.npy", tmp_path / "v.npy")
    (tmp_path / "v.npy").write_bytes(b"\x93NUMPY torn")
    with pytest.raises(LateInteractionError, match="not a file"):
        load_multi_vectors(tmp_path / "o.npy", tmp_path / "v.npy")


def test_texts_without_vectors_can_be_stored(tmp_path: Path) -> None:
    save_multi_vectors(vectors(1, [0, 0], "float16"), tmp_path / "o.npy", tmp_path / "v.npy")
    stored = load_multi_vectors(tmp_path / "o.npy", tmp_path / "v.npy")
    assert np.isnan(max_sim(vectors(2, [2]).vectors, stored, np.array([0, 1]))).all()
