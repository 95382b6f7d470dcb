"""Users and their candidates -> (query, text, label) rows for a reranker: positives, negatives by policy, splits.

Which items are a user's positives, and the context, are drawn without a look at the negatives, so the same
users are judged under every policy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from recsys_ray.config import Config
from recsys_ray.data.interactions import (
    NO_TIME,
    Bools,
    ContextConfig,
    History,
    Ints,
    Items,
    context_text,
    draw_order,
    known_before,
    liked,
    names_item,
)
from recsys_ray.ids import row_id, row_ids

SPLITS = ("train", "valid", "test")
POLICIES = ("uniform", "popularity_matched", "mined")
LEAKS = ("candidates named in their own context", "users in more than one split")
_PARTS = 1 << 20        # hashes are turned into shares of so many


class RerankerPairError(ValueError):
    """Input that gives no rows; the message names what is missing."""


class NegativeCounts(Config):
    """Negatives of each positive by policy; drawing many and keeping some of them later would give the same rows."""

    uniform: int = Field(default=0, ge=0)               # of the eligible items
    popularity_matched: int = Field(default=0, ge=0)    # liked by about as many training users as the positive
    mined: int = Field(default=0, ge=0)                 # of the user's candidate lists

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.total:
            raise ValueError("uniform, popularity_matched and mined are all 0: there would be no negatives")
        return self

    @property
    def total(self) -> int:
        """All of them."""
        return self.uniform + self.popularity_matched + self.mined


class UserSplits(Config):
    """Shares of the users; the rest is test."""

    train: float = Field(default=0.8, gt=0, le=1)
    valid: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.train + self.valid > 1:
            raise ValueError(f"train {self.train} and valid {self.valid} are more than everybody")
        return self

    def of(self, user_ids: Sequence[str], seed: int) -> list[str]:
        """The split of each user: a function of the id and the seed, so no user is in two."""
        share = (row_ids(f"{seed}:split:{one}" for one in user_ids) % _PARTS) / _PARTS
        return [SPLITS[int(one >= self.train) + int(one >= self.train + self.valid)] for one in share.tolist()]


class RerankerPairsConfig(Config):
    """What becomes a row."""

    min_rating: float = 4.0                             # of what a user likes
    max_positives: int = Field(default=3, ge=1)         # of a user: more are sampled down to these
    min_positives: int = Field(default=3, ge=1)         # a user with fewer is left out
    min_context: int = Field(default=1, ge=1)           # liked items that a context has at least
    negatives: NegativeCounts = NegativeCounts(popularity_matched=3)
    popularity_bins: int = Field(default=50, ge=1)      # equal numbers of items, by likes of training users
    first_rank: int = Field(default=1, ge=1)            # the window of a candidate list that is mined
    last_rank: int = Field(default=100, ge=1)
    context: ContextConfig = ContextConfig()
    splits: UserSplits = UserSplits()
    max_users: dict[str, int] = Field(default_factory=dict)     # of a split, drawn; a split not named: all
    item_genres: int = Field(default=5, ge=0)           # of an item, by how often it is shelved so
    seed: int = 7

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.min_positives > self.max_positives:
            raise ValueError(f"min_positives {self.min_positives} is more than max_positives {self.max_positives}")
        if self.last_rank < self.first_rank:
            raise ValueError(f"last_rank {self.last_rank} lies before first_rank {self.first_rank}")
        if unknown := set(self.max_users) - set(SPLITS):
            raise ValueError(f"max_users: {sorted(unknown)} are no splits; there are {', '.join(SPLITS)}")
        return self


@dataclass(frozen=True)
class UserRows:
    """A user's candidates: for each positive its place, its context, and (place, policy) of its negatives."""

    history: History
    split: str
    positives: list[int]
    contexts: list[str]
    negatives: list[list[tuple[int, str]]]


@dataclass
class PairCounts:
    """What a bucket gave, added up."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    positives: dict[str, Counter[int]] = field(default_factory=dict)    # split -> popularity -> rows
    negatives: dict[str, Counter[int]] = field(default_factory=dict)

    def add(self, other: PairCounts) -> None:
        """Take in those of another bucket."""
        self.counts.update(other.counts)
        self.examples += other.examples
        for mine, theirs in ((self.positives, other.positives), (self.negatives, other.negatives)):
            for split, rows in theirs.items():
                mine.setdefault(split, Counter()).update(rows)

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"counts": self.counts, "examples": self.examples, "positives": self.positives,
                "negatives": self.negatives}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Back from plain values, whose keys are texts."""
        by_popularity = [{split: Counter({int(one): count for one, count in rows.items()})
                          for split, rows in values[name].items()} for name in ("positives", "negatives")]
        return cls(Counter(values["counts"]), list(values["examples"]), *by_popularity)


# --- positives and contexts -----------------------------------------------------------------------
def choose_positives(history: History, items: Items, config: RerankerPairsConfig) -> tuple[Ints, Ints]:
    """(rows of the history that are positives, rows they were chosen from: all that is liked).

    The latest eligible ones where interactions have times, else by draw; none for a user with too few.
    """
    likes = liked(history, config.min_rating)
    if history.timed:
        likes = likes[history.dated[likes]]
    rows = likes[items.eligible[history.places[likes]]]
    room = len(likes) - config.min_context if config.context.form == "fixed" else len(rows)
    count = min(config.max_positives, len(rows), room)
    if count < config.min_positives:
        return np.zeros(0, np.int64), likes
    draws = draw_order(history.user_id, [items.product_ids[place] for place in history.places[rows]], config.seed)
    order = np.lexsort((draws, -history.times[rows])) if history.timed else np.argsort(draws, kind="stable")
    return np.sort(rows[order[:count]]), likes


def contexts_of(history: History, positives: Ints, likes: Ints, items: Items, config: RerankerPairsConfig
                ) -> list[str | None]:
    """The context of each positive; None where too little is known of the user to have one."""
    if config.context.form == "fixed":
        known = known_before(history, likes, positives, items)
        text = (context_text(history, known, items, config.context, config.seed)
                if len(known) >= config.min_context else None)
        return [text] * len(positives)
    found: list[str | None] = []
    for positive in positives:
        known = known_before(history, likes, np.array([positive]), items)
        found.append(context_text(history, known, items, config.context, config.seed)
                     if len(known) >= config.min_context else None)
    return found


# --- negatives ------------------------------------------------------------------------------------
class NegativePool:
    """The eligible items in order of popularity, in bins of equal size, and which of them are free for a user."""

    def __init__(self, items: Items, bins: int) -> None:
        """Bins are by rank, so that few items are in each even where many are equally unpopular."""
        self.items = items
        eligible = np.flatnonzero(items.eligible)
        self.order = eligible[np.lexsort((eligible, -items.popularity[eligible]))].astype(np.int64)
        self._rank = np.full(len(items.product_ids), -1, dtype=np.int64)
        self._rank[self.order] = np.arange(len(self.order))
        self.edges = np.unique(np.linspace(0, len(self.order), min(bins, max(1, len(self.order))) + 1).astype(np.int64))
        self._by_title = np.argsort(items.title_groups, kind="stable")
        self._titles = items.title_groups[self._by_title]
        self._free = items.eligible.copy()

    @contextmanager
    def free_for(self, history: History) -> Iterator[Bools]:
        """Which items a user has not met, nor another edition of them, (N,); what the block takes is given back."""
        groups = np.unique(self.items.title_groups[history.places])
        starts, ends = np.searchsorted(self._titles, groups), np.searchsorted(self._titles, groups, side="right")
        met = [self._by_title[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        before = self._free
        for places in met:
            before[places] = False
        try:
            yield before
        finally:
            for places in met:
                before[places] = self.items.eligible[places]

    def matched(self, place: int, free: Bools, count: int, random: np.random.Generator) -> list[int]:
        """Up to `count` free items drawn from the bin of an item; when it runs out, from the bins beside it."""
        rank, taken = int(self._rank[place]), list[int]()
        low = high = int(np.searchsorted(self.edges, rank, side="right")) - 1
        last = len(self.edges) - 2
        bins = [low]
        while len(taken) < count and bins:
            pool = np.concatenate([self.order[self.edges[one]:self.edges[one + 1]] for one in bins])
            pool = pool[free[pool]]
            taken += random.permutation(pool)[:count - len(taken)].tolist()
            low, high = low - 1, high + 1
            bins = [one for one in (low, high) if 0 <= one <= last]
        return taken

    def uniform(self, free: Bools, count: int, random: np.random.Generator) -> list[int]:
        """Up to `count` free items, each as likely as any other."""
        for size in (4 * count + 16, len(self.order)):      # almost always the first draw is enough
            drawn = random.choice(self.order, size=min(size, len(self.order)), replace=False)
            found = drawn[free[drawn]]
            if len(found) >= count or size >= len(self.order):
                return found[:count].tolist()  # type: ignore[no-any-return]
        return []


def choose_negatives(history: History, positives: Ints, pool: NegativePool, mined: Sequence[int],
                     config: RerankerPairsConfig) -> list[list[tuple[int, str]]]:
    """(place, policy) of the negatives of each positive, no item twice for one user.

    Never anything the user rated or shelved to read, or another edition of it. `mined` are the user's
    candidates by rank. A short pool gives fewer.
    """
    number = row_id(f"{config.seed}:negatives:{history.user_id}")
    found: list[list[tuple[int, str]]] = [[] for _ in positives]
    with pool.free_for(history) as free:
        for turn, policy in enumerate(POLICIES):
            random, count = np.random.default_rng([number, turn]), getattr(config.negatives, policy)
            for row, positive in enumerate(history.places[positives].tolist() if count else ()):
                if policy == "uniform":
                    drawn = pool.uniform(free, count, random)
                elif policy == "popularity_matched":
                    drawn = pool.matched(positive, free, count, random)
                else:
                    drawn = random.permutation([place for place in mined if free[place]])[:count].tolist()
                free[drawn] = False
                found[row] += [(int(place), policy) for place in drawn]
        taken = [place for negatives in found for place, _ in negatives]
        free[taken] = True
    return found


# --- rows -----------------------------------------------------------------------------------------
def user_rows(history: History, split: str, pool: NegativePool, mined: Sequence[int], config: RerankerPairsConfig,
              counts: Counter[str]) -> UserRows | None:
    """The candidates of one user; None (and counted) for a user who cannot have any."""
    items = pool.items
    positives, likes = choose_positives(history, items, config)
    if not len(positives):
        counts["users with too few positives"] += 1
        return None
    contexts = contexts_of(history, positives, likes, items, config)
    if any(one is None for one in contexts):
        counts["users without a context"] += 1
        return None
    return UserRows(history, split, history.places[positives].tolist(), [one or "" for one in contexts],
                    choose_negatives(history, positives, pool, mined, config))


def rows_of(user: UserRows, items: Items) -> Iterator[dict[str, Any]]:
    """RERANKER_PAIR rows of one user, those of one context together."""
    order = sorted(range(len(user.positives)), key=lambda one: (user.contexts[one], one))
    for at in order:
        for place, origin in [(user.positives[at], "positive"), *user.negatives[at]]:
            yield {"query_id": user.history.user_id, "query": user.contexts[at],
                   "product_id": items.product_ids[place], "text": items.texts[place].as_py(),
                   "label": float(origin == "positive"), "origin": origin, "split": user.split}


def history_rows(history: History, split: str, positives: Sequence[int], items: Items) -> Iterator[dict[str, Any]]:
    """HISTORY rows of one user, the positives held out.

    Of a user who is to be judged nothing later than the first positive is there but the positives.
    """
    held = np.isin(history.places, positives)
    kept = np.ones_like(held)
    if history.timed and held.any() and split != "train":
        kept = held | (history.dated & (history.times < history.times[held].min()))
    for row in np.flatnonzero(kept).tolist():
        rating, time = float(history.ratings[row]), int(history.times[row])
        yield {"user_id": history.user_id, "product_id": items.product_ids[history.places[row]],
               "kind": history.kinds[row], "rating": None if np.isnan(rating) else rating,
               "timestamp_ms": None if time == NO_TIME else time, "held_out": bool(held[row]), "split": split}


# --- the audit ------------------------------------------------------------------------------------
def count_rows(user: UserRows, items: Items, found: PairCounts, examples: int = 1) -> None:
    """Add a user's rows to the counts; the leak is looked for in the texts, not in how they were made."""
    counts, split = found.counts, user.split
    counts[f"{split} users"] += 1
    counts[f"{split} users with {len(user.positives)} positives"] += 1
    right, wrong = (one.setdefault(split, Counter()) for one in (found.positives, found.negatives))
    for positive, context, negatives in zip(user.positives, user.contexts, user.negatives, strict=True):
        counts[f"{split} rows, positive"] += 1
        counts[f"{split} context characters"] += len(context)
        right[int(items.popularity[positive])] += 1
        for place, origin in negatives:
            counts[f"{split} rows, {origin}"] += 1
            wrong[int(items.popularity[place])] += 1
        for place in (positive, *(place for place, _ in negatives)):
            counts[LEAKS[0]] += names_item(context, items.titles[place],
                                                                          items.authors[place])
    if len(found.examples) < examples:
        found.examples.append(f"{user.contexts[0]} | + {items.texts[user.positives[0]].as_py()}" + "".join(
            f" | - ({origin}) {items.texts[place].as_py()}" for place, origin in user.negatives[0][:1]))


def popularity_auc(right: Mapping[int, int], wrong: Mapping[int, int]) -> float | None:
    """The ROC AUC of popularity alone over rows counted by popularity; None without both labels.

    0.5 under popularity-matched negatives: what is above, a model can reach without a look at the user.
    """
    values = sorted({*right, *wrong})
    positives, negatives = (np.array([one.get(value, 0) for value in values], dtype=float) for one in (right, wrong))
    if not positives.sum() or not negatives.sum():
        return None
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + 0.5 * negatives)).sum() / (positives.sum() * negatives.sum()))


def audit_rows(found: PairCounts) -> list[dict[str, Any]]:
    """AUDIT rows: label balance, positives a user, what popularity alone would reach, leaks, examples."""
    counts = found.counts
    rows = [_audit("counts", name, count) for name, count in sorted(counts.items()) if name not in LEAKS]
    for split in SPLITS:
        positive = counts[f"{split} rows, positive"]
        negative = sum(counts[f"{split} rows, {policy}"] for policy in POLICIES)
        if not positive:
            continue
        rows += [_audit("labels", f"{split}: share of positives", positive / (positive + negative)),
                 _audit("labels", f"{split}: negatives of a positive", negative / positive),
                 _audit("users", f"{split}: positives of a user", positive / counts[f"{split} users"]),
                 _audit("users", f"{split}: characters of a context", counts[f"{split} context characters"] / positive)]
        auc = popularity_auc(found.positives[split], found.negatives[split])
        if auc is not None:
            rows.append(_audit("popularity", f"{split}: ROC AUC of popularity alone", auc))
    rows += [_audit("leaks", name, counts[name]) for name in LEAKS]
    return rows + [_audit("examples", f"example {number}", number, text)
                   for number, text in enumerate(found.examples[:5], 1)]


def _audit(section: str, name: str, value: float, note: str | None = None) -> dict[str, Any]:
    return {"section": section, "name": name, "value": float(value), "note": note}


def audit_page(rows: Sequence[Mapping[str, Any]]) -> str:
    """AUDIT rows for a reader, in Markdown: a table for each section, examples as they are."""
    sections: dict[str, list[str]] = {}
    for row in rows:
        lines = sections.setdefault(row["section"], [])
        if row["note"] is not None:
            lines.append(f"- {row['note']}")
            continue
        lines += [] if lines else ["| | |", "| --- | ---: |"]
        lines.append(f"| {row['name']} | {row['value']:,.4g} |" if row["value"] % 1 else
                     f"| {row['name']} | {row['value']:,.0f} |")
    return "\n".join(["# Rows for a reranker", *(line for name, lines in sections.items()
                                                 for line in ("", f"## {name}", "", *lines)), ""])


def users_in_two_splits(users: Mapping[str, Sequence[str]]) -> int:
    """How many of the users written to one split are in another too."""
    seen = Counter(user for names in users.values() for user in set(names))
    return sum(count > 1 for count in seen.values())
