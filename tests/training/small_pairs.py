"""A small `pairs` artefact: products named by letters, queries that share some of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recsys_ray.artifacts import Artifact, stage
from recsys_ray.config import Config
from recsys_ray.schema import TRAINING_PAIR

LETTERS = list("abcdefghijklmnopqrstuvwxyz")


def pair_rows(count: int, split: str = "train", negatives: int = 0, group_size: int = 2, seed: int = 0
              ) -> list[dict[str, Any]]:
    """TRAINING_PAIR rows: `group_size` pairs of each product, `negatives` hard ones of each pair."""
    generator = np.random.default_rng([seed, len(split)])
    names = ["".join(generator.choice(LETTERS, 6)) for _ in range(count // group_size + negatives + 2)]
    texts = [f"{name} {' '.join(generator.choice(LETTERS, generator.integers(1, 20)))}" for name in names]
    rows = []
    for number in range(count):
        product = number // group_size
        others = [(product + 1 + step) % len(names) for step in range(negatives)]
        rows.append({
            "pair_id": f"{split}-{number}", "query": f"{names[product][:4]} {number}", "query_type": "keywords",
            "row_id": product, "product_id": f"P{product}", "group_id": product, "text": texts[product],
            "negative_row_ids": others, "negative_texts": [texts[other] for other in others],
            "negative_group_ids": others, "split": split})
    return rows


def table(rows: list[dict[str, Any]]) -> pa.Table:
    """The rows as TRAINING_PAIR."""
    return pa.Table.from_pylist(rows, schema=TRAINING_PAIR)


def write_pairs(root: Path, train: int = 64, valid: int = 20, negatives: int = 0) -> Artifact:
    """A published artefact of two buckets a split."""
    with stage(root, "pairs", f"{train}-{valid}-{negatives}") as staging:
        files = []
        for split, count in (("train", train), ("valid", valid)):
            rows = pair_rows(count, split, negatives)
            for bucket in range(2):
                files.append(staging.write_table(f"pairs/{split}/bucket-{bucket:05d}.parquet", table(rows[bucket::2])))
        return staging.commit(files, config=Config(), facts={"copied_token_gap": 0.05})
