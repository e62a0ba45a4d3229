"""A report as one self-contained HTML page: prose, tables, plots and samples, in the order they are given."""

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
    """A table: column heads, and rows whose first cell names them."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figures:
    """Plots side by side."""

    plots: Sequence[Plot]


@dataclass(frozen=True)
class Talk:
    """A prompt with the answers several models gave it: (model, answer, note)."""

    prompt: str
    answers: Sequence[tuple[str, str, str]]


Block = Prose | Table | Figures | Talk


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    title: str
    blocks: Sequence[Block]


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole page; every text is escaped, nothing is loaded from elsewhere."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters["svg"] = lambda plot: Markup(svg(plot))
    environment.tests["kind"] = lambda block, name: type(block).__name__ == name
    return environment.get_template("report.html").render(title=title, lead=lead, sections=sections)
