"""Logged events -> what to learn from: which products a query showed, at which place, and what became of them."""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recsys_ray.data.events import clean_events
from recsys_ray.ranking.asked_lists import Labelled

log = logging.getLogger(__name__)

GAINS = {"impression": 0.0, "click": 1.0, "cart": 2.0, "purchase": 3.0}


def labelled_events(events: pa.Table) -> Labelled:
    """Of EVENT rows: the best thing that happened to a product is its gain, its highest place its position.

    Events without a query say nothing here. What was not shown for a query is not learned from: nobody could
    click it. Clicks on products without an impression are left out for the same reason.
    """
    positions: dict[str, dict[str, int]] = {}
    gains: dict[str, dict[str, float]] = {}
    columns = ("query_id", "product_id", "kind", "position")
    for query, product, kind, position in zip(*(events[name].to_pylist() for name in columns), strict=True):
        if query is None:
            continue
        if position is not None:
            shown = positions.setdefault(query, {})
            shown[product] = min(position, shown.get(product, position))
        known = gains.setdefault(query, {})
        known[product] = max(GAINS[kind], known.get(product, 0.0))
    return Labelled(gains, positions)


def read_events(path: Path) -> pa.Table:
    """The EVENT rows of a Parquet file, or of those in a folder, that can be trusted; the others are counted."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: holds no .parquet file of events")
    events, refused = clean_events(pa.concat_tables([pq.read_table(one) for one in files], promote_options="default"))
    if refused.num_rows:
        reasons = refused["reason"].value_counts().to_pylist()
        log.warning("%d events refused: %s", refused.num_rows,
                    ", ".join(f"{one['values']} ({one['counts']})" for one in reasons))
    return events
