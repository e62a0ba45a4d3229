"""The reward exact_match: 1 if the answer is the text of a column, else 0."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from whet.rewards.verifiers.base import (
    RIGHT,
    Verdict,
    Verifier,
    accepted,
    after_hashes,
    boxed,
    check,
    check_accepted,
    make,
)  # fmt: skip


@dataclass(frozen=True)
class ExactMatch(Verifier):
    """Compare the answer, or a part of it, with the text of a column: 1 if they are equal, else 0.

    A list in the column has several right answers. An answer to a row without a value is not scored.

    >>> ExactMatch(ignore_case=True)(["Capital of France?"], [" paris"], answer=["Paris"])
    [1.0]
    """

    answer: str = "answer"
    """column of the prompt rows with the right answer, or a list of right answers"""
    find: Literal["whole", "boxed", "hashes", "last_line"] = "whole"
    """part of the answer that is compared: all of it, the last \\boxed{...}, the line after the last ####, or the last line"""
    strip: bool = True
    """ignore white space at the start and the end"""
    ignore_case: bool = False
    """compare case-folded texts"""
    collapse_space: bool = False
    """treat each run of white space as one space"""
    nfkc: bool = False
    """compare Unicode's compatibility forms (NFKC): full-width letters, ligatures and superscripts equal the plain ones"""

    def columns(self) -> dict[str, str]:
        """See `Verifier.columns`."""
        return {"answer": self.answer}

    def check_value(self, value: Any, where: str) -> None:
        """See `Verifier.check_value`."""
        check_accepted(value, where)

    def verdict(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """See `Verifier.verdict`."""
        value = row[self.answer]
        if value is None:
            return Verdict(None, "the row has no answer")
        wanted = accepted(value, f"exact_match.answer: column {self.answer!r}")
        found = self._found(completion)
        if found is None:
            return Verdict(0.0, "no closed \\boxed{...}" if self.find == "boxed" else "no ####")
        given = self._normal(found)
        return RIGHT if any(given == self._normal(str(one)) for one in wanted) else Verdict(0.0, "another answer")

    def _found(self, text: str) -> str | None:
        if self.find == "last_line":
            return (text.strip().splitlines() or [""])[-1]
        return {"whole": lambda one: one, "boxed": boxed, "hashes": after_hashes}[self.find](text)

    def _normal(self, text: str) -> str:
        if self.nfkc:
            text = unicodedata.normalize("NFKC", text)
        if self.ignore_case:
            text = text.casefold()
            text = unicodedata.normalize("NFKC", text) if self.nfkc else text  # a folded text may be no NFKC any more
        if self.collapse_space:
            text = re.sub(r"\s+", " ", text)
        return text.strip() if self.strip else text


Options = ExactMatch
__all__ = ["ExactMatch", "Options", "check", "make"]
