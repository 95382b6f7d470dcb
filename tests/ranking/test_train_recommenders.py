"""Recommenders from histories to a published artefact, and the figures of their scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from small_histories import ITEMS, tastes, write_prepared, write_reranker_histories

from recsys_ray.artifacts import Artifact
from recsys_ray.evaluation.evaluate_ranking import EvaluateRankingConfig, evaluate_ranking
from recsys_ray.evaluation.ranking import RankingError
from recsys_ray.ranking.train_recommenders import TrainRecommendersConfig, open_recommender, train_recommenders

TRIED: dict[str, Any] = {
    "popularity": [{"kind": "popularity"}],
    "item_knn": [{"kind": "item_knn", "neighbours": 1, "shrinkage": 1e6}, {"kind": "item_knn", "neighbours": 10}],
    "ease": [{"kind": "ease", "regularisation": 1e9}, {"kind": "ease", "regularisation": 5}],
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    root = tmp_path_factory.mktemp("books")
    write_reranker_histories(root / "pairs")
    return train_recommenders(settings(root))


def settings(root: Path, **changes: Any) -> TrainRecommendersConfig:
    return TrainRecommendersConfig.model_validate({
        "histories": {"format": "reranker_pairs", "path": root / "pairs"}, "output": root / "recommenders",
        "recommenders": TRIED, "listed": 5, "candidates": ["item_knn"], **changes})


def test_every_setting_is_tried_and_the_best_of_valid_kept(published: Artifact) -> None:
    facts = published.manifest.facts
    for name in ("item_knn", "ease"):
        tried = {one["ndcg10"]: one for one in facts["validation"] if one["name"] == name}
        best = tried[max(tried)]
        assert facts["chosen"][name].items() <= best.items()
    assert facts["test"]["item_knn"]["nDCG@10"] > facts["test"]["popularity"]["nDCG@10"] + 0.1
    assert facts["users"] == {"train": 60, "valid": 30, "test": 30}


def test_the_published_recommender_knows_tastes(published: Artifact) -> None:
    for name in ("item_knn", "ease"):
        ids, _ = open_recommender(published, name).recommend(["i02", "i04"], 5)
        assert all(int(one[1:]) % 2 == 0 for one in ids)
        assert not {"i02", "i04"} & set(ids)
    with pytest.raises(ValueError, match="there are ease, item_knn, popularity"):
        open_recommender(published, "knn")


def test_candidates_are_lists_for_everybody_without_what_is_known(published: Artifact) -> None:
    rows = published.table("candidates/item_knn.parquet").to_pylist()
    users = tastes(120)
    assert {row["query_id"] for row in rows} == {f"u{user:03d}" for user in range(120)}
    held = published.manifest.facts["users"]
    assert held
    of_train = [row for row in rows if int(row["query_id"][1:]) % 8 < 4]
    assert not [row for row in of_train if ITEMS.index(row["product_id"]) in users[int(row["query_id"][1:])]]
    assert not [row for row in rows if row["product_id"] in ("i20", "i21")]
    assert {row["rank"] for row in rows} == set(range(1, 6))


def test_nothing_is_fitted_twice(published: Artifact) -> None:
    root = published.path.parents[2]
    assert train_recommenders(settings(root)).manifest.version == published.manifest.version


def test_scores_are_evaluated_over_users(published: Artifact, tmp_path: Path) -> None:
    config = EvaluateRankingConfig(scores=published.path.parents[1], output=tmp_path / "ranking", baseline="popularity",
                                   samples=200)
    found = evaluate_ranking(config)
    document = json.loads(found.file("metrics.json").read_bytes())
    means = {(row["system"], row["metric"]): row["mean"] for row in document["means"]}
    assert means["ease", "nDCG@10"] == pytest.approx(published.manifest.facts["test"]["ease"]["nDCG@10"], abs=0.02)
    assert document["comparisons"]["item_knn"]["MAP"]["low"] > 0
    per_query = found.table("per_query/ease.parquet")
    assert per_query.num_rows == document["queries"] == 30
    assert evaluate_ranking(config).manifest.version == found.manifest.version
    with pytest.raises(RankingError, match="no system 'bm25'"):
        evaluate_ranking(config.replace(baseline="bm25"))


def test_a_plain_file_of_scores_will_do(published: Artifact, tmp_path: Path) -> None:
    pq.write_table(published.table("scores.parquet"), tmp_path / "scores.parquet")
    config = EvaluateRankingConfig(scores=tmp_path / "scores.parquet", output=tmp_path / "ranking", baseline="random",
                                   systems=("ease",), samples=200)
    assert evaluate_ranking(config).manifest.facts["systems"] == ["random", "ease"]
    with pytest.raises(RankingError, match="neither"):
        evaluate_ranking(config.replace(scores=tmp_path / "nowhere"))


def test_a_shop_with_times_is_split_by_them(tmp_path: Path) -> None:
    write_prepared(tmp_path / "prepared")
    found = train_recommenders(TrainRecommendersConfig.model_validate({
        "histories": {"format": "prepared", "path": tmp_path / "prepared"}, "output": tmp_path / "recommenders",
        "recommenders": TRIED, "listed": 5}))
    assert found.manifest.facts["timed"]
    assert found.manifest.facts["users"]["test"] == 80
    assert found.manifest.parents["histories"].startswith("prepared/")
