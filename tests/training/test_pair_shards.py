"""Tokenised shards against the tokenizer and the rows they were made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from small_pairs import pair_rows, table
from transformers import AutoTokenizer

from recsys_ray.artifacts import ArtifactError, stage
from recsys_ray.config import Config
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.schema import SchemaError
from recsys_ray.training.pair_shards import (
    PairTokenizer,
    ShardSettings,
    open_pair_shards,
    text_hashes,
    write_shard,
)

QUERY_TOKENS, DOCUMENT_TOKENS = 8, 16


@pytest.fixture(scope="module")
def settings(tiny_text_model: Callable[..., Path]) -> ShardSettings:
    encoder = TextEncoderConfig(model=str(tiny_text_model(prompts={"query": "q ", "document": "p "})), device="cpu")
    return ShardSettings(encoder.model_dump(mode="json"), QUERY_TOKENS, DOCUMENT_TOKENS)


def publish(root: Path, settings: ShardSettings, parts: list[list[dict]]) -> Path:
    tokenizer = PairTokenizer(settings)
    with stage(root, "pair_shards", "one") as staging:
        files = [entry for number, rows in enumerate(parts)
                 for entry in write_shard(table(rows), tokenizer, staging.path, f"train/bucket-{number:05d}")]
        staging.commit(files, config=Config(), facts={"settings": settings.identity()})
    return root


def test_a_batch_holds_the_tokens_and_groups_of_its_pairs(tmp_path: Path, settings: ShardSettings) -> None:
    rows = pair_rows(30, negatives=2)
    shards = open_pair_shards(publish(tmp_path, settings, [rows[:13], [], rows[13:]]))
    assert len(shards) == 30
    chosen = np.array([29, 0, 13, 12, 0])
    batch = shards.batch(chosen)
    tokenizer = AutoTokenizer.from_pretrained(settings.encoder["model"])

    def tokens(text: str, most: int) -> list[int]:
        return tokenizer(text, truncation=True, max_length=most)["input_ids"]

    wanted = [rows[place] for place in chosen]
    documents = [(row["text"], row["group_id"], -1) for row in wanted]
    for number, row in enumerate(wanted):
        documents += [(*hard, number) for hard in zip(row["negative_texts"], row["negative_group_ids"], strict=True)]
    assert [one.tolist() for one in batch.query_tokens] == [
        tokens("q " + row["query"], QUERY_TOKENS) for row in wanted]
    assert [one.tolist() for one in batch.document_tokens] == [
        tokens("p " + text, DOCUMENT_TOKENS) for text, _, _ in documents]
    assert batch.positive.tolist() == [0, 1, 2, 3, 4]
    assert batch.query_group.tolist() == [row["group_id"] for row in wanted]
    assert batch.document_group.tolist() == [group for _, group, _ in documents]
    assert batch.negative_of.tolist() == [number for _, _, number in documents]
    assert batch.document_text.tolist() == text_hashes([text for text, _, _ in documents]).tolist()
    assert max(map(len, batch.document_tokens)) == DOCUMENT_TOKENS
    assert shards.lengths[chosen].tolist() == [
        len(query) + len(document) for query, document in zip(batch.query_tokens, batch.document_tokens, strict=False)]


def test_fewer_hard_negatives_can_be_taken(tmp_path: Path, settings: ShardSettings) -> None:
    shards = open_pair_shards(publish(tmp_path, settings, [pair_rows(6, negatives=3)]))
    assert len(shards.batch(np.arange(4), negatives=1).document_tokens) == 8
    assert len(shards.batch(np.arange(4), negatives=0).document_tokens) == 4
    assert len(shards.batch(np.arange(4)).document_tokens) == 16


def test_equal_texts_are_kept_once(tmp_path: Path, settings: ShardSettings) -> None:
    rows = pair_rows(40, group_size=10)
    entries = write_shard(table(rows), PairTokenizer(settings), tmp_path, "train/one")
    assert [entry.rows for entry in entries] == [40, 4]


def test_a_split_without_pairs_is_empty_and_a_wrong_name_is_refused(tmp_path: Path, settings: ShardSettings) -> None:
    root = publish(tmp_path, settings, [pair_rows(4)])
    assert len(open_pair_shards(root, "valid")) == 0
    with pytest.raises(ValueError, match="train and valid"):
        open_pair_shards(root, "test")


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path, settings: ShardSettings) -> None:
    root = publish(tmp_path, settings, [pair_rows(4)])
    path = next(root.rglob("*.pairs.arrow"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="SHA-256"):
        open_pair_shards(root)
    with pytest.raises(SchemaError, match="'query'"):
        write_shard(pa.table({"pair_id": ["a"]}), PairTokenizer(settings), tmp_path, "x")


def test_limits_never_pass_the_encoders_own(settings: ShardSettings) -> None:
    wide = ShardSettings(settings.encoder, 1000, 2000).identity()
    assert (wide["query_tokens"], wide["document_tokens"]) == (64, 64)
