"""Training pairs with their negatives as lists for a cross-encoder: one positive and its negatives a query."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from recsys_ray.artifacts import Artifact, find_artifact, open_artifact, stage
from recsys_ray.config import Config, fingerprint
from recsys_ray.data.pairs import draws
from recsys_ray.schema import RERANKER_PAIR, TRAINING_PAIR

KIND = "reranker_pairs"
VALID_IN = 20       # one train pair of so many is validated on


class PairListsConfig(Config):
    """Which pairs, where to."""

    pairs: Path
    output: Path
    seed: int = 7


def pair_lists(config: PairListsConfig) -> Artifact:
    """The `reranker_pairs` artefact of the *train* pairs: some of them are its valid split.

    The pairs' own valid split is a later period that a second stage learns from: no choice here may know it.
    """
    pairs = open_artifact(config.pairs, "pairs")
    key = fingerprint({"pairs": pairs.manifest.fingerprint, "seed": config.seed})
    if (done := find_artifact(config.output, KIND, key)) is not None:
        return done
    train = pa.concat_tables([TRAINING_PAIR.empty_table(), *(one.cast(TRAINING_PAIR)
                                                             for one in pairs.tables("pairs/train/"))])
    valid = draws(train["pair_id"].to_pylist(), config.seed) % VALID_IN == 0
    with stage(config.output, KIND, key) as staging:
        files = [staging.write_table(f"pairs/{split}/lists.parquet", list_rows(train.filter(pa.array(mask)), split))
                 for split, mask in (("train", ~valid), ("valid", valid))]
        return staging.commit(files, config=config, parents={"pairs": pairs.manifest},
                              facts={"lists": {"train": int((~valid).sum()), "valid": int(valid.sum())}})


def list_rows(pairs: pa.Table, split: str) -> pa.Table:
    """RERANKER_PAIR rows of TRAINING_PAIR rows."""
    rows = []
    for pair in pairs.to_pylist():
        texts = [(pair["text"], pair["product_id"], 1.0, "positive")]
        texts += [(text, str(row), 0.0, "mined") for text, row in zip(pair["negative_texts"], pair["negative_row_ids"],
                                                                      strict=True)]
        rows += [{"query_id": pair["pair_id"], "query": pair["query"], "product_id": product, "text": text,
                  "label": label, "origin": origin, "split": split} for text, product, label, origin in texts]
    return pa.Table.from_pylist(rows, schema=RERANKER_PAIR)


def seconds(before: float, after: float, queries: int) -> float:
    """Milliseconds a query."""
    return round(1000 * (after - before) / max(1, queries), 3)


def ranks_of_the_relevant(scores: np.ndarray, labels: np.ndarray, row_ids: np.ndarray, sizes: np.ndarray) -> list[int]:
    """Where each list's one relevant candidate stands by score (ties by row id), 0 where the list has none."""
    found, start = [], 0
    for size in sizes.tolist():
        part = slice(start, start + size)
        order = np.lexsort((row_ids[part], -scores[part]))
        place = np.flatnonzero(labels[part][order] > 0)
        found.append(int(place[0]) + 1 if len(place) else 0)
        start += size
    return found
