"""What queries say, against counts by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys_ray.artifacts import stage
from recsys_ray.config import Config, ConfigError
from recsys_ray.training.pair_shards import PairShards, PairTokenizer, open_pair_shards, write_shard
from recsys_ray.training.query_information import informative, query_information
from recsys_ray.training.sampler import BatchSampler, SamplerConfig


class Words(PairTokenizer):
    """A number for each word."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def __call__(self, texts: Any, kind: str) -> list[np.ndarray]:
        return [np.array([self.known.setdefault(word, len(self.known) + 3) for word in text.split()], np.int32)
                for text in texts]


def shards(root: Path, parts: list[list[tuple[str, str]]]) -> PairShards:
    words = Words()
    with stage(root, "pair_shards", "one") as staging:
        files = []
        for number, part in enumerate(parts):
            rows = [{"pair_id": f"{number}-{place}", "query": query, "query_type": "keywords", "row_id": place,
                     "product_id": text, "group_id": place, "text": text, "negative_row_ids": [0],
                     "negative_texts": ["rare words that do not count"], "negative_group_ids": [0], "split": "train"}
                    for place, (query, text) in enumerate(part)]
            files += write_shard(pa.Table.from_pylist(rows), words, staging.path, f"train/part-{number}")
        staging.commit(files, config=Config(), facts={"settings": {}})
    return open_pair_shards(root)


def test_information_by_hand(tmp_path: Path) -> None:
    """Four different positives: "mug" is in all of them, "blue" in two, "oak" in one, "rare" only in a negative.

    ln(4 / 4) = 0, ln(4 / 2) / ln 4 = 1 / 2, ln(4 / 1) / ln 4 = 1.
    """
    pairs = shards(tmp_path, [
        [("mug", "mug blue"), ("blue blue mug", "mug blue"), ("oak", "oak mug")],
        [("blue oak", "blue mug mug"), ("rare nothing", "mug plain"), ("", "mug plain")]])
    assert query_information(pairs).tolist() == pytest.approx([0, 0.5, 1, 1.5, 0, 0])
    assert informative(pairs, 0.9).tolist() == [2, 3]
    assert informative(pairs, 0).tolist() == [0, 1, 2, 3, 4, 5]
    assert math.isclose(query_information(pairs)[3], (math.log(2) + math.log(4)) / math.log(4))


def test_only_informative_pairs_are_drawn() -> None:
    keys, only = np.arange(40), np.arange(1, 40, 3)
    sampler = BatchSampler(SamplerConfig(batch_size=4), 5, keys + 1, keys, keys, only)
    assert sampler.steps_per_epoch == 3
    for epoch in range(2):
        drawn = np.concatenate([sampler.batch(3 * epoch + step) for step in range(3)])
        assert len(set(drawn.tolist())) == 12
        assert set(drawn.tolist()) <= set(only.tolist())
    with pytest.raises(ConfigError, match="only 3 to train on, of 40"):
        BatchSampler(SamplerConfig(batch_size=4), 5, keys + 1, keys, keys, only[:3])
