"""Building, updating, merging and rolling back an index; what does not fit together is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys_ray.artifacts import Artifact, ArtifactError, current_version, list_versions, open_artifact, rollback, stage
from recsys_ray.config import Config, fingerprint
from recsys_ray.ids import bucket_of, row_ids
from recsys_ray.retrieval.filters import FilterError, Filters
from recsys_ray.retrieval.index_build import BuildIndexConfig, CompactIndexConfig, build_index, compact_index
from recsys_ray.retrieval.index_plan import Change, Inputs, appended_parts, read_bucket, rows_set_aside
from recsys_ray.retrieval.segments import IndexMismatch, SegmentHits, card_file, open_index, segment_files
from recsys_ray.schema import PRODUCT, PRODUCT_STATS, PRODUCT_TEXT, QUARANTINE, conform, embedding_schema

BUCKETS, DIMENSION = 8, 12
UNSCORED = Inputs("", "", "", "").concerns_of()
Shop = dict[str, str]
QUERIES = ["item red", "soft", "number3", ""]
VECTORS = np.random.default_rng(2).normal(size=(len(QUERIES), DIMENSION)).astype(np.float32)


def shop(count: int, changed: tuple[int, ...] = (), without: tuple[int, ...] = (), extra: int = 0) -> Shop:
    names = [number for number in range(count + extra) if number not in without]
    return {f"p{number}": f"item {'red' if number % 3 else 'blue'} {'soft ' * (number % 4)}number{number % 40}"
                          f"{' changed' if number in changed else ''}" for number in names}


def vector_of(text: str) -> list[float]:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    return [float(value) for value in np.random.default_rng(seed).normal(size=DIMENSION).astype(np.float32)]


def prepare(root: Path, texts: Shop, template: str = "seed-v1") -> None:
    ids = row_ids(texts)
    tables = {
        "products": (PRODUCT, {"product_id": list(texts), "title": list(texts.values()), "group_id": ids,
                               "price_cents": [int(i % 5000) for i in ids]}),
        "product_text": (PRODUCT_TEXT, {"product_id": list(texts), "text": list(texts.values()),
                                        "lexical_text": list(texts.values()),
                                        "text_hash": [hashlib.sha256(text.encode()).hexdigest()[:32]
                                                      for text in texts.values()]}),
        "product_stats": (PRODUCT_STATS, {"as_of_ms": [1] * len(ids), "num_reviews": [2] * len(ids)})}
    buckets = bucket_of(ids, BUCKETS)
    with stage(root, "prepared", fingerprint([texts, template])) as staging:
        files = []
        for name, (schema, columns) in tables.items():
            table = conform(pa.table({"row_id": ids, **columns}), schema, name)
            files += [staging.write_table(f"{name}/bucket-{bucket:05d}.parquet",
                                          table.filter(pa.array(buckets == bucket)).sort_by("row_id"))
                      for bucket in range(BUCKETS)]
        staging.commit(files, config=Config(), facts={"num_buckets": BUCKETS, "template": template})


def embed(root: Path, texts: Shop, bend: Callable[[pa.Table], pa.Table] = lambda table: table,
          set_aside: tuple[str, ...] = (), encoder: str = "e1") -> None:
    kept = {name: text for name, text in texts.items() if name not in set_aside}
    flat = pa.array([value for text in kept.values() for value in vector_of(text)], pa.float32())
    table = bend(pa.table({
        "row_id": row_ids(kept), "product_id": list(kept),
        "text_hash": [hashlib.sha256(text.encode()).hexdigest()[:32] for text in kept.values()],
        "vector": pa.FixedSizeListArray.from_arrays(flat, DIMENSION)}))
    buckets = bucket_of(table["row_id"].to_numpy(), BUCKETS)
    aside = conform(pa.table({"table": ["product_text"] * len(set_aside), "key": list(set_aside),
                              "reason": ["empty text"] * len(set_aside)}), QUARANTINE, "quarantine")
    with stage(root, "embeddings", fingerprint([kept, encoder])) as staging:
        table = conform(table, embedding_schema(DIMENSION), "vectors")
        files = [staging.write_table(f"vectors/bucket-{bucket:05d}.parquet", table.filter(pa.array(buckets == bucket)))
                 for bucket in range(BUCKETS)]
        files.append(staging.write_table("quarantine.parquet", aside))
        staging.commit(files, config=Config(), facts={"encoder": {"model": encoder, "dimension": DIMENSION},
                                                      "num_buckets": BUCKETS})


def config_of(root: Path, **changes: Any) -> BuildIndexConfig:
    return BuildIndexConfig.model_validate({
        "prepared": root / "prepared", "embeddings": root / "embeddings", "output": root / "index",
        "rows_per_segment": 120, **changes})


def publish(root: Path, texts: Shop) -> BuildIndexConfig:
    prepare(root / "prepared", texts)
    embed(root / "embeddings", texts)
    return config_of(root)


def answers(root: Path, depth: int = 15) -> list[SegmentHits]:
    return open_index(root / "index").search(VECTORS, QUERIES, depth)


def assert_as_fresh(root: Path, fresh_root: Path, texts: Shop) -> None:
    """The index below `root` answers as one that was built from these products in one go."""
    build_index(publish(fresh_root, texts))
    assert open_index(root / "index").live_rows == open_index(fresh_root / "index").live_rows == len(texts)
    for one, other in zip(answers(root), answers(fresh_root), strict=True):
        assert one.product_ids == other.product_ids
        np.testing.assert_array_equal(one.dense_scores, other.dense_scores)
        np.testing.assert_array_equal(one.lexical_scores, other.lexical_scores)


@pytest.mark.ray
def test_a_build_holds_every_row_once_and_is_reused(tmp_path: Path, local_ray: None) -> None:
    texts = shop(400)
    config = publish(tmp_path, texts)
    artifact = build_index(config)
    assert len(artifact.manifest.facts["segments"]) > 2
    ids = np.concatenate([artifact.table(segment_files(name)[0])["row_id"].to_numpy()
                          for name in artifact.manifest.facts["segments"]])
    assert sorted(ids) == sorted(row_ids(texts))
    assert artifact.manifest.facts["live_rows"] == 400
    assert build_index(config).manifest.version == artifact.manifest.version
    for depth in (1, 30, 400):
        hits = open_index(tmp_path / "index").search(VECTORS, None, depth)
        matrix = np.array([vector_of(text) for text in texts.values()], np.float32)
        for query, found in zip(VECTORS, hits, strict=True):
            best = np.lexsort((row_ids(texts), -(matrix @ query)))[:depth]
            assert set(found.product_ids) == {list(texts)[place] for place in best}


@pytest.mark.ray
def test_changes_are_appended_and_answer_as_a_fresh_build(tmp_path: Path, local_ray: None) -> None:
    first = build_index(publish(tmp_path, shop(400)))
    after = shop(400, changed=(5, 6, 7), without=(1, 2), extra=4)
    second = build_index(publish(tmp_path, after))
    old, new = first.manifest.facts["segments"], second.manifest.facts["segments"]
    assert new[: len(old)] == old
    assert len(new) == len(old) + 1
    for name in old:
        rows = segment_files(name)[0]
        assert (first.path / rows).stat().st_ino == (second.path / rows).stat().st_ino
    assert sum(len(np.load(second.file(name))) for name in second.names("tombstones/")) == 5
    assert_as_fresh(tmp_path, tmp_path / "fresh", after)


@pytest.mark.ray
def test_a_catalogue_that_comes_back_leaves_earlier_versions_alone(tmp_path: Path, local_ray: None) -> None:
    """The same inputs after others: new segments must not take the names, or the files, of kept ones."""
    one, two = shop(300), shop(300, changed=(4, 5))
    for texts in (one, two, one, two):
        build_index(publish(tmp_path, texts))
        assert_as_fresh(tmp_path, tmp_path / f"fresh{len(list_versions(tmp_path / 'index'))}", texts)
    versions = list_versions(tmp_path / "index")
    assert len(versions) == 4
    for manifest in versions:
        open_artifact(tmp_path / "index", "index", manifest.version).verify()


@pytest.mark.ray
@pytest.mark.parametrize(("changes", "after"), [
    ({"rebuild_above": 0.01}, shop(200, changed=(1, 2, 3))), ({"max_segments": 2}, shop(200, changed=(1,))),
    ({"vector": {"kind": "hnsw"}}, shop(200, changed=(1,))), ({"lexical": {"k1": 0.9}}, shop(200, changed=(1,)))],
    ids=["much changed", "many segments", "another index", "other words"])
def test_when_it_is_built_anew(changes: dict[str, Any], after: Shop, tmp_path: Path, local_ray: None) -> None:
    before = build_index(publish(tmp_path, shop(200)))
    publish(tmp_path, after)
    artifact = build_index(config_of(tmp_path, **changes))
    assert not set(artifact.manifest.facts["segments"]) & set(before.manifest.facts["segments"])
    assert not artifact.names("tombstones/")
    assert open_index(tmp_path / "index").live_rows == 200


@pytest.mark.ray
def test_compaction_merges_segments_and_answers_as_a_fresh_build(tmp_path: Path, local_ray: None) -> None:
    after = shop(300, changed=(5, 6), without=(8,), extra=2)
    build_index(publish(tmp_path, shop(300)))
    build_index(publish(tmp_path, after))
    for rows_per_segment, segments in ((1000, 1), (100, 4)):
        artifact = compact_index(CompactIndexConfig(index=tmp_path / "index", rows_per_segment=rows_per_segment))
        assert len(artifact.manifest.facts["segments"]) == segments
        assert not artifact.names("tombstones/")
        assert_as_fresh(tmp_path, tmp_path / f"fresh{segments}", after)
    later = shop(300, changed=(5, 6, 7), without=(8,), extra=2)
    build_index(publish(tmp_path, later))
    assert_as_fresh(tmp_path, tmp_path / "later", later)


@pytest.mark.ray
def test_rollback_is_one_call_and_a_later_build_follows_the_catalogue(tmp_path: Path, local_ray: None) -> None:
    one, two = shop(200), shop(200, changed=(3,))
    first = build_index(publish(tmp_path, one))
    before = answers(tmp_path)
    second = build_index(publish(tmp_path, two))
    assert rollback(tmp_path / "index").version == first.manifest.version
    assert [hits.product_ids for hits in answers(tmp_path)] == [hits.product_ids for hits in before]
    rollback(tmp_path / "index", second.manifest.version)
    assert current_version(tmp_path / "index") == second.manifest.version
    rollback(tmp_path / "index", first.manifest.version)
    build_index(config_of(tmp_path))
    assert_as_fresh(tmp_path, tmp_path / "fresh", two)


@pytest.mark.ray
def test_a_damaged_index_is_built_anew_but_another_artefact_is_not_overwritten(tmp_path: Path, local_ray: None) -> None:
    texts = shop(150)
    config = publish(tmp_path, texts)
    for damage in (lambda content: content[:-9], lambda content: content[:-9] + b"123456789"):
        artifact = build_index(config)
        path = artifact.path / segment_files(artifact.manifest.facts["segments"][0])[0]
        path.write_bytes(damage(path.read_bytes()))
        texts = texts | {"new": f"item new{len(texts)}"}
        publish(tmp_path, texts)
        with pytest.raises(ArtifactError, match=r"rows\.parquet"):
            open_index(tmp_path / "index")
        build_index(config)
        assert_as_fresh(tmp_path, tmp_path / f"fresh{len(list_versions(tmp_path / 'index'))}", texts)
        texts = texts | {"newer": "item newer"}
        publish(tmp_path, texts)
    with pytest.raises(ArtifactError, match="'prepared' artefact where 'index'"):
        build_index(config.replace(output=tmp_path / "prepared"))


@pytest.mark.ray
def test_a_killed_build_takes_up_its_finished_segments(tmp_path: Path, local_ray: None) -> None:
    config = publish(tmp_path, shop(300))
    artifact = build_index(config)
    staged = tmp_path / "index" / "staging" / artifact.manifest.fingerprint
    staged.parent.mkdir(exist_ok=True)
    artifact.path.rename(staged)    # as a run leaves it that dies before it publishes
    (tmp_path / "index" / "CURRENT").unlink()
    names = artifact.manifest.facts["segments"]
    inode = (staged / card_file(names[0])).stat().st_ino
    for path in (staged / "segments" / names[1]).iterdir():
        path.unlink()               # and one segment was not begun
    (staged / "segments" / names[1]).rmdir()
    again = build_index(config)
    assert (again.path / card_file(names[0])).stat().st_ino == inode
    assert {entry.path: entry.sha256 for entry in again.manifest.files if "rows" in entry.path} == {
        entry.path: entry.sha256 for entry in artifact.manifest.files if "rows" in entry.path}
    again.verify()


# --- what does not fit ----------------------------------------------------------------------------
def without_row(table: pa.Table) -> pa.Table:
    return table.slice(1)


def row_twice(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table, table.slice(3, 1)])


def another_text(table: pa.Table) -> pa.Table:
    return table.set_column(2, "text_hash", pa.array(["x", *table["text_hash"].to_pylist()[1:]]))


def not_finite(table: pa.Table) -> pa.Table:
    flat = table["vector"].combine_chunks().flatten().to_numpy().copy()
    flat[DIMENSION + 2] = np.nan
    return table.set_column(3, "vector", pa.FixedSizeListArray.from_arrays(pa.array(flat), DIMENSION))


def strange_row(table: pa.Table) -> pa.Table:
    return table.set_column(0, "row_id", pa.array([12345, *table["row_id"].to_pylist()[1:]], pa.int64()))


def read_all(root: Path) -> int:
    prepared, embeddings = (open_artifact(root / kind, kind) for kind in ("prepared", "embeddings"))
    aside = rows_set_aside(embeddings)
    return sum(read_bucket(prepared, embeddings, f"bucket-{bucket:05d}", aside, UNSCORED)[0].num_rows
               for bucket in range(BUCKETS))


@pytest.mark.parametrize(("bend", "message"), [
    (without_row, "lacks 1 rows"), (row_twice, "twice"), (another_text, "another text"), (not_finite, "not finite"),
    (strange_row, "lacks 1 rows|do not have, the first is 12345")])
def test_vectors_of_other_rows_are_refused_by_bucket(bend: Callable[[pa.Table], pa.Table], message: str,
                                                     tmp_path: Path) -> None:
    texts = shop(60)
    prepare(tmp_path / "prepared", texts)
    # Another product is in quarantine: it must not excuse the one that is missing.
    embed(tmp_path / "embeddings", texts, bend, set_aside=("p50",))
    with pytest.raises(IndexMismatch, match=rf"bucket 'bucket-0000\d' of .*({message})"):
        read_all(tmp_path)


def test_quarantined_texts_are_left_out_and_products_must_be_there(tmp_path: Path) -> None:
    texts = shop(60)
    prepare(tmp_path / "prepared", texts)
    embed(tmp_path / "embeddings", texts, set_aside=("p7", "p8"))
    assert read_all(tmp_path) == 58
    prepared = open_artifact(tmp_path / "prepared", "prepared")
    with stage(tmp_path / "fewer", "prepared", "y") as staging:
        files = [staging.write_table(name, prepared.table(name).slice(1 if name.startswith("products/") else 0))
                 for name in prepared.names()]
        fewer = staging.commit(files, config=Config(), facts=prepared.manifest.facts)
    with pytest.raises(IndexMismatch, match=r"bucket 'bucket-00000' of .*run the prepare job again"):
        read_bucket(fewer, open_artifact(tmp_path / "embeddings", "embeddings"), "bucket-00000", row_ids(["p7", "p8"]),
                    UNSCORED)


def test_changed_rows_share_segments_up_to_their_size() -> None:
    def change(number: int, rows: int) -> Change:
        return Change((f"bucket-{number:05d}",), np.arange(rows) + 1000 * number, {}, 1000, rows)

    parts = appended_parts([change(0, 3), change(1, 0), change(2, 4), change(3, 5), change(4, 30)], 8, 10)
    assert [(part.group, len(part.wanted)) for part in parts if part.wanted is not None] == [
        (("bucket-00000", "bucket-00002"), 7), (("bucket-00003",), 5), (("bucket-00004",), 30)]
    cards = [json.dumps(part.card()) for part in parts]
    assert len(set(cards)) == 3
    assert json.loads(cards[0])["buckets"] == [0, 2]


@pytest.mark.ray
def test_another_encoder_builds_anew_and_is_known(tmp_path: Path, local_ray: None) -> None:
    texts = shop(100)
    before: Artifact = build_index(publish(tmp_path, texts))
    embed(tmp_path / "embeddings", texts, encoder="e2")
    after = build_index(config_of(tmp_path))
    assert not set(before.manifest.facts["segments"]) & set(after.manifest.facts["segments"])
    with pytest.raises(IndexMismatch, match="model"):
        open_index(tmp_path / "index", encoder_identity=before.manifest.facts["encoder"])


# --- concerns -------------------------------------------------------------------------------------
def score(root: Path, prepared: Path, sure: dict[str, float], model: str = "m1") -> None:
    """Scores of acne: `sure` by product, without ingredients for the others."""
    reference = open_artifact(prepared, "prepared")
    names = [one for table in reference.tables("products/") for one in table["product_id"].to_pylist()]
    ids = row_ids(names)
    table = pa.table({"product_id": names, "acne": pa.array([sure.get(one, 0.9) for one in names], pa.float32()),
                      "addresses": pa.array([["acne"] if sure.get(one, 0) > 0.5 else [] for one in names],
                                            pa.list_(pa.string())),
                      "row_id": ids, "has_ingredients": [one in sure for one in names]})
    with stage(root, "concern_scores", fingerprint([sure, model])) as staging:
        files = [staging.write_table(f"scores/bucket-{bucket:05d}.parquet",
                                     table.filter(pa.array(bucket_of(ids, BUCKETS) == bucket)).sort_by("row_id"))
                 for bucket in range(BUCKETS)]
        staging.commit(files, config=Config(), parents={"prepared": reference.manifest},
                       facts={"concerns": ["acne"], "model": {"weights_sha256": model}})


def explain(root: Path, told: list[tuple[str, str, float]], model: str = "m1") -> None:
    """Ingredients of products and their weights for acne."""
    table = pa.table({"product_id": [one for one, _, _ in told], "concern": ["acne"] * len(told),
                      "method": ["occlusion"] * len(told), "rank": list(range(1, len(told) + 1)),
                      "ingredient": [one for _, one, _ in told], "weight": [one for _, _, one in told]})
    with stage(root, "concern_explanations", fingerprint([told, model])) as staging:
        staging.commit([staging.write_table("explanations.parquet", table)], config=Config(),
                       facts={"model": {"weights_sha256": model}})


@pytest.mark.ray
def test_products_are_found_by_the_concerns_they_address(tmp_path: Path, local_ray: object) -> None:
    texts = shop(200)
    config = publish(tmp_path, texts).replace(concerns=tmp_path / "scores", reasons=tmp_path / "reasons")
    score(tmp_path / "scores", tmp_path / "prepared", {"p1": 0.8, "p2": 0.2, "p3": 0.6})
    explain(tmp_path / "reasons", [("p1", "zinc pca", 0.5), ("p1", "aqua", -0.1), ("p2", "aqua", 0.3)])
    first = build_index(config)
    index = open_index(tmp_path / "index")
    rows = {one: index.product(one) for one in ("p1", "p2", "p3", "p4")}
    assert [row["addresses"] for row in rows.values() if row] == [["acne"], [], ["acne"], None]
    assert [row["because"] for row in rows.values() if row] == [[("acne", ["zinc pca"])], None, None, None]
    assert rows["p2"]
    assert rows["p2"]["concerns"] == [("acne", pytest.approx(0.2))]
    hits = index.search(VECTORS, QUERIES, 200, Filters(concern=("acne",)))
    assert {one for hit in hits for one in hit.product_ids} == {"p1", "p3"}
    with pytest.raises(FilterError, match="scored for acne"):
        index.search(VECTORS, QUERIES, 200, Filters(concern=("spots",)))
    # other scores of the same model replace the rows they are of, another model everything
    score(tmp_path / "scores", tmp_path / "prepared", {"p1": 0.8, "p2": 0.9, "p3": 0.6})
    second = build_index(config)
    assert set(first.manifest.facts["segments"]) < set(second.manifest.facts["segments"])
    found = open_index(tmp_path / "index").product("p2")
    assert found
    assert found["addresses"] == ["acne"]
    score(tmp_path / "scores", tmp_path / "prepared", {"p1": 0.8}, model="m2")
    with pytest.raises(IndexMismatch, match=r"another concern model .* weights_sha256"):
        build_index(config)
    third = build_index(config.replace(reasons=None))
    assert not set(third.manifest.facts["segments"]) & set(second.manifest.facts["segments"])
    assert compact_index(CompactIndexConfig(index=tmp_path / "index")).manifest.facts["concerns"] == {
        "names": ["acne"], "model": {"weights_sha256": "m2"}}


def test_scores_of_other_products_are_refused(tmp_path: Path) -> None:
    config = publish(tmp_path, shop(60)).replace(concerns=tmp_path / "scores")
    score(tmp_path / "scores", tmp_path / "prepared", {"p1": 0.8})
    prepare(tmp_path / "prepared", shop(61))
    with pytest.raises(IndexMismatch, match="run score_concerns"):
        build_index(config)
