"""A short form of `make fuzz`, and proof that it can fail: what counts as one clear error, and that refusing all is no success."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from proof import fuzz
from proof.limits import RAISED, Ended, limited

COUNT = 250
CLEAR = "whet: a caution\nwhet: optim.lr: expected a finite number, got inf\n"


@pytest.fixture(scope="module")
def world() -> Iterator[fuzz.World]:
    with TemporaryDirectory(prefix="whet-fuzz-") as folder:
        yield fuzz.World(Path(folder))


def test_mutated_inputs_succeed_or_end_with_one_clear_error(world: fuzz.World) -> None:
    report = fuzz.fuzz(world, COUNT, seed=0)
    shown = [
        f"whet {' '.join(given.words)} {given.files}: {why}\n{ended.error[-1500:]}"[:4000]
        for given, ended, why in report.failures
    ]
    assert not shown, "\n\n".join(shown[:5])
    assert not report.refusing(), "\n".join(report.lines())
    assert len(report.outcomes) == 7
    assert (
        sum(found.total() for found in report.outcomes.values()) >= 0.9 * COUNT
    )  # hypothesis leaves out repeated ones


@pytest.mark.parametrize(
    ("ended", "what"),
    [
        (Ended(0, "out\n", "whet: a caution\n", 0), ""),
        (Ended(2, "", CLEAR, 0), ""),
        (Ended(1, "they differ\n", "", 0), ""),
        (Ended(-signal.SIGSEGV, "", "", 0), "signal 11"),
        (Ended(RAISED, "", "Traceback (most recent call last)\nKeyError: 'a'\n", 0), "traceback"),
        (Ended(1, "", "whet: failed\nTraceback (most recent call last)\n", 0), "traceback"),
        (Ended(2, "", "", 0), "without a message"),
        (Ended(2, "", "whet: one\nand more\n", 0), "not messages of whet"),
        (Ended(2, "", "whet: model.path: 'NoneType' object has no attribute 'x'\n", 0), "internal error"),
        (Ended(2, "", "whet: the file: KeyError('a')\n", 0), "internal error"),
        (Ended(2, "", f"whet: {'x' * 5000}\n", 0), "5006 characters"),
        (Ended(130, "", CLEAR, 0), "exit status 130"),
    ],
)
def test_what_one_clear_error_is(ended: Ended, what: str) -> None:
    found = fuzz.fault(ended)
    assert (what in found) if what else found == ""


def test_refusing_everything_is_a_failure() -> None:
    report = fuzz.Report()
    for _ in range(20):
        report.add(fuzz.Input("rows", []), Ended(2, "", CLEAR, 0))
    report.add(fuzz.Input("words", []), Ended(0, "", "", 0))
    assert report.refusing() == ["rows"]
    assert not report.failures


def test_a_failure_is_kept_and_given_again(world: fuzz.World, tmp_path: Path) -> None:
    given = fuzz.Input("recipes", ["explain", "recipe.yaml"], {"recipe.yaml": b"method: sft\nseed: 010\n"})
    ended = world.outcome(given)
    assert ended.status == 2
    assert "two readings" in ended.error
    assert fuzz.read(fuzz.keep(tmp_path, 1, given, ended, "it failed")) == given


def sleeps() -> int:
    time.sleep(1000)
    return 0


def turns() -> int:
    while True:
        pass


def grows() -> int:
    return len(bytearray(1 << 33))


def raises() -> int:
    raise KeyError("a")


def test_the_limits_end_what_hangs_and_what_grows(tmp_path: Path) -> None:
    assert limited(sleeps, tmp_path, seconds=1).status == -signal.SIGKILL
    assert limited(turns, tmp_path, seconds=1).status == -signal.SIGXCPU
    assert (limited(grows, tmp_path).status, limited(raises, tmp_path).status) == (RAISED, RAISED)
    assert "MemoryError" in limited(grows, tmp_path).error
    assert limited(lambda: os.getpid() % 1 + 7, tmp_path).status == 7
