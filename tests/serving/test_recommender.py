"""Answers without HTTP: the offline retriever's order, pages, sorting, facets, filters, similar products."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_shop import LIMITS, RETRIEVER, SEGMENTS, WordEncoder, body, build_small_index, catalogue, small_reranker

from recsys_ray.models.bge_m3 import BgeM3Encoder
from recsys_ray.models.bge_m3_heads import BgeM3Heads
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.models.token_signals import Encoding, Signals, SparseRows
from recsys_ray.retrieval.filters import Filters
from recsys_ray.retrieval.retriever import Retriever
from recsys_ray.retrieval.segments import IndexMismatch, open_index
from recsys_ray.serving.api import SearchRequest, parse
from recsys_ray.serving.errors import ApiError
from recsys_ray.serving.recommender import (
    NoEncoding,
    Recommender,
    ask_shard,
    document_encoding,
    encode_each,
    query_encoding,
    rank,
    search_query,
)


@pytest.fixture(scope="module")
def recommender(small_index: Path) -> Recommender:
    return Recommender(open_index(small_index, encoder_identity=WordEncoder.identity), WordEncoder(), RETRIEVER)  # type: ignore[arg-type]


def request(**fields: object) -> SearchRequest:
    return parse(SearchRequest, body(**fields), LIMITS)


def ids(found: dict) -> list[str]:  # type: ignore[type-arg]
    return [hit.product_id for hit in found["items"]]


@pytest.mark.parametrize("query", ["red sofa", "green mirror number17", "chair", "<b>blue</b>  lamp"])
def test_the_answers_are_those_of_the_offline_retriever(recommender: Recommender, query: str) -> None:
    offline = Retriever(recommender.encoder, recommender.index, RETRIEVER).retrieve(["q"], [query], 20)
    found = recommender.search(request(query=query, k=20))
    assert ids(found) == offline["product_id"].to_pylist()
    assert [hit.score for hit in found["items"]] == pytest.approx(offline["score"].to_pylist(), abs=0)


@pytest.mark.parametrize("parts", [[SEGMENTS], [SEGMENTS[:1], SEGMENTS[1:]], [[name] for name in SEGMENTS]])
def test_any_division_into_shards_gives_the_same_ranking(small_index: Path, parts: list[list[str]]) -> None:
    query = search_query(request(query="white table", filters={"price_max": 150.0}), RETRIEVER, ())
    vector = document_encoding(WordEncoder(), [query.text])  # type: ignore[arg-type]
    whole = rank([ask_shard(open_index(small_index), query, vector)], query)
    divided = rank([ask_shard(open_index(small_index, segments=part), query, vector) for part in parts], query)
    assert [(one.card["row_id"], one.score) for one in divided] == [(one.card["row_id"], one.score) for one in whole]
    assert len(whole) > 10


def test_pages_fit_together_without_gaps_or_repeats(recommender: Recommender) -> None:
    everything = ids(recommender.search(request(k=50)))
    pages = [ids(recommender.search(request(k=7, offset=offset))) for offset in range(0, 49, 7)]
    assert [one for page in pages for one in page] == everything[:49]
    ranks = [hit.rank for hit in recommender.search(request(k=3, offset=5))["items"]]
    assert ranks == [6, 7, 8]


@pytest.mark.parametrize(("sort", "column", "direction"), [("price_asc", "price", 1), ("price_desc", "price", -1),
                                                           ("rating", "rating", -1)])
def test_sorting_puts_what_is_missing_last(recommender: Recommender, sort: str, column: str, direction: int) -> None:
    found = recommender.search(request(query="chair", k=50, sort=sort, filters={"category": ["seating"]}))
    values = [getattr(hit, column) for hit in found["items"]]
    known = [value for value in values if value is not None]
    assert known == sorted(known, reverse=direction < 0)
    assert len(set(known)) > 5
    assert None in values
    assert values[: len(known)] == known


def test_equal_values_keep_the_order_of_relevance(recommender: Recommender) -> None:
    seating = {"category": ["seating"]}
    by_relevance = ids(recommender.search(request(query="chair", k=50, filters=seating)))
    by_price = recommender.search(request(query="chair", k=50, sort="price_asc", filters=seating))["items"]
    unpriced = [hit.product_id for hit in by_price if hit.price is None]
    assert len(unpriced) > 1
    assert unpriced == [one for one in by_relevance if one in unpriced]


def test_facets_count_all_candidates_that_meet_the_filters(recommender: Recommender) -> None:
    found = recommender.search(request(query="red sofa", k=1, filters={"price_max": 60.0}))
    by_id = {row["product_id"]: row for row in catalogue()}
    everything = recommender.search(request(query="red sofa", k=50, filters={"price_max": 60.0}))
    assert len(everything["items"]) == everything["candidates"] == found["candidates"]
    for column in ("category", "brand"):
        values = [by_id[one][column] for one in ids(everything)]
        counts = {entry["value"]: entry["count"] for entry in found["facets"][column]}
        assert counts == {value: values.count(value) for value in set(values) if value is not None}
        assert list(counts.values()) == sorted(counts.values(), reverse=True)


def test_filters_hold_for_every_answer(recommender: Recommender) -> None:
    found = recommender.search(request(k=50, filters={"category": ["seating"], "brand": ["Nord"], "price_min": 30,
                                                      "price_max": 120}))
    expected = {row["product_id"] for row in catalogue() if row["category"] == "seating" and row["brand"] == "Nord"
                and row["price_cents"] is not None and 3000 <= row["price_cents"] <= 12000}  # type: ignore[operator]
    assert set(ids(found)) == expected
    assert expected


def test_prices_are_shown_in_units_of_the_currency(recommender: Recommender) -> None:
    product = recommender.product("P012")
    assert product is not None
    assert product.price == 26.44
    assert recommender.product("P999") is None


def test_similar_products_leave_out_the_product_itself(recommender: Recommender) -> None:
    hits = recommender.similar("P000", 5)
    assert len(hits) == 5
    assert "P000" not in [hit.product_id for hit in hits]
    vectors = WordEncoder().encode_documents([str(row["text"]) for row in catalogue()])
    best = np.sort(vectors @ vectors[0])[::-1][1:6]
    assert [hit.score for hit in hits] == pytest.approx(best.tolist(), abs=1e-6)
    with pytest.raises(KeyError):
        recommender.similar("P999", 5)


def test_bm25_alone_needs_no_encoder(small_index: Path) -> None:
    config = RETRIEVER.replace(mode="bm25")
    alone = Recommender(open_index(small_index), None, config)
    assert alone.search(request(query="number42", k=1))["items"][0].product_id == "P042"
    assert alone.similar("P042", 3)
    with pytest.raises(ValueError, match="needs a text encoder"):
        Recommender(open_index(small_index), None, RETRIEVER)


def test_a_query_without_words_is_refused(recommender: Recommender) -> None:
    with pytest.raises(ApiError, match="no words"):
        recommender.search(request(query="<br/>"))


def test_one_poisoned_text_does_not_fail_its_batch() -> None:
    encoder = WordEncoder()
    answers = encode_each(encoder.encode_all_documents, ["red sofa", "poison", "lamp"])
    assert isinstance(answers[1], NoEncoding)
    assert answers[1].bad_text
    for place, text in ((0, "red sofa"), (2, "lamp")):
        answer = answers[place]
        assert isinstance(answer, Encoding)
        np.testing.assert_array_equal(answer.dense, encoder.encode_queries([text]))


def test_an_encoder_that_fails_is_not_the_texts_fault() -> None:
    def out_of_memory(texts: object) -> Encoding:
        raise RuntimeError("out of memory")

    answers = encode_each(out_of_memory, ["a", "b"])
    assert [isinstance(one, NoEncoding) and not one.bad_text for one in answers] == [True, True]


def test_what_is_not_finite_never_reaches_the_index() -> None:
    weights = SparseRows(np.array([0, 1, 2, 3]), np.array([5, 5, 6], np.int32), np.array([1, np.nan, 2], np.float32))
    found = Encoding(np.array([[1.0, np.nan], [1.0, 0.0], [0.0, 1.0]], np.float32), Signals(weights))
    answers = encode_each(lambda texts: found, ["a", "b", "c"])
    assert [isinstance(one, NoEncoding) for one in answers] == [True, True, False]
    assert isinstance(answers[2], Encoding)
    assert answers[2].signals.sparse is not None
    assert answers[2].signals.sparse.row(0)[0].tolist() == [6]


# --- token weights and token vectors --------------------------------------------------------------
WHOLE = RETRIEVER.replace(fusion={"window": 20, "dense_weight": 0.3, "sparse_weight": 0.2, "multi_weight": 0.3})


@pytest.fixture(scope="module")
def whole(tiny_text_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[BgeM3Encoder, Path]:
    """A random encoder with BGE-M3's heads, and the catalogue's index by it."""
    model, root = tiny_text_model(body="xlm-roberta", pooling="cls"), tmp_path_factory.mktemp("whole")
    torch.manual_seed(5)
    BgeM3Heads.new(32, 16).save(model)
    encoder = BgeM3Encoder(TextEncoderConfig(model=str(model), device="cpu", dtype="float32", sparse=True,
                                             multi_vector=True))
    build_small_index(root, encoder, encoder.identity)  # type: ignore[arg-type]
    return encoder, root


def test_token_weights_and_vectors_are_weighed_as_offline(whole: tuple[BgeM3Encoder, Path]) -> None:
    encoder, root = whole
    index = open_index(root, encoder_identity=encoder.identity)
    plain = Recommender(index, encoder, RETRIEVER)
    for query in ("red sofa", "green mirror number17", "chair"):
        offline = Retriever(encoder, index, WHOLE).retrieve(["q"], [query], 20)
        found = Recommender(index, encoder, WHOLE).search(request(query=query, k=20))
        assert ids(found) == offline["product_id"].to_pylist()
        assert [hit.score for hit in found["items"]] == pytest.approx(offline["score"].to_pylist(), abs=0)
        assert ids(found) != ids(plain.search(request(query=query, k=20)))
        question = search_query(request(query=query), WHOLE, ())
        encoding = query_encoding(encoder, WHOLE, [question.text])
        shards = [open_index(root, segments=part) for part in (SEGMENTS[:1], SEGMENTS[1:])]
        divided = rank([ask_shard(shard, question, encoding) for shard in shards], question)[:20]
        assert [one.card["product_id"] for one in divided] == ids(found)
    assert "P010" not in [hit.product_id for hit in Recommender(index, encoder, WHOLE).similar("P010", 5)]


def test_the_request_and_retrieval_agree_on_filters() -> None:
    parsed = request(filters={"category": ["a", "b"], "price_min": 1.5}).filters.to_filters()
    assert parsed == Filters(category=("a", "b"), price_min_cents=150)


def test_cards_come_in_the_order_asked_for_whatever_their_segment(recommender: Recommender) -> None:
    row_ids = np.concatenate([segment.row_ids[:5] for segment in recommender.index.segments])[::-1]
    cards = recommender.index.products(row_ids, ["row_id", "product_id"])
    assert [card["row_id"] for card in cards] == row_ids.tolist()
    assert cards[3]["product_id"] == recommender.index.product(int(row_ids[3]))["product_id"]  # type: ignore[index]
    with pytest.raises(KeyError):
        recommender.index.products(np.array([1]), ["row_id"])


def test_a_concern_filters_is_counted_and_says_why(recommender: Recommender) -> None:
    found = recommender.search(request(query="red sofa", k=50, explain=True, filters={"concern": ["acne"]}))
    assert {hit.product_id for hit in found["items"]} <= {f"P{number:03d}" for number in range(0, 120, 10)}
    assert len(found["items"]) > 3
    assert [one.model_dump() for one in found["items"][0].explanation.concerns] == [
        {"concern": "acne", "probability": 0.9, "because": ["salicylic acid", "zinc pca"]},
        {"concern": "age", "probability": 0.7, "because": []}]
    assert found["facets"]["concern"] == [{"value": name, "count": found["candidates"]} for name in ("acne", "age")]
    scored = recommender.product("P001")
    assert scored is not None
    assert scored.concerns == []        # scored, and good for nothing
    with pytest.raises(ApiError, match="scored for acne, age") as refused:
        recommender.search(request(filters={"concern": ["spots"]}))
    assert (refused.value.status, refused.value.field) == (422, "filters.concern")


def test_trees_that_read_concerns_refuse_an_index_of_another_model(recommender: Recommender, tmp_path: Path) -> None:
    reranker = small_reranker(tmp_path, None)
    for model, fits in (({"weights_sha256": "c0"}, True), ({"weights_sha256": "c1"}, False)):
        reranker.gbdt = replace(reranker.gbdt, concern_model=model)     # type: ignore[type-var]
        with nullcontext() if fits else pytest.raises(IndexMismatch, match="another concern model"):
            Recommender(recommender.index, recommender.encoder, RETRIEVER, reranker)
