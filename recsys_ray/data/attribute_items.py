"""What the adapter of pictures learns from: frozen vectors beside attributes and groups, and pairs of them.

Everything a step needs is an array in memory: a picture is its vector of the frozen tower, computed once, its known
attributes as numbers, and its group. A picture of no product is a product of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.artifacts import Artifact
from recsys_ray.config import ConfigError
from recsys_ray.data.attribute_pair_data import GroupSplit
from recsys_ray.data.attributes import category_of, split_of_group
from recsys_ray.data.splits import SPLITS
from recsys_ray.schema import ATTRIBUTE_PAIR, ATTRIBUTE_ROW, conform

log = logging.getLogger(__name__)

ATTRIBUTES = ("category2", "material", "pattern", "neckline", "sleeve")
PER_ANCHOR = 16         # pairs of each picture where labels alone make them

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Items:
    """N pictures: their frozen vectors and what is known of them."""

    vectors: Floats                         # (N, D), unit length
    rows: pa.Table                          # ATTRIBUTE_ROW; graphic is a pattern there, never a category
    values: dict[str, tuple[str, ...]]      # attribute -> the values that occur, in the order of their codes
    codes: Ints                             # (N, A): the value of each attribute, -1 where unknown
    groups: Ints                            # (N,)
    texts: Floats | None = None             # (N, T): vectors of their products' texts, zeros where there is none
    image_ids: pa.Array | None = None       # (N,): by which the pictures themselves are found again

    def __len__(self) -> int:
        return len(self.vectors)

    def take(self, places: Ints) -> Self:
        """Some of the pictures; values and their codes stay."""
        return replace(self, vectors=self.vectors[places], rows=self.rows.take(pa.array(places)),
                       codes=self.codes[places], groups=self.groups[places],
                       texts=None if self.texts is None else self.texts[places],
                       image_ids=None if self.image_ids is None else self.image_ids.take(pa.array(places)))

    @classmethod
    def of(cls, vectors: Floats, rows: pa.Table, texts: Floats | None = None) -> Self:
        """Items of vectors (N, D) and their ATTRIBUTE_ROW rows in the same order."""
        rows = without_graphic(conform(rows, ATTRIBUTE_ROW, "attributes"))
        columns = {name: rows[name].combine_chunks().dictionary_encode() for name in ATTRIBUTES}
        values, codes = dict[str, tuple[str, ...]](), []
        for name, column in columns.items():
            said = column.dictionary.to_pylist()
            order = np.argsort(np.array(said, dtype=object), kind="stable") if said else np.zeros(0, np.int64)
            number = np.full(len(said) + 1, -1, dtype=np.int64)     # the last: null
            number[order] = np.arange(len(said))
            if said:
                values[name] = tuple(said[place] for place in order)
                codes.append(number[pc.fill_null(column.indices, len(said)).to_numpy(zero_copy_only=False)])
        if not values:
            raise ConfigError("attributes: no picture has a known one; join the attributes of these very products")
        keys = [key or f"product {product}" for key, product in
                zip(rows["group_key"].to_pylist(), rows["product_id"].to_pylist(), strict=True)]
        groups = np.unique(np.array(keys, dtype=object), return_inverse=True)[1].reshape(-1).astype(np.int64)
        return cls(vectors, rows, values, np.stack(codes, axis=1), groups, texts)


def without_graphic(rows: pa.Table) -> pa.Table:
    """Rows whose category2 says nothing where it names a graphic, which is a pattern."""
    said = rows["category2"].to_pylist()
    kept = pa.array([category_of(one) for one in said], pa.string())
    return rows.set_column(rows.column_names.index("category2"), "category2", kept)


@dataclass(frozen=True)
class Pairs:
    """P pairs of pictures that are alike, and of each picture those it must not be taken for."""

    anchors: Ints           # (P,) places among the items
    others: Ints            # (P,)
    kinds: Sequence[str]    # (P,)
    negative_offsets: Ints  # (N + 1,) of each item's negatives
    negatives: Ints         # places, item by item

    def __len__(self) -> int:
        return len(self.anchors)

    def negatives_of(self, place: int) -> Ints:
        """The known negatives of an item."""
        return self.negatives[self.negative_offsets[place]:self.negative_offsets[place + 1]]

    def within(self, places: Ints, count: int) -> Self:
        """The pairs both of whose pictures are among `places` of `count` items, and of negatives those that are."""
        inside = np.zeros(count, dtype=bool)
        inside[places] = True
        kept = np.flatnonzero(inside[self.anchors] & inside[self.others])
        owner = np.repeat(np.arange(count), np.diff(self.negative_offsets))
        stay = inside[self.negatives]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(owner[stay], minlength=count))]).astype(np.int64)
        return type(self)(self.anchors[kept], self.others[kept], [self.kinds[one] for one in kept.tolist()], offsets,
                          self.negatives[stay])

    @classmethod
    def of(cls, table: pa.Table, items: Items, seed: int = 0) -> Self:
        """Pairs of products (ATTRIBUTE_PAIR) as pairs of pictures; of several pictures of a product one is drawn.

        Pairs of products without a picture here are left out.
        """
        table = conform(table, ATTRIBUTE_PAIR, "pairs")
        random = np.random.default_rng([seed, 5])
        ids = items.rows["product_id"].combine_chunks()
        shuffled = random.permutation(len(items))
        first = dict(zip(ids.take(pa.array(shuffled)).to_pylist(), shuffled.tolist(), strict=True))
        anchor, other = (np.array([first.get(one, -1) for one in table[name].to_pylist()], dtype=np.int64)
                         for name in ("anchor_id", "other_id"))
        there = (anchor >= 0) & (other >= 0) & (anchor != other)
        if not there.all():
            log.info("%d of %d pairs have pictures", there.sum(), len(there))
        label, kind = table["label"].to_numpy(), np.array(table["kind"].to_pylist(), dtype=object)
        alike, unlike = there & (label == 1), there & (label == 0)
        owner = np.concatenate([anchor[unlike], other[unlike]])     # each is a known negative of the other
        order = np.argsort(owner, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(items)))])
        return cls(anchor[alike], other[alike], kind[alike].tolist(), offsets.astype(np.int64),
                   np.concatenate([other[unlike], anchor[unlike]])[order])


def label_pairs(items: Items, seed: int, per_anchor: int = PER_ANCHOR) -> Pairs:
    """Pairs where nothing but a label is known: pictures of one category2 and of different groups, drawn by `seed`."""
    random = np.random.default_rng([seed, 6])
    category = items.codes[:, list(items.values).index("category2")]
    anchors, others = [], []
    for value in range(len(items.values["category2"])):
        own = np.flatnonzero(category == value)
        if len(own) < 2:
            continue
        found = random.choice(own, size=(len(own), per_anchor))
        fits = items.groups[found] != items.groups[own][:, None]
        anchors.append(np.repeat(own, fits.sum(axis=1)))
        others.append(found[fits])
    if not anchors:
        raise ConfigError("no two pictures of different groups share a category2, so labels alone make no pairs; give "
                          "`pairs`, an artefact of make_attribute_pairs")
    joined = np.concatenate(anchors)
    return Pairs(joined, np.concatenate(others), ["weak"] * len(joined), np.zeros(len(items) + 1, np.int64),
                 np.zeros(0, np.int64))


# --- artefacts ------------------------------------------------------------------------------------
def read_items(vectors: Artifact, attributes: Artifact | None, embeddings: Artifact | None) -> Items:
    """The pictures of an `image_vectors` artefact with what `attributes` and `embeddings` say of their products.

    Without attributes a picture's label is its category2 and its group_id the group. Pictures of products of which
    nothing is known are left out.
    """
    table = pa.concat_tables(vectors.tables("vectors/"))
    ids = pc.coalesce(table["product_id"], table["image_id"]).combine_chunks()
    if attributes is None:
        rows = conform(pa.table({"product_id": ids, "category2": table["label"], "group_key": table["group_id"],
                                 "evidence": pa.array([[]] * len(ids), ATTRIBUTE_ROW.field("evidence").type)}),
                       ATTRIBUTE_ROW, "labels")
    else:
        known = attributes.table("attributes.parquet")
        place = pc.index_in(ids, value_set=known["product_id"].combine_chunks())
        table, ids = table.filter(place.is_valid()), ids.filter(place.is_valid())
        rows = known.take(place.drop_null())
    said = np.zeros(len(rows), dtype=bool)
    for name in ATTRIBUTES:
        said |= rows[name].is_valid().to_numpy()
    table, rows = table.filter(pa.array(said)), rows.filter(pa.array(said))
    if not len(rows):
        raise ConfigError(f"{vectors.path}: nothing is known of any of these pictures; embed pictures with labels, or "
                          "give the attributes of their products")
    log.info("%d pictures of which something is known, %d left out", len(rows), len(said) - len(rows))
    texts = None if embeddings is None else text_vectors(embeddings, rows["product_id"].combine_chunks())
    return replace(Items.of(matrix(table["vector"]), rows, texts), image_ids=table["image_id"].combine_chunks())


def matrix(column: pa.ChunkedArray) -> Floats:
    """A column of vectors as one array, (N, D)."""
    whole = column.combine_chunks()
    return np.array(whole.flatten().to_numpy().reshape(len(whole), -1), dtype=np.float32)   # torch wants its own


def text_vectors(embeddings: Artifact, product_ids: pa.Array) -> Floats:
    """The text vector of each product, (N, T), zeros where it has none; `ConfigError` where none has."""
    table = pa.concat_tables(embeddings.tables("vectors/", ["product_id", "vector"]))
    places = pc.index_in(product_ids, value_set=table["product_id"].combine_chunks())
    if places.null_count == len(places):
        raise ConfigError(f"{embeddings.path}: has no vector of any of these products; embed the catalogue the "
                          "pictures are of")
    found: Floats = matrix(table["vector"])[pc.fill_null(places, 0).to_numpy(zero_copy_only=False)]
    found[pc.is_null(places).to_numpy(zero_copy_only=False)] = 0.0
    return found


def split_places(items: Items, split: GroupSplit) -> dict[str, Ints]:
    """The places of the pictures of each split: a group is never on two sides."""
    keys = [key if key is not None else product for key, product in
            zip(items.rows["group_key"].to_pylist(), items.rows["product_id"].to_pylist(), strict=True)]
    said = np.array([split_of_group(key, split.seed, split.train, split.valid) for key in keys], dtype=object)
    return {name: np.flatnonzero(said == name).astype(np.int64) for name in SPLITS}


def halves(items: Items, places: Ints, share: float, seed: int) -> tuple[Ints, Ints]:
    """(`share` of the groups among these pictures, the others): no group is on both sides. 1: all of them, twice."""
    if share == 1:
        return places, places
    groups = np.random.default_rng([seed, 7]).permutation(np.unique(items.groups[places]))
    first = np.isin(items.groups[places], groups[:round(share * len(groups))])
    return places[first], places[~first]
