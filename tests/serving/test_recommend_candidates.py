"""Lists for users whose next items are known: those of the service, and trees that learn to reorder them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from small_shop import LIMITS, RETRIEVER, WordEncoder, catalogue

from recsys_ray.artifacts import open_artifact, stage
from recsys_ray.config import Config
from recsys_ray.ids import bucket_of, row_ids
from recsys_ray.ranking.histories import PreparedHistories
from recsys_ray.ranking.recommenders import EaseConfig, RecommenderError
from recsys_ray.ranking.rerank import RerankConfig, Reranker
from recsys_ray.ranking.train_gbdt import TrainGbdtConfig, train_gbdt
from recsys_ray.ranking.train_recommenders import TrainRecommendersConfig, train_recommenders
from recsys_ray.retrieval.segments import open_index
from recsys_ray.schema import REVIEW, conform
from recsys_ray.serving.api import RecommendRequest, parse
from recsys_ray.serving.first_stage import open_first_stage
from recsys_ray.serving.recommend_candidates import RecommendCandidatesConfig, recommend_candidates
from recsys_ray.serving.recommender import Recommender, history_query

USERS, BUCKETS = 120, 2
PLACES = ("train", "train", "train", "train", "valid", "valid", "test")     # of a user's reviews, by time


def user_reviews(user: int) -> list[dict[str, Any]]:
    """Products of one noun, the cheaper the later: what a recommender of who has what cannot know."""
    rng = np.random.default_rng(user)
    own = rng.permutation([number for number in range(user % 6, 120, 6) if number != 7])[:7]
    drawn = own[np.argsort(-own + rng.normal(scale=15, size=7))].tolist()
    return [{"review_id": f"u{user:03d}-{place}", "user_id": f"u{user:03d}", "product_id": f"P{number:03d}",
             "row_id": int(row_ids([f"P{number:03d}"])[0]), "rating": 5.0, "text": "fine", "verified": True,
             "timestamp_ms": place * 1000 + user, "split": PLACES[place]} for place, number in enumerate(drawn)]


def write_prepared(root: Path) -> Path:
    reviews = conform(pa.Table.from_pylist([row for user in range(USERS) for row in user_reviews(user)]), REVIEW, "r")
    bucket = bucket_of(reviews["row_id"].to_numpy(), BUCKETS)
    with stage(root, "prepared", "made-by-hand") as staging:
        files = [staging.write_table(f"reviews/{split}/bucket-{number:05d}.parquet", reviews.filter(
            pc.and_(pa.array(bucket == number), pc.equal(reviews["split"], split))))
            for split in ("train", "valid", "test") for number in range(BUCKETS)]
        products = pa.table({"product_id": [str(row["product_id"]) for row in catalogue()]})
        files.append(staging.write_table("products/bucket-00000.parquet", products))
        staging.commit(files, config=Config(), facts={"num_buckets": BUCKETS})
    return root


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, small_index: Path) -> Path:
    """A prepared shop, its recommender, and the lists of both periods."""
    root = tmp_path_factory.mktemp("recommended")
    histories = PreparedHistories(path=write_prepared(root / "prepared"))
    train_recommenders(TrainRecommendersConfig(histories=histories, output=root / "recommenders", listed=10,
                                               recommenders={"ease": (EaseConfig(regularisation=5.0),)}))
    for split in ("valid", "test"):
        recommend_candidates(RecommendCandidatesConfig.model_validate({
            "index": small_index, "recommender": root / "recommenders", "histories": histories, "split": split,
            "depth": 40, "output": root / split}))
    return root


def test_a_list_is_the_one_that_the_service_would_rerank(work: Path, small_index: Path) -> None:
    made = open_artifact(work / "valid", "candidates")
    assert made.manifest.facts == {"name": "ease", "queries": USERS, "unknown": 0, "candidates": 40 * USERS}
    history = [row["product_id"] for row in user_reviews(7)[:4]]
    offline = Recommender(open_index(small_index), WordEncoder(), RETRIEVER)  # type: ignore[arg-type]
    request = parse(RecommendRequest, json.dumps({"history": history, "k": 40}).encode(), LIMITS)
    shown = offline.recommend(open_first_stage(work / "recommenders", "ease"), request, 40)["items"]
    rows = made.table("candidates-00000.parquet")
    mine = rows.filter(pc.equal(rows["query_id"], "u007-4")).to_pylist()     # named by the first find of the period
    assert [row["product_id"] for row in mine] == [one.product_id for one in shown]
    assert [row["score"] for row in mine] == pytest.approx([one.score for one in shown])
    query = next(row for row in made.table("queries.parquet").to_pylist() if row["query_id"] == "u007-4")
    cards = [row for row in catalogue() if row["product_id"] in history]
    assert (query["query"], query["unit_id"]) == (history_query(history, cards), "u007")
    judged = made.table("judgments.parquet")
    assert set(judged.filter(pc.equal(judged["query_id"], "u007-4"))["product_id"].to_pylist()) == {
        row["product_id"] for row in user_reviews(7)[4:6]}


def test_trees_of_these_lists_rerank_recommendations(work: Path, small_index: Path) -> None:
    trees = {"rounds": 30, "leaves": 4, "min_leaf": 5, "learning_rate": 0.2}
    made = train_gbdt(TrainGbdtConfig.model_validate({
        "index": small_index, "fit": work / "valid", "test": work / "test", "prepared": work / "prepared",
        "output": work / "gbdt", "rerank": {"one_title": False, "depth": 40}, "gbdt": trees, "samples": 100}))
    metrics = made.manifest.facts["metrics"]
    assert metrics["gbdt, nDCG@5"] > 2 * metrics["retrieval, nDCG@5"]      # cheap products are bought last
    assert sum(made.manifest.facts["queries"][part] for part in ("fit", "stop")) == USERS
    first = open_first_stage(work / "recommenders", "ease")
    reranker = Reranker(RerankConfig(gbdt=work / "gbdt", depth=40))
    offline = Recommender(open_index(small_index), WordEncoder(), RETRIEVER)  # type: ignore[arg-type]
    fields = {"history": ["P000", "P066"], "k": 5, "explain": True}
    request = parse(RecommendRequest, json.dumps(fields).encode(), LIMITS)
    before, after = (offline.recommend(first, request, 40, one)["items"] for one in (None, reranker))
    assert [one.product_id for one in after] != [one.product_id for one in before]
    assert after[0].explanation is not None
    assert after[0].explanation.features


def test_a_recommender_of_other_histories_is_refused(work: Path, small_index: Path, tmp_path: Path) -> None:
    other = write_prepared(tmp_path / "prepared")
    with pytest.raises(RecommenderError, match="fit it to these histories"):
        recommend_candidates(RecommendCandidatesConfig.model_validate({
            "index": small_index, "recommender": work / "recommenders", "output": tmp_path / "out",
            "histories": {"format": "prepared", "path": other}}))
