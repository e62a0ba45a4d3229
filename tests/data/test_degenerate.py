"""Degenerate data: what is said of it, with counts, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest

from whet.data import Reader
from whet.data.degenerate import Tally
from whet.errors import DataError

from .helpers import at, reader

WORDS = "a b c d e f g h yes no maybe please thanks hello good bad one two three four".split()  # noqa: SIM905


def said(reading: str, rows: list[dict], own: Reader | None = None) -> list[str]:
    """The cautions about these rows."""
    located, own = at(*rows), own or reader()
    tally = Tally(own.chat.end_ids, pairs=reading == "pairs")
    tally.add(located, getattr(own, reading)(located))
    assert list(tally.files) == ["my.jsonl"]
    return tally.lines()


def some(count: int, make: Callable[[str], dict], total: int = 8) -> list[dict]:
    """`total` rows with different prompts; `make` gives the first `count` of them their degenerate fields."""
    return [{"prompt": word} | (make(word) if number < count else {}) for number, word in enumerate(WORDS[:total])]


def pairs(equal: int) -> list[dict]:
    return [{"chosen": "yes", "rejected": "no"} | one for one in some(equal, lambda _: {"chosen": "no"})]


def rankings(tied: int, alike: int = 0) -> list[dict]:
    scored = some(tied, lambda _: {"scores": [2, 2, 2]})
    rows = [{"responses": ["yes", "no", "maybe"], "scores": [1, 2, 3]} | one for one in scored]
    for row in rows[tied : tied + alike]:
        row["responses"] = ["yes", "yes", "yes"]
    return rows


def labels(good: int, field: str = "label") -> list[dict]:
    return [{"completion": "yes", field: 0} | one for one in some(good, lambda _: {field: 1})]


def answers(empty: int) -> list[dict]:
    rows = some(empty, lambda _: {"responses": ["", ""]})
    return [{"responses": ["yes", "no"], "ranks": [1, 2]} | one for one in rows]


def steps(good: int) -> list[dict]:
    return [{"completions": ["yes"], "labels": [0]} | one for one in some(good, lambda _: {"labels": [1]})]


SAID: list[tuple[str, list[dict], list[str]]] = [
    ("pairs", pairs(0), []),
    ("pairs", pairs(3), ["3 of 8 pairs have chosen equal to rejected, token by token"]),
    ("rankings", pairs(3), ["3 of 8 rankings have equal answers at different ranks, token by token"]),
    ("pairs", rankings(0), []),
    ("pairs", rankings(2), ["2 of 8 rankings have ties alone"]),
    ("rankings", rankings(2), ["2 of 8 rankings have ties alone"]),
    ("rankings", rankings(0, 3), ["3 of 8 rankings have equal answers at different ranks, token by token"]),
    ("unpaired", labels(1), []),
    ("unpaired", labels(8), ["8 of 8 answers have the label true, so nothing tells good from bad"]),
    ("unpaired", labels(0), ["8 of 8 answers have the label false, so nothing tells good from bad"]),
    ("labeled", labels(1, "score"), []),
    ("labeled", labels(8, "score"), ["8 of 8 answers have the score 1, so nothing tells good from bad"]),
    ("steps", steps(7), []),
    ("steps", steps(8), ["8 of 8 steps have the label 1, so nothing tells good from bad"]),
    ("rankings", answers(0), []),
    ("demonstrations", [{"prompt": "a", "completion": "yes"}], []),
    ("demonstrations", [{"prompt": "a", "completion": "yes"}] * 4, []),
    ("demonstrations", [{"prompt": "a", "completion": "yes"}] * 5, ["4 of 5 rows are copies of earlier ones"]),
    ("prompts", [{"prompt": "a", "target": 1}] * 9 + some(0, dict, 2), ["9 of 11 prompts are copies of earlier ones"]),
    ("prompts", some(0, dict, 20), []),
    ("pairs", pairs(0) * 5, ["32 of 40 pairs are copies of earlier ones"]),
    ("labeled", [one | {"score": number} for number in range(5) for one in labels(0, "score")], []),
]  # fmt: skip


@pytest.mark.parametrize(("reading", "rows", "what"), SAID)
def test_degenerate_data_is_said_with_counts(reading: str, rows: list[dict], what: list[str]) -> None:
    assert said(reading, rows) == what


def test_answers_are_compared_as_tokens_and_as_they_are_trained() -> None:
    rows = [{"prompt": word, "chosen": f"yes  {word}", "rejected": f"yes {word}"} for word in WORDS[:3]]
    rows.append({"prompt": "a", "chosen": "b", "rejected": "c"})
    assert said("pairs", rows) == ["3 of 4 pairs have chosen equal to rejected, token by token"]
    long = {"prompt": "a", "chosen": "b c d", "rejected": "b c e"}
    assert said("pairs", [long, rows[-1]]) == []
    assert said("pairs", [long, rows[-1]], reader(5, too_long="cut")) == [
        "1 of 2 pairs have chosen equal to rejected, token by token"
    ]


def test_empty_answers_are_said_if_they_are_half_and_a_short_answer_is_not_empty() -> None:
    rows = [{"prompt": word, "responses": ["", "yes"], "ranks": [1, 2]} for word in WORDS[:3]]
    assert said("rankings", rows) == ["3 of 6 answers are empty: their end token alone"]
    assert said("rankings", [*rows, {"prompt": "h", "responses": ["a", "b"], "ranks": [1, 2]}]) == []
    cut = [
        {"prompt": word, "responses": ["no", "yes"], "ranks": [1, 2], "finish": ["length"] * 2} for word in WORDS[:3]
    ]
    assert said("rankings", cut) == []


NOTHING: list[tuple[str, list[dict[str, Any]], str]] = [
    ("pairs", pairs(8), "8 of 8 pairs have chosen equal to rejected, token by token"),
    ("rankings", pairs(8), "8 of 8 rankings have equal answers at different ranks, token by token"),
    ("rankings", rankings(8), "8 of 8 rankings have ties alone"),
    ("rankings", rankings(3, 5), "3 of 8 rankings have ties alone; 5 of 8 rankings have equal answers"),
    ("pairs", rankings(3, 5), "3 of 8 rankings have ties alone; 15 of 15 pairs have chosen equal"),
    ("rankings", answers(8), "8 of 8 rankings have equal answers"),
]


@pytest.mark.parametrize(("reading", "rows", "what"), NOTHING)
def test_data_that_never_says_which_answer_is_better_is_refused(reading: str, rows: list[dict], what: str) -> None:
    with pytest.raises(DataError) as caught:
        said(reading, rows)
    assert str(caught.value).startswith(f"my.jsonl: nothing says which answer is better: {what}")
