"""Reranking within a search: parity with one process, explanations, budgets, and answers without a stage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_shop import LIMITS, RETRIEVER, Parts, WordEncoder, body, client, local_app, open_parts, small_reranker

from recsys_ray.models.cross_encoder import CrossEncoderConfig
from recsys_ray.ranking.features import FEATURES
from recsys_ray.ranking.rerank import RerankConfig, Reranker
from recsys_ray.retrieval.segments import open_index
from recsys_ray.serving.answers import SearchResponse
from recsys_ray.serving.api import SearchRequest, parse
from recsys_ray.serving.cascade import TRY_AGAIN_S, RecentCost
from recsys_ray.serving.recommender import Recommender
from recsys_ray.serving.reranking import CrossScores, score_each


@pytest.fixture(scope="module")
def cross(tiny_pair_model: Callable[..., Path]) -> CrossEncoderConfig:
    return CrossEncoderConfig(model=str(tiny_pair_model()), max_tokens=32, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def reranker(cross: CrossEncoderConfig, tmp_path_factory: pytest.TempPathFactory) -> Reranker:
    return small_reranker(tmp_path_factory.mktemp("trees"), cross)


def with_rankers(root: Path, reranker: Reranker) -> Parts:
    parts = open_parts(root)
    parts.reranker = reranker
    return parts


def ask(parts: Parts, deadline_s: float = 5.0, **fields: object) -> SearchResponse:
    return asyncio.run(parts.gateway(deadline_s).search(parse(SearchRequest, body(**fields), LIMITS), "id"))


def ids(answer: SearchResponse | dict[str, Any]) -> list[str]:
    items = answer["items"] if isinstance(answer, dict) else answer.items
    return [hit.product_id for hit in items]


@pytest.mark.parametrize("fields", [
    {"query": "oak table", "k": 20, "explain": True}, {"query": "red sofa", "k": 7, "offset": 5, "explain": True},
    {"query": "chair", "sort": "price_asc", "filters": {"category": ["seating"], "price_max": 90.0}},
    {"query": "oak table", "system": "retriever", "explain": True}, {"query": "oak table", "system": "bm25", "k": 15}])
def test_over_shards_the_reranked_list_is_that_of_one_process(small_index: Path, reranker: Reranker,
                                                              fields: dict[str, Any]) -> None:
    offline = Recommender(open_index(small_index), WordEncoder(), RETRIEVER, reranker)  # type: ignore[arg-type]
    expected = offline.search(parse(SearchRequest, body(**fields), LIMITS))
    answer = ask(with_rankers(small_index, reranker), **fields)
    assert ids(answer) == ids(expected)
    assert answer.items
    for here, there in zip(answer.items, expected["items"], strict=True):
        assert here.score == pytest.approx(there.score, abs=1e-5)
        assert (here.explanation is None) == (there.explanation is None)
        if here.explanation is not None:
            assert here.explanation.first_rank == there.explanation.first_rank
            assert here.explanation.scores == pytest.approx(there.explanation.scores, abs=1e-4)
            assert [one.feature for one in here.explanation.features] == [
                one.feature for one in there.explanation.features]
    assert (answer.candidates, answer.facets.model_dump()) == (expected["candidates"], expected["facets"])
    assert not answer.degraded


def test_the_systems_differ_and_ask_only_their_own_stages(small_index: Path, reranker: Reranker) -> None:
    parts = with_rankers(small_index, reranker)
    found = {system: ask(parts, query="oak table", k=20, system=system) for system in ("bm25", "retriever", "full")}
    assert set(found["bm25"].took_ms) == {"shards", "rank"}
    assert set(found["retriever"].took_ms) == {"encode", "shards", "rank"}
    assert set(found["full"].took_ms) == {"encode", "shards", "rank", "rows", "cross_encoder", "ranker"}
    assert len({tuple(ids(one)) for one in found.values()}) == 3
    assert ids(ask(open_parts(small_index), query="oak table", k=20)) == ids(found["retriever"])


def test_an_explanation_adds_up(small_index: Path, reranker: Reranker) -> None:
    answer = ask(with_rankers(small_index, reranker), query="oak table", k=20, explain=True)
    scored = 0
    for hit in answer.items:
        assert hit.explanation is not None
        told = {one.feature: one for one in hit.explanation.features}
        scored += "cross_encoder" in hit.explanation.scores
        assert {"dense", "lexical", "fused", "ranker"} <= set(hit.explanation.scores)
        if "cross_score" in told:   # of those that were not scored its absence says something too
            score = hit.explanation.scores.get("cross_encoder")
            assert told["cross_score"].value == (None if score is None else pytest.approx(score, abs=1e-5))
        assert set(told) <= set(FEATURES)
        strengths = [abs(one.contribution) for one in hit.explanation.features]
        assert strengths == sorted(strengths, reverse=True)
    assert scored > 3
    assert any(hit.explanation.features for hit in answer.items if hit.explanation)
    plain = ask(with_rankers(small_index, reranker), query="oak table", k=20)
    assert ids(plain) == ids(answer)
    assert all(hit.explanation is None for hit in plain.items)


def without_cross_scores(root: Path, reranker: Reranker) -> list[str]:
    """What the trees alone make of it: they know how to do without the scores."""
    offline = Recommender(open_index(root), WordEncoder(), RETRIEVER, reranker)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reranker, "cross", lambda *_: None)
        return ids(offline.search(parse(SearchRequest, body(query="oak table", k=20), LIMITS)))


def test_without_trees_a_broken_cross_encoder_leaves_the_order_of_retrieval_under_the_same_rules(
        small_index: Path, cross: CrossEncoderConfig) -> None:
    parts = with_rankers(small_index, Reranker(RerankConfig(cross_encoder=cross, depth=60, diversity=0.5)))
    whole = ask(parts, query="oak table", k=20)
    parts.broken.add("cross")
    answer = ask(parts, query="oak table", k=20)
    assert (answer.degraded, answer.degraded_stage) == (True, "cross_encoder")
    parts.reranker = Reranker(RerankConfig(depth=60, diversity=0.5))
    assert ids(answer) == ids(ask(parts, query="oak table", k=20)) != ids(whole)


def test_a_late_cross_encoder_is_left_out_within_the_budget(small_index: Path, reranker: Reranker) -> None:
    parts = with_rankers(small_index, reranker)
    parts.delays["cross"] = 20
    began = time.monotonic()
    answer = ask(parts, query="oak table", k=20, budget_ms=300)
    assert time.monotonic() - began < 3
    assert (answer.degraded, answer.degraded_stage) == (True, "cross_encoder")
    assert ids(answer) == without_cross_scores(small_index, reranker)


def test_what_lately_did_not_fit_is_not_asked_until_it_is_tried_again() -> None:
    cost = RecentCost()
    assert cost.fits(0.1)               # nothing is known yet
    assert not cost.fits(0.0)
    cost.add(0.2)
    assert cost.fits(0.2)
    assert not cost.fits(0.1)
    cost.add(0.1, late=True)
    assert cost.seconds == pytest.approx(0.2)
    cost.add(0.3, late=True)
    assert cost.seconds == pytest.approx(0.6)
    assert not cost.fits(0.5)
    cost._measured -= TRY_AGAIN_S + 0.01
    assert cost.fits(0.5)
    cost.add(0.1)
    assert cost.seconds == pytest.approx(0.8 * 0.6 + 0.2 * 0.1)


def test_a_crowd_with_a_budget_waits_for_a_slow_cross_encoder_once(small_index: Path, reranker: Reranker) -> None:
    parts = with_rankers(small_index, reranker)
    parts.delays["cross"] = 20
    gateway = parts.gateway()
    request = parse(SearchRequest, body(query="oak table", budget_ms=400), LIMITS)

    async def one_after_the_other() -> list[SearchResponse]:
        return [await gateway.search(request, "id") for _ in range(4)]

    answers = asyncio.run(one_after_the_other())
    waited = [answer.took_ms["cross_encoder"] for answer in answers]
    assert waited[0] > 200
    assert max(waited[1:]) < 100
    assert all(answer.degraded for answer in answers)


@pytest.mark.parametrize(("broken", "stage"), [("cross", "cross_encoder"), ("ranker", "ranker"), ("rows", "ranker")])
def test_a_broken_ranker_never_breaks_the_answer(small_index: Path, reranker: Reranker, broken: str, stage: str
                                                 ) -> None:
    parts = with_rankers(small_index, reranker)
    parts.broken.add(broken)
    answer = ask(parts, query="oak table", k=20, explain=True)
    assert (answer.degraded, answer.degraded_stage) == (True, stage)
    assert all(hit.explanation and "cross_encoder" not in hit.explanation.scores for hit in answer.items)
    retrieved = ids(ask(open_parts(small_index), query="oak table", k=20))
    assert ids(answer) == (without_cross_scores(small_index, reranker) if broken == "cross" else retrieved)


def test_nothing_found_is_no_failure(small_index: Path, reranker: Reranker) -> None:
    answer = ask(with_rankers(small_index, reranker), query="oak", filters={"brand": ["none such"]})
    assert (answer.items, answer.degraded) == ([], False)


def test_a_missing_shard_is_no_reason_not_to_rank(small_index: Path, reranker: Reranker) -> None:
    parts = with_rankers(small_index, reranker)
    parts.delays[1] = 30
    answer = ask(parts, 1.0, query="oak table", k=20)
    assert (answer.shards_answered, answer.degraded) == (1, False)
    assert "ranker" in answer.took_ms


def test_one_query_that_cannot_be_scored_does_not_cost_the_others_theirs() -> None:
    def score(queries: Any, texts: Any) -> Any:
        if "poison" in queries:
            raise ValueError("poison")
        return np.array([len(query) + len(text) for query, text in zip(queries, texts, strict=True)], np.float32)

    asked = [("a", ["b", "cc"]), ("poison", ["d"]), ("ee", []), ("f", ["ggg"])]
    found = score_each(score, asked)
    assert [None if one.scores is None else one.scores.tolist() for one in found] == [[2, 3], None, [], [4]]
    nan = score_each(lambda queries, texts: np.array([1, np.nan, 3], np.float32), [("a", ["b"]), ("c", ["d", "e"])])
    assert nan[0].scores is not None
    assert nan[1] == CrossScores(None, "not finite")


def test_over_http_an_answer_says_what_it_did_without(small_index: Path, reranker: Reranker) -> None:
    parts = with_rankers(small_index, reranker)
    parts.broken.add("cross")

    async def post() -> dict[str, Any]:
        async with client(local_app(parts)) as http:
            answer = await http.post("/v1/search", content=body(explain=True))
            assert answer.status_code == 200
            found: dict[str, Any] = answer.json()
            return found

    answer = asyncio.run(post())
    assert (answer["degraded"], answer["degraded_stage"]) == (True, "cross_encoder")
    assert "cross_encoder" not in answer["items"][0]["explanation"]["scores"]
