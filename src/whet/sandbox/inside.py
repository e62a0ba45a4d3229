"""The processes of a sandbox: the supervisor, which confines programs, limits and ends them, and reports how they ended."""

import base64
import json
import os
import re
import selectors
import signal
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from whet.sandbox import calls, confine, kernel

ENDED = re.compile(rb"(?:^|\n)([A-Za-z_][\w.]{0,60})(?::[^\n]*)?\s*$")
"""The last line of a traceback, with the name of the error."""


@dataclass
class Ended:
    """How a program ended: what it wrote, and the reason if it did not end by itself with status 0."""

    output: bytes
    reason: str


def main(owner: int) -> None:
    """Do the job that is on standard input as JSON, and write results to standard output as lines of JSON. `owner` is the process
    that started this one; when it ends, all processes of the sandbox are killed."""
    confine.end_with_parent()
    if os.getppid() != owner:
        os._exit(1)
    job = json.loads(sys.stdin.buffer.read())
    job["user"] = confine.user_of(job["number"])
    if job["namespaces"]:
        confine.enter_namespaces()
        first = os.fork()
        if first:
            for one in job["link"]:
                os.close(one)
            os._exit(int(os.waitpid(first, 0)[1] != 0))
        confine.end_with_parent()
        confine.make_root(job["folder"], job["visible"], job["disk"])
    else:
        signal.signal(signal.SIGTERM, lambda *_: _stop(job))
        confine.end_with_parent(signal.SIGTERM)
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        if os.getuid() == 0:
            os.chown(job["folder"], job["user"], job["user"])
    job["deadline"] = time.monotonic() + job["timeout"]
    with os.fdopen(1, "w", encoding="ascii", closefd=False) as results:
        for given in job["inputs"]:
            over = time.monotonic() >= job["deadline"]
            ended = Ended(b"", f"more than {job['timeout']:g} s") if over else _executed(job, given)
            line = {"output": base64.b64encode(ended.output).decode(), "reason": ended.reason}
            results.write(json.dumps(line) + "\n")
            results.flush()


def _executed(job: Mapping[str, Any], given: str) -> Ended:
    """Run the program of a job once, with `given` on its standard input, in a confined child of this process. In the child, this
    ends with the program."""
    stdin = os.memfd_create("stdin")
    with os.fdopen(os.dup(stdin), "wb") as file:
        file.write(given.encode("utf-8", "surrogatepass"))
    os.lseek(stdin, 0, os.SEEK_SET)
    (out, out_end), (err, err_end), (ready, ready_end) = os.pipe(), os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        _prepare(job, (stdin, out_end, err_end, ready_end))
        _program(job)()
        sys.exit(0)
    for one in (stdin, out_end, err_end, ready_end):
        os.close(one)
    watch = os.pidfd_open(child)
    reason, texts = _followed(job, out, err, watch)
    _kill_all(job)
    _, status, usage = os.wait4(child, 0)
    _reap(job)
    for one, text in texts.items():
        with suppress(BlockingIOError):  # what was left in the pipes
            text += os.read(one, job["output"])[: job["output"]]
    confined = os.read(ready, 1)
    for one in (out, err, ready, watch):
        os.close(one)
    if not confined and not reason:  # its time may be over before it is confined
        raise OSError(f"a program cannot be confined: {bytes(texts[err][-500:]).decode(errors='replace')}")
    return Ended(bytes(texts[out]), reason or _reason(status, usage.ru_utime + usage.ru_stime, job, bytes(texts[err])))


def _prepare(job: Mapping[str, Any], ends: Sequence[int]) -> None:
    """Confine a new child: `ends` become its standard streams, and one that gets a byte when it is confined."""
    try:
        link = [os.dup(one) for one in job["link"]]
        streams = [os.dup(one) for one in ends]
        high = [os.dup2(one, 500 + place) for place, one in enumerate([*streams, *link])]
        for place, one in enumerate(high):
            os.dup2(one, place)
        os.closerange(len(high), 1 << 16)
        for one in range(len(high)):
            os.set_inheritable(one, False)
        sys.stdin = os.fdopen(0, encoding="utf-8", errors="surrogateescape", closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        confine.confine(job, secret=job["kind"] != "answer")
        with os.fdopen(3, "wb") as file:
            file.write(b"1")
    except BaseException as error:
        with os.fdopen(2, "w") as file:
            file.write(f"{type(error).__name__}: {error}")
        os._exit(1)


def _program(job: Mapping[str, Any]) -> Callable[[], Any]:
    """Return what a child runs."""
    sys.path[:] = job["path"]
    sys.argv[:] = ["solution.py"]
    if job["kind"] == "answer":
        return lambda: calls.serve(job["code"], 4, 5)
    if job["kind"] == "tests":
        return lambda: calls.test(job["tests"], job["entry"], job["code"], *([4, 5] if job["link"] else []))
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    return lambda: calls.execute(job["code"], module)


def _followed(job: Mapping[str, Any], out: int, err: int, watch: int) -> tuple[str, dict[int, bytearray]]:
    """Read what a child writes until it ends, writes too much, or the time is over. Return why it must end ("" if it ended by
    itself) and what it wrote, by file descriptor."""
    texts, most = {out: bytearray(), err: bytearray()}, job["output"]
    counts = {out: 0, err: 0}
    with selectors.DefaultSelector() as selector:
        for one in (out, err, watch):
            os.set_blocking(one, False)
            selector.register(one, selectors.EVENT_READ)
        while True:
            left = job["deadline"] - time.monotonic()
            if left <= 0:
                return f"more than {job['timeout']:g} s", texts
            for key, _ in selector.select(left):
                if key.fd == watch:
                    return "", texts
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fd)
                counts[key.fd] += len(data)
                texts[key.fd] += data
                if key.fd == err:
                    del texts[err][:-4096]
                if counts[key.fd] > most:
                    return f"more than {most} bytes of output", texts


def _kill_all(job: Mapping[str, Any]) -> None:
    """Kill every process of the sandbox other than this one."""
    if job["namespaces"]:
        with suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # process 1 of a namespace reaches those of the namespace
        return
    if os.getuid() == 0:  # only programs of this sandbox have this user id
        killer = os.fork()
        if not killer:
            confine.leave_user(job["user"])
            with suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
            os._exit(0)
        os.waitpid(killer, 0)
    for one in _descendants(os.getpid()):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(one, signal.SIGKILL)


def _descendants(root: int) -> list[int]:
    """Return the descendants of a process. Orphans are among them, since this process is their reaper."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    found = [root]
    for one in found:
        found += [pid for pid, parent in parents.items() if parent == one]
    return found[1:]


def _reap(job: Mapping[str, Any]) -> None:
    """Wait for all children, orphans too, until none is left."""
    with suppress(ChildProcessError):
        while True:
            _kill_all(job)
            os.waitpid(-1, 0)


def _stop(job: Mapping[str, Any]) -> NoReturn:
    _reap(job)
    os._exit(1)


def _reason(status: int, seconds: float, job: Mapping[str, Any], err: bytes) -> str:
    """Return why a program failed, in a few words; "" if it ended with status 0."""
    code = os.waitstatus_to_exitcode(status)
    if code in (-signal.SIGXCPU, -signal.SIGKILL) and seconds > job["cpu_time"] - 0.2:
        return f"more than {job['cpu_time']:g} s of CPU time"
    if code < 0:
        with suppress(ValueError):
            return f"ended by {signal.Signals(-code).name}"
        return f"ended by signal {-code}"
    if not code:
        return ""
    found = ENDED.search(err)
    return (
        found[1].decode() if found and (b"Traceback" in err or found[1].endswith(b"Error")) else f"exit status {code}"
    )
