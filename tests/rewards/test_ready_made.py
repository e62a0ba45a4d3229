"""Ready-made rewards by name: in training, sampling, ranking and evaluation, with options, and refused before models are loaded."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch

import whet
from whet.cli.main import main
from whet.data import Group, Prompt, Sample
from whet.errors import RecipeError
from whet.rewards import REWARDS, Scores
from whet.rewards.base import joined
from whet.rewards.verifiers import ExactMatch, NumericMatch
from whet.runs.recipe import RewardSource
from whet.runs.rewards import made

NAMES = [one for one in REWARDS.names() if one not in ("http", "openai")]
TESTS = [{"input": "", "output": "x"}]
ROWS: list[dict[str, Any]] = [
    {"prompt": "a yes", "answer": "no", "number": "3", "tests": TESTS, "schema": {"type": "object"}},
    {"prompt": "b no", "answer": "yes", "number": "4", "tests": TESTS, "schema": {"type": "array"}},
]
SPECS: dict[str, dict[str, Any]] = {
    "exact_match": {"ignore_case": True}, "numeric_match": {"answer": "number"}, "math_match": {}, "regex": {"pattern": "a|b"},
    "json_schema": {"column": "schema"}, "length": {"max": 4, "margin": 2}, "language": {"language": "en"}, "sentiment": {},
    "repetition": {"n": 2}, "unit_tests": {},
}  # fmt: skip
GRPO: dict[str, Any] = {
    "model": "m", "data": ROWS, "num_steps": 1, "prompts_per_step": 2, "num_generations": 2, "max_new_tokens": 6,
}  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny.folder(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_takes_all_of_them_with_options_beside_the_name(capfd: pytest.CaptureFixture[str]) -> None:
    assert sorted(SPECS) == sorted(NAMES)
    out = whet.train("grpo", out="r", reward=[{"source": name, **own} for name, own in SPECS.items()], **GRPO)
    numbers = json.loads((out / "metrics.jsonl").read_text())
    assert all(f"reward/{name}" in numbers for name in NAMES)
    said = capfd.readouterr().err
    assert "reward numeric_match: 0 of the first 4 answers got full score; the others: no number (4)" in said
    assert "reward unit_tests: programs run with " in said
    assert "ignore_case: true" in (out / "recipe.yaml").read_text()


def test_a_name_alone_is_a_reward_and_a_record_is_one_from_python() -> None:
    assert whet.train("grpo", out="one", reward="exact_match", **GRPO).is_dir()
    assert whet.train("grpo", out="two", reward=ExactMatch(ignore_case=True), **GRPO).is_dir()
    assert (Path("one") / "model" / "model.safetensors").read_bytes() == (
        Path("two") / "model" / "model.safetensors"
    ).read_bytes()


REFUSED: list[tuple[Any, str]] = [
    ("exact_mach", r"reward\.0: unknown reward 'exact_mach'; did you mean 'exact_match'\?"),
    ({"source": "exact_match", "answer": "solution"}, r"reward\.0\.answer: the rows have no column 'solution'; they have answer, number, "),
    ({"source": "exact_match", "ignore_cases": True}, r"unknown field 'reward\.0\.ignore_cases'; did you mean 'reward\.0\.ignore_case'"),
    ({"source": "exact_match", "pattern": "a"}, r"reward\.0\.pattern: exact_match does not have it, only regex; leave it out"),
    ({"source": "exact_match", "strip": "maybe"}, r"reward\.0\.strip: expected `bool`"),
    ({"source": "regex"}, r"reward\.0\.pattern: this field is required"),
    ({"source": "regex", "pattern": "("}, r"reward\.0\.pattern: '\(' is no regular expression: missing \)"),
    ({"source": "numeric_match"}, r"reward\.0\.answer: row 0: there is no number in 'no'"),
    ({"source": "unit_tests", "tests": "number"}, r"reward\.0\.tests: row 0: there is no test in '3'"),
    ({"source": "unit_tests", "memory": 1}, r"reward\.0\.memory: .*>= 64"),
    ({"source": "language", "language": "Klingon"}, r"reward\.0\.language: unknown language 'Klingon'"),
]  # fmt: skip


@pytest.mark.parametrize(("reward", "message"), REFUSED)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    reward: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whet.models.load.load_causal_lm", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(RecipeError, match=message):
        whet.train("grpo", out="r", reward=reward, **GRPO)


def test_a_row_without_the_column_is_refused_if_there_is_no_other_reward() -> None:
    rows = [ROWS[0], {"prompt": "b no"}]
    with pytest.raises(RecipeError, match=r"reward\.0\.answer: row 1 has no value in the column 'answer'; give it one"):
        whet.train("grpo", out="r", reward="exact_match", **(GRPO | {"data": rows}))
    out = whet.train(
        "grpo", out="r", reward=["exact_match", {"source": "repetition", "n": 2}], **(GRPO | {"data": rows})
    )
    assert "reward/exact_match" in json.loads((out / "metrics.jsonl").read_text())


SOME = {"source": "regex", "pattern": "a|b"}


def test_sample_rank_and_eval_take_them_too() -> None:
    out = whet.sample(
        model="m",
        data=ROWS,
        num_generations=2,
        max_new_tokens=4,
        reward={"source": "regex", "pattern": "a|b"},
        out="s.jsonl",
    )
    assert {score for line in out.read_text().splitlines() for score in json.loads(line)["scores"]} <= {0.0, 1.0}
    rows = [{"prompt": "q", "responses": ["so 3", "4", "3.0"], "solution": 3}]
    ranked = whet.rank(data=rows, judge="numeric_match", judge_options={"answer": "solution"}, out="r.jsonl")
    assert json.loads(ranked.read_text())["ranks"] == [1, 3, 1]
    with pytest.raises(
        RecipeError,
        match=r"judge_options\.answer: the rows have no column 'answer'; they have prompt, r",
    ):
        whet.rank(data=rows, judge="numeric_match", out="r2.jsonl")
    found = whet.evaluate(model="m", against="m", data=ROWS, judge={"source": "exact_match"}, max_new_tokens=4)
    assert any("exact_match" in name for name in found)


def test_a_limit_of_time_may_be_set_for_those_that_have_none_of_their_own() -> None:
    reward = made("exact_match", {"timeout": 60}, "reward.0")
    prompt = Prompt("0", (), ({"role": "user", "content": "?"},), {"answer": "a"})
    groups = [Group(prompt, (Sample(0, 0, (), (), 0, "stop", "a"), Sample(0, 1, (), (), 0, "stop", "b")))]
    scores = reward.score(groups)
    assert scores.answer.tolist() == [1.0, 0.0]
    assert scores.reasons == ("", "another answer")
    assert reward.per_group  # type: ignore[attr-defined]


def test_reasons_are_joined_with_the_scores_of_several_workers() -> None:
    one, two = Scores(torch.tensor([1.0]), reasons=("",)), Scores(torch.tensor([0.0]), reasons=("another answer",))
    assert joined([one, None, two]).reasons == ("", "another answer")
    assert joined([one, Scores(torch.tensor([0.0]))]).reasons is None


@pytest.mark.parametrize("name", NAMES)
def test_no_option_has_the_name_of_a_field_of_a_reward(name: str) -> None:
    taken = {one.name for one in fields(RewardSource)}
    assert not taken & {one.name for one in fields(REWARDS.find(name).options)}


def test_a_wrapper_adds_to_a_ready_made_one() -> None:
    right = NumericMatch(answer="number")

    def short_and_right(prompts: list, completions: list, **columns: Any) -> list[float]:
        scores = right(prompts, completions, **columns)
        return [(score or 0.0) - 0.01 * len(text) for score, text in zip(scores, completions, strict=True)]

    assert short_and_right(["?"] * 2, ["3", "so 4"], number=[3, 3]) == [0.99, -0.04]


SLEEPS = """
import sys
sys.path.insert(0, sys.argv[1])
import whet
from whet.rewards.verifiers.unit_tests import UnitTests
UnitTests._program = lambda self, text: "import os, time\\nos.fork()\\nprint(1, flush=True)\\ntime.sleep(60)"
rows = [{"prompt": "a yes", "tests": [{"input": "", "output": "x"}]}]
whet.train("grpo", model="m", data=rows, reward={"source": "unit_tests", "timeout": 60.0, "workers": 2}, out="stopped", num_steps=2,
           prompts_per_step=1, num_generations=4, max_new_tokens=6)
"""


def test_a_signal_ends_the_run_and_every_process_of_the_sandbox(place: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPS, str(Path(tiny.__file__).parent)], stderr=subprocess.PIPE, text=True
    ) as run:
        until, family = time.monotonic() + 90, list[psutil.Process]()
        while (
            len(family) < 8 and time.monotonic() < until and run.poll() is None
        ):  # two of: launcher, process 1, program, its fork
            family = psutil.Process(run.pid).children(recursive=True)
            time.sleep(0.05)
        os.kill(run.pid, signal.SIGINT)
        began = time.monotonic()
        _, said = run.communicate(timeout=60)
    assert len(family) >= 8, said
    assert time.monotonic() - began < 30
    assert run.returncode != 0
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert not list(Path("/tmp").glob(f"whet-sandbox-{run.pid}-*"))


def test_the_help_lists_the_names_and_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    def helped(*words: str) -> str:
        assert main([*words]) == 0
        return capsys.readouterr().out

    for verb, field in (("grpo", "reward"), ("sample", "reward"), ("rank", "judge"), ("eval", "judge")):
        line = next(one for one in helped(verb, "--help").splitlines() if one.strip().startswith(f"--{field} "))
        assert all(name in line for name in NAMES), (verb, line)
    assert '[["mine.py:score"]]' in helped("grpo", "--reward", "mine.py:score", "--help-all")
    said = helped("grpo", "--reward", "numeric_match", "--help-all")
    assert "options of reward numeric_match [default]:" in said
    assert "--reward.absolute " in said
    assert "largest difference that still counts as equal, in units of the answer [0.0]" in said
    assert "--judge-options.pattern " in helped("rank", "--judge", "regex", "--help")


def test_the_command_line_takes_a_name_with_options() -> None:
    words = [
        "--model",
        "m",
        "--data",
        "rows.jsonl",
        "--reward",
        "exact_match",
        "--reward.answer",
        "number",
        "--num-steps",
        "1",
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sizes = ["--prompts-per-step", "2", "--num-generations", "2", "--max-new-tokens", "4", "--quiet"]
    assert main(["grpo", *words, *sizes, "--out", "r"]) == 0
    assert "answer: number" in (Path("r") / "recipe.yaml").read_text()
