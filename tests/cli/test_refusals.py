"""What is wrong is told at once and early: all of it in one error, and a recipe, an option or a path within 2 s of CPU."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

import whet as package
from whet.data.forms import FIELDS
from whet.errors import DataError, ModelError, Problems, RecipeError, UserError

from .helpers import whet

RULES = """
def good(prompts, completions, **columns):
    return [1.0 for _ in completions]

def picky(prompts, completions, level):
    return [1.0 for _ in completions]
"""


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a model, some that are none, data and reward functions."""
    home = tmp_path_factory.mktemp("home")
    tiny.folder(home / "m")
    tiny.folder(home / "bare", template=None)
    tiny.folder(home / "endless", max_position_embeddings=16)
    (home / "empty").mkdir()
    (home / "rules.py").write_text(RULES)
    tiny.write_jsonl(home / "p.jsonl", [{"prompt": "a b"}, {"prompt": "c"}])
    tiny.write_jsonl(home / "t.jsonl", [{"text": "a b"}])
    tiny.write_jsonl(home / "q.jsonl", [{"question": "a b"}, {"question": "c"}])
    tiny.write_jsonl(home / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
    (home / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (home / "late.jsonl").write_text('{"prompt": "a"}\n' * 100 + '{"prompt": 3}\n')
    (home / "r.yaml").write_text("method: grpo\nmodel: m\nrollout: {num_stps: 3}\n")
    (home / "done" / "checkpoints").mkdir(parents=True)
    (home / "done" / "recipe.yaml").write_text("model: m\n")
    (home / "done" / "metrics.jsonl").write_text("{}\n")
    before = Path.cwd()
    os.chdir(home)
    yield home
    os.chdir(before)


GOOD = {"model": "m", "data": "p.jsonl", "reward": "rules.py:good", "max-new-tokens": "4", "out": "out"}


def words(**changes: str | None) -> list[str]:
    given = GOOD | {name.replace("_", "-"): value for name, value in changes.items()}
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", value)]


def told(capsys: Any, verb: str, given: list[str]) -> list[str]:
    """The problems that a command tells, without the name of the program."""
    said = whet(capsys, verb, *given, "--quiet")
    assert (said.status, said.out) == (2, "")
    assert not Path("out").exists()
    lines = said.error.splitlines()
    assert all(line.startswith("whet: ") for line in lines)
    return [line.removeprefix("whet: ") for line in lines]


# --- at once -------------------------------------------------------------------------------------------------------------

NO_TEMPLATE = "bare: the tokenizer has no chat template; give one with --chat-template plain (### Human / ### Assistant), a Jinja file"
TOGETHER: list[tuple[str, dict[str, str | None], list[str]]] = [
    ("grpo", {"model": "empty", "data": "broken.jsonl", "reward": "rules.py:god", "out": "done"}, [
        "out: done already holds a run", "empty: not a model folder", "rules.py:god: rules.py has no 'god'",
        "broken.jsonl:2: not valid JSON",
    ]),
    ("grpo", {"model": "bare", "data": "q.jsonl", "reward": "nothing.py:f", "lerning_rate": "1", "rollout.num_steps": "2"}, [
        "unknown field 'lerning_rate'", NO_TEMPLATE, "nothing.py:f: no such file nothing.py",
        "q.jsonl:1: field 'prompt' is missing (the row has question)",
    ]),
    ("ppo", {"model": None, "data": None, "reward": None}, [
        "model.path: which model?", "reward: what scores the answers?", "data.train: which rows?",
    ]),
    ("ppo", {"reference": "nowhere", "critic.path": "/nowhere", "max_new_tokens": "127", "ptx": "n.jsonl"}, [
        "nowhere: no such model folder", "/nowhere: no such model folder", "sampling.max_new_tokens: the model has 128 positions",
        "n.jsonl: no such file",
    ]),
    ("dpo", {"reward": None, "max_new_tokens": None, "data": "[p.jsonl, pairs.jsonl, q.jsonl]", "eval": "broken.jsonl"}, [
        "p.jsonl:1: field 'chosen' is missing", "q.jsonl:1: field 'prompt' is missing", "broken.jsonl:2: not valid JSON",
    ]),
    ("sample", {"model": "bare", "data": "q.jsonl", "keep": "best", "reward": None, "out": "p.jsonl"}, [
        "out: p.jsonl already exists", "keep: which answer is the best?", NO_TEMPLATE, "q.jsonl:1: field 'prompt' is missing",
    ]),
    ("eval", {"reward": None, "judge": "rules.py:god", "max_new_tokens": "4", "data": "n.jsonl", "out": "done"}, [
        "eval: a win rate needs both", "rules.py:god: rules.py has no 'god'", "n.jsonl: no such file",
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "changes", "what"), TOGETHER)
def test_what_is_wrong_is_told_at_once(verb: str, changes: dict, what: list[str], capsys: Any) -> None:
    found = told(capsys, verb, words(**changes))
    assert len(found) == len(what), found
    for line, start in zip(found, what, strict=True):
        assert line.startswith(start)


def test_what_needs_the_tokenizer_is_told_at_once_too(capsys: Any) -> None:
    found = told(capsys, "grpo", words(data="late.jsonl", reward="[{source: rules.py:good}, {source: ./m}]"))
    assert found == [
        "late.jsonl:101: field 'prompt' must be a string or a list of messages, got 3",
        "./m: no reward model and no judge, it has no scalar head; train one with whet reward",
    ]
    found = told(capsys, "grpo", words(reward="[{source: rules.py:picky}, {source: ./m}]"))
    assert [one.split(":")[0] for one in found] == ["reward.0", "./m"], found
    assert "level" in found[0]
    given = words(reward=None, max_new_tokens=None, data="[late.jsonl, p.jsonl]", **{"eval": "late.jsonl"})
    assert told(capsys, "pretrain", given)[0].startswith("late.jsonl:1: field 'text' is missing")


def test_options_that_contradict_each_other_are_told_at_once(capsys: Any) -> None:
    found = told(
        capsys,
        "ppo",
        words(**{"optim.muon_lr": "1", "rollout.mini_batch_size": "9999", "ptx": "t.jsonl", "trackers": "nope"}),
    )
    assert [one.split(":")[0] for one in found] == [
        "trackers",
        "optim.muon_lr",
        "rollout.mini_batch_size",
        "ptx.data",
    ], found


def test_what_this_machine_lacks_is_told_with_the_rest(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    monkeypatch.setattr("whet.extras.installed", lambda name: name == "datasets")
    lacking = {
        "cluster": "auto",
        "trackers": "wandb",
        "learner": "zero2",
        "model.device": "cuda:7",
        "data.columns.zzz": "a",
    }
    found = told(capsys, "sft", words(reward=None, max_new_tokens=None, data="some/set", **lacking))
    assert found == ["data.columns: whet reads no column 'zzz'; it has " + ", ".join(FIELDS)]
    found = told(
        capsys, "sft", words(reward=None, max_new_tokens=None, data="t.jsonl", **(lacking | {"data.columns.zzz": None}))
    )
    assert [one.partition(":")[0] for one in found] == ["cluster.address", "trackers"], found
    found = told(
        capsys,
        "sft",
        words(reward=None, max_new_tokens=None, data="t.jsonl", learner="zero2", **{"model.device": "cuda:7"}),
    )
    assert [one.partition(":")[0] for one in found] == ["learner.backend", "model.device"], found


def test_the_error_of_python_has_the_single_ones_and_their_class() -> None:
    with pytest.raises(UserError) as caught:
        package.Session("grpo", model="empty", data="q.jsonl", reward="rules.py:god", out="out")
    assert [type(one) for one in caught.value.problems] == [ModelError, RecipeError, DataError]
    assert str(caught.value).splitlines() == ["3 problems:", *map(str, caught.value.problems)]
    with pytest.raises(ModelError) as alone:
        package.train("grpo", model="empty", data="p.jsonl", reward="rules.py:good", max_new_tokens=4, out="out")
    assert alone.value.problems == ()
    with pytest.raises(ModelError) as same:
        package.train("ppo", model="empty", reference="/nowhere", data="p.jsonl", reward="rules.py:good", out="out")
    assert len(same.value.problems) == 2


def test_problems_keep_what_is_no_mistake_of_the_user_and_tell_nothing_twice() -> None:
    problems = Problems()
    for _ in range(2):
        with problems:
            raise RecipeError("a")
    with pytest.raises(RecipeError, match=r"^a$"):
        problems.tell()
    with pytest.raises(KeyError), problems:
        raise KeyError("b")
    Problems().tell()


# --- early ---------------------------------------------------------------------------------------------------------------

TORCHLESS: list[tuple[list[str], str]] = [
    (["gpro", *words()], "unknown verb 'gpro'; did you mean 'gspo'?"),
    (["grpo", "no.yaml", *words()], "no.yaml: no such recipe"),
    (["train", "r.yaml"], "unknown field 'rollout.num_stps'; did you mean 'rollout.num_steps'?"),
    (["grpo", *words(), "--lr", "fast"], "optim.lr: expected `float`"),
    (["ppo", *words(model="/nonexistent")], "/nonexistent: no such model folder"),
    (["ppo", *words(model="empty")], "empty: not a model folder"),
    (["sft", "--model", "bare", "--data", "t.jsonl"], "bare: the tokenizer has no chat template"),
    (["grpo", *words(), "--pad-token", "<pda>"], "--model.pad-token '<pda>': the tokenizer of m has no such token"),
    (["grpo", *words(), "--chat-template", "no.jinja"], "chat template 'no.jinja': expected"),
    (["grpo", *words(data="pp.jsonl")], "pp.jsonl: no such file; did you mean p.jsonl?"),
    (["grpo", *words(data="broken.jsonl")], "broken.jsonl:2: not valid JSON"),
    (["grpo", *words(data="q.jsonl")], "q.jsonl:1: field 'prompt' is missing"),
    (["grpo", *words(data="q.jsonl"), "--data.columns.prompt", "qestion"], "no row has a column 'qestion'; did you mean 'question'?"),
    (["grpo", *words(reward="rule.py:good")], "rule.py:good: no such file rule.py"),
    (["grpo", *words(reward="rules.py:goood")], "rules.py has no 'goood'"),
    (["grpo", *words(reward=None)], "reward: what scores the answers?"),
    (["grpo", *words(out="done")], "out: done already holds a run"),
    (["sample", *words(out="p.jsonl")], "out: p.jsonl already exists"),
    (["rank", "--data", "n.jsonl", "--out", "out"], "n.jsonl: no such file"),
]  # fmt: skip
TORCH: list[tuple[list[str], str]] = [
    (["grpo", *words(), "--lerning-rate", "1"], "unknown field 'lerning_rate'"),
    (["grpo", *words(), "--kl-in-loss.ceof", "1"], "algorithm.kl_in_loss.ceof"),
    (["grpo", *words(), "--rollout.mini-batch-size", "99999"], "rollout.mini_batch_size: a rollout has"),
]
"""Mistakes in the slots of a method, whose check reads the functions of `whet.ops`."""
CODE = """
import sys
from whet.cli.main import main
code = main(sys.argv[1:])
print("torch" in sys.modules, "transformers" in sys.modules)
sys.exit(code)
"""


def cpu_of(given: list[str]) -> tuple[float, list[str], str]:
    """The CPU seconds of a command in a process of its own, which of torch and transformers it loaded, and its error."""
    seconds, done = timed("-c", CODE, *given)
    assert done.returncode == 2, done.stderr
    return seconds, done.stdout.split(), done.stderr


def timed(*given: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """The CPU seconds of Python with these arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *given], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


@pytest.fixture(scope="module")
def importing_torch() -> float:
    """The CPU seconds of an import of torch on this machine: the larger of two, as the first one reads files from the disk."""
    return max(timed("-c", "import torch")[0] for _ in range(2))


@pytest.mark.parametrize("number", range(len(TORCHLESS)))
def test_a_typical_mistake_is_told_without_torch(number: int, importing_torch: float) -> None:
    given, what = TORCHLESS[number]
    seconds, loaded, error = cpu_of(given)
    assert what in error
    assert error.count("\n") == 1
    assert loaded == ["False", "False"]
    assert seconds < 0.5 * importing_torch


@pytest.mark.parametrize("number", range(len(TORCH)))
def test_a_mistake_in_a_slot_is_told_without_transformers(number: int, importing_torch: float) -> None:
    given, what = TORCH[number]
    seconds, loaded, error = cpu_of(given)
    assert what in error
    assert error.count("\n") == 1
    assert loaded == ["True", "False"]
    assert seconds < 1.5 * importing_torch + 1.0


def test_a_resume_and_python_objects_are_checked_by_the_session(capsys: Any) -> None:
    assert told(capsys, "grpo", [*words(data="q.jsonl", model="empty"), "--resume"])[0].startswith(
        "there is no run in out yet"
    )
    with pytest.raises(DataError, match=r"out/inputs/.*jsonl:1: field 'prompt' is missing"):
        package.train(
            "grpo", model="m", data=json.loads('[{"q": "a"}]'), reward="rules.py:good", max_new_tokens=4, out="out"
        )
