"""The command line under torchrun: the numbers of one process, restarts after a kill, and another number of workers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import tiny
from safetensors.torch import load_file

from engines.comparing import gap
from whet.cli.main import main
from whet.distributed import free_port

STEPS = 6
REWARD = '''
"""A reward that takes its time, so that a run can be killed in its midst."""
import time

def score(prompts, completions, **_):
    time.sleep(0.2)
    return [float(len(one.split()) % 5) for one in completions]

def words(prompts, completions, **_):
    return [float(len(one.split())) for one in completions]
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    tiny.folder(folder / "model")
    prompts = ["a yes", "b no", "c d e", "good bad", "one two three", "hello"]
    tiny.write_jsonl(folder / "prompts.jsonl", [{"prompt": one} for one in prompts])
    rows = [{"prompt": one, "completion": " ".join(["maybe"] * (1 + n)) + " yes"} for n, one in enumerate(prompts)]
    tiny.write_jsonl(folder / "rows.jsonl", rows)
    (folder / "reward.py").write_text(REWARD)
    return folder


def ppo(place: Path, out: str) -> list[str]:
    options = {
        "model": place / "model", "data": place / "prompts.jsonl", "reward": f"{place / 'reward.py'}:score",
        "rollout.num_steps": STEPS, "rollout.prompts_per_step": 4, "rollout.mini_batch_size": 2, "rollout.max-num-seqs": 2,
        "max-new-tokens": 6, "optim.lr": 0.001, "critic.optim.lr": 0.001, "train.save-every": 1, "train.keep": 10,
        "eval": place / "prompts.jsonl", "eval.every": 2, "eval.num-rows": 3, "eval.num-generations": 2,
        "eval.judge": f"{place / 'reward.py'}:words", "keep-best": "eval/judge/words", "out": place / out,
    }  # fmt: skip
    return ["ppo", *(str(part) for name, value in options.items() for part in (f"--{name}", value)), "--quiet"]


def sft(place: Path, out: str) -> list[str]:
    options = {"model": place / "model", "data": place / "rows.jsonl", "train.batch_size": 3, "train.num_epochs": 2,
             "train.max-tokens-per-micro-batch": 24, "optim.lr": 0.001, "out": place / out}  # fmt: skip
    return ["sft", *(str(part) for name, value in options.items() for part in (f"--{name}", value)), "--quiet"]


def started(
    given: list[str], workers: int = 2, restarts: int = 0, agent: tuple[str, ...] | None = None
) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(workers), "--max-restarts"]
    command += [str(restarts), *(agent or ("--master-addr", "127.0.0.1", "--master-port", str(free_port())))]
    return subprocess.Popen(
        [*command, "-m", "whet", *given], env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def agents(given: list[str], restarts: int) -> list[subprocess.Popen]:
    """Two of torchrun's agents with one worker each, as on two machines."""
    port = free_port()
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1")
    return [started(given, 1, restarts, ("--nnodes", "2", "--rdzv-id", "whet", *meeting)) for _ in range(2)]


def ended(run: subprocess.Popen, seconds: float = 150) -> str:
    """What it said; all of its processes are gone afterwards."""
    try:
        return run.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        pytest.fail(f"still running after {seconds} s")
    finally:
        try:
            os.killpg(run.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def worker(run: subprocess.Popen, rank: int) -> int:
    """The process of this rank; 0 where another agent has it."""
    for one in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((one / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == run.pid and f"\0RANK={rank}\0" in (one / "environ").read_text():
                return int(one.name)
        except OSError:
            continue
    return 0


def metrics(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [{name: value for name, value in json.loads(line).items() if "second" not in name} for line in lines]


def tokens(folder: Path) -> list[list[list[int]]]:
    files = sorted((folder / "rollouts").glob("*.parquet"))
    return [pyarrow.parquet.read_table(file)["completion_ids"].to_pylist() for file in files]


def until(condition: Callable[[], bool], run: subprocess.Popen, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, run.communicate()[0][-3000:]
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def two(place: Path) -> Path:
    """A run of two workers that nobody disturbed."""
    said = ended(started(ppo(place, "two")))
    assert len(metrics(place / "two")) == STEPS + 1, said[-3000:]
    return place / "two"


def weights(folder: Path) -> Any:
    return load_file(folder / "model" / "model.safetensors")


def test_a_run_of_two_workers_has_the_numbers_and_tokens_of_one_process(place: Path, two: Path) -> None:
    assert main(ppo(place, "one")) in (0, None)
    assert tokens(two) == tokens(place / "one")
    assert (two / "best/model.safetensors").is_file()
    assert gap(metrics(two), metrics(place / "one"))[0] <= 1e-5
    for name, value in weights(two).items():
        assert float((value - weights(place / "one")[name]).abs().max()) < 1e-5


LAME = """
import os
from whet.rewards import Scores
import torch

class Judge:
    calls = 0

    def score(self, groups):
        self.calls += 1
        if self.calls == 2 and os.environ.get("RANK") == "1":
            raise RuntimeError("on one worker alone")
        return Scores(torch.ones(sum(len(group.samples) for group in groups)))
"""


@pytest.mark.long
def test_a_judge_that_fails_on_one_worker_ends_all_of_them_and_loses_no_step(place: Path) -> None:
    (place / "lame.py").write_text(LAME)
    given = [one.replace("reward.py:words", "lame.py:Judge") for one in ppo(place, "lame")]
    said = ended(started([one.replace("eval/judge/words", "eval/judge/Judge") for one in given]))
    assert said.count("on one worker alone") == 2, said[-3000:]
    assert [row["step"] for row in metrics(place / "lame")] == [0, 1, 2]
    assert (place / "lame/checkpoints/step-00000002").is_dir()


@pytest.mark.long
def test_sft_of_two_workers_has_the_numbers_of_one_process(place: Path) -> None:
    assert main(sft(place, "sft-one")) in (0, None)
    said = ended(started(sft(place, "sft-two")))
    assert metrics(place / "sft-two"), said[-3000:]
    assert gap(metrics(place / "sft-two"), metrics(place / "sft-one"))[0] <= 1e-5


@pytest.mark.parametrize("machines", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_killed_worker_is_restarted_and_the_run_ends_with_the_same_bits(
    place: Path, two: Path, machines: int
) -> None:
    """On two machines only the agent of the killed worker counts a restart."""
    folder = place / f"killed-{machines}"
    given = ppo(place, folder.name)
    runs = [started(given, restarts=3)] if machines == 1 else agents(given, restarts=3)
    until(lambda: len(metrics(folder)) >= 2, runs[0])
    os.kill(next(pid for run in runs if (pid := worker(run, 1))), signal.SIGKILL)
    said = [ended(run) for run in runs]
    assert [run.returncode for run in runs] == [0] * machines, "".join(said)[-3000:]
    assert metrics(folder) == metrics(two)
    assert tokens(folder) == tokens(two)
    assert all(bool((value == weights(two)[name]).all()) for name, value in weights(folder).items())


def test_a_run_of_two_workers_goes_on_alone(place: Path, two: Path) -> None:
    folder = place / "alone"
    shutil.copytree(two, folder)
    for later in sorted((folder / "checkpoints").glob("step-*"))[3:]:
        shutil.rmtree(later)
    (folder / "recipe.yaml").write_text((two / "recipe.yaml").read_text().replace(str(two), str(folder)))
    assert main([*ppo(place, folder.name), "--resume"]) in (0, None)
    assert metrics(folder)[:3] == metrics(two)[:3]
    assert gap(metrics(folder), metrics(two))[0] <= 1e-5
    assert tokens(folder) == tokens(two)
