"""The soak on one machine can fail: it finds runs that differ, wrong statuses, and processes that do not end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from proof.soak_local import Kill, differences, statuses

ROOT = Path(__file__).parent.parent.parent

RANDOM_REWARD = """
import sys
from proof import soak_local
from proof.small_runs import GROUPS, on_answers, write_inputs

def inputs(home):
    write_inputs(home)
    (home / "own.py").write_text(
        "import random\\n"
        "def chance(prompts, completions, **columns):\\n    return [random.random() for _ in completions]\\n"
    )

soak_local.every = lambda: {"random": on_answers("grpo", *GROUPS, reward="own.py:chance")}
soak_local.write_inputs = inputs
sys.argv = ["soak_local", "--kills", "1", "--skip-operations"]
sys.exit(soak_local.main())
"""

LOCKED = """
import os, signal, sys
from tqdm import tqdm
from proof.soak_local import alone, ended, forked, in_fork

def owner():
    tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)

tqdm.get_lock()
alone()
with forked(owner) as child:
    ended(child, 10.0, "owner", str)
assert child.exitcode == -signal.SIGKILL
assert in_fork(lambda: tqdm.get_lock().acquire())

def deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pause()

try:
    with forked(deaf) as child:
        ended(child, 0.2, "deaf", lambda: "its output")
except RuntimeError as error:
    assert str(error) == "deaf: the process did not end within 0.2 s; its output", error
else:
    sys.exit("no error")
assert not child.is_alive()
try:
    in_fork(lambda: os._exit(3))
except RuntimeError as error:
    assert "it ended with status 3" in str(error), error
else:
    sys.exit("no error")
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", script]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_a_run_that_differs_is_counted_and_gives_status_1() -> None:
    done = run(RANDOM_REWARD)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "random: 1 kills, ['at step 1, column reward/chance, row 0: " in done.stderr
    head, line, _ = done.stdout.splitlines()
    assert head.split()[-1] == "mismatches"
    assert int(line.split()[-1]) >= 1


def test_a_child_that_is_killed_with_a_lock_blocks_no_other_and_a_child_that_does_not_end_is_killed() -> None:
    done = run(LOCKED)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("sent", "place", "left", "allowed"),
    [
        (signal.SIGKILL, "step", 3, {-9}),
        (signal.SIGKILL, "end", 0, {-9, 0}),
        (signal.SIGTERM, "step", 3, {143, -15}),
        (signal.SIGTERM, "start", 5, {143, -15}),
        (signal.SIGTERM, "step", 1, {143, -15, 0}),
        (signal.SIGHUP, "save", 2, {129, -1}),
        (signal.SIGHUP, "end", 0, {129, -1, 0}),
        (signal.SIGINT, "save", 2, {130, -2}),
        (signal.SIGINT, "start", 5, {130, -2, 0}),
        (None, None, 5, {0}),
    ],
)
def test_a_process_must_end_with_the_status_of_its_signal_unless_its_run_is_about_to_end(
    sent: signal.Signals | None, place: str | None, left: int, allowed: set[int]
) -> None:
    kill = None if sent is None else Kill(sent, "anywhere")
    assert statuses(kill, place, left) == allowed


def test_a_file_that_a_killed_run_left_is_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proof.soak_local.first_difference", lambda *_: None)
    for name in ("whole", "killed"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "config.json").write_text("{}")
    assert differences(tmp_path / "whole", tmp_path / "killed") == []
    (tmp_path / "killed" / ".model.writing").mkdir()
    (tmp_path / "killed" / ".model.writing" / "half").touch()
    found = differences(tmp_path / "whole", tmp_path / "killed")
    assert found == [".model.writing/half: only one run has it"]
