"""Small artefacts with users and items: two tastes, of which each user has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recsys_ray.artifacts import Artifact, stage
from recsys_ray.config import Config

ITEMS = tuple(f"i{one:02d}" for one in range(24))      # even ones are one taste, odd ones the other
COLD = ("i22", "i23")                                   # nobody has them
DAY_MS = 86_400_000


class Settings(Config):
    """Of artefacts made by hand."""


def publish(root: Path, kind: str, tables: dict[str, pa.Table], facts: dict[str, Any] | None = None) -> Artifact:
    with stage(root, kind, "made-by-hand") as staging:
        files = [staging.write_table(name, table) for name, table in tables.items()]
        return staging.commit(files, config=Settings(), facts=facts or {})


def tastes(users: int, each: int = 6, seed: int = 0) -> list[list[int]]:
    """The items of each user, all of one taste, none cold."""
    generator = np.random.default_rng(seed)
    warm = len(ITEMS) - len(COLD)
    return [sorted(generator.choice(np.arange(user % 2, warm, 2), each, replace=False).tolist())
            for user in range(users)]


def write_reranker_histories(root: Path, users: int = 120) -> Artifact:
    """Histories of a reranker_pairs artefact: of valid and test users two items are held out; i20 and i21 are no
    candidates."""
    rows = []
    for user, items in enumerate(tastes(users)):
        split = ("train", "train", "train", "train", "valid", "valid", "test", "test")[user % 8]
        candidates = [item for item in items if item < 20]
        held = candidates[:2] if split != "train" else []
        rows += [{"user_id": f"u{user:03d}", "product_id": ITEMS[item], "kind": "rating", "rating": 5.0,
                  "timestamp_ms": None, "held_out": item in held, "split": split} for item in items]
    schema = pa.schema([("user_id", pa.string()), ("product_id", pa.string()), ("kind", pa.string()),
                        ("rating", pa.float32()), ("timestamp_ms", pa.int64()), ("held_out", pa.bool_()),
                        ("split", pa.string())])
    catalogue = pa.table({"product_id": ITEMS, "eligible": [place < 20 or place > 21 for place in range(len(ITEMS))]})
    return publish(root, "reranker_pairs", {"histories/bucket-00000.parquet": pa.Table.from_pylist(rows, schema=schema),
                                            "items.parquet": catalogue})


def write_prepared(root: Path, users: int = 80) -> Artifact:
    """Reviews of a prepared shop: four items of each user before the first cut, one before the second, one after."""
    rows = []
    for user, items in enumerate(tastes(users)):
        order = np.random.default_rng(user).permutation(items)
        for place, item in enumerate(order.tolist()):
            split = ("train", "train", "train", "train", "valid", "test")[place]
            rows.append({"user_id": f"u{user:03d}", "product_id": ITEMS[item], "rating": 5.0, "split": split,
                         "timestamp_ms": (place * 100 + user) * DAY_MS})
    rows.append({"user_id": None, "product_id": ITEMS[0], "rating": 5.0, "split": "train", "timestamp_ms": 0})
    reviews = pa.Table.from_pylist(rows)
    tables = {f"reviews/{split}/bucket-00000.parquet": reviews.filter(pa.compute.equal(reviews["split"], split))
              for split in ("train", "valid", "test")}
    return publish(root, "prepared", {**tables, "products/bucket-00000.parquet": pa.table({"product_id": ITEMS})})


def write_embeddings(root: Path, dimension: int = 8) -> Artifact:
    """Text vectors that say an item's taste, and a little of the item."""
    generator = np.random.default_rng(5)
    vectors = generator.normal(scale=0.3, size=(len(ITEMS), dimension)).astype(np.float32)
    vectors[:, 0] += np.where(np.arange(len(ITEMS)) % 2, 1.0, -1.0)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dimension)
    order = generator.permutation(len(ITEMS))
    table = pa.table({"product_id": pa.array(ITEMS), "vector": column}).take(order)
    half = len(ITEMS) // 2
    return publish(root, "embeddings", {"vectors/bucket-00000.parquet": table.slice(0, half),
                                        "vectors/bucket-00001.parquet": table.slice(half)})
