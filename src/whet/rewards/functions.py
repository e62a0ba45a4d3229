"""Rewards from users' functions, `f(prompts, completions, **columns) -> list[float]`, and from users' classes."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from whet.data import Group, Prompt
from whet.errors import RecipeError
from whet.registry import called, place_of
from whet.rewards.base import Reward, Scores, checked, checked_scores, columns_of


class FunctionReward:
    """A user's function as a Reward. It also gets the other fields of the prompt row, and `completion_ids`."""

    per_group = True
    """Groups may be split over the workers; each group is scored by one worker."""

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__name__", "reward"))

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
        values = called(
            self.function, f"reward {self.name}", named={"prompts": prompts, "completions": completions, **columns}
        )
        return checked(values, [sample for group in groups for sample in group.samples], self.name)


class ObjectReward:
    """A user's object with a method `score(groups)` as a Reward: check its result, and name its file and line if it raises.

    `score` returns `Scores`, or values as a reward function returns them.
    """

    def __init__(self, own: Reward, name: str) -> None:
        self.own, self.name = own, name
        self.per_group = bool(getattr(own, "per_group", False))

    def score(self, groups: Sequence[Group]) -> Scores:
        """See `Reward.score`."""
        values = called(self.own.score, f"reward {self.name}", (groups,))
        answers = [sample for group in groups for sample in group.samples]
        if isinstance(values, Scores):
            return checked_scores(values, answers, self.name)
        return checked(values, answers, self.name)
