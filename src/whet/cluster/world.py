"""One attempt at a run: its places, its workers, and how all of them are taken down again."""

import secrets
import sys
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


class Attempt:
    """What is built in one attempt. A context manager: at its end nothing is left, orphans on this machine included.

    The attempt's id is random: what it writes into shared memory has it in its path. `lives` say how often
    engines and reward workers are started again (None: never); `limit` is how many seconds a call to a worker may take.
    A world that `shrinks` does with fewer workers where there is no place for all. Raises RecipeError where there is none for it.
    """

    def __init__(
        self, wanted: Wanted, lives: RestartBudget | None = None, *, limit: float = 1800.0, shrinks: bool = False
    ) -> None:
        self.lives, self.limit = lives or RestartBudget(0), limit
        self.attempt = secrets.token_hex(8)
        self.placement: Placement = place(wanted, shrinks=shrinks)
        self.wanted = self.placement.wanted
        """What found a place."""
        self._engines: list[ActorGenerator] = []
        self._learner: ClusterLearner | None = None
        self._fleet: Fleet | None = None
        self._pool: Pool | None = None

    @property
    def learners(self) -> int:
        """How many workers the learner has this time."""
        return self.placement.learners

    def learner(
        self,
        make: Make,
        *,
        push: Literal["weights", "adapter"] = "weights",
        answers: Callable[[LocalLearner], Generator] | None = None,
    ) -> ClusterLearner:
        """The learner that `make(workers)` builds in each worker. With `answers` they generate as well (`generator`)."""
        self._learner = ClusterLearner(
            make, self.placement, attempt=self.attempt, push="nothing" if answers else push, answers=answers,
            limit=self.limit,
        )  # fmt: skip
        return self._learner

    def generator(self, makes: Sequence[Callable[[], Generator]] = ()) -> Generator:
        """All engines as one, each in a worker of its own, built by its one of `makes` (taken in turns where there are fewer).

        Without engines the learner's workers answer: `learner` was given `answers` then.
        """
        if not self.wanted.engines:
            assert self._learner is not None
            return Inside(self._learner)
        own = [makes[number % len(makes)] for number in range(self.wanted.engines)]
        self._fleet = Fleet([partial(self._engine, make, number) for number, make in enumerate(own)], self.lives)
        return self._fleet

    def rewards(self, make: MakeRewards) -> list[Weighted]:
        """The rewards that `make()` builds in each reward worker; without such workers, in this process."""
        if not self.wanted.rewards:
            return list(make())
        options = [self.placement.reward(number) for number in range(self.wanted.rewards)]
        self._pool = Pool(make, options, self.lives, limit=self.limit)
        return weighted(self._pool)

    def remotes(self) -> list[Remote]:
        """Every worker there ever was in this attempt, but for reward workers that were replaced."""
        learners = self._learner.remotes if self._learner is not None else []
        scorers = [one for one in (self._pool.remotes if self._pool is not None else []) if one is not None]
        return [*learners, *(one.remote for one in self._engines), *scorers]

    def close(self) -> None:
        """Take everything down. May be called again."""
        nodes = {one.where.node for one in self.remotes()}
        for thing in (self._fleet, self._pool, self._learner):
            if thing is not None:
                with suppress(Exception):
                    thing.close()
        for one in ended(self.remotes()):
            print(f"whet: {one.name} (process {one.where.process.pid}) does not end", file=sys.stderr)
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
    """Shared memory on other machines that workers could not clear themselves, because they died."""
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
