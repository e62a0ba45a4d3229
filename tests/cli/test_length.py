"""The length of a run: epochs, steps and passes as they are said, and the memory that it needs."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import tiny
import torch

from whet.models.roles import Role

from .helpers import whet


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    tiny.folder(home / "m")
    return home


def test_an_epoch_is_one_pass_and_the_length_is_said_as_it_will_be(home: Path, tmp_path: Path, capsys: Any) -> None:
    """Nine rows, eight in a batch: two updates, every row once, and the second loss is divided by its own counts."""
    nine = [{"prompt": word, "completion": "yes no"} for word in tiny.WORDS[:9]]
    data = tiny.write_jsonl(tmp_path / "nine.jsonl", nine)
    given = ["--model", home / "m", "--data", data, "--batch-size", 8, "--num-epochs", 1, "--lr", "1e-9"]
    said = whet(capsys, "sft", *given, "--out", tmp_path / "run", "--data.shuffle", "false")
    assert "whet: sft: 9 elements, 2 updates of 8 (2 in an epoch, the last of 1): 1 epochs" in said.error
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [one["tokens"] for one in metrics] == [8 * 3, 3]
    alone = tiny.write_jsonl(tmp_path / "one.jsonl", nine[8:])
    whet(capsys, "sft", *given[:2], "--data", alone, "--lr", "1e-9", "--num-steps", 1, "--out", tmp_path / "one")
    last = json.loads((tmp_path / "one/metrics.jsonl").read_text())
    assert metrics[1]["loss"] == pytest.approx(last["loss"], abs=1e-6)
    said = whet(capsys, "sft", *given, "--out", tmp_path / "dropped", "--drop-last", "true")
    assert "1 updates of 8 (1 in an epoch, the last is left out): 1 epochs" in said.error


def test_a_pass_over_the_prompts_is_one_pass_online(home: Path, tmp_path: Path, capsys: Any) -> None:
    data = tiny.write_jsonl(tmp_path / "q.jsonl", [{"prompt": word} for word in tiny.WORDS[:5]])
    (tmp_path / "own.py").write_text(
        "def f(prompts, completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    given = ["--model", home / "m", "--data", data, "--reward", f"{tmp_path}/own.py:f", "--max-new-tokens", 4]
    given += ["--prompts-per-step", 4, "--num-generations", 2, "--num-epochs", 2, "--out", tmp_path / "run"]
    said = whet(capsys, "grpo", *given)
    assert "whet: grpo: 4 steps of 4 prompts with 2 answers each, 4 updates: 2 passes over 5 prompts" in said.error
    counts = []
    for step in range(4):
        rows = pyarrow.parquet.read_table(tmp_path / f"run/rollouts/step-{step + 1:08d}.parquet").to_pylist()
        counts.append(sorted({row["prompt"] for row in rows}))
    assert [len(one) for one in counts] == [4, 1, 4, 1]
    assert sorted(counts[0] + counts[1]) == sorted(counts[2] + counts[3]) == sorted(tiny.WORDS[:5])


def test_memory_that_runs_out_is_told_before_long_work(
    home: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest row is in the last batch, and the run stops before the first update."""
    rows = [{"prompt": "a", "completion": "yes"}] * 40 + [{"prompt": "a", "completion": "yes no " * 20}]
    data = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    plain = Role.hidden

    def small(self: Role, ids: torch.Tensor, **layout: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and ids.shape[1] > 30:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return plain(self, ids, **layout)

    monkeypatch.setattr(Role, "hidden", small)
    given = [
        "--model",
        home / "m",
        "--data",
        data,
        "--batch-size",
        8,
        "--data.shuffle",
        "false",
        "--out",
        tmp_path / "run",
    ]
    said = whet(capsys, "sft", *given)
    assert said.status != 0
    for part in (
        "out of memory",
        "rows of up to 44 tokens",
        "--train.max-tokens-per-micro-batch",
        "gradient-checkpointing",
    ):
        assert part in said.error
    assert not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").read_text()
