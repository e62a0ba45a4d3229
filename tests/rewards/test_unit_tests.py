"""The reward unit_tests: forms of tests and answers, what crosses between the processes, and reasons."""

import json
import time
from typing import Any

import pytest

from whet.errors import RecipeError, RewardError
from whet.rewards.verifiers.unit_tests import UnitTests, cases, default_workers, run
from whet.sandbox.calls import packed, unpacked

SQUARE = "def f(x):\n    return x * x\n"
ECHO = "print(input().upper())"
FORMS: list[tuple[str, Any, float, str]] = [
    (SQUARE, "assert f(2) == 4", 1.0, ""),
    (SQUARE, ["assert f(2) == 4", "assert f(3) == 9"], 1.0, ""),
    (SQUARE, "assert f(2) == 4\nassert f(3) == 10", 0.5, "AssertionError"),
    (SQUARE, '["assert f(2) == 4", "assert f(3) == 10", "assert f(4) == 16", "assert f(5) == 25"]', 0.75, "AssertionError"),
    (SQUARE, "def test_two():\n    assert f(2) == 4\ndef test_three():\n    assert f(3) == 9", 1.0, ""),
    (SQUARE, "def test_two():\n    assert f(2) == 5\ndef test_three():\n    assert f(3) == 9", 0.5, "AssertionError"),
    (SQUARE, "import math\nfor one in range(4):\n    assert math.isclose(f(one), one ** 2)", 1.0, ""),
    (SQUARE, "from solution import f as g\nassert g(2) == 4", 1.0, ""),
    (SQUARE, "def check(candidate):\n    assert candidate(2) == 4\ncheck(f)", 1.0, ""),
    (SQUARE, "assert g(2) == 4", 0.0, "NameError"),
    ("def f(x): return x +", "assert f(2) == 4", 0.0, "SyntaxError"),
    ("1 / 0\n" + SQUARE, "assert f(2) == 4", 0.0, "ZeroDivisionError"),
    (f"Here it is:\n```python\n{SQUARE}```\nDone.", "assert f(2) == 4", 1.0, ""),
    (f"```python\nold\n```\n```py\n{SQUARE}```\n```json\n1\n```", "assert f(2) == 4", 1.0, ""),
    ("```python\n```", "assert f(2) == 4", 0.0, "no program"),
    ("", "assert f(2) == 4", 0.0, "no program"),
    (ECHO, [{"input": "a", "output": "A"}, {"input": "b\n", "output": "B\n"}], 1.0, ""),
    (ECHO, {"inputs": ["a", "b"], "outputs": ["A", "C"]}, 0.5, "another output"),
    (ECHO, json.dumps({"inputs": ["a"], "outputs": ["A  \n\n"]}), 1.0, ""),
    (ECHO, [{"input": ["a", "b"], "output": ["A"]}], 1.0, ""),
    ("print(1 / 0)", [{"input": "", "output": ""}], 0.0, "ZeroDivisionError"),
    ("import sys\nprint('A')\nsys.exit(3)", [{"input": "", "output": "A"}], 0.0, "exit status 3"),
    ("if __name__ == '__main__':\n    print('A')\n    exit()", [{"input": "", "output": "A"}], 1.0, ""),
    ("print('ü', input())", [{"input": "ß", "output": "ü ß"}], 1.0, ""),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "tests", "score", "reason"), FORMS)
def test_forms_of_tests(completion: str, tests: Any, score: float, reason: str) -> None:
    verdict = run(completion, tests)
    assert (verdict.score, verdict.reason) == (score, reason)


PROGRAM = """
import math
from collections import Counter, namedtuple
from dataclasses import dataclass
from fractions import Fraction

class Wrong(ValueError): pass
Point = namedtuple("Point", "x y")

@dataclass
class Box:
    size: int
    def grow(self, by=1):
        self.size += by
        return self
    def __len__(self): return self.size
    def __contains__(self, one): return one == self.size
    def __getitem__(self, key): return [key, self.size]

class Stack:
    def __init__(self): self.items = []
    def push(self, one): self.items.append(one)
    def pop(self): return self.items.pop()

def mixed(): return (1, 2.5, "a\\ud800", None, True, [b"x"], {1: {2}, (3,): frozenset({4})}, 10 ** 40, float("inf"), 1j, Fraction(1, 3))
def counted(text): return Counter(text)
def point(): return Point(1, 2)
def sort(numbers): numbers.sort()
def extend(one, two): one.update(two)
def fail(): raise Wrong("no")
def numbers():
    yield from range(3)
def same(value): return value
"""
CROSSING = """
values = mixed()
assert values[:4] == (1, 2.5, "a\\ud800", None) and type(values) is tuple
assert values[4] is True and values[5] == [b"x"] and values[6] == {1: {2}, (3,): frozenset({4})}
assert values[7] == 10 ** 40 and values[8] == float("inf") and values[9] == 1j and values[10] * 3 == 1
assert counted("aab") == {"a": 2, "b": 1}
assert point() == (1, 2)
given = [3, 1, 2]
sort(given)
assert given == [1, 2, 3]
one = {"a": 1}
extend(one, {"b": 2})
assert one == {"a": 1, "b": 2}
try:
    fail()
    raise AssertionError
except Wrong as error:
    assert isinstance(error, ValueError) and str(error) == "no"
assert list(numbers()) == [0, 1, 2]
assert Box(2).grow(by=3).size == 5 and len(Box(7)) == 7 and 4 in Box(4) and Box(1)["k"] == ["k", 1]
stack = Stack()
stack.push("a"); stack.push("b")
assert stack.pop() == "b" and stack.items == ["a"]
stack.items = []
assert stack.items == []
assert same(stack) == stack and same(stack) != Stack()
assert math.floor(2.5) == 2
assert repr(Box(3)) == "Box(size=3)"
assert isinstance(counted("a"), dict) and sorted(same([2, 1])) == [1, 2]
"""


@pytest.mark.parametrize("isolation", ["process", "none"])
def test_what_crosses_between_tests_and_program(isolation: Any) -> None:
    verdict = run(PROGRAM, CROSSING, options=UnitTests(isolation=isolation))
    assert (verdict.score, verdict.reason) == (1.0, "")


def test_without_isolation_objects_and_functions_cross_as_they_are() -> None:
    code = "class A:\n    def __eq__(self, other): return True\ndef apply(f, x): return f(x)"
    tests = ["assert A() == A()", "assert apply(lambda x: x + 1, 2) == 3"]
    assert run(code, tests, options=UnitTests(isolation="none")).score == 1.0
    verdict = run(code, tests)
    assert (verdict.score, verdict.reason) == (0.0, "AssertionError")


def test_what_is_packed_comes_back() -> None:
    for value in (
        1,
        True,
        None,
        "ü",
        [1, [2]],
        (1, (2,)),
        {"a": {1, 2}},
        b"x",
        bytearray(b"y"),
        2**70,
        -(2**70),
        1.5,
        set(),
        {},
    ):
        found = unpacked(json.loads(json.dumps(packed(value, repr))), repr)
        assert found == value
        assert type(found) is type(value)


def test_entry_points_rows_without_tests_and_the_score_of_all() -> None:
    check = "def check(candidate):\n    assert candidate(2) == 4"
    own = UnitTests()
    found = own(["p"] * 3, [SQUARE] * 3, tests=[check, check, None], entry_point=["f", "nothing", "f"])
    assert found == [1.0, 0.0, None]
    assert own.verdicts([SQUARE], {"tests": [check], "entry_point": ["nothing"]})[0].reason == "TypeError"
    assert run(SQUARE, "assert f(1) == 1\nassert f(1) == 2", options=UnitTests(score="all")).score == 0.0


def test_a_function_with_the_name_of_a_builtin_is_tested_if_it_is_the_entry_point() -> None:
    code = "def sum(a, b): return 10 * a + b\ndef all(values): return True"
    assert run(code, "assert sum(1, 2) == 12", "sum").score == 1.0
    assert run(code, "assert sum(1, 2) == 3", "sum").reason == "AssertionError"
    assert run(code, "assert sum([1, 2]) == 3").score == 1.0
    assert run(code, "assert all([sum(1, 2) == 3])", "sum").score == 0.0, "the builtin all is not that of the program"


def test_installed_packages_are_seen_when_it_is_asked_for() -> None:
    code = "import numpy\ndef f(x): return numpy.int64(x) * numpy.arange(3)"
    assert run(code, "assert f(2) == [0, 2, 4]").reason == "ModuleNotFoundError"
    assert run(code, "assert f(2) == [0, 2, 4]", options=UnitTests(packages=True, memory=4096)).score == 1.0


def test_limits_are_options_and_the_next_answer_works() -> None:
    own = UnitTests(cpu_time=1.0, output=1000, memory=128)
    loop, loud, large = "while True: pass", "print('x' * 2000)", "bytearray(200 << 20)"
    tests = [[{"input": "", "output": "x"}]] * 4
    verdicts = own.verdicts([loop, loud, large, "print('x')"], {"tests": tests})
    assert [one.reason for one in verdicts] == [
        "more than 1 s of CPU time",
        "more than 1000 bytes of output",
        "MemoryError",
        "",
    ]


def test_programs_for_which_no_time_is_left_score_0_and_raise_nothing() -> None:
    """The first input uses all the time of the answer, so the program does not run for the others."""
    tests = [{"input": one, "output": "x"} for one in ("sleep", "", "")]
    code = "import time\nif input() == 'sleep': time.sleep(60)\nprint('x')"
    verdict = run(code, tests, options=UnitTests(timeout=1.0))
    assert (verdict.score, verdict.reason) == (0.0, "more than 1 s")


def test_answers_run_at_the_same_time() -> None:
    code = "import time\ntime.sleep(1)\nprint('x')"
    began = time.monotonic()
    assert UnitTests(workers=8)(["p"] * 8, [code] * 8, tests=[[{"input": "", "output": "x"}]] * 8) == [1.0] * 8
    assert time.monotonic() - began < 7


def test_the_workers_of_one_machine_share_its_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert default_workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert default_workers() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert default_workers() == 1


BAD: list[tuple[Any, str]] = [
    ("x = 1", "there is no test in 'x = 1'"),
    ("assert f(", r"was never closed"),
    ([], "expected code with asserts"),
    (3, "expected code with asserts"),
    ({"inputs": ["a"], "outputs": []}, "lists of the same length"),
    ({"fn_name": "f", "inputs": [], "outputs": []}, "tests with fn_name are not read"),
    ([{"input": "a"}], "expected code with asserts"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "message"), BAD)
def test_tests_that_cannot_be_read_are_refused_with_the_row(value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"reward\.0\.tests: row 7: .*{message}"):
        UnitTests().check_value(value, "reward.0.tests: row 7")


def test_tests_that_cannot_be_read_are_named_in_a_call_too() -> None:
    with pytest.raises(RewardError, match=r"unit_tests\.tests: column 'tests': there is no test in 'x = 1'"):
        run(SQUARE, "x = 1")


def test_cases_of_both_kinds() -> None:
    assert cases("assert f(1)") == (["assert f(1)"], [])
    assert cases('[{"input": 1, "output": [2, 3]}]') == ([], [("1", "2\n3")])
    assert cases("[f(1)]\nassert f(1)") == (["[f(1)]\nassert f(1)"], [])
