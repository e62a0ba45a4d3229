"""The Ranker seam: who ranks K answers to one prompt. The protocol, and a scripted fake."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from whet.data import ranks_of


@dataclass(frozen=True)
class Question:
    """A prompt with its K answers, as a person sees them. `row` holds the data row's other fields.

    >>> Question("hi", ("hello", "go away")).responses[0]
    'hello'
    """

    prompt: Any
    responses: tuple[str, ...]
    row: Mapping[str, Any] = field(default_factory=dict)


class Ranker(Protocol):
    """Who ranks: people, a judge, rules, a reward model."""

    def rank(self, questions: Sequence[Question]) -> list[list[int]]:
        """For each question the ranks of its answers, 1 is best, equal ranks are ties."""


class ScoreRanker:
    """Ranks by scores that the rows already carry under `field`."""

    def __init__(self, field: str = "scores") -> None:
        self.field = field

    def rank(self, questions: Sequence[Question]) -> list[list[int]]:
        """See `Ranker.rank`."""
        return [ranks_of(question.row[self.field]) for question in questions]
