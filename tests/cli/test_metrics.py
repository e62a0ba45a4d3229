"""Every number that a run logs is in the table of metrics, with the methods that log it, and every entry is logged by some run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from whet.loops.metrics import FAMILIES, METRICS, checked, direction, find, order
from whet.loops.record import RunFolder
from whet.methods import catalogue

from .helpers import whet

JUDGE = (
    "def yes(prompts, completions, **columns):\n    return [float(text.split().count('yes')) for text in completions]\n"
    "def right(prompts, completions, **columns):\n    return [float('a' in text) for text in completions]\n"
)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def offline(home: Path, out: Path, data: str, *more: object) -> list[object]:
    given = ["--train.num-steps", 2, "--train.batch-size", 6, "--lr", "1e-2", "--threads", 1, "--quiet"]
    return ["--model", f"{home}/m", "--data", f"{home}/{data}.jsonl", "--out", out, *given, *more]


def online(home: Path, out: Path, *more: object) -> list[object]:
    given = [
        "--rollout.num-steps",
        2,
        "--rollout.prompts-per-step",
        6,
        "--max-new-tokens",
        6,
        "--lr",
        "1e-2",
        "--threads",
        1,
    ]
    given += ["--reward", f"{home}/judge.py:yes", "--quiet", "--out", out]
    return ["--model", f"{home}/m", "--data", f"{home}/prompts.jsonl", *given, *more]


SEVERAL = ("--num-generations", 4)


def evaluated(data: str, best: str, *more: object) -> tuple[object, ...]:
    """The options of a run that is evaluated after each step, and that ends early."""
    stop = ("--early-stop", 1, "--eval.early-stop.min-delta", 1000)
    return ("--eval", f"{{home}}/{data}.jsonl", "--eval.every", 1, "--keep-best", best, *stop, *more)


JUDGED = evaluated("prompts", "eval/judge/right", "--eval.judge", "{home}/judge.py:right", "--kl-in-reward.coef", 0)
RUNS: dict[str, tuple[str, str, str, tuple[object, ...]]] = {
    "sft": ("sft", "sft", "demonstrations", ()),
    "pretrain": ("sft", "pretrain", "texts", ()),
    **{name: ("pairs", name, "pairs", ()) for name in catalogue.PREFERENCE if name != "kto"},
    "kto": ("singles", "kto", "singles", ()),
    "bco": ("singles", "kto", "singles", ("--loss", "bco")),
    "kto on pairs": ("singles", "kto", "pairs", ()),
    "pairwise": ("reward", "reward", "pairs", ()),
    "k_way": ("reward", "reward", "ranked", ("--algorithm.name", "k_way")),
    "log_exp": ("reward", "reward", "pairs", ("--algorithm.name", "log_exp")),
    "absolute": ("reward", "reward", "scored", ("--algorithm.name", "absolute")),
    "process": ("reward", "reward", "steps", ("--algorithm.name", "process", "--data.separator", "maybe", "--head.standardize", "false")),
    **{name: ("online", name, "prompts", SEVERAL if one.slots["num_generations"] > 1 else ()) for name, one in catalogue.ONLINE.items()},
    "dual clip": ("online", "grpo", "prompts", (*SEVERAL, "--surrogate", "dual_clip", "--surrogate.bound", 1.1)),
    "target_kl": ("online", "ppo", "prompts", ("--rollout.target-kl", 1e-9, "--rollout.ppo-epochs", 2, "--rollout.mini-batch-size", 3)),
    "ahead": ("online", "grpo", "prompts", (*SEVERAL, "--generator.max-staleness", 1)),
    "online_dpo": ("online_pairs", "online_dpo", "prompts", SEVERAL),
    "online_dpo, ahead": ("online_pairs", "online_dpo", "prompts", (*SEVERAL, "--generator.max-staleness", 1)),
    "online_dpo, target_kl": ("online_pairs", "online_dpo", "prompts", (*SEVERAL, "--rollout.target-kl", 1e-9, "--rollout.ppo-epochs", 2)),
    "sft, evaluated": ("sft", "sft", "demonstrations", evaluated("demonstrations", "eval/loss")),
    "dpo, evaluated": ("pairs", "dpo", "pairs", evaluated("pairs", "eval/accuracy")),
    "kto, evaluated": ("singles", "kto", "singles", evaluated("singles", "eval/loss")),
    "pairwise, evaluated": ("reward", "reward", "pairs", evaluated("pairs", "eval/margin")),
    "ppo, evaluated": ("online", "ppo", "prompts", JUDGED),
    "online_dpo, evaluated": ("online_pairs", "online_dpo", "prompts", (*SEVERAL, *JUDGED[:-2])),
    "online bco": ("online_pairs", "online_dpo", "prompts", (*SEVERAL, "--loss", "bco_pair")),
}  # fmt: skip
"""Every verb of the catalogue, and the options that add a number: its family, its words, its rows."""
TWICE = ("--rollout.ppo-epochs", 2)
MORE: dict[str, tuple[object, ...]] = {
    "dapo": ("--overlong.buffer", 3), "instructgpt": ("--ptx.data", "{home}/texts.jsonl"), "kl_cov": TWICE, "clip_cov": TWICE,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home, words = tmp_path_factory.mktemp("home"), tiny.WORDS
    tiny.folder(home / "m")
    made: dict[str, Callable[[int, str], dict[str, Any]]] = {
        "prompts": lambda number, word: {"prompt": word},
        "demonstrations": lambda number, word: {"prompt": word, "completion": "yes please"},
        "texts": lambda number, word: {"text": f"{word} yes please"},
        "pairs": lambda number, word: {"prompt": word, "chosen": "yes please", "rejected": "no a b"},
        "singles": lambda number, word: {"prompt": word, "completion": "yes" if number % 2 else "no", "label": bool(number % 2)},
        "scored": lambda number, word: {"prompt": word, "completion": "yes a", "score": float(number % 3)},
        "ranked": lambda number, word: {"prompt": word, "responses": ["yes", "no", "a b"], "ranks": [1, 2, 2]},
        "steps": lambda number, word: {"prompt": word, "completions": ["a b ", " c d ", " e"], "labels": [True, number % 2, 0.5]},
    }  # fmt: skip
    for name, make in made.items():
        tiny.write_jsonl(home / f"{name}.jsonl", [make(number, word) for number, word in enumerate(words)])
    (home / "judge.py").write_text(JUDGE)
    return home


@pytest.fixture(scope="module")
def logged(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The names that each run logged."""
    from whet.cli.main import main

    out, found = tmp_path_factory.mktemp("runs"), {}
    for number, (case, (family, verb, data, more)) in enumerate(RUNS.items()):
        whole = 6 * (4 if family == "online" and SEVERAL[0] in more else 1)
        folder, more = out / str(number), ("--rollout.mini-batch-size", whole, *more, *MORE.get(case, ()))
        words = online(home, folder, *more) if family.startswith("online") else offline(home, folder, data, *more[2:])
        assert main([str(word).format(home=home) for word in (verb, *words)]) == 0, case
        found[case] = {name for row in rows(folder / "metrics.jsonl") for name in row if name != "step"}
    return found


def test_every_logged_name_is_in_the_table_with_the_family_of_its_method(logged: dict[str, set[str]]) -> None:
    for case, names in logged.items():
        for name in names:
            entry = find(name)
            assert entry is not None, (case, name)
            assert RUNS[case][0] in entry.of, (case, name)


def test_every_entry_is_logged_by_each_family_that_it_names(logged: dict[str, set[str]]) -> None:
    seen = {(RUNS[case][0], find(name)) for case, names in logged.items() for name in names}
    told = {(family, one) for one in METRICS for family in one.of}
    assert {(family, one.name) for family, one in told - seen} == set()


def test_the_names_of_the_table_are_its_own_and_each_literal_one_finds_itself() -> None:
    assert len({one.name for one in METRICS}) == len(METRICS)
    for one in METRICS:
        assert (
            find(re.sub(r"{\w+}", lambda found: {"{role}": "policy", "{k}": "4"}.get(found[0], "x"), one.name)) is one
        )
        assert set(one.of) <= FAMILIES.keys()
        assert one.better in ("higher", "lower", None)


def test_directions_and_the_order_of_what_is_shown() -> None:
    assert [direction(name) for name in ("eval/score", "eval/pass@4/exact", "eval/loss", "eval/kl", "mine")] == [
        "higher", "higher", "lower", None, None,
    ]  # fmt: skip
    assert direction("eval/reward/train/x") == "lower"  # the loss of a term, not a reward
    assert order({"mine": 1, "loss": 2, "lr/policy": 3, "rewards/margin": 4}) == ["loss", "rewards/margin"]


def test_a_loop_cannot_log_a_number_that_the_table_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"metric 'rewards/margins' is not in the table; add it to METRICS in whet/loops/metrics.py"
    ):
        RunFolder(tmp_path).metrics(1, **{"rewards/margins": 1.0})
    checked(["rewards/margin", "eval/judge/a b/c"])
    RunFolder(tmp_path).metrics(1, {"mine": 2.0}, loss=1.0)
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0, "mine": 2.0}]


def test_a_run_says_nothing_more_than_before(home: Path, tmp_path: Path, capsys: Any) -> None:
    said = whet(capsys, "sft", *offline(home, tmp_path / "out", "demonstrations"))
    assert (said.status, said.error, said.out) == (0, "", f"{tmp_path / 'out'}\n")
