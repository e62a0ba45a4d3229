"""Process groups: ranks, collective operations, startup with torchrun, and the restart budget."""

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from whet.errors import RestartsExhausted, WorkerDied, sendable_error
from whet.terminal import caution

T = TypeVar("T")

PORT = "whet/port"
"""Key in torchrun's store under which rank 0 publishes the port of the workers' own store."""
GLANCE = timedelta(seconds=2)
"""How long to wait for a connection to a store."""


@dataclass(frozen=True)
class Workers:
    """Process `rank` of `size`. `group` is the process group for sums and gathers of CPU tensors and objects.

    `sum`, `gather`, `broadcast`, `barrier`, `any` and `together` are collective: every process must make the same calls in
    the same order. With a single process they communicate nothing.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """True on rank 0, the process that writes the run folder and prints messages."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a CPU tensor over all processes, bitwise equal on each."""
        if self.size == 1:
            return values
        import torch.distributed as dist

        out = values.clone()
        dist.all_reduce(out, group=self.group)
        return out

    def gather(self, thing: T) -> list[T]:
        """Return the objects of all processes, in order of rank."""
        if self.size == 1:
            return [thing]
        import torch.distributed as dist

        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, thing, group=self.group)
        return out

    def broadcast(self, thing: T) -> T:
        """Return the object of rank 0."""
        return self.gather(thing)[0]

    def barrier(self) -> None:
        """Wait until all processes have reached this call."""
        self.gather(None)

    def any(self, fact: bool) -> bool:
        """Return True if `fact` is true on at least one process."""
        return any(self.gather(fact))

    def together(self, work: Callable[[], T]) -> list[T]:
        """Call `work` on each process and return all results in order of rank. If it fails on one process, all processes
        raise, so that none waits for another."""
        found, error = None, None
        try:
            found = work()
        except Exception as raised:
            error = raised
        both = self.gather((found, error if self.size == 1 else sendable_error(error)))
        for _, raised_there in both:
            if raised_there is not None:
                raise raised_there if error is None else error
        return [one for one, _ in both]  # type: ignore[misc]

    def shard(self, things: Sequence[T]) -> Sequence[T]:
        """Return this process's share of the objects: every size-th one, starting at the rank."""
        return things[self.rank :: self.size]


class RestartBudget:
    """The number of times that workers of a run, of any kind, may be restarted."""

    def __init__(self, restarts: int) -> None:
        self.restarts, self.deaths = restarts, 0
        self._lock = threading.Lock()

    def spend(self, error: WorkerDied) -> None:
        """Count one more worker that died of this error. Raises RestartsExhausted when the budget is used up."""
        with self._lock:
            self.deaths += 1
            if self.deaths > self.restarts:
                raise RestartsExhausted(
                    f"cluster.restarts: workers died {self.deaths} times and may be started again {self.restarts} times; "
                    f"the last one: {error}"
                ) from error
            caution(f"{error}; starting again, {self.deaths} of {self.restarts}")


def run_parallel(works: Sequence[Callable[[], T]]) -> list[T]:
    """Call all functions in parallel threads and return their results. An error is raised after all threads have ended."""
    with ThreadPoolExecutor(max(1, len(works)), "whet-at-once") as threads:
        futures = [threads.submit(work) for work in works]
    return [future.result() for future in futures]


def launched() -> bool:
    """Return True if torchrun, or another launcher that sets the same variables, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def first() -> bool:
    """Return True if this process is rank 0 of those that a launcher started, or was not started by a launcher."""
    return os.environ.get("RANK", "0") == "0" or not launched()


def join(
    rank: int | None = None, size: int | None = None, address: str = "", port: int = 0, *, timeout: float = 7200.0
) -> Workers:
    """Join the process group as one of the workers, by torchrun's variables or by the given arguments.

    Every attempt has its own store, because torchrun's store keeps the addresses of processes that died, and restarts
    through it hang. torchrun's store is used only to publish the port of this store. `timeout` is how long a worker waits
    for another, in seconds; a launcher ends the workers sooner if one dies.
    """
    import torch.distributed as dist

    patience = timedelta(seconds=timeout)
    if rank is None or size is None:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = _met(dist, rank, size, patience)
    else:
        store = _store(dist, address, port, size, patience, owns=rank == 0)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    return Workers(rank, size, dist.new_group(backend="gloo", timeout=patience) if size > 1 else None)


def free_port(address: str = "127.0.0.1") -> int:
    """Return an unused port at this address of this machine."""
    with socket.socket() as one:
        one.bind((address, 0))
        return one.getsockname()[1]


def note(fact: str) -> None:
    """Record a fact in torchrun's store, for later attempts of this launch. Do nothing if there is no such store."""
    told = _launcher()
    if told is not None:
        told.set(f"whet/noted/{fact}", "yes")


def noted(fact: str) -> bool:
    """Return True if an attempt of this launch has recorded the fact."""
    told = _launcher()
    return told is not None and told.check([f"whet/noted/{fact}"])


def _launcher() -> Any:
    """Connect to torchrun's own store, which is kept over restarts. None if the launcher has no store (and no restarts)."""
    import torch.distributed as dist

    if not launched() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(minutes=5))


def _met(dist: Any, rank: int, size: int, patience: timedelta) -> Any:
    """Create or connect to the store of this attempt. torchrun's own store tells its port.

    torchrun's agents on several machines count restarts separately, so no attempt number is known to all workers. Rank 0
    publishes the port of its store. Another rank that finds no store there, or a store that its rank joined before (one of
    an earlier attempt), tries again.
    """
    address, told = os.environ["MASTER_ADDR"], _launcher()
    if told is None:
        return _store(dist, address, int(os.environ["MASTER_PORT"]), size, patience, owns=rank == 0)
    if rank == 0:
        port = free_port(address)
        store = _store(dist, address, port, size, patience, owns=True)
        told.set(PORT, str(port))
        return store
    until = time.monotonic() + patience.total_seconds()
    while True:
        try:
            store = _store(dist, address, int(told.get(PORT)), size, GLANCE, owns=False)
            if store.add(f"whet/here/{rank}", 1) == 1:
                store.set_timeout(patience)
                return store
        except (RuntimeError, ValueError):  # the store of an earlier attempt, which no longer exists
            if time.monotonic() > until:
                raise
        time.sleep(0.1)


def _store(dist: Any, address: str, port: int, size: int, patience: timedelta, *, owns: bool) -> Any:
    """Create rank 0's store, or connect to it. It listens on `address` only; by default it would listen on all interfaces."""
    if not owns:
        return dist.TCPStore(address, port, size, is_master=False, timeout=patience, wait_for_workers=False)
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind((address, port))
        own.listen()
        return dist.TCPStore(
            address, port, size, is_master=True, timeout=patience, master_listen_fd=own.detach(), wait_for_workers=False
        )


def leave() -> None:
    """Wait for all processes, then destroy the process group."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
