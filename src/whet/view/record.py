"""What a report needs of a run folder: the numbers of each step, the cautions, the state of the run, its recipe and environment."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from whet.data.files import read_json
from whet.errors import DataError, WhetError
from whet.loops import stopped
from whet.loops.metrics import EVALUATED, direction
from whet.loops.record import read_cautions, read_metrics
from whet.methods import catalogue
from whet.view.plots import smoothed

FILE = re.compile(r"step-(\d{8,10})\.parquet")
"""The names of the files with the answers of a step."""
LAST = 10**10
"""Larger numbers of steps are damage."""


@dataclass(frozen=True)
class Changed:
    """A field of the recipe that differs from the default: its dotted name, its value and the default, as text."""

    name: str
    value: str
    default: str


@dataclass(frozen=True, eq=False)
class Run:
    """The record of a run. `rows` are the lines of metrics.jsonl, by step; those of step 0 have only an evaluation. `recipe_text` is
    recipe.yaml, and `recipe` its fields; `changed` are those that differ from the defaults, None if this is not known."""

    folder: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    changed: Sequence[Changed] | None
    rows: Sequence[Mapping[str, Any]]
    cautions: Sequence[Mapping[str, Any]] = ()
    stops: Sequence[Mapping[str, Any]] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    running: bool = False
    notes: Sequence[str] = ()

    @property
    def method(self) -> str:
        """The name of the method."""
        return str(self.recipe.get("method", "?"))

    @cached_property
    def online(self) -> bool:
        """True if the method trains on answers of the policy."""
        return self.method in {**catalogue.ONLINE, **catalogue.ONLINE_PREFERENCE}

    @cached_property
    def series(self) -> dict[str, list[tuple[int, float]]]:
        """(step, value) of each number, in order of the steps. What is no finite number is left out."""
        out: dict[str, list[tuple[int, float]]] = {}
        for row in self.rows:
            for name, value in row.items():
                known = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
                if name != "step" and known is not None and abs(known) < 1e300:  # also false for NaN
                    out.setdefault(name, []).append((int(row["step"]), float(known)))
        return out

    @cached_property
    def steps(self) -> int:
        """The number of the last finished step."""
        return max((int(row["step"]) for row in self.rows), default=0)

    @property
    def planned(self) -> int | None:
        """The number of steps that the recipe asks for, None if it gives passes over the data."""
        section = self.recipe.get("rollout" if self.online else "train")
        found = section.get("num_steps") if isinstance(section, Mapping) else None
        by_passes = self.online and isinstance(section, Mapping) and section.get("num_epochs") is not None
        return found if isinstance(found, int) and not by_passes else None

    @cached_property
    def window(self) -> int:
        """The number of steps over which the numbers of training are averaged: a twentieth of the run, at most 20."""
        return max(1, min(20, self.steps // 20))

    def points(self, name: str, window: int = 1) -> list[tuple[float, float]]:
        """Return (step, value) of a number; with `window`, trailing means over so many steps."""
        found = self.series.get(name, [])
        values = smoothed([value for _, value in found], window) if window > 1 else [value for _, value in found]
        return [(float(step), value) for (step, _), value in zip(found, values, strict=True)]

    def at(self, name: str, step: int) -> float | None:
        """Return a number at a step: of an evaluation the newest one up to it, of training the mean over `window` steps up to it, at
        the start of the run that of its first step. None if there is none."""
        found = self.series.get(name, [])
        if name.startswith(EVALUATED):
            return next((value for other, value in reversed(found) if other <= step), None)
        if found and step <= self.start:
            return found[0][1] if found[0][0] <= 1 else None
        values = [value for other, value in found if step - self.window < other <= step]
        return sum(values) / len(values) if values else None

    @cached_property
    def held_out(self) -> list[str]:
        """The numbers of evaluations that say how good the model is, the most telling first: judges that training never sees, then
        the rewards, for offline runs accuracy, then the loss."""
        if self.online:
            order = [r"eval/judge/.+", r"eval/score", r"eval/reward/.+"]
        else:
            order = [r"eval/accuracy", r"eval/loss", r"eval/(policy|reward)/\w+/.+"]
        return [name for one in order for name in self.series if re.fullmatch(one, name)]

    @cached_property
    def judged_by(self) -> str:
        """The name of the number by which the best step is chosen."""
        kept = self.recipe.get("eval") if isinstance(self.recipe.get("eval"), Mapping) else {}
        chosen = (kept or {}).get("keep_best")
        if isinstance(chosen, str) and chosen in self.series:
            return chosen
        return (self.held_out or ["score" if self.online else "loss"])[0]

    @property
    def stopped_by(self) -> str:
        """The name of the number that early stopping looks at."""
        section = self.recipe.get("eval")
        early = section.get("early_stop") if isinstance(section, Mapping) else None
        metric = early.get("metric") if isinstance(early, Mapping) else None
        return metric if isinstance(metric, str) else self.judged_by

    @cached_property
    def best(self) -> int | None:
        """The best step: the one that the run kept, else the one with the best evaluation, else with the best mean of training."""
        kept = self.series.get("eval/best_step")
        if kept:
            return int(kept[-1][1])
        points = self.points(self.judged_by, 1 if self.judged_by.startswith(EVALUATED) else self.window)
        points = [one for one in points if one[0] >= self.window or self.judged_by.startswith(EVALUATED)]
        if not points:
            return None
        pick = min if direction(self.judged_by) == "lower" else max
        return int(pick(points, key=lambda one: one[1])[0])

    @property
    def start(self) -> int:
        """The first step with numbers."""
        return min((int(row["step"]) for row in self.rows), default=0)

    @property
    def seconds(self) -> float:
        """The training time in seconds: the sum over the steps."""
        return sum(value for _, value in self.series.get("seconds", []))

    @property
    def ended_early(self) -> bool:
        """True if early stopping ended the run."""
        return self.series.get("eval/stopped_early", [(0, 0.0)])[-1] == (self.steps, 1.0)

    @property
    def state(self) -> str:
        """How the run ended, in words."""
        of = f"{self.steps} of {self.planned} steps" if self.planned is not None else f"{self.steps} steps"
        if self.running:
            return f"not finished: a session is training in this folder, {of} are done"
        stop = next((one for one in self.stops if one.get("step") == self.steps + 1), None)
        if stop is not None:
            return f"stopped by a self-check in step {self.steps + 1}, after {of}"
        if not self.steps:
            return "no step has finished yet"
        if self.ended_early and (self.folder / "model").is_dir():
            return f"stopped early after {of}: {self.stopped_by} no longer improved"
        if (self.folder / "model").is_dir() and (self.planned is None or self.steps >= self.planned):
            return f"finished: {self.steps} step{'' if self.steps == 1 else 's'}"
        return f"not finished: {of} are done; continue it with --resume"


def read_run(
    folder: Path,
    recipe: Mapping[str, Any],
    recipe_text: str,
    changed: Sequence[Changed] | None = None,
    *,
    running: bool = False,
) -> Run:
    """Read the record of a run, also of one that was killed. `recipe` is its recipe. Raises DataError with file and line if
    metrics.jsonl has a line that is not as whet writes it, other than an incomplete last one."""
    rows = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
    notes: list[str] = []
    if wrong := [row["step"] for row in rows if not 0 <= row["step"] < LAST]:
        told = f"{len(wrong)} lines have no number of a step, such as {wrong[0]!r:.40}"
        notes.append(f"{folder / 'metrics.jsonl'}: {told}; they are left out")
    rows = sorted((row for row in rows if 0 <= row["step"] < LAST), key=lambda row: row["step"])
    environment: Mapping[str, Any] = {}
    cautions: list[dict[str, Any]] = []
    stops: list[dict[str, Any]] = []
    try:
        cautions = read_cautions(folder)
    except DataError as error:
        notes.append(str(error))
    records = sorted((folder / stopped.FOLDER).glob("step-*.json"))
    for path in [folder / "environment.json", *records]:
        try:
            if path.parent == folder:
                environment = read_json(path, DataError) if path.is_file() else {}
            else:
                stops.append(read_json(path, DataError))
        except (WhetError, OSError) as error:
            notes.append(str(error))
    return Run(folder, recipe, recipe_text, changed, rows, cautions, stops, environment, running, notes)


def resumes(run: Run) -> list[int]:
    """Return the steps after which the run was continued by a later session, without those at its end."""
    found = run.environment.get("resumed_at")
    return [one for one in found if type(one) is int and one < run.steps] if isinstance(found, list) else []


def skipped(run: Run) -> list[int]:
    """Return the steps whose rollout was skipped: they have a score, and no number of an update."""
    made = [name for name in run.series if name.startswith("grad_norm/")]
    updated = {step for name in made for step, _ in run.series[name]}
    return [step for step, _ in run.series.get("score", []) if step and step not in updated] if made else []


def answer_files(folder: Path) -> tuple[str, dict[int, Path]]:
    """Return the files with answers of a run, by step: those of its evaluations, else its rollouts, and which they are."""
    known = {"evaluation": folder / "eval", "rollout": folder / "rollouts"}
    found = {
        kind: {int(name[1]): path for path in sorted(where.glob("step-*")) if (name := FILE.fullmatch(path.name))}
        for kind, where in known.items()
    }
    kind = "evaluation" if found["evaluation"] else "rollout"
    return kind, found[kind]


def finite(value: Any) -> float | None:
    """Return a value as a number, None if it is no finite one."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None
