"""Evaluation of every kind of run from the command line: it changes no bit of the run, and a killed run ends as a whole one."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import whet
from cli.helpers import one_message
from cli.helpers import whet as command
from whet.loops import evaluate
from whet.loops.evaluation import Evaluation
from whet.loops.metrics import timed
from whet.loops.record import RunFolder, read_metrics
from whet.runs.verify import first_difference

JUDGE = """
import random

def short(prompts, completions, **columns):
    return [-len(one) / 10 for one in completions]

def yes(prompts, completions, **columns):
    random.random()  # its random numbers are no others in the run
    return [float("e" in one) for one in completions]

calls = []

def late(prompts, completions, **columns):
    calls.append(0)
    return [None if len(calls) == 1 else float(len(calls)) for _ in completions]

def sometimes(prompts, completions, **columns):
    return [None if prompt.startswith("one") else 1.0 for prompt in prompts]
"""
PROMPTS = [{"prompt": f"{a} {b}"} for a in ("one", "two") for b in ("yes", "no", "one")]
SFT = [{"prompt": one["prompt"], "completion": "yes no"} for one in PROMPTS]
PAIRS = [{"prompt": one["prompt"], "chosen": "yes yes", "rejected": "no"} for one in PROMPTS]
ROWS = {"model": "m", "batch_size": 3, "num_steps": 4, "lr": 1e-2, "save_every": 2, "threads": 1}
ANSWERS = {
    "model": "m", "data": "p.jsonl", "reward": "judge.py:short", "prompts_per_step": 3, "num_steps": 4, "max_new_tokens": 5,
    "lr": 1e-2, "save_every": 2, "threads": 1,
}  # fmt: skip
GROUPS = {"num_generations": 3}
ONLINE_EVAL = {
    "eval": {
        "data": "h.jsonl",
        "every": 1,
        "num_generations": 4,
        "judge": ["judge.py:yes"],
        "keep_best": "eval/judge/yes",
    }
}


def held_out(data: str, best: str) -> dict[str, Any]:
    return {"eval": {"data": data, "every": 1, "keep_best": best}}


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sft": ("sft", ROWS | {"data": "sft.jsonl", "train.dropout": 0.1}, held_out("sft.jsonl", "eval/loss")),
    "dpo, LoRA": ("dpo", ROWS | {"data": "pairs.jsonl", "lora.rank": 2}, held_out("pairs.jsonl", "eval/accuracy")),
    "reward": ("reward", ROWS | {"data": "pairs.jsonl"}, held_out("pairs.jsonl", "eval/margin")),
    "ppo": ("ppo", ANSWERS | {"rollout.mini_batch_size": 2}, ONLINE_EVAL),
    "grpo, LoRA, top-p": ("grpo", ANSWERS | GROUPS | {"lora.rank": 2, "sampling.top_p": 0.9, "kl_in_loss.coef": 0.1}, ONLINE_EVAL),
    "online_dpo": ("online_dpo", ANSWERS, ONLINE_EVAL),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home, before = tmp_path_factory.mktemp("home"), Path.cwd()
    os.chdir(home)
    tiny.folder(home / "m")
    for name, rows in {"p": PROMPTS, "h": PROMPTS[1:4], "sft": SFT, "pairs": PAIRS}.items():
        tiny.write_jsonl(Path(f"{name}.jsonl"), rows)
    Path("judge.py").write_text(JUDGE)
    yield home
    os.chdir(before)


def weights(run: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / name / "model.safetensors")


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("case", CASES)
def test_an_evaluation_changes_no_bit_of_the_run(case: str, tmp_path: Path) -> None:
    method, options, evaluation = CASES[case]
    plain = whet.train(method, **options, out=tmp_path / "plain")
    watched = whet.train(method, **options, **evaluation, out=tmp_path / "watched")
    assert equal(weights(plain), weights(watched))
    lines = {row["step"]: row for row in read_metrics(watched)}
    assert sorted(lines) == [0, 1, 2, 3, 4]
    for row in read_metrics(plain):
        ours, theirs = (
            {name: value for name, value in one.items() if not name.startswith("eval/") and not timed(name)}
            for one in (row, lines[row["step"]])
        )
        assert ours == theirs
    best = int(lines[4]["eval/best_step"])
    name = evaluation["eval"]["keep_best"]
    values = [lines[step][name] for step in range(5)]
    assert values[best] == (min(values) if name == "eval/loss" else max(values))
    assert (watched / "best/model.safetensors").is_file()
    assert equal(weights(watched, "best"), weights(watched)) or best < 4


def test_single_answers_have_no_pairs() -> None:
    """The mismatched rows of KTO are no answers that could be ordered."""
    rows = [one | {"label": bool(number % 2)} for number, one in enumerate(SFT)]
    run = whet.train("kto", **ROWS | {"num_steps": 1}, data=rows, eval=rows, out="kto")
    for row in read_metrics(run):
        assert {name for name in row if name.startswith("eval/")} == {"eval/loss", "eval/policy/train/kto"}


def test_the_best_model_is_the_one_of_its_step() -> None:
    """A run that is ended at the best step of another one has its best model as its last one."""
    options = {**ROWS, "optim.schedule": "constant", "optim.warmup_ratio": 0.0, "lr": 0.3, "data": "sft.jsonl"}
    whole = whet.train(
        "sft", **options, eval={"data": "sft.jsonl", "every": 1, "keep_best": "eval/loss"}, out="best-whole"
    )
    best = int(read_metrics(whole)[-1]["eval/best_step"])
    assert best > 0, "the run improves at least once"
    shorter = whet.train("sft", **options | {"num_steps": best}, out="best-shorter")
    assert equal(weights(whole, "best"), weights(shorter))
    AutoModelForCausalLM.from_pretrained(whole / "best")


def test_the_numbers_are_those_of_the_answers_in_the_file() -> None:
    options = ANSWERS | GROUPS | {"kl_in_loss.coef": 0.1, "num_steps": 2}
    run = whet.train("grpo", **options, eval=ONLINE_EVAL["eval"], out="numbers")
    rows = {row["step"]: row for row in read_metrics(run)}
    start, end = (pyarrow.parquet.read_table(run / f"eval/step-0000000{step}.parquet").to_pydict() for step in (0, 2))
    assert start["prompt"] == end["prompt"] == [one["prompt"] for one in PROMPTS[1:4] for _ in range(4)]
    assert start["index"] == [0] * 4 + [1] * 4 + [2] * 4
    assert start["answer"] == [0, 1, 2, 3] * 3
    right = [["e" in text for text in end["completion"][place : place + 4]] for place in (0, 4, 8)]
    for k, expected in ((1, [sum(one) / 4 for one in right]), (4, [float(any(one)) for one in right])):
        assert rows[2][f"eval/pass@{k}/yes"] == pytest.approx(sum(expected) / 3)
    for name, column in (
        ("eval/judge/yes", "judge/yes"),
        ("eval/reward/short", "reward/short"),
        ("eval/kl", "kl"),
        ("eval/length", "length"),
    ):
        assert rows[2][name] == pytest.approx(sum(end[column]) / 12)
    assert end["reward/short"] == pytest.approx([-len(text) / 10 for text in end["completion"]])
    assert rows[0]["eval/kl"] == 0.0
    ours, theirs = ([sum(table["judge/yes"][place : place + 4]) / 4 for place in (0, 4, 8)] for table in (end, start))
    assert rows[2]["eval/win_rate/yes"] == evaluate.win_rate(ours, theirs)[0]


def test_a_judge_that_does_not_apply_to_an_answer_is_left_out() -> None:
    run = whet.train(
        "grpo",
        **ANSWERS | GROUPS | {"num_steps": 1},
        eval={"data": "h.jsonl", "judge": {"source": "judge.py:sometimes", "name": "two"}},
        out="applies",
    )
    assert read_metrics(run)[1]["eval/judge/two"] == 1.0
    table = pyarrow.parquet.read_table(run / "eval/step-00000001.parquet").to_pydict()
    assert table["judge/two"] == [None, None, 1.0]


def test_a_judge_that_applies_to_no_answer_at_the_start_has_no_win_rate() -> None:
    options = ANSWERS | GROUPS | {"num_steps": 2}
    run = whet.train("grpo", **options, eval={"data": "h.jsonl", "every": 1, "judge": "judge.py:late"}, out="late")
    rows = read_metrics(run)
    assert [row.get("eval/judge/late") for row in rows] == [None, 2.0, 3.0]
    assert not any("eval/win_rate/late" in row for row in rows)
    assert rows[0]["eval/win_rate/short"] == 0.5


@pytest.mark.parametrize("trunk", ["separate", "shared"])
def test_a_reward_model_is_the_same_as_reward_and_as_judge(trunk: str) -> None:
    judge = (
        Path("rm/model")
        if Path("rm").is_dir()
        else whet.train("reward", **ROWS, data="pairs.jsonl", out="rm") / "model"
    )
    options = ANSWERS | {"reward": str(judge), "rollout.mini_batch_size": 3}
    options |= {"trunk": "shared", "lora.rank": 2} if trunk == "shared" else {}
    run = whet.train("ppo", **options, eval={"data": "h.jsonl", "judge": str(judge)}, out=f"judged-{trunk}")
    table = pyarrow.parquet.read_table(run / "eval/step-00000004.parquet").to_pydict()
    assert table["judge/rm_1"] == table["reward/rm"]
    assert read_metrics(run)[-1]["eval/judge/rm_1"] == pytest.approx(sum(table["reward/rm"]) / 3)
    assert len(set(table["reward/rm"])) > 1


FLAKY = """
from pathlib import Path

def judge(prompts, completions, **columns):
    if Path("broken").exists():
        raise OSError("the judge is away")
    return [float(len(one)) for one in completions]
"""


def test_a_judge_that_fails_loses_no_step(tmp_path: Path) -> None:
    """The judge fails after step 2. The step is saved; a resume evaluates it, and ends as the run with a healthy judge."""
    Path("flaky.py").write_text(FLAKY)
    options = ANSWERS | GROUPS | {"kl_in_loss.coef": 0.1, "save_every": 0}
    evaluation = {"eval": {"data": "h.jsonl", "every": 2, "judge": ["flaky.py:judge"], "keep_best": "eval/judge/judge"}}
    whole = whet.train("grpo", **options, **evaluation, out=tmp_path / "whole")
    broken = Path("broken")

    def own_loop() -> None:
        with whet.Session("grpo", **options, **evaluation, out=tmp_path / "flaky") as session:
            for step in session.steps():
                if step.number == 1:
                    broken.touch()
                for mini in session.minibatches(session.rollout()):
                    session.update(mini)
                session.publish()

    with pytest.raises(whet.RewardError, match="the judge is away"):
        own_loop()
    assert [row["step"] for row in read_metrics(tmp_path / "flaky")] == [0, 1, 2]
    assert (tmp_path / "flaky/checkpoints/step-00000002").is_dir()
    with pytest.raises(whet.RewardError, match="the judge is away"):
        whet.train("grpo", **options, **evaluation, out=tmp_path / "flaky", resume=True)
    broken.unlink()
    whet.train("grpo", **options, **evaluation, out=tmp_path / "flaky", resume=True)
    assert [row["step"] for row in read_metrics(tmp_path / "flaky")] == [0, 1, 2, 3, 4]
    assert first_difference(whole, tmp_path / "flaky") is None


STOPPING = {
    "eval": {"data": "h.jsonl", "every": 1, "keep_best": "eval/judge/yes", "judge": ["judge.py:yes"], "early_stop": 2}
}


def test_a_run_ends_early_and_is_not_continued(capsys: pytest.CaptureFixture[str]) -> None:
    options = ANSWERS | GROUPS | STOPPING | {"num_steps": 30, "lr": 1e-9}
    run = whet.train("grpo", **options, out="early")
    rows = read_metrics(run)
    assert (rows[-1]["step"], rows[-1]["eval/stopped_early"], rows[-1]["eval/best_step"]) == (2, 1.0, 0.0)
    assert "step 2: eval/judge/yes has not improved in 2 evaluations" in capsys.readouterr().err
    assert (run / "model").is_dir()
    before = (run / "metrics.jsonl").read_bytes()
    whet.train("grpo", **options, out="early", resume=True)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_that_ended_early_without_a_last_checkpoint_has_ended() -> None:
    options = ANSWERS | GROUPS | STOPPING | {"num_steps": 30, "lr": 1e-9, "save_every": 0, "save_last": False}
    run = whet.train("grpo", **options, out="early-unsaved")
    before = (run / "metrics.jsonl").read_bytes()
    assert whet.train("grpo", **options, out="early-unsaved", resume=True) == run
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("case", ["sft", "ppo", "grpo, LoRA, top-p"])
def test_a_run_that_is_killed_at_every_step_ends_as_the_whole_one(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is killed after each line of metrics, before its checkpoint is written, and after each export of a best model."""
    method, options, evaluation = CASES[case]
    options = options | evaluation | {"save_every": 1}
    whole = whet.train(method, **options, out=tmp_path / "whole")
    for place, function in enumerate((RunFolder.metrics, Evaluation._write)):
        folder, lived = tmp_path / f"killed{place}", {"calls": 0}

        class Killed(BaseException):
            pass

        def dying(*given: Any, function: Any = function, lived: Any = lived, killed: Any = Killed, **more: Any) -> Any:
            out = function(*given, **more)
            lived["calls"] += 1
            if lived["calls"] in (1, 3, 6, 10):
                raise killed
            return out

        with monkeypatch.context() as patch:
            patch.setattr(*((RunFolder, "metrics"), (Evaluation, "_write"))[place], dying)
            for _ in range(20):
                try:
                    whet.train(method, **options, out=folder, resume="auto")
                    break
                except Killed:
                    continue
        assert lived["calls"] > 1
        assert first_difference(whole, folder) is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--eval.every", "2"], ["eval.every", "--eval"]),
        (["--keep-best", "eval/loss"], ["eval.keep_best", "no held-out rows"]),
        (["--eval", "h.jsonl", "--early-stop", "2"], ["eval.early_stop.metric"]),
        (["--eval", "h.jsonl", "--eval.early-stop.min-delta", "1"], ["eval.early_stop.patience"]),
        (["--eval", "h.jsonl", "--early-stop", "2", "--keep-best", "eval/score"], ["eval.every"]),
        (["--eval", "h.jsonl", "--keep-best", "mine"], ["eval.greater_is_better", "mine"]),
        (["--eval", "h.jsonl", "--keep-best", "tokens_per_second"], ["eval.keep_best", "depends on the clock"]),
        (["--eval", "h.jsonl", "--keep-best", "eval/kl"], ["eval.greater_is_better", "eval/kl"]),
        (["--eval", "h.jsonl", "--eval.judge", "judge.py:nothing"], ["judge.py", "nothing"]),
        (["--eval", "h.jsonl", "--eval.judge", "m"], ["m: no reward model and no judge"]),
        (["--eval", "h.jsonl", "--eval.temperature", "0", "--eval.num-generations", "2"], ["eval.num_generations"]),
        (["--eval", "nothing.jsonl"], ["nothing.jsonl"]),
        (["--eval", "sft.jsonl", "--eval.num-rows", "0"], ["eval.num_rows"]),
        (["--metric-for-best-model", "loss"], ["eval.keep_best"]),
        (
            ["--eval", "h.jsonl", "--keep-best", "eval/scor"],
            ["eval/scor is no number of whet", "did you mean 'eval/score'?"],
        ),
        (
            ["--eval", "h.jsonl", "--keep-best", "eval/judge/gold"],
            ["eval/judge/gold is not logged", "rewards are short", "judges are none"],
        ),
    ],
)
def test_options_that_no_evaluation_can_follow_are_refused_before_the_models_are_loaded(
    words: list[str], told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = command(
        capsys,
        "grpo",
        "--model",
        "m",
        "--reward",
        "judge.py:short",
        "--data",
        "p.jsonl",
        "--out",
        "refused",
        "--max-new-tokens",
        "5",
        *words,
    )
    assert said.status == 2
    one_message(said.error, told)
    assert not Path("refused").exists()


def test_a_number_that_no_evaluation_logs_ends_the_run_before_its_first_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        "--model",
        "m",
        "--reward",
        "judge.py:short",
        "--data",
        "p.jsonl",
        "--eval",
        "h.jsonl",
        "--keep-best",
        "eval/pass@1/short",
    ]
    said = command(
        capsys,
        "grpo",
        *words,
        "--out",
        "unknown",
        "--threads",
        "1",
        "--max-new-tokens",
        "4",
        "--prompts-per-step",
        "3",
        "--quiet",
    )
    assert said.status == 2
    one_message(said.error, ["eval.keep_best: no number 'eval/pass@1/short' is logged", "eval/reward/short"])
    assert not (Path("unknown") / "metrics.jsonl").exists()


def test_rows_of_python_are_evaluated_and_are_an_input_of_the_run() -> None:
    options = ROWS | {"data": SFT, "num_steps": 1}
    run = whet.train("sft", **options, eval=SFT[:2], out="python-rows")
    assert [row["step"] for row in read_metrics(run)] == [0, 1]
    assert any(name.startswith("eval") for name in json.loads((run / "inputs.json").read_text()))


def test_a_run_that_goes_on_with_other_held_out_prompts_has_no_win_rate(capsys: pytest.CaptureFixture[str]) -> None:
    rows = Path("other.jsonl")
    tiny.write_jsonl(rows, PROMPTS[:3])
    options = ANSWERS | GROUPS | {"eval": {"data": str(rows), "every": 1}, "out": "other-prompts"}
    whet.train("grpo", **options | {"num_steps": 2})
    tiny.write_jsonl(rows, PROMPTS[:5])
    capsys.readouterr()
    run = whet.train("grpo", **options, resume=True, accept_changed="eval.data")
    logged = {row["step"]: row for row in read_metrics(run)}
    assert ["eval/win_rate/short" in logged[step] for step in (0, 2, 3, 4)] == [True, True, False, False]
    assert "eval/reward/short" in logged[4]
    assert capsys.readouterr().err.count("no win rate is logged") == 1
