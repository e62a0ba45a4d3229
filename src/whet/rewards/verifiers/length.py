"""The reward length: 1 inside a range of tokens, words or characters, falling linearly to 0 outside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from whet.errors import RecipeError, RewardError
from whet.methods.options import NotNegativeInt
from whet.rewards.verifiers.base import RIGHT, Verdict, Verifier, check, make


@dataclass(frozen=True)
class Length(Verifier):
    """Score the length n of an answer: 1 for min <= n <= max, else max(0, 1 - distance to the range / margin).

    With `max` alone and no margin it is a plain cap.

    >>> Length(unit="words", max=3, margin=2)(["a"] * 3, ["one two three", "a b c d", "a b c d e f"])
    [1.0, 0.5, 0.0]
    """

    unit: Literal["tokens", "words", "characters"] = "tokens"
    """what is counted: tokens of the policy (with the end token), words between white space, or Unicode characters"""
    min: NotNegativeInt = 0
    """smallest length with full score, in units"""
    max: NotNegativeInt | None = None
    """largest length with full score, in units; without it there is none"""
    margin: NotNegativeInt = 0
    """distance from the range at which the score reaches 0, in units; 0 gives 0 everywhere outside"""

    def check(self, where: str) -> None:
        """See `Verifier.check`."""
        if self.max is None and not self.min:
            raise RecipeError(f"{where}: every length would score 1; set max, min or both")
        if self.max is not None and self.max < self.min:
            raise RecipeError(f"{where}.max: it is below min; got min {self.min} and max {self.max}")

    def verdicts(self, completions: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list[Verdict]:
        """See `Verifier.verdicts`. Raises RewardError if tokens are counted and there are no ids."""
        if self.unit != "tokens":
            counts = [len(one.split()) if self.unit == "words" else len(one) for one in completions]
            return [self._of(count) for count in counts]
        ids = columns.get("completion_ids")
        if ids is None or any(text and not own for text, own in zip(completions, ids, strict=True)):
            raise RewardError("reward length: there are texts without token ids here; set unit to words or characters")
        return [self._of(len(own)) for own in ids]

    def _of(self, count: int) -> Verdict:
        away = max(self.min - count, count - self.max if self.max is not None else 0, 0)
        if not away:
            return RIGHT
        score = max(0.0, 1.0 - away / self.margin) if self.margin else 0.0
        return Verdict(score, "too short" if count < self.min else "too long")


Options = Length
__all__ = ["Length", "Options", "check", "make"]
