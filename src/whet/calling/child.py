"""The process in which a user's function with a limit of time runs: it loads the function, and calls it for each request."""

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from whet.errors import RewardError, WhetError, sendable_error
from whet.processes import descendants
from whet.registry import called

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that end a run. They do not end this process: the run does."""


def main(link: int, lifeline: int) -> None:
    """Serve requests on the connection with the file descriptor `link` until it is closed.

    The process has a group of its own. When the other end of the pipe `lifeline` is closed, because the process that holds it has
    ended or was killed, the group and the descendants are killed, whatever the function does.
    """
    for one in (link, lifeline):
        os.set_inheritable(one, False)
    _end_with(lifeline, link)
    for signum in SIGNALS:  # the run decides when this process ends; those that the function forks end as usual
        signal.signal(signum, lambda *_: None)
    os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_as_usual)
    connection = Connection(link)
    with suppress(EOFError, OSError):
        label, make = pickle.loads(connection.recv_bytes())
        function = None
        try:
            function = pickle.loads(make)()
            connection.send_bytes(pickle.dumps(("value", None)))
        except BaseException as error:
            connection.send_bytes(_failed(error, f"{label}: its process cannot load it"))
        while function is not None:
            connection.send_bytes(_answer(function, label, connection.recv_bytes()))


def _hold() -> None:
    """Hold signals back, so that one that comes right after a fork finds the handlers of `_as_usual`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _release() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _as_usual() -> None:
    """Let signals end a process that the function has forked."""
    for signum in SIGNALS:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    _release()


def itself(thing: T) -> T:
    """Return the argument. It makes a pickled function into one that returns it."""
    return thing


def _end_with(lifeline: int, link: int) -> None:
    """Start a process that kills this one, its descendants and its group at the end of the pipe. Call this before anything starts
    a thread."""
    watched = os.getpid()
    if os.fork():
        os.close(lifeline)
        return
    try:
        os.close(link)
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        os.read(lifeline, 1)
        for one in descendants(watched):
            if one.pid not in (watched, os.getpid()):
                one.kill()
    finally:
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _answer(function: Callable[..., Any], label: str, request: bytes) -> bytes:
    """Call the function, and return what it returned, or its error."""
    try:
        given, named = pickle.loads(request)
        value = called(function, label, given, named)
        return pickle.dumps(("value", value))
    except BaseException as error:
        return _failed(error, f"{label}: what it returned cannot be sent to the run")
    finally:
        sys.stdout.flush()


def _failed(error: BaseException, otherwise: str) -> bytes:
    """Return an error as a reply; `otherwise` says what failed if the error is not whet's."""
    trace = "".join(traceback.format_exception(error))
    if not isinstance(error, WhetError):
        error = RewardError(f"{otherwise}: {type(error).__name__}: {error}")
    if sendable_error(error) is not error:  # an error class of the user with arguments that cannot be sent
        error = RewardError(str(error))
    return pickle.dumps(("error", error, trace))
