"""Rewards from Python functions, `f(prompts, completions, **columns) -> list[float]`, in the user's own file or module."""

from collections.abc import Callable, Sequence
from typing import Any

from whet.data import Group
from whet.errors import RecipeError, RewardError
from whet.registry import load_object
from whet.rewards.base import Scores, checked, columns_of


class FunctionReward:
    """A user's function as a Reward. It also gets the other fields of the prompt row, and `completion_ids`."""

    per_group = True
    """Groups may be split over the workers; each group is scored by one worker."""

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__name__", "reward"))

    def score(self, groups: Sequence[Group]) -> Scores:
        """See `Reward.score`. Raises RewardError with the line of the user's file if the function raises."""
        prompts, completions, columns = columns_of(groups)
        values = called(self.function, self.name, prompts=prompts, completions=completions, **columns)
        return checked(values, [sample for group in groups for sample in group.samples], self.name)


def called(function: Callable[..., Any], label: str, /, *given: Any, **named: Any) -> Any:
    """Call the function. If it raises, raise RewardError with the line of the user's file."""
    try:
        return function(*given, **named)
    except Exception as error:
        code = getattr(function, "__code__", None)
        where = f"{code.co_filename}:{code.co_firstlineno}" if code else "?"
        trace = error.__traceback__
        while trace is not None:  # find the deepest frame in the user's own file; frames of libraries are less helpful
            if code and trace.tb_frame.f_code.co_filename == code.co_filename:
                where = f"{code.co_filename}:{trace.tb_lineno}"
            trace = trace.tb_next
        raise RewardError(f"reward {label} raised {type(error).__name__}: {error} (at {where})") from error


def load_function(spec: str) -> Callable[..., Any]:
    """Load the function named by "file.py:name" or "package.module:name". Raises RecipeError if it cannot be found."""
    function = load_object(spec)
    if not callable(function):
        raise RecipeError(f"{spec}: it is a {type(function).__name__}, not a function")
    return function
