"""What a run says at its end: its numbers, its files, and commands that work as they are printed."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny

import whet
from whet.runs.summary import following, summary

from .helpers import whet as command


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "a place"
    place.mkdir()
    monkeypatch.chdir(place)
    tiny.folder(Path("m"))
    tiny.write_jsonl(
        Path("pairs.jsonl"), [{"prompt": word, "chosen": "yes", "rejected": "no a"} for word in tiny.WORDS[:6]]
    )
    tiny.write_jsonl(Path("rows.jsonl"), [{"prompt": word, "completion": "yes"} for word in tiny.WORDS[:6]])
    Path("judge.py").write_text(
        "def long(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    )
    return place


SHORT = ("--train.num-steps", 2, "--threads", 1)
ONLINE = (
    "--rollout.num-steps",
    2,
    "--rollout.prompts-per-step",
    4,
    "--rollout.mini-batch-size",
    4,
    "--max-new-tokens",
    4,
    "--threads",
    1,
)
RUNS: dict[str, tuple[tuple[object, ...], list[str]]] = {
    "sft": (("--data", "rows.jsonl", *SHORT), ["sample", "ppo"]),
    "pretrain": (("--data", "texts.jsonl", *SHORT), ["sft"]),
    "reward": (("--data", "pairs.jsonl", *SHORT), ["ppo"]),
    "dpo": (("--data", "pairs.jsonl", *SHORT), ["eval"]),
    "ppo": (("--data", "rows.jsonl", "--reward", "judge.py:long", *ONLINE), ["eval"]),
    "grpo": (
        (
            "--data",
            "rows.jsonl",
            "--eval",
            "held.jsonl",
            "--reward",
            "regex",
            "--reward.pattern",
            "a",
            *ONLINE[:4],
            *ONLINE[6:],
        ),
        ["eval"],
    ),
}


@pytest.mark.parametrize("verb", RUNS)
def test_the_next_commands_run_as_they_are_printed(verb: str, home: Path, capsys: Any) -> None:
    given, expected = RUNS[verb]
    tiny.write_jsonl(Path("texts.jsonl"), [{"text": "yes please"}] * 4)
    tiny.write_jsonl(Path("held.jsonl"), [{"prompt": "yes"}, {"prompt": "no"}])
    said = command(capsys, verb, "--model", "m", "--out", "runs/my run", *given)
    assert (said.status, said.out) == (0, "runs/my run\n")
    lines = said.error.splitlines()
    next_ones = [shlex.split(line) for line in lines[lines.index("next:") + 1 :]]
    assert [words[1] for words in next_ones if words[1] != "report"] == expected
    assert verb != "grpo" or {"held.jsonl", "JUDGE"} <= set(next_ones[0])
    for words in next_ones:
        fill = {"REWARD": "judge.py:long", "JUDGE": "judge.py:long", "DATA": "rows.jsonl"}
        filled = [fill.get(word, word) for word in words[1:]]
        more = {"ppo": ONLINE, "sft": SHORT}.get(words[1], ())
        done = command(capsys, *filled, *more, *(("--quiet",) if more else ()))
        assert done.status == 0, (filled, done.error)


def test_the_table_has_start_end_and_best_of_what_matters_and_the_files_that_are_there(home: Path, capsys: Any) -> None:
    folder = Path("run")
    (folder / "model").mkdir(parents=True)
    rows = [
        {"step": 0, "eval/score": 0.5, "seconds/eval": 1.0},
        {
            "step": 1,
            "score": 1.0,
            "kl": 0.0,
            "truncated": 0.5,
            "ratio_mean": 1.0,
            "tokens_per_second": 9.0,
            "seconds": 1.0,
        },
        {"step": 2, "score": 3.0, "kl": 2.0, "truncated": 0.25, "seconds": 3599.0, "eval/score": 0.25},
        {"step": 3, "score": 2.0, "kl": 1.0, "truncated": 0.75, "seconds": 61.0, "mine": 4.0},
    ]
    tiny.write_jsonl(folder / "metrics.jsonl", rows)
    lines = summary(folder).splitlines()
    assert lines[0] == "3 steps in 1:01:01"
    assert [line.split() for line in lines[2:8]] == [
        ["start", "end", "best", "at", "step"], ["score", "1", "2", "3", "2"], ["kl", "0", "1"], ["truncated", "0.5", "0.75", "0.25", "2"],
        ["eval/score", "0.5", "0.25", "0.5", "0"], ["mine", "4", "4"],
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[9:]] == ["run/model", "run/metrics.jsonl"]
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "score": float("nan")}) + "\n")
    assert ["score", "nan", "nan"] in [line.split() for line in summary(folder).splitlines()]


def test_objects_of_a_program_are_words_to_fill_in(home: Path, capsys: Any) -> None:
    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return [float(number) for number in range(len(completions))]

    given: dict[str, Any] = {
        "num_steps": 1,
        "prompts_per_step": 2,
        "num_generations": 2,
        "mini_batch_size": 4,
        "max_new_tokens": 4,
    }
    run = whet.train(
        "grpo", model="m", data=[{"prompt": "a"}, {"prompt": "b"}], reward=reward, out="runs/own", quiet=False, **given
    )
    said = capsys.readouterr()
    assert said.out == ""
    assert "grpo: 1 step in " in said.err
    assert "next:" not in said.err  # of the command line
    (line,) = following(run)
    assert "--judge JUDGE" in line
    assert "--against m" in line
    whet.train("grpo", model="m", data=[{"prompt": "a"}, {"prompt": "b"}], reward=reward, out="runs/quiet", **given)
    assert capsys.readouterr().err == ""
