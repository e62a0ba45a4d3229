"""Ranking by a judge: a function that scores answers, a function that ranks them, or a reward."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from whet.calling.child import itself
from whet.calling.guard import UserCall
from whet.calling.state import restored
from whet.data import Group, Prompt, Sample, ranks_of
from whet.errors import RecipeError, RewardError
from whet.feedback.base import Question, check_ranks
from whet.methods.options import Positive
from whet.registry import load_object


@dataclass(frozen=True)
class Options:
    """Options of a judge function."""

    function: str
    """"file.py:function" """
    form: Literal["score", "rank"] = "score"
    """"score": f(prompts, completions, **columns) -> scores; "rank": f(prompt, responses, **columns) -> ranks"""
    timeout: Positive | None = None
    """longest duration of a call in seconds; the function then runs in a process of its own, which is killed at this limit. Without
    it there is no limit"""


class ScoreJudge:
    """Rank by a scoring function `f(prompts, completions, **columns) -> list[float]`, the form of reward functions."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def rank(self, questions: Sequence[Question]) -> list[list[int]]:
        """See `Ranker.rank`. Equal scores are ties."""
        prompts = [deepcopy(question.prompt) for question in questions for _ in question.responses]
        completions = [answer for question in questions for answer in question.responses]
        names = sorted(set().union(*(question.row.keys() for question in questions)) if questions else ())
        columns = {
            name: [deepcopy(question.row.get(name)) for question in questions for _ in question.responses]
            for name in names
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
            ranks = self.function(deepcopy(question.prompt), list(question.responses), **deepcopy(dict(question.row)))
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
        scores = iter(self.reward.score(groups).listed())
        return [_ranks([next(scores) for _ in one.responses], place) for place, one in enumerate(questions)]


def _ranks(scores: Sequence[float | None], place: int) -> list[int]:
    """Return the ranks of scores. Raises RewardError for an answer without a score; `place` is the number of its question."""
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        raise RewardError(
            f"the judge does not apply (None) to answer {scores.index(None)} of row {place}, and a ranking needs a score of each "
            "answer; leave the row out"
        )
    return ranks_of(known)


def make(options: Options, rows: Any) -> ScoreJudge | RankJudge:
    """Build the judge. Raises RecipeError if the function cannot be found."""
    with restored():
        function = load_object(options.function)
    if not callable(function):
        raise RecipeError(f"judge: {options.function} is a {type(function).__name__}, not a function")

    make: Any = partial(itself, function) if options.function.startswith("python:") else None
    call = UserCall(
        function,
        f"judge {options.function}",
        make=make or partial(load_object, options.function),
        seconds=options.timeout,
    )
    call.start()

    def guarded(*given: Any, **named: Any) -> Any:
        count = len(named["completions"]) if options.form == "score" else len(given[1])
        return call(f"{count} answers", given, named)

    return ScoreJudge(guarded) if options.form == "score" else RankJudge(guarded)
