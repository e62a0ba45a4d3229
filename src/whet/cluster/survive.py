"""Recovery of a run after a worker died: start all workers again and continue from the last checkpoint."""

from collections.abc import Callable
from typing import TypeVar

from whet.cluster.learner import MoreLearners
from whet.cluster.placement import Wanted
from whet.cluster.world import Attempt
from whet.distributed import RestartBudget
from whet.errors import RestartsExhausted, WorkerDied
from whet.terminal import caution

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
    """Call `attempt(workers, resume)` and return its result. If a worker died, call it again with new workers and resume True.

    The first attempt needs all workers. Later attempts take all workers if they can be placed, else fewer (see
    `placement.place`). If more workers can be placed after a checkpoint, the run continues from there with more
    (`MoreLearners`, which is not counted as a restart).

    Raises RestartsExhausted from the last cause if workers died more than `restarts` times over all attempts; engines and
    reward workers that are restarted within an attempt are counted too. Any other error of the attempt is raised at once.
    """
    budget, shrinks = RestartBudget(restarts), False
    while True:
        try:
            with Attempt(wanted, budget, limit=limit, shrinks=shrinks) as world:
                return attempt(world, resume)
        except Exception as error:
            cause = death(error)
            if cause is None:
                raise
            if isinstance(cause, RestartsExhausted):
                raise cause from error
            if not isinstance(cause, MoreLearners):
                budget.spend(cause)
            if not quiet:
                caution(f"{cause}; resuming from the last checkpoint")
        resume = shrinks = True


def death(error: BaseException | None) -> WorkerDied | None:
    """Return the WorkerDied error among the causes of this error, or None.

    Other errors can be caused by a worker that died: for example, a checkpoint fails if a worker dies while it is written.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, WorkerDied):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None
