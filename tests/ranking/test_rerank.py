"""The final order: what decides when a model is missing, ties, duplicates, diversity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_candidates import candidates, many

from recsys_ray.ids import row_id
from recsys_ray.models.cross_encoder import CrossEncoderConfig
from recsys_ray.ranking.rerank import RerankConfig, Reranker, RerankError, continued, diverse, first_of_title

NAN = float("nan")


def reranker(**changes: Any) -> Reranker:
    return Reranker(RerankConfig(**changes))


def test_without_a_model_the_order_is_that_of_retrieval_and_ties_go_by_row_id() -> None:
    some = candidates([{"row_id": 9, "title": "a"}, {"row_id": 4, "title": "b"}, {"row_id": 7, "title": "c"}],
                      [0.5, 0.5, 0.9])
    found = reranker().order("x", some, None)
    assert found.places.tolist() == [2, 1, 0]
    assert found.scores.tolist() == pytest.approx([0.9, 0.5, 0.5])
    assert found.features is None


def test_cross_scores_decide_and_what_was_not_scored_follows() -> None:
    some = candidates([{"title": name} for name in "abcd"], [4, 3, 2, 1])
    found = reranker().order("x", some, np.array([-5, 1, NAN, NAN], np.float32))
    assert found.places.tolist() == [1, 0, 2, 3]
    assert (np.diff(found.scores) < 0).all()
    assert found.scores[2] - found.scores[3] == pytest.approx(1)     # the distance by retrieval


def test_only_the_head_is_reordered() -> None:
    some = candidates([{"title": name} for name in "abcd"], [4, 3, 2, 1])
    found = reranker(depth=2).order("x", some, np.array([1, 2, 3, 4], np.float32))
    assert found.places.tolist() == [1, 0, 2, 3]


def test_what_was_seen_and_repeated_titles_are_left_out() -> None:
    products = [{"row_id": row_id("p0"), "title": "Red Sofa"}, {"row_id": row_id("p1"), "title": "red  sofa!"},
                {"row_id": row_id("p2"), "title": None}, {"row_id": row_id("p3"), "title": None}]
    some = candidates(products, [4, 3, 2, 1])
    assert reranker().order("x", some, None).places.tolist() == [0, 2, 3]
    assert reranker().order("x", some, None, seen=["p0", "p3", "elsewhere"]).places.tolist() == [1, 2]
    assert reranker(one_title=False).order("x", some, None).places.tolist() == [0, 1, 2, 3]


def test_diversity_brings_another_kind_forward() -> None:
    some = candidates([{"title": "red sofa one"}, {"title": "red sofa two"}, {"title": "oak lamp"}], [3.0, 2.9, 2.0])
    assert reranker().order("x", some, None).places.tolist() == [0, 1, 2]
    assert reranker(diversity=0.3).order("x", some, None).places.tolist() == [0, 2, 1]
    # by hand at 0.3: sofa two .3 * .9 - .7 * 2/4 = -.08, lamp .3 * 0 - 0 = 0


def test_diversity_keeps_every_place_once_and_leaves_the_rest() -> None:
    some = many(40)
    places = np.argsort(-some.fused)
    found = diverse(places, some.fused.astype(np.float64), some.rows["title"].to_pylist(), 0.5, 10)
    assert sorted(found.tolist()) == list(range(40))
    assert found[10:].tolist() == places[10:].tolist()
    assert set(found[:10].tolist()) == set(places[:10].tolist())


def test_an_empty_list_is_ordered() -> None:
    assert reranker(diversity=0.5).order("x", many(0), None).places.tolist() == []


def test_the_cross_encoder_reads_the_best_retrieved(tiny_pair_model: Any) -> None:
    config = CrossEncoderConfig(model=str(tiny_pair_model()), max_tokens=32, device="cpu")
    ranker = reranker(cross_encoder=config, cross_top=3)
    some = many(8)
    scores = ranker.cross("red sofa", some)
    assert scores is not None
    asked = np.flatnonzero(np.isfinite(scores))
    assert set(asked.tolist()) == set(np.argsort(-some.fused)[:3].tolist()) == set(ranker.to_cross(some).tolist())
    texts = [some.rows["text"][int(place)].as_py() for place in asked]
    assert scores[asked] == pytest.approx(ranker.cross_scores("red sofa", texts), abs=1e-5)


def test_without_a_cross_encoder_there_are_no_scores() -> None:
    assert reranker().cross("x", many(3)) is None
    assert len(reranker().to_cross(many(3))) == 0
    with pytest.raises(RerankError, match="cross_encoder"):
        reranker().cross_scores("x", ["a"])


def test_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    found = RerankConfig(gbdt=Path("trees"), cross_encoder=CrossEncoderConfig(model="model")).resolved()
    assert found.gbdt == tmp_path / "trees"
    assert found.cross_encoder is not None
    assert found.cross_encoder.model == str(tmp_path / "model")
    assert RerankConfig().resolved() == RerankConfig()


def test_parts() -> None:
    fused = np.array([3, 2, 1], np.float32)
    assert continued(np.array([NAN, NAN, NAN]), fused).tolist() == [3, 2, 1]
    assert continued(np.array([NAN, 5.0, NAN]), fused)[[0, 2]].tolist() == pytest.approx([4.999, 2.999])
    assert first_of_title(np.array([2, 1, 0]), ["a", None, "A!"]).tolist() == [2, 1]
