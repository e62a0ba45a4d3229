"""Run a function in a fork of this process with limits of CPU time, wall-clock time and memory, and report how it ended."""

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RAISED = 70
"""Exit status of a function that raised an exception."""


@dataclass(frozen=True)
class Ended:
    """How a function ended: its exit status, or minus the number of the signal; what it printed; its CPU seconds."""

    status: int
    out: str
    error: str
    seconds: float


def limited(call: Callable[[], int], folder: Path, *, seconds: int = 20, mebibytes: int = 2048) -> Ended:
    """Call a function in a fork whose current folder is `folder`, with at most this CPU time and this memory beyond what this
    process has. It is killed after twelve times the CPU time, so that a sleep without end is found on a busy machine too."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _inside(call, folder, out.fileno(), error.fileno(), seconds, mebibytes)
        status, used = _wait(child, time.monotonic() + 12 * seconds)
        texts = []
        for file in (out, error):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
        return Ended(status, texts[0], texts[1], used)


def _inside(
    call: Callable[[], int], folder: Path, out: int, error: int, seconds: int, mebibytes: int
) -> None:  # pragma: no cover
    """The fork. It never returns."""
    status = RAISED
    try:
        os.setsid()
        os.chdir(folder)
        os.dup2(out, 1)
        os.dup2(error, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, errors="backslashreplace")  # noqa: SIM115
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + mebibytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 2))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        status = call()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, until: float) -> tuple[int, float]:
    """Wait for a fork, and kill it when its time is over. Return its exit status or minus its signal, and its CPU seconds."""
    pause = 0.001
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            until = float("inf")
        time.sleep(pause)
        pause = min(0.02, 1.5 * pause)
