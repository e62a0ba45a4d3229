"""Rewards from users' functions, `f(prompts, completions, **columns) -> list[float | None]`, and from users' classes."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from whet.calling.child import itself
from whet.calling.guard import UserCall
from whet.data import Group, Prompt
from whet.errors import RecipeError
from whet.methods.options import Seconds
from whet.registry import load_object, objects, place_of
from whet.rewards.base import REWARDS, Reward, Scores, checked, checked_scores, columns_of, copied


@dataclass(frozen=True)
class Options:
    """Options of a function, and of a class that has no option of this name itself."""

    timeout: Seconds | None = None
    """longest duration of a call in seconds; the function then runs in a process of its own, which is killed at this limit. Without
    it there is no limit"""


class FunctionReward:
    """A user's function as a Reward. It also gets the other fields of the prompt row, and `completion_ids`.

    It gets copies, and the global state that it changes is restored. With `timeout`, in seconds, it runs in a process of its own,
    which loads it from `source` ("file.py:name"); without a source the function itself is sent there. `where` is the field of
    the recipe. Raises RecipeError if it cannot be sent.
    """

    per_group = True
    """Groups may be split over the workers; each group is scored by one worker."""

    def __init__(
        self,
        function: Callable[..., Any],
        name: str | None = None,
        *,
        timeout: float | None = None,
        source: str = "",
        where: str = "reward",
    ) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__name__", "reward"))
        named = source and not source.startswith("python:")
        make: Any = partial(load_object, source) if named else partial(itself, function)
        self.call = UserCall(function, f"reward {self.name}", make=make, seconds=timeout, option=f"{where}.timeout")

    def check(self, prompts: Sequence[Prompt], where: str) -> None:
        """Raise RecipeError if the function does not take the columns of these prompt rows, or needs one that they lack."""
        columns = set().union(*(prompt.row.keys() for prompt in prompts)) - {"prompt"}
        names = ["prompts", "completions", "completion_ids", *sorted(columns)]
        try:
            signature = inspect.signature(self.function)
        except (TypeError, ValueError):  # some functions written in C have none
            return
        try:
            signature.bind(**dict.fromkeys(names))
        except TypeError as error:
            raise RecipeError(
                f"{where}: {place_of(self.function)}: {self.name} cannot be called with the columns {', '.join(names)}: {error}; "
                "take **columns for those that it does not use"
            ) from error

    def score(self, groups: Sequence[Group]) -> Scores:
        """See `Reward.score`. If the function raises, raise RewardError with the line of the user's file."""
        prompts, completions, columns = columns_of(groups)
        values = self.call(named={"prompts": prompts, "completions": completions, **columns}, what=told_rows(groups))
        return checked(values, [sample for group in groups for sample in group.samples], self.name)


class ObjectReward:
    """A user's object with a method `score(groups)` as a Reward: check its result, and name its file and line if it raises.

    `score` returns `Scores`, or values as a reward function returns them. It gets copies. With a limit in `call`, the object is
    in a process of its own and `own` is its class.
    """

    def __init__(self, own: Any, name: str, call: UserCall | None = None) -> None:
        self.own, self.name = own, name
        self.per_group = bool(getattr(own, "per_group", False))
        self.call = call or UserCall(own.score, f"reward {name}")

    def score(self, groups: Sequence[Group]) -> Scores:
        """See `Reward.score`."""
        values = self.call(told_rows(groups), (copied(groups),))
        answers = [sample for group in groups for sample in group.samples]
        if isinstance(values, Scores):
            return checked_scores(values, answers, self.name)
        return checked(values, answers, self.name)


def limited(source: str, found: Any, options: Mapping[str, Any], name: str, seconds: float, where: str) -> ObjectReward:
    """Return the reward of a user's class or instance in a process of its own, which is killed if a call takes longer than
    `seconds`. `found` is the class or instance, `options` are those of the class. Raises RecipeError if it cannot be sent."""
    options = objects(dict(options))
    make: Any = partial(scorer, source, options)
    if source.startswith("python:"):
        make = partial(_score_of, found, options) if inspect.isclass(found) else partial(itself, found.score)
    call = UserCall(None, f"reward {name}", make=make, seconds=seconds, option=f"{where}.timeout")
    return ObjectReward(found, name, call)


def scorer(source: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """Build the reward of a source and return its method `score`."""
    adapter = REWARDS.find(source)
    made: Reward = adapter.make(adapter.options(**options), source)
    return made.score


def _score_of(kind: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    made: Reward = kind(**options)
    return made.score


def told_rows(groups: Sequence[Group]) -> str:
    """Return what a reward is called for: the number of answers, and the first and last prompt row."""
    count = sum(len(group.samples) for group in groups)
    ids = [group.prompt.id for group in groups]
    rows = f"row {ids[0]}" if len(ids) == 1 else f"rows {ids[0]} to {ids[-1]}"
    return f"{count} answer{'s' if count != 1 else ''} to the prompt {rows}"
