"""Pairs from human labels: folds that stay what they are, and products that were really judged."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from recsys_ray.artifacts import Artifact, stage
from recsys_ray.config import Config
from recsys_ray.data.judged_pairs import (
    JudgedQueries,
    JudgedQuery,
    catalogue_rows_of,
    digest,
    judged_queries,
    judged_rows,
    query_folds,
)
from recsys_ray.data.pair_buckets import PairJob, make_judged
from recsys_ray.data.pairs import PairError, PairsConfig, pair_table
from recsys_ray.ids import bucket_of, row_id, row_ids
from recsys_ray.schema import PRODUCT, PRODUCT_TEXT, conform

NAMES = [f"p{number}" for number in range(30)]


def config_for(folder: Path, **change: Any) -> JudgedQueries:
    pq.write_table(pa.table({"id": ["q0", "q1", "q2"], "text": ["oak <b>table</b>", "red lamp", "sofa"]}),
                   folder / "queries.parquet")
    rows = [("q0", "p1", "E"), ("q0", "p2", "E"), ("q0", "p3", "S"), ("q0", "p4", "I"), ("q0", "p5", "I"),
            ("q1", "p1", "I"), ("q1", "p9", "E"), ("q1", "gone", "E"), ("q2", "p7", "S"), ("q0", "p4", "E")]
    pq.write_table(pa.table(dict(zip(("query_id", "product_id", "esci"), zip(*rows, strict=True), strict=True))),
                   folder / "judgments.parquet")
    return JudgedQueries.model_validate({
        "queries": str(folder / "queries.parquet"), "judgments": str(folder / "judgments.parquet"),
        "query_columns": {"query_id": "id", "query": "text"}, "judgment_columns": {"label": "esci"},
        "gain_of_label": {"E": 1.0, "S": 0.1, "I": 0.0}, "negative_gain": 0.0, "folds": 3, **change})


@pytest.fixture
def prepared(tmp_path: Path) -> Artifact:
    """Thirty products in four buckets; p5 is a near-duplicate of p1."""
    with stage(tmp_path / "prepared", "prepared", "0" * 16) as staging:
        files = []
        buckets = bucket_of(row_ids(NAMES), 4)
        for bucket in range(4):
            names = sorted((name for name, one in zip(NAMES, buckets, strict=True) if one == bucket), key=row_id)
            products = [{"row_id": row_id(name), "product_id": name,
                         "group_id": row_id("p1") if name == "p5" else row_id(name)} for name in names]
            texts = [{"row_id": row_id(name), "product_id": name, "text": f"text of {name}", "text_hash": name}
                     for name in names]
            for kind, rows, schema in (("products", products, PRODUCT), ("product_text", texts, PRODUCT_TEXT)):
                table = conform(pa.Table.from_pylist(rows, schema=schema), schema, kind)
                files.append(staging.write_table(f"{kind}/bucket-{bucket:05d}.parquet", table))
        return staging.commit(files, config=Config(), facts={"num_buckets": 4, "cuts": None})


def test_positives_and_negatives_are_what_was_judged(tmp_path: Path) -> None:
    found = {one.query_id: one for one in judged_queries(config_for(tmp_path))}
    assert set(found) == {"q0", "q1"}       # q2 has no product at the gain
    assert found["q0"].query == "oak table"
    assert set(found["q0"].positives) == {"p1", "p2", "p4"}     # judged twice: the higher gain counts
    assert found["q0"].negatives == ("p5",)
    assert set(found["q1"].positives) == {"p9", "gone"}
    assert len(judged_queries(config_for(tmp_path, max_positives=1))[0].positives) == 1
    assert judged_queries(config_for(tmp_path, negative_gain=None))[0].negatives == ()


def test_rows_have_the_indexed_texts_and_no_negative_of_a_positive_s_group(tmp_path: Path, prepared: Artifact) -> None:
    counts: Counter[str] = Counter()
    config = config_for(tmp_path)
    rows = judged_rows(judged_queries(config), prepared, config, counts)
    pairs = {row["pair_id"]: row for row in pair_table(rows).to_pylist()}
    assert set(pairs) == {"q0/p1", "q0/p2", "q0/p4", "q1/p9"}
    assert counts["judged products not in the catalogue"] == 1
    assert pairs["q0/p1"]["text"] == "text of p1"
    assert pairs["q0/p2"]["negative_texts"] == []       # p5 is p1 under another id
    assert pairs["q1/p9"]["negative_texts"] == ["text of p1"]
    assert pairs["q1/p9"]["negative_row_ids"] == [row_id("p1")]
    assert {row["query_type"] for row in rows} == {"judged"}


def test_products_are_read_from_their_buckets(prepared: Artifact) -> None:
    found = catalogue_rows_of(prepared, [*NAMES, "gone"])
    assert {name: row["text"] for name, row in found.items()} == {name: f"text of {name}" for name in NAMES}
    assert catalogue_rows_of(prepared, []) == {}


def test_a_file_of_each_split_is_written(tmp_path: Path, prepared: Artifact) -> None:
    queries = [JudgedQuery("a", "one", "train", ("p1", "p2"), ()), JudgedQuery("b", "two", "valid", ("p3",), ())]
    job = PairJob(str(tmp_path / "prepared"), prepared.manifest.version, str(tmp_path / "out"), PairsConfig())
    result = make_judged(job, "judged-00000", config_for(tmp_path), queries)
    assert {entry.path: entry.rows for entry in result.files} == {
        "pairs/train/judged-00000.parquet": 2, "pairs/valid/judged-00000.parquet": 1}
    assert (result.counts["judged queries, train"], result.counts["judged queries, valid"]) == (1, 1)


def test_folds_are_balanced_and_do_not_depend_on_order() -> None:
    ids = [f"q{number}" for number in range(103)]
    folds = query_folds(ids, 5, 7)
    assert folds == query_folds(reversed(ids), 5, 7)
    assert folds != query_folds(ids, 5, 8)
    assert sorted(Counter(folds.values()).values()) == [20, 20, 21, 21, 21]


def test_train_valid_and_what_is_kept_out_share_no_query(tmp_path: Path) -> None:
    ids = [f"q{number}" for number in range(40)]
    pq.write_table(pa.table({"query_id": ids, "query": ids}), tmp_path / "q.parquet")
    pq.write_table(pa.table({"query_id": ids, "product_id": ["p"] * 40, "gain": [1.0] * 40}), tmp_path / "j.parquet")
    config = JudgedQueries(queries=str(tmp_path / "q.parquet"), judgments=str(tmp_path / "j.parquet"), folds=4,
                           train_folds=(0, 1), valid_folds=(2,))
    split = {one.query_id: one.split for one in judged_queries(config)}
    assert Counter(split.values()) == {"train": 20, "valid": 10}
    some = config.replace(query_ids=("q3", "q4", "q5", "q6"), train_folds=None, valid_folds=(0,))
    assert {one.query_id for one in judged_queries(some)} == {"q3", "q4", "q5", "q6"}
    assert digest(judged_queries(some)) == digest(judged_queries(some)) != digest(judged_queries(config))


@pytest.mark.parametrize(("change", "message"), [
    ({"gain_of_label": {"E": 1.0}}, "label 'I' has no gain"), ({"gain_of_label": None}, "have no gain"),
    ({"query_ids": ("q9",)}, "does not judge 'q9'"), ({"queries": "judgments"}, "does not have")])
def test_what_does_not_fit_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = config_for(tmp_path)
    if "queries" in change:
        pq.write_table(pa.table({"id": ["q0"], "text": ["oak"]}), tmp_path / "other.parquet")
        change = {"queries": str(tmp_path / "other.parquet")}
    with pytest.raises(PairError, match=message):
        judged_queries(config.replace(**change))


@pytest.mark.parametrize(("change", "message"), [
    ({"valid_folds": (5,)}, "folds from 0 to 4"), ({"train_folds": (1,), "valid_folds": (1,)}, "share a fold"),
    ({"negative_gain": 1.0}, "not below min_gain")])
def test_folds_and_gains_that_contradict_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        JudgedQueries.model_validate({"queries": "q", "judgments": "j", **change})
