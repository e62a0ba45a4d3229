"""Rewards in Ray actors: groups are split over the workers, and the share of a worker that died is scored again."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from whet.cluster.worker import Remote, ended
from whet.data import Group
from whet.distributed import RestartBudget, run_parallel
from whet.errors import AttemptFailed, WorkerDied
from whet.rewards.base import Scores, Weighted, joined, shares

Make = Callable[[], Sequence[Weighted]]
"""Build all rewards in a worker. The function is sent there, so it must be picklable."""


class Pool:
    """Reward workers that each hold all rewards. A worker that died is started again.

    Raises RestartsExhausted when the restart budget `budget` is used up.
    """

    def __init__(self, make: Make, options: Sequence[dict[str, Any]], budget: RestartBudget, *, limit: float) -> None:
        self.make, self.options, self.budget, self.limit = make, options, budget, limit
        self.remotes: list[Remote | None] = [None] * len(options)

    def ask(self, method: str, given: Sequence[Sequence[Any] | None]) -> list[Any]:
        """Call a method on all workers in parallel, each with its own arguments. A worker with arguments None is not called
        and gives None."""
        return run_parallel([partial(self._ask, number, method, one) for number, one in enumerate(given)])

    def close(self) -> None:
        """End all workers. May be called more than once."""
        ended([one for one in self.remotes if one is not None])

    def _ask(self, number: int, method: str, given: Sequence[Any] | None) -> Any:
        while given is not None:
            try:
                return self._worker(number).ask(method, *given)
            except AttemptFailed:
                raise
            except WorkerDied as error:
                self._lost(number, error)
        return None

    def _worker(self, number: int) -> Remote:
        one = self.remotes[number]
        if one is None:
            one = Remote(f"reward worker {number}", self.options[number], limit=self.limit)
            self.remotes[number] = one
            one.hold(RewardWorker).ask("build", self.make)
        return one

    def _lost(self, number: int, error: WorkerDied) -> None:
        one, self.remotes[number] = self.remotes[number], None
        if one is not None:
            one.end()
        self.budget.spend(error)


class ClusterReward:
    """Reward `number` of the pool's workers, as one `Reward`."""

    def __init__(self, pool: Pool, number: int) -> None:
        self.pool, self.number = pool, number

    def score(self, groups: Sequence[Group]) -> Scores:
        """See `Reward.score`. An error of a reward in a worker is raised here."""
        dealt = shares(groups, len(self.pool.options))
        given = [(self.number, list(own)) if own else None for own in dealt]
        return joined(self.pool.ask("score", given))


def weighted(pool: Pool) -> list[Weighted]:
    """Start all workers of a pool and return its rewards with their names and weights."""
    about = pool.ask("about", [()] * len(pool.options))[0]
    return [Weighted(name, ClusterReward(pool, number), weight) for number, (name, weight) in enumerate(about)]


class RewardWorker:
    """The worker side of `Pool`: holds all rewards."""

    def build(self, make: Make) -> None:
        """Build the rewards."""
        self.rewards = list(make())

    def about(self) -> list[tuple[str, float]]:
        """Return the name and weight of each reward."""
        return [(one.name, one.weight) for one in self.rewards]

    def score(self, number: int, groups: Sequence[Group]) -> Scores:
        """See `Reward.score`."""
        return self.rewards[number].reward.score(groups)
