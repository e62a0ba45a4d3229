"""The reward regex: 1 if a regular expression matches the answer, else 0, with a limit of time per answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import regex

from whet.errors import RecipeError
from whet.methods.options import Seconds
from whet.rewards.verifiers.base import RIGHT, Verdict, Verifier, check, make

FLAGS = {"i": regex.IGNORECASE, "m": regex.MULTILINE, "s": regex.DOTALL, "x": regex.VERBOSE}


@dataclass(frozen=True)
class Regex(Verifier):
    r"""Match the answer with a regular expression of the package regex, whose syntax is that of Python's re and more.

    An answer on which the expression takes too long (catastrophic backtracking) scores 0.

    >>> Regex(r"\d{4}-\d\d-\d\d")(["When?", "When?"], ["On 2024-05-01.", "In May."])
    [1.0, 0.0]
    """

    pattern: str
    """the regular expression"""
    how: Literal["search", "match", "fullmatch"] = "search"
    """where it must match: anywhere, at the start, or from the start to the end of the answer"""
    flags: str = ""
    """letters of flags: i ignores case, m lets ^ and $ match at lines, s lets . match line ends, x allows spaces and comments"""
    negate: bool = False
    """give 1 where it does not match, and 0 where it does"""
    seconds: Seconds = 1.0
    """longest time of the match of one answer, in seconds"""

    def check(self, where: str) -> None:
        """See `Verifier.check`."""
        for one in self.flags:
            if one not in FLAGS:
                raise RecipeError(f"{where}.flags: unknown flag {one!r}; known are {', '.join(FLAGS)}")
        try:
            _compiled(self.pattern, self.flags)
        except Exception as error:  # regex.error; OverflowError and MemoryError for huge repetitions
            raise RecipeError(f"{where}.pattern: {self.pattern!r:.120} is no regular expression: {error}") from error

    def verdict(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """See `Verifier.verdict`."""
        try:
            found = getattr(_compiled(self.pattern, self.flags), self.how)(completion, timeout=self.seconds)
        except TimeoutError:
            return Verdict(0.0, f"the match took more than {self.seconds:g} s")
        if (found is None) == self.negate:
            return RIGHT
        return Verdict(0.0, "it matches" if self.negate else "no match")


@lru_cache(64)
def _compiled(pattern: str, flags: str) -> Any:
    return regex.compile(pattern, sum(FLAGS[one] for one in dict.fromkeys(flags)))


Options = Regex
__all__ = ["Options", "Regex", "check", "make"]
