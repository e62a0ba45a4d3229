"""A learner whose workers are Ray actors. Each call is made in all workers, and the result of the first one is returned."""

import os
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from whet.cluster.folders import WeightWriter, contents, unpacked
from whet.cluster.placement import Placement
from whet.cluster.worker import START, Remote, ended, first_to_fail, in_step
from whet.data import Batch, Weights
from whet.data.files import replace_folder
from whet.distributed import Workers, free_port, join, run_parallel
from whet.errors import RunStopped, WhetError, WorkerDied
from whet.generate.base import Generator, all_logprobs, whole
from whet.learner.base import UpdateResult, Work
from whet.learner.local import LocalLearner
from whet.private import remove_owned

PORTS = 3
"""Number of ports to try. Another program may take a port after it was chosen and before it is used."""

Make = Callable[[Workers], LocalLearner]
"""Build a learner in one of the workers. The function is sent there, so it must be picklable."""


class MoreLearners(WorkerDied):
    """No worker died, but more learners can be placed now. The run continues with them from the checkpoint just saved."""


@dataclass(frozen=True)
class Pushed:
    """Published weights: a folder with safetensors files (or an adapter) on one node, and its files for other nodes."""

    folder: Path
    node: str
    keeper: Remote = field(repr=False)
    _cache: list[Any] = field(default_factory=list, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight with its name, for a generator in the driver's own process."""
        import ray

        if self.folder.is_dir():  # the path has a random part, so this is the published folder
            yield from whole(Weights(0, self.folder))
            return
        with unpacked(ray.get(self.files())) as folder:
            yield from whole(Weights(0, folder))

    def files(self) -> Any:
        """Return a reference to the folder's files in the object store. The files are read once for all nodes."""
        with self._lock:
            if not self._cache:
                self._cache.append(self.keeper.start("files", (self.folder,)))
            return self._cache[0]


class ClusterLearner:
    """The learner that `make` builds in each worker. The number of workers is the number of learners in `placement`.

    attempt   id of the attempt; it is part of every path in shared memory
    push      what `publish` returns: all weights, only the adapter, or nothing if the workers generate themselves
    answers   builds, in each worker, a generator that uses the worker's learner (see `Inside`)
    limit     longest duration of a call in seconds

    Calls raise the errors of the workers unchanged. They raise WorkerDied if a worker died or did not answer; all other
    workers are killed then. The first call after a save raises MoreLearners if more workers can be placed.
    """

    def __init__(
        self,
        make: Make,
        placement: Placement,
        *,
        attempt: str,
        push: Literal["weights", "adapter", "nothing"] = "weights",
        answers: Callable[[LocalLearner], Generator] | None = None,
        limit: float = 1800.0,
    ) -> None:
        self.workers, self.version = Workers(), 0
        self.placement, self.push, self.limit = placement, push, limit
        self.remotes: list[Remote] = []
        self._attempt, self._number, self._grows = attempt, 0, False
        try:
            for tried in range(PORTS):
                self._start()
                if self._join(last=tried + 1 == PORTS):
                    break
            self.low_precision: bool = self._all("build", make, answers, push, attempt)
        except BaseException:
            self.close()
            raise

    def measure(self, batch: Batch, columns: frozenset[str]) -> Batch:
        """See `Learner.measure`."""
        return batch.with_columns(**self._all("measure", batch, columns))

    def columns(self, name: str, batch: Batch, bare: frozenset[str]) -> Mapping[str, Tensor]:
        """See `Learner.columns`."""
        return self._all("call", "columns", name, batch, bare)

    def rehearse(self, batch: Batch, columns: Mapping[str, frozenset[str]]) -> None:
        """See `Learner.rehearse`."""
        self._all("call", "rehearse", batch, columns)

    def update(self, work: Work) -> UpdateResult:
        """See `Learner.update`."""
        return self._all("call", "update", list(work))

    def forward_backward(self, work: Work) -> UpdateResult:
        """See `Learner.forward_backward`."""
        return self._all("call", "forward_backward", list(work))

    def optim_step(self) -> UpdateResult:
        """See `Learner.optim_step`."""
        return self._all("call", "optim_step")

    def evaluate(self, work: Work) -> UpdateResult:
        """See `Learner.evaluate`."""
        return self._all("call", "evaluate", list(work))

    def publish(self) -> Weights:
        """Write the policy's weights to a folder in shared memory (see `Pushed`). Write nothing if the workers generate."""
        if self.push == "nothing":
            return Weights(self.version, None)
        self._number += 1
        folder = self._all("publish", self._number)
        return Weights(self.version, Pushed(folder, self.remotes[0].where.node, self.remotes[0]))

    def blend(self, target: str, source: str, mix: float) -> None:
        """See `Learner.blend`."""
        self._all("call", "blend", target, source, mix)

    def rescale(self, role: str, scale: float, shift: float) -> None:
        """See `Learner.rescale`."""
        self._all("call", "rescale", role, scale, shift)

    def save(self, folder: Path) -> None:
        """See `Learner.save`. Every worker must see the folder. Afterwards, check whether more workers can be placed."""
        self._all("call", "save", folder.absolute())
        self._grows = self.placement.grows()

    def load(self, folder: Path, accepted: Collection[str] = ()) -> None:
        """See `Learner.load`."""
        self._all("call", "load", folder.absolute(), tuple(accepted))

    def export(
        self,
        role: str,
        folder: Path,
        tokenizer: Any = None,
        *,
        merge: bool = True,
        end_ids: Sequence[int] | None = None,
    ) -> None:
        """See `Learner.export`. The workers write to a temporary folder of this attempt, and the driver renames it. So a
        worker that still runs after its attempt was lost cannot change the exported folder."""
        folder = folder.absolute()
        aside = folder.with_name(f".{folder.name}-{self._attempt}")
        self._all("export", role, aside, tokenizer, merge, end_ids)
        replace_folder(aside, folder)
        for old in folder.parent.glob(f".{folder.name}-*"):
            remove_owned(old)

    def ask(self, method: str, *given: Any) -> Any:
        """Call a method of the generators in all workers, and return the result of the first one."""
        return self._all("answer", method, *given)

    def close(self) -> None:
        """End all workers and remove the published weights. May be called more than once."""
        for one in self.remotes[:1]:
            with suppress(WhetError):
                one.ask("close", limit=5.0)
        ended(self.remotes)

    def _all(self, method: str, *given: Any) -> Any:
        if self._grows:
            raise MoreLearners("cluster: more learner workers can be placed now")
        told = in_step(self.remotes, method, given, self.limit)
        versions = [version for version, _ in told]
        if len(set(versions)) > 1:
            raise RunStopped(f"cluster: the learner's workers are at different versions, {versions}")
        self.version = versions[0]
        return told[0][1]

    def _start(self) -> None:
        size = self.placement.learners

        def started(rank: int) -> None:
            one = Remote(f"learner {rank} of {size}", self.placement.learner(rank), limit=self.limit)
            self.remotes.append(one)
            one.hold(Member)

        run_parallel([partial(started, rank) for rank in range(size)])
        self.remotes.sort(key=lambda one: int(one.name.split()[1]))

    def _join(self, *, last: bool) -> bool:
        """Connect all workers to one process group. If the port is in use, end all workers and return False.

        With `last`, raise the error instead.
        """
        first = self.remotes[0].where
        near = len({one.where.process.host for one in self.remotes}) == 1
        address = "127.0.0.1" if near else first.address
        port = self.remotes[0].ask("port", address, limit=START)
        asked = [
            one.start("join", (rank, len(self.remotes), address, port, "" if near else one.where.address, self.limit))
            for rank, one in enumerate(self.remotes)
        ]
        try:
            first_to_fail(dict(zip(asked, self.remotes, strict=True)), self.limit)
        except Exception as error:
            taken = "in use" in str(error).lower()
            ended(self.remotes)
            if last or not taken:
                raise
            self.remotes.clear()
            return False
        return True


class Inside:
    """The generators in the learner's workers as one Generator. The weights stay in these processes."""

    def __init__(self, learner: ClusterLearner) -> None:
        self.learner = learner
        self.version, self.reports = learner.ask("about")

    def generate(self, requests: Sequence[Any]) -> Any:
        """See `Generator.generate`."""
        yield from self.learner.ask("generate", list(requests))

    def load_weights(self, weights: Weights) -> None:
        """Load the current weights of the learner in every worker. Raises RunStopped if they have another version."""
        self.version = self.learner.ask("load_weights", weights.version)

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """See `Generator.logprobs`."""
        return self.learner.ask("logprobs", list(ids))

    def all_logprobs(self, ids: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the log-probs of every engine of every worker."""
        return self.learner.ask("all_logprobs", list(ids))

    def sleep(self) -> None:
        """See `Generator.sleep`."""
        self.learner.ask("sleep")

    def close(self) -> None:
        """End the generators of the workers."""
        with suppress(WorkerDied):
            self.learner.ask("close")


class Member:
    """The worker side of `ClusterLearner`: one worker in its own process. Its calls return (version, result)."""

    learner: LocalLearner
    own: Generator | None = None
    writer: WeightWriter | None = None

    def port(self, address: str) -> int:
        """Return a free port at this address."""
        return free_port(address)

    def join(self, rank: int, size: int, address: str, port: int, own: str, timeout: float) -> None:
        """Join the process group as `rank`. `own` is the address of this machine, or "" if all workers are on one machine."""
        interface = _interface(own) if own else "lo"
        if interface:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        os.environ["LOCAL_RANK"] = "0"  # Ray shows every actor its own GPUs only
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
        self.workers = join(rank, size, address, port, timeout=timeout)

    def build(self, make: Make, answers: Any, push: str, attempt: str) -> tuple[int, bool]:
        """Build the learner. The result is `Learner.low_precision`."""
        self.learner, self.push, self.attempt = make(self.workers), push, attempt
        self.own = answers(self.learner) if answers is not None else None
        return self._told(self.learner.low_precision)

    def call(self, method: str, *given: Any) -> tuple[int, Any]:
        """Call a method of the learner."""
        return self._told(getattr(self.learner, method)(*given))

    def measure(self, batch: Batch, columns: frozenset[str]) -> tuple[int, Any]:
        """See `Learner.measure`. Return only the new columns, because the driver has the batch."""
        seen = self.learner.measure(batch, columns)
        return self._told({name: seen[name] for name in columns})

    def export(
        self, role: str, folder: Path, tokenizer: Any, merge: bool, end_ids: Sequence[int] | None
    ) -> tuple[int, None]:
        """See `Learner.export`."""
        self.learner.export(role, folder, tokenizer, merge=merge, end_ids=end_ids)
        return self._told(None)

    def publish(self, number: int) -> tuple[int, Path | None]:
        """Gather the policy's weights in a collective step; the first worker writes them."""
        if self.writer is None:
            adapter = self.push == "adapter"
            self.writer = WeightWriter(self.workers, self.attempt, adapter=adapter, everywhere=False)
        return self._told(self.writer(self.learner.roles["policy"], number))

    def files(self, folder: Path) -> dict[str, bytes]:
        """Return the files of a published folder: name -> content."""
        return contents(folder)

    def answer(self, method: str, *given: Any) -> tuple[int, Any]:
        """Call a method of the generator that uses this learner."""
        own = self.own
        assert own is not None
        if method == "about":
            return self._told((own.version, own.reports))
        if method == "load_weights":
            weights = self.learner.publish()
            if weights.version != given[0]:
                raise RunStopped(f"version {given[0]} was published, but the learner is at {weights.version}")
            own.load_weights(weights)
            versions = self.workers.gather(own.version)
            return self._told(next((one for one in versions if one != weights.version), weights.version))
        found = all_logprobs(own, *given) if method == "all_logprobs" else getattr(own, method)(*given)
        return self._told(found if found is None else list(found))

    def close(self) -> None:
        """Remove the published weights."""
        if self.writer is not None:
            self.writer.close()

    def _told(self, what: Any) -> tuple[int, Any]:
        return self.learner.version, what if self.workers.first else None


def _interface(address: str) -> str:
    """Return the network interface with this address, or "" if it cannot be found. gloo then chooses an interface itself."""
    import struct

    try:
        import fcntl
    except ImportError:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                found = fcntl.ioctl(one.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return ""
