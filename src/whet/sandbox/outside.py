"""Run programs in a sandbox, from the process that uses it: limits, what this machine can do, and results."""

import base64
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from whet.errors import RecipeError, RewardError
from whet.sandbox import kernel

SOURCE = str(Path(__file__).parents[2])
CODE = "import sys; sys.path.insert(0, {0!r}); from whet.sandbox.inside import main; sys.path.remove({0!r}); main({1})"
MORE = 3.0
"""Seconds that a sandbox has beyond its limit to report."""


@dataclass(frozen=True)
class Limits:
    """Limits of the programs of one answer."""

    cpu_time: float = 5.0
    """CPU time of each process, in seconds"""
    timeout: float = 15.0
    """time of all programs together, in seconds"""
    memory: int = 512 << 20
    """address space of each process, in bytes"""
    processes: int = 8
    """processes and threads at the same time"""
    disk: int = 64 << 20
    """size of all files together, in bytes"""
    file_size: int = 16 << 20
    """size of one file, in bytes"""
    open_files: int = 64
    """open files of each process"""
    output: int = 1 << 20
    """what one program may write to each of standard output and error, in bytes"""


@dataclass(frozen=True)
class Abilities:
    """What a sandbox uses on this machine."""

    namespaces: bool
    landlock: bool
    seccomp: bool

    def words(self) -> str:
        """Return what confines programs, as text."""
        parts = ["namespaces of processes, files and network"] if self.namespaces else []
        parts += [f"Landlock {kernel.landlock_version()}"] if self.landlock else []
        parts += ["seccomp"] if self.seccomp else []
        parts += ["a user without rights"] if os.getuid() == 0 else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Result:
    """How one program ended: what it wrote to standard output, and why it failed, "" if it did not."""

    output: bytes
    reason: str


FOLDER = "whet-sandbox-"
"""What the names of the folders of sandboxes begin with, before the id of the process."""


@cache
def _sweep() -> None:
    """Remove the empty folders that processes of this user left which were killed. Once per process."""
    for path in Path(tempfile.gettempdir()).glob(f"{FOLDER}*-*"):
        pid = path.name.removeprefix(FOLDER).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            with suppress(OSError):  # of another user, or not empty
                path.rmdir()


class Runner:
    """Run programs, some at the same time. `stop` kills those that run, and lets no more begin."""

    def __init__(self, limits: Limits, abilities: Abilities | None = None, packages: bool = False) -> None:
        self.limits, self.packages, self.stopped = limits, packages, False
        self.abilities = abilities or found_abilities()
        self.running: set[subprocess.Popen[bytes]] = set()

    def stop(self) -> None:
        """Kill all that runs."""
        self.stopped = True
        for one in list(self.running):
            self._kill(one)

    def _kill(self, process: "subprocess.Popen[bytes]") -> None:
        """End a sandbox with all its processes."""
        if not self.abilities.namespaces:  # it kills them itself
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(5.0)
        process.kill()  # with namespaces the kernel then kills all

    def programs(self, code: str, inputs: Sequence[str]) -> list[Result]:
        """Run a program once for each text on its standard input, in one sandbox. Raises RewardError if the sandbox fails."""
        with self._launched({"kind": "program", "code": code, "inputs": list(inputs)}) as process:
            results = self._results(process)
        rest = Result(b"", results[-1].reason if results and results[-1].reason else "the sandbox was killed")
        return results + [rest] * (len(inputs) - len(results))

    def tests(self, code: str, tests: Sequence[str], entry: str, *, apart: bool) -> list[str]:
        """Run tests. Return for each why it failed, "" if it passed; one reason if the tests could not be run. With `apart` the program
        runs in a sandbox of its own, so that nothing that it does can make a test pass. Raises RewardError if a sandbox fails."""
        job = {"kind": "tests", "code": code, "tests": list(tests), "entry": entry, "inputs": [""]}
        if not apart:
            with self._launched(job) as process:
                results = self._results(process)
            return _outcome(results, "")
        (here, there), (back, forth) = os.pipe(), os.pipe()
        with self._launched({"kind": "answer", "code": code, "inputs": [""]}, (here, forth)) as program:
            with self._launched(job | {"code": ""}, (back, there), more=1.0) as process:
                results = self._results(process)
            with suppress(subprocess.TimeoutExpired):
                program.wait(2.0 if any("the program ended" in one.output.decode() for one in results) else 0.0)
            ended = program.poll() is not None
            self._kill(program)
            own = self._results(program) if ended else []
        reason = own[0].reason if own else f"more than {self.limits.timeout:g} s"
        return _outcome(results, reason if re.match("more than|ended by", reason) else "the program ended")

    @contextmanager
    def _launched(
        self, job: dict[str, Any], link: tuple[int, ...] = (), more: float = 0.0
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """Start a sandbox with a job, and end it at the end of the context. It gets the file descriptors `link`, which are closed
        here."""
        _sweep()
        folder = tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-")
        process = None
        try:
            limits = asdict(replace(self.limits, timeout=self.limits.timeout + more))
            shared = not self.abilities.namespaces and os.getuid() != 0
            own = {"processes": self.limits.processes + (_threads() if shared else 0), "link": link, "folder": folder}
            job = {
                **limits,
                **asdict(self.abilities),
                **_paths(self.packages),
                **job,
                **own,
                "number": secrets.randbits(28),
            }
            python = getattr(sys, "_base_executable", None) or sys.executable
            process = subprocess.Popen(
                [python, "-S", "-s", "-P", "-c", CODE.format(SOURCE, os.getpid())],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
                cwd=folder, pass_fds=link, start_new_session=True,
            )  # fmt: skip
            for one in link:
                os.close(one)
            link = ()
            self.running.add(process)
            if self.stopped:
                self._kill(process)
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(job).encode())
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.stdin = None
            yield process
        finally:
            for one in link:
                os.close(one)
            if process is not None:
                self._kill(process)
                process.communicate()
                self.running.discard(process)
            shutil.rmtree(folder, ignore_errors=True)

    def _results(self, process: "subprocess.Popen[bytes]") -> list[Result]:
        """Wait for the results of a sandbox. Raises RewardError if it failed."""
        try:
            out, err = process.communicate(timeout=self.limits.timeout + MORE)
        except subprocess.TimeoutExpired:
            self._kill(process)
            out, err = process.communicate()
        if process.returncode not in (0, -9):
            raise RewardError(f"the sandbox failed: {_last_line(err)}")
        lines = [json.loads(line) for line in out.splitlines()]
        return [Result(base64.b64decode(line["output"]), str(line["reason"])) for line in lines]


def _outcome(results: Sequence[Result], ended: str) -> list[str]:
    """Return the reasons of the tests from what the process of the tests wrote. `ended` is the reason why the program ended."""
    if not results:
        return [ended or "the tests took too long"]
    said = [json.loads(line) for line in re.findall(rb"[^\n]+\n", results[0].output)]
    if not said or not isinstance(said[0], int):
        return [results[0].reason or ended or "the tests ended early"]
    rest = results[0].reason or "the tests ended early"
    reasons = ["" if one is None else str(one) or "an error" for one in said[1:]][: said[0]]
    reasons = [(ended or one) if one == "the program ended" else one for one in reasons]
    return reasons + [rest] * (said[0] - len(reasons))


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else "it wrote nothing"


def _threads() -> int:
    """Return how many threads this user has; a limit of processes counts them all."""
    count = 0
    for one in psutil.process_iter(["uids", "num_threads"]):
        uids = one.info["uids"]
        count += (one.info["num_threads"] or 1) if uids and uids.real == os.getuid() else 0
    return count


@cache
def _paths(packages: bool) -> dict[str, list[str]]:
    """Return the paths that a sandbox shows, and sys.path in it."""
    library = [os.path.dirname(os.__file__), *(one for one in sys.path if one.endswith("lib-dynload"))]
    own = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")] if packages else []
    base = [sys.base_prefix, sys.base_exec_prefix, *library, *own]
    base += ["/nix/store"] if sys.base_prefix.startswith("/nix") else []
    wanted = [
        "/usr",
        "/lib",
        "/lib32",
        "/lib64",
        "/bin",
        "/etc/ld.so.cache",
        *(os.path.realpath(one) for one in base),
        *base,
    ]
    known = [one for one in dict.fromkeys(wanted) if os.path.exists(one) and one not in ("/", "")]
    tops = [one for one in known if not any(one != other and one.startswith(f"{other}/") for other in known)]
    path = [*library, *own]
    return {"visible": tops, "path": [one for one in dict.fromkeys(path) if os.path.isdir(one)]}


@cache
def found_abilities() -> Abilities:
    """Return what can confine programs on this machine, by trying it. Raises RecipeError, with the reasons, if it is not enough."""
    if platform.system() != "Linux":
        raise RecipeError(f"programs can be confined on Linux alone, and this is {platform.system()}")
    landlock, seccomp = kernel.landlock_version(), kernel.has_seccomp()
    whole = Abilities(True, landlock > 0, seccomp)
    reasons = _tried(whole)
    if not reasons:
        return whole
    least = 1 if os.getuid() == 0 else 3
    if landlock < least or not seccomp:
        version = f"Landlock {landlock}, of which version {least} is needed" if landlock else "no Landlock"
        more = "seccomp" if seccomp else f"no table of system calls of {platform.machine()} for seccomp"
        raise RecipeError(
            f"programs cannot be confined on this machine: it allows no namespaces ({reasons}), and there is {version}, and {more}; "
            "allow namespaces of users (in a container: its security profile), or leave this reward out"
        )
    part = Abilities(False, True, True)
    more = _tried(part)
    if more:
        raise RecipeError(f"programs cannot be confined on this machine: with namespaces: {reasons}; without: {more}")
    return part


def _tried(abilities: Abilities) -> str:
    """Run a program. Return why this failed, "" if it did not."""
    try:
        found = Runner(Limits(), abilities).programs("import csv, decimal, math, random\nprint(input())", ["a"])[0]
    except RewardError as error:
        return str(error)
    return "" if found == Result(b"a\n", "") else f"a program wrote {found.output!r:.40} ({found.reason})"
