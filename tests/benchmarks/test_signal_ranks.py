"""Ranks by all scores against scores put together product by product."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from retriever_ranks import Asked, Catalogue, encoder_ranks
from signal_ranks import SignalsConfig, signal_ranks

from recsys_ray.models.bge_m3 import BgeM3Encoder
from recsys_ray.models.bge_m3_heads import BgeM3Heads
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.retrieval.fusion import FusionConfig, fuse

TEXTS = [f"{colour} {kind} {number % 4}" for number, (colour, kind) in enumerate(
    (colour, kind) for colour in ("red", "blue", "green") for kind in ("dress", "shoe", "hat", "table", "lamp"))]
QUERIES = ["red lamp", "a table", "green 3", "zebra"]


@pytest.fixture(scope="module")
def encoder(tiny_text_model: Callable[..., Path]) -> BgeM3Encoder:
    root = tiny_text_model(body="xlm-roberta", pooling="cls")
    torch.manual_seed(5)
    BgeM3Heads.new(32, 16).save(root)
    return BgeM3Encoder(TextEncoderConfig(model=str(root), device="cpu", dtype="float32", sparse=True,
                                          multi_vector=True))


@pytest.mark.parametrize("rescored", [3, 100])
def test_all_scores_rank_as_put_together_by_hand(encoder: BgeM3Encoder, rescored: int) -> None:
    count = len(TEXTS)
    catalogue = Catalogue(np.arange(count), [f"p{i}" for i in range(count)], TEXTS, TEXTS, np.zeros(count, np.int64))
    asked = Asked(QUERIES, np.array([4, 3, 10, 7]), np.zeros(4, bool), np.zeros(4, bool), list("abcd"), list("efgh"))
    hybrid, config = FusionConfig(window=10), SignalsConfig(rescored=rescored)
    found = signal_ranks(encoder, catalogue, asked, hybrid, config)
    assert {name: found[name] for name in ("dense", "hybrid")} == encoder_ranks(encoder, catalogue, asked, hybrid)
    has, asks = encoder.encode_all_documents(TEXTS), encoder.encode_all_queries(QUERIES)
    for number, query in enumerate(QUERIES):
        dense, lexical = has.dense @ asks.dense[number], catalogue.bm25.document_scores(query)
        words = dict(zip(*asks.signals.sparse.row(number), strict=True))
        sparse = np.array([sum(words.get(token, 0) * weight for token, weight in zip(
            *has.signals.sparse.row(place), strict=True)) for place in range(count)], np.float32)
        multi = np.array([np.mean([max(float(q @ d) for d in has.signals.multi.row(place).astype(float))
                                   for q in asks.signals.multi.row(number).astype(float)]) for place in range(count)],
                         np.float32)
        first = fuse(dense, lexical, FusionConfig(dense_weight=0.3, sparse_weight=0.05), sparse)
        multi[np.argsort(-first, kind="stable")[rescored:]] = np.nan
        whole = fuse(dense, lexical, config.fusion, sparse, multi)
        better = int((whole > whole[asked.target[number]] + 1e-6).sum())
        as_good = int((whole > whole[asked.target[number]] - 1e-6).sum())
        assert better < found["all"][number] <= as_good
    assert found["all"] != found["hybrid"]
