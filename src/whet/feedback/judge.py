"""Ranking by a judge: a function that scores answers, or one that ranks them itself."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from whet.data import ranks_of
from whet.errors import RewardError
from whet.feedback.base import Question


class ScoreJudge:
    """Rank by a scoring function `f(prompts, completions, **columns) -> list[float]`, the signature of reward functions."""

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
    """Rank by a function `f(prompt, responses, **columns) -> list[int]`, which is called for each question."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def rank(self, questions: Sequence[Question]) -> list[list[int]]:
        """See `Ranker.rank`."""
        out = []
        for place, question in enumerate(questions):
            ranks = self.function(question.prompt, list(question.responses), **question.row)
            right = isinstance(ranks, Sequence) and len(ranks) == len(question.responses)
            if not right or not all(isinstance(rank, int) and rank >= 1 for rank in ranks):
                raise RewardError(
                    f"question {place}: expected {len(question.responses)} ranks from 1 up, got {ranks!r:.80}"
                )
            out.append(list(ranks))
        return out
