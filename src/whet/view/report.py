"""Reports as one self-contained HTML page with text, tables, plots and samples, in the given order.

The page loads nothing, and its Content-Security-Policy forbids it. All text is escaped, and control characters are shown as
escapes, since models wrote much of it.
"""

import base64
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.view.plots import Plot, legend, svg, text_of

LONGEST_TEXT = 1600
"""Largest number of characters of an answer that are shown."""
LONGEST_CELL = 300
"""The same for a cell of a table."""
GENERATOR = b'<meta name="generator" content="whet report">'
"""What each page contains, by which an earlier report is recognized."""


@dataclass(frozen=True)
class Prose:
    """A paragraph. `kind` is "" or "caution"."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table: column headings, and rows whose first cell is the name of the row. With `text`, all cells are text."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: bool = False


@dataclass(frozen=True)
class Figures:
    """Plots side by side."""

    plots: Sequence[Plot]


@dataclass(frozen=True)
class Answer:
    """An answer with a heading (a model, a step) and a note (its score)."""

    head: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class Talk:
    """Answers side by side, to one prompt; without a prompt, each answer has its own in `prompts`."""

    answers: Sequence[Answer]
    prompt: str | None = None
    prompts: Sequence[str] = ()


@dataclass(frozen=True)
class Source:
    """A text as it is, such as a recipe."""

    text: str


@dataclass(frozen=True)
class Folded:
    """Blocks that are shown on a click."""

    title: str
    blocks: Sequence["Block"]


Block = Prose | Table | Figures | Talk | Source | Folded


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: Sequence[Block]


def cut(text: object, most: int = LONGEST_TEXT) -> str:
    """Return a text of at most `most` characters, with a note if it was longer.

    >>> cut("a" * 12, 10), cut("abc", 10)
    ('aaaaaaaaaa [cut: 2 of 12 characters are not shown]', 'abc')
    """
    text = str(text)
    if len(text) <= most:
        return text
    return f"{text[:most]} [cut: {len(text) - most:,} of {len(text):,} characters are not shown]"


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Return the whole page as HTML. All text is escaped, and the page loads no other files."""
    from markupsafe import Markup

    style, script = (_part(name) for name in ("report.css", "report.js"))
    return _template().render(
        title=title, lead=lead, sections=sections, style=Markup(style), script=Markup(script), style_hash=_hash(style),
        script_hash=_hash(script),
    )  # fmt: skip


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else text_of(str(value)),
    )  # fmt: skip
    environment.filters |= {"svg": _both, "legend": legend, "cut": cut}
    environment.tests["kind"] = lambda block, name: type(block).__name__ == name
    environment.globals["cell"] = LONGEST_CELL
    return environment.get_template("report.html")


def _both(plot: Plot) -> Any:
    """Return the plot; one that is as wide as the page also in a narrow form, of which the style sheet shows one."""
    from markupsafe import Markup

    if not plot.wide:
        return svg(plot)
    wide, narrow = svg(plot, 780, 400), svg(plot, 340, 300)
    return Markup('<div class="if-wide">{}</div><div class="if-narrow">{}</div>').format(wide, narrow)


@functools.cache
def _part(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the source of the Content-Security-Policy that allows exactly this text between its tags."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
