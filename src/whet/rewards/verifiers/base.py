"""What all ready-made rewards share: a verdict with a reason for each answer, checks before a run starts, and texts in answers."""

import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from whet.data import Group, Prompt
from whet.errors import RecipeError, RewardError
from whet.rewards.base import Scores, columns_of
from whet.terminal import caution


@dataclass(frozen=True)
class Verdict:
    """The judgment of one answer: its score, None where the reward does not apply, and the reason in a few words. The reason of
    full score is empty."""

    score: float | None
    reason: str = ""


RIGHT = Verdict(1.0)


class Verifier:
    """A ready-made reward: a frozen record of its options, which is called as a reward function is.

    `__call__` returns one score per answer, `verdicts` the scores with their reasons. Both are pure: they depend on their
    arguments and options only. A subclass is a frozen dataclass; it has `verdict` for one answer, or `verdicts` for all.
    """

    def __call__(self, /, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float | None]:
        """Return the scores of the answers. `columns` has one value per answer under each name. Raises RewardError for a column
        that is missing, or a value of a wrong type in it."""
        return [one.score for one in self.verdicts(completions, columns)]

    def verdicts(self, completions: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list[Verdict]:
        """Return the verdicts of the answers. Arguments and errors are those of `__call__`."""
        for option, name in self.columns().items():
            if name not in columns:
                raise RewardError(_missing(f"{self.name()}.{option}", name, columns))
        rows = ({name: values[place] for name, values in columns.items()} for place in range(len(completions)))
        return [self.verdict(text, row) for text, row in zip(completions, rows, strict=True)]

    def verdict(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Return the verdict of one answer. `row` has the columns of its prompt row."""
        raise NotImplementedError

    def columns(self) -> dict[str, str]:
        """Return the columns that the prompt rows must have: option -> the name of the column."""
        return {}

    def check(self, where: str) -> None:
        """Raise RecipeError for an option that cannot be used, or a package that is not installed. `where` is the field of the
        recipe."""

    def check_value(self, value: Any, where: str) -> None:
        """Raise RecipeError if the value of a column cannot be used. `where` names the option and the row."""

    def name(self) -> str:
        """Return the name of this reward: that of its module."""
        return type(self).__module__.rpartition(".")[2]


class VerifierReward:
    """A verifier as a Reward. It prints once how many answers failed for which reason."""

    per_group = True
    """Groups may be split over the workers; each group is scored by one worker."""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier, self.told = verifier, False

    def check_rows(self, prompts: Sequence[Prompt], where: str, alone: bool) -> None:
        """Raise RecipeError if no prompt row has a column that the verifier reads, or, where it is the only reward (`alone`), if
        one row lacks it; also for a value that it cannot use."""
        for option, name in self.verifier.columns().items():
            having = [prompt for prompt in prompts if prompt.row.get(name) is not None]
            if prompts and (not having or (alone and len(having) < len(prompts))):
                lacking = next(prompt for prompt in prompts if prompt.row.get(name) is None)
                if name not in lacking.row:
                    raise RecipeError(f"{_missing(f'{where}.{option}', name, lacking.row)} (row {lacking.id})")
                raise RecipeError(
                    f"{where}.{option}: row {lacking.id} has no value in the column {name!r}; give it one, leave the row out, or add a "
                    "reward that scores it"
                )
            for prompt in having:
                self.verifier.check_value(prompt.row[name], f"{where}.{option}: row {prompt.id}")

    def score(self, groups: Sequence[Group]) -> Scores:
        """See `Reward.score`. The result has the reasons."""
        _, completions, columns = columns_of(groups)
        for name in self.verifier.columns().values():  # a share of the rows may lack it
            columns = {name: [None] * len(completions), **columns}
        verdicts = self.verifier.verdicts(completions, columns)
        self._tell(verdicts)
        known = [one.score is not None for one in verdicts]
        return Scores(
            torch.tensor([one.score or 0.0 for one in verdicts]),
            applies=None if all(known) else torch.tensor(known, dtype=torch.bool),
            reasons=tuple(one.reason for one in verdicts),
        )

    def _tell(self, verdicts: Sequence[Verdict]) -> None:
        """Print, once, how often each reason was given, the most frequent ones first."""
        counts = Counter(one.reason for one in verdicts if one.reason)
        if self.told or not counts or os.environ.get("RANK", "0") != "0":  # one of torchrun's workers prints it
            return
        self.told = True
        most = ", ".join(f"{reason} ({count})" for reason, count in counts.most_common(5))
        more = f", and {len(counts) - 5} other reasons" if len(counts) > 5 else ""
        full = len(verdicts) - sum(counts.values())
        caution(
            f"reward {self.verifier.name()}: {full} of the first {len(verdicts)} answers got full score; the others: {most}{more}"
        )


def check(options: Verifier, where: str) -> None:
    """Raise RecipeError for options that cannot be used. `where` is the field of the recipe."""
    options.check(where)


def make(options: Verifier, source: Any) -> VerifierReward:
    """Build the reward of a verifier."""
    return VerifierReward(options)


def _missing(where: str, name: str, row: Mapping[str, Any]) -> str:
    columns = ", ".join(sorted(row)) or "no column"
    return f"{where}: the rows have no column {name!r}; they have {columns}; name the column with {where.rpartition('.')[2]}"


def accepted(value: Any, where: str) -> list[str | int | float]:
    """Return the answers that the value of a column accepts: one, or each of a list. Raises RewardError for other types."""
    values = value if isinstance(value, (list, tuple)) and value else [value]
    for one in values:
        if not isinstance(one, (str, int, float)):
            raise RewardError(f"{where}: expected a text, a number, or a list of these, got {value!r:.80}")
    return list(values)


def check_accepted(value: Any, where: str) -> None:
    """Raise RecipeError if `accepted` refuses the value."""
    try:
        accepted(value, where)
    except RewardError as error:
        raise RecipeError(str(error)) from error


BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def boxed(text: str) -> str | None:
    r"""Return what is in the last box of a LaTeX text, None without one or if its braces do not close.

    >>> boxed(r"so $\boxed{1}$, then \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    found = next(iter(deque(BOX.finditer(text), maxlen=1)), None)
    if found is None:
        return None
    depth, place = 1, found.end()
    while place < len(text):
        one = text[place]
        if one == "\\":
            place += 1
        elif one == "{":
            depth += 1
        elif one == "}":
            depth -= 1
            if not depth:
                return text[found.end() : place].strip()
        place += 1
    return None


FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([^\s`~]*)[^\n]*$", re.MULTILINE)


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield (language in lower case, content) of the fenced blocks of a Markdown text. A block that is not closed is none.

    >>> list(blocks("a" + chr(10) + "```JSON" + chr(10) + "{}" + chr(10) + "```"))
    [('json', '{}\\n')]
    """
    opened: re.Match[str] | None = None
    for line in FENCE.finditer(text):
        if opened is None:
            opened = line
        elif line[1][0] == opened[1][0] and len(line[1]) >= len(opened[1]) and not line[2]:
            yield opened[2].lower(), text[opened.end() + 1 : line.start()]
            opened = None


def after_hashes(text: str) -> str | None:
    """Return the first line after the last "####" of a text, as in the answers of GSM8K; None without one.

    >>> after_hashes("2 + 2 = 4" + chr(10) + "#### 4")
    '4'
    """
    _, found, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() if found else None
