"""Tables as text, for the output of commands."""

import io
from collections.abc import Iterable, Sequence
from typing import Any

from whet.terminal import console, visible

WIDE = 100_000
"""Width of the text in characters: no line of a table is cut or wrapped."""


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as text, one line per row. Numbers are aligned right, None is an empty cell. Control characters and
    such that print nothing are escaped."""
    from rich.table import Table
    from rich.text import Text

    cells = list(rows)
    shown = Table(box=None, pad_edge=False, header_style="")
    for place, head in enumerate(header):
        numbers = all(isinstance(row[place], (int, float)) or row[place] is None for row in cells)
        shown.add_column(Text(visible(head)), justify="right" if numbers else "left", no_wrap=True)
    for row in cells:
        shown.add_row(*(Text(cell(value)) for value in row))
    out = io.StringIO()
    console(file=out, width=WIDE, color_system=None, force_terminal=False).print(shown)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def cell(value: Any) -> str:
    """Return a value as the text of a cell: six digits of a number, yes for True."""
    if value is None or value is False:
        return ""
    if value is True:
        return "yes"
    return f"{value:.6g}" if isinstance(value, float) else visible(str(value))
