"""Ranking by a judge: a function that scores answers, or one that ranks them itself."""

from collections.abc import Callable, Sequence
from typing import Any

from whet.errors import RewardError
from whet.feedback.base import Question
from whet.records import ranks_of


class ScoreJudge:
    """Ranks by a scoring function `f(prompts, completions, **columns) -> list[float]`, the form of reward functions."""

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
        scores = list(self.function(prompts=prompts, completions=completions, **columns))
        if len(scores) != len(completions):
            raise RewardError(f"the judge got {len(completions)} answers and returned {len(scores)} scores")
        out, start = [], 0
        for question in questions:
            stop = start + len(question.responses)
            out.append(ranks_of([float(score) for score in scores[start:stop]]))
            start = stop
        return out


class RankJudge:
    """Ranks by a function `f(prompt, responses, **columns) -> list[int]` that is asked question by question."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def rank(self, questions: Sequence[Question]) -> list[list[int]]:
        """See `Ranker.rank`."""
        out = []
        for place, question in enumerate(questions):
            ranks = list(self.function(question.prompt, list(question.responses), **question.row))
            if len(ranks) != len(question.responses) or not all(isinstance(rank, int) and rank >= 1 for rank in ranks):
                raise RewardError(
                    f"question {place}: expected {len(question.responses)} ranks from 1 up, got {ranks!r}"
                )
            out.append(ranks)
        return out
