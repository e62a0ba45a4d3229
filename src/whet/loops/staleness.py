"""The rules of asynchronous generation: how far ahead groups are begun, and which of them a step consumes. No torch here."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar


class Out(Protocol):
    """A group whose generation began at step `begun` and that no step has consumed yet; `ended` is None until it is complete."""

    draw: int
    begun: int
    ended: Any


Group = TypeVar("Group", bound=Out)


def lead(max_staleness: int) -> int:
    """How many steps' groups are handed out beyond those that are wanted now: half of the bound, rounded up.

    The other half is how long a slow group may be passed over. Were all of the bound handed out, each step would have to
    take exactly one hand-out, slow ones included.
    """
    return (max_staleness + 1) // 2


def chosen(out: Sequence[Group], step: int, count: int, max_staleness: int, prompts: int) -> list[Group] | None:
    """The `count` groups that this step consumes, by draw; None where it has to wait for one of them.

    A group has to be consumed at most `max_staleness` steps after it was begun, and every later step consumes `prompts`.
    Groups that no later step could take in time are waited for; the rest are those that were complete first. With
    max_staleness 0 these are all groups of the step, whatever their order.
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
