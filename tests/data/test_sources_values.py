"""Values of any type a file may hold -> declared types, one by one and by column alike."""

from __future__ import annotations

import datetime as dt
import decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ray.data.sources.values import Reading, RowError, convert_column, converter, readable, shown
from recsys_ray.schema import ATTRIBUTES, TEXTS

TEXT, ID = pa.field("title", pa.string()), pa.field("product_id", pa.string())
RATING, VOTES = pa.field("rating", pa.float32()), pa.field("helpful_votes", pa.int32())
TIME, COUNT = pa.field("timestamp_ms", pa.int64()), pa.field("count", pa.int64())
FLAG, LIST = pa.field("verified", pa.bool_()), pa.field("features", TEXTS)
MAP, DATA = pa.field("attributes", ATTRIBUTES), pa.field("data", pa.large_binary())
NOON = 1_588_680_000_000    # 2020-05-05T12:00:00Z


@pytest.mark.parametrize(("field", "value", "expected"), [
    (TEXT, "from 5", "from 5"), (TEXT, 12.99, "12.99"), (TEXT, 12.0, "12"), (TEXT, 7, "7"), (TEXT, True, "true"),
    (TEXT, float("nan"), None), (TEXT, "a\x00b", "ab"), (TEXT, "half \ud83d emoji", "half \ufffd emoji"),
    (TEXT, ["two", None, "lines"], "two\nlines"), (TEXT, [], None), (TEXT, decimal.Decimal("9.90"), "9.90"),
    (TEXT, dt.date(2020, 5, 5), "2020-05-05"), (TEXT, "\U0001f600 é", "\U0001f600 é"),
    (ID, 17, "17"), (ID, " B01 ", "B01"), (ID, "  ", None), (ID, 17.0, "17"),
    (RATING, "4.5", 4.5), (RATING, 4, 4.0), (RATING, " ", None), (RATING, float("nan"), None), (RATING, "nan", None),
    (VOTES, "3", 3), (VOTES, 3.0, 3), (VOTES, "3.0", 3), (VOTES, "", None),
    (TIME, NOON, NOON), (TIME, str(NOON), NOON), (TIME, "2020-05-05T12:00:00Z", NOON), (TIME, "2020-05-05 12:00", NOON),
    (TIME, "2020-05-05T14:00:00+02:00", NOON), (TIME, "20200505", NOON - 12 * 3_600_000), (TIME, float(NOON), NOON),
    (TIME, dt.datetime(2020, 5, 5, 12), NOON), (TIME, "1511011200000", 1_511_011_200_000),
    (FLAG, True, True), (FLAG, "Yes", True), (FLAG, "0", False), (FLAG, 1, True), (FLAG, "", None),
    (LIST, ["a", None, " ", 3], ["a", "3"]), (LIST, "a | b|", ["a", "b"]), (LIST, '["a", "b|c"]', ["a", "b|c"]),
    (LIST, [["a", "b"]], ["a\nb"]), (LIST, "[broken", ["[broken"]),
    (MAP, {"Size": 3.0, "Gone": None, "Both": ["x", "y"]}, [("Size", "3"), ("Both", "x, y")]),
    (MAP, '{"Brand": "B"}', [("Brand", "B")]), (MAP, "no json", [("details", "no json")]), (MAP, "", []),
    (MAP, {"In": {"deep": 1}}, [("In", '{"deep": 1}')]), (MAP, [("a", "b")], [("a", "b")]), (DATA, b"\xff", b"\xff"),
])
def test_a_value_is_read_as_meant(field: pa.Field, value: Any, expected: Any) -> None:
    found = converter(field)(value)
    assert found == expected
    assert pa.array([found], field.type).to_pylist() == [expected]


@pytest.mark.parametrize(("field", "value", "reason"), [
    (TEXT, {"a": 1}, "expected text, found dict"), (TEXT, b"\xff", "not UTF-8"), (TEXT, float("inf"), "inf"),
    (ID, "a\ud800", "lone surrogates"), (ID, "a\x00", "NUL"), (ID, ["x"], "expected an id"), (ID, True, "an id"),
    (RATING, "five", "cannot read 'five' as a number"), (RATING, True, "expected a number"),
    (RATING, float("inf"), "too large"), (RATING, 10**400, "too large"), (RATING, [5], "expected a number, found list"),
    (VOTES, 1.5, "whole number"), (VOTES, 2**31, "too large"), (VOTES, False, "whole number"), (VOTES, {}, "whole"),
    (COUNT, 2**63, "too large"), (TIME, "yesterday", "cannot read 'yesterday'"), (TIME, {}, "expected a number"),
    (FLAG, "maybe", "true or false"), (LIST, 3, "expected a list"), (LIST, ["a"] * 10_001, "10001 items"),
    (LIST, [{"a": 1}], "expected text"), (MAP, 3, "names and values"), (MAP, ["a"], "names and values"),
    (DATA, "text", "expected bytes"),
])
def test_a_value_that_does_not_fit_has_a_reason(field: pa.Field, value: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        converter(field)(value)


def test_the_reading_says_what_ambiguous_values_mean() -> None:
    reading = Reading(list_separator=">", milliseconds=1000)
    assert converter(LIST, reading)("Home > Kitchen") == ["Home", "Kitchen"]
    assert converter(TIME, reading)(1_588_680_000) == NOON
    assert converter(TIME, reading)("2020-05-05T12:00Z") == NOON    # a date has no unit


@pytest.mark.parametrize(("field", "column", "expected"), [
    (TEXT, pa.array([12.99, None, 5.0], pa.float32()), ["12.99", None, "5"]), (TEXT, pa.array([1, 2]), ["1", "2"]),
    (TEXT, pa.array(["a", None], pa.large_string()), ["a", None]), (TEXT, pa.array(["a", "b"]).dictionary_encode(),
                                                                     ["a", "b"]),
    (TEXT, pa.nulls(2), [None, None]), (TEXT, pa.array(["a\x00"]), ["a"]), (ID, pa.array([" a ", "", None]),
                                                                             ["a", None, None]),
    (RATING, pa.array([1, 2], pa.int8()), [1.0, 2.0]), (RATING, pa.array([4.5, float("nan")]), [4.5, None]),
    (VOTES, pa.array([1, None], pa.int64()), [1, None]), (VOTES, pa.array([1.0, 2.0]), [1, 2]),
    (TIME, pa.array([dt.datetime(2020, 5, 5, 12)], pa.timestamp("us")), [NOON]),
    (TIME, pa.array([dt.datetime(2020, 5, 5, 12)], pa.timestamp("ns", tz="Europe/Berlin")), [NOON]),
    (TIME, pa.array([dt.date(2020, 5, 5)]), [NOON - 12 * 3_600_000]), (TIME, pa.array([NOON]), [NOON]),
    (LIST, pa.array([["a", None], None]), [["a"], None]), (MAP, pa.array([{"x": 1, "y": None}]), [[("x", "1")]]),
    (DATA, pa.array([b"\xff"]), [b"\xff"]), (FLAG, pa.array([1, 0, None]), [True, False, None]),
])
def test_a_column_is_read_like_its_values(field: pa.Field, column: pa.Array, expected: list[Any]) -> None:
    found, reasons = convert_column(pa.chunked_array([column]), field)
    assert found.type == field.type
    assert found.to_pylist() == expected
    assert not reasons


@pytest.mark.parametrize(("field", "values", "bad"), [
    (RATING, ["5", "five", None], 1), (VOTES, [1, 2**40, 3], 1), (RATING, [1.0, float("inf")], 1),
    (FLAG, ["yes", "no", "perhaps"], 2), (ID, ["a", "b\x00"], 1),
])
def test_bad_values_of_a_column_cost_only_their_rows(field: pa.Field, values: list[Any], bad: int) -> None:
    found, reasons = convert_column(pa.chunked_array([pa.array(values)]), field)
    assert list(reasons) == [bad]
    assert reasons[bad].startswith(f"{field.name}: ")
    assert found[bad].as_py() is None
    assert len(found) == len(values)


def test_parquet_text_that_is_not_utf8_costs_only_its_row() -> None:
    broken = pa.array([b"fine", b"\xff\xfe", None], pa.binary()).view(pa.string())
    nested = pa.ListArray.from_arrays([0, 1, 2, 2], pa.array([b"\xff", b"ok"], pa.binary()).view(pa.string()))
    table, reasons = readable(pa.table({"title": broken, "features": nested}))
    assert reasons == {1: "title: not UTF-8 text", 0: "features: not UTF-8 text"}
    assert table.to_pydict() == {"title": ["fine", None, None], "features": [None, ["ok"], []]}


SURROGATES = st.text(st.characters(categories=["Cs"]))
SCALARS = (st.none() | st.booleans() | st.integers() | st.floats() | st.text() | SURROGATES
           | st.binary(max_size=4) | st.dates())
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner,
                                                                                           max_size=3), max_leaves=8)


@settings(max_examples=300)
@given(st.sampled_from([TEXT, ID, RATING, VOTES, TIME, COUNT, FLAG, LIST, MAP, DATA]), ANYTHING)
def test_any_value_fits_the_type_or_has_a_reason(field: pa.Field, value: Any) -> None:
    if value is None:
        return
    try:
        found = converter(field)(value)
    except RowError as error:
        str(error).encode("utf-8")
        return
    pa.array([found], field.type).validate(full=True)


def test_shown_is_short_and_printable() -> None:
    assert shown("a\ud800\n") == r"'a\ud800\n'"
    assert len(shown("x" * 1000)) <= 64
    assert shown([1, 2]) == "list [1, 2]"
