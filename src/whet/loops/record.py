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
from whet.data.files import write_json, write_text
from whet.errors import DataError, RunStopped, first_line
from whet.loops import rollouts, stopped
from whet.loops.metrics import checked
from whet.registry import told
from whet.terminal import caution
from whet.trackers import Tracker

SHOWN = 16
"""Number of answers per rollout that are sent to trackers."""
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
        if resume_at is not None and self._metrics.is_file():
            kept = [row for row in read_metrics(folder) if row["step"] <= resume_at]
            missing = sorted(set(range(1, resume_at + 1)) - {row["step"] for row in kept})
            if missing:
                self.caution(
                    f"{self._metrics}: the lines of {len(missing)} steps are missing, the first is {missing[0]}"
                )
            write_text(self._metrics, "".join(json.dumps(row) + "\n" for row in kept))
            rollouts.remove_after(folder, resume_at)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    def environment(self, recipe_text: str, workers: int = 1) -> None:
        """Write environment.json (versions, numbers of threads and of learner processes), then recipe.yaml (resolved)."""
        if not self.writes:
            return
        write_json(self.folder / "environment.json", environment() | {"workers": workers})
        write_text(self.folder / "recipe.yaml", recipe_text)

    def metrics(self, step: int, also: Mapping[str, float] | None = None, /, **numbers: float) -> None:
        """Append one line to metrics.jsonl, and log the same numbers to the trackers. `also` are numbers that a user logs.

        Raises ValueError for a number that the table of `loops.metrics` does not have.
        """
        checked(numbers)
        if not self.writes:
            return
        line = {"step": step} | {name: plain(value) for name, value in {**numbers, **(also or {})}.items()}
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with os.fdopen(os.open(self._metrics, flags, 0o666), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._tell(lambda tracker: tracker.log(step, {name: value for name, value in line.items() if name != "step"}))

    def rollout(self, step: int, groups: Sequence[Group], batch: Batch, names: Sequence[str]) -> None:
        """Write `rollouts/step-00000042.parquet` (see `loops.rollouts`), and send some of its answers to the trackers."""
        if not self.writes:
            return
        rollouts.write(self.folder, step, groups, batch, names)
        if self.trackers:
            scores = batch["score"].tolist() if "score" in batch.columns else []
            samples = [(group.prompt.text, sample.text) for group in groups for sample in group.samples]
            rows = [
                {"prompt": prompt, "completion": text, "score": score}
                for (prompt, text), score in zip(samples[:SHOWN], scores, strict=False)
            ]
            self._tell(lambda tracker: tracker.samples(step, rows))

    def eval_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send some answers of an evaluation to the trackers: dicts with prompt, completion and score, and whatever else they have."""
        if self.writes and self.trackers:
            shown = [{**row, "evaluation": True} for row in rows[:SHOWN]]
            self._tell(lambda tracker: tracker.samples(step, shown))

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

    def caution(self, text: str | None) -> None:
        """Print a caution on the terminal, if there is one."""
        if text is not None and self.writes:
            caution(text)

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


def environment() -> dict[str, Any]:
    """Return what the last digits of a run depend on: versions, kind of processor, and number of threads."""
    about = {"python": sys.version.split()[0], "machine": platform.machine(), "threads": torch.get_num_threads()}
    return about | {name: metadata.version(name) for name in PACKAGES}


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl of a run, without an incomplete last line (a write that was interrupted).

    Raises DataError with file and line for any other line that is not as whet writes it.
    """
    path, rows = folder / "metrics.jsonl", []
    lines = path.read_bytes().split(b"\n")
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
                f"{path}:{number}: not a line of metrics ({first_line(error)}), got {line[:80]!r}; restore or remove the line"
            ) from error
    return rows


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each number over the rows that contain it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: sum(row[name] for row in rows if name in row) / sum(name in row for row in rows) for name in names}


def plain(value: Any) -> float:
    """Return a number as a Python number, also a tensor or an array."""
    return value.item() if hasattr(value, "item") else value
