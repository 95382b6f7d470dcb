"""One bucket from scattered blocks to finished tables: joined, split, described, audited.

Reviews are read block by block, twice: first to learn which products have train reviews and which
reviews feed the texts, then to write them out by split.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_ray.artifacts import FileEntry, Manifest, file_entry, open_artifact, write_table
from recsys_ray.data.audit import Counts, category_counts, field_counts, review_counts
from recsys_ray.data.buckets import Part, ReviewStatistics, first_per_group, gather, gather_all
from recsys_ray.data.dedup import one_row_per_id
from recsys_ray.data.keyword_store import StoredKeywords
from recsys_ray.data.keywords import review_keywords
from recsys_ray.data.preprocess import CLEAN_PRODUCT, quarantine
from recsys_ray.data.product_text import ProductTextConfig, product_texts
from recsys_ray.data.splits import SPLITS, check_no_leak, split_names
from recsys_ray.ids import row_ids
from recsys_ray.schema import PRODUCT, PRODUCT_STATS, PRODUCT_TEXT, REVIEW, TEXTS, conform

Ints = npt.NDArray[np.int64]
CHOSEN = pa.schema([pa.field("row_id", pa.int64()), pa.field("order", pa.int64()), pa.field("review_id", pa.string()),
                    pa.field("text", pa.string()), pa.field("keywords", TEXTS)])
SAID = ("product_id", "variant_id", "user_id", "timestamp_ms", "title", "text")     # equal in an exact repetition


@dataclass(frozen=True)
class TextLimits:
    """How texts are made and how many reviews feed one."""

    text: ProductTextConfig
    reviews_per_product: int


def text_limits(prepared: Manifest) -> TextLimits:
    """How a prepared artefact made its texts, so that they can be made again without one review."""
    config = prepared.config
    return TextLimits(ProductTextConfig.model_validate(config["text"]), int(config["max_reviews_per_product"]))


@dataclass(frozen=True)
class BucketJob:
    """What every bucket needs; plain values, so that they travel to any node."""

    staging: str
    products: list[Part]
    reviews: list[Part]
    cuts: tuple[int, int] | None
    groups: Mapping[int, int]       # row id -> near-duplicate group, of products that have one
    limits: TextLimits
    keywords: tuple[str, str] | None = None     # root and version of stored keywords; None: the offline extractor


@dataclass(frozen=True)
class BucketResult:
    """What a finished bucket reports."""

    files: list[FileEntry]
    counts: Counts
    grouped: list[tuple[int, bool]]     # (group, cold) of each product with a near-duplicate


def finish_bucket(job: BucketJob, bucket: int) -> BucketResult:
    """Write every table of one bucket; returns the manifest entries and the counts."""
    name, staging = f"bucket-{bucket:05d}.parquet", Path(job.staging)
    products, conflicts, repeated = one_row_per_id(gather_all(job.products, bucket, CLEAN_PRODUCT))
    set_aside = [quarantine(conflicts, "products", "product_id", ["duplicate id"] * conflicts.num_rows)]
    counts: Counts = Counter({("rows", "products kept"): products.num_rows,
                              ("rows", "products set aside: duplicate id"): conflicts.num_rows,
                              ("duplicates", "products, exact repetitions"): repeated})
    files = []
    reviews = _Reviews(job, bucket, products)
    if job.cuts is not None:
        files += _write_reviews(reviews, staging, name, counts, set_aside)
    grouped = [(job.groups[row], bool(cold)) for row, cold in zip(reviews.row_ids.tolist(), reviews.cold, strict=True)
               if row in job.groups]
    finished = _finished_products(products, job, reviews)
    texts = product_texts(finished, reviews.keywords(), job.limits.text)
    fed = {review for one in texts["keyword_review_ids"].to_pylist() for review in one}
    check_no_leak(fed, reviews.later, f"product_text/{name}")
    counts["leaks", "reviews that fed item text"] += len(fed)
    counts["leaks", "later reviews that fed item text"] += len(fed & reviews.later)
    counts.update(field_counts(finished))
    files += [write_table(staging, f"products/{name}", finished),
              write_table(staging, f"product_text/{name}", conform(texts, PRODUCT_TEXT, "product_text")),
              write_table(staging, f"product_stats/{name}", _stats_table(reviews, job.cuts))]
    bad = pa.concat_tables(set_aside)
    if bad.num_rows:
        files.append(write_table(staging, f"quarantine/{name}", bad))
    return BucketResult(files, counts, grouped)


def _finished_products(products: pa.Table, job: BucketJob, reviews: _Reviews) -> pa.Table:
    rows = products["row_id"].to_pylist()
    cold = pa.array(reviews.cold) if job.cuts is not None else pa.nulls(len(rows), pa.bool_())
    added = {"variant_ids": pa.array([sorted(reviews.variants.get(row, ())) for row in rows], pa.list_(pa.string())),
             "group_id": pa.array([job.groups.get(row, row) for row in rows], pa.int64()), "cold": cold}
    if reviews.stored is not None:
        added["summary"] = pa.array(reviews.stored.summaries(rows), pa.string())
    for column, values in added.items():
        products = products.append_column(column, values)
    return conform(products, PRODUCT, "products")


class _Reviews:
    """The reviews of one bucket: what a first reading of their ids and times tells about its products."""

    def __init__(self, job: BucketJob, bucket: int, products: pa.Table) -> None:
        rows = products["row_id"].to_numpy()
        self.job, self.bucket, self.row_ids = job, bucket, rows
        self.categories = products["category"]
        self.stats = ReviewStatistics(rows)
        self.variants: dict[int, set[str]] = {}
        self.later: set[str] = set()            # ids of valid and test reviews
        self.stored: StoredKeywords | None = None
        if job.keywords is not None:
            self.stored = StoredKeywords(open_artifact(job.keywords[0], "keywords", job.keywords[1]),
                                         f"bucket-{bucket:05d}")
        self.cold = np.ones(len(rows), dtype=np.bool_)
        self._chosen = CHOSEN.empty_table()
        if job.cuts is not None:
            train_end = job.cuts[0]
            for block in gather(job.reviews, bucket, ["row_id", "timestamp_ms"]):
                early = block["row_id"].to_numpy()[block["timestamp_ms"].to_numpy() <= train_end]
                places, known = self.places(early)
                self.cold[places[known]] = False

    def places(self, rows: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Positions of the products of these row ids, and whether there is such a product."""
        if not len(self.row_ids):
            return np.zeros(len(rows), np.int64), np.zeros(len(rows), np.bool_)
        places = np.minimum(np.searchsorted(self.row_ids, rows), len(self.row_ids) - 1)
        return places, self.row_ids[places] == rows

    def blocks(self) -> Iterator[pa.Table]:
        """The clean reviews, block by block."""
        return gather(self.job.reviews, self.bucket)

    def take_in(self, reviews: pa.Table, places: Ints) -> None:
        """Learn from finished reviews: statistics and keywords from train, ids of the others, variants of all."""
        train = pc.equal(reviews["split"], "train").to_numpy(zero_copy_only=False)
        self.later.update(reviews["review_id"].filter(pa.array(~train)).to_pylist())
        variants = reviews.group_by(["row_id", "variant_id"]).aggregate([])
        for row, variant in zip(variants["row_id"].to_pylist(), variants["variant_id"].to_pylist(), strict=True):
            if variant:
                self.variants.setdefault(row, set()).add(variant)
        early = reviews.filter(pa.array(train))
        self.stats.add(places[train], {
            "rating": pc.fill_null(early["rating"].cast(pa.float64()), float("nan")).to_numpy(),
            "verified": pc.fill_null(early["verified"], False).to_numpy(zero_copy_only=False).astype(np.float64),
            "chars": pc.fill_null(pc.utf8_length(early["text"]), 0).to_numpy().astype(np.float64),
        }, early["timestamp_ms"].to_numpy())
        self._choose(early)

    def _choose(self, early: pa.Table) -> None:
        """Keep the reviews that feed the texts: the first by the hash of their ids, so any order gives the same."""
        order = pa.array(row_ids(early["review_id"].to_pylist()))
        found = early.append_column("order", order).select(CHOSEN.names).cast(CHOSEN)
        merged = pa.concat_tables([self._chosen, found])
        limit = self.job.limits.reviews_per_product
        chosen = first_per_group(merged["row_id"].to_numpy(), merged["order"].to_numpy(), limit)
        self._chosen = merged.take(pa.array(chosen))

    def keywords(self) -> dict[int, list[tuple[str, list[str]]]]:
        """(review id, keywords) of the train reviews that feed each product's text, by row id."""
        found: dict[int, list[tuple[str, list[str]]]] = {}
        columns = (self._chosen[name].to_pylist() for name in ("row_id", "review_id", "text", "keywords"))
        for row, review, text, stored in zip(*columns, strict=True):
            found.setdefault(row, []).append((review, review_keywords(text) if stored is None else stored))
        return found


def _write_reviews(reviews: _Reviews, staging: Path, name: str, counts: Counts,
                   set_aside: list[pa.Table]) -> list[FileEntry]:
    """Write the reviews of one bucket by split, each block a row group sorted by row id."""
    assert reviews.job.cuts is not None
    seen: dict[str, int] = {}
    rows = dict.fromkeys(SPLITS, 0)
    paths = {split: staging / f"reviews/{split}/{name}" for split in SPLITS}
    partials = {split: path.with_name(f".{name}.{os.getpid()}.tmp") for split, path in paths.items()}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    writers = {split: pq.ParquetWriter(path, REVIEW, compression="zstd", write_page_checksum=True)
               for split, path in partials.items()}
    for block in reviews.blocks():
        finished, places, bad = _finished_reviews(reviews, block, seen, counts)
        set_aside.append(bad)
        reviews.take_in(finished, places)
        counts.update(review_counts(finished))
        counts.update(category_counts(finished["split"], reviews.categories.take(pa.array(places))))
        for split in SPLITS:
            part = finished.filter(pc.equal(finished["split"], split)).sort_by(
                [("row_id", "ascending"), ("timestamp_ms", "ascending"), ("review_id", "ascending")])
            rows[split] += part.num_rows
            if part.num_rows:
                writers[split].write_table(part)
    for split in SPLITS:
        writers[split].close()
        os.replace(partials[split], paths[split])
    return [file_entry(staging, f"reviews/{split}/{name}", rows[split]) for split in SPLITS]


def _finished_reviews(reviews: _Reviews, block: pa.Table, seen: dict[str, int],
                      counts: Counts) -> tuple[pa.Table, Ints, pa.Table]:
    """(REVIEW rows, positions of their products, quarantine) of a block; repeated reviews are left out and counted."""
    assert reviews.job.cuts is not None
    fresh, conflicting = _first_of_their_id(block, seen)
    counts["duplicates", "reviews, exact repetitions"] += int((~fresh & ~conflicting).sum())
    places, known = reviews.places(block["row_id"].to_numpy())
    bad = []
    for reason, mask in (("duplicate id", conflicting), ("unknown product", fresh & ~known)):
        rows = block.filter(pa.array(mask))
        counts["rows", f"reviews set aside: {reason}"] += rows.num_rows
        bad.append(quarantine(rows, "reviews", "review_id", [reason] * rows.num_rows))
    kept = block.filter(pa.array(fresh & known))
    places = places[fresh & known]
    counts["rows", "reviews kept"] += kept.num_rows
    kept = kept.append_column("split", split_names(kept["timestamp_ms"].to_numpy(), reviews.job.cuts))
    kept = kept.append_column("cold", pa.array(reviews.cold[places]))
    if reviews.stored is not None:
        stored, missing = reviews.stored.of_reviews(kept["review_id"])
        kept = kept.append_column("keywords", stored)
        counts["values", "reviews without stored keywords"] += missing
    return conform(kept, REVIEW, "reviews"), places, pa.concat_tables(bad)


def _first_of_their_id(block: pa.Table, seen: dict[str, int]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which reviews are the first with their id, and which say something else under an id that was seen."""
    fresh = np.ones(block.num_rows, dtype=np.bool_)
    conflicting = np.zeros(block.num_rows, dtype=np.bool_)
    contents = zip(*(block[name].to_pylist() for name in SAID), strict=True)
    for number, (review, content) in enumerate(zip(block["review_id"].to_pylist(), map(hash, contents), strict=True)):
        if review in seen:
            fresh[number] = False
            conflicting[number] = seen[review] != content
        else:
            seen[review] = content
    return fresh, conflicting


def _stats_table(reviews: _Reviews, cuts: tuple[int, int] | None) -> pa.Table:
    as_of = 0 if cuts is None else cuts[0]
    size = len(reviews.row_ids)
    columns = {"row_id": pa.array(reviews.row_ids), "as_of_ms": pa.array(np.full(size, as_of, np.int64)),
               **reviews.stats.columns()}
    return conform(pa.table(columns), PRODUCT_STATS, "product_stats")
