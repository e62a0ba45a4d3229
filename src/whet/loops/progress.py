"""Progress display of a run: completed steps, rate, time left, and a few metrics."""

import sys
from collections.abc import Mapping
from typing import Any

from whet.terminal import console, say, visible


class Progress:
    """Show a progress bar on a terminal, or print a line at most every 10 seconds elsewhere. Show nothing if quiet.

    Use it as a context manager: `with Progress("ppo", 100) as progress: progress.advance({"score": 0.3})`.
    """

    def __init__(self, title: str, total: int, *, done: int = 0, quiet: bool = False) -> None:
        self.title, self.total, self.done, self.quiet = title, total, done, quiet
        self._bar: Any = None
        self._task: Any = None
        self._last = 0.0
        self._began = 0.0

    def __enter__(self) -> "Progress":
        import time

        self._began = self._last = time.monotonic()
        self._first = self.done
        if not self.quiet and sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}", markup=False),
            )
            self._bar = Bar(*columns, console=console(error=True))
            self._bar.start()
            self._task = self._bar.add_task(visible(self.title), total=self.total, completed=self.done, facts="")
        return self

    def advance(self, numbers: Mapping[str, float], count: int = 1) -> None:
        """Record `count` more completed steps, and show the first five numbers."""
        import time

        self.done += count
        if self.quiet:
            return
        facts = "  ".join(f"{name} {value:.4g}" for name, value in list(numbers.items())[:5])
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, facts=visible(facts))
            return
        now = time.monotonic()
        if now - self._last >= 10 or self.done == self.total:
            self._last = now
            rate = (self.done - self._first) / max(now - self._began, 1e-9)
            left = (self.total - self.done) / max(rate, 1e-9)
            say(f"{self.title} {self.done}/{self.total}  {rate:.2f}/s  {left:.0f} s left  {facts}", error=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
