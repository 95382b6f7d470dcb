"""Pairs of garments that look alike, more or less, and pairs that must not be taken for each other.

Alike: `strong_group` (views of one product) and `strong_attributes` (one kind, `strong_agree` equal attributes),
`medium` (kind and material), `weak` (kind and a pattern, neckline or sleeve). Not alike: `hard_material`,
`hard_neckline` and `hard_pattern` (one kind, near in the current vectors, and this attribute wrong), `easy` (another
kind). "graphic" is no kind. Unless told otherwise, what is known of a pair that is alike never contradicts: a positive
pair with two necklines would unlearn what the hard negatives teach.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

from recsys_ray.config import Config
from recsys_ray.data.attributes import value_of
from recsys_ray.schema import ATTRIBUTE_PAIR, ATTRIBUTE_PAIR_KINDS

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Vectors = npt.NDArray[np.float32]
LOOKS = ("material", "pattern", "neckline", "sleeve")
DESIGN = ("pattern", "neckline", "sleeve")
POSITIVE = ("strong_group", "strong_attributes", "medium", "weak")
ROUNDS = 40             # of drawing; a kind that is exhausted ends earlier
CELLS = 1 << 22         # similarities held at once


class AttributePairError(ValueError):
    """Attributes of which no pairs can be made, or a pair that is not what its kind says."""


class PairMix(Config):
    """Shares of the kinds of pairs."""

    strong: float = Field(default=0.35, ge=0, le=1)
    medium: float = Field(default=0.20, ge=0, le=1)
    weak: float = Field(default=0.10, ge=0, le=1)
    hard: float = Field(default=0.30, ge=0, le=1)
    easy: float = Field(default=0.05, ge=0, le=1)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if abs(sum(self.model_dump().values()) - 1) > 1e-6:
            raise ValueError(f"shares add up to {sum(self.model_dump().values()):g}, they must add up to 1")
        return self


class PairConfig(Config):
    """How many pairs of which kind, and what makes one."""

    pairs: int = Field(default=50_000, ge=1)            # of all splits together
    mix: PairMix = PairMix()
    strong_agree: int = Field(default=3, ge=1, le=4)    # of material, pattern, neckline and sleeve
    min_group_confidence: float = Field(default=0.6, ge=0, le=1)    # of a group whose members are positives
    contradictions: Literal["left_out", "kept"] = "left_out"        # in medium and weak pairs
    hard: tuple[Literal["material", "neckline", "pattern"], ...] = Field(
        default=("material", "neckline", "pattern"), min_length=1)
    neighbours: int = Field(default=100, ge=1)          # of an anchor, within its kind, that are looked at
    max_anchors: int = Field(default=10_000, ge=1)      # that are mined for
    max_similarity: float = Field(default=0.995, gt=0, le=1)        # nearer: likely the same product under two ids
    seed: int = 7


@dataclass(frozen=True)
class Table:
    """ATTRIBUTE_ROW rows as numbers; -1: not known."""

    ids: list[str]
    category: Ints          # by `category_of`
    looks: Ints             # (N, 4): LOOKS
    group: Ints             # -1: stands alone
    sure: Bools             # the group is sure enough for positives

    @classmethod
    def of(cls, rows: pa.Table, min_group_confidence: float) -> Table:
        """The numbers of rows."""
        read = rows.to_pylist()
        looks = np.stack([_codes([row[name] for row in read]) for name in LOOKS], axis=1)
        return cls([row["product_id"] for row in read], _codes([value_of(row, "category2") for row in read]), looks,
                   _codes([row["group_key"] for row in read]),
                   np.array([(row["group_confidence"] or 0) >= min_group_confidence for row in read], dtype=bool))

    def __len__(self) -> int:
        return len(self.ids)

    def same_category(self, one: Ints, other: Ints) -> Bools:
        """Of one known kind."""
        return np.asarray((self.category[one] == self.category[other]) & (self.category[one] >= 0))

    def same_group(self, one: Ints, other: Ints) -> Bools:
        """Of one group, sure or not."""
        return np.asarray((self.group[one] == self.group[other]) & (self.group[one] >= 0))

    def agree(self, one: Ints, other: Ints) -> Bools:
        """Which of LOOKS are known and equal, (P, 4)."""
        return np.asarray((self.looks[one] == self.looks[other]) & (self.looks[one] >= 0))

    def contradict(self, one: Ints, other: Ints) -> Bools:
        """Which of LOOKS are known of both and differ, (P, 4)."""
        first, second = self.looks[one], self.looks[other]
        return np.asarray((first != second) & (first >= 0) & (second >= 0))


def _codes(values: Sequence[str | None]) -> Ints:
    numbers: dict[str, int] = {}
    return np.array([-1 if one is None else numbers.setdefault(one, len(numbers)) for one in values], dtype=np.int64)


# --- what each kind is ----------------------------------------------------------------------------
def holds(kind: str, table: Table, one: Ints, other: Ints, config: PairConfig) -> Bools:
    """Which pairs (P,) are what `kind` says; every kind excludes the surer ones before it."""
    category, group = table.same_category(one, other), table.same_group(one, other)
    agree, contradict = table.agree(one, other), table.contradict(one, other)
    clear = ~contradict.any(axis=1)
    strong = category & (agree.sum(axis=1) >= config.strong_agree) & clear
    usable = category & ~strong & (clear | (config.contradictions == "kept"))
    material = agree[:, LOOKS.index("material")]
    known = (table.category[one] >= 0) & (table.category[other] >= 0)
    told = {"strong_group": group & table.sure[one] & table.sure[other], "strong_attributes": strong,
            "medium": usable & material, "easy": known & ~category,
            "weak": usable & ~material & agree[:, [LOOKS.index(name) for name in DESIGN]].any(axis=1)}
    if kind.startswith("hard_"):
        told[kind] = category & contradict[:, LOOKS.index(kind.removeprefix("hard_"))]
    found: Bools = told[kind] & (one != other) & (~group | (kind == "strong_group"))
    return found


def _keys(kind: str, table: Table, config: PairConfig) -> list[Ints]:
    """Numbers that the two of a pair share, (N,) each, -1 where there is none: pairs are drawn within them."""
    if kind == "strong_group":
        return [np.where(table.sure, table.group, -1)]
    if kind == "easy":
        return [np.where(table.category >= 0, 0, -1)]
    together: list[tuple[str, ...]] = [(name,) for name in DESIGN]     # weak
    if kind != "weak":
        together = list(combinations(LOOKS, config.strong_agree)) if kind == "strong_attributes" else [("material",)]
    return [_joined([table.category, *(table.looks[:, LOOKS.index(name)] for name in names)]) for names in together]


def _joined(columns: Sequence[Ints]) -> Ints:
    """One number for each combination of known values; -1 where one of them is not known."""
    stacked = np.stack(columns, axis=1)
    known = (stacked >= 0).all(axis=1)
    codes = np.full(len(stacked), -1, dtype=np.int64)
    if known.any():
        codes[known] = np.unique(stacked[known], axis=0, return_inverse=True)[1].reshape(-1)
    return codes


# --- drawing --------------------------------------------------------------------------------------
class _Taken:
    """Pairs that were made, whichever way round."""

    def __init__(self) -> None:
        self.pairs: set[tuple[int, int]] = set()

    def add(self, one: int, other: int) -> bool:
        """Whether the pair is new; it is taken from now on."""
        pair = (min(one, other), max(one, other))
        new = pair not in self.pairs
        self.pairs.add(pair)
        return new


def _draw(kind: str, wanted: int, table: Table, config: PairConfig, taken: _Taken, random: np.random.Generator
          ) -> list[tuple[int, int]]:
    """Up to `wanted` pairs: an anchor at random among products that share a key with another, then one of those."""
    shelves = [one for one in (_Shelf.of(key) for key in _keys(kind, table, config)) if one is not None]
    found: list[tuple[int, int]] = []
    idle = 0
    for turn in range(ROUNDS * len(shelves)):
        if len(found) >= wanted or idle >= 4 * len(shelves):
            break
        one, other = shelves[turn % len(shelves)].draw(min(2 * (wanted - len(found)) + 64, 200_000), random)
        valid = holds(kind, table, one, other, config)
        before = len(found)
        for pair in zip(one[valid].tolist(), other[valid].tolist(), strict=True):
            if len(found) < wanted and taken.add(*pair):
                found.append(pair)
        idle = 0 if len(found) > before else idle + 1
    return found


@dataclass(frozen=True)
class _Shelf:
    """Products by a key that two or more share."""

    members: Ints       # by key
    first: Ints         # of each member, where its key begins
    size: Ints          # of each member, how many have its key

    @classmethod
    def of(cls, key: Ints) -> _Shelf | None:
        order = np.argsort(key, kind="stable")
        order = order[key[order] >= 0]
        if not len(order):
            return None
        _, first, inverse, counts = np.unique(key[order], return_index=True, return_inverse=True, return_counts=True)
        size, begin = counts[inverse.reshape(-1)], first[inverse.reshape(-1)]
        shared = size > 1
        return cls(order, begin, np.where(shared, size, 0)) if shared.any() else None

    def draw(self, count: int, random: np.random.Generator) -> tuple[Ints, Ints]:
        """Anchors and partners, never one product twice in a pair."""
        able = np.flatnonzero(self.size)
        at = able[random.integers(0, len(able), count)]
        step = 1 + (random.random(count) * (self.size[at] - 1)).astype(np.int64)
        partner = self.first[at] + (at - self.first[at] + step) % self.size[at]
        return self.members[at], self.members[partner]


# --- mined negatives ------------------------------------------------------------------------------
def _mine(wanted: Mapping[str, int], table: Table, vectors: Vectors, config: PairConfig, taken: _Taken,
          random: np.random.Generator) -> dict[str, list[tuple[int, int]]]:
    """Up to `wanted` pairs of each hard kind: anchors take turns, and each gives its nearest that is still free."""
    able = np.flatnonzero((table.category >= 0) & np.isfinite(vectors).all(axis=1))
    anchors = random.permutation(able)[: config.max_anchors]
    queues: dict[str, dict[int, list[int]]] = {kind: {} for kind in wanted}
    for anchor, near in _neighbours(anchors, able, table, vectors, config):
        for kind, queue in queues.items():
            wrong = near[holds(kind, table, np.full(len(near), anchor), near, config)]
            queue[anchor] = wrong[::-1].tolist()        # the nearest last, to be taken from the end
    found: dict[str, list[tuple[int, int]]] = {kind: [] for kind in wanted}
    while any(queues.values()):
        for kind, queue in queues.items():
            for anchor in list(queue):
                if not queue[anchor] or len(found[kind]) >= wanted[kind]:
                    del queue[anchor]
                elif taken.add(anchor, other := queue[anchor].pop()):
                    found[kind].append((anchor, other))
    return found


def _neighbours(anchors: Ints, able: Ints, table: Table, vectors: Vectors, config: PairConfig
                ) -> Iterator[tuple[int, Ints]]:
    """(anchor, its nearest products of the same kind, nearest first); those that are too near are left out."""
    for category in np.unique(table.category[anchors]):
        shelf = able[table.category[able] == category]
        own = anchors[table.category[anchors] == category]
        step = max(1, CELLS // len(shelf))
        for first in range(0, len(own), step):
            part = own[first : first + step]
            scores = vectors[part] @ vectors[shelf].T
            scores[(scores > config.max_similarity) | (part[:, None] == shelf[None, :])] = -np.inf
            count = min(config.neighbours, len(shelf))
            nearest = np.argsort(-scores, axis=1, kind="stable")[:, :count]
            for row, anchor in enumerate(part.tolist()):
                kept = nearest[row][np.isfinite(scores[row, nearest[row]])]
                yield anchor, shelf[kept]


# --- all of them ----------------------------------------------------------------------------------
def make_pairs(rows: pa.Table, count: int, config: PairConfig, vectors: Vectors | None = None
               ) -> tuple[pa.Table, list[dict[str, Any]]]:
    """(ATTRIBUTE_PAIR rows, checked and shuffled; statistics of each kind: wanted, made, anchors, median similarity).

    `rows` is ATTRIBUTE_ROW, `vectors` (N, D) theirs of unit length, NaN for a product that has none. A kind of which
    there are too few pairs stays short: nothing else is put in its place. Errors: `AttributePairError` when hard
    negatives are asked for without vectors, or no pair that is alike can be made.
    """
    table = Table.of(rows, config.min_group_confidence)
    random = np.random.default_rng(config.seed)
    taken = _Taken()
    wanted = _wanted(count, config)
    if config.mix.hard and vectors is None:
        raise AttributePairError("hard negatives are mined from current vectors: give vectors, or mix.hard=0")
    found: dict[str, list[tuple[int, int]]] = {}
    strong = wanted["strong_group"] + wanted["strong_attributes"]
    found["strong_group"] = _draw("strong_group", wanted["strong_group"], table, config, taken, random)
    found["strong_attributes"] = _draw("strong_attributes", strong - len(found["strong_group"]), table, config, taken,
                                       random)
    short = strong - len(found["strong_group"]) - len(found["strong_attributes"])
    found["strong_group"] += _draw("strong_group", short, table, config, taken, random)
    for kind in ("medium", "weak"):
        found[kind] = _draw(kind, wanted[kind], table, config, taken, random)
    if not any(found.values()):
        raise AttributePairError(f"of {len(table)} products no two are alike: are attributes and groups known? See the "
                                 "audit of the attributes")
    hard = {kind: wanted[kind] for kind in wanted if kind.startswith("hard_")}
    found |= _mine(hard, table, vectors, config, taken, random) if vectors is not None else {}
    found["easy"] = _draw("easy", wanted["easy"], table, config, taken, random)
    statistics = [_statistics(kind, wanted.get(kind, 0), found.get(kind, []), vectors)
                  for kind in ATTRIBUTE_PAIR_KINDS]
    pairs = _as_table(found, table, random)
    check_pairs(pairs, rows, config)
    return pairs, statistics


def _wanted(count: int, config: PairConfig) -> dict[str, int]:
    mix = config.mix
    wanted = {"strong_group": round(count * mix.strong / 2), "medium": round(count * mix.medium),
              "weak": round(count * mix.weak), "easy": round(count * mix.easy)}
    wanted["strong_attributes"] = round(count * mix.strong) - wanted["strong_group"]
    return wanted | {f"hard_{name}": round(count * mix.hard / len(config.hard)) for name in config.hard}


def _statistics(kind: str, wanted: int, pairs: Sequence[tuple[int, int]], vectors: Vectors | None) -> dict[str, Any]:
    places = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    similarity = None
    if vectors is not None and len(places):
        cosines = (vectors[places[:, 0]] * vectors[places[:, 1]]).sum(axis=1)
        cosines = cosines[np.isfinite(cosines)]
        similarity = float(np.median(cosines)) if len(cosines) else None
    return {"kind": kind, "label": int(kind in POSITIVE), "wanted": wanted, "made": len(pairs),
            "anchors": len(np.unique(places[:, 0])), "median_similarity": similarity}


def _as_table(found: Mapping[str, Sequence[tuple[int, int]]], table: Table, random: np.random.Generator) -> pa.Table:
    ids = np.array(table.ids, dtype=object)
    kinds = np.array([kind for kind, pairs in found.items() for _ in pairs], dtype=object)
    places = np.array([pair for pairs in found.values() for pair in pairs], dtype=np.int64).reshape(-1, 2)
    order = random.permutation(len(kinds))
    one, other, kinds = ids[places[order, 0]], ids[places[order, 1]], kinds[order]
    return pa.table({"anchor_id": pa.array(one, pa.string()), "other_id": pa.array(other, pa.string()),
                     "kind": pa.array(kinds, pa.string()),
                     "label": pa.array(np.isin(kinds, POSITIVE).astype(np.int8))}, schema=ATTRIBUTE_PAIR)


def check_pairs(pairs: pa.Table, rows: pa.Table, config: PairConfig) -> None:
    """Nothing; raises `AttributePairError` for the first pair that is not what its kind says, or for one made twice."""
    table = Table.of(rows, config.min_group_confidence)
    place = {one: at for at, one in enumerate(table.ids)}
    ids = [pairs[name].to_pylist() for name in ("anchor_id", "other_id")]
    if unknown := sorted({one for part in ids for one in part} - set(place)):
        raise AttributePairError(f"product {unknown[0]!r} of a pair has no attributes")
    one, other = (np.array([place[product] for product in part], dtype=np.int64) for part in ids)
    kinds, labels = np.array(pairs["kind"].to_pylist(), dtype=object), pairs["label"].to_numpy()
    wrong = labels != np.isin(kinds, POSITIVE).astype(np.int8)
    for kind in np.unique(kinds) if len(kinds) else ():
        if kind not in ATTRIBUTE_PAIR_KINDS:
            raise AttributePairError(f"unknown kind {kind!r}; kinds are {', '.join(ATTRIBUTE_PAIR_KINDS)}")
        own = kinds == kind
        wrong[own] |= ~holds(str(kind), table, one[own], other[own], config)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise AttributePairError(f"pair {at} ({ids[0][at]}, {ids[1][at]}) is not {kinds[at]} with label {labels[at]}")
    twice = np.unique(np.minimum(one, other) * len(table) + np.maximum(one, other), return_counts=True)[1]
    if (twice > 1).any():
        raise AttributePairError(f"{int((twice > 1).sum())} pairs come twice")
