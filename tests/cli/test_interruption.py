"""A full disk, Ctrl-C, a power cut: what was good stays whole, and --resume goes on to the same bits."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny

from whet.loops import checkpoint

from .helpers import one_message, whet

STEPS = 200


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    tiny.folder(home / "m")
    words = tiny.WORDS
    rows = [{"prompt": f"{a} {b}", "completion": f"{b} {a} yes"} for a, b in pairwise(words)]
    tiny.write_jsonl(home / "sft.jsonl", rows)
    return home


def words(home: Path, out: Path, steps: int, *more: str) -> list[str]:
    given = [
        "--train.num-steps",
        str(steps),
        "--train.batch-size",
        "4",
        "--train.dropout",
        "0.1",
        "--lr",
        "1e-3",
        "--threads",
        "1",
    ]
    return ["--model", f"{home}/m", "--data", f"{home}/sft.jsonl", "--out", str(out), "--quiet", *given, *more]


def result(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


@pytest.fixture(scope="module")
def short(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of six steps."""
    from whet.cli.main import main

    out = tmp_path_factory.mktemp("short") / "out"
    assert main(["sft", *words(home, out, 6, "--train.save-every", "2")]) == 0
    return out


def test_a_full_disk_leaves_the_last_good_checkpoint_and_resuming_gives_the_same_bits(
    home: Path, short: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = safetensors.torch.save_file, []

    def full(*given: Any, **named: Any) -> None:
        written.append(given)
        if len(written) > 2:  # the policy and its optimizer are one checkpoint
            raise OSError(28, "No space left on device")
        real(*given, **named)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        said = whet(capsys, "sft", *words(home, out, 6, "--train.save-every", "2"))
    good = out / "checkpoints" / "step-00000002"
    one_message(
        said.error, ["step-00000004", "No space left on device", f"the last good checkpoint is {good}", "--resume"]
    )
    assert said.status == 1
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]
    assert checkpoint.latest(out / "checkpoints") == good
    assert not (out / "model").exists()
    assert whet(capsys, "sft", *words(home, out, 6, "--train.save-every", "2"), "--resume").status == 0
    assert result(out) == result(short)
    assert losses(out) == losses(short)


def test_a_full_disk_before_any_checkpoint_says_that_there_is_none(
    home: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    said = whet(capsys, "sft", *words(home, tmp_path / "out", 6, "--train.save-every", "2"))
    one_message(said.error, ["step-00000002", "No space left on device", "there is no earlier checkpoint"])
    assert said.status == 1
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []


def cut_metrics(out: Path) -> None:
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')


def cut_checkpoint(out: Path) -> None:
    weights = out / "checkpoints" / "step-00000006" / "learner" / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def cut_manifest(out: Path) -> None:
    (out / "checkpoints" / "step-00000006" / "manifest.json").write_text("{")


def left_aside(out: Path) -> None:
    (out / "checkpoints" / ".writing-00000006-1" / "learner").mkdir(parents=True)


def nothing_saved(out: Path) -> None:
    for path in sorted((out / "checkpoints").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


@pytest.mark.parametrize("damage", [cut_metrics, cut_checkpoint, cut_manifest, left_aside, nothing_saved])
def test_what_a_power_cut_leaves_behind_does_not_stop_a_resume(
    damage: Any, home: Path, short: Path, tmp_path: Path, capsys: Any
) -> None:
    out, given = tmp_path / "out", words(home, tmp_path / "out", 6, "--train.save-every", "2")
    assert whet(capsys, "sft", *given).status == 0
    damage(out)
    assert whet(capsys, "sft", *given, "--resume").status == 0
    assert result(out) == result(short)
    assert losses(out) == losses(short)


def test_ctrl_c_saves_and_resuming_gives_the_same_bits(home: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "whet", "sft", *words(home, out, STEPS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    metrics = out / "metrics.jsonl"
    until = time.monotonic() + 60
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= 3) and time.monotonic() < until:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    saved = r"whet: interrupted; the checkpoint of step \d+ is saved; continue with --resume\n"
    assert re.fullmatch(rf"(whet: SIGINT: waiting for the (end|checkpoint) of step \d+; .*\n)?{saved}", stderr)
    done = len(losses(out))
    assert 3 <= done < STEPS
    good = out / "checkpoints" / f"step-{done:08d}"
    assert checkpoint.latest(out / "checkpoints") == good
    assert [path.name for path in (out / "checkpoints").iterdir()] == [good.name]
    assert not (out / "model").exists()
    assert whet(capsys, "sft", *words(home, out, STEPS), "--resume").status == 0
    whole = tmp_path / "whole"
    assert whet(capsys, "sft", *words(home, whole, STEPS)).status == 0
    assert result(out) == result(whole)
    assert losses(out) == losses(whole)


@pytest.mark.parametrize(
    ("words", "status"), [(["sft", "--data", "x"], 141), (["sft", "--help"], 0), (["why", "run"], 0)]
)
def test_a_run_whose_pipe_is_closed_does_not_end_with_0(
    words: list[str], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from whet.cli import main

    def closed(_: list[str]) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(main, "_command", closed)
    monkeypatch.setattr("sys.stderr", io.StringIO())  # it is closed
    assert main.main(words) == status


def test_an_interruption_without_a_reason_says_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from whet.cli import main

    def interrupted(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_command", interrupted)
    assert main.main(["rank"]) == 130
    assert capsys.readouterr().err == "whet: interrupted; what was written before is kept\n"
