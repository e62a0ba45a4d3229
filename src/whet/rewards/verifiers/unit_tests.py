"""The reward unit_tests: the share of tests that the program in an answer passes, run in a sandbox."""

import itertools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

import msgspec

from whet.errors import RecipeError, RewardError
from whet.methods.options import Count, Processes, Seconds
from whet.rewards.verifiers.base import RIGHT, Verdict, Verifier, blocks, check, make
from whet.rewards.verifiers.json_schema import strict_json
from whet.sandbox.calls import units
from whet.sandbox.outside import Limits, Runner, found_abilities
from whet.terminal import caution

PYTHON = ("", "python", "py", "python3")
"""Languages of a fenced block that is taken for the program."""


@dataclass(frozen=True)
class UnitTests(Verifier):
    """Run the Python program in the answer against the tests of a column, in a sandbox, and score the share of tests that pass.

    The column has one of these, for each row:

    - tests as code: a text, or a list of texts. Each statement with an assert, each function test... without parameters, and HumanEval's
      check(candidate) is one test. The tests know the names of the program.
    - pairs of standard input and output: a list of {"input": ..., "output": ...}, or {"inputs": [...], "outputs": [...]}. The program
      is run once for each, must end with status 0 and write the output; white space at the ends of lines does not count.

    Both may be JSON text. The sandbox has no network, no environment variables, no files but Python's library and an empty folder, and
    limits; see docs/rewards.md.
    """

    tests: str = "tests"
    """column of the prompt rows with the tests"""
    entry_point: str = "entry_point"
    """column with the name of the function that check(candidate) gets; rows without it need none"""
    find: Literal["auto", "block", "whole"] = "auto"
    """what is the program: the last fenced block (of Python, or without a language), or the whole answer; auto takes the whole where
    there is no block"""
    score: Literal["share", "all"] = "share"
    """share of the tests that pass, or 1 if all pass and else 0"""
    isolation: Literal["process", "none"] = "process"
    """with process, tests as code run in another process than the program: it cannot change the verdict, and plain data alone crosses
    (numbers, texts, lists, tuples, sets, dicts; objects of the program can be called). With none they run in one process, and a
    program that is made for it can fake success"""
    cpu_time: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 5.0
    """CPU time of each process, in seconds (whole ones, rounded up)"""
    timeout: Seconds = 15.0
    """time of all tests of one answer together, in seconds"""
    memory: Annotated[int, msgspec.Meta(ge=64, le=1 << 20)] = 512
    """address space of each process, in MiB"""
    processes: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 8
    """processes and threads of one program at the same time"""
    disk: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 64
    """size of all files together, in MiB; of each alone without namespaces"""
    output: Count = 1 << 20
    """what one program may write to each of standard output and standard error, in bytes"""
    packages: bool = False
    """let the program import the installed packages too, not Python's library alone"""
    workers: Processes | None = None
    """answers that run at the same time; default: the CPUs of this process, shared by the workers of this machine"""

    def columns(self) -> dict[str, str]:
        """See `Verifier.columns`."""
        return {"tests": self.tests}

    def check(self, where: str) -> None:
        """See `Verifier.check`. Prints once what confines programs on this machine."""
        try:
            _tell()
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error

    def check_value(self, value: Any, where: str) -> None:
        """See `Verifier.check_value`. Tests that cannot be read are refused."""
        try:
            cases(value)
        except (ValueError, SyntaxError) as error:
            raise RecipeError(f"{where}: {error}") from error

    def verdicts(self, completions: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list[Verdict]:
        """See `Verifier.verdicts`. Several answers run at the same time. An error or a signal kills all of them."""
        tests = columns.get(self.tests)
        if tests is None:
            return super().verdicts(completions, columns)  # it names the missing column
        entries = columns.get(self.entry_point) or itertools.repeat("")
        runner = self._runner()
        with ThreadPoolExecutor(self.workers or default_workers(), "whet-tests") as pool:
            try:
                rows = zip(completions, tests, entries, strict=False)
                return [one.result() for one in [pool.submit(self._judged, runner, *row) for row in rows]]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                runner.stop()
                raise

    def verdict(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """See `Verifier.verdict`."""
        return self._judged(self._runner(), completion, row[self.tests], row.get(self.entry_point))

    def _runner(self) -> Runner:
        mib = 1 << 20
        limits = Limits(
            cpu_time=self.cpu_time, timeout=self.timeout, memory=self.memory * mib, processes=self.processes, disk=self.disk * mib,
            file_size=self.disk * mib, output=self.output,
        )  # fmt: skip
        return Runner(limits, packages=self.packages)

    def _judged(self, runner: Runner, completion: str, value: Any, entry: Any) -> Verdict:
        if value is None:
            return Verdict(None, "the row has no tests")
        program = self._program(completion)
        if program is None or not program.strip():
            return Verdict(0.0, "no program")
        program = program.encode("utf-8", "replace").decode()
        try:
            asserts, pairs = cases(value)
        except (ValueError, SyntaxError) as error:
            raise RewardError(f"unit_tests.tests: column {self.tests!r}: {error}") from error
        if pairs:
            results = runner.programs(program, [given for given, _ in pairs])
            wrong = [
                one.reason or ("" if _plain(one.output.decode(errors="replace")) == _plain(right) else "another output")
                for one, (_, right) in zip(results, pairs, strict=True)
            ]
        else:
            wrong = runner.tests(program, asserts, str(entry or ""), apart=self.isolation == "process")
        passed = wrong.count("")
        if passed == len(wrong):
            return RIGHT
        share = passed / len(wrong) if self.score == "share" else 0.0
        return Verdict(share, next(reason for reason in wrong if reason))

    def _program(self, text: str) -> str | None:
        found = [content for language, content in blocks(text) if language in PYTHON] if self.find != "whole" else []
        return found[-1] if found else None if self.find == "block" else text


def run(completion: str, tests: Any, entry_point: str = "", options: UnitTests = UnitTests()) -> Verdict:
    """Run the program in an answer against tests, and return the score with the reason. `tests` is the value of a column.

    Raises RewardError for tests that cannot be read, RecipeError if programs cannot be confined on this machine.
    """
    return options.verdict(completion, {options.tests: tests, options.entry_point: entry_point})


def cases(value: Any) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the tests of a row as (texts of code, pairs of input and output), one of which is empty. Raises ValueError or
    SyntaxError for what is none."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = strict_json(value)
        except ValueError:
            pass  # tests may start with a list
    if isinstance(value, Mapping) and "fn_name" in value:
        raise ValueError("tests with fn_name are not read; write them as asserts, or as programs with standard input")
    if isinstance(value, Mapping) and {"inputs", "outputs"} <= value.keys():
        inputs, outputs = value["inputs"], value["outputs"]
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise ValueError("inputs and outputs must be lists of the same length")
        value = [{"input": given, "output": right} for given, right in zip(inputs, outputs, strict=True)]
    listed = [value] if isinstance(value, (str, Mapping)) else value
    if (
        isinstance(listed, list)
        and listed
        and all(isinstance(one, Mapping) and {"input", "output"} <= one.keys() for one in listed)
    ):
        return [], [(_text(one["input"]), _text(one["output"])) for one in listed]
    if not isinstance(listed, list) or not listed or not all(isinstance(one, str) for one in listed):
        raise ValueError(
            f"expected code with asserts, a list of such texts, or pairs of input and output, got {value!r:.80}"
        )
    if not any(kind != "setup" for text in listed for kind, _ in units(text)):
        raise ValueError(f"there is no test in {listed[0]!r:.80}: no assert, no function test..., no check(candidate)")
    return listed, []


def _text(value: Any) -> str:
    return "\n".join(str(one) for one in value) if isinstance(value, list) else str(value)


def _plain(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def default_workers() -> int:
    """Return how many answers run at the same time: the CPUs of this process, shared by the workers that torchrun has started."""
    try:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError:
        local = 1
    return max(1, len(os.sched_getaffinity(0)) // max(1, local))


@cache
def _tell() -> None:
    words = found_abilities().words()
    if os.environ.get("RANK", "0") == "0":  # one of torchrun's workers prints it
        caution(f"reward unit_tests: programs run with {words}")


Options = UnitTests
__all__ = ["Options", "UnitTests", "cases", "check", "make", "run"]
