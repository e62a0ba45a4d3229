"""A learner whose workers are actors: every call goes to all of them, and what the first one returns is what is returned."""

import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from whet.distributed import Workers, free_port, join, run_parallel
from whet.errors import RunStopped, WhetError, WorkerDied
from whet.generate.base import Generator, all_logprobs, whole
from whet.learner.base import UpdateResult, Work
from whet.learner.local import LocalLearner

PORTS = 3
"""Ports that are tried: between its choice and its use another program may take one."""

Make = Callable[[Workers], LocalLearner]
"""Builds a learner in one of the workers; it travels there, so it must be picklable."""


class MoreLearners(WorkerDied):
    """Nothing died: machines have come back, and the world can be built larger from the checkpoint just saved."""


@dataclass(frozen=True)
class Pushed:
    """Published weights: a folder of safetensors (or of an adapter) on one node, and its files for other nodes."""

    folder: Path
    node: str
    keeper: Remote = field(repr=False)
    _cache: list[Any] = field(default_factory=list, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by its name, for a generator in the driver's own process."""
        import ray

        if self.folder.is_dir():  # its random part makes the path this very folder, on whatever node
            yield from whole(Weights(0, self.folder))
            return
        with unpacked(ray.get(self.files())) as folder:
            yield from whole(Weights(0, folder))

    def files(self) -> Any:
        """A reference to the folder's files in the object store; they are read once, however many nodes want them."""
        with self._lock:
            if not self._cache:
                self._cache.append(self.keeper.start("files", (self.folder,)))
            return self._cache[0]


class ClusterLearner:
    """The learner that `make` builds, on as many workers as `placement` has learners.

    attempt   what is written into shared memory has it in its path
    push      what `publish` hands out: all weights, the adapter alone, or nothing, where the workers themselves answer
    answers   builds, in each worker, the generator that answers from its learner (see `Inside`)
    limit     seconds that a call may take

    Calls raise what the workers raise, as itself; WorkerDied when a worker died or fell silent, all others being killed
    then; MoreLearners where more workers can be placed, at the first call after a save.
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
        """The policy's weights in a folder of shared memory: see `Pushed`. None where the workers answer themselves."""
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
        """See `Learner.save`. Every worker must see the folder. Afterwards it is seen whether the world may grow."""
        self._all("call", "save", folder.absolute())
        self._grows = self.placement.grows()

    def load(self, folder: Path) -> None:
        """See `Learner.load`."""
        self._all("call", "load", folder.absolute())

    def export(self, role: str, folder: Path, tokenizer: Any = None, *, merge: bool = True) -> None:
        """See `Learner.export`. A worker of a lost attempt that lives on cannot write into it: each attempt writes beside it,
        and the driver gives the name."""
        folder = folder.absolute()
        aside = folder.with_name(f".{folder.name}-{self._attempt}")
        self._all("export", role, aside, tokenizer, merge)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        for old in folder.parent.glob(f".{folder.name}-*"):
            shutil.rmtree(old, ignore_errors=True)

    def ask(self, method: str, *given: Any) -> Any:
        """What the first worker's generator gives; all of them take part."""
        return self._all("answer", method, *given)

    def close(self) -> None:
        """End all workers, and remove what they published. May be called again."""
        for one in self.remotes[:1]:
            with suppress(WhetError):
                one.ask("close", limit=5.0)
        ended(self.remotes)

    def _all(self, method: str, *given: Any) -> Any:
        if self._grows:
            raise MoreLearners("cluster: there is a place for a larger world")
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
        """All workers find one another; False where the port was taken, and all of them are ended."""
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
    """The generator in each of a learner's workers as one Generator: weights do not leave the processes."""

    def __init__(self, learner: ClusterLearner) -> None:
        self.learner = learner
        self.version, self.reports = learner.ask("about")

    def generate(self, requests: Sequence[Any]) -> Any:
        """See `Generator.generate`."""
        yield from self.learner.ask("generate", list(requests))

    def load_weights(self, weights: Weights) -> None:
        """Every worker takes its learner's weights of now. Raises RunStopped where these are of another version."""
        self.version = self.learner.ask("load_weights", weights.version)

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """See `Generator.logprobs`."""
        return self.learner.ask("logprobs", list(ids))

    def all_logprobs(self, ids: Sequence[Tensor]) -> list[list[Tensor]]:
        """The scores of every worker's engines."""
        return self.learner.ask("all_logprobs", list(ids))

    def sleep(self) -> None:
        """See `Generator.sleep`."""
        self.learner.ask("sleep")

    def close(self) -> None:
        """The workers' generators end."""
        with suppress(WorkerDied):
            self.learner.ask("close")


class Member:
    """One of the learner's workers, in its own process. What it answers has its version before it."""

    learner: LocalLearner
    own: Generator | None = None
    post: WeightWriter | None = None

    def port(self, address: str) -> int:
        """A free port at this address."""
        return free_port(address)

    def join(self, rank: int, size: int, address: str, port: int, own: str, timeout: float) -> None:
        """Become worker `rank`; `own` is this machine's address, "" where all are on one machine."""
        interface = _interface(own) if own else "lo"
        if interface:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        os.environ["LOCAL_RANK"] = "0"  # Ray shows every actor its own GPUs only
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
        self.workers = join(rank, size, address, port, timeout=timeout)

    def build(self, make: Make, answers: Any, push: str, attempt: str) -> tuple[int, bool]:
        """Load the models. Says `Learner.low_precision`."""
        self.learner, self.push, self.attempt = make(self.workers), push, attempt
        self.own = answers(self.learner) if answers is not None else None
        return self._told(self.learner.low_precision)

    def call(self, method: str, *given: Any) -> tuple[int, Any]:
        """A call of the learner."""
        return self._told(getattr(self.learner, method)(*given))

    def measure(self, batch: Batch, columns: frozenset[str]) -> tuple[int, Any]:
        """The new columns alone: the driver has the batch."""
        seen = self.learner.measure(batch, columns)
        return self._told({name: seen[name] for name in columns})

    def export(self, role: str, folder: Path, tokenizer: Any, merge: bool) -> tuple[int, None]:
        """See `Learner.export`."""
        self.learner.export(role, folder, tokenizer, merge=merge)
        return self._told(None)

    def publish(self, number: int) -> tuple[int, Path | None]:
        """All gather the policy in step, and the first one writes it."""
        if self.post is None:
            adapter = self.push == "adapter"
            self.post = WeightWriter(self.workers, self.attempt, adapter=adapter, everywhere=False)
        return self._told(self.post(self.learner.roles["policy"], number))

    def files(self, folder: Path) -> dict[str, bytes]:
        """What lies in a published folder."""
        return contents(folder)

    def answer(self, method: str, *given: Any) -> tuple[int, Any]:
        """A call of the generator that answers from this learner."""
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
        """Remove what was published."""
        if self.post is not None:
            self.post.close()

    def _told(self, what: Any) -> tuple[int, Any]:
        return self.learner.version, what if self.workers.first else None


def _interface(address: str) -> str:
    """The network interface that has this address; "" where that cannot be found out, and gloo chooses itself."""
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
