"""Small runs of every training method with its main options: the words of their command lines, and the files that they read."""

from pathlib import Path

from proof.recorder import make_inputs
from whet.data.files import write_jsonl
from whet.methods.catalogue import PREFERENCE, TRAINED

UPDATES, STEPS = 6, 5
"""Steps of the runs on rows, and of the runs on generated answers."""
COMMON = ["--model", "model", "--seed", "3", "--threads", "1", "--quiet", "--train.save-every", "2"]
LORA = ["--model.lora.rank", "4"]


def on_rows(method: str, data: str, *more: str) -> list[str]:
    """The words of a short run on the rows of a file."""
    size = ["--train.num-steps", str(UPDATES), "--train.batch-size", "6", "--lr", "1e-3"]
    return [method, *COMMON, "--data", f"{data}.jsonl", *size, *more]


def on_answers(method: str, *more: str, reward: str = "rules.py:count", steps: int | None = STEPS) -> list[str]:
    """The words of a short run on generated answers."""
    size = ["--rollout.prompts-per-step", "6", "--rollout.mini-batch-size", "null", "--max-new-tokens", "6", "--lr", "3e-3"]  # fmt: skip
    length = [] if steps is None else ["--rollout.num-steps", str(steps)]
    return [method, *COMMON, "--data", "prompts.jsonl", "--reward", reward, *size, *length, *more]


EVALUATED = ["--eval.every", "2"]
GROUPS = ["--num-generations", "3"]
HALVES = ["--rollout.mini-batch-size", "9"]
CONFIGURATIONS: dict[str, list[str]] = {
    "pretrain, muon": on_rows("pretrain", "text", "--optim.kind", "muon"),
    "sft, packed, dropout": on_rows("sft", "sft", "--train.packing", "--train.dropout", "0.1"),
    "sft, LoRA with dropout": on_rows("sft", "sft", *LORA, "--train.dropout", "0.1"),
    "sft, two epochs, a smaller last batch": on_rows(
        "sft", "sft", "--train.num-steps", "null", "--train.num-epochs", "2", "--train.batch-size", "15"
    ),
    "reward, K-way, standardized": on_rows("reward", "ranked", "--head.standardize"),
    "reward, process (BCE)": on_rows("reward", "steps", "--algorithm.name", "process", "--data.separator", "w39"),
    "dpo": on_rows("dpo", "ranked"),
    "dpo, BCO, reference follows": on_rows(
        "dpo", "ranked", "--loss", "bco_pair", "--sync-reference.every", "2", "--sync-reference.mix", "0.5"
    ),
    "ipo, reference computed once": on_rows("ipo", "ranked", "--precompute"),
    "kto": on_rows("kto", "kto"),
    "orpo": on_rows("orpo", "ranked"),
    "online_dpo": on_answers("online_dpo"),
    "ppo, separate, reward model": on_answers(
        "ppo", "--rollout.mini-batch-size", "3", "--rollout.ppo-epochs", "2", reward="rm/model"
    ),
    "instructgpt, shared trunk, adaptive KL": on_answers(
        "instructgpt", "--trunk", "shared", *LORA, "--ptx", "text.jsonl", "--ptx.batch-size", "4",
        "--kl-in-reward", "{coef: 0.1, controller: adaptive, target: 0.5, horizon: 20}",
    ),
    "ppo, running rewards, critic warm-up": on_answers(
        "ppo", "--reward-normalization", "running", "--critic.warmup-steps", "2"
    ),
    "grpo, EMA, reference follows": on_answers(
        "grpo", *GROUPS, *HALVES, "--rollout.ema", "0.9", "--rollout.sync-reference.every", "2"
    ),
    "grpo, dynamic sampling": on_answers("grpo", *GROUPS, "--dynamic-sampling", "2"),
    "grpo, LoRA": on_answers("grpo", *GROUPS, *LORA, "--model.export", "adapter"),
    "grpo, two epochs, a smaller last step": on_answers(
        "grpo", *GROUPS, "--rollout.num-epochs", "2", "--rollout.prompts-per-step", "12", steps=None
    ),
    "rloo, top-p": on_answers("rloo", *GROUPS, "--sampling.top-p", "0.9"),
    "remax": on_answers("remax"),
    "reinforce_pp, entropy target": on_answers("reinforce_pp", "--entropy", "{target: 2.0}"),
    "dapo": on_answers("dapo", *GROUPS, *HALVES, "--overlong.buffer", "3"),
    "gspo": on_answers("gspo", *GROUPS, *HALVES),
    "clip_cov": on_answers("clip_cov", *GROUPS, *HALVES),
    "kl_cov": on_answers("kl_cov", *GROUPS, *HALVES),
    "sft, evaluated, best kept": on_rows("sft", "sft", *EVALUATED, "--eval", "sft.jsonl", "--keep-best", "eval/loss"),
    "reward, evaluated, may end early": on_rows(
        "reward", "ranked", *EVALUATED, "--eval", "ranked.jsonl", "--keep-best", "eval/accuracy", "--early-stop", "1"
    ),
    "ppo, evaluated, LoRA, best kept": on_answers(
        "ppo", *LORA, *EVALUATED, "--eval", "prompts.jsonl", "--eval.num-rows", "5", "--eval.num-generations", "2",
        "--eval.judge", "rules.py:count", "--keep-best", "eval/judge/count_1",
    ),
    "grpo, evaluated, may end early": on_answers(
        "grpo", *GROUPS, "--eval.every", "1", "--eval", "prompts.jsonl", "--eval.num-rows", "5", "--eval.judge", "rm/model",
        "--keep-best", "eval/judge/rm", "--early-stop", "2",
    ),
    "grpo_process": on_answers("grpo_process", *GROUPS, reward="own.py:ids"),
}  # fmt: skip
"""Name -> the words of the command line. Every other training method has its own line with few options: see `every`."""


SHORT: dict[str, list[str]] = {
    "sft, 2 steps": on_rows("sft", "sft", "--train.num-steps", "2", "--train.save-every", "1"),
    "grpo, 2 steps": on_answers("grpo", *GROUPS, "--rollout.ema", "0.9", "--train.save-every", "1", steps=2),
}
"""Runs that are killed before each of their file operations."""


def every() -> dict[str, list[str]]:
    """Return the configurations, and one for each training method that has none."""
    named = {words[0] for words in CONFIGURATIONS.values()}
    rest = [method for method in TRAINED if method not in named]
    return CONFIGURATIONS | {
        one: on_rows(one, "ranked") if one in PREFERENCE else on_answers(one, *GROUPS, reward="own.py:thirds")
        for one in rest
    }


def write_inputs(home: Path) -> None:
    """Write a tiny model, rows of every kind, and reward functions."""
    make_inputs(home)
    text = [f"w{number} w{number + 1}" for number in range(24)]
    steps = [
        {"prompt": one, "completions": [f"{one} ", " w3 ", " w4"], "labels": [1, n % 2, 0]}
        for n, one in enumerate(text)
    ]
    write_jsonl(home / "steps.jsonl", steps)
    (home / "own.py").write_text(
        "def ids(prompts, completions, completion_ids, **columns):\n"
        "    return [[float(one % 3) for one in own] for own in completion_ids]\n\n\n"
        "def thirds(prompts, completions, completion_ids, **columns):\n"
        "    return [float(sum(one % 3 == 0 for one in own)) for own in completion_ids]\n"
    )
