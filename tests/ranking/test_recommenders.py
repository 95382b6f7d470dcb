"""Recommenders against dense references that share no code with them, and their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recsys_ray.ranking.recommenders import (
    FILES,
    EaseConfig,
    ItemKnnConfig,
    PopularityConfig,
    Recommender,
    RecommenderConfig,
    RecommenderError,
    UserItems,
    ease_weights,
    fit_recommender,
    item_knn_weights,
    user_items,
)

CONFIGS: list[RecommenderConfig] = [PopularityConfig(), ItemKnnConfig(neighbours=3), EaseConfig(regularisation=2.0)]


@pytest.fixture(scope="module")
def histories() -> UserItems:
    generator = np.random.default_rng(3)
    users, items = np.nonzero(generator.random((40, 9)) < 0.3)
    return user_items([f"u{one}" for one in users], [f"i{one}" for one in items])


def dense(histories: UserItems) -> np.ndarray:
    return np.asarray(histories.matrix.todense(), dtype=np.float64)


def test_pairs_count_once_and_given_ids_fix_rows_and_columns() -> None:
    found = user_items(["b", "a", "b", "b", "c"], ["x", "y", "x", "z", "q"], items=["z", "x", "y"],
                       users=["b", "d", "a"])
    assert found.matrix.todense().tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert user_items(["b", "a"], ["x", "y"]).users == ("a", "b")


def test_item_knn_is_the_shrunk_cosine_of_columns_with_the_nearest_of_each_kept(histories: UserItems) -> None:
    rows = dense(histories)
    items = rows.shape[1]
    expected = np.zeros((items, items))
    for i in range(items):
        for j in range(items):
            if i != j:
                both = sum(1 for user in rows if user[i] and user[j])
                expected[i, j] = both / (np.linalg.norm(rows[:, i]) * np.linalg.norm(rows[:, j]) + 1.5)
    full = item_knn_weights(histories.matrix, items, 1.5).todense()
    np.testing.assert_allclose(full, expected, atol=1e-6)
    kept = np.asarray(item_knn_weights(histories.matrix, 3, 1.5).todense())
    for j in range(items):
        third = np.sort(expected[:, j])[-3]
        assert np.count_nonzero(kept[:, j]) == 3
        assert kept[:, j][kept[:, j] > 0].min() == pytest.approx(third, abs=1e-6)


def test_ease_minimises_its_loss_under_a_zero_diagonal(histories: UserItems) -> None:
    """Each column is a ridge regression of the item on the others: solved here one by one."""
    rows, strength = dense(histories), 2.0
    weights = ease_weights(histories.matrix, strength)
    assert not np.diag(weights).any()
    for j in range(rows.shape[1]):
        others = np.delete(np.arange(rows.shape[1]), j)
        x = rows[:, others]
        solved = np.linalg.solve(x.T @ x + strength * np.eye(len(others)), x.T @ rows[:, j])
        np.testing.assert_allclose(weights[others, j], solved, atol=1e-5)


def test_ease_over_part_of_the_items_is_ease_of_their_columns(histories: UserItems) -> None:
    counts = dense(histories).sum(axis=0)
    kept = counts >= 12
    assert 2 < kept.sum() < len(counts)
    found = ease_weights(histories.matrix, 2.0, min_users=12)
    np.testing.assert_allclose(found[np.ix_(kept, kept)], ease_weights(histories.matrix[:, kept], 2.0), rtol=1e-5)
    assert not found[~kept].any()
    assert not found[:, ~kept].any()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_scores_are_sums_over_the_history_and_of_popularity_without_one(
        histories: UserItems, config: RecommenderConfig) -> None:
    model = fit_recommender(histories, config)
    asked = user_items(["a", "a", "c"], ["i1", "i4", "unheard of"], items=model.items, users=["a", "c"])
    scores = model.score(asked.matrix)
    popularity = dense(histories).mean(axis=0)
    np.testing.assert_allclose(scores[1], popularity, rtol=1e-6)
    if model.weights is None:
        np.testing.assert_allclose(scores[0], popularity, rtol=1e-6)
    else:
        weights = model.weights if isinstance(model.weights, np.ndarray) else np.asarray(model.weights.todense())
        np.testing.assert_allclose(scores[0], weights[1] + weights[4], rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_recommendations_are_sorted_leave_the_history_out_and_survive_their_files(
        histories: UserItems, config: RecommenderConfig, tmp_path: Path) -> None:
    model = fit_recommender(histories, config)
    assert model.save(tmp_path) == FILES
    again = Recommender.load(tmp_path)
    for history in ([], ["i1", "unheard of"], ["i0", "i8", "i3"]):
        ids, scores = model.recommend(history, 4)
        assert len(ids) == 4
        assert not set(ids) & set(history)
        assert (np.diff(scores) <= 0).all()
        assert again.recommend(history, 4)[0] == ids
        assert len(model.recommend(history, 100, exclude_seen=False)[0]) == 9
    popular = [f"i{one}" for one in np.argsort(-dense(histories).sum(axis=0), kind="stable")]
    assert model.recommend([], 9)[0] == popular


def test_files_that_do_not_belong_together_are_refused(histories: UserItems, tmp_path: Path) -> None:
    fit_recommender(histories, EaseConfig()).save(tmp_path)
    small = user_items(["a"], ["i1"])
    fit_recommender(small, PopularityConfig()).save(tmp_path / "other")
    (tmp_path / "other" / FILES[0]).replace(tmp_path / FILES[0])
    with pytest.raises(RecommenderError, match="fit the recommender again"):
        Recommender.load(tmp_path)
    (tmp_path / FILES[1]).write_bytes(b"torn")
    with pytest.raises(RecommenderError, match=r"weights\.npz"):
        Recommender.load(tmp_path)


def test_nothing_to_fit_and_histories_over_other_items_are_named(histories: UserItems) -> None:
    with pytest.raises(RecommenderError, match="nothing to fit"):
        fit_recommender(user_items([], []), PopularityConfig())
    with pytest.raises(RecommenderError, match="over 1 items"):
        fit_recommender(histories, PopularityConfig()).score(user_items(["a"], ["i1"]).matrix)
