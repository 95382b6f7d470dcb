"""Histories: what is known lies before what is to be found, and no user of valid or test is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_histories import COLD, ITEMS, tastes, write_prepared, write_reranker_histories

from recsys_ray.ranking.histories import PreparedHistories, RerankerHistories, Sequences, read_histories
from recsys_ray.ranking.recommenders import RecommenderError


def test_a_split_by_users_trains_on_none_of_the_asked_and_holds_items_out(tmp_path: Path) -> None:
    write_reranker_histories(tmp_path)
    found, artifact = read_histories(RerankerHistories(path=tmp_path))
    assert artifact.manifest.kind == "reranker_pairs"
    assert not found.timed
    assert (len(found.train), len(found.asked["valid"].known), len(found.asked["test"].known)) == (60, 30, 30)
    assert not {*found.asked["valid"].known.users, *found.asked["test"].known.users} & set(found.train.users)
    everything = tastes(120)
    for split in ("valid", "test"):
        asked = found.asked[split]
        allowed = asked.allowed(found.eligible)
        for row, user in enumerate(asked.known.users):
            known, relevant = set(asked.known.of(row).tolist()), set(asked.relevant[row].tolist())
            assert len(relevant) == 2
            assert known | relevant == set(everything[int(user[1:])])
            assert not known & relevant
            assert allowed[row, list(relevant)].all()
            assert not allowed[row, list(known)].any()
            assert not allowed[row, [20, 21]].any()


def test_a_split_by_time_knows_what_came_before_in_its_order(tmp_path: Path) -> None:
    write_prepared(tmp_path)
    found, _ = read_histories(PreparedHistories(path=tmp_path))
    assert found.timed
    assert len(found.train) == 80       # a review without a user is nobody's
    assert found.items == ITEMS
    for user, items in enumerate(tastes(80)):
        order = np.random.default_rng(user).permutation(items).tolist()
        assert found.train.of(user).tolist() == order[:4]
        assert found.asked["valid"].known.of(user).tolist() == order[:4]
        assert found.asked["valid"].relevant[user].tolist() == order[4:5]
        assert found.asked["test"].known.of(user).tolist() == order[:5]
        assert found.asked["test"].relevant[user].tolist() == order[5:]
    assert not set(found.train.items.tolist()) & {ITEMS.index(one) for one in COLD}


def test_a_low_rating_is_known_and_not_found(tmp_path: Path) -> None:
    write_prepared(tmp_path)
    with pytest.raises(RecommenderError, match="0 users of valid"):
        read_histories(PreparedHistories(path=tmp_path, min_rating=5.5))


def test_sequences_as_a_matrix_and_in_parts() -> None:
    found = Sequences(("a", "b", "c"), np.array([0, 2, 2, 5]), np.array([4, 1, 0, 1, 0]))
    assert found.matrix(5).todense().tolist() == [[0, 1, 0, 0, 1], [0] * 5, [1, 1, 0, 0, 0]]
    part = found.take([2, 0])
    assert (part.users, part.of(0).tolist(), part.of(1).tolist()) == (("c", "a"), [0, 1, 0], [4, 1])
