"""Handling of Ctrl-C, SIGTERM and SIGHUP: the first one saves the run and ends it, the second one ends it at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from whet.errors import Interrupted
from whet.terminal import caution_at_once

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that end a run: Ctrl-C, the end of a batch job or of a container, and a closed terminal."""


class Stop:
    """A stop request. `signum` is the first signal, or 0.

    With `at_once`, the first signal raises `Interrupted` wherever the run is, unless it waits for something (`wait_for`).
    Without it, as on several workers, which must stop after the same step, the loop looks at `asked` after each step.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.signum, self.at_once = 0, at_once
        self.saved = "no checkpoint was saved yet; the same command with --resume starts the run again"
        """What the user must know about the last checkpoint."""
        self._waits: str | None = None

    @property
    def asked(self) -> bool:
        """True after the first signal."""
        return bool(self.signum)

    def wait_for(self, what: str | None) -> None:
        """Let a signal wait for `what`, which must not be interrupted. None ends this."""
        self._waits = what

    def receive(self, signum: int, _frame: FrameType | None = None) -> None:
        """Handle a signal. Raises Interrupted for the second one, and for the first one if the run can stop at once."""
        if self.asked:
            raise Interrupted(self.saved, signum)
        self.signum = signum
        if self.at_once and self._waits is None:
            raise self.interrupted()
        name, waits = signal.Signals(signum).name, self._waits or "the end of the step"
        with suppress(OSError):  # not print, which the interrupted code may be in
            caution_at_once(f"{name}: waiting for {waits}; a second signal ends the run at once")

    def interrupted(self) -> Interrupted:
        """Return the error that ends the run."""
        return Interrupted(self.saved, self.signum)


@contextmanager
def graceful(*, at_once: bool = False) -> Iterator[Stop]:
    """Handle `SIGNALS` within the context (see `Stop`). In threads other than the main one, handle none.

    A signal that was ignored before, as SIGHUP is under nohup, stays ignored.
    """
    stop = Stop(at_once=at_once)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {one: signal.getsignal(one) for one in SIGNALS}
    before = {one: handler for one, handler in before.items() if handler != signal.SIG_IGN}
    for one in before:
        signal.signal(one, stop.receive)
    try:
        yield stop
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
