"""The values of a data row as JSON holds them: check each one, and convert dates, decimals and nulls of conversations."""

import datetime
import decimal
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whet.errors import DataError

MAX = sys.float_info.max
"""Largest number, 1.8e308."""
DEEPEST = 100
"""Largest number of lists and objects inside each other."""
CONVERSATIONS = (
    "messages", "prompt", "chosen", "rejected", "completion", "tools", "documents", "chat_template_kwargs", "conversations",
    "history",
)  # fmt: skip
"""The fields in which a null is as if it were absent."""
OWN_NULLS = ("arguments", "parameters")
"""Keys of a tool call and of a tool. In JSON a null below them is a value of the caller's own, and is kept."""


@dataclass(frozen=True)
class Located:
    """A data row and its location, such as "my.jsonl:12" (lines and rows count from 1)."""

    row: Mapping[str, Any]
    where: str


def plain_row(row: Mapping[Any, Any], where: str, *, filled: bool = False) -> dict[str, Any]:
    """Return the row with the values of JSON alone: text, finite numbers, true, false, null, lists and objects.

    Dates and times become text in ISO 8601, decimals and UUIDs become text with all their digits, and tuples become lists.
    Nulls inside conversations are left out. `filled` says that the source fills every key of an object with null, as
    Parquet and `datasets` do; otherwise nulls in the arguments of tool calls are kept.

    `where` is the location of the row. Raises DataError with the field, the value and a fix for anything else: bytes, NaN,
    infinities, numbers above 1.8e308, text that is not valid Unicode, field names that are empty or no text, and lists and
    objects that are nested deeper than `DEEPEST`.

    >>> plain_row({"day": datetime.date(2026, 11, 2), "prompt": [{"role": "user", "content": "a", "name": None}]}, "a.csv:2")
    {'day': '2026-11-02', 'prompt': [{'role': 'user', 'content': 'a'}]}
    """
    out = {}
    for name, value in row.items():
        if isinstance(name, str) and not name.strip():
            raise DataError(f"{where}: a field has an empty name ({name!r}); name it, or leave it out")
        plain = _plain(value, f"{where}: field {_key(name, where)!r}", ())
        out[name] = without_nulls(plain, filled=filled) if name in CONVERSATIONS else plain
    return out


def without_nulls(value: Any, *, filled: bool) -> Any:
    """Return the value without the keys of objects that have no value, at any depth (see `plain_row`)."""
    if isinstance(value, list):
        return [without_nulls(one, filled=filled) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        name: one if name in OWN_NULLS and not filled else without_nulls(one, filled=filled)
        for name, one in value.items()
        if one is not None
    }


def valid_text(text: str) -> str:
    """Return the text with U+FFFD in place of what is not valid Unicode, so that it can be tokenized and written.

    >>> valid_text("a" + chr(0xD800)) == "a" + chr(0xFFFD)
    True
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _plain(value: Any, field: str, path: tuple[str, ...]) -> Any:
    """Convert one value. `field` is its row and field in words; `path` has the keys and positions that lead to it."""
    where = f"{field} (at {'.'.join(path)})" if path else field
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, (int, float)):
        return _number(value, where)
    if isinstance(value, (Mapping, list, tuple)):
        if len(path) == DEEPEST:
            raise DataError(f"{field} has more than {DEEPEST} lists and objects inside each other; write it as text")
        if isinstance(value, Mapping):
            return {_key(name, where): _plain(one, field, (*path, name)) for name, one in value.items()}
        if _are_numbers(value):
            return list(value)
        return [_plain(one, field, (*path, str(place))) for place, one in enumerate(value)]
    if (
        isinstance(value, (datetime.date, datetime.time)) and value == value
    ):  # the missing time of pandas is not equal to itself
        return value.isoformat()
    if isinstance(value, (decimal.Decimal, uuid.UUID)):
        return str(value)
    advice = "store text instead" if isinstance(value, bytes) else "convert it"
    raise DataError(
        f"{where} is a {type(value).__name__}, {value!r:.40}, which JSON cannot hold; leave it out, or {advice}"
    )


def _number(value: float, where: str) -> float:
    if value != value:
        raise DataError(f"{where} is nan; write a finite number, or null where there is none")
    if abs(value) > MAX:
        shown = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else repr(value)
        raise DataError(f"{where} is {shown}; a number must be finite and at most 1.8e308, write others as text")
    return value


def _are_numbers(values: Sequence[Any]) -> bool:
    """Return whether all values are numbers that need no message, without a call for each: lists of token ids are long."""
    return set(map(type, values)) <= {int, float} and all(-MAX <= value <= MAX for value in values)


def _text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} is not valid Unicode: half of a surrogate pair, {value[error.start]!a}, at character {error.start}; "
            "replace it, or remove it"
        ) from error
    return value


def _key(name: Any, where: str) -> str:
    if not isinstance(name, str):
        raise DataError(f"{where}: the name {name!r:.40} is a {type(name).__name__}; names must be text")
    return _text(name, f"{where}: the name {name!a:.40}")
