"""Texts that stand for the contents of messages, to see what a chat template does with them.

A template that only writes contents, and never reads them, gives the same text around them for all conversations of the same
roles. `data.templates` calls `looked_at` and `joined` wherever a template could read a value or put texts together.
"""

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FIRST, LAST = "\ue000", "\ue001"
"""Characters around the number of a mark. A template that has one of them is not looked at."""
FOUND = re.compile(f"{FIRST}(\\d+){LAST}")
LONGEST = 100_000
"""Largest number of characters of a content that is put in the place of a mark."""


class _Trace(threading.local):
    """What the template that is rendered in this thread has done with marks."""

    on = read = trimmed = False


TRACE = _Trace()


class Mark(str):
    """The mark of a content, or a text with marks."""

    __slots__ = ()

    def __iter__(self) -> Iterator[str]:
        TRACE.read = True
        return super().__iter__()

    def __hash__(self) -> int:
        TRACE.read = True
        return super().__hash__()


def looked_at(*values: Any) -> None:
    """Note that a template reads these values, if a mark is among them or in them."""
    if TRACE.on and any(map(_holds, values)):
        TRACE.read = True


def joined(text: Any, parts: Sequence[Any]) -> Any:
    """Return the text that was put together from these parts, as one with marks if they have any."""
    return Mark(text) if TRACE.on and any(isinstance(one, Mark) for one in parts) else text


def _holds(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds(one) for one in value.values())
    if isinstance(value, (list, tuple)):
        return any(map(_holds, value))
    return isinstance(value, Mark)


@dataclass(frozen=True)
class Skeleton:
    """The text of a template around the contents of messages: `pieces` are texts and numbers of messages in turn. `trimmed` says
    that white space at both ends of contents is removed."""

    pieces: tuple[str, ...]
    trimmed: bool

    def text(self, contents: Sequence[str]) -> str | None:
        """Return the text of a conversation with these contents, or None if the template could write them differently."""
        for one in contents:
            if not one or len(one) > LONGEST or (self.trimmed and one != one.strip()):
                return None
        return "".join([contents[int(one)] if at % 2 else one for at, one in enumerate(self.pieces)])


def marks(count: int) -> list[Mark]:
    """Return the marks of `count` messages."""
    return [Mark(f"{FIRST}{number}{LAST}") for number in range(count)]


def skeleton(render: Any) -> Skeleton | None:
    """Return what `render` writes around marks, or None if it reads one or fails."""
    TRACE.on, TRACE.read, TRACE.trimmed = True, False, False
    try:
        text = render()
    except Exception:  # it is told when the conversation itself is rendered
        return None
    finally:
        TRACE.on = False
    pieces = tuple(FOUND.split(str(text)))
    if TRACE.read or any(FIRST in one or LAST in one for one in pieces[::2]):
        return None
    return Skeleton(pieces, TRACE.trimmed)
