"""Reports as one self-contained HTML page with text, tables, plots and samples, in the given order."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from whet.view.plots import Plot, svg


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table: column headings, and rows whose first cell is the name of the row."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figures:
    """Plots side by side."""

    plots: Sequence[Plot]


@dataclass(frozen=True)
class Talk:
    """A prompt with the answers of several models, each as (model, answer, note)."""

    prompt: str
    answers: Sequence[tuple[str, str, str]]


Block = Prose | Table | Figures | Talk


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: Sequence[Block]


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Return the whole page as HTML. All text is escaped, and the page loads no other files."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters["svg"] = lambda plot: Markup(svg(plot))
    environment.tests["kind"] = lambda block, name: type(block).__name__ == name
    return environment.get_template("report.html").render(title=title, lead=lead, sections=sections)
