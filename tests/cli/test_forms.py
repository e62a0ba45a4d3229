"""Forms of a run that differ in memory or precision alone: one trunk, recomputed activations, half precision."""

import json
from pathlib import Path

import pytest
import tiny
from transformers import AutoModelForCausalLM

from whet.cli.main import main

SHORT = [
    "--rollout.num-steps",
    "3",
    "--rollout.prompts-per-step",
    "8",
    "--max-new-tokens",
    "8",
    "--lr",
    "1e-2",
    "--quiet",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny.folder(folder / "m")
    tiny.write_jsonl(folder / "prompts.jsonl", [{"prompt": word} for word in tiny.WORDS])
    rankings = [{"prompt": w, "responses": ["yes yes", "no a b", "c"], "ranks": [1, 2, 3]} for w in tiny.WORDS]
    tiny.write_jsonl(folder / "ranked.jsonl", rankings)
    (folder / "judge.py").write_text(
        "def yes(prompts, completions, **columns):\n    return [c.count('yes') for c in completions]\n"
    )
    adapter = [
        "--model.lora.rank",
        "4",
        "--model.export",
        "adapter",
        "--train.batch-size",
        "4",
        "--lr",
        "1e-2",
        "--quiet",
    ]
    given = ["--model", f"{folder}/m", "--data", f"{folder}/ranked.jsonl"]
    assert main(["reward", *given, *adapter, "--out", f"{folder}/reward"]) == 0
    return folder


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_trunk_begins_where_separate_copies_begin(home: Path, tmp_path: Path) -> None:
    """The same policy, reference, reward adapter and critic: the first rollout and its losses are the same."""
    given = ["ppo", "--model", f"{home}/m", "--data", f"{home}/prompts.jsonl", "--reward", f"{home}/reward/model"]
    given += ["--model.lora.rank", "4", "--rollout.mini-batch-size", "8", *SHORT]
    for trunk in ("shared", "separate"):
        assert main([*given, "--trunk", trunk, "--out", f"{tmp_path}/{trunk}"]) == 0
        AutoModelForCausalLM.from_pretrained(tmp_path / trunk / "model")
    one, two = metrics(tmp_path / "shared")[0], metrics(tmp_path / "separate")[0]
    assert one["kl"] == two["kl"] == 0.0
    names = ["score", "length", "loss/policy/rollout/clip", "loss/critic/rollout/value_loss"]
    assert [one[name] for name in names] == pytest.approx([two[name] for name in names], abs=1e-5)


def test_recomputed_activations_change_no_number(home: Path, tmp_path: Path) -> None:
    given = [
        "grpo",
        "--model",
        f"{home}/m",
        "--data",
        f"{home}/prompts.jsonl",
        "--reward",
        f"{home}/judge.py:yes",
        *SHORT,
    ]
    for form in ("false", "true"):
        assert (
            main(
                [
                    *given,
                    "--num-generations",
                    "4",
                    "--model.gradient-checkpointing",
                    form,
                    "--out",
                    f"{tmp_path}/{form}",
                ]
            )
            == 0
        )
    for one, two in zip(metrics(tmp_path / "false"), metrics(tmp_path / "true"), strict=True):
        assert one["score"] == pytest.approx(two["score"], abs=1e-6)
        assert one["grad_norm/policy"] == pytest.approx(two["grad_norm/policy"], rel=1e-3)


def test_a_run_in_half_precision_passes_its_own_checks(home: Path, tmp_path: Path) -> None:
    given = [
        "grpo",
        "--model",
        f"{home}/m",
        "--data",
        f"{home}/prompts.jsonl",
        "--reward",
        f"{home}/judge.py:yes",
        *SHORT,
    ]
    assert main([*given, "--model.dtype", "bfloat16", "--num-generations", "4", "--out", f"{tmp_path}/half"]) == 0
    assert all(row["sampler_gap"] < 0.1 for row in metrics(tmp_path / "half"))
    assert all(row["ratio_mean"] == 1.0 for row in metrics(tmp_path / "half"))


def test_a_method_that_is_steered_by_its_own_moves_sees_a_single_update(home: Path, tmp_path: Path) -> None:
    """PPO-KL with one update a rollout: beta follows the KL after it, so a large step doubles it."""
    given = [
        "ppo_kl",
        "--model",
        f"{home}/m",
        "--data",
        f"{home}/prompts.jsonl",
        "--reward",
        f"{home}/judge.py:yes",
        *SHORT,
    ]
    given += ["--rollout.mini-batch-size", "8", "--surrogate.target", "1e-6", "--surrogate.beta", "0.5"]
    assert main([*given, "--out", f"{tmp_path}/steered"]) == 0
    assert [row["state/term0.beta"] for row in metrics(tmp_path / "steered")] == [0.5, 1.0, 2.0]
