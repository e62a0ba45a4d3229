"""No control character of data, models, rewards, servers or names reaches a terminal or a pipe; its escape does."""

import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
import tiny

import whet
from whet import terminal
from whet.errors import DataError
from whet.loops.progress import Progress
from whet.loops.tables import table

from .helpers import Said
from .helpers import whet as command

EVIL = "\x1b]0;pwned\x07\x9b31m\u202e"
SEEN = r"\x1b]0;pwned\x07\x9b31m\u202e"
RAW = "\x1b\x07\x9b\u202e"
"""Every character of EVIL that may not be printed."""
CODE = f"""
import logging, threading, warnings
EVIL = {EVIL!r}
def fair(prompts, completions, **columns):
    return [float(len(text)) for text in completions]
def bad(prompts, completions, **columns):
    raise ValueError(EVIL)
def lines(prompts, completions, **columns):
    raise ValueError("a\\nwhet: the run has ended")
def loud(prompts, completions, **columns):
    warnings.warn("warned " + EVIL)
    logging.getLogger("own").warning("logged %s", EVIL)
    try:
        raise ValueError("handled " + EVIL)
    except ValueError:
        logging.getLogger("own").exception("with a traceback")
    thread = threading.Thread(target=bad, args=([], []))
    thread.start()
    thread.join()
    raise ValueError(EVIL)
def surrogate(logp, advantage):
    return -advantage * logp
def ranked(prompt, responses, **columns):
    raise ValueError(EVIL)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with EVIL in names, texts, templates and code; it is the working folder meanwhile."""
    home, before = tmp_path_factory.mktemp("home"), Path.cwd()
    os.chdir(home)
    tiny.folder(Path("m"))
    tiny.folder(Path("speaks"), vocabulary=28)
    tokenizer = tiny.tokenizer()
    assert tokenizer.add_tokens([EVIL]) == 1
    tokenizer.save_pretrained("speaks")
    tiny.folder(Path("raises"), template="{{ raise_exception('no, " + EVIL + "') }}")
    tiny.folder(Path(f"m{EVIL}"))
    Path(f"own{EVIL}.py").write_text(CODE)
    Path("own.py").write_text(CODE)
    texts = [{"prompt": f"a {EVIL}", "completion": f"b {EVIL} c"}, {"prompt": f"{EVIL} b", "completion": "no"}]
    tiny.write_jsonl(Path(f"rows{EVIL}.jsonl"), texts)
    tiny.write_jsonl(Path("answers.jsonl"), [{"prompt": EVIL, "responses": [EVIL, f"a {EVIL}"], "scores": [1, 1]}])
    yield home
    os.chdir(before)


def shown(said: Said, where: str = "both", marks: str = SEEN) -> Said:
    """No raw control character, and the escapes in the stream `where`."""
    for stream in (said.out, said.error):
        raw = [one for one in RAW if one in stream]
        assert not raw, f"{raw} in {stream!r}"
    text = {"both": said.out + said.error, "out": said.out, "error": said.error}[where]
    assert marks in text, f"{marks} not in {text!r}"
    return said


ANSWERS = ("--data", f"rows{EVIL}.jsonl", "--max-new-tokens", "3")
STEP = ("--rollout.prompts-per-step", "2", "--rollout.num-steps", "1", "--num-generations", "2")
REFUSED: dict[str, tuple[str, ...]] = {
    "a file that is not there": ("sft", "--model", "m", "--data", f"no{EVIL}.jsonl", "--out", "x"),
    "a model that is not there": ("sft", "--model", f"./no{EVIL}", "--data", "answers.jsonl", "--out", "x"),
    "a recipe that is not there": ("train", f"no{EVIL}.yaml"),
    "an unknown verb": (f"sft{EVIL}",),
    "an unknown field": ("sft", f"--no{EVIL}", "1"),
    "a value": ("sft", "--model", "m", "--data", f"rows{EVIL}.jsonl", "--out", "x", "--train.batch-size", EVIL),
    "the text of a row": ("rank", "--data", f"rows{EVIL}.jsonl", "--out", "x"),
    "a template that raises": ("sft", "--model", "raises", "--data", f"rows{EVIL}.jsonl", "--out", "x"),
    "the answers of a template": ("sample", "--model", "raises", *ANSWERS, "--out", "x"),
    "a reward that raises": ("grpo", "--model", "m", *ANSWERS, *STEP, "--reward", "own.py:bad", "--out", "bad"),
    "a reward with such a file": ("sample", "--model", "m", *ANSWERS, "--reward", f"own{EVIL}.py:no", "--out", "x"),
    "a judge that raises": ("eval", "--model", "m", *ANSWERS, "--against", "m", "--judge", "own.py:bad"),
    "a judge of ranks that raises": (
        "rank", "--data", "answers.jsonl", "--judge", "own.py:ranked", "--judge-form", "rank", "--out", "x"),
    "serve": ("serve", "--model", f"./no{EVIL}"),
    "verify-resume": ("verify-resume", "sft", "--model", "m", "--data", f"no{EVIL}.jsonl", "--out", "verified"),
    "a run that is not there": ("why", f"no{EVIL}", "--step", "1"),
    "a replay of no run": ("replay", f"no{EVIL}", "--step", "1"),
    "a difference to no run": ("diff", f"no{EVIL}", "m"),
    "a demo in a file": ("demo", "--out", f"rows{EVIL}.jsonl/x"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_an_error_shows_escapes_and_is_one_line(home: Path, capfd: Any, case: str) -> None:
    said = command(capfd, *REFUSED[case])
    assert said.status in (1, 2)
    if case == "serve":  # without vLLM it says so first
        assert said.error.count("\n") == 1
        return
    shown(said, "error")
    assert said.error.splitlines()[-1].startswith("whet: ")
    if case != "a demo in a file":  # it names its stages
        assert sum(line.startswith("whet: ") for line in said.error.splitlines()) == said.error.count("\n")


def test_a_message_of_several_lines_cannot_look_like_one_of_whet(home: Path, capfd: Any) -> None:
    said = command(capfd, "sample", "--model", "m", *ANSWERS, "--reward", "own.py:lines", "--out", "lines.jsonl")
    assert said.status == 1
    assert "ValueError: a whet: the run has ended (at " in said.error
    assert "\nwhet: the run has ended" not in said.error


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    """A run whose reward, prompts, answers and folder have EVIL in their names and texts."""
    return whet.train("grpo", **training(f"run{EVIL}", 1))


def training(out: str, seed: int) -> dict[str, Any]:
    return {
        "model": "speaks", "data": f"rows{EVIL}.jsonl", "out": out, "seed": seed, "max_new_tokens": 4, "lr": 1e-2,
        "reward": [{"source": "own.py:fair", "name": f"fair{EVIL}"}], "num_generations": 2, "rollout.prompts_per_step": 2,
        "rollout.num_steps": 2, "train.save_every": 1, "trackers": [{"name": "console", "num_samples": 4}],
    }  # fmt: skip


def test_a_run_prints_progress_metrics_and_samples_with_escapes(home: Path, run: Path, capfd: Any) -> None:
    capfd.readouterr()
    whet.train("grpo", **training(f"again{EVIL}", 1))
    said = shown(Said(0, *capfd.readouterr()), "error")
    lines = said.error.splitlines()
    assert any(line.startswith("run ") and SEEN in line for line in lines)
    assert any(line.startswith("step 1  ") and SEEN in line for line in lines)  # the reward's name among the metrics
    assert any("score" in line and "->" in line and SEEN in line for line in lines)  # samples


def test_sft_prints_the_path_of_its_run_with_escapes(home: Path, capfd: Any) -> None:
    given = ("--data", f"rows{EVIL}.jsonl", "--out", f"sft{EVIL}", "--train.num-steps", "1")
    said = command(capfd, "sft", "--model", f"m{EVIL}", *given)
    assert said.status == 0
    assert shown(said, "out").out == f"sft{SEEN}\n"
    assert (home / f"sft{EVIL}" / "model").is_dir()


def test_sample_rank_and_eval_print_paths_and_cautions_with_escapes(home: Path, capfd: Any) -> None:
    said = command(capfd, "sample", "--model", "speaks", *ANSWERS, "--out", f"sampled{EVIL}.jsonl")
    assert (said.status, shown(said, "out").out) == (0, f"sampled{SEEN}.jsonl\n")
    said = command(capfd, "rank", "--data", "answers.jsonl", "--out", f"ranked{EVIL}.jsonl")
    assert (said.status, shown(said, "out").out) == (0, f"ranked{SEEN}.jsonl\n")
    own = f"[{{source: 'own.py:fair'}}, {{source: 'own{EVIL}.py:fair'}}]"
    said = command(capfd, "eval", "--model", "m", *ANSWERS, "--against", "speaks", "--judge", own)
    assert said.status == 2  # YAML knows no control characters, so the text stays a text
    shown(said, "error")
    given = ("--against", f"m{EVIL}", "--judge", f"own{EVIL}.py:fair", "--answers", f"e{EVIL}.jsonl")
    said = command(capfd, "eval", "--model", f"m{EVIL}", *ANSWERS, *given)
    assert said.status == 0
    assert "fair/win_rate" in said.out
    shown(said, "out", "fair/win_rate")


def test_explain_and_plan_show_escapes(home: Path, capfd: Any) -> None:
    own = (
        "--surrogate",
        f"own{EVIL}.py:surrogate",
        "--ratio",
        "null",
        "--reward",
        "own.py:fair",
        "--model",
        f"m{EVIL}",
        *ANSWERS,
    )
    said = command(capfd, "explain", "grpo", *own)
    assert said.status == 0
    shown(said, "out")
    assert SEEN in whet.explain(
        "grpo", surrogate=f"own{EVIL}.py:surrogate", ratio=None, reward="own.py:fair", model="m"
    )
    said = command(capfd, "plan", "grpo", "--model", f"./m{EVIL}", *ANSWERS, "--reward", "own.py:fair", "--gpus", "1")
    shown(said, "both", "" if said.status == 0 else SEEN)


def test_why_diff_and_replay_show_escapes(home: Path, run: Path, capfd: Any) -> None:
    named = [{"source": "own.py:fair", "name": f"other{EVIL}"}]
    other = whet.train("grpo", **{**training(f"other{EVIL}", 2), "trackers": [], "reward": named})
    given = {"data": f"rows{EVIL}.jsonl", "train.num_steps": 1}
    texts = whet.train("sft", model="speaks", out=f"texts{EVIL}", **given)
    for options in ((), ("--sample", "0")):
        said = command(capfd, "why", texts, "--step", "1", *options)
        assert said.status == 0
        shown(said, "out")
    shown(command(capfd, "why", run, "--step", "1", "--sample", "0"), "out")
    shown(command(capfd, "replay", run, "--step", "2"), "out")
    said = command(capfd, "diff", run, other)
    assert said.status == 1
    shown(said, "out")
    for result in (whet.why(texts, 1), whet.diff(run, other), whet.replay(run, 2)):
        assert not set(RAW) & set(str(result))
        assert SEEN in str(result)


def test_a_failing_reward_server_is_told_with_escapes(home: Path, capfd: Any) -> None:
    with servers.serving() as serve:
        answers: list[Callable[[dict, int], tuple[int, Any]]] = [
            lambda body, number: (400, {"error": {"message": EVIL}}),
            lambda body, number: (500, EVIL.encode()),
            lambda body, number: (200, EVIL.encode()),
            lambda body, number: (200, {"rewards": EVIL}),
        ]
        for number, answer in enumerate(answers):
            reward = json.dumps([{"source": serve(answer).url, "options": {"retries": 0}}])
            given = ("--reward", reward, "--out", f"served{number}.jsonl")
            said = command(capfd, "sample", "--model", "m", *ANSWERS, *given)
            assert said.status == 1
            shown(said, "error")


def process(*words: str, code: str = "") -> Said:
    """A command, or a program, in a process of its own, with pipes for its streams."""
    given = ["-c", code] if code else ["-m", "whet", *words]
    found = subprocess.run([sys.executable, *given], capture_output=True, timeout=300, check=False)
    return Said(found.returncode, found.stdout.decode(), found.stderr.decode())


def test_tracebacks_warnings_and_logs_of_a_command_show_escapes(home: Path) -> None:
    said = process("sample", "--model", "m", *ANSWERS, "--reward", "own.py:loud", "--out", "loud.jsonl", "--debug")
    assert said.status == 1
    shown(said, "error")
    for part in ("UserWarning: warned ", "logged ", "ValueError: handled ", "Exception in thread", "RewardError: "):
        assert any(part in line for line in said.error.splitlines()), f"{part} not in {said.error}"
    assert said.error.count("Traceback (most recent call last)") >= 4
    assert sum(SEEN in line for line in said.error.splitlines()) >= 6


def test_an_error_that_nobody_catches_in_a_program_shows_escapes(home: Path) -> None:
    code = f"import whet; whet.train('sft', model='m', data='no' + {EVIL!r} + '.jsonl', out='x')"
    said = process(code=code)
    assert said.status == 1
    assert said.error.splitlines()[-1].startswith("whet.errors.DataError: no" + SEEN)
    assert str(DataError(f"a\n{EVIL}")) == f"a\n{SEEN}"


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_progress_bar_on_a_terminal_shows_escapes_and_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "300")
    with Progress(f"[red]{EVIL}", 3) as progress:
        progress.advance({f"[bold]{EVIL}": 1.0})
    text = screen.getvalue()
    assert "\x1b[" in text  # rich moves the cursor
    assert "\x1b]" not in text
    assert not set("\x07\x9b\u202e") & set(text)
    assert f"[red]{SEEN}" in text
    assert re.search(rf"{re.escape(f'[bold]{SEEN}')} +1 ", re.sub(r"\x1b\[[0-9;]*m", "", text))


def test_tables_and_consoles_read_no_markup_and_no_emoji_names(capsys: Any) -> None:
    from rich.table import Table

    rows = table(("[red]a", EVIL), [("[bold]b[/]", EVIL), (":smile:", 1)])
    assert "[red]a" in rows
    assert "[bold]b[/]" in rows
    assert ":smile:" in rows
    assert rows.count(SEEN) == 2
    inner = Table(title=f"[red]{EVIL}")
    inner.add_column(f"[red]{EVIL}")
    inner.add_row(f"[link=http://x]{EVIL}[/link] :smile:")
    console = terminal.console(width=200)
    console.print(inner)
    console.print(f"[blink]{EVIL}")
    said = capsys.readouterr().out
    assert not set(RAW) & set(said)
    assert said.count(SEEN) == 4
    assert f"[link=http://x]{SEEN}[/link] :smile:" in said


def test_exactly_the_characters_that_control_or_print_nothing_are_escaped() -> None:
    named = {
        *range(0x20),
        *range(0x7F, 0xA0),
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
        0x200E,
        0x200F,
        0x2028,
        0x2029,
    }
    for number in range(0x110000):
        one = chr(number)
        kind = unicodedata.category(one)
        escaped = terminal.visible(one) != one
        assert escaped or number not in named, hex(number)
        assert escaped or kind not in ("Cc", "Cs", "Zl", "Zp"), hex(number)
        if escaped:
            assert terminal.visible(one) == repr(one)[1:-1] == ascii(one)[1:-1]
            assert kind in ("Cc", "Cf", "Cs", "Zl", "Zp", "Cn"), hex(number)
    kept = [
        "Zoë e\u0301",
        "👩\u200d👩\u200d👧\ufe0f",
        "🏴\U000e0067\U000e007f",
        "می\u200cخواهم",
        "שלום عربى",
        "日本語",
        "a\xa0b",
        r"\x1b",
    ]
    assert [terminal.visible(text) for text in kept] == kept
    assert terminal.visible("a\n\tb\r") == r"a\n\tb\r"
    assert terminal.visible("a\n\tb\r", layout=True) == "a\n\tb\\r"


def test_a_stream_without_the_characters_gets_escapes_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    terminal.say("Zoë 日 \ud800")
    assert raw.getvalue() == "Zoë \\u65e5 \\ud800\n".encode("latin-1")
