"""Text files as rows: lines of bounded length, JSON objects, CSV records; a bad row is a row with a reason.

Nothing here holds more than one line and one read buffer, whatever the file's size, and no content of
a file makes a reader fail: only a file that ends in the middle of its compression does.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from recsys_ray.data.sources.config import SourceError
from recsys_ray.data.sources.files import DataFile
from recsys_ray.data.sources.values import RowError, shown

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 4 << 20
MAX_RECORD_LINES = 200      # of one CSV record: what an unclosed quote may look ahead
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """One line without its end, and where it is; too long a line has no data."""

    data: bytes | None
    place: str
    size: int


@dataclass(frozen=True)
class Record:
    """One row: its values, or the reason why there are none."""

    values: dict[str, Any] | None
    error: str | None
    place: str      # "file:line", or "file:byte N" where counting lines would mean reading what came before
    size: int       # bytes in the file


def read_lines(
    file: DataFile, start: int = 0, stop: int | None = None, *, max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[Line]:
    """The lines of `file` whose first byte is in [start, stop), in order; gzip is read from its start only.

    Adjacent ranges give every line exactly once. Errors: `SourceError` for a torn gzip stream.
    """
    with file.open() as raw:
        if file.gzipped:
            with gzip.open(raw, "rb") as unpacked:
                yield from _lines(unpacked, file, 0, None, max_line_bytes)
            return
        begin = start
        if start:       # a line that begins exactly at `start` is ours: look at the byte before
            raw.seek(start - 1)
            begin = start - 1
        yield from _lines(raw, file, begin, stop, max_line_bytes, skip_first=bool(start))


def _lines(
    stream: IO[bytes] | gzip.GzipFile, file: DataFile, begin: int, stop: int | None, max_line_bytes: int, *,
    skip_first: bool = False,
) -> Iterator[Line]:
    offset, number = begin, 0       # of the line that `pending` holds the start of
    pending, length = bytearray(), 0
    skipping = skip_first
    while True:
        chunk = _chunk(stream, file, number)
        cursor = 0
        while cursor < len(chunk):
            if stop is not None and offset >= stop:
                return
            end = chunk.find(b"\n", cursor)
            piece_end = len(chunk) if end < 0 else end
            length += piece_end - cursor
            if length <= max_line_bytes and not skipping:
                pending += chunk[cursor:piece_end]
            else:
                pending.clear()
            cursor = piece_end + 1
            if end < 0:
                break
            number += 1
            if not skipping:
                yield _line(pending, length, file, number if not begin else None, offset, max_line_bytes)
            offset += length + 1
            pending, length, skipping = bytearray(), 0, False
        if not chunk:
            break
    if length and not skipping and (stop is None or offset < stop):
        yield _line(pending, length, file, number + 1 if not begin else None, offset, max_line_bytes)


def _chunk(stream: IO[bytes] | gzip.GzipFile, file: DataFile, number: int) -> bytes:
    try:
        return stream.read(CHUNK_BYTES)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SourceError(f"{file.path}: damaged gzip stream after line {number} ({error}); fetch the file again"
                          ) from None


def _line(pending: bytearray, length: int, file: DataFile, number: int | None, offset: int, limit: int) -> Line:
    place = f"{file.path}:byte {offset}" if number is None else f"{file.path}:{number}"
    if length > limit:
        return Line(None, place, length)
    data = bytes(pending)
    if number == 1 and data.startswith(BOM):
        data = data[len(BOM):]
    return Line(data.removesuffix(b"\r"), place, length)


def read_jsonl(
    file: DataFile, start: int = 0, stop: int | None = None, *, max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[Record]:
    """One record for each line of [start, stop) that is not blank."""
    for line in read_lines(file, start, stop, max_line_bytes=max_line_bytes):
        if line.data is not None and not line.data.strip():
            continue
        try:
            yield Record(parse_json_line(line.data, line.size), None, line.place, line.size)
        except RowError as error:
            yield Record(None, str(error), line.place, line.size)


def parse_json_line(data: bytes | None, size: int = 0) -> dict[str, Any]:
    """The JSON object of one line; raises `RowError` with the reason for anything else. NaN reads as null."""
    if data is None:
        raise RowError(f"a line of {size} bytes is over the limit")
    try:
        values = json.loads(data.decode("utf-8"), parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 at byte {error.start} of the line: {shown(data[error.start:])}") from None
    except RecursionError:
        raise RowError("JSON nested too deeply") from None
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON at character {error.pos} ({error.msg}): {shown(error.doc[:60])}") from None
    except ValueError as error:     # e.g. an integer of more digits than Python converts
        raise RowError(f"not usable JSON: {error}") from None
    if not isinstance(values, dict):
        raise RowError(f"expected a JSON object, found {shown(values)}")
    return values


def _constant(name: str) -> None:
    if name != "NaN":       # NaN is how some writers say "missing"; an infinity is a mistake
        raise RowError(f"{name} is not a value")


def read_csv(file: DataFile, delimiter: str, *, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Record]:
    """One record for each row below the header; an empty cell is None.

    A row with the wrong number of cells or broken quotes is a bad row by itself: a quote that is never
    closed costs its own line and no other.
    """
    lines = read_lines(file, max_line_bytes=max_line_bytes)
    names = csv_header(lines, file, delimiter)
    waiting: deque[Line] = deque()
    while True:
        first = waiting.popleft() if waiting else next(lines, None)
        if first is None:
            return
        if first.data is not None and not first.data.strip():
            continue
        try:
            taken, cells = _whole_record(first, waiting, lines, delimiter, len(names))
        except RowError as error:
            yield Record(None, str(error), first.place, first.size)
            continue
        for _ in taken[1:]:
            waiting.popleft()
        values = {name: cell if cell != "" else None for name, cell in zip(names, cells, strict=True)}
        yield Record(values, None, first.place, sum(line.size for line in taken))


def csv_header(lines: Iterator[Line], file: DataFile, delimiter: str) -> list[str]:
    """The column names in the first line; `SourceError` for a repeated, empty or unreadable name."""
    first = next(lines, None)
    try:
        names = [name.strip() for name in _cells([first], delimiter, None)] if first else []
    except RowError as error:
        raise SourceError(f"{file.path}: the header cannot be read: {error}") from None
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not any(names):
        raise SourceError(f"{file.path}: expected a header with distinct names, found {', '.join(repeated or names)!r}"
                          f" (delimiter {delimiter!r})")
    return names


def _whole_record(
    first: Line, waiting: deque[Line], lines: Iterator[Line], delimiter: str, expected: int,
) -> tuple[list[Line], list[str]]:
    """The lines of the record that starts with `first`, and its cells.

    Lines after the first stay in `waiting` for the caller to take, so that a bad record gives them back.
    """
    quotes = (first.data or b"").count(b'"')
    try:
        return [first], _cells([first], delimiter, expected)
    except RowError:    # an inch mark (5" wide) parses alone; an open quote does not, and its count is odd
        if quotes % 2 == 0:
            raise
    taken, size = [first], first.size
    while quotes % 2:
        if len(taken) > len(waiting):
            following = next(lines, None)
            if following is None:
                raise RowError(f"a quote is opened and never closed: {shown((first.data or b'')[:60])}")
            waiting.append(following)
        line = waiting[len(taken) - 1]
        taken.append(line)
        quotes += (line.data or b"").count(b'"')
        size += line.size
        if len(taken) > MAX_RECORD_LINES or size > MAX_LINE_BYTES:
            raise RowError(f"a quote is opened and not closed within {len(taken)} lines")
    return taken, _cells(taken, delimiter, expected)


def _cells(lines: list[Line], delimiter: str, expected: int | None) -> list[str]:
    if any(line.data is None for line in lines):
        raise RowError(f"a line of {max(line.size for line in lines)} bytes is over the limit")
    try:
        text = "\n".join((line.data or b"").decode("utf-8") for line in lines)
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 at byte {error.start} of the line: {shown(error.object[error.start:])}") from None
    cells = text.split(delimiter) if '"' not in text else _quoted_cells(text, delimiter)
    if expected is not None and len(cells) != expected:
        raise RowError(f"expected {expected} cells, found {len(cells)}: {shown(text)}")
    return cells


def _quoted_cells(text: str, delimiter: str) -> list[str]:
    limit = csv.field_size_limit(MAX_LINE_BYTES)    # the module's limit is global: put it back
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise RowError(f"broken quotes ({error}): {shown(text)}") from None
    finally:
        csv.field_size_limit(limit)
    if len(rows) != 1:
        raise RowError(f"a line end inside the row: {shown(text)}")
    return rows[0]


def peek(records: Iterable[Record], rows: int = 100, max_bytes: int = 8 << 20) -> tuple[list[str], list[Record]]:
    """Every column name that the first records hold, in order of appearance, and those records."""
    names: dict[str, None] = {}
    seen: list[Record] = []
    size = 0
    for record in records:
        seen.append(record)
        size += record.size
        names.update(dict.fromkeys(record.values or ()))
        if len(seen) == rows or size > max_bytes:
            break
    return list(names), seen
