"""Ranking by a judge: a function that scores answers, a function that ranks them, or a reward."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from whet.data import Group, Prompt, Sample, ranks_of
from whet.errors import RecipeError, RewardError
from whet.feedback.base import Question, check_ranks
from whet.registry import called, load_object


@dataclass(frozen=True)
class Options:
    """Options of a judge function."""

    function: str
    """"file.py:function" """
    form: Literal["score", "rank"] = "score"
    """"score": f(prompts, completions, **columns) -> scores; "rank": f(prompt, responses, **columns) -> ranks"""


class ScoreJudge:
    """Rank by a scoring function `f(prompts, completions, **columns) -> list[float]`, the form of reward functions."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def rank(self, questions: Sequence[Question]) -> list[list[int]]:
        """See `Ranker.rank`. Equal scores are ties."""
        prompts = [question.prompt for question in questions for _ in question.responses]
        completions = [answer for question in questions for answer in question.responses]
        names = sorted(set().union(*(question.row.keys() for question in questions)) if questions else ())
        columns = {
            name: [question.row.get(name) for question in questions for _ in question.responses] for name in names
        }
        scores = self.function(prompts=prompts, completions=completions, **columns)
        if not isinstance(scores, Sequence) or isinstance(scores, str):
            raise RewardError(f"the judge: expected a list with one score per answer, got {scores!r:.80}")
        if len(scores) != len(completions):
            raise RewardError(f"the judge got {len(completions)} answers and returned {len(scores)} scores")
        for place, score in enumerate(scores):
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
                raise RewardError(f"the judge: answer {place} got {score!r}, expected a finite number")
        out, start = [], 0
        for question in questions:
            stop = start + len(question.responses)
            out.append(ranks_of([float(score) for score in scores[start:stop]]))
            start = stop
        return out


class RankJudge:
    """Rank by a function `f(prompt, responses, **columns) -> list[int]`, which is called once per question."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def rank(self, questions: Sequence[Question]) -> list[list[int]]:
        """See `Ranker.rank`."""
        out = []
        for place, question in enumerate(questions):
            ranks = self.function(question.prompt, list(question.responses), **question.row)
            check_ranks(ranks, question, place)
            out.append(list(ranks))
        return out


class RewardJudge:
    """Rank by a reward: any object with `score(groups)` as in `whet.rewards`. Equal scores are ties."""

    def __init__(self, reward: Any) -> None:
        self.reward = reward

    def rank(self, questions: Sequence[Question]) -> list[list[int]]:
        """See `Ranker.rank`."""
        groups = []
        for number, one in enumerate(questions):
            messages = one.prompt if isinstance(one.prompt, list) else [{"role": "user", "content": str(one.prompt)}]
            samples = [Sample(number, place, (), (), 0, "stop", text) for place, text in enumerate(one.responses)]
            groups.append(Group(Prompt(str(number), (), tuple(messages), one.row), tuple(samples)))
        scores = iter(self.reward.score(groups).answer.tolist())
        return [ranks_of([next(scores) for _ in one.responses]) for one in questions]


def make(options: Options, rows: Any) -> ScoreJudge | RankJudge:
    """Build the judge. Raises RecipeError if the function cannot be found."""
    function = load_object(options.function)
    if not callable(function):
        raise RecipeError(f"judge: {options.function} is a {type(function).__name__}, not a function")

    def guarded(*given: Any, **named: Any) -> Any:
        return called(function, f"judge {options.function}", given, named)

    return ScoreJudge(guarded) if options.form == "score" else RankJudge(guarded)
