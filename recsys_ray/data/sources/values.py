"""One value, or one column, of whatever type a file holds -> the type our schema declares, or a reason.

Text is kept as it is but for what no later stage can hold: NUL characters go, lone surrogates become
U+FFFD. In an id that would merge different ids, so there it is an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

MAX_LIST_ITEMS = 10_000     # in one cell: more is a broken row, not a product
INT_BOUNDS = {pa.int32(): 2**31, pa.int64(): 2**63}
SURROGATES = re.compile("[\ud800-\udfff]")
TRUE = frozenset({"true", "t", "yes", "y", "1"})
FALSE = frozenset({"false", "f", "no", "n", "0"})


class RowError(ValueError):
    """One row that cannot be used; the message is the reason that goes to quarantine."""


@dataclass(frozen=True)
class Reading:
    """How ambiguous values are to be understood."""

    list_separator: str = "|"   # inside a text that stands for a list
    milliseconds: int = 1       # in one unit of a time given as a number


DEFAULT = Reading()


def converter(field: pa.Field[Any], reading: Reading = DEFAULT) -> Callable[[Any], Any]:
    """A function from a value that is not None to a Python value of `field`'s type, or None.

    It raises `RowError`, without the field's name, for a value that does not fit.
    """
    kind = field.type
    if kind == pa.string():
        return _identifier if field.name.endswith("_id") else text
    if pa.types.is_floating(kind):
        return _number
    if field.name.endswith("_ms"):
        return partial(_milliseconds, milliseconds=reading.milliseconds)
    if pa.types.is_integer(kind):
        return partial(_integer, bound=INT_BOUNDS[kind])
    if pa.types.is_boolean(kind):
        return _boolean
    if pa.types.is_map(kind):
        return _pairs
    if pa.types.is_list(kind):
        return partial(_texts, separator=reading.list_separator)
    return _bytes


def convert_column(
    column: pa.ChunkedArray[Any], field: pa.Field[Any], reading: Reading = DEFAULT,
) -> tuple[pa.Array[Any], dict[int, str]]:
    """`column` with the type of `field`, bad values null; and position -> reason for each bad value."""
    quick = _cast_whole(column, field)
    if quick is not None:
        return quick, {}
    one_value = converter(field, reading)
    values: list[Any] = []
    reasons: dict[int, str] = {}
    for position, value in enumerate(_python_values(column)):
        try:
            values.append(None if value is None else one_value(value))
        except RowError as error:
            values.append(None)
            reasons[position] = f"{field.name}: {error}"
    return pa.array(values, type=field.type), reasons


def _cast_whole(column: pa.ChunkedArray[Any], field: pa.Field[Any]) -> pa.Array[Any] | None:
    """The column cast at once, or None where the values must be looked at one by one."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_time = field.name.endswith("_ms")
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    try:
        if pa.types.is_null(kind):
            return _combined(column, field)
        if pa.types.is_string(field.type) and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            if pc.any(pc.match_substring(column.cast(pa.large_string()), "\x00")).as_py():
                return None
            return _combined(_trimmed(column) if field.name.endswith("_id") else column, field)
        if is_time and pa.types.is_timestamp(kind):
            return _combined(column.cast(pa.timestamp("ms", tz=kind.tz), safe=False), field)
        if number and pa.types.is_floating(field.type) and not _any_not_finite(column):
            return _combined(column, field)
        if pa.types.is_integer(kind) and (pa.types.is_string(field.type) or pa.types.is_integer(field.type)):
            return None if is_time else _combined(column, field)
        if kind == field.type or (pa.types.is_large_binary(field.type) and pa.types.is_binary(kind)):
            return None if pa.types.is_nested(kind) else _combined(column, field)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    return None


def _combined(column: pa.ChunkedArray[Any], field: pa.Field[Any]) -> pa.Array[Any]:
    safe = not pa.types.is_floating(field.type)     # a float64 may lose digits as a float32, nothing else may
    whole: pa.Array[Any] = column.cast(field.type, safe=safe).combine_chunks()
    return whole


def _trimmed(column: pa.ChunkedArray[Any]) -> pa.ChunkedArray[Any]:
    """Ids without the space around them; an id of nothing else is null."""
    bare = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
    empty = pc.equal(bare, pa.scalar("", pa.large_string()))
    trimmed: pa.ChunkedArray[Any] = pc.if_else(empty, pa.scalar(None, pa.large_string()), bare)
    return trimmed


def _any_not_finite(column: pa.ChunkedArray[Any]) -> bool:
    return pa.types.is_floating(column.type) and not pc.all(pc.is_finite(column)).as_py()


def _python_values(column: pa.ChunkedArray[Any]) -> Iterable[Any]:
    if pa.types.is_float32(column.type):   # Arrow prints a float32 as it was written (12.99), Python would not
        return (None if one is None else float(one) for one in column.cast(pa.string()).to_pylist())
    values: list[Any] = column.to_pylist()
    return values


def readable(table: pa.Table) -> tuple[pa.Table, dict[int, str]]:
    """`table` with every text valid UTF-8 (Parquet files are not checked when read): bad cells are null.

    And position -> reason for each row that held one.
    """
    reasons: dict[int, str] = {}
    for at, field in enumerate(table.schema):
        column = table.column(at)
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            values = [_decoded(one) for one in column]
            for row, (value, original) in enumerate(zip(values, column.is_valid().to_pylist(), strict=True)):
                if value is None and original:
                    reasons.setdefault(row, f"{field.name}: not UTF-8 text")
            table = table.set_column(at, field, pa.chunked_array([pa.array(values, field.type)]))
    return table, reasons


def _decoded(scalar: pa.Scalar[Any]) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return None


def text(value: Any) -> str | None:
    """A scalar as text: numbers without a needless .0, booleans as JSON writes them; NaN is None."""
    if value is None or isinstance(value, str):
        return value if value is None or (value.isascii() and "\x00" not in value) else _storable(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if math.isinf(value):
            raise RowError(f"cannot read {value} as text")
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, int | Decimal):
        return str(value)
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, bytes):
        raise RowError("not UTF-8 text")
    if isinstance(value, list | tuple):
        return "\n".join(filter(None, (text(one) for one in value))) or None
    raise RowError(f"expected text, found {shown(value)}")


def _storable(value: str) -> str:
    return SURROGATES.sub("\ufffd", value.replace("\x00", ""))


def _identifier(value: Any) -> str | None:
    if isinstance(value, list | tuple | dict | bool):
        raise RowError(f"expected an id, found {shown(value)}")
    if isinstance(value, str) and ("\x00" in value or SURROGATES.search(value)):
        raise RowError(f"an id with NUL or lone surrogates: {shown(value)}")
    written = text(value)
    return written.strip() or None if written else None


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = float(value.strip())
        except ValueError:
            raise RowError(f"cannot read {shown(value)} as a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise RowError(f"expected a number, found {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if math.isinf(number):
        raise RowError("a number too large to hold")
    return None if math.isnan(number) else number


def _integer(value: Any, bound: int) -> int | None:
    if isinstance(value, str):
        stripped = value.strip()
        try:
            value = int(stripped) if stripped else None
        except ValueError:
            value = _number(stripped)
    if isinstance(value, bool):
        raise RowError(f"expected a whole number, found {shown(value)}")
    if isinstance(value, float | Decimal):
        number = _number(value)
        if number is not None and not number.is_integer():
            raise RowError(f"expected a whole number, found {shown(value)}")
        value = None if number is None else int(number)
    if value is None:
        return None
    if not isinstance(value, int):
        raise RowError(f"expected a whole number, found {shown(value)}")
    if not -bound <= value < bound:
        raise RowError("a number too large to hold")
    return value


def _milliseconds(value: Any, milliseconds: int) -> int | None:
    if isinstance(value, datetime | date):
        return _epoch(value)
    if isinstance(value, str) and (len(value.strip()) == 8 or not value.strip().isdigit()):
        try:    # digits alone are a number but for 20230501: as either unit that number would be in 1970
            return _epoch(datetime.fromisoformat(value.strip()))
        except ValueError:
            pass
    number = _number(value)
    return None if number is None else _integer(round(number * milliseconds), 2**63)


def _epoch(value: datetime | date) -> int:
    moment = value if isinstance(value, datetime) else datetime(value.year, value.month, value.day)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)


def _boolean(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if not word:
        return None
    if word in TRUE or word in FALSE:
        return word in TRUE
    raise RowError(f"cannot read {shown(value)} as true or false")


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise RowError(f"expected bytes, found {shown(value)}")
    return value


def _texts(value: Any, separator: str) -> list[str] | None:
    if isinstance(value, str):
        value = _json_or(value, "[") or value.split(separator)
    if not isinstance(value, Sequence):
        raise RowError(f"expected a list, found {shown(value)}")
    if len(value) > MAX_LIST_ITEMS:
        raise RowError(f"a list of {len(value)} items; the limit is {MAX_LIST_ITEMS}")
    written = (text(one) for one in value)
    return [one.strip() for one in written if one and one.strip()]


def _pairs(value: Any) -> list[tuple[str, str]] | None:
    if isinstance(value, str):
        value = _json_or(value, "{") or ({"details": value} if value.strip() else {})
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list) or any(not isinstance(one, list | tuple) or len(one) != 2 for one in pairs):
        raise RowError(f"expected names and values, found {shown(value)}")
    if len(pairs) > MAX_LIST_ITEMS:
        raise RowError(f"{len(pairs)} attributes; the limit is {MAX_LIST_ITEMS}")
    written = {text(name): _flat(inner) for name, inner in pairs}
    return [(name, inner) for name, inner in written.items() if name and inner]


def _flat(value: Any) -> str | None:
    if isinstance(value, Mapping):
        try:
            return text(json.dumps(value, ensure_ascii=False, default=text))
        except TypeError:   # a key that is no text
            raise RowError(f"expected text, found {shown(value)}") from None
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, (_flat(one) for one in value))) or None
    return text(value)


def _json_or(value: str, opening: str) -> Any:
    if not value.lstrip().startswith(opening):
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def shown(value: Any, limit: int = 60) -> str:
    """A value for an error message: its start, printable, with its type unless it is text."""
    excerpt = ascii(value[:limit] if isinstance(value, str | bytes | list) else value)[: limit + 2]
    return excerpt if isinstance(value, str) else f"{type(value).__name__} {excerpt}"
