"""The processes that work together: who is which, sums and gathers over them, and how torchrun starts them."""

import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from whet.errors import RestartsExhausted, WorkerDied

T = TypeVar("T")

PORT = "whet/port"
"""Where torchrun's store says the port of the workers' own."""
GLANCE = timedelta(seconds=2)
"""To see whether a store is there."""


@dataclass(frozen=True)
class Workers:
    """Process `rank` of `size`. What is summed or gathered travels through `group`, which carries CPU tensors.

    All of its calls are collective: every process makes the same ones in the same order. Alone, they do nothing.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """This process writes the run folder and talks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a CPU tensor over all processes, the same bits on each."""
        if self.size == 1:
            return values
        import torch.distributed as dist

        out = values.clone()
        dist.all_reduce(out, group=self.group)
        return out

    def gather(self, thing: T) -> list[T]:
        """Every process's thing, by rank."""
        if self.size == 1:
            return [thing]
        import torch.distributed as dist

        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, thing, group=self.group)
        return out

    def broadcast(self, thing: T) -> T:
        """The first process's thing."""
        return self.gather(thing)[0]

    def barrier(self) -> None:
        """All have come this far."""
        self.gather(None)

    def any(self, fact: bool) -> bool:
        """True where it is for one of them."""
        return any(self.gather(fact))

    def together(self, work: Callable[[], T]) -> list[T]:
        """What each process's work gave, by rank. Where one of them failed its error is raised on all, so none waits."""
        found, error = None, None
        try:
            found = work()
        except Exception as raised:
            error = raised
        both = self.gather((found, error if self.size == 1 else _sendable(error)))
        for _, raised_there in both:
            if raised_there is not None:
                raise raised_there if error is None else error
        return [one for one, _ in both]  # type: ignore[misc]

    def shard(self, things: Sequence[T]) -> Sequence[T]:
        """This process's share of the things: every size-th one."""
        return things[self.rank :: self.size]

    def unshard(self, shares: Sequence[Sequence[T]]) -> list[T]:
        """The things in their order again, from every process's share of them."""
        out: list[Any] = [None] * sum(map(len, shares))
        for rank, share in enumerate(shares):
            out[rank :: self.size] = share
        return out


class RestartBudget:
    """How many workers of a run may still die, whatever they do. Raises Spent when it was one too many."""

    def __init__(self, restarts: int) -> None:
        self.restarts, self.deaths = restarts, 0
        self._lock = threading.Lock()

    def spend(self, error: WorkerDied) -> None:
        """One more has died of this."""
        with self._lock:
            self.deaths += 1
            if self.deaths > self.restarts:
                raise RestartsExhausted(
                    f"cluster.restarts: workers died {self.deaths} times and may be started again {self.restarts} times; "
                    f"the last one: {error}"
                ) from error


def run_parallel(works: Sequence[Callable[[], T]]) -> list[T]:
    """What each gives, in threads at the same time; all have ended when the first error is raised."""
    with ThreadPoolExecutor(max(1, len(works)), "whet-at-once") as threads:
        futures = [threads.submit(work) for work in works]
    return [future.result() for future in futures]


def _sendable(error: Exception | None) -> Exception | None:
    """The error, or one that says the same where its own class cannot travel to another process."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def launched() -> bool:
    """torchrun (or another launcher that sets its variables) started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def first() -> bool:
    """Of the processes that a launcher started this is the first one, or it is alone."""
    return os.environ.get("RANK", "0") == "0" or not launched()


def join(
    rank: int | None = None, size: int | None = None, address: str = "", port: int = 0, *, timeout: float = 7200.0
) -> Workers:
    """This process becomes one of the workers: by torchrun's variables, or by what is given.

    The store is one of its own for every attempt: torchrun's keeps addresses of the processes that died, and restarts
    through it hang. It only tells where this one is. `timeout` seconds is how long one waits for another; a launcher ends
    them sooner when one dies.
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


def host() -> str:
    """Which machine this is, or which container on it, since this start of it."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.is_file() else ''}"


def free_port(address: str = "127.0.0.1") -> int:
    """A port at this address of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind((address, 0))
        return one.getsockname()[1]


def note(fact: str) -> None:
    """Tell torchrun's store a fact that later attempts of this launch can ask for; nothing without such a store."""
    told = _launcher()
    if told is not None:
        told.set(f"whet/noted/{fact}", "yes")


def noted(fact: str) -> bool:
    """An attempt of this launch has noted it."""
    told = _launcher()
    return told is not None and told.check([f"whet/noted/{fact}"])


def _launcher() -> Any:
    """torchrun's own store, which outlives its restarts; None with a launcher that has none (nor restarts)."""
    import torch.distributed as dist

    if not launched() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(minutes=5))


def _met(dist: Any, rank: int, size: int, patience: timedelta) -> Any:
    """The store of this attempt; torchrun's own tells where it is.

    Agents of several machines count restarts apart, so an attempt has no number that all of its workers know: the first
    one says its port, and another one that finds nothing there, or a store that its rank was in already, looks again.
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
        except (RuntimeError, ValueError):  # nothing there any more
            if time.monotonic() > until:
                raise
        time.sleep(0.1)


def _store(dist: Any, address: str, port: int, size: int, patience: timedelta, *, owns: bool) -> Any:
    """The first worker's store, or the way to it. It listens on the address alone: by itself it would on all interfaces."""
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
    """The end of the common work: all wait for one another, then the group is taken down."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
