"""The parts of the reranking benchmarks: pools, lists, folds that never meet, and tables from what cells hold."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys_ray.artifacts import open_artifact, stage
from recsys_ray.config import Config, load_config
from recsys_ray.retrieval.fusion import FusionConfig
from recsys_ray.schema import JUDGMENT, TRAINING_PAIR, conform

REPO = Path(__file__).resolve().parents[2]


gbdt_table, rerank_table = import_module("gbdt_table"), import_module("rerank_table")
rerank_labels, pools, lists = import_module("rerank_labels"), import_module("rerank_pool"), import_module("pair_lists")
answers, retriever_ranks = import_module("judged_answers"), import_module("retriever_ranks")


def pool(query: str = "sofa") -> Any:
    return pools.Pool(query, np.array([1, 4, 6, 9]), np.array([0.9, 0.1, 0.5, 0.8], np.float32),
                np.array([0, 3, 2, 9], np.float32), np.array([True, True, True, False]))


def catalogue() -> Any:
    names = [f"p{number}" for number in range(10)]
    texts = [f"text {name}" for name in names]
    return retriever_ranks.Catalogue(np.arange(10, dtype=np.int64), names, texts, [], np.zeros(10, np.int64))


def problem(count: int = 30) -> Any:
    ids = [f"q{number:02d}" for number in range(count)]
    judgments = conform(pa.table({"query_id": ids, "product_id": ["p1"] * count, "gain": [1.0] * count}), JUDGMENT, "j")
    return answers.Problem(ids, ["text"] * count, judgments, 1.0)


def test_the_head_holds_what_a_retriever_reached() -> None:
    fusion = FusionConfig(dense_weight=1.0)
    head, fused = pool().head(fusion, np.arange(10), 10)
    assert pool().places[head].tolist() == [1, 6, 4]    # 9 is only judged
    assert (np.diff(fused[head]) < 0).all()
    assert pool().places[pool().head(fusion, np.arange(10), 1)[0]].tolist() == [1]


def test_pools_come_back_from_their_file(tmp_path: Path) -> None:
    pools.save_pools(tmp_path / "pools.npz", {"a": pool("x"), "b": pool("y")})
    found = pools.load_pools(tmp_path / "pools.npz")
    assert list(found) == ["a", "b"]
    assert found["b"].query == "y"
    assert found["a"].dense.tolist() == pool().dense.tolist()
    assert found["a"].reached.tolist() == pool().reached.tolist()


def test_lists_hold_judged_products_and_reached_ones_that_nobody_judged() -> None:
    tables = pools.judged_lists({"a": pool(), "b": pool()}, ["a", "b"], {"a": {"p4": 1.0, "p9": 0.1}, "b": {"p1": 1.0}},
                          catalogue(), mined=1, seed=3, valid=["b"])
    train = tables["train"].to_pylist()
    assert [(row["product_id"], round(row["label"], 2), row["origin"]) for row in train][:2] == [
        ("p4", 1.0, "judged"), ("p9", 0.1, "judged")]
    assert {row["product_id"] for row in train[2:]} < {"p1", "p6"}
    assert len(train) == 3
    assert set(tables["valid"]["query_id"].to_pylist()) == {"b"}


def test_no_query_is_reported_by_what_knew_it() -> None:
    config = load_config(rerank_labels.JobConfig, REPO / "configs/bench_rerank_labels/esci.yaml")
    reported = []
    for fold in range(config.folds):
        mine, halves = rerank_labels._halves(config, problem(), fold)
        assert not set(mine) & {one for half in halves for one in half}
        assert not set(halves[0]) & set(halves[1])
        assert len(mine) + len(halves[0]) + len(halves[1]) == 30
        reported += mine
    assert sorted(reported) == problem().query_ids


def test_train_pairs_become_lists_and_some_validate(tmp_path: Path) -> None:
    rows = [{"pair_id": f"r{number}", "query": "q", "query_type": "review_text", "row_id": 1, "product_id": "p",
             "group_id": 1, "text": "own", "negative_row_ids": [2, 3], "negative_texts": ["a", "b"],
             "negative_group_ids": [2, 3], "split": "train"} for number in range(200)]
    table = pa.Table.from_pylist(rows, schema=TRAINING_PAIR)
    with stage(tmp_path / "pairs", "pairs", "x") as staging:
        later = table.set_column(0, TRAINING_PAIR.field("pair_id"), pa.array([f"late{n}" for n in range(200)]))
        staging.commit([staging.write_table("pairs/train/a.parquet", table),
                        staging.write_table("pairs/valid/a.parquet", later)], config=Config())
    made = lists.pair_lists(lists.PairListsConfig(pairs=tmp_path / "pairs", output=tmp_path / "lists"))
    tables = {split: pa.concat_tables(made.tables(f"pairs/{split}/")) for split in ("train", "valid")}
    queries = {split: set(one["query_id"].to_pylist()) for split, one in tables.items()}
    assert len(queries["train"]) + len(queries["valid"]) == 200
    assert 2 <= len(queries["valid"]) <= 25
    assert not any(one.startswith("late") for some in queries.values() for one in some)     # of the later period
    assert tables["train"]["label"].to_pylist()[:3] == [1, 0, 0]
    assert open_artifact(tmp_path / "lists", "reranker_pairs").manifest.version == made.manifest.version


def test_ranks_of_the_relevant() -> None:
    found = lists.ranks_of_the_relevant(np.array([1.0, 3, 2, 5, 5, 1]), np.array([0, 0, 1, 0, 1, 0]),
                                  np.array([1, 2, 3, 8, 7, 6]), np.array([3, 2, 1]))
    assert found == [2, 1, 0]   # the tie of the second list goes to the smaller row id


def gbdt_cells(gain: float) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    fused = rng.integers(0, 9, 200)
    better = [int(max(1, one - gain)) if one else 0 for one in fused.tolist()]
    asked = {"products": 9, "fusion": {}, "curve": [], "cpu_ms_a_query": {"retrieve": 1.0}, "test": {
        "queries": [str(one) for one in range(201)], "products": list(range(201)), "users": list(range(201)),
        "ranks": {"fused": fused.tolist(), "cross-encoder": fused.tolist()}}}      # one query had no answer
    trees = {"rounds": 1, "stop_ndcg": 0.5, "importance": {}, "cpu_ms_a_query": 0.1}
    return {"cross": {"training": {}}, "lists": asked, "both": {**trees, "ranks": {"both": better}},
            "lightgbm": {**trees, "ranks": {"lightgbm": better}},
            "without product": {**trees, "ranks": {"without product": fused.tolist()}}}


def test_the_headline_of_the_shops() -> None:
    headline, tables = gbdt_table.summary({"planted": gbdt_cells(3), "null": gbdt_cells(0)}, "null", 7)
    assert headline["ndcg5_gain_rel"] > 0.1 > 0 < headline["ndcg5_gain_ci_low"] < headline["ndcg5_gain_rel"]
    assert headline["null_shop_gain"] == headline["null_shop_gain_ci_low"] == 0
    assert headline["gain_over_fusion_ci_low"] == pytest.approx(
        headline["ndcg5_gain_ci_low"] * headline["ndcg5_fused"], abs=2e-4)
    assert tables["planted"]["against_fused"]["queries"] == 201
    lost = [row for row in tables["planted"]["families"]["differences"]
            if row["system"] == "without product" and row["scope"] == "unconditional"]
    assert all(row["difference"]["mean"] < 0 for row in lost)


def test_the_headline_of_the_labels() -> None:
    rng = np.random.default_rng(2)
    cells = []
    for fold in range(2):
        ids = [f"q{fold}{number}" for number in range(20)]
        good = {query: ["p1", "p2", "p3"] for query in ids}
        poor = {query: [f"p{place}" for place in rng.permutation([1, 2, 3])] for query in ids}
        systems = {"retrieval": poor, "cross-encoder": poor, "both": good, "lightgbm": poor}
        cells.append({"query_ids": ids, "products": 5, "fusion": {}, "trees": {}, "answers": {
            rerank_table.WHOLE: systems, rerank_table.JUDGED: systems}, "judgments": {
            "query_id": [query for query in ids for _ in range(3)], "product_id": ["p1", "p2", "p3"] * 20,
            "gain": [1.0, 0.1, 0.0] * 20}})
    headline, tables = rerank_table.summary(cells, 1.0, 7)
    assert headline["ndcg10_rerank"] == headline["judged_only_ndcg"] == 1
    assert 0 < headline["gain_ci_low"] < 1 - headline["ndcg10_retrieval"]
    assert headline["detectable"] > 0
    assert tables[rerank_table.WHOLE]["queries"] == 40
