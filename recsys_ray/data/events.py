"""What shoppers did: raw event tables -> EVENT rows that can be trusted, and the others with the reason.

An impression is a product shown at a place in a list; clicks, carts and purchases refer to it by
`list_id` and `product_id`. Unbiased learning divides by `propensity`, so a propensity of 0 or below,
above 1 or not a number is refused rather than repaired.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.schema import EVENT, EVENT_KINDS, QUARANTINE, conform

Mask = npt.NDArray[np.bool_]
MAX_POSITION = 100_000      # beyond any list that is shown: a unit or column mistaken
MAX_TIMESTAMP_MS = 4_102_444_800_000    # 2100-01-01: a time in micro- or nanoseconds lies beyond


def query_key(query: str) -> str:
    """The id of a query without one: the same for the same words, in 16 hex digits."""
    return hashlib.blake2b(query.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def clean_events(raw: pa.Table) -> tuple[pa.Table, pa.Table]:
    """`raw` (EVENT, with or without `_error` and `_source`) -> (EVENT rows, QUARANTINE rows).

    Refused, each with its reason: no id, an id seen before in this table, an unknown kind, no or an
    impossible time, no product, an impression without list or position (1 is the top), a propensity
    outside (0, 1]. Only impressions have a position and a propensity: of other kinds they are cleared,
    since a click's place is that of its impression.
    """
    raw = _with_all_columns(raw)
    reasons: list[str | None] = raw["_error"].to_pylist()
    good = np.array([reason is None for reason in reasons], dtype=bool)
    for wrong, why in _checks(raw):
        for row in np.flatnonzero(wrong & good).tolist():
            reasons[row] = why
        good &= ~wrong
    events = raw.filter(pa.array(good)).select(EVENT.names)
    impression = pa.array(_equal(events["kind"], "impression"))
    for name in ("position", "propensity"):
        at, field = events.column_names.index(name), EVENT.field(name)
        events = events.set_column(at, field, pc.if_else(impression, events[name], pa.scalar(None, field.type)))
    return events.cast(EVENT), _quarantine(raw.filter(pa.array(~good)), [reason for reason in reasons if reason])


def _checks(raw: pa.Table) -> list[tuple[Mask, str]]:
    """(rows that are wrong, why) in the order in which reasons count."""
    impression = _equal(raw["kind"], "impression")
    known_kind = np.any([_equal(raw["kind"], kind) for kind in EVENT_KINDS], axis=0)
    time = _numbers(raw["timestamp_ms"], -1)
    position = _numbers(raw["position"], 0)
    propensity = _numbers(raw["propensity"], 1)     # it may be unknown; NaN fails both comparisons
    return [
        (_blank(raw["event_id"]), "event_id is missing"),
        (_repeated(raw["event_id"]), "event_id was seen before"),
        (~known_kind, f"kind is none of {', '.join(EVENT_KINDS)}"),
        (raw["timestamp_ms"].is_null().to_numpy(), "timestamp_ms is missing"),
        ((time < 0) | (time >= MAX_TIMESTAMP_MS), "timestamp_ms is not in milliseconds since 1970, before 2100"),
        (_blank(raw["product_id"]), "product_id is missing"),
        (impression & _blank(raw["list_id"]), "an impression needs the list_id it was shown in"),
        (impression & ((position < 1) | (position > MAX_POSITION)),
         f"an impression needs a position from 1 to {MAX_POSITION}"),
        (impression & ~((propensity > 0) & (propensity <= 1)), "propensity is not in (0, 1]"),
    ]


def _with_all_columns(raw: pa.Table) -> pa.Table:
    loose: list[pa.Field[Any]] = [field.with_nullable(True) for field in EVENT]
    wanted = pa.schema([*loose, pa.field("_error", pa.string()), pa.field("_source", pa.string())])
    return conform(raw, wanted, "events")


def _numbers(column: pa.ChunkedArray[Any], missing: int) -> npt.NDArray[Any]:
    numbers: npt.NDArray[Any] = column.fill_null(pa.scalar(missing, column.type)).to_numpy()
    return numbers


def _equal(column: pa.ChunkedArray[Any], value: str) -> Mask:
    mask: Mask = pc.equal(column, pa.scalar(value)).fill_null(False).to_numpy()
    return mask


def _blank(column: pa.ChunkedArray[Any]) -> Mask:
    return np.array([not (one or "").strip() for one in column.to_pylist()], dtype=bool)


def _repeated(ids: pa.ChunkedArray[Any]) -> Mask:
    """Rows whose id an earlier row has; a missing id is not repeated."""
    mask = np.ones(len(ids), dtype=bool)
    codes = ids.combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy()
    mask[np.unique(codes, return_index=True)[1]] = False
    return mask


def _quarantine(rows: pa.Table, reasons: list[str]) -> pa.Table:
    refused = [{"table": "events", "source": row.pop("_source"), "key": row["event_id"], "reason": reason,
                "row": json.dumps({name: row[name] for name in EVENT.names})[:2000]}
               for row, reason in zip(rows.to_pylist(), reasons, strict=True)]
    return pa.Table.from_pylist(refused, schema=QUARANTINE)
