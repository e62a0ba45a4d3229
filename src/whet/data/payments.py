"""What the work of a chat template costs: units of steps and characters, paid from the budget of a rendering."""

import re
import threading
from collections.abc import Mapping
from typing import Any

import jinja2.utils

BUDGET = 1 << 27
"""Units of work of one rendering: about a million turns of a loop, or 32 million characters of output; a few seconds."""
FOR_INPUT = 100
"""Further units for each character of the conversation."""
LARGEST_WIDTH = 9999
"""Largest width of a text format, and largest number of the filters and methods of `SIZED`."""
LONGEST_NAME = 1000
"""Largest number of characters of an attribute that a filter reads, and of the separators of `tojson`."""
TURN, CALL, ITEM, BUILT, WRITTEN = 100, 500, 16, 4, 4
"""Units of one turn of a loop, one call, one entry of a container, and one character that is built or written."""
READ = 0.125
"""Units of a character that is only read."""
SIZED = (
    "batch", "center", "expandtabs", "indent", "ljust", "rjust", "round", "slice", "tojson", "truncate", "wordwrap", "zfill",
)  # fmt: skip
"""Methods and filters with a number that can make their result long."""
READING = (
    "attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list", "map", "max",
    "min", "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "sum", "unique",
)  # fmt: skip
"""Filters that make no text of their values."""
LAZY = ("map", "reject", "rejectattr", "select", "selectattr")
"""Filters that call another filter or a test for each entry."""


class TemplateLimit(Exception):
    """A chat template does more work than `BUDGET`, or writes more text than that."""


class _Meter(threading.local):
    """The units that are left to the rendering of this thread."""

    left = BUDGET

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise TemplateLimit("it loops without end, or repeats text without bound")


METER = _Meter()


def size(value: Any) -> int:
    """Return the units for a copy of a value without what its entries contain."""
    if isinstance(value, str):
        return BUILT * len(value)
    if isinstance(value, int):
        return value.bit_length()
    return ITEM * len(value) if hasattr(value, "__len__") else 1


def whole(value: Any, per: float = READ) -> int:
    """Return the units of everything that a value contains, with `per` units for a character. What stands in it several times
    counts several times. Raises TemplateLimit beyond what is left of the budget."""
    units, stack = 0.0, [value]
    while stack:
        one = stack.pop()
        units += ITEM
        if isinstance(one, str):
            units += per * len(one)
        elif one is None or isinstance(one, (int, float)):
            continue
        elif isinstance(one, (list, tuple, set, frozenset)):
            stack += one
        elif isinstance(one, (range, bytes)):
            units += ITEM * len(one)
        elif isinstance(one, jinja2.utils.Namespace):
            units += CALL
            stack.append(object.__getattribute__(one, "_Namespace__attrs"))
        elif isinstance(one, (dict, Mapping)):
            stack += one.values()
            stack += one
        if units > METER.left:
            METER.spend(int(units))
    return int(units)


def pay_joined(between: str, parts: Any) -> list[Any]:
    """Pay for the text of these parts with `between` between them, and return the parts as a list."""
    parts = list(parts)
    METER.spend((ITEM + BUILT * len(between)) * len(parts))
    for one in parts:
        METER.spend(whole(one, BUILT))
    return parts


def pay_format(text: str, mark: str, given: Any) -> None:
    """Pay for `text % given` or `text.format(*given)`. Raises TemplateLimit for a width beyond `LARGEST_WIDTH`, or one that is
    not written in the text."""
    if any(len(one) > len(str(LARGEST_WIDTH)) for one in re.findall(r"\d+", text)):
        raise TemplateLimit(f"it formats a text with a width beyond {LARGEST_WIDTH}")
    if re.search(r"%[^a-zA-Z%]*\*" if mark == "%" else r"\{[^{}]*:[^{}]*\{", text):
        raise TemplateLimit("it formats a text with a width that is computed")
    longest = LARGEST_WIDTH if re.search(r"\d{3}", text) else 100
    METER.spend(size(text) + text.count(mark) * (BUILT * longest + whole(given, BUILT)))


def pay_for(name: str, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Pay for a filter or a method of a text, before it is called."""
    first, *rest = given
    more = (*rest, *named.values())
    METER.spend(CALL + whole(more) + whole(first, READ if name in READING else WRITTEN))
    if name in SIZED:
        wide = max((abs(one) for one in more if isinstance(one, int)), default=0)
        if wide > LARGEST_WIDTH:
            raise TemplateLimit(f"{name} has the number {wide}, and at most {LARGEST_WIDTH} is allowed")
        _pay_sized(name, first, more, wide)
    elif name in READING:
        longest = max((len(one) for one in more if isinstance(one, str)), default=0)
        if longest > LONGEST_NAME and name not in ("d", "default"):
            raise TemplateLimit(
                f"{name} has an argument of {longest} characters, and at most {LONGEST_NAME} are allowed"
            )
        if name in LAZY and hasattr(first, "__len__"):
            METER.spend((TURN + CALL) * len(first))
    elif name == "replace":
        text, old, new = str(first), str(named.get("old", "")), str(named.get("new", ""))
        old, new = str(rest[0]) if rest else old, str(rest[1]) if len(rest) > 1 else new
        METER.spend(BUILT * len(text) + BUILT * len(new) * text.count(old))
    elif name == "translate":
        tables = [one for one in rest if isinstance(one, Mapping)]
        longest = max((len(one) for table in tables for one in table.values() if isinstance(one, str)), default=1)
        METER.spend(BUILT * len(first) * longest)
    elif name == "format":
        pay_format(str(first), "%", more)


def _pay_sized(name: str, first: Any, more: tuple[Any, ...], wide: int) -> None:
    """Pay for a filter or a method of `SIZED` whose largest number is `wide`."""
    if name in ("indent", "expandtabs", "wordwrap"):
        text, added = str(first), max([wide, 8, *(len(one) for one in more if isinstance(one, str))])
        METER.spend(BUILT * (len(text) + added * (1 + len(re.findall(r"\s", text)))))
    elif name == "tojson":
        added = max([wide, *(len(str(one)) for one in more)])
        if added > LONGEST_NAME:
            raise TemplateLimit(
                f"tojson has an indent or a separator of {added} characters, and at most {LONGEST_NAME} are allowed"
            )
        METER.spend((1 + added) * whole(first))
    else:
        METER.spend(BUILT * wide)
