import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from whet.data import Group, Prompt, Sample
from whet.errors import RecipeError, RewardError, WhetError
from whet.registry import load_object
from whet.rewards import Scores, Weighted, score_all
from whet.rewards.functions import FunctionReward

USER = {"role": "user", "content": "a b"}


def sample(number: int, text: str, ids: tuple[int, ...]) -> Sample:
    return Sample(0, number, ids, (-1.0,) * len(ids), 0, "stop", text)


def groups(**fields: Any) -> list[Group]:
    """Two prompts with two answers each, of 3, 1, 2 and 2 tokens."""
    one = Prompt("0", (3, 7), (USER,), {"prompt": "a b", "target": "yes"} | fields)
    talk = ({"role": "system", "content": "good"}, USER)
    two = Prompt("1", (5, 3), talk, {"prompt": list(talk), "level": 2})
    return [
        Group(one, (sample(0, "yes no", (15, 16, 6)), sample(1, "", (6,)))),
        Group(two, (sample(0, "no", (16, 6)), sample(1, "maybe", (17, 6)))),
    ]


def scored(returned: Any) -> Scores:
    return FunctionReward(lambda prompts, completions, **columns: returned, "judge").score(groups())


def test_a_function_sees_prompts_completions_ids_and_every_further_column() -> None:
    seen: dict[str, Any] = {}

    def judge(**given: Any) -> list[float]:
        seen.update(given)
        return [1.0, 2.0, 3.0, 4.0]

    scores = FunctionReward(judge).score(groups())
    talk = [{"role": "system", "content": "good"}, USER]
    assert seen == {
        "prompts": ["a b", "a b", talk, talk],
        "completions": ["yes no", "", "no", "maybe"],
        "completion_ids": [[15, 16, 6], [6], [16, 6], [17, 6]],
        "target": ["yes", "yes", None, None],
        "level": [None, None, 2, 2],
    }
    assert (scores.answer.tolist(), scores.token) == ([1.0, 2.0, 3.0, 4.0], None)


@pytest.mark.parametrize("name", ["name", "function", "self", "given", "id", "text"])
def test_a_column_may_have_any_name(name: str) -> None:
    reward = FunctionReward(lambda prompts, completions, **columns: [float(value == "x") for value in columns[name]])
    assert reward.score(groups(**{name: "x"})).answer.tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids"])
def test_a_column_called_like_what_every_function_gets_is_refused_by_its_name(name: str) -> None:
    reward = FunctionReward(lambda **given: [1.0] * 4)
    with pytest.raises(WhetError, match=f"'{name}'"):
        reward.score(groups(**{name: "x"}))


SCALARS = [
    [1, 2, 3, 4],
    (1.0, 2.0, 3.0, 4.0),
    torch.tensor([1.0, 2.0, 3.0, 4.0]),
    torch.tensor([1, 2, 3, 4]),
    numpy.array([1.0, 2.0, 3.0, 4.0]),
    list(numpy.array([1.0, 2.0, 3.0, 4.0], dtype=numpy.float32)),
    [torch.tensor(1.0), 2.0, torch.tensor([3.0]), 4],
]


@pytest.mark.parametrize("returned", SCALARS, ids=lambda value: type(value).__name__)
def test_one_number_an_answer_may_come_in_any_kind_of_list(returned: Any) -> None:
    scores = scored(returned)
    assert scores.token is None
    assert scores.answer.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert scores.answer.dtype == torch.float32


DENSE = [
    ([[1.0, 0.0, 2.0], [3], [0.0, -1.0], [0.5, 0.5]], [[1.0, 0.0, 2.0], [3.0], [0.0, -1.0], [0.5, 0.5]], [3, 3, -1, 1]),
    ([[(0, 1.0), (2, 2.0)], [(0, 3)], [(1, -1.0)], [(0, 0.5)]], [[1.0, 0.0, 2.0], [3.0], [0.0, -1.0], [0.5, 0.0]], [3, 3, -1, 0.5]),
    ([[(2, 1.0), (2, 0.5)], [[0, 1]], [(0, 0)], [[0, 4.0]]], [[0.0, 0.0, 1.5], [1.0], [0.0, 0.0], [4.0, 0.0]], [1.5, 1, 0, 4]),
]  # fmt: skip


@pytest.mark.parametrize(("returned", "token", "answer"), DENSE)
def test_a_list_an_answer_is_dense_per_token_or_per_segment_and_sums_to_the_answers_score(
    returned: list, token: list, answer: list
) -> None:
    scores = scored(returned)
    assert scores.token is not None
    assert [one.tolist() for one in scores.token] == token
    assert scores.answer.tolist() == [float(value) for value in answer]


def test_an_answer_without_a_segment_scores_nothing_where_the_others_are_scored_by_segments() -> None:
    assert scored([[(2, 1.0)], [], [(1, 1.0)], []]).answer.tolist() == [1.0, 0.0, 1.0, 0.0]


WRONG = [
    (None, "expected a list with one score per answer, got NoneType"),
    (1.0, "expected a list with one score per answer, got float"),
    ("1234", "expected a list with one score per answer, got str"),
    ({"score": 1}, "expected a list with one score per answer, got dict"),
    ([1.0, 2.0], "4 answers were given, 2 scores came back"),
    ([], "4 answers were given, 0 scores came back"),
    ([1.0, math.nan, 2.0, 3.0], "answer 1 got nan, expected a finite number"),
    ([1.0, 2.0, 3.0, -math.inf], "answer 3 got -inf, expected a finite number"),
    ([[1.0, None, 0.0], [1.0], [1.0, 1.0], [1.0, 1.0]], "answer 0 got None, expected a number"),
    (["good", 1.0, 2.0, 3.0], "answer 0 got 'good', expected a number"),
    ([True, 1.0, 2.0, 3.0], "answer 0 got True, expected a number"),
    ([[1.0, 2.0, 3.0], 1.0, [1.0, 2.0], [1.0, 2.0]], "answer 1 got 1.0, other answers a list"),
    ([[1.0, 2.0], [1.0], [1.0, 2.0], [1.0, 2.0]], "answer 0 has 3 tokens, 2 scores came back"),
    ([[1.0, 2.0, math.nan], [1.0], [1.0, 2.0], [1.0, 2.0]], "answer 0 got nan, expected a finite number"),
    ([[(3, 1.0)], [(0, 1.0)], [(0, 1.0)], [(0, 1.0)]], "answer 0 has 3 tokens, a segment ends at 3"),
    ([[(-1, 1.0)], [(0, 1.0)], [(0, 1.0)], [(0, 1.0)]], "answer 0 has 3 tokens, a segment ends at -1"),
    ([[(0, 1.0, 2)], [(0, 1.0)], [(0, 1.0)], [(0, 1.0)]], "answer 0"),
    ([[(0, 1.0), 2.0], [(0, 1.0)], [(0, 1.0)], [(0, 1.0)]], "answer 0"),
    ([[("end", 1.0)], [(0, 1.0)], [(0, 1.0)], [(0, 1.0)]], "answer 0"),
    ([[(0.5, 1.0)], [(0, 1.0)], [(0, 1.0)], [(0, 1.0)]], "answer 0"),
    ([torch.ones(2), torch.ones(1), torch.ones(2), torch.ones(2)], "answer 0"),
    ([numpy.ones(2), numpy.ones(1), numpy.ones(2), numpy.ones(2)], "answer 0"),
    ([1 + 2j, 1.0, 2.0, 3.0], "answer 0 got (1+2j), expected a number"),
]


@pytest.mark.parametrize(("returned", "what"), WRONG)
def test_what_a_function_may_not_return_is_named_with_its_answer(returned: Any, what: str) -> None:
    with pytest.raises(RewardError) as caught:
        scored(returned)
    assert str(caught.value).startswith("reward judge: " + what)


JUDGE = "def judge(prompts, completions, **columns):\n"
RAISING = {
    "by itself": (f"\n{JUDGE}    return 1 / 0\n", 3, "ZeroDivisionError: division by zero"),
    "in a helper": (f"\ndef inner():\n    raise KeyError('a')\n{JUDGE}    return inner()\n", 3, "KeyError: 'a'"),
    "in a library": (f"import json\n{JUDGE}    return json.loads('no')\n", 3, "JSONDecodeError"),
}


@pytest.mark.parametrize("kind", RAISING)
def test_what_a_function_raises_is_told_with_its_place_in_the_users_file(kind: str, tmp_path: Path) -> None:
    source, line, what = RAISING[kind]
    (tmp_path / "mine.py").write_text(source)
    reward = FunctionReward(load_object(f"{tmp_path}/mine.py:judge"))
    with pytest.raises(RewardError) as caught:
        reward.score(groups())
    assert str(caught.value).startswith(f"reward judge raised {what}")
    assert str(caught.value).endswith(f"(at {tmp_path}/mine.py:{line})")


def test_a_function_that_does_not_take_the_columns_is_told_of_by_its_own_place(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("\ndef judge(prompts, completions):\n    return [0.0] * len(prompts)\n")
    with pytest.raises(RewardError, match=r"unexpected keyword argument 'completion_ids'.*mine\.py:2\)$"):
        FunctionReward(load_object(f"{tmp_path}/mine.py:judge")).score(groups())


def test_several_rewards_stand_side_by_side_under_their_names_and_dense_ones_are_summed_by_weight() -> None:
    def fixed(returned: Any) -> Callable:
        return lambda prompts, completions, **columns: returned

    dense = fixed([[1.0, 0.0, 2.0], [3.0], [0.0, -1.0], [0.5, 0.5]])
    ends = fixed([[(2, 1.0)], [(0, 1.0)], [(1, 1.0)], [(1, 1.0)]])
    named, token, step, _ = score_all(
        [
            Weighted("short", FunctionReward(fixed([1, 2, 3, 4])), 0.5),
            Weighted("dense", FunctionReward(dense), 2.0),
            Weighted("ends", FunctionReward(ends), -1.0),
        ],
        groups(),
    )
    assert {name: values.tolist() for name, values in named.items()} == {
        "short": [1.0, 2.0, 3.0, 4.0],
        "dense": [3.0, 3.0, -1.0, 1.0],
        "ends": [1.0, 1.0, 1.0, 1.0],
    }
    assert token.tolist() == [[2.0, 0.0, 3.0], [5.0, 0.0, 0.0], [0.0, -3.0, 0.0], [1.0, 0.0, 0.0]]
    assert step.int().tolist() == [
        [1, 1, 1],
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 0],
    ]  # every token of the dense one ends a step


STEPS = [
    ("one number an answer", [1, 2, 3, 4], [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 1, 0]]),
    (
        "a number a token",
        [[0.0, 0.0, 0.0], [0.0], [0.0, 0.0], [0.0, 0.0]],
        [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 0]],
    ),
    ("segments", [[(0, 1.0), (2, 0.0)], [(0, 1)], [(0, 0.0)], []], [[1, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 0]]),
]


@pytest.mark.parametrize(("returned", "expected"), [one[1:] for one in STEPS], ids=[one[0] for one in STEPS])
def test_a_step_ends_where_a_score_stands_even_one_of_zero(returned: list, expected: list) -> None:
    judge = Weighted("judge", FunctionReward(lambda prompts, completions, **columns: returned))
    assert score_all([judge], groups())[2].int().tolist() == expected


def test_without_a_dense_reward_the_dense_sum_is_zero_and_as_wide_as_the_longest_answer() -> None:
    _, token, _, _ = score_all(
        [Weighted("one", FunctionReward(lambda prompts, completions, **columns: [1, 2, 3, 4]))], groups()
    )
    assert torch.equal(token, torch.zeros(4, 3))


def test_a_function_is_loaded_from_a_file_or_a_module(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def judge(): return 7\n")
    assert load_object(f"{tmp_path}/mine.py:judge")() == 7
    assert load_object("math:sqrt") is math.sqrt


UNLOADABLE = [
    ("judge", r"'judge': expected \"file\.py:name\" or \"package\.module:name\""),
    ("nowhere.py:judge", r"nowhere\.py:judge: no such file nowhere\.py"),
    ("no_such_module:judge", r"no_such_module:judge: importing no_such_module failed with ModuleNotFoundError"),
    ("math:judge", r"math:judge: math has no 'judge'"),
]


@pytest.mark.parametrize(("spec", "what"), UNLOADABLE)
def test_a_function_that_cannot_be_loaded_is_named(spec: str, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        load_object(spec)


@pytest.mark.parametrize(
    ("source", "what"), [("import nothing_like_it\n", "ModuleNotFoundError"), ("def (\n", "SyntaxError")]
)
def test_a_file_that_cannot_be_imported_is_named_with_the_cause(source: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(RecipeError, match=rf"mine\.py:judge: importing .*mine\.py failed with {what}"):
        load_object(f"{tmp_path}/mine.py:judge")


class BadLength(list):
    def __len__(self) -> int:
        raise ValueError("no length")


class BadText(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


UNREADABLE: dict[str, Any] = {
    "a huge number": lambda: [10**5000, 1.0, 1.0, 1.0],
    "a sparse tensor": lambda: torch.eye(2).to_sparse(),
    "a tensor without data": lambda: torch.empty(2, device="meta"),
    "a list without a length": lambda: BadLength([1.0, 2.0]),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_an_error_of_the_reward(kind: str) -> None:
    with pytest.raises(RewardError, match=r"reward .*(cannot be read|expected a finite number)"):
        scored(UNREADABLE[kind]())


def test_an_error_that_cannot_say_its_message_is_an_error_of_the_function() -> None:
    def judge(**columns: Any) -> list[float]:
        raise BadText

    with pytest.raises(RewardError, match=r"reward judge raised BadText: \(its message cannot be read: ValueError\)"):
        FunctionReward(judge).score(groups())
