"""The Ranker protocol, which ranks K answers to one prompt, and a ranker that uses given scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from whet.data import ranks_of


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
    """Rank answers. A ranker can be a person, a judge, a set of rules or a reward model."""

    def rank(self, questions: Sequence[Question]) -> list[list[int]]:
        """Return the ranks of the answers of each question: 1 is best, equal ranks are ties."""


class ScoreRanker:
    """Rank by the scores in the column `field` of the rows."""

    def __init__(self, field: str = "scores") -> None:
        self.field = field

    def rank(self, questions: Sequence[Question]) -> list[list[int]]:
        """See `Ranker.rank`."""
        return [ranks_of(question.row[self.field]) for question in questions]
