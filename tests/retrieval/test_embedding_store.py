"""The arithmetic of resuming: what is carried over, what is planned, what a merge accepts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from recsys_ray.ids import row_ids
from recsys_ray.models.token_signals import Encoding, MultiVectors, Signals, SparseRows, signal_fields, signals_of
from recsys_ray.retrieval.embedding_store import (
    TEXT_SCHEMA,
    EmbeddingError,
    embed_rows,
    empty_texts,
    merge_bucket,
    pending_rows,
    plan_bucket,
    plan_units,
    unit_from_dict,
)
from recsys_ray.schema import QUARANTINE, embedding_schema

NOTHING = QUARANTINE.empty_table()


def texts(count: int, changed: Sequence[int] = (), empty: Sequence[int] = ()) -> pa.Table:
    names = [f"p{i}" for i in range(count)]
    words = ["" if i in empty else f"product {i}" + (" new" if i in changed else "") for i in range(count)]
    hashes = [hashlib.sha256(word.encode()).hexdigest()[:32] for word in words]
    columns = {"row_id": row_ids(names), "product_id": names, "text": words, "text_hash": hashes}
    return pa.table(columns, schema=TEXT_SCHEMA)


def fake_encode(some: Sequence[str]) -> np.ndarray:
    return np.array([[len(text), 1.0] for text in some], dtype=np.float32)


def vectors_of(table: pa.Table) -> pa.Table:
    return embed_rows(table.sort_by("row_id"), fake_encode, 2)[0]


def test_a_first_run_plans_every_row_once() -> None:
    table = texts(10, empty=[3])
    plan = plan_bucket("b", table, None, 4, max_chars=9)
    assert [chunk.rows for chunk in plan.chunks] == [4, 4, 1]
    assert (plan.carried, plan.empty, plan.clipped, plan.unchanged) == (0, 1, 0, False)
    rows = pa.concat_tables([pending_rows(chunk, table, None) for chunk in plan.chunks])
    assert sorted(rows["product_id"].to_pylist()) == sorted(f"p{i}" for i in range(10) if i != 3)


def test_giant_texts_are_counted() -> None:
    assert plan_bucket("b", texts(3, changed=[1]), None, 4, max_chars=9).clipped == 1


def test_only_changed_rows_are_planned() -> None:
    earlier = vectors_of(texts(100))
    plan = plan_bucket("b", texts(103, changed=[17]), earlier, 50, 1000)
    assert plan.carried == 99
    (chunk,) = plan.chunks
    rows = pending_rows(chunk, texts(103, changed=[17]), earlier)
    assert sorted(rows["product_id"].to_pylist()) == ["p100", "p101", "p102", "p17"]


def test_an_unchanged_bucket_is_recognised_and_a_removal_is_a_change() -> None:
    earlier = vectors_of(texts(5))
    assert plan_bucket("b", texts(5), earlier, 4, 1000).unchanged
    shrunk = plan_bucket("b", texts(4), earlier, 4, 1000)
    assert not shrunk.unchanged
    assert shrunk.chunks == ()
    merged = merge_bucket("b", texts(4), earlier, [], NOTHING, 2)
    assert sorted(merged["product_id"].to_pylist()) == ["p0", "p1", "p2", "p3"]


def test_row_order_of_the_input_does_not_matter() -> None:
    table = texts(20)
    shuffled = table.take(pa.array(np.random.default_rng(0).permutation(20)))
    assert plan_bucket("b", table, None, 6, 1000) == plan_bucket("b", shuffled, None, 6, 1000)


def test_units_fill_up_across_buckets_and_never_beyond_the_limit() -> None:
    plans = [plan_bucket(name, texts(rows), None, 10, 1000) for name, rows in (("a", 4), ("b", 5), ("c", 23))]
    units = plan_units(plans, 10)
    assert [unit.rows for unit in units] == [9, 10, 10, 3]
    assert len({unit.name for unit in units}) == 4
    assert [unit_from_dict(unit.as_dict()) for unit in units] == units
    assert plan_units([], 10) == []


def test_a_unit_whose_rows_changed_under_it_is_refused() -> None:
    (chunk,) = plan_bucket("b", texts(5), None, 10, 1000).chunks
    with pytest.raises(EmbeddingError, match="changed after they were planned"):
        pending_rows(chunk, texts(5, changed=[2]), None)


def test_a_row_id_that_occurs_twice_is_named() -> None:
    table = pa.concat_tables([texts(3), texts(1)])
    with pytest.raises(EmbeddingError, match=r"occurs twice.*'p0'"):
        plan_bucket("b", table, None, 4, 1000)


def test_merge_takes_each_row_from_the_right_side() -> None:
    earlier = vectors_of(texts(6))
    now = texts(7, changed=[2], empty=[4])
    plan = plan_bucket("b", now, earlier, 10, 1000)
    fresh = vectors_of(pending_rows(plan.chunks[0], now, earlier))
    merged = merge_bucket("b", now, earlier, [fresh], NOTHING, 2)
    assert merged.schema.equals(embedding_schema(2))
    assert merged["row_id"].to_pylist() == sorted(merged["row_id"].to_pylist())
    length = {row["product_id"]: row["vector"][0] for row in merged.to_pylist()}
    assert length == {"p0": 9, "p1": 9, "p2": 13, "p3": 9, "p5": 9, "p6": 9}


def test_merge_refuses_a_missing_and_a_double_row() -> None:
    fresh = vectors_of(texts(4))
    with pytest.raises(EmbeddingError, match="4 vectors for 5 products, first row that differs"):
        merge_bucket("b", texts(5), None, [fresh], NOTHING, 2)
    with pytest.raises(EmbeddingError, match="occurs twice"):
        merge_bucket("b", texts(4), None, [fresh, fresh.slice(0, 1)], NOTHING, 2)


def test_a_poison_row_is_found_by_halving_and_the_others_are_kept() -> None:
    calls = []

    def poisoned(some: Sequence[str]) -> np.ndarray:
        calls.append(len(some))
        if any("product 37" in text for text in some):
            raise RuntimeError("cannot")
        return fake_encode(some)

    vectors, quarantined = embed_rows(texts(64), poisoned, 2)
    assert vectors.num_rows == 63
    assert quarantined["key"].to_pylist() == ["p37"]
    assert "RuntimeError: cannot" in quarantined["reason"][0].as_py()
    assert len(calls) < 20
    merged = merge_bucket("b", texts(64), None, [vectors], quarantined, 2)
    assert merged.num_rows == 63


def test_a_broken_encoder_is_an_error_and_not_an_empty_result() -> None:
    def broken(some: Sequence[str]) -> np.ndarray:
        raise RuntimeError("no GPU")

    with pytest.raises(RuntimeError, match="no GPU"):
        embed_rows(texts(3), broken, 2)


@pytest.mark.parametrize(("value", "reason"), [(np.nan, "NaN"), (np.inf, "NaN or infinity"), (0.0, "zeros")])
def test_useless_vectors_are_set_aside(value: float, reason: str) -> None:
    def encode(some: Sequence[str]) -> np.ndarray:
        vectors = fake_encode(some)
        vectors[1] = value
        return vectors

    vectors, quarantined = embed_rows(texts(4), encode, 2)
    assert vectors["product_id"].to_pylist() == ["p0", "p2", "p3"]
    assert reason in quarantined["reason"][0].as_py()


def test_empty_texts_are_reported_with_their_reason() -> None:
    found = empty_texts(texts(4, empty=[1, 2]))
    assert found.schema.equals(QUARANTINE)
    assert found["key"].to_pylist() == ["p1", "p2"]
    assert set(found["reason"].to_pylist()) == {"empty text"}


FIELDS = signal_fields({"sparse_sha256": "a", "multi_vector_sha256": "b", "multi_vector_dimension": 2,
                        "multi_vector_dtype": "float16"})


def encode_with_signals(some: Sequence[str]) -> Encoding:
    """The characters of a text as tokens; a text with a "!" cannot be encoded, one with a "?" has a bad weight."""
    if any("!" in text for text in some):
        raise ValueError("an exclamation mark")
    offsets = np.cumsum([0, *map(len, some)]).astype(np.int64)
    letters = np.array([ord(letter) for text in some for letter in text], np.int32)
    weights = np.where(letters == ord("?"), np.nan, letters).astype(np.float32)
    multi = np.stack([letters, letters % 7], axis=1).astype(np.float16)
    return Encoding(fake_encode(some), Signals(SparseRows(offsets, letters, weights), MultiVectors(offsets, multi)))


def letters_of(table: pa.Table) -> dict[str, str]:
    found = signals_of(table)
    assert found.sparse is not None
    assert found.multi is not None
    for number in range(table.num_rows):
        assert found.multi.row(number)[:, 0].tolist() == found.sparse.row(number)[1].tolist()
    return {name: "".join(map(chr, found.sparse.row(number)[0]))
            for number, name in enumerate(table["product_id"].to_pylist())}


def test_signals_stay_with_their_rows_through_failures_carrying_and_merging() -> None:
    words = {"p0": "red", "p1": "bad!", "p2": "blue", "p3": "odd?", "p4": "g", "p5": "last"}
    table = texts(6).set_column(2, "text", pa.array(list(words.values()), pa.string())).sort_by("row_id")
    fresh, aside = embed_rows(table, encode_with_signals, 2, FIELDS)
    assert fresh.schema.equals(embedding_schema(2, FIELDS))
    assert letters_of(fresh) == {name: word for name, word in words.items() if name not in ("p1", "p3")}
    assert sorted(aside["key"].to_pylist()) == ["p1", "p3"]
    merged = merge_bucket("b", table, fresh.slice(0, 2), [fresh.slice(2)], aside, 2, FIELDS)
    assert letters_of(merged) == letters_of(fresh)
    only_bad = table.filter(pa.array([name == "p1" for name in table["product_id"].to_pylist()]))
    nothing, aside = embed_rows(only_bad, encode_with_signals, 2, FIELDS)
    assert nothing.schema.equals(embedding_schema(2, FIELDS))
    assert (nothing.num_rows, aside.num_rows) == (0, 1)
