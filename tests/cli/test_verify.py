"""`whet verify-resume`: a recipe whose killed run is equal, one whose run is not, and what stays untouched."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny

import whet
from whet.errors import RecipeError
from whet.runs.verify import kill_steps, save_interval

from . import helpers
from .helpers import on_disk, one_message

COUNTER = """
CALLS = 0

def calls(prompts, completions, **columns):
    global CALLS
    CALLS += 1
    return [CALLS + 0.1 * len(text) for text in completions]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    tiny.folder(home / "m")
    tiny.write_jsonl(home / "rows.jsonl", [{"prompt": word, "completion": "yes"} for word in tiny.WORDS])
    (home / "counter.py").write_text(COUNTER)
    (home / "sft.yaml").write_text(
        f"method: sft\nmodel: {home}/m\ndata: {home}/rows.jsonl\nout: {home}/mine\nthreads: 1\n"
        "train: {num_epochs: 3, batch_size: 4, save_every: 1, dropout: 0.1}\noptim: {lr: 1.0e-3}\n"
    )
    (home / "mine").mkdir()
    (home / "mine" / "recipe.yaml").write_text("the user's own run")
    (home / "mine" / "metrics.jsonl").write_text("")
    return home


def command(*words: object, cwd: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "whet", "verify-resume", *map(str, words)], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_run_that_resumes_to_the_bit_is_found_equal_and_the_users_run_is_not_touched(
    home: Path, tmp_path: Path
) -> None:
    before = on_disk(home)
    process = command(home / "sft.yaml", "--steps", 12, "--kills", 1, cwd=tmp_path)
    out, error = process.communicate(timeout=300)
    assert (process.returncode, out) == (0, "equal: metrics, rollouts, the last checkpoint, the model\n"), error
    assert on_disk(home) == before
    told = r"it took \d+ s; now kills after step (4|5|7|8|10|11), a save every 3 steps, in runs/verify-resume/killed: about \d+ s"
    assert re.search(told, error)
    assert "came after" not in error
    found = {path.name for path in (tmp_path / "runs" / "verify-resume").iterdir()}
    assert found == {"whole", "killed", "whole.yaml", "killed.yaml"}
    assert [
        path.name for path in sorted((tmp_path / "runs" / "verify-resume" / "killed" / "checkpoints").iterdir())
    ] == [
        "step-00000009",
        "step-00000012",
    ]


def test_a_reward_with_a_state_of_its_own_is_named_as_the_column_that_differs_first(home: Path, tmp_path: Path) -> None:
    size = ["--prompts-per-step", 3, "--num-generations", 2, "--max-new-tokens", 4, "--threads", 1, "--quiet"]
    given = ["--model", home / "m", "--data", home / "rows.jsonl", "--reward", f"{home}/counter.py:calls", *size]
    process = command("grpo", *given, "--steps", 30, "--kills", 1, "--out", tmp_path / "own", cwd=tmp_path)
    out, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (1, "")
    message = (
        r"the runs part \(without kills against with kills\) at step (\d+), column reward/calls, row 0: "
        r"([\d.]+) against ([\d.]+)\n"
    )
    found = re.fullmatch(message, out)
    assert found, out
    step, expected, got = int(found[1]), float(found[2]), float(found[3])
    saved = round(expected - got)
    assert expected - got == pytest.approx(saved)
    assert 0 < saved == step - 1  # the count began again in the first step after a checkpoint
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_ends_the_run_that_was_started(home: Path, tmp_path: Path) -> None:
    process = command(home / "sft.yaml", "--steps", 4, cwd=tmp_path)
    children: list[psutil.Process] = []
    until = time.monotonic() + 60
    while not children and time.monotonic() < until:
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)  # to this process alone
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in error
    assert children
    assert psutil.wait_procs(children, timeout=10)[1] == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sample"], "verify-resume: sample trains nothing"),
        ([], "verify-resume: which method?"),
        (["sft", "--kills", 0], "kills: expected `int` >= 1; got 0"),
        (["sft", "--out", "{home}/mine"], "mine is not empty; verify-resume needs a folder of its own"),
        (["grpo", "--generator.max-staleness", 1], "--generator.max-staleness 0"),
    ],
)
def test_what_cannot_be_verified_is_refused_before_a_run(
    words: list[object], told: str, home: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = helpers.whet(capsys, "verify-resume", *(str(word).format(home=home) for word in words))
    assert said.status == 2
    one_message(said.error, [told])
    assert list(tmp_path.iterdir()) == []


def test_a_function_object_is_refused(home: Path, tmp_path: Path) -> None:
    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(RecipeError, match=r'reward.0.source: .* give "file.py:name"'):
        whet.verify_resume("grpo", model=f"{home}/m", data=f"{home}/rows.jsonl", reward=reward, out=tmp_path / "own")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kills", [1, 3, 8])
@pytest.mark.parametrize("steps", [2, 3, 4, 7, 10, 30, 1000])
def test_kills_fall_between_saves_and_before_the_end(steps: int, kills: int) -> None:
    every = save_interval(steps, kills)
    moments = kill_steps(steps, every, kills, random.Random(0))
    assert len(moments) == kills
    assert moments == sorted(moments)
    assert all(every <= step < steps for step in moments)
    assert every == 1 or all(step % every for step in moments)
    assert kill_steps(steps, every, kills, random.Random(0)) == moments
