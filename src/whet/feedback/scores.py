"""Ranking by scores that the rows contain."""

from collections.abc import Sequence
from dataclasses import dataclass

from whet.data import Located, numbers, ranks_of
from whet.feedback.base import Question


@dataclass(frozen=True)
class Options:
    """Options of ranking by scores."""

    field: str = "scores"
    """the field of a row with one number per answer"""


class ScoreRanker:
    """Rank answers by the numbers in the field `field` of their row. Equal scores are ties."""

    def __init__(self, field: str = "scores") -> None:
        self.field = field

    def rank(self, questions: Sequence[Question]) -> list[list[int]]:
        """See `Ranker.rank`."""
        return [ranks_of([float(score) for score in question.row[self.field]]) for question in questions]


def check(options: Options, rows: Sequence[Located]) -> None:
    """Raise DataError if a row has no scores, or a wrong number of them."""
    for located in rows:
        numbers(located, options.field, len(located.row["responses"]))


def make(options: Options, rows: Sequence[Located]) -> ScoreRanker:
    """Build the ranker."""
    return ScoreRanker(options.field)
