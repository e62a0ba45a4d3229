"""The reward language: whether an answer is written in a language, or which share of it."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from whet.errors import RecipeError
from whet.extras import require
from whet.methods.options import NotNegativeInt
from whet.rewards.verifiers.base import RIGHT, Verdict, Verifier, check, make

CODE = re.compile(r"^[ \t]*(```|~~~).*?(^[ \t]*\1|\Z)|`[^`\n]*`|https?://\S+", re.MULTILINE | re.DOTALL)
"""What has no language: fenced and inline code, and addresses."""
SENTENCE = re.compile(r"[^.!?。！？\n]*[.!?。！？\n]*")


@dataclass(frozen=True)
class Language(Verifier):
    """Identify the language of an answer with the package py3langid (Lui and Baldwin 2012; 97 languages and more, offline).

    Code and addresses are left out. Short texts cannot be identified well: of those with fewer than `min_letters` letters none is
    judged, and they get `short_score`.

    >>> Language("en", short_score=None)(["a"], ["Oui."])
    [None]
    """

    language: str
    """code of the language (ISO 639-1), such as en"""
    how: Literal["whole", "share"] = "whole"
    """whole gives 1 if the whole answer is identified as this language, else 0; share gives the share of its letters that are in
    sentences identified as it"""
    min_letters: NotNegativeInt = 20
    """letters that a text must have to be judged, and the sentences of `share` together with the following ones"""
    short_score: float | None = 0.0
    """score of an answer with fewer letters; null says that the reward does not apply to it"""

    def check(self, where: str) -> None:
        """See `Verifier.check`."""
        require(f"{where}: language", "py3langid")
        known = sorted(_identifier().labels)
        if self.language not in known:
            code = self.language.lower()[:2]  # of "en-US" and "English"
            near = (
                code if code in known else difflib.get_close_matches(self.language.lower(), known, n=1, cutoff=0.0)[0]
            )
            raise RecipeError(
                f"{where}.language: unknown language {self.language!r}; did you mean {near!r}? Known are {', '.join(known)}"
            )

    def verdict(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """See `Verifier.verdict`."""
        text = CODE.sub(" ", completion)
        letters = _letters(text)
        if letters < max(1, self.min_letters):
            return Verdict(self.short_score, "too short to tell the language")
        if self.how == "whole":
            found = _language(text)
            return RIGHT if found == self.language else Verdict(0.0, f"language {found}")
        own = sum(_letters(part) for part in self._parts(text) if _language(part) == self.language)
        return Verdict(own / letters, "" if own == letters else "partly another language")

    def _parts(self, text: str) -> list[str]:
        """Cut a text into sentences, each joined with the following ones until it has enough letters."""
        parts = [""]
        for sentence in SENTENCE.findall(text):
            if _letters(parts[-1]) >= self.min_letters:
                parts.append("")
            parts[-1] += sentence
        if len(parts) > 1 and _letters(parts[-1]) < self.min_letters:
            last = parts.pop()
            parts[-1] += last
        return parts


def _letters(text: str) -> int:
    return sum(one.isalpha() for one in text)


def _language(text: str) -> str:
    return str(_identifier().classify(text)[0])


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


Options = Language
__all__ = ["Language", "Options", "check", "make"]
