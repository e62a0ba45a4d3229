"""A worker process of the cluster: what it holds is asked by name, and its death and its errors come out as what they are."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from whet.distributed import host
from whet.errors import AttemptFailed, WhetError, WorkerDied, first_line

T = TypeVar("T")

START = 60.0
"""Seconds that a process has to start, once it has a place."""
GRACE = 20.0
"""Seconds that workers have to answer, once another one failed in the same call."""


@dataclass(frozen=True)
class Process:
    """A process for good: an id is used again by others, a machine, an id and a start together are not."""

    host: str
    pid: int
    began: str

    @classmethod
    def of(cls, pid: int) -> "Process":
        """The process that has this id now, on this machine."""
        return cls(host(), pid, _began(pid))

    @property
    def lives(self) -> bool:
        """It runs on this machine; a dead one that nobody has asked about yet does not count."""
        return self.host == host() and bool(self.began) and _began(self.pid) == self.began

    def kill(self) -> None:
        """End it where it is on this machine; elsewhere nothing. It may be an orphan that Ray has lost."""
        if self.lives:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGKILL)


def _began(pid: int) -> str:
    """When the process began, in the kernel's own unit; "" when it does not run."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


@dataclass(frozen=True)
class Where:
    """Which process a worker is, and on which node and address."""

    process: Process
    node: str
    address: str


class Body:
    """What runs in a worker process: it holds one thing and calls its methods."""

    def prepare(self, paths: Sequence[str], folder: str, gpu: bool) -> Where:
        """The driver's paths count here too, so that its functions are found. Says where this is."""
        import ray

        if not gpu:  # Ray shows all of the machine's to who asked for none
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

        sys.path += [path for path in paths if path not in sys.path]
        if os.path.isdir(folder):
            os.chdir(folder)
        return Where(Process.of(os.getpid()), ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())

    def hold(self, make: Callable[[], Any]) -> None:
        """Make the thing."""
        self.thing = make()

    def ask(self, method: str, given: Sequence[Any], extra: Any = None) -> Any:
        """What a method of the thing gives; `extra` is a further argument that traveled alone."""
        found = getattr(self.thing, method)(*given, *(() if extra is None else (extra,)))
        return list(found) if isinstance(found, Iterator) else found


class Remote:
    """A worker process, seen from the driver. `name` is what errors call it.

    Raises WorkerDied where it cannot be started, AttemptFailed where there is no place for it any more.
    """

    def __init__(self, name: str, options: dict[str, Any], *, limit: float) -> None:
        import ray

        self.name, self.limit, self.dead = name, limit, ""
        kind: Any = ray.remote(Body)
        self.actor = kind.options(max_restarts=0, max_task_retries=0, **options).remote()
        self.processes: list[Process] = []
        gpu = options.get("num_gpus", 0) > 0
        self.where: Where = self._get(
            self.actor.prepare.remote([*sys.path, os.getcwd()], os.getcwd(), gpu), START, AttemptFailed
        )
        self.processes = [self.where.process]

    def hold(self, make: Callable[[], Any]) -> "Remote":
        """Make the thing there. Raises what making it raises."""
        try:
            self._get(self.actor.hold.remote(make), self.limit)
        except BaseException:
            self.end()
            raise
        return self

    def start(self, method: str, given: Any = (), extra: Any = None) -> Any:
        """Ask, and get a reference to the answer. Raises WorkerDied where it is known to be dead."""
        if self.dead:
            raise WorkerDied(f"cluster: {self.name} {self.dead}")
        return self.actor.ask.remote(method, given, extra)

    def ask(self, method: str, *given: Any, extra: Any = None, limit: float | None = None) -> Any:
        """Ask, and wait for the answer. Raises WorkerDied when it died, and what the thing raised as itself."""
        return self._get(self.start(method, given, extra), self.limit if limit is None else limit)

    def answer(self, reference: Any, limit: float | None = None) -> Any:
        """The answer to what was asked with `start`. Raises what `ask` raises."""
        return self._get(reference, self.limit if limit is None else limit)

    def _get(self, reference: Any, limit: float, silent: type[WorkerDied] = WorkerDied) -> Any:
        import ray

        try:
            return ray.get(reference, timeout=limit)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if cause is not error and isinstance(cause, ray.exceptions.RayError):
                # its own work did not fail: what was to be sent to it died with its keeper
                raise AttemptFailed(f"cluster: {self.name} was sent what is lost ({first_line(cause)})") from error
            raise cause from (None if isinstance(cause, WhetError) else error)
        except ray.exceptions.GetTimeoutError:
            self.kill(f"did not answer within {limit:g} s")
            raise silent(f"cluster: {self.name} {self.dead}") from None
        except ray.exceptions.RayError as error:
            self.kill("died")
            raise WorkerDied(f"cluster: {self.name} died ({first_line(error)})") from error

    def kill(self, why: str = "was ended") -> None:
        """Ray is asked to kill it, and it is not asked anything any more."""
        import ray

        self.dead = self.dead or why
        with suppress(Exception):  # Ray may know nothing of it any more
            ray.kill(self.actor, no_restart=True)

    def end(self) -> bool:
        """Kill it and all that it started; where it is on this machine, it is gone then. May be called again.

        A process that Ray has lost, or that hangs, does not hear Ray and is killed by its id.
        """
        self.kill()
        for seconds in (1.0, 5.0):
            until = time.monotonic() + seconds
            while any(process.lives for process in self.processes) and time.monotonic() < until:
                time.sleep(0.02)
            for process in self.processes:
                process.kill()
        return not any(process.lives for process in self.processes)


def ended(workers: Sequence[Remote]) -> list[Remote]:
    """All are killed at the same time; those on this machine that do not end."""
    for one in workers:
        one.kill()
    return [one for one in workers if not one.end()]


def first_to_fail(asked: Mapping[Any, Remote], limit: float) -> None:
    """All that was asked is waited for. What fails first is raised at once: the others may wait for it in vain."""
    import ray

    pending = dict(asked)
    while pending:
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=limit)
        if not ready:
            names = ", ".join(one.name for one in pending.values())
            raise WorkerDied(f"cluster: {names} did not answer within {limit:g} s")
        for reference in ready:
            pending.pop(reference).answer(reference)


def in_step(workers: Sequence[Remote], method: str, given: Sequence[Any], limit: float) -> list[Any]:
    """What the same call gave in each worker. They work together in it: where one died, none of them can go on.

    Raises WorkerDied, all of them killed, when one died or did not answer within `limit` seconds, or within a short while
    after another one failed. What whet's own code raised in any of them is raised as itself.
    """
    import ray

    shared = ray.put(tuple(given))
    pending = {}
    for one in workers:
        pending[one.start(method, shared)] = one
    found: dict[str, Any] = {}
    raised: list[tuple[Remote, Exception]] = []
    until = time.monotonic() + limit
    while pending:
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, until - time.monotonic()))
        for reference in ready:
            one = pending.pop(reference)
            try:
                found[one.name] = one.answer(reference, GRACE)
            except Exception as error:
                raised.append((one, error))
                until = min(until, time.monotonic() + GRACE)
        if not ready:
            break
        if any(one.dead for one, _ in raised):
            break  # the others wait for it in vain
    verdict = _verdict(raised, list(pending.values()), limit)
    if verdict is None:
        return [found[one.name] for one in workers]
    if pending or isinstance(verdict, WorkerDied):
        for one in workers:
            one.kill("was killed, because another worker of its world died")
    raise verdict


def _verdict(raised: Sequence[tuple[Remote, Exception]], silent: Sequence[Remote], limit: float) -> Exception | None:
    """What to tell of a common call: first who died, then what whet found wrong, then who fell silent, then the rest."""
    dead = [error for one, error in raised if one.dead]
    own = [error for _, error in raised if isinstance(error, WhetError)]
    if dead or own:
        return (dead or own)[0]
    plain = [error for _, error in raised if not _broken(error)]
    if plain:  # its own mistake (no memory, no disk): the others wait for it, and nobody died
        return plain[0]
    if silent:
        names = ", ".join(one.name for one in silent)
        return WorkerDied(f"cluster: {names} did not answer within {GRACE if raised else limit:g} s")
    broken = [(one, error) for one, error in raised if _broken(error)]
    if broken:
        one, error = broken[0]
        return WorkerDied(f"cluster: {one.name} lost its connection to the others ({first_line(error)})")
    return raised[0][1] if raised else None


def _broken(error: Exception) -> bool:
    """The process group fell apart under a call: gloo and NCCL tell it in words only."""
    import torch.distributed as dist

    kinds = tuple(kind for kind in (getattr(dist, "DistError", None),) if kind is not None)
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Timed out waiting")
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
