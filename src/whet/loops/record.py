"""The run folder: resolved recipe, environment, metrics.jsonl, rollouts as Parquet files, and checkpoints."""

import json
import os
import platform
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from whet.data import Batch, Group
from whet.data.files import read_json, write_json, write_text
from whet.errors import DataError, RunStopped, first_line
from whet.loops import rollouts, stopped
from whet.loops.metrics import checked
from whet.registry import told
from whet.terminal import caution
from whet.trackers import Tracker

SHOWN = 16
"""Number of answers per rollout that are sent to trackers."""
CAUTIONS = "cautions.jsonl"
"""The file of a run folder with the cautions of its self-checks."""
PACKAGES = ("torch", "transformers", "peft", "numpy", "tokenizers", "safetensors")


class RunFolder:
    """Write the files of one run. With `resume_at`, remove the metrics and rollouts after that step.

    With several workers, `writes` is True for only one of them. `accepted` names frozen roles whose weights may have changed
    since the run began.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resume_at: int | None = None,
        trackers: Sequence[Tracker] = (),
        writes: bool = True,
        accepted: Collection[str] = (),
    ) -> None:
        self.folder, self.trackers, self.writes, self.accepted = folder, tuple(trackers), writes, accepted
        self._metrics = folder / "metrics.jsonl"
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._resumed_at = resume_at
        _keep_cautions(folder, resume_at)
        if resume_at is not None and self._metrics.is_file():
            kept = [row for row in read_metrics(folder) if row["step"] <= resume_at]
            missing = sorted(set(range(1, resume_at + 1)) - {row["step"] for row in kept})
            if missing:
                self.caution(
                    f"{self._metrics}: the lines of {len(missing)} steps are missing, the first is {missing[0]}",
                    resume_at,
                )
            write_text(self._metrics, "".join(json.dumps(row) + "\n" for row in kept))
            rollouts.remove_after(folder, resume_at)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    def environment(self, recipe_text: str, workers: int = 1) -> None:
        """Write environment.json (versions, numbers of threads and of learner processes, and after which steps the run was resumed),
        then recipe.yaml (resolved)."""
        if not self.writes:
            return
        about = environment() | {"workers": workers}
        if self._resumed_at is not None:
            about["resumed_at"] = [*_resumes(self.folder), max(self._resumed_at, 0)]
        write_json(self.folder / "environment.json", about)
        write_text(self.folder / "recipe.yaml", recipe_text)

    def metrics(self, step: int, also: Mapping[str, float] | None = None, /, **numbers: float) -> None:
        """Append one line to metrics.jsonl, and log the same numbers to the trackers. `also` are numbers that a user logs.

        Raises ValueError for a number that the table of `loops.metrics` does not have.
        """
        checked(numbers)
        if not self.writes:
            return
        line = {"step": step} | {name: plain(value) for name, value in {**numbers, **(also or {})}.items()}
        _append(self._metrics, line)
        self._tell(lambda tracker: tracker.log(step, {name: value for name, value in line.items() if name != "step"}))

    def line(self, step: int) -> dict[str, float]:
        """Return the numbers of a step that are in metrics.jsonl, {} if it has no line."""
        rows = read_metrics(self.folder) if self._metrics.is_file() else []
        found = next((row for row in rows if row["step"] == step), {})
        return {name: value for name, value in found.items() if name != "step"}

    def amend(self, step: int, **numbers: float) -> None:
        """Add numbers to the line of a step in metrics.jsonl; write the line if there is none."""
        before = self.line(step) if self.writes else {}
        if self.writes and self._metrics.is_file():
            kept = [row for row in read_metrics(self.folder) if row["step"] != step]
            write_text(self._metrics, "".join(json.dumps(row) + "\n" for row in kept))
        self.metrics(step, before, **numbers)

    def rollout(
        self, step: int, groups: Sequence[Group], batch: Batch, names: Sequence[str], *, record: bool = True
    ) -> None:
        """Write `rollouts/step-00000042.parquet` if `record` is True (see `loops.rollouts`), and send some of the answers to the
        trackers."""
        if not self.writes:
            return
        if record:
            rollouts.write(self.folder, step, groups, batch, names)
        if self.trackers:
            scores = batch["score"].tolist() if "score" in batch.columns else []
            samples = [(group.prompt.text, sample.text) for group in groups for sample in group.samples]
            rows = [
                {"prompt": prompt, "completion": text, "score": score}
                for (prompt, text), score in zip(samples[:SHOWN], scores, strict=False)
            ]
            self._tell(lambda tracker: tracker.samples(step, rows))

    def evaluation(self, step: int, groups: Sequence[Group], numbers: Mapping[str, list[Any]]) -> None:
        """Write the answers of an evaluation, `eval/step-00000042.parquet` (see `rollouts.write_evaluation`), and send some of them to
        the trackers. `numbers` has a value for each answer in each column, such as `score`."""
        if not self.writes:
            return
        try:
            rollouts.write_evaluation(self.folder, step, groups, numbers)
        except OSError as error:  # the numbers are logged nevertheless
            self.caution(f"step {step}: the answers of the evaluation could not be written ({first_line(error)})", step)
        if self.trackers:
            samples = [(group.prompt.text, sample.text) for group in groups for sample in group.samples][:SHOWN]
            rows = [
                {"prompt": prompt, "completion": text, "evaluation": True}
                | {name: own[place] for name, own in numbers.items()}
                for place, (prompt, text) in enumerate(samples)
            ]
            self._tell(lambda tracker: tracker.samples(step, rows))

    def stopped(
        self,
        error: RunStopped,
        step: int,
        version: int,
        batch: Batch | None,
        groups: Sequence[Group] = (),
        names: Sequence[str] = (),
    ) -> None:
        """Write what the self-check looked at that ended the run, and name the file in its message (see `loops.stopped`)."""
        stopped.record(self.folder, error, step, version, batch, groups, names, writes=self.writes)

    def caution(self, text: str | None, step: int) -> None:
        """Print a caution on the terminal, if there is one, and append it to cautions.jsonl with the step that it is about, from 1."""
        if text is None or not self.writes:
            return
        caution(text)
        try:
            _append(self.folder / CAUTIONS, {"step": step, "text": text})
        except OSError as error:  # a full disk must not end the run for the sake of a caution
            caution(f"{self.folder / CAUTIONS}: the caution could not be written ({first_line(error)})")

    def close(self) -> None:
        """End the trackers; they write their buffered data. May be called more than once."""
        self._tell(lambda tracker: tracker.end())
        self.trackers = ()

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        """Call each tracker. One that raises is reported and not called again: the run does not depend on it."""
        for tracker in self.trackers:
            try:
                call(tracker)
            except (Exception, SystemExit) as error:
                caution(f"tracker {type(tracker).__name__} is not used any more: {told(error)}")
                self.trackers = tuple(one for one in self.trackers if one is not tracker)


def _append(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line of JSON to a file. A link is not followed."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _keep_cautions(folder: Path, resume_at: int | None) -> None:
    """Remove the cautions after the step at which a run is resumed, all of them if it begins: they come again if they hold."""
    path = folder / CAUTIONS
    if not path.is_file():
        return
    try:
        kept = [row for row in read_cautions(folder) if resume_at is not None and row["step"] <= resume_at]
    except DataError as error:  # of use to readers only, so a damaged file does not stop a resume
        caution(f"{error}; the cautions before are left out")
        kept = []
    if kept:
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    else:
        path.unlink()


def _resumes(folder: Path) -> list[int]:
    """Return the steps after which the run was resumed before, as environment.json has them."""
    try:
        found = read_json(folder / "environment.json", DataError).get("resumed_at", [])
    except (DataError, OSError):
        return []
    return [one for one in found if type(one) is int] if isinstance(found, list) else []


def environment() -> dict[str, Any]:
    """Return what the last digits of a run depend on: versions, kind of processor, and number of threads."""
    about = {"python": sys.version.split()[0], "machine": platform.machine(), "threads": torch.get_num_threads()}
    return about | {name: metadata.version(name) for name in PACKAGES}


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl of a run, without an incomplete last line (a write that was interrupted).

    Raises DataError with file and line for any other line that is not as whet writes it.
    """
    return _lines(folder / "metrics.jsonl", "a line of metrics")


def read_cautions(folder: Path) -> list[dict[str, Any]]:
    """Return the cautions of a run in order, each with `step` (from 1) and `text`. Raises DataError as `read_metrics` does."""
    rows = _lines(folder / CAUTIONS, "a caution") if (folder / CAUTIONS).is_file() else []
    return [row for row in rows if isinstance(row.get("text"), str)]


def _lines(path: Path, what: str) -> list[dict[str, Any]]:
    """Return the lines of a file, each an object with the number of a step, without an incomplete last one."""
    rows, lines = [], path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise ValueError("expected an object with the number of a step")
            rows.append(row)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # whole lines end with a line feed
                break
            raise DataError(
                f"{path}:{number}: not {what} ({first_line(error)}), got {line[:80]!r}; restore or remove the line"
            ) from error
    return rows


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each number over the rows that contain it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: sum(row[name] for row in rows if name in row) / sum(name in row for row in rows) for name in names}


def plain(value: Any) -> float:
    """Return a number as a Python number, also a tensor or an array."""
    return value.item() if hasattr(value, "item") else value
