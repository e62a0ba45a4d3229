"""What a run says while it trains: a live view on a terminal (`loops.screen`), plain lines elsewhere, nothing if quiet."""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from whet.loops.history import History
from whet.terminal import say, visible

EVERY = 10.0
"""Seconds between two lines where there is no terminal."""
SAMPLES, SAMPLE_STEPS = 60.0, 10
"""Seconds between two lines with a sample where there is no terminal, and steps between two samples of the live view."""
CUT = 160
"""Number of characters of a prompt's end and of an answer's start in a line."""


@dataclass(frozen=True)
class Shown:
    """An answer that is shown: its prompt, its text, its score, and the step that it is of, from 1."""

    prompt: str
    completion: str
    score: float
    step: int = 0


class Progress:
    """Show the steps of a run, the numbers that matter (`History.shown`) and, now and then, an answer.

    On a terminal it is a live view. Elsewhere (a file, a pipe, a notebook, TERM=dumb) a line is printed for the first and the last
    step, and for others at most every `EVERY` seconds: `ppo 12/100  0.5/s  176 s left  score 0.41  kl 1.2`. Use it as a context
    manager: `with Progress("ppo", 100) as progress: progress.advance({"score": 0.3})`.
    """

    def __init__(self, title: str, total: int, *, done: int = 0, quiet: bool = False) -> None:
        self.title, self.total, self.done, self.quiet = title, total, done, quiet
        self.history = History()
        self.sample: Shown | None = None
        self.lock = threading.Lock()
        """Held while the numbers change, and while the live view reads them."""
        self._times: deque[tuple[float, int]] = deque(maxlen=30)
        self._line = self._said = 0.0
        self._stack = ExitStack()
        self._screen: Any = None

    def __enter__(self) -> "Progress":
        now = time.monotonic()
        self._first, self._line, self._said = self.done, now, now - SAMPLES
        self._times.append((now, self.done))
        if not self.quiet and live():
            from whet.loops.screen import Screen

            self._screen = self._stack.enter_context(Screen(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def advance(
        self, numbers: Mapping[str, float], count: int = 1, sample: Callable[[], Shown | None] | None = None
    ) -> None:
        """Record `count` more completed steps and their numbers. With 0, the numbers are of the start or of an evaluation.

        `sample` returns an answer of this step; it is called only if one is due.
        """
        self.done += count
        if self.quiet:
            return
        with self.lock:
            self._times.append((time.monotonic(), self.done))
            self.history.add(numbers)
        if self._screen is not None:
            if sample is not None and (self.sample is None or self.done % SAMPLE_STEPS == 0):
                self.sample = sample() or self.sample
            return
        now, last = time.monotonic(), self.done >= self.total
        if now - self._line >= EVERY or last or self.done == self._first + 1 or not count:
            self._line = now
            say(visible(self.line(numbers)), error=True)
            if sample is not None and (now - self._said >= SAMPLES or last):
                self._said = now
                found = sample()
                if found is not None:
                    say(sample_line(self.title, found), error=True)

    def line(self, numbers: Mapping[str, float]) -> str:
        """Return the numbers that matter of these as one line of names and values."""
        rate, left = self.rate(), self.left()
        parts = [f"{self.title} {self.done}/{self.total}"]
        parts += [f"{rate:.2g}/s"] if rate else []
        parts += [f"{left:.0f} s left"] if left is not None else []
        parts += [f"{name} {numbers[name]:.4g}" for name in self.history.shown() if name in numbers]
        if "tokens_per_second" in numbers:
            parts.append(f"tokens_per_second {numbers['tokens_per_second']:.4g}")
        return "  ".join(parts)

    def rate(self) -> float:
        """Return the steps per second over the last steps, 0 if none is done."""
        (began, first), (now, done) = self._times[0], self._times[-1]
        return (done - first) / max(now - began, 1e-9)

    def left(self) -> float | None:
        """Return the seconds that the rest of the run takes at this rate, None if no step is done."""
        rate = self.rate()
        return (self.total - self.done) / rate if rate else None


def live() -> bool:
    """Return whether standard error is a terminal that can move its cursor."""
    return (
        sys.stderr is not None
        and sys.stderr.isatty()
        and os.environ.get("TERM", "").lower() not in ("dumb", "unknown", "")
    )


def sample_line(title: str, shown: Shown) -> str:
    """Return an answer as one line: the end of its prompt, and its start."""
    prompt, text = visible(shown.prompt), visible(shown.completion)
    prompt = prompt if len(prompt) <= CUT else f"...{prompt[-CUT:]}"
    text = text if len(text) <= CUT else f"{text[:CUT]}..."
    return f"{visible(title)} sample of step {shown.step}  score {shown.score:.4g}  {prompt} -> {text}"
