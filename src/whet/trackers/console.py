"""Print the metrics of each step as one line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whet.methods.options import Count, NotNegativeInt
from whet.terminal import say
from whet.trackers.base import RunInfo


@dataclass(frozen=True)
class Options:
    """Options of the console tracker."""

    every: Count = 1
    """number of steps between two lines"""
    num_samples: NotNegativeInt = 0
    """number of answers per rollout to print"""


class ConsoleTracker:
    """Print metrics and samples to standard error."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def start(self, run: RunInfo) -> None:
        """See `Tracker.start`."""
        say(f"run {run.name} in {run.folder}", error=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        if step % self.options.every == 0:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            say(f"step {step}  {shown}", error=True)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """See `Tracker.samples`."""
        for row in rows[: self.options.num_samples] if step % self.options.every == 0 else ():
            say(f"step {step}  score {row['score']:.4g}  {row['prompt']!r} -> {row['completion']!r}", error=True)

    def end(self) -> None:
        """See `Tracker.end`."""


def make(options: Options, context: Any) -> ConsoleTracker:
    """Build the tracker."""
    return ConsoleTracker(options)
