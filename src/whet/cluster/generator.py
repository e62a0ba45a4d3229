"""A generator in an actor of its own, which gets published weights in shared memory or through the object store."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whet.cluster.folders import contents, unpacked
from whet.cluster.learner import Pushed
from whet.cluster.worker import Process, Remote
from whet.data import Sample, Weights
from whet.errors import RunStopped, WhetError
from whet.generate.base import Generator, Request


class ActorGenerator:
    """The generator that `make` builds, in a worker process; `make` travels there, so it must be picklable.

    `options` are the actor's (see `Placement`), `limit` is how many seconds a call may take. Raises what the generator raises,
    and WorkerDied when its process died or fell silent; then it is of no use any more.
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
        """Take them from shared memory where they lie on the engine's node; elsewhere their files travel there.

        Raises RunStopped where they cannot be read.
        """
        handle, files = weights.handle, None
        if isinstance(handle, Pushed):
            near = handle.node == self.remote.where.node
            handle, files = (handle.folder, None) if near else (None, handle.files())
        elif not isinstance(handle, (str, Path)):
            handle, files = None, contents(handle)
        self.version = self.remote.ask("load_weights", weights.version, handle, extra=files)

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """See `Generator.logprobs`."""
        return self.remote.ask("logprobs", list(ids))

    def sleep(self) -> None:
        """See `Generator.rest`."""
        self.remote.ask("sleep")

    def close(self) -> None:
        """End the generator and its process. May be called again."""
        if not self.remote.dead:
            with suppress(WhetError):
                self.remote.ask("close", limit=20.0)
        self.remote.end()


class Engine:
    """A generator in its own process."""

    def build(self, make: Callable[[], Generator]) -> Any:
        """Make it; says its version, what it reports, and which processes it started."""
        self.own = make()
        started: list[int] = getattr(self.own, "processes", list)()
        return self.own.version, self.own.reports, [Process.of(pid) for pid in started]

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """See `Generator.generate`."""
        return list(self.own.generate(requests))

    def load_weights(self, version: int, folder: Path | None, files: dict[str, bytes] | None = None) -> int:
        """See `Generator.adopt`. Says the generator's version afterwards."""
        try:
            with nullcontext(folder) if files is None else unpacked(files) as found:
                self.own.load_weights(Weights(version, found))
        except WhetError:
            raise
        except Exception as error:  # a torn file, a folder that is gone
            raise RunStopped(
                f"the push of version {version} cannot be read ({type(error).__name__}: {error}); "
                "was it replaced by a newer one, or damaged?"
            ) from error
        return self.own.version

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """See `Generator.logprobs`."""
        # what came through the object store may not be written to
        return self.own.logprobs([torch.clone(one) for one in ids])

    def sleep(self) -> None:
        """See `Generator.rest`."""
        self.own.sleep()

    def close(self) -> None:
        """End what it started."""
        self.own.close()
