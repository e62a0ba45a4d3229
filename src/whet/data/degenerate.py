"""Data from which little or nothing can be learned: equal answers, ties, one label or score, empty answers, copies."""

import os
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from whet.data.fields import numbers
from whet.data.types import Labeled, Pair, Prompt, Ranking, Row, Stepped, Unpaired
from whet.data.values import Located
from whet.errors import DataError

NAMES = {Pair: "pairs", Ranking: "rankings", Row: "rows", Prompt: "prompts"}
"""The names of records in messages; all others are answers."""


class Tally:
    """Count what is degenerate in records that are read block by block. Nothing is removed.

    Named are: pairs whose answers have the same tokens; rankings whose answers are all tied, or have the same tokens at different
    ranks; labels or scores that are all equal; answers with no token but one of `end_ids`, if half or more are; and copies, if the
    records stand in the file more than four times on average. `pairs` says that the records are pairs. It keeps 8 bytes of each
    record.
    """

    def __init__(self, end_ids: Sequence[int], *, pairs: bool) -> None:
        self.end_ids, self.pairs = end_ids, pairs
        self.files: dict[str, None] = {}
        """the files of the rows, in order"""
        self.kind: type = type(None)
        self.total = self.equal = self.tied = self.ranked = self.ties = self.answers = self.empty = 0
        self.values: dict[str, tuple[Any, int, bool]] = {}
        """of labels and scores: the first value, their number, and whether all are equal to it"""
        self.contents = array("q")

    def add(self, rows: Sequence[Located], records: Sequence[Any]) -> None:
        """Count the records of these rows."""
        self.files.update(dict.fromkeys(one.where.rpartition(":")[0] for one in rows))
        if self.pairs:
            self._add_ties(rows)
        for one in records:
            self.kind = self.kind if self.total else type(one)
            self.total += 1
            self.tied += _tied(one)
            self.equal += isinstance(one, (Pair, Ranking)) and not _tied(one) and not _compares(one)
            self._add_values(one)
            for row in _answers(one):
                self.answers += 1
                self.empty += int(row.ids[row.start]) in self.end_ids and int(row.mask.sum()) == 1
            self.contents.append(hash(_content(one)))

    def lines(self) -> list[str]:
        """Return the cautions about all records, without the name of the file. Raises DataError if no pair or ranking says
        which of two different answers is better."""
        name = NAMES.get(self.kind, "answers")
        lines = [f"{self.ties} of {self.ranked} rankings have ties alone"] if self.ties else []
        if self.tied:
            lines.append(f"{self.tied} of {self.total} rankings have ties alone")
        if self.equal:
            what = "chosen equal to rejected" if self.pairs else "equal answers at different ranks"
            lines.append(f"{self.equal} of {self.total} {name} have {what}, token by token")
        if self.tied + self.equal == self.total:
            raise DataError(f"{common_name(self.files)}: nothing says which answer is better: {'; '.join(lines)}")
        for what, (first, count, same) in self.values.items():
            if count > 1 and same:
                shown = str(first).lower() if isinstance(first, bool) else f"{first:g}"
                lines.append(f"{count} of {count} {what} {shown}, so nothing tells good from bad")
        if self.empty and 2 * self.empty >= self.answers:
            lines.append(f"{self.empty} of {self.answers} answers are empty: their end token alone")
        different = len(np.unique(np.frombuffer(self.contents, dtype=np.int64)))
        if 4 * different < self.total:
            lines.append(f"{self.total - different} of {self.total} {name} are copies of earlier ones")
        return lines

    def _add_ties(self, rows: Sequence[Located]) -> None:
        """Count the rankings with ties alone among rows that are read as pairs: no pair comes from them."""
        for one in rows:
            if "responses" in one.row and one.row.get("probability") is None:
                name = "ranks" if one.row.get("ranks") is not None else "scores"
                self.ranked += 1
                self.ties += constant(numbers(one, name, len(one.row["responses"])))

    def _add_values(self, record: Any) -> None:
        """Note the labels or the score of an answer."""
        what: str = ""
        values: list[Any] = []
        if isinstance(record, Unpaired):
            what, values = "answers have the label", [record.good]
        elif isinstance(record, Labeled):
            what, values = "answers have the score", [record.score]
        elif isinstance(record, Stepped):
            what, values = "steps have the label", record.labels[record.ends].tolist()
        for value in values:
            first, count, same = self.values.get(what, (value, 0, True))
            self.values[what] = (first, count + 1, same and value == first)


def common_name(files: Iterable[str]) -> str:
    """Return the name of the file, or what the names of several files have in common."""
    names = list(files)
    return names[0] if len(names) == 1 else f"{os.path.commonpath(names)} ({len(names)} files)"


def constant(values: Sequence[float]) -> bool:
    """Return whether there are several values and all are equal.

    >>> constant([1.0, 1.0]), constant([1.0, 2.0]), constant([1.0])
    (True, False, False)
    """
    return len(values) > 1 and len(set(values)) == 1


def _tied(record: Any) -> bool:
    return isinstance(record, Ranking) and len(set(record.ranks)) == 1


def _compares(record: Pair | Ranking) -> bool:
    """Return whether two answers of different rank have different tokens."""
    if isinstance(record, Pair):
        return _tokens(record.chosen) != _tokens(record.rejected)
    answers = [(_tokens(row), rank) for row, rank in zip(record.rows, record.ranks, strict=True)]
    return any(one[0] != other[0] and one[1] != other[1] for one in answers for other in answers)


def _tokens(row: Row) -> bytes:
    return bytes(row.ids.numpy().tobytes())


def _answers(record: Any) -> tuple[Row, ...]:
    """Return the rows of a record with the answers that it is about."""
    match record:
        case Row():
            return (record,)
        case Pair():
            return (record.chosen, record.rejected)
        case Ranking():
            return record.rows
        case Prompt():
            return ()
    return (record.row,)


def _content(record: Any) -> tuple[Any, ...]:
    """Return the tokens of a record, as hashes, and what is said about them."""
    match record:
        case Prompt():
            return record.ids
        case Ranking():
            about: Any = record.ranks
        case Pair():
            about = (record.probability, record.margin)
        case Labeled():
            about = record.score
        case Unpaired():
            about = record.good
        case Stepped():
            about = tuple(record.labels.tolist())
        case _:
            about = None
    return (about, *((row.start, hash(_tokens(row))) for row in _answers(record)))
