"""Line plots as inline SVG: colors by CSS classes, a title and a description for screen readers, no script needed."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

from whet.terminal import visible

Points = Sequence[tuple[float, float]]

MOST_POINTS = 240
"""Largest number of points of a line that are drawn. Of more, the lowest and the highest of each interval are kept."""
COLORS = 8
"""Number of colors of the style sheet (classes `c0` to `c7`); further lines take them again with another dash."""
DECADES = 50.0
"""Ratio of the largest to the smallest of positive values from which an axis is logarithmic, if the plot allows it."""
LONGEST_LABEL = 18
"""Largest number of characters of a name that stands at the end of its line; longer ones are in a legend."""
DIRECT = 5
"""Largest number of lines with a name at their end."""
GLYPH = 6.1
"""Width of a character in pixels, at the font size of the style sheet (11 px)."""


@dataclass(frozen=True)
class Line:
    """A named line of (x, y) points.

    `band` has (x, low, high) around it. `faint` lines have no name in the plot: single values behind a mean. `marked` shows the
    points. With `path` the points are a way in the plane, in their order, with arrows along it; without it x only grows.
    """

    name: str
    points: Points
    color: int = 0
    band: Sequence[tuple[float, float, float]] = ()
    faint: bool = False
    marked: bool = False
    path: bool = False


@dataclass(frozen=True)
class Mark:
    """A labeled point."""

    x: float
    y: float
    text: str
    color: int = 0


@dataclass(frozen=True)
class Plot:
    """A figure with a title: lines, marked points, and the labels of its axes (quantity and unit).

    With `log`, the y axis is logarithmic if all values are positive and differ much. `note` is shown below the plot.
    """

    title: str
    lines: Sequence[Line]
    x: str
    y: str
    marks: Sequence[Mark] = ()
    log: bool = False
    note: str = ""
    wide: bool = False


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return the trailing mean over at most `window` values.

    >>> smoothed([1.0, 3.0, 5.0], 2)
    [1.0, 2.0, 4.0]
    """
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def thinned(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Return at most about `most` of the points: the first, the last, and the lowest and the highest of equal intervals between.

    >>> thinned([(0, 0), (1, 5), (2, 1), (3, -9), (4, 2), (5, 0)], 4)
    [(0, 0), (1, 5), (3, -9), (5, 0)]
    """
    if len(points) <= most:
        return list(points)
    inner, parts = points[1:-1], max(1, (most - 2) // 2)
    out = [points[0]]
    for part in range(parts):
        own = range(part * len(inner) // parts, (part + 1) * len(inner) // parts)
        if own:
            ends = {min(own, key=lambda i: inner[i][1]), max(own, key=lambda i: inner[i][1])}
            out += [inner[i] for i in sorted(ends)]
    return [*out, points[-1]]


def thinned_path(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Return at most about `most` points of a way in the plane: evenly spaced ones, and those with the extreme x and y."""
    if len(points) <= most:
        return list(points)
    kept = {round(i * (len(points) - 1) / (most - 1)) for i in range(most)}
    for axis in (0, 1):
        kept |= {pick(range(len(points)), key=lambda i: points[i][axis]) for pick in (min, max)}
    return [points[i] for i in sorted(kept)]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from `low` to `high`, at most about `most`.

    >>> ticks(0.0, 1.0), ticks(-3.0, 11.0, 4)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 5.0, 10.0])
    """
    rough = (high - low) / max(1, most)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(one * power for one in (1, 2, 2.5, 5, 10) if one * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return 1, 2 and 5 times powers of ten from `low` to `high`; only powers of ten if these are more than `most`."""
    for digits in ((1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [one * 10.0**power for power in powers for one in digits if low <= one * 10.0**power <= high]
        if len(found) <= most:
            break
    return found[:: -(-len(found) // most)] if len(found) > most else found


def number(value: float) -> str:
    """Return a number in at most five significant digits.

    >>> number(0.1 + 0.2), number(12345.0), number(2e-05)
    ('0.3', '12345', '2e-05')
    """
    text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:.5g}"
    return text.replace("-0", "0") if text == "-0" else text


def text_of(text: str) -> Markup:
    """Return a text for SVG or HTML: control characters as visible escapes, and markup escaped."""
    return escape(visible(text, layout=True))


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels: from `low` at `start` to `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._in(self.low), self._in(self.high)
        return self.start + (self._in(value) - low) / (high - low) * (self.end - self.start)

    def _in(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def slope(self) -> str:
        """Return what a script needs to turn pixels into values: offset and factor, and whether the result is a power of 10."""
        factor = (self._in(self.high) - self._in(self.low)) / (self.end - self.start)
        return f"{self._in(self.low) - factor * self.start:.9g} {factor:.9g} {int(self.log)}"


def finite(plot: Plot) -> Plot:
    """Return the plot without points that are not finite, or so large that no axis can show them, and without empty lines."""

    def good(*values: float) -> bool:
        return all(math.isfinite(one) and abs(one) < 1e100 for one in values)

    lines = [
        replace(
            line,
            points=[one for one in line.points if good(*one)],
            band=[one for one in line.band if good(*one)],
        )
        for line in plot.lines
    ]
    marks = [one for one in plot.marks if good(one.x, one.y)]
    return replace(plot, lines=[line for line in lines if line.points], marks=marks)


def described(plot: Plot) -> str:
    """Return the plot in words: start, end, lowest and highest value of each line."""
    told = []
    for line in plot.lines:
        if not line.faint:
            ys = [y for _, y in line.points]
            told.append(
                f"{line.name}: from {number(ys[0])} to {number(ys[-1])}, lowest {number(min(ys))}, highest {number(max(ys))}"
            )
    return f"{plot.y} over {plot.x}. " + "; ".join(told)


def svg(plot: Plot, width: int = 360, height: int = 230) -> Markup:
    """Return the plot as an SVG element of this size in pixels, or a paragraph if there is nothing to draw."""
    plot = finite(plot)
    if not plot.lines:
        return Markup('<p class="none">no finite values</p>')
    named = [line for line in plot.lines if not line.faint]
    direct = is_direct(plot)
    room = max(len(visible(line.name)) for line in named) * GLYPH + 10 if direct and named else 12
    x, y = _axes(plot, width, height, room)
    parts = [*_grid(plot, x, y, width, height)]
    for line in plot.lines:
        parts += _line(line, x, y)
    parts += _marks(plot, x, y)
    if direct:
        parts += _names(named, x, y)
    head = (
        f'<svg class="plot" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'data-x="{x.slope()}" data-y="{y.slope()}">'
        f"<title>{text_of(plot.title)}</title><desc>{text_of(described(plot))}</desc>"
    )
    return Markup(head + "".join(parts) + f'<line class="hair" y1="18" y2="{y.start:g}"/></svg>')


def is_direct(plot: Plot) -> bool:
    """Return whether the names of the lines stand at their ends. Otherwise, a plot of several lines needs a legend."""
    named = [line for line in plot.lines if not line.faint and line.points]
    short = all(len(visible(line.name)) <= LONGEST_LABEL for line in named)
    return 1 < len(named) <= DIRECT and short and not any(line.path for line in named)


def legend(plot: Plot) -> list[tuple[str, str]]:
    """Return (class, name) of each line that a legend names; [] if the plot needs none."""
    named = [line for line in finite(plot).lines if not line.faint]
    if is_direct(plot) or (len(named) < 2 and not any(line.path for line in named)):
        return []
    return [(_class(line.color), line.name) for line in named]


def _class(color: int) -> str:
    return f"c{color % COLORS}" + (f" d{color // COLORS % 3}" if color >= COLORS else "")


def _axes(plot: Plot, width: int, height: int, room: float) -> tuple[_Axis, _Axis]:
    """Return the axes of the plot area, with `room` pixels right of it."""
    xs = [x for line in plot.lines for x, _ in line.points] + [x for line in plot.lines for x, _, _ in line.band]
    ys = [y for line in plot.lines for _, y in line.points] + [
        y for line in plot.lines for b in line.band for y in b[1:]
    ]
    low, high = min(ys), max(ys)
    log = plot.log and low > 0 and high / low > DECADES
    if log:
        low, high = low / 1.15, high * 1.15
    elif high - low <= 1e-9 * max(abs(low), abs(high)) + 1e-300:
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (0.0, 1.0)
    else:
        pad = 0.06 * (high - low)
        low, high = (low if low == 0 else low - pad), high + pad
    left, right = min(xs), max(xs)
    if right - left <= 1e-9 * max(abs(left), abs(right)) + 1e-300:
        left, right = left - (abs(left) * 0.1 or 0.5), right + (abs(right) * 0.1 or 0.5)
    elif any(line.path for line in plot.lines):
        right += 0.05 * (right - left)
    names = [number(one) for one in _rows(_Axis(low, high, height - 36, 24, log))]
    edge = 12 + max((len(one) for one in names), default=1) * GLYPH
    return _Axis(left, right, edge, max(width - room, edge + 60)), _Axis(low, high, height - 36, 24, log)


def _rows(y: _Axis) -> list[float]:
    """Return the values of the y axis that are written beside it."""
    most = max(3, int((y.start - y.end) // 32))
    return log_ticks(y.low, y.high, most) if y.log else ticks(y.low, y.high, most)


def _grid(plot: Plot, x: _Axis, y: _Axis, width: int, height: int) -> list[str]:
    rows = _rows(y)
    columns = ticks(x.low, x.high, max(3, int((x.end - x.start) // 60)))
    if "step" in plot.x and all(one == int(one) for line in plot.lines for one, _ in line.points):
        columns = [one for one in columns if one == int(one)]
    lines = "".join(f"M{x.start:.1f} {y(one):.1f}H{x.end:.1f}" for one in rows)
    out = [f'<path class="grid" d="{lines}"/>']
    out += [f'<text class="t e" x="{x.start - 6:.1f}" y="{y(one) + 4:.1f}">{number(one)}</text>' for one in rows]
    out += [f'<text class="t m" x="{x(one):.1f}" y="{y.start + 15:.1f}">{number(one)}</text>' for one in columns]
    out.append(f'<text class="t l" x="2" y="12">{text_of(plot.y)}{" (log)" if y.log else ""}</text>')
    middle = (x.start + x.end) / 2
    return [*out, f'<text class="t l m" x="{middle:.1f}" y="{height - 5}">{text_of(plot.x)}</text>']


def _line(line: Line, x: _Axis, y: _Axis) -> list[str]:
    """Return the band, the line, its points and its arrows."""
    out, kind = [], _class(line.color)
    if line.band:
        lows, highs = (thinned([(b[0], b[side]) for b in line.band]) for side in (1, 2))
        edge = [*((x(a), y(b)) for a, b in highs), *((x(a), y(b)) for a, b in reversed(lows))]
        out.append(f'<polygon class="band {kind}" points="{_points(edge)}"/>')
    drawn = [(x(a), y(b)) for a, b in (thinned_path if line.path else thinned)(line.points)]
    name = "" if line.faint else f' data-name="{text_of(line.name)}"'
    shape = "faint" if line.faint else "line path" if line.path else "line"
    if len(drawn) > 1:
        out.append(f'<polyline class="{shape} {kind}"{name} points="{_points(drawn)}"/>')
    if (line.marked and len(drawn) <= 40) or (len(drawn) == 1 and not line.faint):
        alone = name if len(drawn) == 1 else ""
        out += [f'<circle class="dot {kind}"{alone} cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>' for a, b in drawn]
    if line.path:
        out += _arrows(drawn, kind)
    return out


def _points(points: Points) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)


def _arrows(points: Points, kind: str, every: float = 90.0) -> list[str]:
    """Return arrow heads along a way in pixels, one about every `every` pixels and at least one."""
    lengths = [math.dist(a, b) for a, b in itertools.pairwise(points)]
    total = sum(lengths)
    if total < 12:
        return []
    count = min(6, max(1, int(total // every)))
    out, wanted, gone = [], [total * (i + 0.6) / count for i in range(count)], 0.0
    for (a, b), long in zip(itertools.pairwise(points), lengths, strict=True):
        while wanted and long > 0 and gone + long >= wanted[0]:
            share = (wanted.pop(0) - gone) / long
            px, py = a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])
            turn = math.degrees(math.atan2(b[1] - a[1], b[0] - a[0]))
            out.append(
                f'<path class="head {kind}" d="M-5 -4L5 0L-5 4Z" transform="translate({px:.1f} {py:.1f}) rotate({turn:.0f})"/>'
            )
        gone += long
    return out


def _marks(plot: Plot, x: _Axis, y: _Axis) -> list[str]:
    """Return the marked points. Each text is where it covers no other text, or is left out of the plot's edge."""
    out: list[str] = []
    taken: list[tuple[float, float, float, float]] = []
    for mark in plot.marks:
        px, py, wide = x(mark.x), y(mark.y), len(mark.text) * GLYPH
        out.append(f'<circle class="mark {_class(mark.color)}" cx="{px:.1f}" cy="{py:.1f}" r="4.5"/>')
        places = [(px - wide / 2, py - 9), (px - wide / 2, py + 19), (px + 9, py + 4), (px - wide - 9, py + 4)]
        places += [
            (px - wide / 2, py - 22),
            (px - wide / 2, py + 32),
            (px - wide / 2, py - 35),
            (px - wide / 2, py + 45),
        ]
        for left, base in places:
            left = min(max(left, x.start + 1), x.end - wide)
            box = (left - 2, base - 11, left + wide + 2, base + 3)
            inside = box[1] > y.end - 10 and box[3] < y.start
            if inside and not any(_cover(box, other) for other in taken):
                break
        taken += [box, (px - 4, py - 4, px + 4, py + 4)]
        out.append(f'<text class="t k" x="{left:.1f}" y="{base:.1f}">{text_of(mark.text)}</text>')
    return out


def _cover(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _names(lines: Sequence[Line], x: _Axis, y: _Axis) -> list[str]:
    """Return the names at the ends of the lines, moved apart where they would cover each other."""
    ends = sorted(((y(line.points[-1][1]), line) for line in lines), key=lambda one: one[0])
    places: list[float] = []
    for at, _ in ends:
        places.append(max(at + 4, places[-1] + 13 if places else y.end + 4))
    excess = places[-1] - (y.start + 2)
    if excess > 0:  # push the lowest ones up again
        places[-1] -= excess
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - 13)
    return [
        f'<text class="t n {_class(line.color)}" x="{x.end + 6:.1f}" y="{at:.1f}">{text_of(line.name)}</text>'
        for at, (_, line) in zip(places, ends, strict=True)
    ]
