"""BGE-M3 end to end: embedded, indexed, updated, merged and retrieved, against loops over all products."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys_ray.artifacts import open_artifact, stage
from recsys_ray.config import Config, fingerprint
from recsys_ray.ids import bucket_of, row_ids
from recsys_ray.models.bge_m3 import BgeM3Encoder
from recsys_ray.models.bge_m3_heads import BgeM3Heads
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.retrieval.batch import RetrieveConfig, retrieve_candidates
from recsys_ray.retrieval.embed import EmbedConfig, embed_products
from recsys_ray.retrieval.filters import Filters
from recsys_ray.retrieval.fusion import FusionConfig
from recsys_ray.retrieval.index_build import BuildIndexConfig, CompactIndexConfig, build_index, compact_index
from recsys_ray.retrieval.retriever import Retriever, RetrieverConfig, RetrieverError, refuse_candidates
from recsys_ray.retrieval.segments import IndexMismatch, merge_hits, open_index
from recsys_ray.schema import CANDIDATE, PRODUCT, PRODUCT_STATS, PRODUCT_TEXT, conform

BUCKETS = 4
COLOURS, KINDS = ("red", "blue", "green", "white"), ("dress", "shoe", "hat", "table", "lamp", "ring", "sofa", "rug")
QUERIES = ["red sofa", "x", "green lamps for a table", "", "zebra"]
OWN = FusionConfig(method="sum", dense_weight=0.4, sparse_weight=0.2, multi_weight=0.4)


def shop(changed: tuple[int, ...] = (), without: tuple[int, ...] = ()) -> dict[str, str]:
    names = [f"{colour} {kind} {'so ' * (i % 3)}{i}{j}" for i, colour in enumerate(COLOURS)
             for j, kind in enumerate(KINDS)]
    return {f"p{i}": name + (" changed" if i in changed else "") for i, name in enumerate(names) if i not in without}


def prepare(root: Path, texts: dict[str, str]) -> None:
    ids, names, words = row_ids(texts), list(texts), list(texts.values())
    hashes = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in words]
    tables = {
        "products": (PRODUCT, {"title": words, "group_id": ids, "category": [text.split()[1] for text in words]}),
        "product_text": (PRODUCT_TEXT, {"text": words, "lexical_text": words, "text_hash": hashes}),
        "product_stats": (PRODUCT_STATS, {"as_of_ms": [1] * len(ids), "num_reviews": [2] * len(ids)})}
    buckets = bucket_of(ids, BUCKETS)
    with stage(root, "prepared", fingerprint(texts)) as staging:
        files = []
        for name, (schema, columns) in tables.items():
            table = conform(pa.table({"row_id": ids, "product_id": names, **columns}), schema, name)
            files += [staging.write_table(f"{name}/bucket-{bucket:05d}.parquet",
                                          table.filter(pa.array(buckets == bucket)).sort_by("row_id"))
                      for bucket in range(BUCKETS)]
        staging.commit(files, config=Config(), facts={"num_buckets": BUCKETS, "template": "seed-v1"})


@pytest.fixture
def encoder(tiny_text_model: Callable[..., Path]) -> TextEncoderConfig:
    root = tiny_text_model(body="xlm-roberta", pooling="cls")
    torch.manual_seed(5)
    BgeM3Heads.new(32, 16).save(root)
    return TextEncoderConfig(model=str(root), device="cpu", dtype="float32", sparse=True, multi_vector=True)


def embed_config(root: Path, encoder: TextEncoderConfig) -> EmbedConfig:
    return EmbedConfig.model_validate({"prepared": root / "prepared", "output": root / "embeddings", "workers": 2,
                                       "unit_rows": 10, "encoder": encoder.model_dump(), "ray": {"progress": False}})


def index_config(root: Path) -> BuildIndexConfig:
    return BuildIndexConfig.model_validate({"prepared": root / "prepared", "embeddings": root / "embeddings",
                                            "output": root / "index", "rows_per_segment": 9, "rebuild_above": 0.5})


def build(root: Path, encoder: TextEncoderConfig, texts: dict[str, str]) -> None:
    prepare(root / "prepared", texts)
    embed_products(embed_config(root, encoder))
    build_index(index_config(root))


def asked(depth: int = 40, fusion: FusionConfig = OWN) -> RetrieverConfig:
    return RetrieverConfig(depth=depth, fusion=fusion)


def retrieve(root: Path, encoder: BgeM3Encoder, config: RetrieverConfig, filters: Filters | None = None,
             k: int = 10) -> pa.Table:
    index = open_index(root / "index", encoder_identity=encoder.identity)
    return Retriever(encoder, index, config).retrieve([f"q{i}" for i in range(len(QUERIES))], QUERIES, k, filters)


def looped(encoder: BgeM3Encoder, query: str, texts: dict[str, str]) -> dict[str, tuple[float, float, float]]:
    """Dense, sparse and multi-vector score of each product by loops over its tokens."""
    asks, has = encoder.encode_all_queries([query]), encoder.encode_all_documents(list(texts.values()))
    words = dict(zip(*asks.signals.sparse.row(0), strict=True))  # type: ignore[union-attr]
    found = {}
    for number, name in enumerate(texts):
        own = dict(zip(*has.signals.sparse.row(number), strict=True))  # type: ignore[union-attr]
        vectors = has.signals.multi.row(number).astype(float)  # type: ignore[union-attr]
        nearest = [max(float(q @ d) for d in vectors)
                   for q in asks.signals.multi.row(0).astype(float)]  # type: ignore[union-attr]
        found[name] = (float(has.dense[number] @ asks.dense[0]),  # type: ignore[index]
                       sum(words[token] * own[token] for token in words if token in own), float(np.mean(nearest)))
    return found


def assert_same(one: pa.Table, other: pa.Table) -> None:
    for name in ("query_id", "product_id", "rank"):
        assert one[name].to_pylist() == other[name].to_pylist(), name
    for name in ("score", "dense_score", "lexical_score", "sparse_score", "multi_score"):
        np.testing.assert_array_equal(one[name].to_numpy(), other[name].to_numpy(), err_msg=name)


@pytest.mark.ray
def test_all_parts_from_texts_to_candidates(tmp_path: Path, encoder: TextEncoderConfig, local_ray: None) -> None:
    texts = shop()
    build(tmp_path, encoder, texts)
    loaded = BgeM3Encoder(encoder)
    index = open_index(tmp_path / "index")
    assert len(index.segments) > 2
    assert {Path(name).name for name in index.artifact.names("segments/")} >= {
        "sparse.npz", "multi_offsets.npy", "multi_vectors.npy"}
    assert isinstance(index.segments[0].signals.multi.vectors, np.memmap)  # type: ignore[union-attr]

    for filters in (None, Filters(category=("lamp", "sofa"))):
        table = retrieve(tmp_path, loaded, asked(), filters)
        assert table.schema.equals(CANDIDATE)
        for number, query in enumerate(QUERIES):
            rows = [row for row in table.to_pylist() if row["query_id"] == f"q{number}"]
            if not query:
                assert rows == []
                continue
            allowed = {name: text for name, text in texts.items()
                       if filters is None or text.split()[1] in ("lamp", "sofa")}
            expected = looped(loaded, query, allowed)
            for row in rows:
                found = (row["dense_score"], row["sparse_score"], row["multi_score"])
                np.testing.assert_allclose(found, expected[row["product_id"]], atol=2e-4)
            totals = {name: 0.4 * d + 0.2 * s + 0.4 * m for name, (d, s, m) in expected.items()}
            best = sorted(totals.values(), reverse=True)[:10]
            np.testing.assert_allclose([row["score"] for row in rows], best, atol=3e-4)

    config = RetrieveConfig.model_validate({
        "index": tmp_path / "index", "output": tmp_path / "candidates", "encoder": encoder.model_dump(), "top_k": 10,
        "queries": {"format": "table", "path": str(write_queries(tmp_path))}, "retriever": asked().model_dump()})
    batch = pa.concat_tables(retrieve_candidates(config).tables("candidates-"))
    assert_same(batch.sort_by([("query_id", "ascending"), ("rank", "ascending")]), retrieve(tmp_path, loaded, asked()))


def write_queries(root: Path) -> Path:
    path = root / "queries.jsonl"
    path.write_text("\n".join(json.dumps({"query_id": f"q{i}", "query": query}) for i, query in enumerate(QUERIES)))
    return path


@pytest.mark.ray
def test_updates_and_merging_leave_no_trace(tmp_path: Path, encoder: TextEncoderConfig, local_ray: None) -> None:
    build(tmp_path, encoder, shop())
    now = shop(changed=(3, 17), without=(5,))
    build(tmp_path, encoder, now)
    facts = open_artifact(tmp_path / "embeddings", "embeddings").manifest.facts
    assert (facts["embedded_now"], facts["reused"]) == (2, 29)
    index = open_index(tmp_path / "index")
    assert sum(int((~segment.alive).sum()) for segment in index.segments) == 3      # tombstones: an update, no rebuild
    build(tmp_path / "fresh", encoder, now)
    loaded = BgeM3Encoder(encoder)
    for config in (asked(depth=5), asked(depth=40), asked(40, FusionConfig(
            window=8, dense_weight=0.2, sparse_weight=0.3, multi_weight=0.2))):
        fresh = retrieve(tmp_path / "fresh", loaded, config)
        assert_same(retrieve(tmp_path, loaded, config), fresh)
        names = [segment.name for segment in index.segments]
        encoding = loaded.encode_all_queries(QUERIES[:2])
        shards = [open_index(tmp_path / "index", segments=part).search(
            encoding.dense, QUERIES[:2], config.depth, None, encoding.signals) for part in (names[:2], names[2:])]
        whole = index.search(encoding.dense, QUERIES[:2], config.depth, None, encoding.signals)
        for number in range(2):
            merged = merge_hits([shard[number] for shard in shards], config.depth)
            assert merged.product_ids == whole[number].product_ids
            np.testing.assert_array_equal(merged.multi_scores, whole[number].multi_scores)
            np.testing.assert_array_equal(merged.sparse_scores, whole[number].sparse_scores)
    before = retrieve(tmp_path, loaded, asked())
    compact_index(CompactIndexConfig(index=tmp_path / "index", rows_per_segment=20))
    assert len(open_index(tmp_path / "index").segments) == 2
    assert_same(retrieve(tmp_path, loaded, asked()), before)


@pytest.mark.ray
def test_what_was_not_embedded_cannot_be_asked_and_damage_is_refused(
        tmp_path: Path, encoder: TextEncoderConfig, local_ray: None) -> None:
    plain = encoder.replace(sparse=False, multi_vector=False)
    build(tmp_path / "plain", plain, shop())
    build(tmp_path / "whole", encoder, shop())
    loaded = BgeM3Encoder(encoder)
    with pytest.raises(IndexMismatch, match="sparse_sha256"):
        retrieve(tmp_path / "plain", loaded, asked())
    index = open_index(tmp_path / "plain" / "index")
    for fusion, message in ((FusionConfig(sparse_weight=0.1), "no token weights"),
                            (FusionConfig(multi_weight=0.1), "no token vectors")):
        with pytest.raises(IndexMismatch, match=message):
            Retriever(loaded, index, RetrieverConfig(fusion=fusion)).retrieve(["q"], ["red"], 3)
    half = BgeM3Encoder(encoder.replace(multi_vector=False))
    with pytest.raises(RetrieverError, match=r"encoder\.multi_vector"):
        Retriever(half, open_index(tmp_path / "whole" / "index"), asked()).retrieve(["q"], ["red"], 3)

    both = RetrieverConfig(depth=40, fusion=FusionConfig(window=8))     # signals are there, but have no weight
    table = retrieve(tmp_path / "whole", loaded, both)
    assert table["sparse_score"].null_count == table["multi_score"].null_count == table.num_rows
    columns = ["query_id", "product_id", "rank"]
    index_plain = Retriever(loaded, index, both).retrieve([f"q{i}" for i in range(len(QUERIES))], QUERIES, 10)
    assert table.select(columns).equals(index_plain.select(columns))
    # the vectors come from another form of the same sums, and normalising the close scores of random weights
    # makes its rounding some hundred times larger
    np.testing.assert_allclose(table["score"].to_numpy(), index_plain["score"].to_numpy(), atol=1e-3)
    with pytest.raises(RetrieverError, match="sparse_score"):
        refuse_candidates(table, OWN, 3)
    again = refuse_candidates(retrieve(tmp_path / "whole", loaded, asked(), k=40), OWN, 10)
    assert_same(again, retrieve(tmp_path / "whole", loaded, asked()))

    artifact = open_artifact(tmp_path / "whole" / "index", "index")
    for name in ("sparse.npz", "multi_offsets.npy", "multi_vectors.npy"):
        shutil.copytree(tmp_path / "whole" / "index", tmp_path / name)
        path = tmp_path / name / artifact.path.relative_to(tmp_path / "whole" / "index") / next(
            one for one in artifact.names("segments/") if one.endswith(name))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=name):
            open_index(tmp_path / name)
