"""`whet verify-resume`: a recipe whose killed run is equal, one whose run is not, and what stays untouched."""

import multiprocessing
import os
import random
import re
import runpy
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
from whet.runs import verify
from whet.runs.verify import kill_steps, save_interval

from . import helpers
from .helpers import on_disk, one_message

REWARDS = """
import random

CALLS = 0

def chance(prompts, completions, **columns):
    return [random.random() for _ in completions]

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
    (home / "own.py").write_text(REWARDS)
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


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["transformers.models.qwen3.modeling_qwen3", "pyarrow.parquet", "whet.cli.main", "whet.runs.train"]
)


def begin(words: list[str]) -> None:
    """Run `python -m whet` with these words, silently."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ["whet", *words]
    runpy.run_module("whet", run_name="__main__")


class Forked:
    """A `Popen` of `python -m whet` that is a fork of a process which has imported the libraries: the import takes 3 s of CPU."""

    def __init__(self, words: list[str], **_: Any) -> None:
        assert words[:3] == [sys.executable, "-m", "whet"]
        self.process = FORKS.Process(target=begin, args=(words[3:],))
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int | None:
        self.process.join()
        return self.returncode

    def kill(self) -> None:
        self.process.kill()


def test_a_run_that_resumes_to_the_bit_is_found_equal_and_the_users_run_is_not_touched(
    home: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verify.subprocess, "Popen", Forked)
    before = on_disk(home)
    said = helpers.whet(capsys, "verify-resume", home / "sft.yaml", "--steps", 12, "--kills", 1)
    expected = (0, "equal: metrics, rollouts, the last checkpoint, the model\n")
    assert (said.status, said.out) == expected, said.error
    assert on_disk(home) == before
    told = r"it took \d+ s; now kills after step (4|5|7|8|10|11), a save every 3 steps, in runs/verify-resume/killed: about \d+ s"
    assert re.search(told, said.error)
    assert "came after" not in said.error
    out = tmp_path / "runs" / "verify-resume"
    assert {path.name for path in out.iterdir()} == {"whole", "killed", "whole.yaml", "killed.yaml"}
    saves = sorted(path.name for path in (out / "killed" / "checkpoints").iterdir())
    assert saves == ["step-00000009", "step-00000012"]


def rewarded(name: str, home: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Verify a run with a reward of own.py, which must be found different, and return what is printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verify.subprocess, "Popen", Forked)
    size = ["--prompts-per-step", 3, "--num-generations", 2, "--max-new-tokens", 4, "--threads", 1, "--quiet"]
    given = ["--model", home / "m", "--data", home / "rows.jsonl", "--reward", f"{home}/own.py:{name}", *size]
    own = ["--steps", 16, "--kills", 1, "--out", tmp_path / "own"]
    said = helpers.whet(capsys, "verify-resume", "grpo", *given, *own)
    assert (said.status, said.error) == (1, "")
    assert not (tmp_path / "runs").exists()
    return said.out


DIFFERENCE = (
    r"the runs part \(without kills against with kills\) at step (\d+), column reward/(\w+), row 0: "
    r"([\d.]+) against ([\d.]+)\n"
)


def test_a_reward_with_a_state_of_its_own_is_named_as_the_column_that_differs_first(
    home: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = rewarded("calls", home, tmp_path, capsys, monkeypatch)
    found = re.fullmatch(DIFFERENCE, out)
    assert found, out
    step, expected, got = int(found[1]), float(found[3]), float(found[4])
    saved = round(expected - got)
    assert found[2] == "calls"
    assert expected - got == pytest.approx(saved)
    assert 0 < saved == step - 1  # the count began again in the first step after a checkpoint


def test_a_reward_that_is_random_without_a_seed_is_named_at_the_first_step(
    home: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = rewarded("chance", home, tmp_path, capsys, monkeypatch)
    found = re.fullmatch(DIFFERENCE, out)
    assert found, out
    assert found.group(1, 2) == ("1", "chance")


def test_ctrl_c_ends_the_run_that_was_started(home: Path, tmp_path: Path) -> None:
    process = command(home / "sft.yaml", "--steps", 2000, cwd=tmp_path)
    until = time.monotonic() + 60
    while not (tmp_path / "runs/verify-resume/whole/metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)  # to this process alone
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in error
    assert children
    assert psutil.wait_procs(children, timeout=10)[1] == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_that_ends_a_run_ends_the_process_that_was_started(
    sent: signal.Signals, home: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    class Endless(subprocess.Popen):
        def __init__(self, words: list[str], **_: Any) -> None:
            super().__init__(["sleep", "60"])
            started.append(self)
            self.waits = 0

        def wait(self, timeout: float | None = None) -> int:
            self.waits += 1
            if self.waits == 1:  # the second one follows kill()
                signal.raise_signal(sent)
            return super().wait(timeout)

    default = signal.default_int_handler if sent == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(sent, default)
    try:
        monkeypatch.setattr(verify.subprocess, "Popen", Endless)
        said = helpers.whet(capsys, "verify-resume", home / "sft.yaml", "--out", tmp_path / "own")
        assert signal.getsignal(sent) == default
    finally:
        signal.signal(sent, before)
    assert said.status == 128 + sent
    assert said.error.endswith(f"whet: interrupted; the runs in {tmp_path / 'own'} were not compared\n")
    assert [process.returncode for process in started] == [-signal.SIGKILL]


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
