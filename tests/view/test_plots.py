"""Plots are SVG that any reader can parse: round ticks, kept extremes, words for screen readers, and no number breaks them."""

import itertools
import math
import re
import xml.etree.ElementTree as xml

import pytest

from tests.view.helpers import HOSTILE
from whet.view.plots import Line, Mark, Plot, legend, log_ticks, smoothed, svg, thinned, thinned_path, ticks

SVG = "{http://www.w3.org/2000/svg}"


def parsed(plot: Plot) -> xml.Element:
    text = str(svg(plot)).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return xml.fromstring(text)


def of(*lines: Line, **fields: object) -> Plot:
    return Plot("title", lines, "step", "score", **fields)  # type: ignore[arg-type]


def rising(name: str = "score", color: int = 0, count: int = 5, factor: float = 1.0) -> Line:
    return Line(name, [(float(i), factor * i) for i in range(count)], color)


def points(element: xml.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, one.split(","))) for one in element.attrib["points"].split()]  # type: ignore[misc]


def test_a_thinned_line_keeps_its_ends_and_its_extremes() -> None:
    values = [(float(i), math.sin(i / 9)) for i in range(5000)]
    values[1234], values[4321] = (1234.0, 50.0), (4321.0, -50.0)
    few = thinned(values)
    assert len(few) <= 242
    assert few == sorted(few)
    assert {values[0], values[-1], (1234.0, 50.0), (4321.0, -50.0)} <= set(few)
    assert set(few) <= set(values)


def test_a_thinned_way_keeps_its_order_and_its_extremes() -> None:
    way = [(math.cos(i / 100) * i, math.sin(i / 100) * i) for i in range(3000)]
    few = thinned_path(way)
    assert len(few) <= 244
    assert [way.index(one) for one in few] == sorted(way.index(one) for one in few)
    for axis in (0, 1):
        assert max(one[axis] for one in few) == max(one[axis] for one in way)
        assert min(one[axis] for one in few) == min(one[axis] for one in way)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-3.2, 17.9), (1e-9, 3e-9), (-1e12, 5e12), (0.999, 1.001), (-7.0, -6.5)]
)
def test_ticks_are_round_inside_and_few(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-9 * abs(low) <= one <= high + 1e-9 * abs(high) for one in found)
    steps = {f"{b - a:.6g}" for a, b in itertools.pairwise(found)}
    assert len(steps) == 1
    assert re.fullmatch(r"(1|2|2\.5|5)(e[-+]\d+|0*)|0\.0*(1|2|25|5)|250*", steps.pop())


@pytest.mark.parametrize(("low", "high"), [(1e-3, 10.0), (0.4, 90.0), (1e-30, 1e30)])
def test_ticks_of_a_logarithmic_axis_are_inside_and_few(low: float, high: float) -> None:
    found = log_ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low <= one <= high for one in found)
    assert found == sorted(found)


def test_the_points_of_a_line_are_where_the_axes_say() -> None:
    plot = parsed(of(rising(count=3)))
    (line,) = plot.iter(f"{SVG}polyline")
    offset, factor, log = map(float, plot.attrib["data-y"].split())
    assert not log
    assert [offset + factor * y for _, y in points(line)] == pytest.approx([0.0, 1.0, 2.0], abs=0.01)
    offset, factor, _ = map(float, plot.attrib["data-x"].split())
    assert [offset + factor * x for x, _ in points(line)] == pytest.approx([0.0, 1.0, 2.0], abs=0.01)


def test_an_axis_is_logarithmic_only_for_positive_values_that_differ_much() -> None:
    decades = Line("loss", [(0.0, 100.0), (1.0, 1.0), (2.0, 0.01)])
    assert parsed(of(decades, log=True)).attrib["data-y"].endswith(" 1")
    assert parsed(of(decades)).attrib["data-y"].endswith(" 0")
    assert parsed(of(rising(), log=True)).attrib["data-y"].endswith(" 0")
    plot = parsed(of(decades, log=True))
    ys = [y for _, y in points(next(plot.iter(f"{SVG}polyline")))]
    assert ys[1] == pytest.approx((ys[0] + ys[2]) / 2, abs=0.2)  # equal factors are equal distances


@pytest.mark.parametrize(
    "values",
    [
        [math.nan, 1.0, 2.0], [math.inf, 1.0, -math.inf], [1e300, 1.0], [5.0], [0.0, 0.0], [1e-300, 2e-300], [-4.0, -4.0],
        [math.nan], [],
    ],
)  # fmt: skip
def test_no_value_breaks_a_plot(values: list[float]) -> None:
    plot = of(
        Line("a", [(float(i), value) for i, value in enumerate(values)]), log=True, marks=[Mark(0.0, math.nan, "start")]
    )
    text = svg(plot)
    assert "nan" not in text
    assert "inf" not in text.replace("infinite", "")
    if any(math.isfinite(value) and abs(value) < 1e100 for value in values):
        parsed(plot)
    else:
        assert "no finite values" in text


def test_a_plot_says_in_words_what_it_shows() -> None:
    plot = parsed(of(Line("kl", [(1.0, 0.5), (2.0, 9.0), (3.0, 2.0)])))
    assert plot.attrib["role"] == "img"
    title, words = plot.find(f"{SVG}title"), plot.find(f"{SVG}desc")
    assert title is not None
    assert title.text == "title"
    assert words is not None
    assert words.text == "score over step. kl: from 0.5 to 2, lowest 0.5, highest 9"


def test_names_stand_at_the_ends_of_a_few_lines_and_do_not_cover_each_other() -> None:
    lines = [Line(f"line {i}", [(0.0, 0.0), (1.0, 1.0 + i / 1000)], i) for i in range(5)]
    plot = parsed(of(*lines))
    names = [one for one in plot.iter(f"{SVG}text") if " n " in f" {one.attrib['class']} "]
    assert {one.text for one in names} == {line.name for line in lines}
    heights = sorted(float(one.attrib["y"]) for one in names)
    assert all(b - a >= 12 for a, b in itertools.pairwise(heights))
    assert not legend(of(*lines))


def test_many_or_long_names_are_in_a_legend() -> None:
    many = [rising(f"line {i}", i, factor=i) for i in range(9)]
    assert [name for _, name in legend(of(*many))] == [line.name for line in many]
    assert len({kind for kind, _ in legend(of(*many))}) == 9  # the ninth has the first color and another dash
    long = [rising("a" * 40), rising("b", 1)]
    assert len(legend(of(*long))) == 2
    assert not legend(of(rising()))


def test_a_way_has_arrows_in_its_direction() -> None:
    plot = parsed(of(Line("gold", [(0.0, 0.0), (1.0, 0.0)], path=True)))
    heads = [one for one in plot.iter(f"{SVG}path") if "head" in one.attrib["class"]]
    assert heads
    assert all(one.attrib["transform"].endswith("rotate(0)") for one in heads)
    back = parsed(of(Line("gold", [(1.0, 0.0), (0.0, 0.0)], path=True)))
    turns = [one.attrib["transform"] for one in back.iter(f"{SVG}path") if "head" in one.attrib["class"]]
    assert all(one.endswith(("rotate(180)", "rotate(-180)")) for one in turns)


def test_marks_do_not_cover_each_other() -> None:
    marks = [Mark(1.0, 1.0 + i / 1000, f"best {i}") for i in range(3)]
    plot = parsed(of(rising(), marks=marks))
    texts = [one for one in plot.iter(f"{SVG}text") if " k" in one.attrib["class"]]
    places = {(one.attrib["x"], one.attrib["y"]) for one in texts}
    assert len(texts) == len(places) == 3


def test_hostile_names_are_text() -> None:
    plot = parsed(of(Line(HOSTILE, [(0.0, 1.0), (1.0, 2.0)]), Line("b", [(0.0, 1.0)], 1)))
    assert {one.tag.removeprefix(SVG) for one in plot.iter()} <= {
        "svg",
        "title",
        "desc",
        "path",
        "text",
        "polyline",
        "circle",
        "line",
    }
    words = plot.find(f"{SVG}desc")
    assert words is not None
    assert "<script>alert(1)</script>" in (words.text or "")


def test_smoothing_is_a_trailing_mean() -> None:
    assert smoothed([2.0, 4.0, 6.0, 8.0], 2) == [2.0, 3.0, 5.0, 7.0]
    assert smoothed([2.0, 4.0], 1) == [2.0, 4.0]
