"""Duplicates among products: the same id twice, and near-duplicate texts under different ids.

Near-duplicates by MinHash with banding (Leskovec et al., "Mining of Massive Datasets", chapter 3): two
products share a band with probability J^r, J the Jaccard similarity of their word sets and r the rows of
a band. Bands are hash-bucketed, so no step compares all products; two products are near-duplicates when
they share as many bands as a pair at the threshold shares on average. Most pairs that share any band are
no near-duplicates, so their bands are counted where the pairs are scattered, not in one place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from recsys_ray.config import Config

Ints = npt.NDArray[np.int64]
_WORD = re.compile(r"\w+")
BANDS = pa.schema([pa.field("band", pa.int64()), pa.field("row_id", pa.int64())])
PAIRS = pa.schema([pa.field(name, pa.int64()) for name in ("left", "right", "shared")])     # row ids, bands


class NearDuplicateConfig(Config):
    """What counts as the same product under another id."""

    threshold: float = Field(default=0.8, gt=0, le=1)   # Jaccard similarity of the word sets
    bands: int = Field(default=32, ge=1)
    rows_per_band: int = Field(default=8, ge=1)          # fewer: more pairs that only look alike
    min_words: int = Field(default=5, ge=1)             # shorter texts say too little to be compared
    max_bucket: int = Field(default=200, ge=2)          # products of a band compared in pairs; more: see pairs_of_bands
    seed: int = 7

    def shared_bands(self) -> int:
        """Bands that a pair at the threshold shares on average, rounded."""
        return max(1, round(self.bands * float(self.threshold) ** self.rows_per_band))


def signature_text(product: Mapping[str, Any]) -> str:
    """What near-duplicates are compared by: title, description, features and ingredients."""
    parts = [product["title"], product["description"], *(product["features"] or []), product["ingredients"]]
    return " ".join(part for part in parts if part)


def band_keys(texts: Sequence[str], row_ids: Ints, config: NearDuplicateConfig) -> pa.Table:
    """BANDS rows: `config.bands` for each text of at least `min_words` different words."""
    from rensa import RMinHash

    width = config.bands * config.rows_per_band
    signatures, rows = [], []
    for text, row in zip(texts, row_ids, strict=True):
        words = set(_WORD.findall(text.lower()))
        if len(words) < config.min_words:
            continue
        minhash = RMinHash(num_perm=width, seed=config.seed)
        minhash.update(sorted(words))
        signatures.append(minhash.digest())
        rows.append(row)
    if not rows:
        return BANDS.empty_table()
    cells = np.asarray(signatures, dtype=np.uint64).reshape(len(rows), config.bands, config.rows_per_band)
    keys = np.arange(config.bands, dtype=np.uint64)[None, :].repeat(len(rows), axis=0)
    for column in range(config.rows_per_band):
        keys = _mix(keys, cells[:, :, column])
    return pa.table({"band": pa.array((keys.reshape(-1) >> np.uint64(1)).astype(np.int64)),
                     "row_id": pa.array(np.repeat(np.array(rows, dtype=np.int64), config.bands))}, schema=BANDS)


def _mix(state: npt.NDArray[np.uint64], value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """One step of a 64-bit hash over columns (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        mixed = (state ^ value) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def pairs_of_bands(bands: pa.Table, max_bucket: int) -> tuple[pa.Table, int]:
    """PAIRS of products that share bands of this table, and how many bands were too full.

    In a band of more than `max_bucket` products each is compared with the first alone, so that the work stays
    linear and a listing repeated a thousand times is still found.
    """
    order = np.lexsort((bands["row_id"].to_numpy(), bands["band"].to_numpy()))
    band, row = bands["band"].to_numpy()[order], bands["row_id"].to_numpy()[order]
    starts = np.flatnonzero(np.diff(band, prepend=band[:1] - 1)) if len(band) else np.zeros(0, np.int64)
    sizes = np.diff(starts, append=len(band))
    left, right = [], []
    for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
        first, second = np.triu_indices(size, 1) if size <= max_bucket else (np.zeros(size - 1, np.int64),
                                                                             np.arange(1, size))
        left.append(row[start + first])
        right.append(row[start + second])
    pairs = pa.table({"left": np.concatenate([*left, np.zeros(0, np.int64)]).astype(np.int64),
                      "right": np.concatenate([*right, np.zeros(0, np.int64)]).astype(np.int64)})
    counted = pairs.group_by(["left", "right"]).aggregate([([], "count_all")])
    return counted.rename_columns(PAIRS.names).cast(PAIRS), int((sizes > max_bucket).sum())


def close_pairs(pairs: pa.Table, shared_bands: int) -> pa.Table:
    """PAIRS that share at least so many bands, each once with the sum of its bands."""
    total = pairs.group_by(["left", "right"]).aggregate([("shared", "sum")]).rename_columns(PAIRS.names)
    return total.filter(pc.greater_equal(total["shared"], shared_bands)).cast(PAIRS)


def groups_of_pairs(tables: Iterable[pa.Table]) -> dict[int, int]:
    """Group id, the smallest row id of the group, of each product in these PAIRS: a pair is in one group."""
    pairs = pa.concat_tables([PAIRS.empty_table(), *tables])
    left, right = pairs["left"].to_numpy(), pairs["right"].to_numpy()
    if not len(left):
        return {}
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows, codes = np.unique(np.concatenate([left, right]), return_inverse=True)
    first, second = codes[: len(left)], codes[len(left):]
    graph = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(len(rows), len(rows)))
    _, label = connected_components(graph, directed=False)
    smallest = np.full(label.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(smallest, label, rows)
    return dict(zip(rows.tolist(), smallest[label].tolist(), strict=True))


def one_row_per_id(products: pa.Table) -> tuple[pa.Table, pa.Table, int]:
    """(kept rows by row id, conflicting rows, exact repetitions) of clean products.

    Of rows with one id but other content the one with most text is kept. Errors: `ValueError` when two
    different product ids have the same row id.
    """
    products = products.take(pa.array(np.argsort(products["row_id"].to_numpy(), kind="stable")))
    row_ids = products["row_id"].to_numpy()
    starts = np.flatnonzero(np.diff(row_ids, prepend=row_ids[:1] - 1))
    sizes = np.diff(starts, append=len(row_ids))
    kept = starts.copy()
    conflicts: list[int] = []
    repeated = 0
    for group in np.flatnonzero(sizes > 1):
        start, size = int(starts[group]), int(sizes[group])
        best, *others = _different(products.slice(start, size))
        kept[group] = start + best
        conflicts += [start + other for other in others]
        repeated += size - 1 - len(others)
    return products.take(pa.array(kept)), products.take(pa.array(conflicts, pa.int64())), repeated


def _different(rows: pa.Table) -> list[int]:
    """The first row of each content among rows with one row id, that with most text first; places break ties."""
    listed = rows.to_pylist()
    names = sorted({row["product_id"] for row in listed})
    if len(names) > 1:
        raise ValueError(f"products {names[0]!r} and {names[1]!r} have the same row id {listed[0]['row_id']}; "
                         "rename one of them")
    texts = [repr([row[name] for name in rows.column_names if name != "_source"]) for row in listed]
    sources = [row.get("_source") or "" for row in listed]
    ranked = sorted(range(len(listed)), key=lambda number: (-len(texts[number]), texts[number], sources[number]))
    return list({texts[number]: number for number in reversed(ranked)}.values())[::-1]
