"""Rewards in actors of their own: groups are dealt over them, and a share whose worker died is scored again."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from whet.cluster.worker import Remote, ended
from whet.data import Group
from whet.distributed import RestartBudget, run_parallel
from whet.errors import AttemptFailed, WorkerDied
from whet.rewards.base import Scores, Weighted, joined, shares

Make = Callable[[], Sequence[Weighted]]
"""Builds all rewards in a worker; it travels there, so it must be picklable."""


class Pool:
    """Reward workers that each hold all rewards. One that dies is started again. Raises Spent when `lives` are."""

    def __init__(self, make: Make, options: Sequence[dict[str, Any]], lives: RestartBudget, *, limit: float) -> None:
        self.make, self.options, self.lives, self.limit = make, options, lives, limit
        self.remotes: list[Remote | None] = [None] * len(options)

    def ask(self, method: str, given: Sequence[Sequence[Any] | None]) -> list[Any]:
        """What each worker says to its own arguments, all at the same time; None where there are none."""
        return run_parallel([partial(self._ask, number, method, one) for number, one in enumerate(given)])

    def close(self) -> None:
        """End all workers. May be called again."""
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
        self.lives.spend(error)


class ClusterReward:
    """Reward `number` of a pool's workers, as one Reward."""

    def __init__(self, pool: Pool, number: int) -> None:
        self.pool, self.number = pool, number

    def score(self, groups: Sequence[Group]) -> Scores:
        """See `Reward.score`. What a worker's reward raises is raised."""
        dealt = shares(groups, len(self.pool.options))
        given = [(self.number, list(own)) if own else None for own in dealt]
        return joined(self.pool.ask("score", given))


def weighted(pool: Pool) -> list[Weighted]:
    """A pool's rewards under their names and weights; all of its workers are started."""
    about = pool.ask("about", [()] * len(pool.options))[0]
    return [Weighted(name, ClusterReward(pool, number), weight) for number, (name, weight) in enumerate(about)]


class RewardWorker:
    """All rewards in one process."""

    def build(self, make: Make) -> None:
        """Load them."""
        self.rewards = list(make())

    def about(self) -> list[tuple[str, float]]:
        """Their names and weights."""
        return [(one.name, one.weight) for one in self.rewards]

    def score(self, number: int, groups: Sequence[Group]) -> Scores:
        """See `Reward.score`."""
        return self.rewards[number].reward.score(groups)
