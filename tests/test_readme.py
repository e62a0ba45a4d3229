"""The commands and the code of README.md and docs/usage.md, run as they stand there on tiny files, leave folders that transformers
loads."""

import json
import random
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import tiny

from whet.cli.main import main

ROOT = Path(__file__).parent.parent
README, USAGE = (ROOT / "README.md").read_text(), (ROOT / "docs/usage.md").read_text()
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
    tiny.write_jsonl(folder / "held_out.jsonl", [{"prompt": words(3)} for _ in range(6)])
    tiny.write_jsonl(folder / "raw.jsonl", [{"text": words(12)} for _ in range(32)])
    (folder / "judge.py").write_text(
        "def score(prompts, completions, **columns):\n    return [c.count('yes') for c in completions]\n"
    )
    function = re.search(r"```python\n(  def exact.*?)```", USAGE, re.DOTALL)
    assert function
    polite = (
        "\n\ndef polite(prompts, completions, **columns):\n    return [float('please' in c) for c in completions]\n"
    )
    (folder / "rules.py").write_text(textwrap.dedent(function.group(1)) + polite)
    recipe = re.search(r"```yaml\n(.*?)```", USAGE, re.DOTALL)
    assert recipe
    (folder / "instruct.yaml").write_text(recipe.group(1))
    return folder


def commands(text: str) -> list[list[str]]:
    block = re.search(r"```\n(whet sft .*?)```", text, re.DOTALL)
    assert block
    return [shlex.split(line, comments=True)[1:] for line in block.group(1).splitlines()]


def test_the_readmes_commands_run_and_their_folders_load(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    monkeypatch.chdir(place)
    assert [words[0] for words in commands(README)] == [
        "sft",
        "sample",
        "rank",
        "reward",
        "ppo",
        "grpo",
        "dpo",
        "eval",
        "report",
    ]
    for words in commands(README):
        quiet = [] if words[0] in ("sample", "rank", "eval", "report") else ["--quiet"]
        assert main([*words, *SHORT.get(words[0], []), *quiet]) == 0
    assert Path("report.html").is_file()
    assert commands(USAGE)[:5] == [*commands(README)[:4], [*commands(README)[4][:-4], *commands(README)[4][-2:]]]
    for name in ("sft", "ppo", "grpo", "dpo"):
        AutoModelForCausalLM.from_pretrained(place / "runs" / name / "model")
    scorer = AutoModelForSequenceClassification.from_pretrained(place / "runs" / "reward" / "model")
    assert scorer.config.num_labels == 1
    first = json.loads((place / "ranked.jsonl").read_text().splitlines()[0])
    assert first.keys() == {"prompt", "answer", "responses", "finish", "prompt_ids", "response_ids", "ranks"}

    assert main(["instructgpt", "instruct.yaml", *SHORT["instructgpt"], "--quiet"]) == 0
    rewards = [
        key
        for key in json.loads((place / "runs/mine/metrics.jsonl").read_text().splitlines()[1])
        if key.startswith("reward/")
    ]
    assert rewards == ["reward/reward", "reward/polite"]
    assert main(["train", "instruct.yaml", *SHORT["instructgpt"], "--quiet", "--resume"]) == 0


def test_the_five_lines_of_the_readme_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (code,) = [one for one in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "whet.report(run)" in one]
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in code
    short = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "DIR").replace("num_steps=10", "num_steps=2")
    exec(short, {"__name__": "first"})
    for made in ("model/config.json", "report.html", "eval"):
        assert (place / "runs/first" / made).exists()


def test_the_readme_is_short_and_its_numbers_are_those_of_the_page_of_the_demo() -> None:
    assert README.count("\n") < 150
    page = (ROOT / "docs/demo.md").read_text()
    rows = {line.split(" | ")[0]: line for line in page.splitlines() if line.startswith("| ")}
    told = re.findall(
        r"^(\| .*?) \| ([^|]*) \|$",
        README[README.index("What `make demo` shows") : README.index("Beside the peers")],
        re.MULTILINE,
    )
    assert len(told) > 4
    for name, value in told[1:]:  # without the headings
        assert rows[name].endswith(f"| {value} |"), name
