"""Handling of Ctrl-C: the first one asks the loop to save and stop after the step, the second one stops immediately."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """A stop request; `asked` is True after the first Ctrl-C."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def graceful() -> Iterator[Stop]:
    """Within the context, the first Ctrl-C sets `stop.asked`, the second raises KeyboardInterrupt (main thread only)."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def asked(_signal: int, _frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = signal.signal(signal.SIGINT, asked)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
