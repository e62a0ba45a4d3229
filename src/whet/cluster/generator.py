"""A generator in its own Ray actor, which gets weight updates through shared memory or the object store."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whet.cluster.folders import contents, unpacked
from whet.cluster.learner import Pushed
from whet.cluster.worker import Remote
from whet.data import Sample, Weights
from whet.errors import RunStopped, WhetError
from whet.generate.base import Generator, Request
from whet.processes import Process


class ActorGenerator:
    """The generator that `make` builds, in a worker process. `make` is sent to that process, so it must be picklable.

    `options` are the actor's options (see `Placement`); `limit` is the longest duration of a call in seconds. Raises what
    the generator raises, and WorkerDied if its process died or did not answer in time. After WorkerDied this object cannot
    be used any more.
    """

    def __init__(
        self,
        make: Callable[[], Generator],
        options: dict[str, Any] | None = None,
        *,
        name: str = "engine",
        limit: float = 1800.0,
    ) -> None:
        self.remote = Remote(name, options or {"num_cpus": 1}, limit=limit).hold(Engine)
        try:
            self.version, self.reports, processes = self.remote.ask("build", make)
        except BaseException:
            self.remote.end()
            raise
        self.remote.processes += processes

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """See `Generator.generate`."""
        yield from self.remote.ask("generate", list(requests))

    def load_weights(self, weights: Weights) -> None:
        """Load the weights: from shared memory if they are on the engine's node, otherwise from a copy of their files.

        Raises RunStopped if they cannot be read.
        """
        handle, folder, files = weights.handle, None, None
        if isinstance(handle, Pushed):
            near = handle.node == self.remote.where.node
            folder, files = (handle.folder, None) if near else (None, handle.files())
        elif isinstance(handle, Path):
            folder = handle
        elif handle is not None:
            files = contents(handle)
        self.version = self.remote.ask("load_weights", weights.version, folder, extra=files)

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """See `Generator.logprobs`."""
        return self.remote.ask("logprobs", list(ids))

    def sleep(self) -> None:
        """See `Generator.sleep`."""
        self.remote.ask("sleep")

    def close(self) -> None:
        """End the generator and its process. May be called more than once."""
        if not self.remote.dead:
            with suppress(WhetError):
                self.remote.ask("close", limit=20.0)
        self.remote.end()


class Engine:
    """The worker side of `ActorGenerator`: holds the generator."""

    def build(self, make: Callable[[], Generator]) -> Any:
        """Build the generator. Return its version, its `reports`, and the processes that it started."""
        self.own = make()
        started: list[int] = getattr(self.own, "processes", list)()
        return self.own.version, self.own.reports, [Process.of(pid) for pid in started]

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """See `Generator.generate`."""
        return list(self.own.generate(requests))

    def load_weights(self, version: int, folder: Path | None, files: dict[str, bytes] | None = None) -> int:
        """See `Generator.load_weights`. Return the version of the generator afterwards."""
        try:
            with nullcontext(folder) if files is None else unpacked(files) as found:
                self.own.load_weights(Weights(version, found))
        except WhetError:
            raise
        except Exception as error:  # for example an incomplete file or a removed folder
            raise RunStopped(
                f"the weight update of version {version} cannot be read ({type(error).__name__}: {error}); "
                "was it replaced by a newer one, or damaged?"
            ) from error
        return self.own.version

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """See `Generator.logprobs`."""
        # tensors from the object store are read-only
        return self.own.logprobs([torch.clone(one) for one in ids])

    def sleep(self) -> None:
        """See `Generator.sleep`."""
        self.own.sleep()

    def close(self) -> None:
        """End the generator."""
        self.own.close()
