"""Worker processes on Ray: remote method calls, with errors and the end of a process reported to the caller."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from whet.errors import AttemptFailed, WhetError, WorkerDied, first_line
from whet.processes import Process

T = TypeVar("T")

START = 60.0
"""Seconds for a process to start after it was placed."""
GRACE = 20.0
"""Seconds for the other workers to answer after one worker failed in the same call."""


@dataclass(frozen=True)
class Where:
    """The process, Ray node and address of a worker."""

    process: Process
    node: str
    address: str


class Body:
    """The actor in a worker process. It holds one object and calls its methods."""

    def prepare(self, paths: Sequence[str], folder: str, gpu: bool) -> Where:
        """Add the driver's import paths and change to its folder, so that its functions are found. Return its `Where`."""
        import ray

        if not gpu:  # Ray shows all GPUs of the machine to an actor that asked for none
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

        sys.path += [path for path in paths if path not in sys.path]
        if os.path.isdir(folder):
            os.chdir(folder)
        return Where(Process.of(os.getpid()), ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())

    def hold(self, make: Callable[[], Any]) -> None:
        """Create the object."""
        self.thing = make()

    def ask(self, method: str, given: Sequence[Any], extra: Any = None) -> Any:
        """Call a method of the object. `extra` is one more argument, which was sent separately."""
        found = getattr(self.thing, method)(*given, *(() if extra is None else (extra,)))
        return list(found) if isinstance(found, Iterator) else found


class Remote:
    """The driver's handle of a worker process. `name` appears in error messages.

    Raises WorkerDied if the process cannot be started, AttemptFailed if it can no longer be placed.
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
        """Create the object in the worker. Raises what its creation raises."""
        try:
            self._get(self.actor.hold.remote(make), self.limit)
        except BaseException:
            self.end()
            raise
        return self

    def start(self, method: str, given: Any = (), extra: Any = None) -> Any:
        """Start a call and return a reference to its result. Raises WorkerDied if the worker is known to be dead."""
        if self.dead:
            raise WorkerDied(f"cluster: {self.name} {self.dead}")
        return self.actor.ask.remote(method, given, extra)

    def ask(self, method: str, *given: Any, extra: Any = None, limit: float | None = None) -> Any:
        """Call a method and wait for its result. Raises WorkerDied if the worker died, and otherwise what the method raised."""
        return self._get(self.start(method, given, extra), self.limit if limit is None else limit)

    def answer(self, reference: Any, limit: float | None = None) -> Any:
        """Wait for the result of a call that `start` began. Raises what `ask` raises."""
        return self._get(reference, self.limit if limit is None else limit)

    def _get(self, reference: Any, limit: float, silent: type[WorkerDied] = WorkerDied) -> Any:
        import ray

        try:
            return ray.get(reference, timeout=limit)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if cause is not error and isinstance(cause, ray.exceptions.RayError):
                # the method itself did not fail: the process that held its argument died before the argument was sent
                raise AttemptFailed(
                    f"cluster: an argument of a call to {self.name} was lost ({first_line(cause)})"
                ) from error
            raise cause from (None if isinstance(cause, WhetError) else error)
        except ray.exceptions.GetTimeoutError:
            self.kill(f"did not answer within {limit:g} s")
            raise silent(f"cluster: {self.name} {self.dead}") from None
        except ray.exceptions.RayError as error:
            self.kill("died")
            raise WorkerDied(f"cluster: {self.name} died ({first_line(error)})") from error

    def kill(self, why: str = "was ended") -> None:
        """Ask Ray to kill the worker, and allow no more calls to it."""
        import ray

        self.dead = self.dead or why
        with suppress(Exception):  # Ray may no longer know the actor
            ray.kill(self.actor, no_restart=True)

    def end(self) -> bool:
        """Kill the worker and the processes it started. Return True if none of them runs on this machine any more.

        A process that hangs, or that Ray no longer knows, does not react to Ray and is killed by its process id. May be
        called more than once.
        """
        self.kill()
        for seconds in (1.0, 5.0):
            until = time.monotonic() + seconds
            while any(process.alive for process in self.processes) and time.monotonic() < until:
                time.sleep(0.02)
            for process in self.processes:
                process.kill()
        return not any(process.alive for process in self.processes)


def ended(workers: Sequence[Remote]) -> list[Remote]:
    """Kill all workers at the same time. Return those on this machine that did not end."""
    for one in workers:
        one.kill()
    return [one for one in workers if not one.end()]


def first_to_fail(asked: Mapping[Any, Remote], limit: float) -> None:
    """Wait for all calls. The first error is raised at once, because the other workers may wait for the failed one forever."""
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
    """Make the same collective call in each worker and return the results. If one worker died, none of them can continue.

    Raises WorkerDied if a worker died, did not answer within `limit` seconds, or did not answer within `GRACE` seconds
    after another one failed; all workers are killed then. An error that whet's own code raised in a worker is raised as
    it is.
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
            break  # the others would wait for the dead worker forever
    verdict = _verdict(raised, list(pending.values()), limit)
    if verdict is None:
        return [found[one.name] for one in workers]
    if pending or isinstance(verdict, WorkerDied):
        for one in workers:
            one.kill("was killed, because another worker of its world died")
    raise verdict


def _verdict(raised: Sequence[tuple[Remote, Exception]], silent: Sequence[Remote], limit: float) -> Exception | None:
    """Return the error to raise for a collective call, or None.

    The order is: a worker that died, an error of whet, any other error that is not a lost connection, a worker that did
    not answer, a lost connection.
    """
    dead = [error for one, error in raised if one.dead]
    own = [error for _, error in raised if isinstance(error, WhetError)]
    if dead or own:
        return (dead or own)[0]
    plain = [error for _, error in raised if not _broken(error)]
    if plain:  # an error of this worker alone (memory or disk full): the others wait for it, and no worker died
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
    """Return True if the process group lost its connection. gloo and NCCL report this only in the text of a RuntimeError."""
    import torch.distributed as dist

    kinds = tuple(kind for kind in (getattr(dist, "DistError", None),) if kind is not None)
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Timed out waiting")
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
