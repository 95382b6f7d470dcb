"""Who has what, and what they got next: training histories, and users whose further items are to be found.

With timestamps the split is one of time, the same cut for everybody: known is what lies before it. Without,
users are split: those of valid and test are unknown to the training, and some of their items are held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from recsys_ray.artifacts import Artifact, open_artifact
from recsys_ray.config import Config
from recsys_ray.ranking.recommenders import Matrix, RecommenderError

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Split = Literal["valid", "test"]


class PreparedHistories(Config):
    """Reviews of a prepared shop, split by time."""

    format: Literal["prepared"] = "prepared"
    path: Path                      # artefact of the prepare job
    min_rating: float = 4.0         # of an item that counts as found


class RerankerHistories(Config):
    """The histories behind reranker pairs, split by users; the positives of the pairs are held out."""

    format: Literal["reranker_pairs"] = "reranker_pairs"
    path: Path                      # artefact of the make_reranker_pairs job


HistorySource = Annotated[PreparedHistories | RerankerHistories, Field(discriminator="format")]


@dataclass(frozen=True)
class Sequences:
    """Items of U users, one user after the other: `items[offsets[u]:offsets[u + 1]]`, oldest first where known."""

    users: tuple[str, ...]
    offsets: Ints               # (U + 1,)
    items: Ints                 # places in the catalogue

    def __len__(self) -> int:
        return len(self.users)

    def of(self, user: int) -> Ints:
        """The items of one user."""
        return self.items[self.offsets[user]:self.offsets[user + 1]]

    def matrix(self, items: int) -> Matrix:
        """(U, items), 1 where a user has an item."""
        from scipy.sparse import csr_array

        found = csr_array((np.ones(len(self.items), np.float32), self.items, self.offsets), shape=(len(self), items),
                          copy=True)    # scipy sorts in place, and the order is ours to keep
        found.sum_duplicates()
        found.data[:] = 1.0
        return found

    def take(self, rows: Sequence[int] | Ints) -> Sequences:
        """Some of the users."""
        lists = [self.of(int(row)) for row in rows]
        return Sequences(tuple(self.users[int(row)] for row in rows), _offsets(lists), _joined(lists))


@dataclass(frozen=True)
class Asked:
    """Users to recommend to: what is known of them, what is to be found, what may not be shown."""

    known: Sequences
    relevant: list[Ints]        # of each user, at least one
    seen: list[Ints]            # met already: no candidates

    def allowed(self, eligible: Bools) -> Bools:
        """Which items may be shown to each user, (U, I)."""
        found: Bools = np.broadcast_to(eligible, (len(self.known), len(eligible))).copy()
        for row, items in enumerate(self.seen):
            found[row, items] = False
        return found

    def drawn(self, most: int, seed: int) -> Asked:
        """At most so many of the users, drawn by the seed, in the order they have."""
        if len(self.known) <= most:
            return self
        rows = np.sort(np.random.default_rng(seed).choice(len(self.known), most, replace=False))
        return Asked(self.known.take(rows), [self.relevant[row] for row in rows], [self.seen[row] for row in rows])


@dataclass(frozen=True)
class Histories:
    """A catalogue by place, the histories that may be trained on, and the users asked of each split."""

    items: tuple[str, ...]
    eligible: Bools             # (I,): which items may be recommended
    train: Sequences
    asked: dict[str, Asked]     # valid, test
    timed: bool                 # sequences are in the order of time


def read_histories(source: PreparedHistories | RerankerHistories) -> tuple[Histories, Artifact]:
    """The histories and the artefact they are from. Errors: `RecommenderError` when a split has nobody to ask."""
    artifact = open_artifact(source.path.resolve(), source.format)
    found = _of_reviews(artifact, source.min_rating) if isinstance(source, PreparedHistories) else _of_pairs(artifact)
    for split, asked in found.asked.items():
        if not len(asked.known) or not len(found.train):
            raise RecommenderError(f"{source.path}: {len(found.train)} training histories and {len(asked.known)} users "
                                   f"of {split} with something known and something to be found; more data is needed")
    return found, artifact


# --- split by time --------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Rows:
    """Interactions: place in the catalogue, user, rating, time, split."""

    items: Ints
    users: Ints
    rating: npt.NDArray[np.float64]
    time: Ints
    split: npt.NDArray[Any]
    names: tuple[str, ...]      # of users

    def where(self, mask: Bools) -> _Rows:
        return replace(self, items=self.items[mask], users=self.users[mask], rating=self.rating[mask],
                       time=self.time[mask], split=self.split[mask])

    def sequences(self, users: Ints) -> Sequences:
        """What these users have, by time; an item met twice counts at its first time."""
        mine = self.where(np.isin(self.users, users))
        order = np.lexsort((mine.items, mine.time, mine.users))
        pairs = mine.users[order] * (int(self.items.max(initial=0)) + 1) + mine.items[order]
        first = np.zeros(len(order), dtype=bool)
        first[np.unique(pairs, return_index=True)[1]] = True
        order = order[first]
        bounds = np.searchsorted(mine.users[order], np.append(users, np.iinfo(np.int64).max))
        return Sequences(tuple(self.names[one] for one in users), bounds, mine.items[order])


def _of_reviews(artifact: Artifact, min_rating: float) -> Histories:
    products = pa.concat_tables(artifact.tables("products/", ["product_id"]))
    items = tuple(sorted(products["product_id"].to_pylist()))
    columns = ["user_id", "product_id", "rating", "timestamp_ms", "split"]
    rows = _rows(pa.concat_tables(artifact.tables("reviews/", columns)), items)
    asked = {}
    for split, before in (("valid", ("train",)), ("test", ("train", "valid"))):
        known = rows.where(np.isin(rows.split, before))
        later = rows.where((rows.split == split) & (rows.rating >= min_rating))
        asked[split] = _ask(known, later)
    train = rows.where(rows.split == "train")
    return Histories(items, np.ones(len(items), dtype=bool), train.sequences(np.unique(train.users)), asked, timed=True)


def _ask(known: _Rows, later: _Rows) -> Asked:
    users = np.intersect1d(known.users, later.users)
    before, after = known.sequences(users), later.sequences(users)
    relevant = [np.setdiff1d(after.of(row), before.of(row)) for row in range(len(users))]
    kept = [row for row, items in enumerate(relevant) if len(items)]
    before = before.take(kept)
    return Asked(before, [relevant[row] for row in kept], [before.of(row) for row in range(len(kept))])


# --- split by users -------------------------------------------------------------------------------
def _of_pairs(artifact: Artifact) -> Histories:
    catalogue = artifact.table("items.parquet", ["product_id", "eligible"])
    items = tuple(catalogue["product_id"].to_pylist())
    table = pa.concat_tables(artifact.tables("histories/"))
    rows, held = _rows(table, items), np.asarray(table["held_out"].to_numpy(), dtype=bool)
    train = rows.where(rows.split == "train")
    asked = {}
    for split in ("valid", "test"):
        of_split = rows.split == split
        known, later = rows.where(of_split & ~held), rows.where(of_split & held)
        asked[split] = _ask(known, later)
    timed = table["timestamp_ms"].null_count == 0
    return Histories(items, np.asarray(catalogue["eligible"].to_numpy(), dtype=bool),
                     train.sequences(np.unique(train.users)), asked, timed)


def _rows(table: pa.Table, items: Sequence[str]) -> _Rows:
    """Rows with a user and a known item; a missing time is 0, a missing rating counts as none."""
    names = pc.unique(table["user_id"]).drop_null().sort()
    user = _places(table["user_id"], names)
    item = _places(table["product_id"], pa.array(items, pa.string()))
    found = _Rows(item, user, table["rating"].cast(pa.float64()).fill_null(-np.inf).to_numpy(),
                  table["timestamp_ms"].fill_null(0).to_numpy(), table["split"].to_numpy(), tuple(names.to_pylist()))
    if len(table) and (item < 0).any():
        raise RecommenderError(f"{int((item < 0).sum())} interactions with items that the catalogue lacks")
    return found.where(user >= 0)


def _places(column: Any, values: Any) -> Ints:
    return np.asarray(pc.index_in(column, value_set=values).fill_null(-1).to_numpy(), dtype=np.int64)


def _offsets(lists: Sequence[Ints]) -> Ints:
    return np.cumsum([0, *(len(one) for one in lists)], dtype=np.int64)


def _joined(lists: Sequence[Ints]) -> Ints:
    return np.concatenate(lists) if lists else np.zeros(0, np.int64)
