"""The reward sentiment: how positive an English answer is, by the lexicon and rules of VADER."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, takewhile
from typing import Any, Literal

from whet.extras import require
from whet.methods.options import Count
from whet.rewards.verifiers.base import Verdict, Verifier, check, make


@dataclass(frozen=True)
class Sentiment(Verifier):
    """Score the sentiment of an answer by VADER's compound value (Hutto and Gilbert 2014), with the package vaderSentiment.

    It knows English words and is made for short texts: it sums the valences of words, x, and returns x / sqrt(x^2 + 15). An answer
    without a word of its lexicon scores as a neutral one does.

    >>> Sentiment(scale="unit")(["What is it?"], ["It is a table."])
    [0.5]
    """

    scale: Literal["signed", "unit"] = "signed"
    """signed is from -1 (negative) to 1 (positive) with 0 for neutral, unit maps this to 0 to 1"""
    max_characters: Count = 10_000
    """characters of an answer that are read, an emoji as the words that VADER reads for it; its time grows with their square"""

    def check(self, where: str) -> None:
        """See `Verifier.check`."""
        require(f"{where}: sentiment", "vaderSentiment")

    def verdict(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """See `Verifier.verdict`."""
        value = float(_analyzer().polarity_scores(_beginning(completion, self.max_characters))["compound"])
        return Verdict(value if self.scale == "signed" else (value + 1.0) / 2.0)


def _beginning(text: str, most: int) -> str:
    """Return the beginning of a text that has at most so many characters when its emojis are written in words."""
    emojis = _analyzer().emojis
    lengths = accumulate(len(emojis.get(one, one)) for one in text[:most])
    return text[: sum(1 for _ in takewhile(lambda length: length <= most, lengths))]


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


Options = Sentiment
__all__ = ["Options", "Sentiment", "check", "make"]
