"""Run a user's function in a process of its own, which is killed when a call takes too long."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from whet.errors import RecipeError, RewardError, first_line
from whet.processes import descendants, end

CODE = "import sys; sys.path[:] = {path!r}; from whet.calling.child import main; main({link}, {lifeline})"
"""What the process executes."""
START = 600.0
"""Seconds in which the process must have loaded the function."""


def sendable(make: Callable[[], Callable[..., Any]], where: str) -> bytes:
    """Return `make`, which returns the function, in the form in which it is sent to the process. Raises RecipeError if it cannot
    be sent; `where` names the function and the option."""
    try:
        data = pickle.dumps(make)
        if b"__main__" not in data:
            return data
        reason = "it is defined in the script itself"
    except Exception as error:  # pickle raises PicklingError, AttributeError, TypeError, ...
        reason = first_line(error)
    raise RecipeError(
        f"{where} needs a process of its own, and the function cannot be sent there ({reason}); write it in a file and name it "
        'as "FILE.py:NAME", or leave the limit out'
    )


@dataclass
class Running:
    """A started process: its connection, and the pipe whose end tells it that this process has ended."""

    process: "subprocess.Popen[bytes]"
    link: Connection
    lifeline: int

    def kill(self) -> None:
        """Kill the process and all its descendants, also those in sessions of their own."""
        known = descendants(self.process.pid)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        end(known, 0.0)


class Child:
    """The process of one function. It starts with the first call, keeps the function's state between calls, and starts again
    after it was killed. It ends when this object or this process does, even if this process is killed.

    `make` is that of `sendable`, `label` names the function in messages, `seconds` limits a call.
    """

    def __init__(self, make: bytes, label: str, seconds: float) -> None:
        self.make, self.label, self.seconds = make, label, seconds
        self._running: Running | None = None
        self._end: Callable[[], Any] = lambda: None

    def start(self) -> None:
        """Start the process, unless it runs. Raises an error if it cannot load the function."""
        if self._running is not None:
            return
        ours, theirs = Pipe()
        read, write = os.pipe()
        code = CODE.format(path=[str(one) for one in sys.path], link=theirs.fileno(), lifeline=read)
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), read),
            start_new_session=True,
        )
        theirs.close()
        os.close(read)
        self._running = running = Running(process, ours, write)
        self._end = weakref.finalize(self, _end, running, os.getpid())
        try:
            late = f"{self.label}: its process did not start within {START:g} s"
            self._exchange(pickle.dumps((self.label, self.make)), START, late)
        except BaseException:
            self.close()
            raise

    def __call__(self, what: str, given: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Call the function and return its result. Raises its error, or RewardError if it takes too long or its process ends;
        `what` says in this message what it was called for."""
        self.start()
        late = (
            f"{self.label} took more than {self.seconds:g} s for {what}; its process was killed. Raise the limit (timeout), or make it "
            "faster"
        )
        return self._exchange(pickle.dumps((tuple(given), dict(named))), self.seconds, late, what)

    def close(self) -> None:
        """Kill the process. The next call starts another one."""
        self._end()
        self._running, self._end = None, lambda: None

    def _exchange(self, message: bytes, seconds: float, late: str, what: str = "its start") -> Any:
        """Send a message and return the reply. Raises RewardError with the text `late` after `seconds`."""
        running, expired = self._running, threading.Event()
        assert running is not None

        def expire() -> None:
            expired.set()
            running.kill()

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        reply: Any = None
        try:
            running.link.send_bytes(message)
            reply = _received(running.link.recv_bytes(), self.label)
        except (EOFError, OSError):  # the process was killed, or ended
            pass
        except BaseException:  # a signal: the reply would be that of the next call
            self.close()
            raise
        finally:
            timer.cancel()
            timer.join()
        if expired.is_set() or reply is None:
            status = None if expired.is_set() else _status(running.process)
            self.close()
            raise RewardError(late if expired.is_set() else f"{self.label}: its process {status} during {what}")
        if reply[0] == "error":
            raise reply[1] from RuntimeError(f"in the process of {self.label}:\n{reply[2]}")
        return reply[1]


def _received(reply: bytes, label: str) -> Any:
    """Return the reply of a process. Raises RewardError if it has a value that this process cannot make."""
    try:
        return pickle.loads(reply)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise RewardError(f"{label}: what it returned cannot be read here ({reason}); return numbers") from error


def _status(process: "subprocess.Popen[bytes]") -> str:
    """Return how a process ended, in words."""
    try:
        code = process.wait(10)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    return f"ended with status {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


def _end(running: Running, owner: int) -> None:
    """Kill a process and close what belongs to it. A copy of this process (a fork) does nothing."""
    if os.getpid() != owner:
        return
    running.kill()
    running.process.wait()
    running.link.close()
    os.close(running.lifeline)
