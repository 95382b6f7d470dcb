"""Ragged token signals: taken, joined, written as Arrow columns and read back, texts in their order."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_ray.models.token_signals import (
    MultiVectors,
    SignalError,
    Signals,
    SparseRows,
    concat_signals,
    empty_encoding,
    signal_fields,
    signals_of,
)

IDENTITY = {"dimension": 3, "sparse_sha256": "a", "multi_vector_sha256": "b", "multi_vector_dimension": 2,
            "multi_vector_dtype": "float16"}


def signals(lengths: list[int], seed: int = 0) -> Signals:
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    count = int(offsets[-1])
    return Signals(SparseRows(offsets, rng.integers(0, 99, count).astype(np.int32), rng.random(count, np.float32)),
                   MultiVectors(offsets, rng.normal(size=(count, 2)).astype(np.float16)))


def texts(one: Signals) -> list[tuple[list[int], list[float], list[list[float]]]]:
    assert one.sparse is not None
    assert one.multi is not None
    return [(one.sparse.row(i)[0].tolist(), one.sparse.row(i)[1].tolist(), one.multi.row(i).tolist())
            for i in range(len(one.sparse))]


def test_take_and_concat_keep_texts_whole() -> None:
    whole = signals([2, 0, 3, 1, 0])
    places = np.array([3, 0, 0, 4, 2])
    assert texts(whole.take(places)) == [texts(whole)[i] for i in places]
    assert texts(whole.take(np.zeros(0, np.int64))) == []
    other = signals([1, 0, 2], seed=1)
    assert texts(concat_signals([whole, other.take(np.zeros(0, np.int64)), other])) == texts(whole) + texts(other)
    assert not concat_signals([])
    with pytest.raises(SignalError, match="all or none"):
        concat_signals([whole, Signals(whole.sparse)])


@pytest.mark.parametrize("lengths", [[2, 0, 3], [0, 0], []])
def test_columns_survive_parquet_filters_and_slices(lengths: list[int], tmp_path: object) -> None:
    whole = signals(lengths)
    table = pa.table(whole.columns(), schema=pa.schema(signal_fields(IDENTITY)))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    again = pq.read_table(pa.BufferReader(sink.getvalue()))
    assert again.schema.equals(table.schema)
    assert texts(signals_of(again)) == texts(whole)
    assert texts(signals_of(pa.concat_tables([again, again.slice(1)]))) == texts(whole) + texts(whole)[1:]
    assert texts(signals_of(again.filter(pa.array([i != 1 for i in range(len(lengths))], pa.bool_())))) == [
        one for i, one in enumerate(texts(whole)) if i != 1]


def test_the_texts_with_a_bad_number_are_found() -> None:
    one = signals([2, 0, 3, 1])
    assert one.sparse is not None
    assert one.multi is not None
    assert one.finite(4).tolist() == [True] * 4
    one.sparse.weights[1] = np.nan
    one.multi.vectors[5, 0] = np.inf
    assert one.finite(4).tolist() == [False, True, True, False]
    assert Signals().finite(2).tolist() == [True, True]


def test_nothing_has_the_right_types() -> None:
    nothing = empty_encoding(IDENTITY)
    assert nothing.signals.multi is not None
    assert nothing.signals.multi.vectors.shape == (0, 2)
    assert texts(concat_signals([nothing.signals, signals([1])])) == texts(signals([1]))
    assert not empty_encoding({"dimension": 3}).signals
    ragged = pa.table({"sparse_tokens": [[1, 2]], "sparse_weights": [[1.0]]})
    with pytest.raises(SignalError, match="more tokens than weights"):
        signals_of(ragged)
