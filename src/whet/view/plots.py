"""Line plots as inline SVG."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whet.errors import UserError

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """A figure with a title: named lines of (x, y) points, and the labels of its axes. `marked` also shows the points."""

    title: str
    lines: Mapping[str, Points]
    x: str
    y: str
    marked: bool = False


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return the trailing mean over at most `window` values.

    >>> smoothed([1.0, 3.0, 5.0], 2)
    [1.0, 2.0, 4.0]
    """
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def svg(plot: Plot) -> str:
    """Return the plot as an SVG element. Raises UserError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib; install whet[demo]") from error
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, points in plot.lines.items():
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=name,
            marker="o" if plot.marked else None,
            markersize=3,
        )
    axes.set_title(plot.title, fontsize=10)
    axes.set_xlabel(plot.x, fontsize=9)
    axes.set_ylabel(plot.y, fontsize=9)
    axes.grid(alpha=0.3)
    if len(plot.lines) > 1:
        axes.legend(fontsize=8)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]
