r"""The reward math_match: 1 if the \boxed{...} expression of the answer equals that of a column, else 0, with math-verify."""

import logging
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

from whet.calling.child import itself
from whet.calling.process import Child, sendable
from whet.errors import RecipeError, RewardError
from whet.extras import require
from whet.methods.options import Count, Seconds
from whet.rewards.verifiers.base import RIGHT, Verdict, Verifier, accepted, boxed, check, check_accepted, make

LONGEST = 2000
"""Most characters of an expression; longer ones score 0."""


@dataclass(frozen=True)
class MathMatch(Verifier):
    r"""Compare the last \boxed{...} of the answer, as mathematics, with the expression of a column: 1 if they are equal, else 0.

    The package math-verify parses LaTeX and compares with sympy (1/2 = \frac{1}{2} = 0.5; x^2 - 1 = (x - 1)(x + 1); sets, intervals,
    matrices). sympy can compute for hours, so this runs in a process of its own, which is killed at the limit of time; the answer
    then scores 0. The column has the expression, a text with it in \boxed{...}, or a list of these.
    """

    answer: str = "answer"
    """column of the prompt rows with the right expression in LaTeX, or a list of right ones"""
    find: Literal["boxed", "whole"] = "boxed"
    """what is compared of the answer: the last \\boxed{...}, or all of it"""
    seconds: Seconds = 5.0
    """longest time of one answer, in seconds"""
    memory: Count = 4096
    """largest memory of the process, in MiB"""

    def columns(self) -> dict[str, str]:
        """See `Verifier.columns`."""
        return {"answer": self.answer}

    def check(self, where: str) -> None:
        """See `Verifier.check`."""
        require(f"{where}: math_match", "math_verify")

    def check_value(self, value: Any, where: str) -> None:
        """See `Verifier.check_value`. A right answer that is too long is refused."""
        check_accepted(value, where)
        for one in accepted(value, where):
            if len(_expression(str(one))) > LONGEST:
                raise RecipeError(f"{where}: an expression has at most {LONGEST} characters, got {str(one)!r:.80}")

    def verdict(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """See `Verifier.verdict`."""
        value = row[self.answer]
        if value is None:
            return Verdict(None, "the row has no answer")
        wanted = [_expression(str(one)) for one in accepted(value, f"math_match.answer: column {self.answer!r}")]
        given = boxed(completion) if self.find == "boxed" else completion.strip()
        if not given:
            return Verdict(0.0, "no closed \\boxed{...}" if self.find == "boxed" else "an empty answer")
        if given in wanted:
            return RIGHT
        if len(given) > LONGEST:
            return Verdict(0.0, f"an expression of more than {LONGEST} characters")
        try:
            equal, reason = _child(self.seconds)("1 answer", (wanted, given, self.memory), {})
        except RewardError:
            return Verdict(0.0, f"the comparison took more than {self.seconds:g} s, or too much memory")
        return RIGHT if equal else Verdict(0.0, reason)


def _expression(text: str) -> str:
    box = boxed(text)
    return (text if box is None else box).strip().strip("$").strip()


@cache
def _child(seconds: float) -> Child:
    """Return the process that compares, with a limit of time. It ends with this one."""
    # loading sympy takes longer than comparing: it is not in the limit
    return Child(sendable(partial(_loaded), "math_match"), "reward math_match", seconds)


def _loaded() -> Any:
    import math_verify.grader
    import math_verify.parser  # noqa: F401

    logging.disable(logging.ERROR)  # it warns that limits of time are off: this process has one
    return itself(compare)


def compare(wanted: list[str], given: str, memory: int) -> tuple[bool, str]:
    """Return whether an expression equals one of `wanted`, and the reason if not. `memory` limits this process, in MiB."""
    from math_verify import LatexExtractionConfig, parse, verify

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    # only LaTeX: the parser of plain expressions passes the text to Python's eval
    parsed = partial(parse, extraction_config=[LatexExtractionConfig()], parsing_timeout=None)
    try:
        found = parsed(f"$\\boxed{{{given}}}$")
        if not found:
            return False, "no expression that can be read"
        for one in wanted:
            if verify(parsed(f"$\\boxed{{{one}}}$"), found, timeout_seconds=None):
                return True, ""
    except (MemoryError, RecursionError) as error:
        return False, f"{type(error).__name__} in the comparison"
    except Exception as error:
        return False, f"the comparison failed with {type(error).__name__}"
    return False, "another expression"


Options = MathMatch
__all__ = ["MathMatch", "Options", "check", "compare", "make"]
