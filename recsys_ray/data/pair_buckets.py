"""One bucket of a prepared shop -> its training pairs on disk, and what the audit wants to know of them.

Reviews are read twice: ids, products and times of all of them to choose, then block by block the
texts of the chosen ones, so that memory follows what is chosen and not the bucket.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_ray.artifacts import Artifact, FileEntry, open_artifact, write_table
from recsys_ray.data.finish import TextLimits, text_limits
from recsys_ray.data.judged_pairs import JudgedQueries, JudgedQuery, judged_rows
from recsys_ray.data.pairs import (
    PRODUCT_FIELDS,
    Catalogue,
    PairError,
    PairsConfig,
    ReviewIndex,
    Said,
    add_random_negatives,
    choose_queries,
    choose_train,
    copied_share,
    pair_row,
    pair_table,
    product_pairs,
    review_queries,
    text_from,
)
from recsys_ray.data.splits import SPLITS
from recsys_ray.schema import PRODUCT, REVIEW, conform

Ints = npt.NDArray[np.int64]
Counts = Counter[str]
SAID = ["title", "text", "keywords"]
LEAKY = "train, own review left in"
REVIEW_TYPES = ("keywords", "review_text")


@dataclass(frozen=True)
class PairJob:
    """What every bucket needs; plain values, so that they travel to any node."""

    prepared: str
    version: str
    staging: str
    options: PairsConfig


@dataclass
class BucketPairs:
    """What a finished bucket reports."""

    files: list[FileEntry] = field(default_factory=list)
    counts: Counts = field(default_factory=Counter)
    copied: dict[str, list[float]] = field(default_factory=dict)    # "<split>/<query type>": [sum of shares, queries]

    def note_copy(self, split: str, kind: str, query: str, text: str) -> None:
        """Count one query into the mean share of copied words."""
        share = copied_share(query, text)
        if share is not None:
            total = self.copied.setdefault(f"{split}/{kind}", [0.0, 0.0])
            total[0] += share
            total[1] += 1


    def add(self, other: BucketPairs) -> None:
        """Take in what another bucket reports."""
        self.files += other.files
        self.counts.update(other.counts)
        for name, (share, queries) in other.copied.items():
            total = self.copied.setdefault(name, [0.0, 0.0])
            total[0] += share
            total[1] += queries


def copied_shares(result: BucketPairs) -> tuple[dict[str, float], float | None]:
    """(mean share of copied words per split, the gap between train and later queries).

    The gap is the largest over the kinds of query that both have; test where there is one, else valid.
    Without any review the share of train is that of the products' own queries, and there is no gap.
    """
    means = {tuple(name.split("/")): share / queries for name, (share, queries) in result.copied.items()}
    weights = {tuple(name.split("/")): queries for name, (_, queries) in result.copied.items()}
    shares = {}
    for split in (*SPLITS, LEAKY):
        mine = [one for one in means if one[0] == split and one[1] in REVIEW_TYPES] or [
            one for one in means if one[0] == split]
        if mine:
            shares[split] = sum(means[one] * weights[one] for one in mine) / sum(weights[one] for one in mine)
    later = "test" if "test" in shares else "valid"
    gaps = [abs(mean - means[later, kind]) for (split, kind), mean in means.items()
            if split == "train" and (later, kind) in means]
    return shares, max(gaps) if gaps else None


def copy_warning(shares: Mapping[str, float]) -> str:
    """What to say when train queries copy more or less of their positives than later ones, which may be valid's."""
    later = shares.get("test", shares.get("valid", 0.0))
    return (f"train queries share {shares['train']:.0%} of their words with their positives, later ones {later:.0%}: "
            "the model would learn to copy; see positive_text")


def audit_rows(result: BucketPairs, max_gap: float) -> list[dict[str, Any]]:
    """AUDIT rows: counts, and the share of copied words of each kind of query with the threshold of the gap."""
    rows = [{"section": "rows", "name": name, "value": float(count), "note": None}
            for name, count in sorted(result.counts.items())]
    for name, (share, queries) in sorted(result.copied.items()):
        split, kind = name.split("/")
        rows.append({"section": "copied words", "name": f"{kind}, {split}", "value": share / queries,
                     "note": f"mean over {queries:.0f} queries of the share of their words that the positive has"})
    gap = copied_shares(result)[1]
    if gap is not None:
        verdict = "train and later queries look alike" if gap <= max_gap else "WARNING: the model would learn to copy"
        rows.append({"section": "copied words", "name": "gap between train and later queries", "value": gap,
                     "note": f"{verdict}; threshold {max_gap:g}"})
    return rows


@dataclass(frozen=True)
class _Bucket:
    name: str
    prepared: Artifact
    catalogue: Catalogue
    rule: TextLimits
    options: PairsConfig
    share: int                  # of all buckets: limits of the whole are divided by it

    def limit(self, of_all: int | None) -> int | None:
        return None if of_all is None else -(-of_all // self.share)

    def index(self, split: str) -> ReviewIndex | None:
        name = f"reviews/{split}/{self.name}.parquet"
        if name not in self.prepared.names("reviews/"):
            return None
        table = self.prepared.table(name, ["review_id", "row_id", "timestamp_ms"])
        return ReviewIndex(table["review_id"].to_pylist(), table["row_id"].to_numpy(), table["timestamp_ms"].to_numpy())

    def said(self, split: str, positions: Ints) -> dict[int, Said]:
        """What the reviews at these positions (ascending) say."""
        found: dict[int, Said] = {}
        path = self.prepared.file(f"reviews/{split}/{self.name}.parquet")
        for start, block in _blocks(path, SAID):
            here = positions[(positions >= start) & (positions < start + block.num_rows)]
            taken = block.take(pa.array(here - start))
            rows = zip(*(taken[name].to_pylist() for name in SAID), strict=True)
            found.update(zip(here.tolist(), (Said(*row) for row in rows), strict=True))
        return found


def _blocks(path: Path, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    start = 0
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for group in range(file.num_row_groups):
            block = file.read_row_group(group, columns=columns)
            yield start, conform(block, pa.schema([REVIEW.field(name) for name in columns]), str(path))
            start += block.num_rows


def make_bucket(job: PairJob, bucket: str) -> BucketPairs:
    """Write the pairs of one bucket below `job.staging`: pairs/train/<bucket>.parquet and pairs/valid/<bucket>.parquet.

    Errors: `PairError` when a text cannot be made again as the preparation made it.
    """
    prepared, options = open_artifact(job.prepared, "prepared", job.version), job.options
    facts = prepared.manifest.facts
    columns = [*PRODUCT_FIELDS, "cold", "released_ms"]
    products = prepared.table(f"products/{bucket}.parquet", columns)
    catalogue = Catalogue(conform(products, pa.schema([PRODUCT.field(name) for name in columns]), "products"),
                          prepared.table(f"product_text/{bucket}.parquet", ["row_id", "text"]),
                          facts["cuts"]["train_end_ms"] if facts["cuts"] else None)
    rule = text_limits(prepared.manifest)
    one = _Bucket(bucket, prepared, catalogue, rule, options, facts["num_buckets"])
    result = BucketPairs()
    rows = {"train": _train_pairs(one, result), "valid": _later_pairs(one, "valid", result)}
    _later_pairs(one, "test", result)       # for the audit alone: no pair of it is written
    if options.product_queries.any:
        rows["train"] += _from_products(one, result)
    for split, found in rows.items():
        if options.form == "triplet":
            add_random_negatives(found, catalogue, options.negatives, options.seed)
            result.counts["pairs with fewer negatives than asked for"] += sum(
                len(row["negative_row_ids"]) < options.negatives for row in found)
        result.files.append(write_table(Path(job.staging), f"pairs/{split}/{bucket}.parquet", pair_table(found)))
    return result


def make_judged(job: PairJob, name: str, judged: JudgedQueries, queries: Sequence[JudgedQuery]) -> BucketPairs:
    """Write the pairs of some judged queries below `job.staging`: pairs/<split>/<name>.parquet."""
    prepared, result = open_artifact(job.prepared, "prepared", job.version), BucketPairs()
    rows = judged_rows(queries, prepared, judged, result.counts)
    for split in ("train", "valid"):
        mine = [row for row in rows if row["split"] == split]
        result.counts[f"judged queries, {split}"] += sum(one.split == split for one in queries)
        for row in mine:
            result.note_copy(split, row["query_type"], row["query"], row["text"])
        result.files.append(write_table(Path(job.staging), f"pairs/{split}/{name}.parquet", pair_table(mine)))
    return result


def _train_pairs(one: _Bucket, result: BucketPairs) -> list[dict[str, Any]]:
    reviews = one.index("train")
    if reviews is None or not reviews.review_ids:
        return []
    choice = choose_train(reviews, one.options, one.rule.reviews_per_product, one.limit(one.options.max_train_reviews))
    said = one.said("train", choice.needed())
    places = one.catalogue.places(reviews.row_ids[choice.queries])
    products = dict(zip(places.tolist(), one.catalogue.products(places), strict=True))

    def fed(positions: Ints) -> list[Said]:
        return [said[number] for number in positions.tolist()]

    for row_id, place in zip(choice.indexed, one.catalogue.places(np.fromiter(choice.indexed, np.int64)), strict=True):
        _check_same_text(one, int(place), fed(choice.indexed[row_id]), products[int(place)])
    rows = []
    for query, feeders, place in zip(choice.queries.tolist(), choice.feeders, places.tolist(), strict=True):
        whole, product = one.catalogue.texts[place], products[place]
        text = whole
        if one.options.positive_text != "full":
            text = text_from(product, fed(feeders), one.rule.text)
        review_id = reviews.review_ids[query]
        asked = review_queries(said[query], one.options)
        result.counts["train reviews chosen"] += 1
        result.counts["train queries too short"] += len(one.options.review_types) - len(asked)
        result.counts["train positives without their query's words"] += bool(asked) and text != whole
        for kind, asked_for in asked:
            rows.append(pair_row(f"{review_id}/{kind}", asked_for, kind, product, text, "train"))
            result.note_copy("train", kind, asked_for, text)
            result.note_copy(LEAKY, kind, asked_for, whole)
    result.counts["train reviews"] += len(reviews.review_ids)
    return rows


def _check_same_text(one: _Bucket, place: int, fed: list[Said], product: dict[str, Any]) -> None:
    """Raise `PairError` unless the reviews that fed the prepared text give that very text again."""
    if text_from(product, fed, one.rule.text) != one.catalogue.texts[place]:
        raise PairError(f"{one.prepared.path}/product_text/{one.name}.parquet: the text of {product['product_id']!r} "
                        "cannot be made again from its reviews; prepare the data with this version first")


def _later_pairs(one: _Bucket, split: str, result: BucketPairs) -> list[dict[str, Any]]:
    """Pairs of valid or test reviews with the text as it is indexed, which knows train alone."""
    assert split in SPLITS[1:]
    reviews = one.index(split)
    if reviews is None or not reviews.review_ids or not one.options.max_valid_reviews:
        return []
    queries = choose_queries(reviews, one.options, one.limit(one.options.max_valid_reviews))
    said = one.said(split, np.sort(queries))
    places = one.catalogue.places(reviews.row_ids[queries])
    rows = []
    for query, place, product in zip(queries.tolist(), places.tolist(), one.catalogue.products(places), strict=True):
        text, review_id = one.catalogue.texts[place], reviews.review_ids[query]
        for kind, asked_for in review_queries(said[query], one.options):
            rows.append(pair_row(f"{review_id}/{kind}", asked_for, kind, product, text, split))
            result.note_copy(split, kind, asked_for, text)
    return rows


def _from_products(one: _Bucket, result: BucketPairs) -> list[dict[str, Any]]:
    rows = product_pairs(one.catalogue, one.rule.text, one.options)
    for row in rows:
        result.note_copy("train", row["query_type"], row["query"], row["text"])
    return rows
