"""The audit of a preparation: counts that add up over buckets, and the figures made from them.

Sections of the AUDIT table: `rows` (in, out and why not), `fields` (share of products that have one),
`values` (set to null although the source gave one), `duplicates`, `splits`, `drift` (between train and
the later splits), `leaks`. NOTES explains the names that do not explain themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.data.splits import SPLITS
from recsys_ray.schema import AUDIT

Counts = Counter[tuple[str, str]]
FIELDS = ("title", "description", "features", "brand", "color", "categories", "ingredients", "attributes",
          "price_cents", "released_ms", "image_urls")
LENGTH_EDGES = (0, 20, 50, 100, 200, 400, 800, 1600)    # characters of a review, for the drift
DRIFT_NOTE = "population stability index against train; above 0.25 is a large shift"
HISTOGRAMS = ("length", "rating", "category")           # per split; the table shows how far they drift
NOTES = {
    "near-duplicates across splits": "cold products with a near-duplicate that has train reviews",
    "prices not used": "absurd, or not understood; see the limits of cleaning",
    "dates not used": "not understood",
    "reviews without stored keywords": "they feed no keywords: not extracted, or set aside there",
    "later reviews that fed item text": "the job fails when there is one",
    "bands with too many products to compare": "compared with the first of the band alone",
}


def field_counts(products: pa.Table) -> Counts:
    """How many products have each field."""
    counts: Counts = Counter()
    for name in FIELDS:
        column = products[name]
        present = pc.is_valid(column)
        if pa.types.is_list(column.type) or pa.types.is_map(column.type):
            lengths = column.cast(pa.list_(column.type.value_type)) if pa.types.is_list(column.type) else None
            sizes = pc.list_value_length(lengths) if lengths is not None else pa.array(
                [len(value or ()) for value in column.to_pylist()], pa.int32())
            present = pc.greater(pc.fill_null(sizes, 0), 0)
        counts["fields", name] = pc.sum(present).as_py() or 0
    return counts


def review_counts(reviews: pa.Table) -> Counts:
    """Reviews per split, how many are of cold products, and their histograms of rating and length."""
    counts: Counts = Counter()
    lengths = pc.fill_null(pc.utf8_length(reviews["text"]), 0).to_numpy()
    ratings = pc.fill_null(reviews["rating"], 0).to_numpy()
    split = np.array(reviews["split"].to_pylist(), dtype=object)
    cold = pc.fill_null(reviews["cold"], False).to_numpy(zero_copy_only=False)
    for name in SPLITS:
        mask = split == name
        counts["splits", name] = int(mask.sum())
        counts["splits", f"{name}, of cold products"] = int((mask & cold).sum())
        bins = np.digitize(lengths[mask], LENGTH_EDGES[1:])
        for number, count in zip(*np.unique(bins, return_counts=True), strict=True):
            counts["length", f"{name}/{number}"] = int(count)
        for rating, count in zip(*np.unique(np.round(ratings[mask]), return_counts=True), strict=True):
            counts["rating", f"{name}/{rating:g}"] = int(count)
    return counts


def category_counts(splits: pa.ChunkedArray, categories: pa.Array) -> Counts:
    """The histogram of categories of each split; `categories` (N,) are those of the products of N reviews."""
    table = pa.table({"split": splits, "category": pc.fill_null(categories, "(none)")})
    found = table.group_by(["split", "category"]).aggregate([([], "count_all")])
    return Counter({("category", f"{row['split']}/{row['category']}"): row["count_all"] for row in found.to_pylist()})


def unused_values(raw: pa.Table, clean: pa.Table) -> Counts:
    """How many prices and dates of the clean products stood in their raw rows and could not be used."""
    used = raw.filter(pc.is_in(raw["_source"], value_set=clean["_source"]))
    return Counter({("values", f"{name} not used"): _with_digit(used[given]) - (len(clean) - clean[column].null_count)
                    for name, given, column in (("prices", "price", "price_cents"),
                                                ("dates", "released", "released_ms"))})


def _with_digit(texts: pa.ChunkedArray) -> int:
    return pc.sum(pc.match_substring_regex(texts, r"\d")).as_py() or 0


def audit_table(counts: Mapping[tuple[str, str], int], products: int) -> pa.Table:
    """AUDIT rows of the merged counts; the shares of `fields` are of this many products."""
    rows = []
    for (section, name), count in sorted(counts.items()):
        if section in HISTOGRAMS:
            continue
        share = count / products if section == "fields" and products else float(count)
        rows.append({"section": section, "name": name, "value": share, "note": NOTES.get(name)})
    for kind in HISTOGRAMS:
        for split in SPLITS[1:]:
            value = stability_index(_histogram(counts, kind, "train"), _histogram(counts, kind, split))
            if value is not None:
                rows.append({"section": "drift", "name": f"review {kind}, {split}", "value": value, "note": DRIFT_NOTE})
    return pa.Table.from_pylist(rows, schema=AUDIT)


def _histogram(counts: Mapping[tuple[str, str], int], kind: str, split: str) -> dict[str, int]:
    prefix = f"{split}/"
    return {name.removeprefix(prefix): count for (section, name), count in counts.items()
            if section == kind and name.startswith(prefix)}


def stability_index(expected: Mapping[str, int], found: Mapping[str, int]) -> float | None:
    """Sum of (q - p) ln(q / p) over the bins of two histograms, half a count in empty bins; None without data."""
    if not sum(expected.values()) or not sum(found.values()):
        return None
    bins = sorted({*expected, *found})
    p = np.array([expected.get(one, 0) + 0.5 for one in bins])
    q = np.array([found.get(one, 0) + 0.5 for one in bins])
    p, q = p / p.sum(), q / q.sum()
    return float(np.sum((q - p) * np.log(q / p)))


def merged(counts: Iterable[Mapping[tuple[str, str], int]]) -> Counts:
    """The sum of the counts of all buckets."""
    total: Counts = Counter()
    for one in counts:
        total.update(one)
    return total
