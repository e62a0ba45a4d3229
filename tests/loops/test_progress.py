"""What a run says while it trains: the live view on terminals of every kind, plain lines elsewhere."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny

from whet import terminal
from whet.loops import progress as lines
from whet.loops.history import History
from whet.loops.progress import Progress, Shown
from whet.loops.screen import PER_SECOND, Screen

NUMBERS = {
    "score": 0.5, "reward/helpful": 1.5, "score_std": 0.25, "kl": 3.25, "entropy": 1.125, "clip_fraction": 0.125,
    "explained_variance": 0.75, "length": 12.0, "truncated": 0.0625,
    "grad_norm/policy": 2.0, "ratio_mean": 1.0, "tokens_per_second": 1234.5, "mine": 7.0,
}  # fmt: skip


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    def isatty(self) -> bool:
        return True

    @property
    def text(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


def on_terminal(monkeypatch: pytest.MonkeyPatch, encoding: str = "utf-8") -> Terminal:
    """Make standard error a terminal. pytest replaces it before each test, so this is no fixture."""
    one = Terminal(encoding)
    monkeypatch.setattr(sys, "stderr", one)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return one


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", text)


def drawn(monkeypatch: pytest.MonkeyPatch, width: int, height: int) -> list[str]:
    """The lines of the view after 30 steps in a terminal of this size."""
    on_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", str(height))
    long = Shown("p" * 300, "c" * 300, 0.5, 1)
    with Progress("ppo", 100) as progress:
        for number in range(30):
            progress.advance({name: value * (1 + number) for name, value in NUMBERS.items()}, sample=lambda: long)
        view = Screen(progress)
        out = io.StringIO()
        view.console.file = out
        view.console.print(view.render())
    return without_codes(out.getvalue()).splitlines()


def test_the_view_shows_the_numbers_of_the_table_that_matter_with_their_direction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = drawn(monkeypatch, 120, 40)
    rows = {line.split()[0]: line for line in shown}
    assert [line.split()[0] for line in shown[1:12]] == [
        "score", "reward/helpful", "score_std", "kl", "entropy", "clip_fraction", "explained_variance", "length", "truncated",
        "grad_norm/policy", "mine",
    ]  # fmt: skip
    assert "ratio_mean" not in rows
    assert rows["score"].split()[1:3] == ["15", "↗"]
    assert "from 0.5" in rows["score"]
    assert rows["kl"].rstrip().endswith("nats per answer")
    assert "30/100" in shown[0]
    assert "1.23k" in shown[0] or "tokens/s" in shown[0]
    assert any(line.startswith("sample of step 1, score 0.5") for line in shown)


@pytest.mark.parametrize("size", [(60, 24), (40, 12), (60, 8), (200, 60)])
def test_the_view_fits_the_terminal(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = drawn(monkeypatch, *size)
    assert all(len(line) <= size[0] for line in shown)
    assert len(shown) <= size[1]
    assert shown[1].startswith("score")


def test_colors_say_whether_the_direction_is_the_better_one(monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal(monkeypatch)
    with Progress("ppo", 100) as progress:
        for number in range(10):
            progress.advance({"score": float(number), "truncated": float(number), "kl": float(number), "entropy": 1.0})
        view, out = Screen(progress), io.StringIO()
        view.console.file = out
        view.console.print(view.render())
    rows = {without_codes(line).split()[0]: line for line in out.getvalue().splitlines()}
    assert "\x1b[32m↗" in rows["score"]
    assert "\x1b[31m↗" in rows["truncated"]
    assert "\x1b[36m↗" in rows["kl"]  # neither direction is better
    assert "\x1b[36m→" in rows["entropy"]


def test_without_color_and_without_unicode_the_view_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    with Progress("ppo", 10) as progress:
        progress.advance(NUMBERS, sample=lambda: Shown("ä", "ö\n\x1b[31m", 1.0, 1))
    assert "score" in screen.text
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", screen.text)
    assert r"ö\n\x1b[31m" in screen.text
    plain = on_terminal(monkeypatch, "ascii")
    with Progress("ppo", 10) as progress:
        for number in range(8):
            progress.advance({"score": float(number)}, sample=lambda: Shown("ä", "ö", 1.0, 1))
    assert re.search(r"score +7 \^", without_codes(plain.text))
    assert r"\xf6" in plain.text


def test_a_caution_stands_above_the_view_and_one_of_a_signal_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_terminal(monkeypatch)
    with Progress("ppo", 10) as progress:
        progress.advance(NUMBERS)
        terminal.caution("look out")
        terminal.caution_at_once("a signal \x07")
        shown = Screen(progress)
        assert sys.stderr is not screen  # rich writes what is printed above the view
        assert shown.render() is not None
    text = without_codes(screen.text)
    assert text.count("whet: look out\n") == 1
    assert text.splitlines()[-1] == r"whet: a signal \x07"
    assert sys.stderr is screen
    assert screen.text.rindex("\x1b[?25h") > screen.text.rindex("\x1b[?25l")  # the cursor is there again


def test_the_view_is_drawn_at_most_four_times_a_second_whatever_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal(monkeypatch)
    count, render = 0, Screen.render

    def counted(self: Screen) -> Any:
        nonlocal count
        count += 1
        return render(self)

    monkeypatch.setattr(Screen, "render", counted)
    began = time.monotonic()
    with Progress("ppo", 5000) as progress:
        for _ in range(5000):
            progress.advance(NUMBERS)
    took = time.monotonic() - began
    assert count <= 4 + PER_SECOND * took
    assert took < 5


def test_a_finished_run_leaves_no_view_and_an_interrupted_one_its_last_state(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_terminal(monkeypatch)
    with suppress(KeyboardInterrupt), Progress("ppo", 10) as progress:
        progress.advance(NUMBERS)
        raise KeyboardInterrupt
    assert "1/10" in without_codes(screen.text).split("ppo")[-1]
    assert sys.stderr is screen
    before = len(screen.text)
    with Progress("ppo", 1) as progress:
        progress.advance(NUMBERS)
    assert screen.text.endswith("\x1b[2K")  # every line of it is erased
    assert screen.text[before:].count("\x1b[2K") >= len(NUMBERS)


class Clock:
    """The time in seconds, which a test sets."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_without_a_terminal_a_line_is_printed_at_most_every_ten_seconds(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(lines, "time", clock)
    asked = 0

    def sample() -> Shown:
        nonlocal asked
        asked += 1
        return Shown("p" * 400 + "end", "a\nb" + "c" * 400, 0.5, 7)

    with Progress("ppo", 40) as progress:
        for _ in range(40):
            clock.now += 2.5
            progress.advance(NUMBERS, sample=sample)
    found = [line for line in capsys.readouterr().err.splitlines() if " sample " not in line]
    assert [line.split()[1] for line in found] == [
        "1/40",
        "5/40",
        "9/40",
        "13/40",
        "17/40",
        "21/40",
        "25/40",
        "29/40",
        "33/40",
        "37/40",
        "40/40",
    ]
    assert found[4] == (
        "ppo 17/40  0.4/s  58 s left  score 0.5  reward/helpful 1.5  score_std 0.25  kl 3.25  entropy 1.125  clip_fraction 0.125  "
        "explained_variance 0.75  length 12  truncated 0.0625  grad_norm/policy 2  mine 7  tokens_per_second 1234"
    )
    assert asked == 3  # at the start, after a minute, and at the end


def test_a_line_with_a_sample_shows_the_end_of_the_prompt_and_the_start_of_the_answer() -> None:
    text = lines.sample_line("ppo", Shown("p" * 400 + "\x1bend", "a\nb" + "c" * 400, 0.5, 7))
    assert text.startswith("ppo sample of step 7  score 0.5  ...ppp")
    assert r"p\x1bend -> a\nbccc" in text
    assert text.endswith("c...")
    assert len(text) < 400


def test_quiet_says_nothing_and_a_dumb_terminal_gets_lines(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_terminal(monkeypatch)
    with Progress("ppo", 2, quiet=True) as progress:
        progress.advance(NUMBERS, sample=lambda: pytest.fail("nobody sees it"))
    assert screen.text == ""
    monkeypatch.setenv("TERM", "dumb")
    with Progress("ppo", 2) as progress:
        progress.advance(NUMBERS)
    assert screen.text.startswith("ppo 1/2  ")
    assert "\x1b" not in screen.text


def test_numbers_that_come_now_and_then_stay_and_those_of_an_evaluation_take_no_step(capsys: Any) -> None:
    with Progress("sft", 3) as progress:
        progress.advance({"eval/loss": 2.5}, 0)
        progress.advance({"loss": 2.0})
    assert progress.done == 1
    assert progress.history.shown() == ["loss", "eval/loss"]
    assert capsys.readouterr().err.splitlines()[0] == "sft 0/3  eval/loss 2.5"
    history = History()
    history.add({"loss": 1.0, "nan": float("nan")})
    assert history.mean("nan") is None


PROGRAM = """
import sys
from whet.cli.main import main
def slow(prompts, completions, **columns):
    import time
    time.sleep(0.1)
    return [float(len(text)) for text in completions]
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_in_a_terminal_ends_the_view_and_leaves_the_cursor(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "m")
    tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": word} for word in tiny.WORDS])
    (tmp_path / "run.py").write_text(PROGRAM)
    ours, theirs = pty.openpty()
    words = [
        "grpo",
        "--model",
        "m",
        "--data",
        "p.jsonl",
        "--reward",
        "run.py:slow",
        "--num-generations",
        "2",
        "--out",
        "out",
    ]
    words += [
        "--rollout.num-steps",
        "1000",
        "--rollout.prompts-per-step",
        "2",
        "--max-new-tokens",
        "4",
        "--threads",
        "1",
    ]
    words += ["--rollout.mini-batch-size", "4"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "60", "LINES": "20"}
    child = subprocess.Popen(
        [sys.executable, "run.py", *words], cwd=tmp_path, env=environment, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    seen, asked, until = b"", False, time.monotonic() + 120
    while time.monotonic() < until:
        if select.select([ours], [], [], 1.0)[0]:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the child has closed its end
                break
        if not asked and re.search(rb" [3-9]/1000", seen):
            child.send_signal(signal.SIGINT)
            asked = True
        if child.poll() is not None and not select.select([ours], [], [], 0.1)[0]:
            break
    assert child.wait(60) == 130
    os.close(ours)
    text = seen.decode()
    assert "grad_norm/policy" in text
    assert "sample of step 1" in text
    assert without_codes(text).rstrip().splitlines()[-1].startswith("whet: interrupted; ")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert child.stdout is not None
    assert child.stdout.read() == b""
    child.stdout.close()
