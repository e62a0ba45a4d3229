"""Data-parallel scoring: each worker scores its share of the groups, and all workers get all scores."""

from collections.abc import Sequence

from whet.data import Group
from whet.distributed import Workers
from whet.rewards.base import Reward, Scores, joined, shares


class SharedReward:
    """The rewards of all workers as one. Each group is scored by one worker, and all workers get all scores."""

    def __init__(self, own: Reward, workers: Workers) -> None:
        self.own, self.workers = own, workers

    def score(self, groups: Sequence[Group]) -> Scores:
        """See `Reward.score`. If the reward of one worker raises, all workers raise."""
        mine = shares(groups, self.workers.size)[self.workers.rank]
        return joined(self.workers.together(lambda: self.own.score(mine) if mine else None))


class RepeatedReward:
    """A reward that each worker calls with all groups. If it raises on one worker, all workers raise."""

    def __init__(self, own: Reward, workers: Workers) -> None:
        self.own, self.workers = own, workers

    def score(self, groups: Sequence[Group]) -> Scores:
        """See `Reward.score`."""
        found = list[Scores]()
        self.workers.together(lambda: found.append(self.own.score(groups)))
        return found[0]
