"""Call a user's function: name it if it is slow, restore what it changes, or run it in a process that can be killed."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from whet.calling.process import Child, sendable
from whet.calling.state import restored
from whet.registry import called
from whet.terminal import caution_at_once

SLOW = (60.0, 600.0, 3600.0)
"""Seconds after which a line names a function that is still running."""


@contextmanager
def told_if_slow(label: str, what: str, limit: str) -> Iterator[None]:
    """Print a line on stderr after each of the times in `SLOW` within the context. `limit` says what ends the call."""
    done, began = threading.Event(), time.monotonic()

    def watch() -> None:
        for seconds in SLOW:
            if done.wait(max(0.0, began + seconds - time.monotonic())):
                return
            # not sys.stderr, which the function may have replaced
            caution_at_once(f"{label} has been running for {seconds:g} s, for {what}; {limit}")

    thread = threading.Thread(target=watch, name="whet-slow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()


class UserCall:
    """A user's function, or a method of a user's object. `label` names it in messages, such as "reward judge".

    Without `seconds` it is called in this process, without a limit, and the global state that it changes is restored (see
    `whet.calling.state.restored`). With `seconds` it is called in a process of its own, which is killed if a call takes longer.
    `make` returns the function in that process; `option` is the name of the option in messages. Raises RecipeError if `make`
    cannot be sent there.
    """

    def __init__(
        self,
        function: Callable[..., Any] | None,
        label: str,
        *,
        make: Callable[[], Callable[..., Any]] | None = None,
        seconds: float | None = None,
        option: str = "timeout",
    ) -> None:
        self.function, self.label, self.option = function, label, option
        self.child: Child | None = None
        if seconds is not None:
            assert make is not None
            self.child = Child(sendable(make, f"{option}: {label}"), label, seconds)

    def start(self) -> None:
        """Start the process of a function with a limit. Raises an error if it cannot load the function."""
        if self.child is not None:
            self.child.start()

    def __call__(self, what: str, given: Sequence[Any] = (), named: Mapping[str, Any] = {}) -> Any:
        """Call the function for `what` (such as "64 answers"). If it raises, raise RewardError with the line of the user's file.

        Arguments are not copied here. KeyboardInterrupt passes; SystemExit and all others are errors of the function.
        """
        if self.child is not None:
            limit = f"it is ended after {self.child.seconds:g} s"
            with told_if_slow(self.label, what, limit):
                return self.child(what, given, named)
        assert self.function is not None
        with told_if_slow(self.label, what, f"it has no limit, and {self.option} sets one"), restored():
            return called(self.function, self.label, given, named)
