"""Rewards that do not apply, change what is not theirs, or take too long, from the command line and from Python to the run folder."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet
import pytest
import tiny
import torch

import whet
from whet.errors import RecipeError, RewardError
from whet.loops import rollouts
from whet.loops.record import read_metrics

from .helpers import one_message
from .helpers import whet as command

JUDGES = """
import os, sys, time, torch

def words(prompts, completions, **columns):
    return [len(one.split()) - 0.3 * len(one) for one in completions]

def some(prompts, completions, **columns):
    return [None if len(one) % 3 == 0 else float(len(one) % 5) for one in completions]

def none(prompts, completions, **columns):
    return [None] * len(completions)

def dense(prompts, completions, completion_ids, **columns):
    return [None if len(ids) % 2 else [0.1 * (one % 3) for one in ids] for ids in completion_ids]

def long(prompts, completions, **columns):
    return [None if len(one) < 4 else 1.0 for one in completions]

def rude(prompts, completions, tags, **columns):
    out = words(prompts, list(completions))
    for one in tags:
        one["seen"].append(1)
        assert one["seen"] == [0, 1], one
    completions.sort()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    os.chdir("/")
    return out

def stuck(prompts, completions, **columns):
    if os.path.exists("wait"):
        with open("pid", "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)
    return words(prompts, completions)

def fails(prompts, completions, **columns):
    if os.path.exists("fail") and not columns["flag"][0]:
        sys.exit("no more")
    return some(prompts, completions)
"""
ROWS = [{"prompt": word, "tags": {"seen": [0]}, "flag": 0} for word in tiny.WORDS]
RUN: dict[str, Any] = {
    "model": "m", "data": "prompts.jsonl", "num_steps": 3, "prompts_per_step": 3, "num_generations": 4, "max_new_tokens": 6, "lr": 1e-2,
    "train.save_every": 1, "train.keep": 9, "quiet": True,
}  # fmt: skip
BOTH = ["judge.py:words", {"source": "judge.py:some", "weight": 2.0}]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {"reward": BOTH}),
    "gdpo, replaced groups": ("grpo", {"reward": BOTH, "normalize": "group_normalized", "algorithm.dynamic_sampling": 2}),
    "minimum, running": ("grpo", {"reward": [*BOTH, "judge.py:none"], "combine": "minimum", "reward_normalization": "running",
                                  "advantage": "group_center"}),
    "dense": ("grpo", {"reward": ["judge.py:words", "judge.py:dense"]}),
    "remax": ("remax", {"reward": BOTH, "num_generations": 1}),
    "online_dpo": ("online_dpo", {"reward": BOTH, "num_generations": 3}),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home, before = tmp_path_factory.mktemp("home"), Path.cwd()
    os.chdir(home)
    tiny.folder(home / "m")
    tiny.write_jsonl(Path("prompts.jsonl"), ROWS)
    Path("judge.py").write_text(JUDGES)
    yield home
    os.chdir(before)
    run.cache_clear()


@cache
def run(case: str) -> Path:
    method, fields = CASES[case]
    return whet.train(method, out=f"runs/{case.replace(' ', '_').replace(',', '')}", **(RUN | fields))


def fresh(name: str, **fields: Any) -> Path:
    return whet.train("grpo", out=f"runs/{name}", **(RUN | {"reward": "judge.py:words"} | fields))


# --- the record ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_run_whose_rewards_do_not_always_apply_is_computed_again_to_the_bit(case: str) -> None:
    folder = run(case)
    for step in (1, 3):
        again = whet.replay(folder, step)
        assert again.equal, str(again)
    assert whet.diff(folder, folder).equal
    assert any(
        None in rollouts.read(folder, step)[name]
        for step in (1, 2, 3)
        for name in rollouts.read(folder, step)
        if "reward/" in name
    )


def test_the_record_has_no_score_where_a_reward_does_not_apply() -> None:
    folder = run("minimum, running")
    for step, line in enumerate(read_metrics(folder), 1):
        table = rollouts.read(folder, step)
        lengths = [len(text) for text in table["completion"]]
        assert table["reward/some"] == [None if n % 3 == 0 else float(n % 5) for n in lengths]
        known = [one for one in table["reward/some"] if one is not None]
        assert line["reward/some"] == pytest.approx(sum(known) / len(known), rel=1e-6)
        assert table["reward/none"] == [None] * len(lengths)
        assert "reward/none" not in line
    schema = pyarrow.parquet.read_schema(rollouts.path_of(folder, 1))
    assert {str(schema.field(f"reward/{name}").type) for name in ("words", "some", "none")} == {"double"}


def test_the_score_is_the_sum_of_the_rewards_that_apply() -> None:
    for step in (1, 2, 3):
        table = rollouts.read(run("grpo"), step)
        for words, some, score in zip(table["reward/words"], table["reward/some"], table["score"], strict=True):
            assert score == pytest.approx(words + 2 * (some or 0.0), abs=1e-5)


def test_the_score_is_the_least_of_the_rewards_that_apply() -> None:
    """The running statistics of the first rollout: its mean is the shift, its sample deviation the scale."""
    table = rollouts.read(run("minimum, running"), 1)
    pairs = zip(table["reward/words"], table["reward/some"], strict=True)
    least = torch.tensor(
        [min(words, words if some is None else 2 * some) for words, some in pairs], dtype=torch.float64
    )
    expected = (least - least.mean()) / least.std()
    torch.testing.assert_close(torch.tensor(table["score"]).double(), expected, rtol=0, atol=2e-5)


def test_why_says_that_a_reward_does_not_apply(capsys: Any) -> None:
    folder = run("grpo")
    place = rollouts.read(folder, 3)["reward/some"].index(None)
    said = command(capsys, "why", folder, "--step", 3, "--sample", place, "--quiet")
    assert said.status == 0, said.error
    assert "reward some, weight 2: does not apply" in said.out


def test_two_runs_differ_where_a_reward_applies_in_one_alone() -> None:
    other = fresh("other", reward=["judge.py:words", {"source": "judge.py:long", "weight": 2.0, "name": "some"}])
    found = whet.diff(run("grpo"), other)
    assert found.parting is not None
    assert found.parting.where.startswith("column reward/some, row ")


# --- resume ----------------------------------------------------------------------------------------------------------


def test_a_run_that_its_reward_ended_is_continued_to_the_bit_with_a_limit(home: Path, capsys: Any) -> None:
    """sys.exit in the function is its error; a limit of time may be added when the run is resumed."""
    rewards = ["judge.py:words", "judge.py:fails"]
    whole = fresh("whole", reward=rewards)
    (home / "fail").touch()
    tiny.write_jsonl(Path("flags.jsonl"), [{**row, "flag": n < 6} for n, row in enumerate(ROWS)])
    tiny.write_jsonl(Path("prompts.jsonl"), ROWS)
    with pytest.raises(RewardError, match=r"^reward fails raised SystemExit: no more \(at .*judge\.py:\d+\)$"):
        fresh("broken", reward=rewards)
    (home / "fail").unlink()
    limited = ["judge.py:words", {"source": "judge.py:fails", "timeout": 60}]
    again = fresh("broken", reward=limited, resume=True)
    found = whet.diff(whole, again)
    assert found.equal, str(found)


# --- what a function changes -----------------------------------------------------------------------------------------


def test_a_function_that_changes_its_arguments_and_the_process_changes_no_number() -> None:
    rude = fresh("rude", reward={"source": "judge.py:rude", "name": "words"})
    found = whet.diff(fresh("polite"), rude)
    assert found.equal, str(found)
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == (torch.float32, True)


# --- limits ----------------------------------------------------------------------------------------------------------

WORDS = [
    "--model", "m", "--data", "prompts.jsonl", "--rollout.num-steps", "2", "--rollout.prompts-per-step", "2", "--num-generations", "2",
    "--max-new-tokens", "4", "--train.save-every", "1", "--quiet",
]  # fmt: skip


def test_a_function_that_is_stuck_ends_the_run_with_its_name_and_the_limit(home: Path, capsys: Any) -> None:
    (home / "wait").touch()
    words = [*WORDS, "--reward", "judge.py:stuck", "--reward.timeout", "3", "--out", "runs/stuck"]
    said = command(capsys, "grpo", *words)
    one_message(said.error, ["reward stuck took more than 3 s for 4 answers to the prompt rows", "timeout"])
    assert said.status == 1
    assert not psutil.pid_exists(int((home / "pid").read_text()))
    (home / "wait").unlink()
    assert command(capsys, "grpo", *words, "--resume").status == 0


@pytest.mark.parametrize("limit", [[], ["--reward.timeout", "500"]], ids=["in the run", "in its process"])
def test_a_signal_while_a_function_runs_saves_and_ends_the_run(home: Path, limit: list[str], capsys: Any) -> None:
    (home / "wait").touch()
    (home / "pid").unlink(missing_ok=True)
    words = ["grpo", *WORDS, "--reward", "judge.py:stuck", *limit, "--out", f"runs/signal{len(limit)}"]
    run = subprocess.Popen([sys.executable, "-m", "whet", *words], stderr=subprocess.PIPE, text=True)
    while not (home / "pid").exists() or not (home / "pid").read_text():
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=120)[1]
    assert run.returncode == 128 + signal.SIGTERM, said
    assert "Traceback" not in said
    pid = int((home / "pid").read_text())
    assert (pid == run.pid) == (not limit)
    assert not psutil.pid_exists(pid)
    (home / "wait").unlink()
    assert command(capsys, *words, "--resume").status == 0


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--reward", "judge.py:words", "--reward.timeout", "0"], "reward.0.timeout"),
        (["--reward", "judge.py:words", "--reward.speed", "3"], "reward.0.speed: a function has no option but timeout"),
        (["--reward", "m", "--reward.timeout", "3"], "reward.0.timeout: a reward model has no options"),
        (
            ["--reward", "judge.py:words", "--reward", "judge.py:some", "--reward.timeout", "3"],
            "reward.timeout: 2 are given",
        ),
        (
            ["--reward.timeout", "3", "--reward", "judge.py:words", "--reward", "judge.py:some"],
            "reward.timeout: 2 are given",
        ),
        (["--reward.timeout", "3"], "reward.0.source"),
    ],
)
def test_a_wrong_limit_is_refused_before_the_run(words: list[str], what: str, capsys: Any) -> None:
    said = command(capsys, "grpo", *WORDS, *words, "--out", "runs/refused")
    one_message(said.error.splitlines(keepends=True)[0], [what])
    assert said.status == 2


# --- the other verbs -------------------------------------------------------------------------------------------------


def rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


SAMPLE: dict[str, Any] = {"model": "m", "data": "prompts.jsonl", "num_generations": 3, "max_new_tokens": 6}


def test_sample_adds_what_applies_and_keeps_the_best() -> None:
    whet.sample(**SAMPLE, reward=BOTH, out="scored.jsonl")
    for row in rows("scored.jsonl"):
        for text, score in zip(row["responses"], row["scores"], strict=True):
            own = len(text.split()) - 0.3 * len(text)
            assert score == pytest.approx(own + (0 if len(text) % 3 == 0 else 2.0 * (len(text) % 5)), abs=1e-5)
    whet.sample(**SAMPLE, reward={"source": "judge.py:words", "timeout": 60}, keep="best", out="best.jsonl")
    for every, best in zip(rows("scored.jsonl"), rows("best.jsonl"), strict=True):
        assert best["completion"] in every["responses"]


@pytest.mark.parametrize("verb", ["sample", "eval"])
def test_an_answer_without_any_score_is_named_and_the_answers_are_kept(verb: str) -> None:
    given: dict[str, Any] = SAMPLE | {"reward": "judge.py:long", "out": "none.jsonl"}
    if verb == "eval":
        given = {"model": "m", "against": "m", "data": "prompts.jsonl", "max_new_tokens": 2}
        given |= {"judge": "judge.py:long", "answers": "none.jsonl"}
    call: Any = whet.sample if verb == "sample" else whet.evaluate
    with pytest.raises(
        RewardError, match=r"^no reward applies to answer \d of the prompt row \d+ \('\w+'\): long returned None"
    ):
        call(**given)
    kept = Path("none.unscored.jsonl")
    assert len(rows(str(kept))) == len(ROWS)
    kept.unlink()


def test_eval_compares_the_prompts_to_which_a_judge_applies() -> None:
    fields: dict[str, Any] = {
        "model": "m",
        "against": "m",
        "data": "prompts.jsonl",
        "max_new_tokens": 6,
        "temperature": 1.0,
    }
    found = whet.evaluate(
        **fields, judge=["judge.py:words", {"source": "judge.py:some", "timeout": 60}], answers="compared.jsonl"
    )
    table = rows("compared.jsonl")
    for row in table:
        for name, text in (("some", row["answer"]), ("some/against", row["against"])):
            assert row[name] == (None if len(text) % 3 == 0 else float(len(text) % 5))
    both = [(row["some"], row["some/against"]) for row in table if None not in (row["some"], row["some/against"])]
    assert 0 < len(both) < len(table)
    assert found["some/prompts"] == len(both)
    assert found["some/win_rate"] == pytest.approx(sum(a > b or 0.5 * (a == b) for a, b in both) / len(both))
    assert found["some/score"] == pytest.approx(sum(a for a, _ in both) / len(both))
    assert "words/prompts" not in found
    with pytest.raises(RewardError, match=r"^judge none: it applies to both answers of no prompt"):
        whet.evaluate(**fields, judge=["judge.py:words", "judge.py:none"])


JUDGE = """
import time
def score(prompts, completions, **columns):
    columns["note"][0].append(1)
    return [float(len(one)) for one in completions]

def ranks(prompt, responses, **columns):
    columns["note"].append(1)
    if prompt == "stuck":
        time.sleep(600)
    return list(range(len(responses), 0, -1))

class Partial:
    def score(self, groups):
        return [None if one.text == "b" else 1.0 for group in groups for one in group.samples]
"""


def test_rank_takes_a_limit_and_refuses_an_answer_without_a_score(home: Path) -> None:
    (home / "ranker.py").write_text(JUDGE)
    given = [{"prompt": "a", "responses": ["b", "ccc", "dd"], "note": []}]
    limit = {"judge_options": {"timeout": 2}}
    for number, (form, ranks) in enumerate((("score", [3, 1, 2]), ("rank", [3, 2, 1]))):
        judge = f"ranker.py:{'score' if form == 'score' else 'ranks'}"
        for options in ({}, limit):
            out = f"ranked{number}{len(options)}.jsonl"
            whet.rank(data=given, judge=judge, judge_form=form, out=out, **options)
            assert rows(out) == [{**given[0], "ranks": ranks}]  # the note is as it was
    with pytest.raises(RewardError, match=r"^judge ranker.py:ranks took more than 2 s for 3 answers"):
        whet.rank(
            data=[{**given[0], "prompt": "stuck"}],
            judge="ranker.py:ranks",
            judge_form="rank",
            out="late.jsonl",
            **limit,
        )
    with pytest.raises(RewardError, match=r"^the judge does not apply \(None\) to answer 0 of row 0"):
        whet.rank(data=given, judge="ranker.py:Partial", out="partial.jsonl")
    with pytest.raises(RecipeError, match=r"judge_options.speed: a function has no option but timeout"):
        whet.rank(data=given, judge="ranker.py:score", judge_options={"speed": 2}, out="speed.jsonl")


def test_a_session_shows_where_a_reward_applies() -> None:
    fields = {name: value for name, value in RUN.items() if name not in ("quiet", "train.keep")}
    with whet.Session("grpo", **(fields | {"reward": BOTH, "out": "runs/session", "num_steps": 1})) as session:
        for _ in session.steps():
            groups = session.generate()
            scores = session.score(groups)
            texts = [sample.text for group in groups for sample in group.samples]
            assert scores.applies["some"].tolist() == [len(text) % 3 > 0 for text in texts]
            assert list(scores.applies) == ["some"]
            own: list[float | None] = [None if len(text) % 3 == 0 else 1.0 for text in texts]
            batch = session.advantages(session.measure(groups, {"words": torch.ones(len(texts)), "some": own}))
            assert batch["score"].tolist() == [1.0 if one is None else 3.0 for one in own]
            for mini in session.minibatches(batch):
                session.forward_backward(mini)
                session.optim_step()
            session.publish()
            assert session.metrics()["reward/some"] == 1.0
