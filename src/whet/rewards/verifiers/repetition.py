"""The reward repetition: minus the share of n-grams that the answer has said before."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from whet.methods.options import Count
from whet.rewards.verifiers.base import Verdict, Verifier, check, make


@dataclass(frozen=True)
class Repetition(Verifier):
    """Penalize repetition: the score is -(1 - distinct n-grams / n-grams), from 0 (nothing is said twice) to almost -1.

    An answer with fewer than two n-grams scores 0. The measure is 1 - distinct-n of Li et al. 2016 (A Diversity-Promoting
    Objective Function), for one answer.

    >>> Repetition(n=2)(["a", "a"], ["a b c d", "a b a b a"])
    [0.0, -0.5]
    """

    n: Count = 4
    """length of the n-grams, in units"""
    unit: Literal["words", "characters"] = "words"
    """words between white space, or Unicode characters (for languages without spaces)"""
    ignore_case: bool = True
    """compare case-folded texts"""

    def verdict(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """See `Verifier.verdict`."""
        text = completion.casefold() if self.ignore_case else completion
        units: Any = text.split() if self.unit == "words" else text
        grams = [tuple(units[place : place + self.n]) for place in range(len(units) - self.n + 1)]
        repeated = len(grams) - len(set(grams))
        return Verdict(-repeated / len(grams), "repetition") if repeated else Verdict(0.0)


Options = Repetition
__all__ = ["Options", "Repetition", "check", "make"]
