"""Lines, JSON objects and CSV records: every row once, every bad row a reason, memory bounded."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_ray.data.sources import lines
from recsys_ray.data.sources.config import SourceError
from recsys_ray.data.sources.files import DataFile, byte_ranges, find_files
from recsys_ray.data.sources.lines import Record, parse_json_line, read_csv, read_jsonl, read_lines
from recsys_ray.data.sources.values import RowError


class BytesFile(DataFile):
    """A file that lies in memory."""

    def __init__(self, content: bytes, name: str = "memory.jsonl") -> None:
        super().__init__(name, len(content), "")
        object.__setattr__(self, "content", content)

    def open(self) -> io.BytesIO:
        return io.BytesIO(self.content)  # type: ignore[attr-defined]


def all_lines(file: DataFile, split_bytes: int, **options: Any) -> list[bytes | None]:
    return [line.data for start, stop in byte_ranges(file.size, split_bytes)
            for line in read_lines(file, start, stop, **options)]


def csv_records(content: bytes, delimiter: str = ",") -> list[Record]:
    return list(read_csv(BytesFile(content, "memory.csv"), delimiter))


@given(st.lists(st.binary(max_size=12).map(lambda one: one.replace(b"\n", b"").replace(b"\r", b"")), min_size=1),
       st.booleans(), st.integers(1, 40), st.integers(1, 9))
def test_ranges_of_any_size_give_every_line_once(
    written: list[bytes], ends: bool, split_bytes: int, chunk_bytes: int,
) -> None:
    content = b"\n".join(written) + (b"\n" if ends else b"")
    expected = content.split(b"\n")
    expected = expected[:-1] if expected[-1] == b"" else expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHUNK_BYTES", chunk_bytes)    # lines lie across the read buffers too
        patch.setattr(lines, "BOM", b"never")
        assert all_lines(BytesFile(content), split_bytes) == expected


def test_places_are_line_numbers_and_further_on_bytes() -> None:
    file = BytesFile(b'{"a":1}\n\nbad\n{"a":2}\n')
    assert [record.place for record in read_jsonl(file)] == ["memory.jsonl:1", "memory.jsonl:3", "memory.jsonl:4"]
    later = list(read_jsonl(file, 10, file.size))
    assert [(record.place, record.values) for record in later] == [("memory.jsonl:byte 13", {"a": 2})]
    assert file.content[13:].startswith(b'{"a":2}')  # type: ignore[attr-defined]


def test_a_line_over_the_limit_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "CHUNK_BYTES", 64)
    long = b'{"a": "' + b"x" * 1000 + b'"}'
    found = list(read_lines(BytesFile(b"1\n" + long + b"\n2"), max_line_bytes=100))
    assert [line.data for line in found] == [b"1", None, b"2"]
    assert found[1].size == len(long)
    records = list(read_jsonl(BytesFile(b'{"a":1}\n' + long + b'\n{"a":2}'), max_line_bytes=100))
    assert [record.values for record in records] == [{"a": 1}, None, {"a": 2}]
    assert records[1].error == f"a line of {len(long)} bytes is over the limit"


def test_a_line_of_ten_megabytes_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * 10_000_000 + b'"}\n{"a": 1}\n')
    records = list(read_jsonl(find_files(str(path))[0]))
    assert [record.values for record in records] == [None, {"a": 1}]


def test_the_reader_reads_no_further_than_it_is_asked_to() -> None:
    """A generator that held the file would have read all of it before its first row."""
    content = b"".join(b'{"a": %d}\n' % number for number in range(2_000_000))

    class Watched(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            Watched.taken += len(data)
            return data

    file = BytesFile(content)
    file.open = lambda: Watched(content)  # type: ignore[method-assign, misc]
    records = read_jsonl(file)
    assert next(records).values == {"a": 0}
    assert Watched.taken <= lines.CHUNK_BYTES < len(content)


@pytest.mark.parametrize(("line", "reason"), [
    (b"{", "not JSON at character 1"), (b'{"a": 1', "not JSON"), (b"[1]", "expected a JSON object, found list"),
    (b'"text"', "expected a JSON object"), (b"null", "expected a JSON object"), (b"\xff\xfe{}", "not UTF-8 at byte 0"),
    (b'{"a": "\xc3"}', "not UTF-8"), (b"\x00\x00\x00", "not JSON"), (b'{"a": "\x00"}', "not JSON"),
    (b'{"a": Infinity}', "Infinity is not a value"), (b"[" * 100_000, "nested too deeply"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not usable JSON"),
])
def test_a_line_that_is_no_object_has_a_reason(line: bytes, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        parse_json_line(line)


def test_what_json_writers_leave_for_a_missing_value_is_null() -> None:
    assert parse_json_line(b'{"price": NaN}') == {"price": None}


@given(st.binary(max_size=200))
def test_no_bytes_break_the_parser(data: bytes) -> None:
    try:
        values = parse_json_line(data)
    except RowError as error:
        str(error).encode("utf-8")     # a reason can always be written down
    else:
        assert isinstance(values, dict)


JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**60, 2**60) | st.floats(allow_nan=False, width=32)
                    .filter(lambda one: abs(one) < 1e30) | st.text(), lambda inner: st.lists(inner, max_size=4)
                    | st.dictionaries(st.text(max_size=5), inner, max_size=4), max_leaves=10)


@given(st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=4), min_size=1, max_size=10), st.booleans(),
       st.integers(1, 50))
def test_objects_come_back_as_they_were_written(objects: list[dict[str, Any]], ascii_only: bool, split: int) -> None:
    written = "\n".join(json.dumps(one, ensure_ascii=ascii_only) for one in objects).encode("utf-8", "replace")
    file = BytesFile(written)
    found = [record.values for start, stop in byte_ranges(file.size, split) for record in read_jsonl(file, start, stop)]
    assert found == objects


def test_gzip_is_read_like_the_plain_file(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    content = "\ufeff" + "".join(json.dumps({"n": number, "t": "é"}) + "\r\n" for number in range(1000))
    plain.write_text(content, encoding="utf-8", newline="")
    packed.write_bytes(gzip.compress(content[:9000].encode()) + gzip.compress(content[9000:].encode()))  # two members
    one, two = (list(read_jsonl(find_files(str(path))[0])) for path in (plain, packed))
    assert [record.values for record in one] == [{"n": number, "t": "é"} for number in range(1000)]
    assert [record.values for record in two] == [record.values for record in one]


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_gzip_is_an_error_and_not_a_short_file(tmp_path: Path, damage: str) -> None:
    packed = bytearray(gzip.compress(b"".join(b'{"n": %d}\n' % number for number in range(10_000))))
    if damage == "cut":
        packed = packed[:-100]
    else:
        packed[len(packed) // 2] ^= 0xFF
    path = tmp_path / "torn.jsonl.gz"
    path.write_bytes(packed)
    with pytest.raises(SourceError, match=r"torn\.jsonl\.gz: damaged gzip stream after line"):
        list(read_jsonl(find_files(str(path))[0]))


# --- CSV ------------------------------------------------------------------------------------------
def test_csv_rows_have_their_values_and_places() -> None:
    records = csv_records(b'id,name,note\n1,"a, ""b""",\n2,"two\nlines",x\r\n\n3,c,y')
    assert [record.values for record in records] == [
        {"id": "1", "name": 'a, "b"', "note": None}, {"id": "2", "name": "two\nlines", "note": "x"},
        {"id": "3", "name": "c", "note": "y"},
    ]
    assert [record.place for record in records] == ["memory.csv:2", "memory.csv:3", "memory.csv:6"]


@pytest.mark.parametrize(("line", "reason"), [
    (b"1,2", "expected 3 cells, found 2"), (b"1,2,3,4", "expected 3 cells, found 4"),
    (b'1,"never closed,3', "a quote is opened|expected 3 cells|broken quotes"),
    (b'1,"a"b,3', "broken quotes"), (b"1,\xff,3", "not UTF-8"),
])
def test_a_bad_csv_row_costs_only_itself(line: bytes, reason: str) -> None:
    records = csv_records(b"a,b,c\n1,2,3\n" + line + b'\n4,"5",6\n7,8,9\n')
    assert [list((record.values or {}).values()) for record in records] == [["1", "2", "3"], [], ["4", "5", "6"],
                                                                           ["7", "8", "9"]]
    assert records[1].error is not None
    assert records[1].place == "memory.csv:3"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(records[1].error)


def test_an_inch_mark_is_text() -> None:
    records = csv_records(b'a,b\n1,TV 42" wide\n2,"TV 50"" wide"\n')
    assert [record.values for record in records] == [{"a": "1", "b": 'TV 42" wide'}, {"a": "2", "b": 'TV 50" wide'}]


def test_an_open_quote_does_not_swallow_the_file() -> None:
    good = b"".join(b"%d,x\n" % number for number in range(5000))
    records = csv_records(b'a,b\n0,"open\n' + good)
    assert [record.error is None for record in records] == [False] + [True] * 5000


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=8),
                         min_size=3, max_size=3), min_size=1, max_size=8), st.sampled_from(",;\t|"))
def test_csv_rows_come_back_as_they_were_written(rows: list[list[str]], delimiter: str) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([["a", "b", "c"], *rows])
    records = csv_records(buffer.getvalue().encode(), delimiter)
    expected = [[one or None for one in row] for row in rows]
    assert [list((record.values or {}).values()) for record in records] == expected


@given(st.binary(max_size=300))
def test_no_bytes_break_the_csv_reader(content: bytes) -> None:
    for record in csv_records(b"a,b\n" + content):
        assert (record.values is None) != (record.error is None)


@pytest.mark.parametrize("header", [b"a,a\n", b'"open\n1\n', b",,\n"])
def test_a_header_that_names_nothing_is_an_error(header: bytes) -> None:
    with pytest.raises(SourceError, match="header"):
        csv_records(header)
