"""Batch retrieval on Ray: every query answered once, as in one process, also after a run that died."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_ray.artifacts import Artifact, stage
from recsys_ray.config import Config, fingerprint
from recsys_ray.ids import row_ids
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.retrieval import batch
from recsys_ray.retrieval.batch import RetrieveConfig, retrieve_candidates
from recsys_ray.retrieval.catalogue_rows import row_hashes
from recsys_ray.retrieval.filters import Filters
from recsys_ray.retrieval.fusion import FusionConfig
from recsys_ray.retrieval.lexical import LexicalConfig, Postings, global_statistics
from recsys_ray.retrieval.query_sets import ReviewQueries, TableQueries
from recsys_ray.retrieval.retriever import Retriever, RetrieverConfig
from recsys_ray.retrieval.segments import LEXICON, ROWS, open_index, write_segment
from recsys_ray.retrieval.vector_index import VectorIndexConfig
from recsys_ray.schema import CANDIDATE, JUDGMENT, QUERY, REVIEW, conform

pytestmark = pytest.mark.ray

COLOURS, KINDS = ("red", "blue", "green", "white", "black"), ("dress", "shoe", "hat", "table", "lamp", "ring", "sofa")
PRODUCTS = {f"p{i}-{j}": f"{colour} {kind} number{i}{j}" for i, colour in enumerate(COLOURS)
            for j, kind in enumerate(KINDS)}


@pytest.fixture
def encoder(tiny_text_model: Callable[..., Path]) -> TextEncoderConfig:
    return TextEncoderConfig(model=str(tiny_text_model()), device="cpu", dtype="float32")


def build(root: Path, encoder: TextEncoderConfig) -> None:
    """An index of two segments."""
    loaded = build_text_encoder(encoder)
    ids = list(PRODUCTS)
    order = np.argsort(row_ids(ids))
    with stage(root, "index", fingerprint(sorted(PRODUCTS))) as staging:
        entries, postings = [], []
        for name, part in (("s0", order[:20]), ("s1", order[20:])):
            named = [ids[i] for i in part]
            texts = [PRODUCTS[one] for one in named]
            rows = pa.table({"row_id": row_ids(named), "product_id": named, "title": texts, "text": texts,
                             "lexical_text": texts, "category": [text.split()[1] for text in texts]})
            rows = pa.table({field.name: rows[field.name] if field.name in rows.column_names
                             else pa.nulls(len(named), field.type) for field in ROWS if field.name != "row_hash"})
            rows = rows.append_column("row_hash", row_hashes(rows)).cast(ROWS)
            entries += write_segment(staging.path, name, rows, loaded.encode_documents(texts), VectorIndexConfig(),
                                     LexicalConfig())
            postings.append(Postings.load(staging.path / f"segments/{name}/postings.npz"))
        global_statistics(postings).save(staging.path / LEXICON)
        staging.commit([*entries, staging.entry(LEXICON)], config=Config(), facts={
            "encoder": loaded.identity, "segments": ["s0", "s1"], "live_rows": len(ids),
            "vector": VectorIndexConfig().model_dump(mode="json"),
            "lexical": LexicalConfig().model_dump(mode="json")})


def asked(tmp_path: Path, count: int = 23) -> TableQueries:
    rng = np.random.default_rng(1)
    queries = [f"{rng.choice(COLOURS)} {rng.choice(KINDS)}" for _ in range(count - 1)] + [" "]
    path = tmp_path / "queries.parquet"
    pq.write_table(pa.table({"query_id": [f"q{i}" for i in range(count)], "query": queries}), path)
    return TableQueries(path=str(path))


def config_of(tmp_path: Path, encoder: TextEncoderConfig, **changes: object) -> RetrieveConfig:
    values = {"index": tmp_path / "index", "output": tmp_path / "candidates", "queries": asked(tmp_path),
              "encoder": encoder, "retriever": RetrieverConfig(depth=12, fusion=FusionConfig(window=8)), "top_k": 5,
              "queries_per_file": 4, "workers": 2, **changes}
    return RetrieveConfig.model_validate(values)


def candidates(artifact: Artifact) -> pa.Table:
    table = pa.concat_tables(artifact.tables("candidates-"))
    return table.sort_by([("query_id", "ascending"), ("rank", "ascending")])


def test_every_query_is_answered_as_in_one_process(tmp_path: Path, encoder: TextEncoderConfig, local_ray: None) -> None:
    build(tmp_path / "index", encoder)
    config = config_of(tmp_path, encoder)
    artifact = retrieve_candidates(config)
    queries = artifact.table("queries.parquet")
    assert queries.schema.equals(QUERY)
    assert queries.num_rows == 22
    index = open_index(tmp_path / "index", encoder_identity=build_text_encoder(encoder).identity)
    one_process = Retriever(build_text_encoder(encoder), index, config.retriever).retrieve(
        queries["query_id"].to_pylist(), queries["query"].to_pylist(), 5)
    found, expected = candidates(artifact), one_process.sort_by([("query_id", "ascending"), ("rank", "ascending")])
    assert found.schema.equals(CANDIDATE)
    assert found.num_rows == 22 * 5
    for name in ("query_id", "product_id", "rank", "row_id"):
        assert found[name].to_pylist() == expected[name].to_pylist(), name
    np.testing.assert_allclose(found["dense_score"].to_numpy(), expected["dense_score"].to_numpy(), atol=1e-3)
    np.testing.assert_array_equal(found["lexical_score"].to_numpy(), expected["lexical_score"].to_numpy())
    facts = artifact.manifest.facts
    assert (facts["queries"], facts["skipped"], facts["candidates"], facts["mode"]) == (22, 1, 110, "hybrid")
    assert len(artifact.names("candidates-")) == 6
    assert sorted(path.suffix for path in artifact.path.iterdir()).count(".json") == 1  # the manifest's
    assert retrieve_candidates(config).manifest.version == artifact.manifest.version
    assert retrieve_candidates(config.replace(top_k=3)).manifest.version != artifact.manifest.version


def test_a_run_that_died_continues_with_the_same_rows(tmp_path: Path, encoder: TextEncoderConfig, local_ray: None,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "index", encoder)
    config = config_of(tmp_path, encoder, retriever=RetrieverConfig(mode="bm25", depth=12))
    whole = retrieve_candidates(config.replace(output=tmp_path / "uninterrupted"))

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(batch.Staging, "commit", dies)
        with pytest.raises(KeyboardInterrupt):
            retrieve_candidates(config)
    files = sorted((tmp_path / "candidates" / "staging").rglob("candidates-*.parquet"))
    assert len(files) == 6
    kept = files[4].stat().st_mtime_ns
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-9])
    files[2].with_suffix(".json").unlink()
    artifact = retrieve_candidates(config)
    assert (artifact.path / files[4].name).stat().st_mtime_ns == kept
    artifact.verify()
    assert candidates(artifact).equals(candidates(whole))


def test_reviews_of_a_split_with_their_judgments(tmp_path: Path, encoder: TextEncoderConfig, local_ray: None) -> None:
    build(tmp_path / "index", encoder)
    texts = ["a red dress number00 that goes with my white hat", "nice", None, "blue hat number12 blue hat"]
    ids = ["p0-0", "p0-1", "p0-2", "p1-2"]
    reviews = conform(pa.table({
        "review_id": ["r0", "r1", "r2", "r3"], "row_id": row_ids(ids), "product_id": ids, "text": texts,
        "timestamp_ms": [1, 2, 3, 4], "split": ["test"] * 4, "cold": [True, False, False, False]}), REVIEW, "reviews")
    with stage(tmp_path / "prepared", "prepared", "00") as staging:
        entries = [staging.write_table(f"reviews/test/bucket-0000{i}.parquet", reviews.slice(2 * i, 2)) for i in (0, 1)]
        staging.commit(entries, config=Config())
    artifact = retrieve_candidates(config_of(
        tmp_path, encoder, queries=ReviewQueries(prepared=tmp_path / "prepared"),
        retriever=RetrieverConfig(mode="bm25")))
    assert artifact.manifest.facts["skipped"] == 1
    assert set(artifact.manifest.parents) == {"index", "prepared"}
    slices = {row["query_id"]: row["slices"] for row in artifact.table("queries.parquet").to_pylist()}
    assert slices == {"r0": ["cold", "answerable"], "r1": ["warm", "generic"], "r3": ["warm", "generic"]}
    judgments = artifact.table("judgments.parquet")
    assert judgments.schema.equals(JUDGMENT)
    assert dict(zip(judgments["query_id"].to_pylist(), judgments["product_id"].to_pylist(), strict=True)) == {
        "r0": "p0-0", "r1": "p0-1", "r3": "p1-2"}
    best = {row["query_id"]: row["product_id"] for row in candidates(artifact).to_pylist() if row["rank"] == 1}
    assert best == {"r0": "p0-0", "r3": "p1-2"}


def test_filters_hold_for_every_candidate(tmp_path: Path, encoder: TextEncoderConfig, local_ray: None) -> None:
    build(tmp_path / "index", encoder)
    artifact = retrieve_candidates(config_of(tmp_path, encoder, filters=Filters(category=("hat",))))
    found = candidates(artifact)
    assert found.num_rows == 22 * 5
    assert all(PRODUCTS[one].split()[1] == "hat" for one in found["product_id"].to_pylist())


def test_vectors_of_another_encoder_are_refused_before_any_work(
        tmp_path: Path, encoder: TextEncoderConfig, tiny_text_model: Callable[..., Path], local_ray: None) -> None:
    build(tmp_path / "index", encoder)
    other = encoder.replace(model=str(tiny_text_model(seed=5)))
    with pytest.raises(ValueError, match="another encoder"):
        retrieve_candidates(config_of(tmp_path, other))
    assert not (tmp_path / "candidates" / "staging").exists()
