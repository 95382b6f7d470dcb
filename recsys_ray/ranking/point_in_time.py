"""What was known of a product at the moment of a query: its statistics from the reviews written before.

The index holds statistics as of one cut; a query of an earlier or later time needs those of its own moment. A
review of the very same millisecond is not "before", so a query that is a review never counts itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.artifacts import Artifact
from recsys_ray.data.splits import SPLITS
from recsys_ray.ids import bucket_of
from recsys_ray.schema import PRODUCT_STATS, conform

Ints = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]
REVIEW_COLUMNS = ("row_id", "rating", "text", "timestamp_ms", "verified")


def point_in_time(reviews: pa.Table, row_ids: Ints, as_of_ms: Ints) -> pa.Table:
    """PRODUCT_STATS rows of N products, each as of its own moment, in the order asked.

    `reviews` hold REVIEW_COLUMNS, in any order; those at or after a moment do not count for it.
    """
    products, code = np.unique(row_ids, return_inverse=True)
    rows = reviews.filter(pc.is_in(reviews["row_id"], value_set=pa.array(products, pa.int64())))
    times = rows["timestamp_ms"].to_numpy()
    moments = np.unique(times)
    width = len(moments) + 1
    key = np.searchsorted(products, rows["row_id"].to_numpy()) * width + np.searchsorted(moments, times)
    order = np.argsort(key, kind="stable")
    key, times = key[order], times[order]
    first = np.searchsorted(key, code * width)
    end = np.searchsorted(key, code * width + np.searchsorted(moments, as_of_ms, side="left"))
    count = end - first

    starts = np.flatnonzero(np.diff(key // width, prepend=-1))

    def total(values: Numbers) -> Numbers:
        # summed product by product: one sum over all would carry the rounding of other products' later reviews
        parts = np.split(values[order], starts[1:]) if len(values) else []
        running = np.concatenate([np.zeros(1), *(np.cumsum(part) for part in parts)])
        return np.where(count > 0, running[end], 0.0)

    rating = pc.fill_null(rows["rating"].cast(pa.float64()), float("nan")).to_numpy()
    given, rated = np.nan_to_num(rating), total(np.isfinite(rating).astype(np.float64))
    verified = pc.fill_null(rows["verified"], False).to_numpy(zero_copy_only=False).astype(np.float64)
    chars = pc.fill_null(pc.utf8_length(rows["text"]), 0).to_numpy().astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total(given) / rated
        spread = np.sqrt(np.maximum(total(given**2) / rated - mean**2, 0))
        shares = {"verified_share": total(verified) / count, "rating_mean": mean, "rating_std": spread,
                  "mean_review_chars": total(chars) / count}
    last = np.where(count > 0, times[np.maximum(end, 1) - 1] if len(times) else 0, -1)
    return conform(pa.table({
        "row_id": pa.array(row_ids, pa.int64()), "as_of_ms": pa.array(as_of_ms, pa.int64()),
        "num_reviews": pa.array(count, pa.int64()),
        **{name: pa.array(values, pa.float64(), from_pandas=True) for name, values in shares.items()},
        "last_review_ms": pa.array(last, pa.int64(), mask=count == 0)}), PRODUCT_STATS, "statistics")


def statistics_at(prepared: Artifact, row_ids: Ints, as_of_ms: Ints, splits: Sequence[str] = SPLITS) -> pa.Table:
    """`point_in_time` over the reviews of a prepared shop, one bucket in memory at a time."""
    buckets = bucket_of(row_ids, int(prepared.manifest.facts["num_buckets"]))
    parts, places = [PRODUCT_STATS.empty_table()], [np.zeros(0, np.int64)]
    for bucket in np.unique(buckets).tolist():
        mine = np.flatnonzero(buckets == bucket)
        name = f"bucket-{bucket:05d}.parquet"
        stored = set(prepared.names("reviews/"))
        reviews = [prepared.table(f"reviews/{split}/{name}", REVIEW_COLUMNS) for split in splits
                   if f"reviews/{split}/{name}" in stored]
        empty = pa.schema([("row_id", pa.int64()), ("rating", pa.float32()), ("text", pa.string()),
                           ("timestamp_ms", pa.int64()), ("verified", pa.bool_())]).empty_table()
        together = pa.concat_tables([empty, *(one.cast(empty.schema) for one in reviews)])
        parts.append(point_in_time(together, row_ids[mine], as_of_ms[mine]))
        places.append(mine)
    order = np.argsort(np.concatenate(places), kind="stable")
    return pa.concat_tables(parts).take(pa.array(order))
