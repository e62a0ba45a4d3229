"""Recipes that name an engine or a cluster, from the door to the run folder: the numbers are those of one process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from engines.comparing import TOLERANCE, gap, metrics
from engines.helpers import SHAPE

REWARD = "def score(prompts, completions, **_):\n    return [float(len(one.split()) % 5) for one in completions]\n"
COMMON = [
    "grpo", "--model", "model", "--data", "prompts.jsonl", "--reward", "reward.py:score", "--num-generations", "2",
    "--rollout.num-steps", "3", "--rollout.prompts-per-step", "4", "--rollout.mini-batch-size", "4", "--rollout.max-num-seqs", "4",
    "--max-new-tokens", "8", "--optim.lr", "0.001", "--train.save-every", "1", "--quiet",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    tiny.folder(folder / "model", **SHAPE)
    (folder / "reward.py").write_text(REWARD)
    tiny.write_jsonl(folder / "prompts.jsonl", [{"prompt": f"{one} {other}"} for one in "abcd" for other in "efgh"])
    return folder


def whet(place: Path, out: str, *words: str) -> list[dict[str, Any]]:
    """The metrics of a run in a process of its own, which ends well."""
    command = [sys.executable, "-m", "whet", *COMMON, *words, "--out", out]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (place / out / "model" / "model.safetensors").is_file()
    return [json.loads(line) for line in (place / out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(place: Path) -> list[dict[str, Any]]:
    return whet(place, "alone")


@pytest.mark.long
def test_a_cluster_started_by_the_recipe_gives_the_numbers_of_one_process(place: Path, alone: list) -> None:
    pytest.importorskip("ray")
    words = ("--cluster", "auto", "--cluster.learners", "2", "--cluster.engines", "1", "--cluster.rewards", "1")
    whet(place, "cluster", *words)
    worst, where = gap(metrics(place / "cluster"), metrics(place / "alone"))
    assert worst <= TOLERANCE, f"{where}: {worst:.3g}"


def test_vllm_on_a_cluster_takes_adapters_and_answers_ahead(place: Path) -> None:
    """Every push must pass the canary, and three rollouts take two of them."""
    pytest.importorskip("vllm")
    pytest.importorskip("ray")
    engines = ("--cluster", "auto", "--cluster.engines", "1", "--generator", "vllm", "--generator.kv-cache-mib", "64")
    adapters = ("--model.lora.rank", "4", "--generator.push", "adapter")
    ahead = (
        "--generator.max-staleness",
        "1",
        "--generator.segment-tokens",
        "3",
        "--importance-correction",
        "token_weight",
    )
    found = whet(place, "vllm-cluster", *engines, *adapters, *ahead)
    assert len(found) == 3
    assert max(row["staleness_max"] for row in found) == 1
    assert min(row["grad_norm/policy"] for row in found) > 0


@pytest.mark.long
def test_each_of_torchruns_workers_has_an_engine_with_the_learners_log_probs(place: Path) -> None:
    pytest.importorskip("vllm")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "whet", *COMMON]
    words = ["--generator", "vllm", "--generator.kv-cache-mib", "64", "--out", "vllm-two"]
    done = subprocess.run([*launch, *words], cwd=place, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (place / "vllm-two" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert max(row["sampler_gap"] for row in rows) < 1e-4
    assert min(row["grad_norm/policy"] for row in rows) > 0


OBJECTS = '''
import sys
import whet
from whet.generate.local import LocalGenerator
from whet.data import chat_format
from whet.models.load import ModelSource, load_tokenizer


def make_reward(scale):
    return lambda prompts, completions, **_: [scale * (len(one.split()) % 5) for one in completions]


class Engine:
    """An own generator in a process of its own: it loads the pushed weights into a copy of the model."""

    reports = frozenset({"sampler_logp"})
    version = 0

    def __init__(self, *, unit: int):
        from whet.models.load import load_causal_lm
        from whet.models.roles import Role

        source = ModelSource("model", "float32", "cpu")
        tokenizer = load_tokenizer(source)
        chat = chat_format(tokenizer)
        role = Role("sampler", load_causal_lm(source, tokenizer), False)
        self.own = LocalGenerator(role, chat.end_ids, chat.text, unit=unit, copy=True)

    def generate(self, requests):
        yield from self.own.generate(requests)

    def load_weights(self, weights):
        self.own.load_weights(weights)
        self.version = weights.version

    def logprobs(self, ids):
        return self.own.logprobs(ids)

    def sleep(self): pass
    def close(self): pass


if __name__ == "__main__":
    cluster = {"address": "auto", "engines": 1, "rewards": 1} if sys.argv[1] == "cluster" else {}
    whet.train(
        "grpo", model="model", data="prompts.jsonl", reward=make_reward(1.0), generator={"name": Engine, "unit": 4}, cluster=cluster,
        num_generations=2, num_steps=2, prompts_per_step=4, mini_batch_size=4, max_new_tokens=8, lr=1e-3, out=sys.argv[1],
        eval={"data": [{"prompt": "a e"}, {"prompt": "b f"}], "every": 1, "judge": make_reward(2.0), "keep_best": "eval/kl",
              "greater_is_better": True},
    )
'''


def test_python_objects_go_along_to_the_workers_of_a_cluster(place: Path) -> None:
    pytest.importorskip("ray")
    (place / "objects.py").write_text(OBJECTS)
    for out in ("one", "cluster"):
        done = subprocess.run(
            [sys.executable, "objects.py", out], cwd=place, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
    worst, where = gap(metrics(place / "cluster"), metrics(place / "one"))
    assert worst <= TOLERANCE, f"{where}: {worst:.3g}"
    assert (place / "cluster/best/model.safetensors").is_file()
