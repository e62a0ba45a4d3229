"""The fields of a data row: read one as text, messages, an answer or numbers, or refuse it with file, line and field."""

from contextlib import suppress
from typing import Any

from whet.data.forms import prompted, split_pair
from whet.data.values import Located
from whet.errors import DataError

LARGEST = (2 - 2**-23) * 2.0**127
"""Largest number of a field: losses are computed in float32."""


def text_of(located: Located, name: str) -> str:
    """Return the field as text. Raises DataError for anything else, and for an empty text."""
    value = field_of(located, name)
    if not isinstance(value, str):
        raise DataError(f"{located.where}: field {name!r} must be a string, got {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{located.where}: field {name!r} is empty")
    return value


def field_of(located: Located, name: str) -> Any:
    """Return the value of the field. Raises DataError if the row does not have it."""
    if located.row.get(name) is None:
        have = ", ".join(sorted(key for key, value in located.row.items() if value is not None)) or "nothing"
        raise DataError(f"{located.where}: field {name!r} is missing (the row has {have})")
    return located.row[name]


def number_of(located: Located, name: str, value: Any) -> float:
    """Return a value of the field as a finite number; a text that is a number is read. Raises DataError for anything else."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:  # also NaN
        large = f"; the largest is {LARGEST:.2g}" if isinstance(value, (int, float)) else ""
        raise DataError(f"{located.where}: field {name!r} must be a finite number, got {value!r:.40}{large}")
    return float(value)


def numbers(located: Located, name: str, count: int) -> list[float]:
    """Return the field as a list of `count` finite numbers, one per answer. Raises DataError for anything else."""
    values = field_of(located, name)
    if not isinstance(values, list) or len(values) != count:
        got = len(values) if isinstance(values, list) else repr(values)
        raise DataError(f"{located.where}: field {name!r} must have one number per answer: {count} answers, got {got}")
    return [number_of(located, name, value) for value in values]


def messages_of(located: Located, name: str) -> list[dict[str, Any]]:
    """Return the field as a list of messages; a string is one user message.

    Content parts of type text are joined. A message with tool calls may have no content, and an answer or the result of a
    tool may be empty.
    """
    value = field_of(located, name)
    if isinstance(value, str):
        return [{"role": "user", "content": text_of(located, name)}]
    if not isinstance(value, list) or not value:
        raise DataError(f"{located.where}: field {name!r} must be a string or a list of messages, got {value!r:.80}")
    return [_message(located, name, number, message) for number, message in enumerate(value)]


def with_messages(located: Located) -> Located:
    """Return the row with its lists of several messages in `chosen` and `rejected` checked and in one form."""
    row = dict(located.row)
    for name in ("chosen", "rejected"):
        if isinstance(row.get(name), list) and len(row[name]) > 1:
            row[name] = messages_of(located, name)
    return Located(row, located.where)


def _message(located: Located, name: str, number: int, message: Any) -> dict[str, Any]:
    where = f"{located.where}: field {name!r}, message {number}"
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        for part in content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise DataError(f"{where}: a content part must be of type text, got {part!r:.80}")
        content = "".join(part["text"] for part in content)
    calls = (
        isinstance(message, dict) and content is None and (message.get("tool_calls") or message.get("function_call"))
    )
    if calls and "role" in message:
        return {**message, "content": None}  # templates tell a message with a call alone by it
    if not isinstance(message, dict) or not isinstance(content, str) or "role" not in message:
        raise DataError(f'{where}: expected {{"role": ..., "content": "..."}}, got {message!r:.80}')
    if message["role"] not in ("system", "developer", "user", "assistant", "tool"):
        raise DataError(f"{where}: role {message['role']!r} is none of system, developer, user, assistant, tool")
    if not content.strip() and message["role"] not in ("assistant", "tool"):
        raise DataError(f"{where}: the content is empty")
    return {**message, "content": content}


def finish_of(located: Located, count: int) -> list[bool]:
    """Return which answers are complete: the field `finish` is "length" for an answer that was cut off at its limit. It has
    one entry per answer, or is a string if there is only one answer."""
    finish = located.row.get("finish")
    if finish is None:
        return [True] * count
    finish = [finish] if count == 1 and isinstance(finish, str) else finish
    if not isinstance(finish, list) or len(finish) != count or not set(finish) <= {"stop", "length"}:
        raise DataError(
            f'{located.where}: field \'finish\' must have "stop" or "length" for each answer ({count}), got {finish!r:.80}'
        )
    return [one != "length" for one in finish]


def answer_of(located: Located, name: str) -> dict[str, Any]:
    """Return the field as one answer: a string (it may be empty), or a list with one assistant message."""
    value = field_of(located, name)
    if isinstance(value, str):
        return {"role": "assistant", "content": value}
    if not isinstance(value, list):
        raise DataError(f"{located.where}: field {name!r} must be a string, got {type(value).__name__}")
    messages = messages_of(located, name)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise DataError(f"{located.where}: field {name!r} must be one assistant message, got {len(messages)} messages")
    return messages[0]


def table_of(located: Located, name: str, count: int) -> list[list[float]] | None:
    """Return the field of a `responses` row as a K x K table of numbers, or None if the row does not have it."""
    value = located.row.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != count or any(not isinstance(one, list) for one in value):
        raise DataError(
            f"{located.where}: field {name!r} must be a table of {count} x {count} numbers, one row per answer, got {value!r:.80}"
        )
    return [numbers(Located({name: one}, located.where), name, count) for one in value]


def one_form(located: Located, name: str, other: str) -> None:
    """Raise DataError for a row with answers in two forms."""
    if located.row.get(other) is not None and located.row.get(name) is not None:
        raise DataError(f"{located.where}: the row has {name!r} and {other!r}; leave one of them out")


def check_fields(reading: str, located: Located) -> None:
    """Raise DataError if a row lacks a field that a method of `whet.data.Reader` reads, or has one of a wrong type. The reader
    itself raises the same errors, and those that need a tokenizer."""
    row = located.row
    if reading == "texts":
        text_of(located, "text")
    elif reading == "prompts":
        messages_of(prompted(with_messages(located)), "prompt")
    elif reading == "demonstrations" and row.get("messages") is not None:
        messages_of(located, "messages")
    elif reading == "demonstrations" and "text" in row and "prompt" not in row:
        text_of(located, "text")
    elif reading in ("demonstrations", "labeled"):
        if reading == "labeled":
            number_of(located, "score", field_of(located, "score"))
        messages_of(located, "prompt")
        answer_of(located, "completion")
    elif reading == "steps":
        for name in ("completions", "labels"):
            field_of(located, name)
        messages_of(located, "prompt")
    elif "chosen" in row and "responses" not in row:
        located = split_pair(with_messages(located))
        messages_of(located, "prompt")
        answer_of(located, "chosen")
        answer_of(located, "rejected")
    elif reading in ("pairs", "rankings") and ("responses" in row or reading == "rankings"):
        messages_of(located, "prompt")
        field_of(located, "responses")
    elif reading == "unpaired":
        field_of(located, "label")
    else:
        messages_of(located, "prompt")
        field_of(located, "chosen")
