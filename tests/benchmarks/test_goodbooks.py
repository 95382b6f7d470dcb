"""The benchmark's parts: scores on one scale, rows under a policy, a blend that reads no label but through its rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from goodbooks_blend import Blend, BlendConfig, Features, features, fit_blend
from goodbooks_scores import Panel, bm25_scores, cached, ranks, standardised

from recsys_ray.ranking.histories import Sequences

USERS, BOOKS = 60, 40


@pytest.fixture(scope="module")
def panel() -> Panel:
    generator = np.random.default_rng(0)
    drawn = [generator.permutation(BOOKS) for _ in range(USERS)]
    allowed = np.ones((USERS, BOOKS), dtype=bool)
    for user, books in enumerate(drawn):
        allowed[user, books[30:]] = False
    places = {"positive": slice(0, 3), "uniform": slice(3, 12), "popularity_matched": slice(6, 15),
              "mined": slice(12, 21)}
    known = Sequences(tuple(f"u{one}" for one in range(USERS)), np.arange(USERS + 1) * 10,
                      np.concatenate([books[30:] for books in drawn]))
    return Panel(known.users, ["words"] * USERS, known, allowed,
                 {name: [books[place] for books in drawn] for name, place in places.items()})


def test_rows_of_a_policy_are_its_negatives_and_the_positives_by_user(panel: Panel) -> None:
    user, book, label = panel.pairs("uniform")
    assert (np.diff(user) >= 0).all()
    assert len(user) == USERS * 12
    assert label.sum() == USERS * 3
    for row in (0, USERS - 1):
        mine = user == row
        assert set(book[mine & (label == 1)]) == set(panel.rows["positive"][row])
        assert set(book[mine & (label == 0)]) == set(panel.rows["uniform"][row])
    every_user, every_book = panel.union()
    assert len(every_user) == USERS * 21        # uniform and matched share six books
    assert panel.allowed[every_user, every_book].all()


def test_one_scale_and_ranks_look_at_what_may_be_shown() -> None:
    scores = np.array([[1.0, 3.0, 100.0], [5.0, 5.0, 5.0]], np.float32)
    allowed = np.array([[True, True, False], [True, True, True]])
    assert standardised(scores, allowed)[0, :2].tolist() == [-1.0, 1.0]
    assert standardised(scores, allowed)[1].tolist() == [0.0, 0.0, 0.0]
    assert ranks(scores, allowed)[0, :2].tolist() == [0.5, 0.0]


def test_bm25_finds_the_contexts_words() -> None:
    found = bm25_scores(["dragons and castles", "nothing"], ["a castle of dragons", "cooking at home"])
    assert found[0, 0] > found[0, 1] == 0
    assert not found[1].any()


def test_a_blend_learns_which_score_to_follow(panel: Panel) -> None:
    generator = np.random.default_rng(1)
    truth = np.zeros((USERS, BOOKS), np.float32)
    for user, books in enumerate(panel.rows["positive"]):
        truth[user, books] = 1
    noise = generator.normal(size=(2, USERS, BOOKS)).astype(np.float32)
    found = features(panel, {"popularity": noise[0], "good": truth + 0.5 * noise[1]}, {})
    assert set(found.columns) == {"popularity", "good", "good_standardised", "good_rank", "history_length"}
    rows = panel.pairs("uniform")
    blend = fit_blend(found, *rows, BlendConfig(rounds=30, leaves=(4, 7), min_leaf=5))
    share = blend.facts["gain_share"]
    assert sum(share[name] for name in share if name.startswith("good")) > 0.8
    other = panel.pairs("mined")
    scores = blend.score(found, other[0], other[1])
    assert np.mean(scores[other[2] == 1]) > np.mean(scores[other[2] == 0]) + 0.5
    assert isinstance(blend, Blend)


def test_a_feature_list_in_another_order_gives_the_same_scores(panel: Panel) -> None:
    generator = np.random.default_rng(2)
    columns = {name: generator.normal(size=(USERS, BOOKS)).astype(np.float32) for name in "abc"}
    rows = panel.pairs("uniform")
    blend = fit_blend(Features(columns), *rows, BlendConfig(rounds=5, leaves=(4,), min_leaf=5))
    turned = Features(dict(reversed(columns.items())))
    np.testing.assert_array_equal(blend.score(turned, *rows[:2]), blend.score(Features(columns), *rows[:2]))


def test_scores_are_kept_by_what_they_depend_on(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, np.ndarray]:
        made.append(1)
        return {"scores": np.arange(3)}

    for key in ("one", "one", "other"):
        assert cached(tmp_path / "x", key, make)["scores"].tolist() == [0, 1, 2]
    assert len(made) == 2
