"""The benchmarks run at a tiny size, without the peer, and refuse to compare programs that did different work."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import utilisation
from benchmarks.growth import exponent
from benchmarks.pairs import ROOT, Line, check
from benchmarks.results import page

ONLINE = Line("rloo", "tiny", fixed=True)
OFFLINE = Line("sft", "tiny")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    ran("benchmarks.world", "tiny", "--out", str(folder / "tiny"))
    return folder


def ran(module: str, *words: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_lean_loop_and_whet_do_the_same_work(world: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    named = ["--lines", "dpo:tiny", "rloo:tiny:fixed"]
    ran("benchmarks.pairs", *named, "--n", "1", "--skip", "trl", "--world", str(world), "--out", str(lines))
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(one["algorithm"], one["program"]) for one in found] == [
        (name, program) for name in ("dpo", "rloo") for program in ("lean", "whet")
    ]
    ran("benchmarks.results", str(lines), "--out", str(tmp_path / "RESULTS.md"))
    assert (tmp_path / "RESULTS.md").read_text() == page(found)
    assert str(tmp_path) not in page(found)


@pytest.mark.long
def test_the_gpu_benchmark_runs_on_a_cpu(world: Path) -> None:
    told = json.loads(
        ran(
            "benchmarks.gpu",
            "--tiny",
            "--skip",
            "trl",
            "--only",
            "dpo",
            "--n",
            "1",
            "--world",
            str(world),
            "--peak",
            "1e12",
        )
    )
    assert told["utilisation"] == round(utilisation(Line("dpo", "tiny"), told["tokens_per_s"], 1e12), 4)


@pytest.mark.long
def test_the_benchmark_of_a_real_model_runs(world: Path) -> None:
    told = json.loads(ran("benchmarks.real", "--n", "1", "--only", "grpo", "--model", str(world / "tiny" / "model")))
    assert told["real"] == "grpo"
    assert told["over_plain"][0] == pytest.approx(
        told["whet_tokens_per_cpu_s"] / told["plain_tokens_per_cpu_s"], rel=1e-2
    )


RESULT: dict[str, Any] = {
    "updates": 2, "step_tokens": [100, 90], "step_prompt_tokens": [40, 30], "step_answer_tokens": [64, 64], "losses": [2.5, 2.4],
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "change"),
    [
        (OFFLINE, {"updates": 3}),
        (OFFLINE, {"step_tokens": [90, 100]}),
        (OFFLINE, {"losses": [2.5 * (1 + 2e-4), 2.4]}),
        (ONLINE, {"step_prompt_tokens": [40, 31]}),
        (ONLINE, {"step_answer_tokens": [64, 63]}),
    ],
)
def test_different_work_is_found(line: Line, change: dict[str, Any]) -> None:
    assert check(line, {"lean": [RESULT], "whet": [RESULT]}) == []
    assert check(line, {"lean": [RESULT], "whet": [RESULT | change]}) != []


def test_free_lengths_and_losses_of_other_methods_are_not_compared() -> None:
    other = RESULT | {"step_answer_tokens": [1, 2], "losses": [0.0, 0.0]}
    assert check(Line("rloo", "tiny"), {"lean": [RESULT], "whet": [other]}) == []


def test_the_exponent_is_that_of_a_power() -> None:
    assert exponent([3, 5, 11], [2 * size**1.5 for size in (3, 5, 11)]) == pytest.approx(1.5, rel=1e-12)
