"""Sources -> clean, joined, split tables with product texts: two streaming passes over Ray.

Pass 1 cleans each block and scatters it by the hash bucket of the product's row id, near-duplicate bands
by band. Between the passes the driver sees only counts: the cut-offs come from a histogram of hours, the
near-duplicate groups from the pairs that share enough bands. Pass 2 finishes one bucket at a time: no step
holds the ids of all products, and a product with a tenth of all reviews is read block by block.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pyarrow as pa
import ray
from pydantic import Field

from recsys_ray import runtime
from recsys_ray.artifacts import Artifact, FileEntry, Staging, find_artifact, stage, write_table
from recsys_ray.config import Config, fingerprint
from recsys_ray.data.audit import Counts, audit_table, merged, unused_values
from recsys_ray.data.buckets import Part, gather_all, scatter
from recsys_ray.data.dedup import (
    BANDS,
    PAIRS,
    NearDuplicateConfig,
    band_keys,
    close_pairs,
    groups_of_pairs,
    pairs_of_bands,
    signature_text,
)
from recsys_ray.data.finish import BucketJob, BucketResult, TextLimits, finish_bucket
from recsys_ray.data.keyword_store import content_of, open_keywords
from recsys_ray.data.preprocess import CleaningConfig, clean_products, clean_reviews
from recsys_ray.data.product_text import ProductTextConfig
from recsys_ray.data.sources import SourceConfig, SourceError, file_states, read_products, read_reviews
from recsys_ray.data.splits import SplitConfig, find_cuts, hour_histogram
from recsys_ray.ids import bucket_of
from recsys_ray.runtime import RayConfig

log = logging.getLogger(__name__)

KIND = "prepared"
STAGE_VERSION = 5       # raise it when the same inputs would give other tables
TASK_CPUS = 0.9
SCRATCH = "scratch"
_PARTICULAR = re.compile(r"[:('\"\d]| at ")     # where a reason begins to speak of one row
SLICE_ROWS = 16_384     # of a block, cleaned and scattered at once


class PrepareConfig(Config):
    """Where the raw data is and how it is prepared."""

    source: SourceConfig
    output: Path
    num_buckets: int = Field(default=16, ge=1, le=4096)     # 256 to 1,024 for 100 million products
    cleaning: CleaningConfig = CleaningConfig()
    near_duplicates: NearDuplicateConfig = NearDuplicateConfig()
    split: SplitConfig = SplitConfig()
    text: ProductTextConfig = ProductTextConfig()
    max_reviews_per_product: int = Field(default=50, ge=0)  # that feed the keywords of one product
    keywords: Literal["offline"] | Path = "offline"         # offline, or the artefact of the extract_keywords job
    ray: RayConfig = RayConfig()


class _Block(Config):
    """What the driver learns of one block in pass 1."""

    part: Part | None = None
    bands: Part | None = None
    quarantine: FileEntry | None = None
    hours: dict[int, int] = Field(default_factory=dict)
    counts: tuple[tuple[str, str, int], ...] = ()


@dataclass(frozen=True)
class _Scattered:
    """What pass 1 left: parts of each table, and what the driver has to know of them."""

    products: list[Part]
    reviews: list[Part]
    bands: list[Part]
    quarantine: list[FileEntry]
    hours: list[dict[int, int]]
    counts: Counts


def prepare(config: PrepareConfig) -> Artifact:
    """The "prepared" artefact of a source, reused when neither its files nor the options changed.

    Errors: `SourceError` for input that cannot be read, `LeakError` when a later review fed item text.
    """
    tables = ["products", *(["reviews"] if has_reviews(config.source) else [])]
    stored = None if config.keywords == "offline" else open_keywords(config.keywords, config.num_buckets)
    options = config.model_dump(mode="json", exclude={"output", "ray", "keywords"})
    identity = fingerprint({"options": options, "code": STAGE_VERSION, "files": file_states(config.source, tables),
                            "keywords": stored and content_of(stored)})
    if (done := find_artifact(config.output, KIND, identity)) is not None:
        return done
    root = config.output.resolve()
    with runtime.connected(config.ray), stage(root, KIND, identity) as staging:
        shutil.rmtree(staging.path / SCRATCH, ignore_errors=True)
        scattered = _scatter(config, staging, with_reviews=len(tables) > 1)
        if not scattered.products:
            raise SourceError(f"{config.source.model_dump_json(exclude_none=True)}: not one usable product; "
                              f"found {_told(scattered.counts)}")
        cuts = find_cuts(scattered.hours, config.split)
        groups, overfull = _near_duplicates(scattered.bands, config, str(staging.path / SCRATCH))
        log.info("%d products have a near-duplicate", len(groups))
        results = _finish(config, staging, scattered, cuts, groups, stored)
        return _publish(config, staging, scattered, results, cuts, overfull, stored)


def has_reviews(source: SourceConfig) -> bool:
    """Whether the source names a table of reviews."""
    return getattr(source, "reviews", None) is not None


# --- pass 1: clean and scatter --------------------------------------------------------------------
def _scatter(config: PrepareConfig, staging: Staging, *, with_reviews: bool) -> _Scattered:
    scratch = staging.path / SCRATCH
    products = _each_block(read_products(config.source), partial(_scatter_products, config, str(scratch)))
    reviews = _each_block(read_reviews(config.source), partial(_scatter_reviews, config, str(scratch))) \
        if with_reviews else []
    blocks = [*products, *reviews]
    return _Scattered(
        _in_order(one.part for one in products), _in_order(one.part for one in reviews),
        _in_order(one.bands for one in products), [one.quarantine for one in blocks if one.quarantine],
        [one.hours for one in reviews],
        merged({(section, name): count for section, name, count in one.counts} for one in blocks))


def _told(counts: Counts) -> str:
    return ", ".join(f"{name}: {count}" for (section, name), count in sorted(counts.items()) if section == "rows")


def _in_order(parts: Iterable[Part | None]) -> list[Part]:
    """The parts by name, that is by content: blocks finish in any order, the tables must not tell."""
    return sorted((part for part in parts if part is not None), key=lambda part: Path(part.path).name)


def _each_block(dataset: ray.data.Dataset, work: Callable[[pa.Table], _Block]) -> list[_Block]:
    """`work` on every block in parallel; only what it returns reaches the driver."""
    # A share of a CPU that differs from the reader's keeps Ray from fusing the two: one large gzip file is
    # read by one task, and its blocks must not wait for that task to clean them.
    answers = dataset.map_batches(partial(_answer, work), batch_size=None, batch_format="pyarrow",
                                  num_cpus=TASK_CPUS, zero_copy_batch=True)
    return [_Block.model_validate_json(row["answer"]) for row in answers.iter_rows()]


def _answer(work: Callable[[pa.Table], _Block], block: pa.Table) -> pa.Table:
    answers = [work(block.slice(start, SLICE_ROWS)).model_dump_json()
               for start in range(0, block.num_rows, SLICE_ROWS)]
    return pa.table({"answer": pa.array(answers, pa.string())})


def _scatter_products(config: PrepareConfig, scratch: str, raw: pa.Table) -> _Block:
    clean, bad = clean_products(raw, config.cleaning)
    row_ids = clean["row_id"].to_numpy()
    texts = [signature_text(row) for row in clean.select(
        ["title", "description", "features", "ingredients"]).to_pylist()]
    bands = band_keys(texts, row_ids, config.near_duplicates)
    return _Block(
        part=scatter(clean, bucket_of(row_ids, config.num_buckets), Path(scratch) / "products"),
        bands=scatter(bands, bucket_of(bands["band"].to_numpy(), config.num_buckets), Path(scratch) / "bands"),
        quarantine=_set_aside(bad, scratch),
        counts=(*_row_counts("products", raw.num_rows, bad),
                *((section, name, count) for (section, name), count in unused_values(raw, clean).items())))


def _scatter_reviews(config: PrepareConfig, scratch: str, raw: pa.Table) -> _Block:
    clean, bad = clean_reviews(raw, config.cleaning)
    return _Block(
        part=scatter(clean, bucket_of(clean["row_id"].to_numpy(), config.num_buckets), Path(scratch) / "reviews"),
        hours=hour_histogram(clean["timestamp_ms"].to_numpy()), quarantine=_set_aside(bad, scratch),
        counts=_row_counts("reviews", raw.num_rows, bad))


def _row_counts(table: str, rows: int, bad: pa.Table) -> tuple[tuple[str, str, int], ...]:
    reasons = Counter(reason_kind(reason) for reason in bad["reason"].to_pylist())
    return (("rows", f"{table} read", rows),
            *(("rows", f"{table} set aside: {reason}", count) for reason, count in reasons.items()))


def reason_kind(reason: str) -> str:
    """A reason without what is particular to one row, for counting."""
    return _PARTICULAR.split(reason, maxsplit=1)[0].strip()[:60]


def _set_aside(bad: pa.Table, scratch: str) -> FileEntry | None:
    if not bad.num_rows:
        return None
    staging = Path(scratch).parent
    digest = fingerprint([bad["source"].to_pylist(), bad["key"].to_pylist(), bad["reason"].to_pylist()])
    return write_table(staging, f"quarantine/read-{digest}.parquet", bad)


# --- between the passes ---------------------------------------------------------------------------
def _near_duplicates(bands: list[Part], config: PrepareConfig, scratch: str) -> tuple[dict[int, int], int]:
    """(group of each product with a near-duplicate, bands that were too full): only close pairs reach the driver."""
    remote, buckets = ray.remote(num_cpus=TASK_CPUS, max_retries=3), range(config.num_buckets)
    if not bands:
        return {}, 0
    shared = ray.put(bands)
    found: list[tuple[Part | None, int]] = ray.get(
        [remote(_scatter_pairs).remote(shared, bucket, config, scratch) for bucket in buckets])
    pairs = ray.put(_in_order(part for part, _ in found))
    close: list[pa.Table] = ray.get(
        [remote(_close_pairs).remote(pairs, bucket, config.near_duplicates.shared_bands()) for bucket in buckets])
    return groups_of_pairs(close), sum(overfull for _, overfull in found)


def _scatter_pairs(bands: list[Part], bucket: int, config: PrepareConfig, scratch: str) -> tuple[Part | None, int]:
    pairs, overfull = pairs_of_bands(gather_all(bands, bucket, BANDS), config.near_duplicates.max_bucket)
    return scatter(pairs, bucket_of(pairs["left"].to_numpy(), config.num_buckets), Path(scratch) / "pairs"), overfull


def _close_pairs(pairs: list[Part], bucket: int, shared_bands: int) -> pa.Table:
    return close_pairs(gather_all(pairs, bucket, PAIRS), shared_bands)


# --- pass 2: finish bucket by bucket --------------------------------------------------------------
def _finish(config: PrepareConfig, staging: Staging, scattered: _Scattered, cuts: tuple[int, int] | None,
            groups: dict[int, int], stored: Artifact | None) -> list[BucketResult]:
    limits = TextLimits(config.text, config.max_reviews_per_product)
    keywords = None if stored is None else (str(Path(config.keywords).resolve()), stored.manifest.version)
    job = ray.put(BucketJob(str(staging.path), scattered.products, scattered.reviews, cuts, groups, limits, keywords))
    task = ray.remote(num_cpus=TASK_CPUS, max_retries=3)(finish_bucket)
    results: list[BucketResult] = []
    pending = [task.remote(job, bucket) for bucket in range(config.num_buckets)]
    while pending:
        done, pending = ray.wait(pending)
        results += ray.get(done)
        if len(results) % max(1, config.num_buckets // 4) == 0:
            log.info("%d of %d buckets finished", len(results), config.num_buckets)
    return results


def _publish(config: PrepareConfig, staging: Staging, scattered: _Scattered, results: Iterable[BucketResult],
             cuts: tuple[int, int] | None, overfull: int, stored: Artifact | None) -> Artifact:
    results = list(results)
    counts = merged([scattered.counts, *(one.counts for one in results)])
    counts["duplicates", "bands with too many products to compare"] = overfull
    counts["duplicates", "products with a near-duplicate"] = sum(len(one.grouped) for one in results)
    counts["duplicates", "near-duplicates across splits"] = _across_splits(results)
    products = counts["rows", "products kept"]
    audit = staging.write_table("audit/audit.parquet", audit_table(counts, products))
    files = [*scattered.quarantine, *(entry for one in results for entry in one.files), audit]
    facts = {"num_buckets": config.num_buckets, "template": config.text.template,
             "cuts": None if cuts is None else {"train_end_ms": cuts[0], "valid_end_ms": cuts[1]},
             "counts": {f"{section}/{name}": count for (section, name), count in sorted(counts.items())
                        if section in ("rows", "values", "duplicates", "splits", "leaks")}}
    parents = {} if stored is None else {"keywords": stored.manifest}
    return staging.commit(list({entry.path: entry for entry in files}.values()), config=config, facts=facts,
                          parents=parents)


def _across_splits(results: Iterable[BucketResult]) -> int:
    """Cold products whose near-duplicate group has a product that was reviewed in train."""
    members = [member for one in results for member in one.grouped]
    warm = {group for group, cold in members if not cold}
    return sum(1 for group, cold in members if cold and group in warm)
