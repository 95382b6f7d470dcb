"""Segments: any division of the rows answers as one segment; a damaged or foreign index is refused."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from recsys_ray.artifacts import MANIFEST, Artifact, stage
from recsys_ray.config import Config
from recsys_ray.ids import row_ids
from recsys_ray.retrieval.catalogue_rows import catalogue_rows, row_hashes
from recsys_ray.retrieval.concern_columns import concern_columns
from recsys_ray.retrieval.filters import Filters
from recsys_ray.retrieval.lexical import LexicalConfig, Postings, global_statistics
from recsys_ray.retrieval.segments import (
    LEXICON,
    ROWS,
    IndexMismatch,
    SegmentHits,
    merge_hits,
    open_index,
    segment_files,
    tombstones_file,
    write_segment,
)
from recsys_ray.retrieval.vector_index import VectorIndexConfig
from recsys_ray.schema import PRODUCT, PRODUCT_STATS, PRODUCT_TEXT, conform

IDENTITY = {"model": "words", "dimension": 16, "weights_sha256": "aa"}
NOUNS, COLOURS = ("sofa", "lamp", "chair", "shelf"), ("red", "blue", "green")
COUNT = 200


def catalogue() -> tuple[pa.Table, npt.NDArray[np.float32]]:
    """ROWS and vectors; every fourth product is an exact copy of the one before it, text and vector."""
    ids = [f"p{number}" for number in range(COUNT)]
    model = [number - 1 if number % 4 == 3 else number for number in range(COUNT)]
    texts = [f"{COLOURS[m % 3]} {NOUNS[m % 4]} {'soft ' * (m % 5)}" for m in model]
    rows = {"row_id": row_ids(ids), "product_id": ids, "title": texts, "text": texts, "lexical_text": texts,
            "category": [NOUNS[m % 4] for m in model], "price_cents": [None if m % 3 == 0 else 100 * m for m in model]}
    table = pa.table({field.name: pa.array(rows[field.name], field.type) if field.name in rows
                      else pa.nulls(COUNT, field.type) for field in ROWS if field.name != "row_hash"})
    vectors = np.random.default_rng(4).normal(size=(COUNT, 16)).astype(np.float32)[[m // 2 for m in model]]
    order = np.argsort(rows["row_id"])
    table = table.take(pa.array(order))
    return table.append_column("row_hash", row_hashes(table)).cast(ROWS), vectors[order]


def publish(root: Path, places: Sequence[npt.NDArray[np.int64]], dead: dict[int, list[int]] | None = None,
            kind: str = "flat", fingerprint: str = "x") -> Artifact:
    """An index with one segment per array of positions; `dead` names dead positions by segment number."""
    rows, vectors = catalogue()
    vector, lexical = VectorIndexConfig.model_validate({"kind": kind}), LexicalConfig()
    with stage(root, "index", fingerprint) as staging:
        entries, postings, alive = [], [], []
        for number, part in enumerate(places):
            name = f"s{number}"
            entries += write_segment(staging.path, name, rows.take(pa.array(part)), vectors[part], vector, lexical)
            postings.append(Postings.load(staging.path / segment_files(name)[1]))
            alive.append(~np.isin(np.arange(len(part)), (dead or {}).get(number, [])))
            if dead and number in dead:
                (staging.path / "tombstones").mkdir(exist_ok=True)
                np.save(staging.path / tombstones_file(name), np.array(dead[number], np.int64))
                entries.append(staging.entry(tombstones_file(name)))
        global_statistics(postings, alive).save(staging.path / LEXICON)
        return staging.commit([*entries, staging.entry(LEXICON)], config=Config(), facts={
            "encoder": IDENTITY, "template": "seed-v1", "segments": [f"s{number}" for number in range(len(places))],
            "live_rows": int(sum(map(np.sum, alive))), "vector": vector.model_dump(mode="json"),
            "lexical": lexical.model_dump(mode="json")})


def assert_same(found: Sequence[SegmentHits], expected: Sequence[SegmentHits]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.row_ids.tolist() == other.row_ids.tolist()
        assert one.product_ids == other.product_ids
        np.testing.assert_array_equal(one.dense_scores, other.dense_scores)
        np.testing.assert_array_equal(one.lexical_scores, other.lexical_scores)


QUERIES = ["red sofa", "soft lamp", "green", "nothing known", ""]
VECTORS = np.random.default_rng(9).normal(size=(len(QUERIES), 16)).astype(np.float32)
FILTERS = [None, Filters(category=("lamp",)), Filters(price_max_cents=5000), Filters(category=("none",))]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("asked", ["dense", "lexical", "both"])
def test_any_division_answers_as_one_segment(asked: str, filters: Filters | None, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    publish(tmp_path / "one", [np.arange(COUNT)])
    whole = open_index(tmp_path / "one")
    vectors, texts = VECTORS if asked != "lexical" else None, QUERIES if asked != "dense" else None
    owner = rng.integers(0, 5, COUNT)
    for number, places in enumerate(([np.arange(90), np.arange(90, COUNT)],
                                     [np.flatnonzero(owner == part) for part in range(5)])):
        publish(tmp_path / f"many{number}", places)
        divided = open_index(tmp_path / f"many{number}")
        for depth in (1, 7, 20, COUNT):
            expected = whole.search(vectors, texts, depth, filters)
            assert_same(divided.search(vectors, texts, depth, filters), expected)
            shards = [open_index(tmp_path / f"many{number}", segments=[segment.name]) for segment in divided.segments]
            answers = [shard.search(vectors, texts, depth, filters) for shard in shards]
            assert_same([merge_hits(of_query, depth) for of_query in zip(*answers, strict=True)], expected)


def test_the_candidates_are_the_best_by_either_score_with_both_scores(tmp_path: Path) -> None:
    rows, vectors = catalogue()
    publish(tmp_path, [np.arange(COUNT)])
    index = open_index(tmp_path)
    ids = rows["row_id"].to_numpy()
    lexical = index.segments[0].lexical
    for query, text, hits in zip(VECTORS, QUERIES, index.search(VECTORS, QUERIES, 9), strict=True):
        dense, words = vectors.astype(np.float64) @ query, lexical.document_scores(text)
        by_dense = np.lexsort((ids, -dense.round(5)))[:9]
        by_words = [place for place in np.lexsort((ids, -words)) if words[place] > 0][:9]
        expected = sorted({*ids[by_dense].tolist(), *ids[by_words].tolist()})
        assert hits.row_ids.tolist() == expected
        places = [int(np.flatnonzero(ids == one)[0]) for one in expected]
        np.testing.assert_allclose(hits.dense_scores, dense[places], atol=1e-5)
        np.testing.assert_array_equal(hits.lexical_scores, words[places])


def test_dead_rows_are_as_if_they_had_never_been(tmp_path: Path) -> None:
    half = [np.arange(0, 100), np.arange(100, COUNT)]
    dead = {0: list(range(0, 100, 3)), 1: [0, 99]}
    alive = np.ones(COUNT, dtype=np.bool_)
    alive[[*dead[0], 100, 199]] = False
    artifact = publish(tmp_path / "dead", half, dead)
    publish(tmp_path / "fresh", [np.flatnonzero(alive)])
    index, fresh = open_index(tmp_path / "dead"), open_index(tmp_path / "fresh")
    assert index.live_rows == fresh.live_rows == artifact.manifest.facts["live_rows"] == int(alive.sum())
    assert_same(index.search(VECTORS, QUERIES, 25), fresh.search(VECTORS, QUERIES, 25))
    rows = catalogue()[0]
    gone, there = rows["product_id"][0].as_py(), rows["product_id"][1].as_py()
    assert index.product(gone) is None
    assert index.product(there)["product_id"] == there  # type: ignore[index]
    assert index.product("never there") is None
    with pytest.raises(KeyError):
        index.products(row_ids([gone]), ["row_id", "title"])
    assert index.products(row_ids([there]), ["row_id", "title"])[0]["title"] == rows["title"][1].as_py()


def test_every_changed_byte_is_refused(tmp_path: Path) -> None:
    artifact = publish(tmp_path / "good", [np.arange(90), np.arange(90, COUNT)], {0: [3, 4]}, kind="hnsw")
    names = [entry.path for entry in artifact.manifest.files]
    assert {Path(name).name for name in names} == {"rows.parquet", "postings.npz", "vectors.npy", "vectors.faiss",
                                                   "segment.json", "lexicon.npz", "s0.npy"}
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    version = Path("versions") / artifact.manifest.version
    rng = np.random.default_rng(17)
    for number in range(240):
        name = names[number % len(names)]
        path = tmp_path / "bad" / version / name
        content = (tmp_path / "good" / version / name).read_bytes()
        place = int(rng.integers(len(content)))
        flipped = content[:place] + bytes([content[place] ^ (1 << int(rng.integers(8)))]) + content[place + 1:]
        path.write_bytes({0: content[:place], 1: content + b"\0"}.get(number // len(names) % 8, flipped))
        with pytest.raises(ValueError, match=Path(name).name):
            open_index(tmp_path / "bad")
        path.write_bytes(content)
    open_index(tmp_path / "bad")
    for name in names:
        path = tmp_path / "bad" / version / name
        path.rename(path.with_suffix(".away"))
        with pytest.raises(ValueError, match=rf"{Path(name).name}: missing"):
            open_index(tmp_path / "bad")
        path.with_suffix(".away").rename(path)
    manifest = tmp_path / "bad" / version / MANIFEST
    manifest.write_text(manifest.read_text()[:-40])
    with pytest.raises(ValueError, match=MANIFEST):
        open_index(tmp_path / "bad")


def test_files_of_two_indexes_do_not_mix(tmp_path: Path) -> None:
    """A whole, valid segment file of another index in place of ours is caught, too."""
    ours = publish(tmp_path / "ours", [np.arange(90), np.arange(90, COUNT)])
    other = publish(tmp_path / "other", [np.arange(0, COUNT, 2)])
    for name in segment_files("s0")[:3]:
        kept = (ours.path / name).read_bytes()
        (ours.path / name).write_bytes((other.path / name).read_bytes())
        with pytest.raises(ValueError, match=Path(name).name):
            open_index(tmp_path / "ours")
        (ours.path / name).write_bytes(kept)
    assert open_index(tmp_path / "ours").live_rows == COUNT


def test_a_foreign_index_is_refused(tmp_path: Path) -> None:
    publish(tmp_path / "index", [np.arange(COUNT)])
    with pytest.raises(IndexMismatch, match=r"weights_sha256 \('aa' there, 'bb' here\)"):
        open_index(tmp_path / "index", encoder_identity={**IDENTITY, "weights_sha256": "bb"})
    with pytest.raises(IndexMismatch, match=r"no segments \['s7'\]"):
        open_index(tmp_path / "index", segments=["s7"])
    with pytest.raises(ValueError, match="nowhere"):
        open_index(tmp_path / "nowhere")
    open_index(tmp_path / "index", encoder_identity=IDENTITY)


@pytest.mark.parametrize("what", ["twice", "unsorted", "short"])
def test_rows_that_do_not_fit_make_no_segment(what: str, tmp_path: Path) -> None:
    rows, vectors = catalogue()
    some = {"twice": [0, 1, 1], "unsorted": [2, 1, 0], "short": [0, 1, 2]}[what]
    with pytest.raises(IndexMismatch, match="each row is needed once"):
        write_segment(tmp_path, "s", rows.take(some), vectors[: 3 if what != "short" else 2], VectorIndexConfig(),
                      LexicalConfig())
    assert not list(tmp_path.rglob("*.parquet"))


def test_nothing_indexed_is_nothing_found(tmp_path: Path) -> None:
    for number, places in enumerate(([], [np.arange(0)])):
        publish(tmp_path / str(number), places)
        index = open_index(tmp_path / str(number))
        assert [len(one.row_ids) for one in index.search(VECTORS, QUERIES, 5)] == [0] * len(QUERIES)
        assert index.product("p1") is None
    with pytest.raises(ValueError, match="vectors, query texts or both"):
        index.search(None, None, 5)


def test_catalogue_rows_align_by_id() -> None:
    ids = row_ids(["a", "b", "c"])
    def table(schema: pa.Schema, order: list[int], **columns: Any) -> pa.Table:
        values = {"row_id": pa.array(ids[order]), **{name: pa.array([value[i] for i in order])
                                                    for name, value in columns.items()}}
        return conform(pa.table(values), schema, "t")
    names = ["a", "b", "c"]
    products = table(PRODUCT, [2, 0, 1], product_id=names, group_id=ids.tolist(), image_urls=[["u", "v"], [], None])
    texts = table(PRODUCT_TEXT, [1, 2, 0], product_id=names, text=["A", "B", "C"], text_hash=["1", "2", "3"])
    stats = table(PRODUCT_STATS, [0, 2, 1], as_of_ms=[1, 1, 1], num_reviews=[10, 20, 30], rating_mean=[1.0, None, 3.0])
    rows = catalogue_rows(products, texts, stats, unscored)
    assert rows.schema.equals(ROWS)
    found = {row["product_id"]: (row["text"], row["num_reviews"], row["rating_mean"], row["image_url"])
             for row in rows.to_pylist()}
    assert found == {"a": ("A", 10, 1.0, "u"), "b": ("B", 20, None, None), "c": ("C", 30, 3.0, None)}
    changed = catalogue_rows(products, texts, stats.set_column(2, "num_reviews", pa.array([10, 30, 21])), unscored)
    pairs = zip(rows["row_hash"].to_pylist(), changed["row_hash"].to_pylist(), strict=True)
    assert sorted(one == other for one, other in pairs) == [False, True, True]


def unscored(wanted: npt.NDArray[np.int64]) -> dict[str, pa.Array]:
    return concern_columns(wanted, None, {})


def test_rows_come_in_the_order_asked_from_all_segments(tmp_path: Path) -> None:
    publish(tmp_path, [np.arange(0, COUNT, 2), np.arange(1, COUNT, 2)], dead={0: [3]})
    index = open_index(tmp_path)
    table, _ = catalogue()
    wanted = np.array([9, 4, 11, 0])
    found = index.rows(table["row_id"].to_numpy()[wanted], ("title", "num_reviews", "row_id"))
    assert found.column_names == ["title", "num_reviews", "row_id"]
    assert found["title"].to_pylist() == [table["title"][int(place)].as_py() for place in wanted]
    assert index.rows(np.zeros(0, np.int64), ("title",)).num_rows == 0
    with pytest.raises(KeyError):
        index.rows(np.array([int(table["row_id"][6].as_py())]), ("title",))     # dead
    with pytest.raises(IndexMismatch, match="no stars"):
        index.rows(table["row_id"].to_numpy()[wanted], ("stars",))
