"""Positives, negatives by policy, caps, splits and the audit, on a small library with a planted popularity."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys_ray.data.interactions import NO_TIME, History, Items, names_item, user_histories
from recsys_ray.data.reranker_pairs import (
    NegativePool,
    PairCounts,
    RerankerPairsConfig,
    UserRows,
    UserSplits,
    audit_page,
    audit_rows,
    count_rows,
    history_rows,
    popularity_auc,
    rows_of,
    user_rows,
    users_in_two_splits,
)
from recsys_ray.schema import INTERACTION, ITEM

BOOKS = 200


def library(eligible: range = range(BOOKS)) -> Items:
    """Book 0 is liked most; a third of the books have a second edition."""
    rows = [{"product_id": f"b{place}", "title": f"Book {place // 3 * 3 if place % 3 == 1 else place}",
             "author": "Someone", "genres": ["war"], "text": f"book {place}", "popularity": 20_000 // (place + 10),
             "eligible": place in eligible} for place in range(BOOKS)]
    return Items(pa.Table.from_pylist(rows, schema=ITEM))


def readers(items: Items, users: int = 300, seed: int = 0, timed: bool = False) -> list[History]:
    """Users whose books are drawn by popularity; the last three of each are shelved to be read."""
    random = np.random.default_rng(seed)
    weights = items.popularity / items.popularity.sum()
    rows: list[dict[str, Any]] = []
    for user in range(users):
        for number, place in enumerate(random.choice(BOOKS, size=12, replace=False, p=weights).tolist()):
            rated = number < 9
            rows.append({"user_id": f"u{user}", "product_id": f"b{place}", "kind": "rating" if rated else "to_read",
                         "rating": float(random.integers(3, 6)) if rated else None,
                         "timestamp_ms": 1000 * number if timed else None})
    return list(user_histories(pa.Table.from_pylist(rows, schema=INTERACTION), items.places))


def made(items: Items, histories: list[History], config: RerankerPairsConfig, mined: list[int] | None = None
         ) -> tuple[list[UserRows], PairCounts]:
    pool, found, users = NegativePool(items, config.popularity_bins), PairCounts(), []
    for history in histories:
        user = user_rows(history, "train", pool, mined or [], config, found.counts)
        if user is not None:
            users.append(user)
            count_rows(user, items, found)
    assert (pool._free == items.eligible).all()     # nothing of a user stays behind
    return users, found


def configured(**changes: Any) -> RerankerPairsConfig:
    return RerankerPairsConfig.model_validate({"min_context": 1, **changes})


@pytest.mark.parametrize("form", ["fixed", "leave_one_out"])
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("policy", ["uniform", "popularity_matched", "mined"])
def test_no_negative_was_met_and_no_context_gives_a_candidate_away(form: str, timed: bool, policy: str) -> None:
    items = library()
    histories = readers(items, 80, timed=timed)
    config = configured(context={"form": form, "titles": 20}, negatives={policy: 3}, min_positives=1)
    users, found = made(items, histories, config, mined=list(range(60)))
    assert len(users) > 40
    for user in users:
        met = {items.title_groups[place] for place in user.history.places.tolist()}
        negatives = [place for some in user.negatives for place, _ in some]
        assert len(set(negatives)) == len(negatives)
        assert not met & {items.title_groups[place] for place in negatives}
        if policy == "mined":
            assert set(negatives) <= set(range(60))
        if form == "fixed":
            assert len(set(user.contexts)) == 1
    audit = {row["name"]: row["value"] for row in audit_rows(found) if row["section"] == "leaks"}
    assert audit == {"candidates named in their own context": 0, "users in more than one split": 0}


def test_policies_see_the_same_users_positives_and_contexts() -> None:
    items = library()
    histories = readers(items, 60)
    made_by = [made(items, histories, configured(negatives={policy: 2}))[0] for policy in ("uniform",
                                                                                          "popularity_matched")]
    assert [(one.history.user_id, one.positives, one.contexts) for one in made_by[0]] == [
        (one.history.user_id, one.positives, one.contexts) for one in made_by[1]]
    assert [one.negatives for one in made_by[0]] != [one.negatives for one in made_by[1]]
    again = made(items, histories[::-1], configured(negatives={"uniform": 2}))[0]
    assert [one.negatives for one in again[::-1]] == [one.negatives for one in made_by[0]]


def test_matched_negatives_leave_popularity_nothing_to_tell_and_uniform_ones_do() -> None:
    """Seeded: 1,500 users give some 4,000 positives, so an AUC of 0.5 has a standard error below 0.01."""
    items = library()
    histories = readers(items, 1500)
    auc = {}
    for policy in ("uniform", "popularity_matched"):
        _, found = made(items, histories, configured(negatives={policy: 3}, min_positives=1, popularity_bins=40))
        auc[policy] = popularity_auc(found.positives["train"], found.negatives["train"])
    assert auc["uniform"] is not None
    assert auc["uniform"] > 0.65
    assert auc["popularity_matched"] == pytest.approx(0.5, abs=0.04)


def test_caps_and_eligible_items() -> None:
    items = library(eligible=range(40, BOOKS))
    histories = readers(items, 200)
    config = configured(max_positives=2, min_positives=2, negatives={"uniform": 1, "popularity_matched": 2})
    users, found = made(items, histories, config)
    assert users
    assert found.counts["users with too few positives"] > 0
    for user in users:
        assert len(user.positives) == 2
        assert all(items.eligible[place] for place in user.positives)
        assert [[origin for _, origin in some] for some in user.negatives] == [
            ["uniform", "popularity_matched", "popularity_matched"]] * 2
        assert all(items.eligible[place] for some in user.negatives for place, _ in some)
        ratings = dict(zip(user.history.places.tolist(), user.history.ratings.tolist(), strict=True))
        assert all(ratings[place] >= 4 for place in user.positives)
    rows = list(rows_of(users[0], items))
    assert len(rows) == 8
    assert [row["label"] for row in rows] == [1, 0, 0, 0] * 2
    assert len({row["query"] for row in rows}) == 1


def test_with_times_the_latest_are_the_positives_and_what_follows_is_held_out() -> None:
    items = library()
    history = readers(items, 1, timed=True)[0]
    user, = made(items, [history], configured(max_positives=1, min_positives=1))[0]
    times = dict(zip(history.places.tolist(), history.times.tolist(), strict=True))
    likes = [place for place, rating in zip(history.places.tolist(), history.ratings.tolist(), strict=True)
             if rating >= 4]
    assert user.positives == [max(likes, key=times.__getitem__)]
    for split, whole in (("train", True), ("test", False)):
        rows = list(history_rows(history, split, user.positives, items))
        assert [row["product_id"] for row in rows if row["held_out"]] == [items.product_ids[user.positives[0]]]
        later = [row for row in rows if row["timestamp_ms"] > times[user.positives[0]]]
        assert bool(later) is whole
        assert (len(rows) == len(history.places)) is whole


def test_what_has_no_time_among_what_has_is_neither_asked_nor_told_nor_a_negative() -> None:
    items = library()
    whole = readers(items, 1, timed=True)[0]
    undated = np.flatnonzero(whole.ratings >= 4)[::2]
    times = whole.times.copy()
    times[undated] = NO_TIME
    history = replace(whole, times=times)
    user, = made(items, [history], configured(max_positives=1, min_positives=1, negatives={"uniform": 40}))[0]
    names = {items.product_ids[place] for place in whole.places[undated]}
    assert names
    assert not set(user.positives) & set(whole.places[undated].tolist())
    assert not {place for place, _ in user.negatives[0]} & set(whole.places[undated].tolist())
    dated = {items.titles[place] for place in whole.places[times != NO_TIME].tolist()}      # editions share titles
    assert not any(names_item(user.contexts[0], items.titles[place], items.authors[place])
                   for place in whole.places[undated].tolist() if items.titles[place] not in dated)
    assert not names & {row["product_id"] for row in history_rows(history, "test", user.positives, items)}
    assert names <= {row["product_id"] for row in history_rows(history, "train", user.positives, items)}


def test_a_short_pool_gives_fewer_and_never_the_same_twice() -> None:
    items = library(eligible=range(6))
    users, _ = made(items, readers(items, 200), configured(min_positives=1, negatives={"popularity_matched": 9},
                                                           popularity_bins=3))
    assert users
    assert all(sum(map(len, user.negatives)) < 6 for user in users)


def test_splits_are_a_function_of_the_user() -> None:
    users = [f"u{number}" for number in range(5000)]
    splits = UserSplits().of(users, 7)
    shares = {split: count / len(users) for split, count in Counter(splits).items()}
    assert shares == pytest.approx({"train": 0.8, "valid": 0.1, "test": 0.1}, abs=0.015)
    assert UserSplits().of(users[::-1], 7)[::-1] == splits
    assert UserSplits().of(users, 8) != splits
    assert users_in_two_splits({"train": ["a", "b", "b"], "test": ["b", "c"]}) == 1


def test_popularity_auc_by_hand() -> None:
    # positives at 5 and 2, negatives at 5, 1, 1: of 6 pairs 4 are right and one is a tie
    assert popularity_auc({5: 1, 2: 1}, {5: 1, 1: 2}) == pytest.approx((4 + 0.5) / 6)
    assert popularity_auc({5: 1}, {}) is None


def test_the_audit_counts_leaks_in_the_texts() -> None:
    items = library()
    user = made(items, readers(items, 5), configured(min_positives=1))[0][0]
    named = f"Likes: {items.titles[user.positives[0]]} by Someone. Genres: war."
    found = PairCounts()
    count_rows(UserRows(user.history, "test", user.positives, [named] * len(user.positives), user.negatives),
               items, found)
    rows = {row["name"]: row["value"] for row in audit_rows(PairCounts.from_json(found.as_json()))}
    assert rows["candidates named in their own context"] >= 1
    assert rows["test: share of positives"] == 0.25
    assert rows["test: negatives of a positive"] == 3
    page = audit_page(audit_rows(found))
    assert "## labels\n\n| | |\n| --- | ---: |\n| test: share of positives | 0.25 |\n" in page
    assert f"\n- {named} | + " in page


def test_contradictions_are_refused() -> None:
    for changes, reason in (({"negatives": {}}, "all 0"), ({"min_positives": 4}, "min_positives"),
                            ({"first_rank": 5, "last_rank": 2}, "last_rank"), ({"max_users": {"dev": 1}}, "max_users"),
                            ({"splits": {"train": 0.9, "valid": 0.2}}, "more than everybody")):
        with pytest.raises(ValueError, match=reason):
            configured(**changes)
