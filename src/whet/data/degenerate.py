"""Data from which little or nothing can be learned: equal answers, ties, one label or score, empty answers, copies."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from whet.data.fields import numbers
from whet.data.types import Labeled, Pair, Prompt, Ranking, Row, Stepped, Unpaired
from whet.data.values import Located
from whet.errors import DataError

NAMES = {Pair: "pairs", Ranking: "rankings", Row: "rows", Prompt: "prompts"}
"""The names of records in messages; all others are answers."""


def cautions(rows: Sequence[Located], records: Sequence[Any], end_ids: Sequence[int]) -> list[str]:
    """Return what is degenerate in the records that were read from the rows of one file, one line each, with counts.

    Nothing is removed. Named are: pairs whose answers have the same tokens; rankings whose answers are all tied, or have
    the same tokens at different ranks; labels or scores that are all equal; answers with no token but one of `end_ids`, if
    half or more are; and copies, if the records stand in the file more than four times on average.

    Raises DataError if no pair or ranking says which of two different answers is better.
    """
    total = len(records)
    equal = sum(not _tied(one) and not _compares(one) for one in records if isinstance(one, (Pair, Ranking)))
    tied = sum(_tied(one) for one in records)
    lines = [*_ties_of(rows)] if isinstance(records[0], Pair) else []
    if tied:
        lines.append(f"{tied} of {total} rankings have ties alone")
    if equal:
        what = "chosen equal to rejected" if isinstance(records[0], Pair) else "equal answers at different ranks"
        lines.append(f"{equal} of {total} {_name(records)} have {what}, token by token")
    where = _source_of(rows)
    if tied + equal == total:
        raise DataError(f"{where}: nothing says which answer is better: {'; '.join(lines)}")
    lines += [*_one_value(records), *_empty(records, end_ids)]
    different = len({_content(one) for one in records})
    if 4 * different < total:
        lines.append(f"{total - different} of {total} {_name(records)} are copies of earlier ones")
    return [f"{where}: {one}" for one in lines]


def _source_of(rows: Sequence[Located]) -> str:
    """Return the file of the rows, or what the names of several files have in common."""
    files = {one.where.rpartition(":")[0]: None for one in rows}
    return next(iter(files)) if len(files) == 1 else f"{os.path.commonpath(list(files))} ({len(files)} files)"


def constant(values: Sequence[float]) -> bool:
    """Return whether there are several values and all are equal.

    >>> constant([1.0, 1.0]), constant([1.0, 2.0]), constant([1.0])
    (True, False, False)
    """
    return len(values) > 1 and len(set(values)) == 1


def _name(records: Sequence[Any]) -> str:
    return NAMES.get(type(records[0]), "answers")


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


def _ties_of(rows: Sequence[Located]) -> Iterator[str]:
    """Count the rankings with ties alone among rows that are read as pairs: no pair comes from them."""
    ranked = [one for one in rows if "responses" in one.row and one.row.get("probability") is None]
    fields = ["ranks" if one.row.get("ranks") is not None else "scores" for one in ranked]
    given = [numbers(one, name, len(one.row["responses"])) for one, name in zip(ranked, fields, strict=True)]
    tied = sum(map(constant, given))
    if tied:
        yield f"{tied} of {len(ranked)} rankings have ties alone"


def _one_value(records: Sequence[Any]) -> Iterator[str]:
    """Name the label or the score if all answers have the same one."""
    values: dict[str, list[Any]] = {
        "answers have the label": [],
        "answers have the score": [],
        "steps have the label": [],
    }
    for one in records:
        if isinstance(one, Unpaired):
            values["answers have the label"].append(one.good)
        elif isinstance(one, Labeled):
            values["answers have the score"].append(one.score)
        elif isinstance(one, Stepped):
            values["steps have the label"] += one.labels[one.ends].tolist()
    for what, found in values.items():
        if constant(found):
            shown = str(found[0]).lower() if isinstance(found[0], bool) else f"{found[0]:g}"
            yield f"{len(found)} of {len(found)} {what} {shown}, so nothing tells good from bad"


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


def _empty(records: Sequence[Any], end_ids: Sequence[int]) -> Iterator[str]:
    answers = [row for one in records for row in _answers(one)]
    empty = sum(int(row.mask.sum()) == 1 and int(row.ids[row.start]) in end_ids for row in answers)
    if empty and 2 * empty >= len(answers):
        yield f"{empty} of {len(answers)} answers are empty: their end token alone"


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
