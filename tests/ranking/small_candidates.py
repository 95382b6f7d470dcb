"""Candidates of one query, made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_ray.ranking.features import FEATURE_COLUMNS, Candidates
from recsys_ray.retrieval.segments import ROWS

DAY = 86_400_000


def candidates(products: list[dict[str, Any]], fused: list[float], **scores: list[float]) -> Candidates:
    """Candidates with row ids 0, 1, ... unless a product says otherwise; what is not given is null."""
    rows = [{name: product.get(name, number if name == "row_id" else None) for name in FEATURE_COLUMNS}
            for number, product in enumerate(products)]
    table = pa.Table.from_pylist(rows, schema=pa.schema([ROWS.field(name) for name in FEATURE_COLUMNS]))
    given: dict[str, npt.NDArray[np.float32] | None] = {
        name: np.array(values, np.float32) for name, values in {**scores, "fused": fused}.items()}
    return Candidates(table["row_id"].to_numpy(), given, table)


def many(count: int, seed: int = 0) -> Candidates:
    """Random candidates."""
    rng = np.random.default_rng(seed)
    words = ("red", "blue", "sofa", "lamp", "oak", "soft", "16", "inch")
    products = [{"title": " ".join(rng.choice(words, 3)), "text": " ".join(rng.choice(words, 12)),
                 "brand": str(rng.choice(["Acme", "Bold"])), "category": str(rng.choice(["home", "seating"])),
                 "price_cents": int(rng.integers(100, 9000)), "num_reviews": int(rng.integers(0, 50)),
                 "rating_mean": float(rng.uniform(1, 5)), "last_review_ms": int(rng.integers(1, 90)) * DAY}
                for _ in range(count)]
    return candidates(products, rng.random(count).tolist(), dense=rng.random(count).tolist(),
                      lexical=(rng.random(count) * rng.integers(0, 2, count)).tolist())
