"""LambdaMART: it learns an order, the same one twice, keeps its feature list, and takes a position's bias off."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from recsys_ray.artifacts import ArtifactError, open_artifact, stage
from recsys_ray.config import Config
from recsys_ray.ranking.features import FAMILIES, FEATURES
from recsys_ray.ranking.gbdt import KIND, MODEL, GbdtConfig, GbdtError, GbdtRanker, Lists, fit, graded, model_text

SMALL = GbdtConfig(rounds=30, leaves=4, min_leaf=5, learning_rate=0.2, feature_fraction=1.0)
SIGNAL, NOISE, BIASED, RANK = (FEATURES.index(name)
                               for name in ("dense_score", "lexical_score", "price", "fused_rank"))


def lists(queries: int, seed: int, size: int = 10, positions: bool = False) -> Lists:
    """Random lists; the candidate with the highest dense score is the relevant one."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(queries * size, len(FEATURES))).astype(np.float32)
    best = features[:, SIGNAL].reshape(queries, size).argmax(axis=1)
    labels = np.zeros((queries, size), np.int64)
    labels[np.arange(queries), best] = 1
    shown = np.tile(np.arange(1, size + 1), queries) if positions else None
    return Lists(features, labels.reshape(-1), np.full(queries, size), shown)


def published(root: Path, text: str, features: tuple[str, ...] = FEATURES, start: float = 0.0) -> Path:
    with stage(root, KIND, "x") as staging:
        (staging.path / MODEL).write_text(text)
        staging.commit([staging.entry(MODEL)], config=Config(), facts={
            "features": list(features), "cross_encoder": None, "concern_model": None, "start": start,
            "trained_with": {"depth": 10, "cross_top": 5}})
    return root


def test_it_learns_the_order_and_names_why(tmp_path: Path) -> None:
    fitted = fit(lists(80, 1), lists(30, 2), SMALL, (0.0, 1.0))
    assert fitted.stop_ndcg > 0.9
    assert 1 <= fitted.rounds <= SMALL.rounds
    ranker = GbdtRanker.load(published(tmp_path, model_text(fitted)))
    new = lists(20, 3)
    scores = ranker.score(new.features).reshape(20, 10)
    assert (scores.argmax(axis=1) == new.labels.reshape(20, 10).argmax(axis=1)).mean() >= 0.8
    assert next(iter(ranker.importance())) == "dense_score"
    added = ranker.contributions(new.features)
    assert added.shape == new.features.shape
    assert np.abs(added).mean(axis=0).argmax() == SIGNAL
    base = ranker.score(new.features) - added.sum(axis=1)
    assert np.ptp(base) < 1e-4      # contributions and one constant add up to the score


def test_the_same_input_gives_the_same_trees() -> None:
    config = SMALL.replace(feature_fraction=0.5, bagging_fraction=0.7)
    texts = {model_text(fit(lists(40, 1), lists(20, 2), config.replace(threads=threads), (0.0, 1.0)))
             .replace(f"[num_threads: {threads}]", "") for threads in (1, 2)}
    assert len(texts) == 1


def test_trees_may_begin_from_the_order_of_retrieval(tmp_path: Path) -> None:
    """With labels that are noise they keep that order; what they were begun from is part of the score."""
    def by_rank(one: Lists) -> Lists:
        one.features[:, RANK] = np.tile(np.arange(1, 11), len(one.sizes))
        return one

    noise = by_rank(lists(6, 1))
    noise.labels[:] = np.random.default_rng(0).permutation(noise.labels)
    config = SMALL.replace(start=5.0, learning_rate=0.001, rounds=3)
    ranker = GbdtRanker.load(published(tmp_path, model_text(fit(noise, noise, config, (0.0, 1.0))), start=5.0))
    new = by_rank(lists(3, 2))
    scores = ranker.score(new.features).reshape(3, 10)
    assert (np.diff(scores, axis=1) < 0).all()
    assert scores[0, 0] - scores[0, 1] == pytest.approx(5 * np.log(2), abs=0.05)
    added = ranker.contributions(new.features)
    assert np.ptp(ranker.score(new.features) - added.sum(axis=1)) < 1e-3
    assert added[1, RANK] == pytest.approx(-5 * np.log(2), abs=0.05)
    with pytest.raises(ValueError, match="start"):
        GbdtConfig(start=1, without=("fused",))


def test_a_family_can_be_left_out() -> None:
    config = SMALL.replace(without=("dense", "cross"))
    ranker = GbdtRanker.of(model_text(fit(lists(40, 1), lists(20, 2), config, (0.0, 1.0))), None, {})
    left_out = [FEATURES.index(name) for family in config.without for name in FAMILIES[family]]
    assert not set(left_out) & set(ranker.columns.tolist())
    assert not ranker.contributions(lists(2, 3).features)[:, left_out].any()


def test_a_constraint_holds() -> None:
    config = SMALL.replace(monotone={"dense_score": -1})
    ranker = GbdtRanker.of(model_text(fit(lists(60, 1), lists(20, 2), config, (0.0, 1.0))), None, {})
    table = np.repeat(lists(1, 5).features[:1], 50, axis=0)
    table[:, SIGNAL] = np.linspace(-4, 4, 50)
    assert (np.diff(ranker.score(table)) <= 1e-12).all()


def test_labels_number_the_gains() -> None:
    labels, gains = graded(np.array([0.1, 1.0, 0.0, 0.01]))
    assert labels.tolist() == [2, 3, 0, 1]
    assert gains == (0, 0.01, 0.1, 1)
    assert graded(np.array([0.0, 1.0]), (0.0, 7.0))[1] == (0.0, 7.0)
    with pytest.raises(GbdtError, match="label_gain"):
        graded(np.array([0.1, 1.0]), (0.0, 1.0))


def test_the_gain_of_a_label_counts() -> None:
    """Two kinds of relevant candidates: which of them comes first is what label_gain says."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(600, len(FEATURES))).astype(np.float32)
    kind = np.tile([1, 2, 0, 0, 0, 0], 100)
    features[:, SIGNAL] = (kind == 1) * 2 + rng.normal(size=600) * 0.1
    features[:, NOISE] = (kind == 2) * 2 + rng.normal(size=600) * 0.1
    some = Lists(features, kind.astype(np.int64), np.full(100, 6))
    for gains, first in (((0.0, 0.1, 1.0), 1), ((0.0, 1.0, 0.1), 0)):
        ranker = GbdtRanker.of(model_text(fit(some, some, SMALL, gains)), None, {})
        assert ranker.score(features[:6]).argmax() == first


def test_positions_take_the_bias_of_a_place_off() -> None:
    """Clicks fall on the first place whatever stands there, and one feature tells the place."""
    rng = np.random.default_rng(4)
    queries, size = 400, 6
    features = rng.normal(size=(queries * size, len(FEATURES))).astype(np.float32)
    shown = np.tile(np.arange(1, size + 1), queries)
    features[:, BIASED] = -shown + rng.normal(size=len(shown)) * 0.05
    examined = rng.random(len(shown)) < 1 / shown
    labels = ((features[:, SIGNAL] > 0.5) & examined).astype(np.int64)
    share = {}
    for positions in (None, shown):
        some = Lists(features, labels, np.full(queries, size), positions)
        importance = GbdtRanker.of(model_text(fit(some, some, SMALL, (0.0, 1.0))), None, {}).importance()
        share[positions is not None] = importance["price"] / importance["dense_score"]
    assert share[True] < share[False] / 2


def test_other_features_are_refused(tmp_path: Path) -> None:
    text = model_text(fit(lists(30, 1), lists(10, 2), SMALL, (0.0, 1.0)))
    with pytest.raises(GbdtError, match="different: new_one"):
        GbdtRanker.load(published(tmp_path / "a", text, (*FEATURES[:-1], "new_one")))
    with pytest.raises(GbdtError, match="their order"):
        GbdtRanker.load(published(tmp_path / "b", text, FEATURES[::-1]))
    with pytest.raises(GbdtError, match="no feature of ours"):
        GbdtRanker.of(text.replace("dense_score", "crawled_stars"), None, {})
    ranker = GbdtRanker.load(published(tmp_path / "c", text))
    with pytest.raises(GbdtError, match="shape"):
        ranker.score(np.zeros((3, 4), np.float32))
    assert ranker.score(np.zeros((0, len(FEATURES)), np.float32)).shape == (0,)


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    root = published(tmp_path, model_text(fit(lists(30, 1), lists(10, 2), SMALL, (0.0, 1.0))))
    path = open_artifact(root, KIND).path / MODEL
    text = path.read_text()
    path.write_text(text.replace("leaf_value=", "leaf_value=-", 1)[: len(text)])
    with pytest.raises(ArtifactError, match="SHA-256"):
        GbdtRanker.load(root)


def test_lists_that_cannot_teach_are_refused() -> None:
    some = lists(5, 1)
    flat = Lists(some.features, np.zeros_like(some.labels), some.sizes)
    assert not flat.telling().any()
    with pytest.raises(GbdtError, match="fit: none of 5"):
        fit(flat, some, SMALL, (0.0, 1.0))
    with pytest.raises(GbdtError, match="labels"):
        Lists(some.features, some.labels[:-1], some.sizes)


def test_a_misspelt_name_fails_before_any_work() -> None:
    for wrong in ({"without": ["denses"]}, {"monotone": {"dens": 1}}):
        with pytest.raises(ValueError, match="no f"):
            GbdtConfig.model_validate(wrong)
    assert json.loads(GbdtConfig().model_dump_json())
