"""One attempt at a run: placement, start and shutdown of its workers."""

import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal

from whet.cluster import folders
from whet.cluster.generator import ActorGenerator
from whet.cluster.learner import ClusterLearner, Inside, Make
from whet.cluster.placement import Placement, Wanted, place
from whet.cluster.rewards import Make as MakeRewards
from whet.cluster.rewards import Pool, weighted
from whet.cluster.worker import Remote, ended
from whet.distributed import RestartBudget
from whet.generate.base import Generator
from whet.generate.fleet import Fleet
from whet.learner.local import LocalLearner
from whet.rewards.base import Weighted
from whet.terminal import caution


class Attempt:
    """All workers of one attempt at a run. A context manager: on exit all workers are ended, including orphan processes
    on this machine.

    Each attempt has a random id, which is part of the path of everything it writes into shared memory. `budget` is the
    restart budget of engines and reward workers (None: no restarts); `limit` is the longest duration of a call to a worker
    in seconds. With `shrinks` the attempt uses fewer workers if not all can be placed. Raises RecipeError if the workers
    cannot be placed.
    """

    def __init__(
        self, wanted: Wanted, budget: RestartBudget | None = None, *, limit: float = 1800.0, shrinks: bool = False
    ) -> None:
        self.budget, self.limit = budget or RestartBudget(0), limit
        self.attempt = secrets.token_hex(8)
        self.placement: Placement = place(wanted, shrinks=shrinks)
        self.wanted = self.placement.wanted
        """The workers that were placed."""
        self._engines: list[ActorGenerator] = []
        self._learner: ClusterLearner | None = None
        self._fleet: Fleet | None = None
        self._pool: Pool | None = None

    @property
    def learners(self) -> int:
        """The number of learner workers in this attempt."""
        return self.placement.learners

    def learner(
        self,
        make: Make,
        *,
        push: Literal["weights", "adapter"] = "weights",
        answers: Callable[[LocalLearner], Generator] | None = None,
    ) -> ClusterLearner:
        """Start the learner: `make(workers)` builds it in each worker. With `answers` the same workers also generate."""
        self._learner = ClusterLearner(
            make, self.placement, attempt=self.attempt, push="nothing" if answers else push, answers=answers,
            limit=self.limit,
        )  # fmt: skip
        return self._learner

    def generator(self, makes: Sequence[Callable[[], Generator]] = ()) -> Generator:
        """Start all engines and return them as one generator. Engine i is built by `makes[i % len(makes)]` in its own worker.

        Without engines the learner's workers generate; `learner` must have been called with `answers` before.
        """
        if not self.wanted.engines:
            assert self._learner is not None
            return Inside(self._learner)
        own = [makes[number % len(makes)] for number in range(self.wanted.engines)]
        self._fleet = Fleet([partial(self._engine, make, number) for number, make in enumerate(own)], self.budget)
        return self._fleet

    def rewards(self, make: MakeRewards) -> list[Weighted]:
        """Return the rewards that `make()` builds in each reward worker, or in this process if there are no reward workers."""
        if not self.wanted.rewards:
            return list(make())
        options = [self.placement.reward(number) for number in range(self.wanted.rewards)]
        self._pool = Pool(make, options, self.budget, limit=self.limit)
        return weighted(self._pool)

    def remotes(self) -> list[Remote]:
        """Return all workers of this attempt: learners, all engines ever started, and the current reward workers."""
        learners = self._learner.remotes if self._learner is not None else []
        scorers = [one for one in (self._pool.remotes if self._pool is not None else []) if one is not None]
        return [*learners, *(one.remote for one in self._engines), *scorers]

    def close(self) -> None:
        """End all workers and release their places. May be called more than once."""
        nodes = {one.where.node for one in self.remotes()}
        for thing in (self._fleet, self._pool, self._learner):
            if thing is not None:
                with suppress(Exception):
                    thing.close()
        for one in ended(self.remotes()):
            caution(f"{one.name} (process {one.where.process.pid}) could not be ended")
        with suppress(Exception):
            self.placement.remove()
        folders.remove(self.attempt)
        _sweep(nodes)

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _engine(self, make: Callable[[], Generator], number: int) -> Any:
        one = ActorGenerator(make, self.placement.engine(number), name=f"engine {number}", limit=self.limit)
        self._engines.append(one)
        return one


def _sweep(nodes: set[str]) -> None:
    """Remove shared memory folders on other machines that workers left behind because they died."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    with suppress(Exception):
        here = ray.get_runtime_context().get_node_id()
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        sweep: Any = ray.remote(folders.sweep)
        asked = [
            sweep.options(num_cpus=0, max_retries=0, scheduling_strategy=On(node, soft=False)).remote()
            for node in (nodes & alive) - {here}
        ]
        ray.wait(asked, num_returns=len(asked), timeout=5.0)
