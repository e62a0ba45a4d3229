r"""The reward numeric_match: 1 if the number of the answer is that of a column, else 0."""

import re
import unicodedata
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from whet.errors import RecipeError
from whet.methods.options import NotNegative
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

LONGEST = 400
"""Most digits of a number, and its largest power of ten."""
PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{2,3}){0,40},[0-9]{3}(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
SIGN = r"(?:(?<![\w)\]}])[-+]\s?)?"
CURRENCY = r"(?:\\?[$€£¥₹]\s?)?"
NUMBER = re.compile(
    rf"(?P<sign>{SIGN}){CURRENCY}(?P<inner>(?<![\w)\]}}])-)?"
    rf"(?:(?P<whole>(?<![\w^.])[0-9]+)?\s?\\[dtc]?frac\s*"  # \frac{1}{2}, 2\frac{1}{2}
    rf"\{{\s*(?P<over>[-+]?{PLAIN})\s*\}}\s*\{{\s*(?P<under>[-+]?{PLAIN})\s*\}}"
    rf"|(?:(?P<units>(?<![\w^.])[0-9]+)[ ])?(?P<top>(?<![\w^.]){PLAIN})\s?/\s?(?P<bottom>{PLAIN})"  # 3/4, 1 3/4
    rf"|(?<![\w^.])(?P<plain>{PLAIN})(?:[eE](?P<e>[-+]?[0-9]+)(?!\w)|\s*(?:[×*·x]|\\times|\\cdot)\s*10\s*(?:\^|\*\*)\s*\{{?\s*(?P<power>[-+]?[0-9]+)\s*\}}?)?)"
    rf"\s?(?P<percent>\\?%|per\s?cent\b)?"
)
"""A number in a text that `_plain` has made. It does not start in a word or an exponent (H2O, cm^2)."""
MINUS = dict.fromkeys("−﹣－–‒", "-")
DIGITS = {chr(0xFF10 + digit): str(digit) for digit in range(10)} | {
    "，": ",",
    "．": ".",
    "％": "%",
    "⁄": "/",
    "∕": "/",
    "＄": "$",
}
RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+", strict=True))
PLAINER = str.maketrans(MINUS | DIGITS)


@dataclass(frozen=True)
class NumericMatch(Verifier):
    r"""Compare the number of the answer with the number of a column: 1 if they are equal as exact decimals or fractions, or within
    a tolerance, else 0.

    It reads signs (also the Unicode minus), decimals, thousands separators, currency signs, percent, fractions (3/4, 1 3/4, \frac{3}{4},
    ¾), scientific notation, and ignores what follows. Of the column it reads the number in the same way, so the `answer` of GSM8K
    ("... #### 42") can be used as it is. A list in the column has several right answers.

    >>> NumericMatch()(["How much?"], ["It costs $1,234.50 in total."], answer=["1234.5"])
    [1.0]
    """

    answer: str = "answer"
    """column of the prompt rows with the right number, as a number or in a text, or a list of these"""
    find: Literal["auto", "boxed", "hashes", "last"] = "auto"
    """which number of the answer: that in the last \\boxed{...}, that after the last ####, or the last one; auto takes the first of
    these that there is"""
    absolute: NotNegative = 0.0
    """largest difference that still counts as equal, in units of the answer"""
    relative: NotNegative = 0.0
    """largest difference that still counts as equal, as a share of the right number; the larger one of both tolerances counts"""
    percent: Literal["ignore", "divide"] = "ignore"
    """what a percent sign means: ignore reads 50% as 50, divide as 0.5"""

    def columns(self) -> dict[str, str]:
        """See `Verifier.columns`."""
        return {"answer": self.answer}

    def check_value(self, value: Any, where: str) -> None:
        """See `Verifier.check_value`. A right answer without a number is refused."""
        check_accepted(value, where)
        for one in accepted(value, where):
            if self._number(str(one), "auto") is None:
                raise RecipeError(f"{where}: there is no number in {str(one)!r:.80}")

    def verdict(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """See `Verifier.verdict`."""
        value = row[self.answer]
        if value is None:
            return Verdict(None, "the row has no answer")
        wanted = accepted(value, f"numeric_match.answer: column {self.answer!r}")
        given = self._number(completion, self.find)
        if given is None:
            return Verdict(0.0, "no number")
        return (
            RIGHT
            if any(self._equal(given, self._number(str(one), "auto")) for one in wanted)
            else Verdict(0.0, "another number")
        )

    def _equal(self, given: Fraction, right: Fraction | None) -> bool:
        if right is None:
            return False
        slack = max(Fraction(self.absolute), Fraction(self.relative) * abs(right))
        return abs(given - right) <= slack

    def _number(self, text: str, find: str) -> Fraction | None:
        box, hashes = boxed(text), after_hashes(text)
        if find == "boxed" or (find == "auto" and box is not None):
            text = box or ""
        elif find == "hashes" or (find == "auto" and hashes is not None):
            text = hashes or ""
        found = next(iter(deque(NUMBER.finditer(_plain(text)), maxlen=1)), None)
        return None if found is None else _value(found, divide=self.percent == "divide")


def last_number(text: str) -> Fraction | None:
    """Return the last number of a text, None without one, or if it has more than 400 digits, a larger exponent or is divided by 0.

    >>> last_number("12 apples and 3/4 of a pear")
    Fraction(3, 4)
    """
    return NumericMatch()._number(text, "last")


def _plain(text: str) -> str:
    """Return the text with one form of minus, digits, fractions, exponents and thousands separators."""
    text = re.sub(r"(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))", "", text.replace("{,}", ","))
    text = re.sub(r"(?<=[0-9])\\[,!](?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub(r"\\[,;:! ]|\\(?:text|mathrm|mathbf)(?=\{)|\\left|\\right", " ", text)
    text = re.sub(r"10([⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)", lambda found: "10^" + "".join(RAISED[one] for one in found[1]), text)
    text = re.sub(r"\\[dtc]?frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}", text)
    text = re.sub("[¼-¾⅐-⅞↉]", lambda found: f" {unicodedata.normalize('NFKC', found[0])}", text)
    return text.translate(PLAINER)


def _value(found: re.Match[str], *, divide: bool) -> Fraction | None:
    parts = found.groupdict()
    numerator, denominator = parts["over"] or parts["top"], parts["under"] or parts["bottom"]
    whole, power = parts["whole"] or parts["units"], int_of(parts["e"] or parts["power"])
    texts = [one for one in (numerator, denominator, whole, parts["plain"]) if one]
    if power is None or any(len(one) > LONGEST for one in texts):
        return None
    if numerator is not None:
        bottom = _fraction(denominator)
        if not bottom:
            return None
        out = _fraction(whole or "0") + _fraction(numerator) / bottom
    else:
        out = _fraction(parts["plain"]) * Fraction(10) ** power
    if "-" in parts["sign"] or parts["inner"]:
        out = -out
    return out / 100 if parts["percent"] and divide else out


def int_of(text: str | None) -> int | None:
    """Return an exponent, 0 without one; None if it is larger than 400."""
    return None if text is not None and (len(text) > 5 or abs(int(text)) > LONGEST) else int(text or 0)


def _fraction(text: str) -> Fraction:
    text = text.replace(",", "")
    return Fraction(f"0{text}" if text.startswith(".") else text)


Options = NumericMatch
__all__ = ["NumericMatch", "Options", "check", "last_number", "make"]
