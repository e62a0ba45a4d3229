"""Scores from all workers together: each scores its share of the groups."""

from collections.abc import Sequence

from whet.data import Group
from whet.distributed import Workers
from whet.rewards.base import Reward, Scores, joined, shares


class SharedReward:
    """A reward in each worker as one: a group is scored once, and all workers get all scores."""

    def __init__(self, own: Reward, workers: Workers) -> None:
        self.own, self.workers = own, workers

    def score(self, groups: Sequence[Group]) -> Scores:
        """See `Reward.score`. What one worker's reward raises is raised on all."""
        mine = shares(groups, self.workers.size)[self.workers.rank]
        return joined(self.workers.together(lambda: self.own.score(mine) if mine else None))
