"""Example queries worth reading: where a system is at its best, in the middle and at its worst."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from recsys_ray.artifacts import Artifact

pc: Any = pyarrow.compute
SHOWN = 5


def pick_queries(per_query: pa.Table, metrics: Sequence[str], each: int) -> dict[str, list[int]]:
    """Row numbers for "best", "middle" and "worst", `each` at most, none twice.

    Ordered by the first metric, ties by the mean of the others, then by query id.
    """
    values = np.stack([per_query[metric].to_numpy().astype(np.float64) for metric in metrics], axis=1)
    rows = np.flatnonzero(np.isfinite(values).all(axis=1))
    ids = np.asarray(per_query["query_id"].to_pylist())[rows]
    order = rows[np.lexsort((ids, -values[rows].mean(axis=1).round(9), -values[rows, 0]))]
    each = min(each, max(1, len(order) // 3))
    middle = max(0, (len(order) - each) // 2)
    parts = {"best": order[:each], "middle": order[middle : middle + each], "worst": order[::-1][:each][::-1]}
    seen: set[int] = set()
    picked: dict[str, list[int]] = {}
    for name, part in parts.items():
        picked[name] = [int(row) for row in part if int(row) not in seen]
        seen |= set(picked[name])
    return picked


def example_rows(per_query: pa.Table, judgments: pa.Table, answers: Iterable[pa.Table], prepared: Artifact,
                 metrics: Sequence[str], relevant_gain: float, each: int = 3) -> list[dict[str, Any]]:
    """The picked queries with their first products: title, brand, price, score, gain, and what was expected.

    Each is {kind, query_id, query, value, products: [...], expected: {...} or None}. A gain of None is
    unjudged; `expected` is the best relevant product when none is shown, with its rank or None.
    """
    picked = [(kind, row) for kind, rows in pick_queries(per_query, metrics, each).items() for row in rows]
    ids = pa.array([str(per_query["query_id"][row].as_py()) for _, row in picked], pa.string())
    answered: dict[str, dict[str, dict[str, Any]]] = {str(one): {} for one in ids.to_pylist()}
    for table in answers:
        for answer in table.filter(pc.is_in(table["query_id"], value_set=ids)).sort_by("rank").to_pylist():
            answered[answer["query_id"]][answer["product_id"]] = answer
    gains: dict[str, dict[str, float]] = {query_id: {} for query_id in answered}
    for judged in judgments.filter(pc.is_in(judgments["query_id"], value_set=ids)).to_pylist():
        gains[judged["query_id"]][judged["product_id"]] = judged["gain"]
    expected = {one: _expected(gains[one], answered[one], relevant_gain) for one in answered}
    shown = {one: [row for row in of.values() if row["rank"] <= SHOWN] for one, of in answered.items()}
    products = _products(prepared, {row["product_id"] for of in shown.values() for row in of}
                         | {row["product_id"] for row in expected.values() if row})
    examples = []
    for kind, row in picked:
        one = str(per_query["query_id"][row].as_py())
        found = [{"rank": answer["rank"], "score": answer["score"], "product_id": answer["product_id"],
                  **_grade(gains[one].get(answer["product_id"]), relevant_gain),
                  **products[answer["product_id"]]} for answer in sorted(shown[one], key=lambda each: each["rank"])]
        missed = expected[one]
        examples.append({"kind": kind, "query_id": one, "query": per_query["query"][row].as_py(), "products": found,
                         "value": per_query[metrics[0]][row].as_py(),
                         "expected": {**missed, **products[missed["product_id"]]} if missed else None})
    return examples


def _expected(gains: Mapping[str, float], answered: Mapping[str, Mapping[str, Any]],
              relevant_gain: float) -> dict[str, Any] | None:
    """The relevant product that stands highest, or else has the highest gain; None if one is shown or none exists."""
    ranks = {product: answered[product]["rank"] if product in answered else None
             for product, gain in gains.items() if gain >= np.float32(relevant_gain)}
    if not ranks or any(rank is not None and rank <= SHOWN for rank in ranks.values()):
        return None
    best = min(ranks, key=lambda product: (ranks[product] or 1 << 30, -gains[product], product))
    return {"product_id": best, "rank": ranks[best]}


def _grade(gain: float | None, relevant_gain: float) -> dict[str, Any]:
    hit = gain is not None and gain >= np.float32(relevant_gain)
    return {"gain": gain if gain is None else round(gain, 4), "hit": bool(hit)}


def _products(prepared: Artifact, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """Title, brand and price of the wanted products, read one bucket at a time."""
    ids = pa.array(sorted(wanted), pa.string())
    found: dict[str, dict[str, Any]] = {one: {"title": None, "brand": None, "price_cents": None} for one in wanted}
    for table in prepared.tables("products/", ["product_id", "title", "brand", "price_cents"]):
        for row in table.filter(pc.is_in(table["product_id"], value_set=ids)).to_pylist():
            found[row.pop("product_id")] = row
    return found
