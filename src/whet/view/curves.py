"""The curves of a report: the main picture, and the numbers of one run, of several seeds, or of several recipes side by side."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from whet.loops.metrics import EVALUATED
from whet.view.plots import Line, Mark, Plot, Points, number
from whet.view.record import Run

MOST_OTHERS = 60
"""Largest number of plots of numbers that have no place of their own."""
MOST_LINES = 8
"""Largest number of numbers in one plot."""
COMPARABLE = 4.0
"""Two scores share an axis if the range of both together is at most this multiple of the smaller one's range."""


@dataclass(frozen=True)
class Group:
    """Numbers that belong in one plot: those that a pattern matches. `y` is their unit."""

    title: str
    y: str
    pattern: str
    log: bool = False

    def names(self, known: Iterable[str]) -> list[str]:
        """Return the numbers that belong to the group, those of training first."""
        found = [name for name in known if re.fullmatch(self.pattern, name)]
        return sorted(found, key=lambda name: name.startswith(EVALUATED))

    def names_one(self, name: str) -> bool:
        """Return whether a number is one of several of its kind, such as the score of one judge."""
        return "/" in name.removeprefix(EVALUATED) and name != self.title


MAIN_OFFLINE = (
    Group("Loss", "loss", r"loss|eval/loss|eval/(policy|reward)/\w+/.+", log=True),
    Group("Accuracy", "share", r"(eval/|.*/)?accurac(y|ies)"),
    Group("Margin", "score", r"(eval/|.*/)?margins?"),
)
"""The main picture of an offline run."""
GROUPS = (
    Group("Score and rewards on training prompts", "score", r"score|reward/.+"),
    Group("Score and rewards on held-out prompts", "score", r"eval/(score|reward/.+)"),
    Group("Judges on held-out prompts", "score", r"eval/judge/.+"),
    Group("Win rate against the start", "share of prompts", r"eval/win_rate/.+"),
    Group("KL to the reference", "nats per answer", r"(eval/)?kl"),
    Group("Entropy", "nats per token", r"entropy"),
    Group("Length of the answers", "tokens", r"(eval/)?length"),
    Group("Answers cut off at the limit", "share", r"(eval/)?truncated"),
    Group("pass@k on held-out prompts", "share of prompts", r"eval/pass@.+"),
    *MAIN_OFFLINE[1:],
    Group("Rewards of chosen and rejected", "nats", r".*rewards?/(chosen|rejected)(_\w+)?"),
    Group("Log-probs of chosen and rejected", "nats", r".*logps?/(chosen|rejected)(_\w+)?"),
    Group("Calibration error", "share", r"eval/calibration_error"),
    Group("Clipped ratios", "share of tokens", r"clip_fraction"),
    Group("KL of the old to the new policy", "nats per token", r"kl_old"),
    Group("Explained variance of the critic", "share", r"explained_variance"),
    Group("Groups with equal scores", "share of groups", r"zero_spread"),
    Group("Standard deviation of the scores", "score", r"score_std"),
    Group("Gradient norm", "norm", r"grad_norm/.+", log=True),
    Group("Learning rate", "per update", r"lr/.+", log=True),
)
"""The plots of a report, in order. A number is in the first group that takes it."""
UNPLOTTED = r"eval/(best_step|stopped_early|win_rate_(low|high)/.+)|epoch"
"""Numbers without a plot of their own."""


def told(name: str) -> str:
    """Return the name of a number for a label.

    >>> told("eval/score"), told("kl")
    ('held-out score', 'kl')
    """
    return f"held-out {name.removeprefix(EVALUATED)}" if name.startswith(EVALUATED) else name


def curves(runs: Sequence[Run], labels: Sequence[str], *, seeds: bool) -> tuple[list[Plot], list[Plot]]:
    """Return the plots of the groups, and those of all other numbers. What the main picture shows over the steps is left out."""
    known = list(dict.fromkeys(name for run in runs for name in run.series))
    left = [name for name in known if not re.fullmatch(UNPLOTTED, name)]
    if not all(run.online for run in runs):
        main = [name for group in MAIN_OFFLINE for name in group.names(left)]
    else:
        main = [] if any(run.held_out for run in runs) else ["score", "kl"]
        main += [
            name
            for name in left
            if main and name.startswith("reward/") and "score" in known and _equal(runs, name, "score")
        ]
    left = [name for name in left if name not in main]
    out = []
    for group in GROUPS:
        own = group.names(left)
        left = [name for name in left if name not in own]
        out += plots_of(group, own, runs, labels, seeds=seeds)
    others = []
    for name in left[:MOST_OTHERS]:
        others += plots_of(Group(name, "value", "", log=True), [name], runs, labels, seeds=seeds)
    return out, others


def plots_of(
    group: Group, names: Sequence[str], runs: Sequence[Run], labels: Sequence[str], *, seeds: bool
) -> list[Plot]:
    """Return the plots of a group: one with a line per number, or for runs of different recipes one per number with a line per run."""
    names, equal = _distinct([name for name in names if any(run.series.get(name) for run in runs)], runs)
    if not names:
        return []
    if len(runs) == 1 or seeds:
        lines = [line for color, name in enumerate(names[:MOST_LINES]) for line in _lines(name, runs, color)]
        more = f" {len(names) - MOST_LINES} more are left out." if len(names) > MOST_LINES else ""
        note = _note(names, runs, lines, seeds=seeds) + equal + more
        title = f"{group.title}: {told(names[0])}" if len(names) == 1 and group.names_one(names[0]) else group.title
        return [Plot(title, lines, "step", group.y, log=group.log, note=note.strip())]
    out = []
    for name in names[:MOST_LINES]:
        lines = [
            replace(_mean_line(name, [run], color), name=labels[color])
            for color, run in enumerate(runs)
            if run.series.get(name)
        ]
        title = group.title if len(names) == 1 else f"{group.title}: {told(name)}"
        out.append(Plot(title, lines, "step", group.y, log=group.log, note=_note([name], runs, lines, seeds=False)))
    return out


def _equal(runs: Sequence[Run], name: str, other: str) -> bool:
    return all(run.series.get(name) == run.series.get(other) for run in runs)


def _distinct(names: Sequence[str], runs: Sequence[Run]) -> tuple[list[str], str]:
    """Leave out numbers that are equal to an earlier one at every step, and name them."""
    out: list[str] = []
    words = ""
    for name in names:
        same = [one for one in out if _equal(runs, one, name)]
        if same:
            words += f" {told(name)} has the same values as {told(same[0])}."
        else:
            out.append(name)
    return out, words


def _window(name: str, run: Run) -> int:
    return 1 if name.startswith(EVALUATED) or name.startswith("lr/") else run.window


def _lines(name: str, runs: Sequence[Run], color: int) -> list[Line]:
    """Return the line of a number, with what is behind it: the value of each step, or the band of several seeds."""
    line = _mean_line(name, runs, color)
    if len(runs) == 1 and _window(name, runs[0]) > 1:
        return [Line(name, runs[0].points(name), color, faint=True), line]
    return [line]


def _mean_line(name: str, runs: Sequence[Run], color: int) -> Line:
    """Return the mean of a number over the runs at the steps that all of them have, with its band if there is one."""
    marked = name.startswith(EVALUATED)
    own = [dict(run.points(name, _window(name, run))) for run in runs if run.series.get(name)]
    steps = [step for step in own[0] if all(step in one for one in own)]
    points = [(step, sum(one[step] for one in own) / len(own)) for step in steps]
    band: list[tuple[float, float, float]] = []
    if len(own) > 1:
        band = [(step, min(one[step] for one in own), max(one[step] for one in own)) for step in steps]
    elif name.startswith("eval/win_rate/"):
        ends = (name.replace("eval/win_rate/", f"eval/win_rate_{end}/", 1) for end in ("low", "high"))
        low, high = (dict(runs[0].points(end)) for end in ends)
        band = [(step, low[step], high[step]) for step in steps if step in low and step in high]
    return Line(told(name), points, color, band, marked=marked)


def _note(names: Sequence[str], runs: Sequence[Run], lines: Sequence[Line], *, seeds: bool) -> str:
    windows = sorted({_window(name, run) for name in names for run in runs if run.series.get(name)} - {1})
    span = f"{windows[0]} to {windows[-1]}" if len(windows) > 1 else "".join(map(str, windows))
    thin = ", thin: each step" if any(line.faint for line in lines) else ""
    parts = [f"Mean over the last {span} steps{thin}."] if windows else []
    if seeds and any(line.band for line in lines):
        count = sum(any(run.series.get(name) for name in names) for run in runs)
        parts.append(f"Mean of {count} runs; the band goes from the lowest to the highest.")
    elif any(line.band for line in lines):
        parts.append("The band is the 95 % interval.")
    return " ".join(parts)


def main_plots(runs: Sequence[Run], labels: Sequence[str], *, seeds: bool) -> tuple[list[Plot], str]:
    """Return the main picture and what it shows in words.

    Online: the training score (the proxy) and the held-out scores over sqrt(KL), with their direction and marks. Without a KL or an
    evaluation: over the steps. Offline: loss, accuracy and margin.
    """
    if not all(run.online for run in runs):
        known = list(dict.fromkeys(name for run in runs for name in run.series))
        plots = [
            one for group in MAIN_OFFLINE for one in plots_of(group, group.names(known), runs, labels, seeds=seeds)
        ]
        plots = [replace(one, wide=len(plots) == 1) for one in plots]
        return plots, "Loss of training and of held-out rows; accuracy and margin where the method has pairs."
    with_kl = [run for run in runs if "kl" in run.series or "eval/kl" in run.series]
    held = next((_telling(run.held_out) for run in runs if run.held_out), [])
    if not with_kl:
        names = ["score", *held]
        group = Group("Score over the steps", "score", "")
        return [replace(one, wide=True) for one in plots_of(group, names, runs, labels, seeds=seeds)], (
            "The score over the steps. This method has no reference model, so there is no KL to plot it over."
        )
    words = f"Arrows show the direction of training. {PROXY if held else NOT_EVALUATED}"
    if len(runs) > 1 and not seeds:
        plots = []
        for name in ["score", *held]:
            lines = [line for color, run in enumerate(runs) if (line := _path(run, name, labels[color], color)).points]
            marks = [mark for line in lines for mark in _ends(line)]
            title = LABELS.get(name, told(name))
            plots += (
                [Plot(f"{title[:1].upper()}{title[1:]} over sqrt(KL)", lines, X, "score", marks, wide=True)]
                if lines
                else []
            )
    else:
        lines = [line for color, name in enumerate(["score", *held]) for line in _paths(runs, name, color)]
        plots = _with_marks(runs[0], lines, seeds)
    if not held:
        plots += plots_of(Group("Score over the steps", "score", ""), ["score"], runs, labels, seeds=seeds)
        plots += plots_of(Group("KL to the reference", "nats per answer", ""), ["kl"], runs, labels, seeds=seeds)
    return plots, words


X = "sqrt(KL to the reference), KL in nats per answer"
PROXY = (
    "The training score is the proxy that the policy is optimized for. Where it still rises and a held-out judge falls, the policy is "
    "over-optimized (Gao, Schulman and Hilton, Scaling Laws for Reward Model Overoptimization, 2022)."
)
NOT_EVALUATED = (
    "The score is the number that training raises, on its own prompts. There is no evaluation, so nothing here says whether the "
    "answers became better: set eval.data, and eval.judge with a second judge."
)
LABELS = {"score": "training score (proxy)", "eval/score": "same score, held-out prompts"}


def _telling(names: Sequence[str]) -> list[str]:
    """Return two judges and the held-out score, or what else there is of held-out scores."""
    judges = [name for name in names if name.startswith("eval/judge/")]
    return [*judges[:2], *(name for name in names if name == "eval/score")] or list(names[:2])


def _path(run: Run, name: str, label: str, color: int) -> Line:
    """Return a number over the square root of the KL of its step, both as trailing means."""
    return Line(label, list(_by_step(run, name).values()), color, path=True, marked=name.startswith(EVALUATED))


def _by_step(run: Run, name: str) -> dict[float, tuple[float, float]]:
    """Return the points of `_path` by their steps."""
    evaluated = name.startswith(EVALUATED)
    over = "eval/kl" if evaluated and "eval/kl" in run.series else "kl"
    kl = dict(run.points(over, 1 if over == "eval/kl" else run.window))
    found = run.points(name, 1 if evaluated else run.window)
    return {step: (math.sqrt(max(kl[step], 0.0)), value) for step, value in found if step in kl}


def _paths(runs: Sequence[Run], name: str, color: int) -> list[Line]:
    label = LABELS.get(name, told(name))
    if len(runs) == 1:
        return [one for one in [_path(runs[0], name, label, color)] if one.points]
    each = [points for run in runs if (points := _by_step(run, name))]
    common = [step for step in (each[0] if each else ()) if all(step in one for one in each)]
    if not common:
        return []
    mean = [
        (sum(one[step][0] for one in each) / len(each), sum(one[step][1] for one in each) / len(each))
        for step in common
    ]
    return [*(Line(label, list(one.values()), color, faint=True) for one in each), Line(label, mean, color, path=True)]


def _ends(line: Line) -> list[Mark]:
    if not line.points:
        return []
    return [Mark(*line.points[0], "", line.color), Mark(*line.points[-1], "end", line.color)]


def _with_marks(run: Run, lines: Sequence[Line], seeds: bool) -> list[Plot]:
    """Return the lines in one plot with marks for start, best and end, or each in its own plot if their scales differ."""
    if not lines:
        return []
    together = comparable([line.points for line in lines if not line.faint])
    groups: list[list[Line]] = [list(lines)] if together else []
    if not together:
        for color in dict.fromkeys(line.color for line in lines):
            groups.append([line for line in lines if line.color == color])
    out = []
    for own in groups:
        marks: list[Mark] = []
        for line in own:
            if not line.faint:
                marks += _three(run, line, seeds)
        title = (
            "Training score and held-out scores over sqrt(KL)"
            if together and len(lines) > 1
            else f"{own[-1].name[:1].upper()}{own[-1].name[1:]} over sqrt(KL)"
        )
        note = "Light lines: each run; heavy line: their mean at the same step." if seeds else ""
        out.append(Plot(title, own, X, "score", marks, note=note, wide=True))
    return out


def _three(run: Run, line: Line, seeds: bool) -> list[Mark]:
    """Return the marks of a line: start, best (not for the mean of several runs) and end."""
    marks = [Mark(*line.points[0], "start", line.color)]
    steps = [step for step, _ in run.points("eval/kl" if line.marked else "score")]
    if not seeds and run.best is not None and len(steps) == len(line.points):
        place = min(range(len(steps)), key=lambda i: abs(steps[i] - (run.best or 0)))
        if 0 < place < len(steps) - 1:
            marks.append(Mark(*line.points[place], f"best, step {int(steps[place])}", line.color))
    if len(line.points) > 1:
        best = not seeds and run.best == run.steps
        marks.append(
            Mark(*line.points[-1], f"{'best and end' if best else 'end'}, {number(line.points[-1][1])}", line.color)
        )
    return marks


def comparable(several: Sequence[Points]) -> bool:
    """Return whether lines can share an axis: none of them would be flat on it."""
    ranges = [(min(y for _, y in one), max(y for _, y in one)) for one in several if one]
    if len(ranges) < 2:
        return True
    whole = max(high for _, high in ranges) - min(low for low, _ in ranges)
    return whole <= COMPARABLE * max(min(high - low for low, high in ranges), 1e-12)
