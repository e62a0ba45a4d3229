"""A few steps of methods from the command line: each trains, writes what it says, and resumes to the bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny

from whet.data import Batch
from whet.learner.local import LocalLearner

from .helpers import whet

JUDGE = """
def yes(prompts, completions, **columns):
    return [float(text.split().count("yes")) for text in completions]

def short(prompts, completions, **columns):
    return [-float(len(text.split())) for text in completions]

def ids(prompts, completions, completion_ids, **columns):
    return [[float(number % 3) for number in own] for own in completion_ids]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a reward model and a file of each kind of row. Nothing in it changes."""
    home, words = tmp_path_factory.mktemp("home"), tiny.WORDS
    tiny.folder(home / "m")
    tiny.write_jsonl(home / "prompts.jsonl", [{"prompt": word, "level": number} for number, word in enumerate(words)])
    pairs = [{"prompt": word, "chosen": "yes please", "rejected": "no a b"} for word in words]
    tiny.write_jsonl(home / "pairs.jsonl", pairs)
    tiny.write_jsonl(home / "singles.jsonl", [
        {"prompt": word, "completion": "yes" if number % 2 else "no", "label": bool(number % 2)}
        for number, word in enumerate(words)
    ])  # fmt: skip
    tiny.write_jsonl(home / "steps.jsonl", [
        {"prompt": word, "completions": ["a b ", " c d ", " e"], "labels": [True, number % 2, 0.5]}
        for number, word in enumerate(words)
    ])  # fmt: skip
    (home / "judge.py").write_text(JUDGE)
    return home


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def offline(home: Path, out: Path, data: str, *more: object) -> list[object]:
    given = ["--train.num-steps", 4, "--train.batch-size", 6, "--lr", "1e-2", "--threads", 1, "--quiet"]
    return ["--model", f"{home}/m", "--data", f"{home}/{data}.jsonl", "--out", out, *given, *more]


def online(home: Path, out: Path, *more: object) -> list[object]:
    given = [
        "--rollout.num-steps",
        3,
        "--rollout.prompts-per-step",
        6,
        "--max-new-tokens",
        6,
        "--lr",
        "1e-2",
        "--threads",
        1,
        "--quiet",
    ]
    reward = ["--reward", f"{home}/judge.py:yes"]
    return ["--model", f"{home}/m", "--data", f"{home}/prompts.jsonl", "--out", out, *reward, *given, *more]


OFFLINE: dict[str, tuple[str, str, tuple[object, ...], set[str]]] = {
    "kto": ("kto", "singles", (), {"kto"}),
    "kto on pairs, with weights": ("kto", "pairs", ("--loss.desirable", 0.5, "--loss.undesirable", 2), {"kto"}),
    "bco on single answers": ("kto", "singles", ("--loss", "bco"), {"bco"}),
    "orpo": ("orpo", "pairs", (), {"sigmoid", "sft"}),
    "simpo": ("simpo", "pairs", (), {"sigmoid"}),
    "cpo": ("cpo", "pairs", (), {"sigmoid", "sft"}),
    "a mixture": (
        "dpo",
        "pairs",
        ("--loss", "[{name: sigmoid, weight: 0.8}, {name: bco_pair, weight: 0.2}]"),
        {"sigmoid", "bco_pair"},
    ),
    "dpo with sft": ("dpo", "pairs", ("--sft-weight", 0.1), {"sigmoid", "sft"}),
    "a divergence": (
        "dpo",
        "pairs",
        ("--implicit-reward.divergence", "alpha", "--implicit-reward.alpha", 0.3),
        {"sigmoid"},
    ),
    "sorted gaps": ("dpo", "pairs", ("--loss", "aot"), {"aot"}),
    "a moving reference": ("dpo", "pairs", ("--sync-reference.every", 2, "--sync-reference.mix", 0.5), {"sigmoid"}),
    "process": (
        "reward",
        "steps",
        ("--algorithm.name", "process", "--data.separator", "maybe", "--head.standardize", "false"),
        {"process"},
    ),
}


@pytest.mark.parametrize("case", OFFLINE)
def test_a_method_on_rows_lowers_its_loss_and_names_its_terms(
    case: str, home: Path, tmp_path: Path, capsys: Any
) -> None:
    verb, data, more, terms = OFFLINE[case]
    said = whet(capsys, verb, *offline(home, tmp_path / "out", data, *more))
    assert (said.status, said.error) == (0, "")
    metrics = rows(tmp_path / "out" / "metrics.jsonl")
    assert {name.rpartition("/")[2] for name in metrics[0] if name.count("/") == 2} == terms
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_a_reference_measured_once_gives_the_run_in_which_it_is_measured_at_every_update(
    home: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, int] = {}
    measure = LocalLearner.measure
    for name in ("false", "true"):

        def counted(self: LocalLearner, batch: Batch, columns: frozenset[str], name: str = name) -> Batch:
            asked[name] = asked.get(name, 0) + len(batch.rows) * ("ref_logp" in columns)
            return measure(self, batch, columns)

        monkeypatch.setattr(LocalLearner, "measure", counted)
        given = offline(
            home, tmp_path / name, "pairs", "--train.num-epochs", 2, "--train.num-steps", "null", "--precompute", name
        )
        assert whet(capsys, "dpo", *given).status == 0
    losses = [[row["loss"] for row in rows(tmp_path / name / "metrics.jsonl")] for name in ("false", "true")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    rows_of_file = 2 * len(tiny.WORDS)
    assert asked == {"false": rows_of_file, "true": rows_of_file}  # two epochs; every row once


ONLINE: dict[str, tuple[str, tuple[object, ...], set[str]]] = {
    "rloo": ("rloo", (), {"reinforce"}),
    "remax": ("remax", (), {"reinforce"}),
    "dapo": ("dapo", ("--num-generations", 4, "--rollout.mini-batch-size", 12, "--overlong.buffer", 3), {"clip"}),
    "gspo": ("gspo", ("--num-generations", 4, "--rollout.mini-batch-size", 12), {"clip"}),
    "gdpo": ("gdpo", ("--num-generations", 4), {"clip"}),
    "grpo with top-p": (
        "grpo",
        ("--num-generations", 4, "--sampling.top-p", 0.9, "--kl-in-loss", "exact"),
        {"clip", "exact"},
    ),
    "grpo per step": ("grpo_process", ("--num-generations", 4), {"clip", "k3"}),
    "an exact KL": ("rloo", ("--kl-in-reward.estimator", "exact", "--sampling.min-p", 0.05), {"reinforce", "exact_kl"}),
    "a moving reference": (
        "grpo",
        ("--num-generations", 4, "--rollout.sync-reference.every", 1, "--rollout.sync-reference.mix", 0.6),
        {"clip", "k3"},
    ),
    "attention": (
        "ppo",
        ("--reward-placement", "attention", "--rollout.mini-batch-size", 3, "--normalize-advantage", "null"),
        {"clip", "value_loss"},
    ),
    "online_dpo": ("online_dpo", ("--num-generations", 4), {"sigmoid"}),
    "online_dpo, top-k, several updates": (
        "online_dpo",
        ("--num-generations", 4, "--sampling.top-k", 9, "--rollout.ppo-epochs", 2, "--loss", "[ipo, sft]"),
        {"ipo", "sft"},
    ),
}


@pytest.mark.parametrize("case", ONLINE)
def test_an_online_method_runs_and_names_its_terms(case: str, home: Path, tmp_path: Path, capsys: Any) -> None:
    import pyarrow.parquet

    verb, more, terms = ONLINE[case]
    out = tmp_path / "out"
    said = whet(capsys, verb, *online(home, out, *more))
    assert (said.status, said.error) == (0, "")
    metrics = rows(out / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert {name.rpartition("/")[2] for row in metrics for name in row if name.startswith("loss/")} == terms
    assert (out / "model" / "model.safetensors").is_file()
    rollout = pyarrow.parquet.read_table(out / "rollouts" / "step-00000001.parquet").to_pylist()
    answers = len(rollout) // 6
    assert [row["group"] for row in rollout] == [number for number in range(6) for _ in range(answers)]
    truncates = any(str(word).startswith("--sampling.") for word in more)
    assert ("support" in rollout[0]) == truncates
    if truncates:  # every token that was sampled is one of those that could be
        assert all(
            token in own for row in rollout for token, own in zip(row["completion_ids"], row["support"], strict=True)
        )
    if verb == "dapo":
        assert all({"rounds", "groups_replaced", "groups_with_spread"} <= row.keys() for row in metrics)
        assert any(row["rounds"] > 1 for row in metrics)
    if verb == "remax":
        greedy = {row["group"]: row["baseline"] for row in rollout}
        assert len(greedy) == 6
        assert all(value == int(value) for value in greedy.values())  # a count of words, of an answer of its own
    if "per step" in case:
        assert all("segment_end" in row for row in rollout)


CAUTIONS: list[tuple[str, tuple[object, ...], list[str]]] = [
    ("rloo", ("--sampling.top-p", 0.9), ["kl_in_reward"]),
    ("rloo", ("--sampling.top-k", 9), ["kl_in_reward"]),
    ("rloo", ("--sampling.min-p", 0.1), ["kl_in_reward"]),
    ("rloo", (), []),
    ("rloo", ("--sampling.top-p", 0.9, "--kl-in-reward.estimator", "exact"), []),
    ("rloo", ("--sampling.top-p", 0.9, "--kl-in-reward", "null"), []),
    ("grpo", ("--sampling.top-p", 0.9, "--num-generations", 2), ["kl_in_loss"]),
    ("grpo", ("--sampling.top-p", 0.9, "--num-generations", 2, "--kl-in-loss", "exact"), []),
    ("grpo", ("--sampling.top-p", 0.9, "--num-generations", 2, "--kl-in-loss", "null"), []),
    (
        "grpo",
        ("--sampling.top-p", 0.9, "--num-generations", 2, "--kl-in-reward.coef", 0.1),
        ["kl_in_reward", "kl_in_loss"],
    ),
]


@pytest.mark.parametrize(("verb", "more", "cautioned"), CAUTIONS)
def test_a_kl_estimated_on_answers_that_could_not_have_every_token_is_cautioned_of(
    verb: str, more: tuple, cautioned: list[str], home: Path, tmp_path: Path, capsys: Any
) -> None:
    said = whet(capsys, verb, *online(home, tmp_path / "out", "--rollout.num-steps", 1, *more))
    assert said.status == 0
    lines = said.error.splitlines()
    assert [line.partition(": under top_p, top_k, min_p or min_new_tokens a KL")[0] for line in lines] == [
        f"whet: algorithm.{slot}" for slot in cautioned
    ]


def test_the_best_of_n_answers_are_demonstrations_for_sft(home: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["--model", f"{home}/m", "--data", f"{home}/prompts.jsonl", "--max-new-tokens", 6, "--num-generations", 5]
    given += [
        "--reward",
        f"{home}/judge.py:yes",
        "--reward",
        "{source: '" + f"{home}/judge.py:short', weight: 0.1" + "}",
    ]
    assert whet(capsys, "sample", *given, "--out", tmp_path / "all.jsonl").status == 0
    assert whet(capsys, "sample", *given, "--out", tmp_path / "best.jsonl", "--keep", "best").status == 0
    every, best = rows(tmp_path / "all.jsonl"), rows(tmp_path / "best.jsonl")
    for whole, one in zip(every, best, strict=True):
        assert one.keys() == {"prompt", "level", "completion", "score", "finish", "prompt_ids", "completion_ids"}
        scores = [text.split().count("yes") - 0.1 * len(text.split()) for text in whole["responses"]]
        assert whole["scores"] == pytest.approx(scores)
        ended = [number for number in range(5) if whole["finish"][number] != "length"] or range(5)
        top = max(ended, key=lambda number: whole["scores"][number])
        assert (one["completion"], one["score"]) == (whole["responses"][top], whole["scores"][top])
        assert (one["completion_ids"], one["finish"]) == (whole["response_ids"][top], whole["finish"][top])
    assert len({one["completion"] for one in best}) > 3
    words = ["--model", f"{home}/m", "--data", tmp_path / "best.jsonl", "--out", tmp_path / "out", "--quiet"]
    assert whet(capsys, "sft", *words, "--train.num-steps", 3, "--train.batch-size", 64, "--lr", "1e-2").status == 0
    metrics = rows(tmp_path / "out" / "metrics.jsonl")
    assert metrics[-1]["loss"] < metrics[0]["loss"]


RESUMED: dict[str, tuple[str, tuple[object, ...], str]] = {
    "online_dpo with bco_pair": ("online_dpo", ("--num-generations", 4, "--loss", "bco_pair"), "state/term0.delta"),
    "dapo with refill": (
        "dapo",
        ("--num-generations", 4, "--rollout.mini-batch-size", 12, "--overlong", "null", "--sampling.top-p", 0.9),
        "rounds",
    ),
    "a running deviation": (
        "reinforce",
        ("--reward-normalization", "running", "--kl-in-reward.controller", "adaptive", "--kl-in-reward.target", 1),
        "state/running.square",
    ),
    "a moving reference": (
        "grpo",
        ("--num-generations", 2, "--rollout.sync-reference.every", 1, "--rollout.sync-reference.mix", 0.6),
        "kl",
    ),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_goes_on_to_the_same_bits(case: str, home: Path, tmp_path: Path, capsys: Any) -> None:
    """The last checkpoint of a whole run is lost; the one before it is gone on from, with everything that changes."""
    verb, more, name = RESUMED[case]
    for out in ("whole", "again"):
        given = online(home, tmp_path / out, "--rollout.num-steps", 4, "--train.save-every", 2, *more)
        assert whet(capsys, verb, *given).status == 0
    assert [path.name for path in sorted((tmp_path / "again" / "checkpoints").iterdir())] == [
        "step-00000002",
        "step-00000004",
    ]
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000004")
    shutil.rmtree(tmp_path / "again" / "model")
    assert whet(capsys, verb, *given, "--resume").status == 0
    weights = [(tmp_path / out / "model" / "model.safetensors").read_bytes() for out in ("whole", "again")]
    assert weights[0] == weights[1]
    whole, again = (
        [
            {key: value for key, value in row.items() if "second" not in key}
            for row in rows(tmp_path / out / "metrics.jsonl")
        ]
        for out in ("whole", "again")
    )
    assert whole == again
    assert len({row[name] for row in whole}) > 1  # what is to be carried over has changed on the way
