"""A call of a user's function: SystemExit is its error, a signal passes, and a slow one is named while it runs."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from whet.calling import guard
from whet.calling.guard import UserCall
from whet.errors import Interrupted, RecipeError, RewardError
from whet.loops.interrupt import graceful
from whet.registry import load_object

ENDS = {
    "sys.exit(3)": "SystemExit: 3",
    "exit()": "SystemExit",
    "raise GeneratorExit": "GeneratorExit",
    "import asyncio; raise asyncio.CancelledError('late')": "CancelledError: late",
    "import argparse; argparse.ArgumentParser().parse_args(['--nothing'])": "SystemExit: 2",
}


@pytest.mark.parametrize("code", ENDS)
def test_what_ends_a_program_is_an_error_of_the_function(code: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"import sys\ndef judge():\n    {code}\n")
    with pytest.raises(RewardError) as caught:
        UserCall(load_object(f"{tmp_path}/mine.py:judge"), "reward judge")("1 answer")
    assert str(caught.value).startswith(f"reward judge raised {ENDS[code]}")
    assert str(caught.value).endswith(f"(at {tmp_path}/mine.py:3)")


def test_a_file_that_ends_the_program_when_it_is_imported_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import sys\nsys.exit('no GPU')\n")
    with pytest.raises(RecipeError, match=r"importing .*mine\.py failed with SystemExit: no GPU \(at .*mine\.py:2\)"):
        load_object(f"{tmp_path}/mine.py:judge")


@pytest.mark.parametrize("error", [KeyboardInterrupt, lambda: Interrupted("saved", 15)])
def test_an_interruption_passes(error: Any) -> None:
    def judge() -> None:
        raise error()

    with pytest.raises(KeyboardInterrupt) as caught:
        UserCall(judge, "reward judge")("1 answer")
    assert type(caught.value) is type(error())


def test_a_signal_ends_a_function_that_has_its_own_handler() -> None:
    """The function waits, changes the handlers and is interrupted; the next signal finds those of the run."""

    def judge(signum: int) -> None:
        signal.raise_signal(signum)

    def own() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    with graceful(at_once=True):
        UserCall(own, "reward own")("1 answer")
        with pytest.raises(Interrupted):
            UserCall(judge, "reward judge")("1 answer", (signal.SIGTERM,))


def test_a_slow_function_is_named_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def judge() -> str:
        end = time.monotonic() + 10
        while len(said) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        return "\n".join(said)

    monkeypatch.setattr(guard, "SLOW", (0.05, 0.2))
    monkeypatch.setattr(guard, "caution_at_once", said.append)
    heard = UserCall(judge, "reward judge", option="reward.0.timeout")("64 answers to the prompt rows 0 to 7")
    lines = heard.splitlines()
    assert lines == [
        f"reward judge has been running for {seconds} s, for 64 answers to the prompt rows 0 to 7; it has no limit, and "
        "reward.0.timeout sets one"
        for seconds in (0.05, 0.2)
    ]


def test_a_fast_function_is_not_named(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(guard, "SLOW", (0.1,))
    UserCall(lambda: 1, "reward judge")("1 answer")
    time.sleep(0.3)
    assert capfd.readouterr().err == ""
    assert guard.SLOW == (0.1,)


def test_a_fork_that_a_function_makes_never_continues_the_run(tmp_path: Path) -> None:
    """It ends with the function, whatever that does in it: the run would go on twice."""
    (tmp_path / "own.py").write_text(
        "import os, sys\n\ndef judge(completions, **columns):\n    pid = os.fork()\n    if pid == 0 and completions[0] == 'exits':\n"
        "        sys.exit(3)\n    if pid == 0 and completions[0] == 'raises':\n        raise ValueError('in the copy')\n"
        "    if pid == 0:\n        return [0.0]\n    return [float(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))]\n"
    )
    code = (
        "import sys; from whet.calling.guard import UserCall; from whet.registry import load_object\n"
        f"call = UserCall(load_object({str(tmp_path / 'own.py')!r} + ':judge'), 'reward judge')\n"
        "for text in ('returns', 'raises', 'exits'):\n    print(text, call('1 answer', named={'completions': [text]}), flush=True)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert said.stdout.splitlines() == ["returns [0.0]", "raises [1.0]", "exits [3.0]"]


def test_a_signal_mask_that_a_function_sets_ends_with_the_call() -> None:
    UserCall(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]), "reward own")("1 answer")
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
