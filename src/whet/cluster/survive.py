"""A run that outlives its workers: all is taken down, built anew, and continued from the last checkpoint."""

import sys
from collections.abc import Callable
from typing import TypeVar

from whet.cluster.learner import MoreLearners
from whet.cluster.placement import Wanted
from whet.cluster.world import Attempt
from whet.distributed import RestartBudget
from whet.errors import RestartsExhausted, WorkerDied

T = TypeVar("T")


def survive(
    attempt: Callable[[Attempt, bool], T],
    wanted: Wanted,
    *,
    restarts: int = 20,
    resume: bool = False,
    limit: float = 1800.0,
    quiet: bool = False,
) -> T:
    """What `attempt(world, resume)` returns. When a worker's death ends it, it is called again with a new world and resume.

    The first world is whole. Later ones are where machines are back, else smaller (see `placement.place`); when there is a
    place for more workers after a checkpoint, the run goes on from there with more (`Regrow`, which is no death). Raises Spent of
    the last cause when workers died more than `restarts` times over all worlds, those that a world replaces itself
    (engines, reward workers) counted, and at once whatever else the attempt raises.
    """
    lives, shrinks = RestartBudget(restarts), False
    while True:
        try:
            with Attempt(wanted, lives, limit=limit, shrinks=shrinks) as world:
                return attempt(world, resume)
        except Exception as error:
            cause = death(error)
            if cause is None:
                raise
            if isinstance(cause, RestartsExhausted):
                raise cause from error
            if not isinstance(cause, MoreLearners):
                lives.spend(cause)
            if not quiet:
                print(f"whet: {cause}; going on from the last checkpoint", file=sys.stderr)
        resume = shrinks = True


def death(error: BaseException | None) -> WorkerDied | None:
    """The death of a worker that is behind this error: a checkpoint fails, too, when a worker dies while it is written."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, WorkerDied):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None
