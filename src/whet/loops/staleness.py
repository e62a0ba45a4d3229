"""Rules of asynchronous generation: how early groups begin, and which groups a step consumes. Import no torch here."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar


class Out(Protocol):
    """A group that began at step `begun` and is not consumed yet. `ended` is None until the group is complete."""

    draw: int
    begun: int
    ended: Any


Group = TypeVar("Group", bound=Out)


def lead(max_staleness: int) -> int:
    """Return how many steps ahead groups are handed out: half of the staleness bound, rounded up.

    The other half is slack for slow groups: later groups may be consumed before them. Without this slack, each step would
    have to consume exactly the groups that began together, including the slow ones.
    """
    return (max_staleness + 1) // 2


def chosen(out: Sequence[Group], step: int, count: int, max_staleness: int, prompts: int) -> list[Group] | None:
    """Return the `count` groups that this step consumes, ordered by draw, or None if one of them is not complete yet.

    A group must be consumed at most `max_staleness` steps after it began, and every later step consumes `prompts` groups.
    First come the groups that no later step could consume in time; the step waits for these. The others are the groups
    that were complete first. With max_staleness 0, the result is all groups of the step, in any order of completion.
    """
    if sum(one.ended is not None for one in out) < count:
        return None
    left = sorted(out, key=lambda one: (one.ended is None, one.ended or 0, one.draw))
    taken: list[Group] = []
    for last in sorted({one.begun + max_staleness for one in out}):
        urgent = [one for one in left if one.begun + max_staleness <= last]
        must = urgent[: max(0, len(urgent) - max(0, last - step) * prompts)]
        taken, left = taken + must, _without(left, must)
    rest = left[: count - len(taken)]
    taken += rest
    if len(taken) < count or any(one.ended is None for one in taken):
        return None
    return sorted(taken, key=lambda one: one.draw)


def _without(groups: Sequence[Group], those: Sequence[Group]) -> list[Group]:
    gone = {one.draw for one in those}
    return [one for one in groups if one.draw not in gone]
