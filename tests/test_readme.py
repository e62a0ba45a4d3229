"""The README's commands, run as they stand there on tiny files, leave folders that transformers loads."""

import json
import random
import re
import shlex
from pathlib import Path

import pytest
import tiny

from whet.cli.main import main

README = (Path(__file__).parent.parent / "README.md").read_text()
SHORT = {
    "sft": ["--train.num-epochs", "1"], "sample": ["--max-new-tokens", "12"], "reward": ["--train.batch-size", "8"],
    "ppo": ["--rollout.num-steps", "2", "--rollout.prompts-per-step", "16", "--rollout.mini-batch-size", "8", "--max-new-tokens", "12"],
    "instructgpt": ["--rollout.num-steps", "2", "--rollout.prompts-per-step", "16", "--rollout.mini-batch-size", "8",
                    "--max-new-tokens", "12"],
    "grpo": ["--rollout.num-steps", "2", "--rollout.prompts-per-step", "4", "--max-new-tokens", "12"], "eval": ["--max-new-tokens", "12"],
}  # fmt: skip
"""What is added so that a command is quick; nothing else is changed."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a model DIR and the files that the README names."""
    folder = tmp_path_factory.mktemp("user")
    tiny.folder(folder / "DIR")
    stream = random.Random(0)

    def words(count: int) -> str:
        return " ".join(stream.choices(tiny.WORDS, k=count))

    tiny.write_jsonl(folder / "demonstrations.jsonl", [{"prompt": words(3), "completion": words(4)} for _ in range(32)])
    tiny.write_jsonl(
        folder / "prompts.jsonl", [{"prompt": f"{words(3)} {k % 3} {w}", "answer": w} for k, w in enumerate(tiny.WORDS)]
    )
    tiny.write_jsonl(folder / "raw.jsonl", [{"text": words(12)} for _ in range(32)])
    (folder / "judge.py").write_text(
        "def score(prompts, completions, **columns):\n    return [c.count('yes') for c in completions]\n"
    )
    function = re.search(r"```python\n(def exact.*?)```", README, re.DOTALL)
    assert function
    polite = (
        "\n\ndef polite(prompts, completions, **columns):\n    return [float('please' in c) for c in completions]\n"
    )
    (folder / "rules.py").write_text(function.group(1) + polite)
    recipe = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert recipe
    (folder / "instruct.yaml").write_text(recipe.group(1))
    return folder


def commands() -> list[list[str]]:
    block = re.search(r"```\n(whet sft .*?)```", README, re.DOTALL)
    assert block
    return [shlex.split(line)[1:] for line in block.group(1).splitlines()]


def test_the_readmes_commands_run_and_their_folders_load(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    monkeypatch.chdir(place)
    assert [words[0] for words in commands()] == ["sft", "sample", "rank", "reward", "ppo", "grpo", "dpo", "eval"]
    for words in commands():
        assert (
            main([*words, *SHORT.get(words[0], []), *([] if words[0] in ("sample", "rank", "eval") else ["--quiet"])])
            == 0
        )
    for name in ("sft", "ppo", "grpo", "dpo"):
        AutoModelForCausalLM.from_pretrained(place / "runs" / name / "model")
    scorer = AutoModelForSequenceClassification.from_pretrained(place / "runs" / "reward" / "model")
    assert scorer.config.num_labels == 1
    first = json.loads((place / "ranked.jsonl").read_text().splitlines()[0])
    assert first.keys() == {"prompt", "answer", "responses", "finish", "prompt_ids", "response_ids", "ranks"}

    assert main(["instructgpt", "instruct.yaml", *SHORT["instructgpt"], "--quiet"]) == 0
    rewards = [
        key
        for key in json.loads((place / "runs/mine/metrics.jsonl").read_text().splitlines()[0])
        if key.startswith("reward/")
    ]
    assert rewards == ["reward/reward", "reward/polite"]
    assert main(["train", "instruct.yaml", *SHORT["instructgpt"], "--quiet", "--resume"]) == 0
