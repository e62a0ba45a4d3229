"""The Ranker protocol, which ranks K answers to one prompt, and the table of rankers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from whet.errors import RewardError
from whet.registry import Registry


@dataclass(frozen=True)
class Question:
    """A prompt and its K answers as text. `row` has the other fields of the data row.

    >>> Question("hi", ("hello", "go away")).responses[0]
    'hello'
    """

    prompt: Any
    responses: tuple[str, ...]
    row: Mapping[str, Any] = field(default_factory=dict)


class Ranker(Protocol):
    """Rank answers: by scores, by a judge, or by people."""

    def rank(self, questions: Sequence[Question]) -> list[list[int]]:
        """Return the ranks of the answers of each question. 1 is best, equal ranks are ties."""


def check_ranks(ranks: Any, question: Question, place: int) -> None:
    """Raise RewardError if `ranks` is not one rank from 1 up for each answer. `place` is the number of the question."""
    right = isinstance(ranks, (list, tuple)) and len(ranks) == len(question.responses)
    if not right or not all(type(rank) is int and rank >= 1 for rank in ranks):
        raise RewardError(f"question {place}: expected {len(question.responses)} ranks from 1 up, got {ranks!r:.80}")


RANKERS = Registry("rankers", {"scores": "whet.feedback.scores", "judge": "whet.feedback.judge"}, Ranker)
"""The rankers by name. They are checked and made from their options and the rows to rank."""
