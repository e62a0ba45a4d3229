"""`make gpu`: the engines on this machine's GPUs: same numbers over NCCL, bf16, vLLM with pushes, and a short learning run.

Models are made on the spot with random weights, so nothing is downloaded. Each check prints one line; the lines are the rows of
the table in docs/engines.md. `python -m proof.gpu --device cpu` runs the same checks without a GPU.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512}  # fmt: skip

FLOAT, HALF, TOKEN, COARSE = 1e-5, 5e-2, 1e-4, 1e-3
"""Bounds: numbers in float32, anything in bfloat16, a token's log-prob in float32 by other kernels, the same on a GPU."""
SFT = ("sft", "--model", "model", "--data", "rows.jsonl", "--train.num-steps", "10", "--optim.lr", "0.001")
EXACT = ("--learner.precision", "float32")


@dataclass
class Bench:
    """Where the checks run: device, number of workers, and a folder with a model, prompts, rows and a reward."""

    device: str
    workers: int
    folder: Path

    def whet(self, out: str, *words: str, workers: int = 1) -> list[dict[str, Any]]:
        """Runs a verb, under torchrun where there are several workers; its metrics."""
        launch = [sys.executable, "-m", "whet"]
        if workers > 1:
            launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(workers), "-m", "whet"]
        command = [*launch, *words, "--model.device", self.device, "--out", str(self.folder / out), "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return self.metrics(out)

    def metrics(self, out: str) -> list[dict[str, Any]]:
        """What a run has written."""
        return [json.loads(line) for line in (self.folder / out / "metrics.jsonl").read_text().splitlines()]

    def ppo(self, out: str, *words: str, workers: int = 1, steps: int = 10) -> list[dict[str, Any]]:
        """A small PPO run."""
        common = [
            "ppo", "--model", "model", "--data", "prompts.jsonl", "--reward", "reward.py:score", "--max-new-tokens", "12",
            "--rollout.num-steps", str(steps), "--rollout.prompts-per-step", "32", "--rollout.mini-batch-size", "16",
            "--rollout.max-num-seqs", "8", "--train.max-tokens-per-micro-batch", "256", "--optim.lr", "0.0005",
            "--critic.optim.lr", "0.001",
        ]  # fmt: skip
        return self.whet(out, *common, *words, workers=workers)


def made(folder: Path) -> None:
    """The model, the rows and the reward of all checks."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    tiny.folder(folder / "model", **SHAPE)
    words = [word for word in tiny.WORDS if len(word) > 1]
    rows = [{"prompt": f"{one} {other}"} for one in words for other in words]
    tiny.write_jsonl(folder / "prompts.jsonl", rows)
    tiny.write_jsonl(folder / "rows.jsonl", [row | {"completion": "yes please"} for row in rows])
    (folder / "reward.py").write_text(
        "def score(prompts, completions, **_):\n    return [float('yes' in one.split()) for one in completions]\n"
    )


def alone(bench: Bench) -> list[dict[str, Any]]:
    """SFT on one process in float32, run when it is first asked for."""
    done = (bench.folder / "sft-alone").exists()
    return bench.metrics("sft-alone") if done else bench.whet("sft-alone", *SFT, *EXACT)


def worst(one: list[dict[str, Any]], other: list[dict[str, Any]], names: tuple[str, ...]) -> float:
    """The largest relative difference of these numbers over all steps."""
    return max(
        abs(a[name] - b[name]) / max(abs(a[name]), 0.05) for a, b in zip(one, other, strict=True) for name in names
    )


def within(found: float, bound: float) -> str:
    """The number. Raises RuntimeError where it is over the bound."""
    if not found <= bound:
        raise RuntimeError(f"{found:.1e} is more than {bound:.0e}")
    return f"{found:.1e}"


def same_numbers(bench: Bench, engine: str) -> str:
    """SFT on one process and on all workers."""
    many = bench.whet(f"sft-{engine}", *SFT, *EXACT, "--learner", engine, workers=bench.workers)
    return f"loss and gradient norm differ by {within(worst(alone(bench), many, ('loss', 'grad_norm/policy')), FLOAT)} at most"


def half(bench: Bench, engine: str) -> str:
    """The same in bfloat16 over float32 weights, which is the default on a GPU."""
    named = () if bench.device == "cuda" else ("--learner.precision", "bf16")
    workers = 1 if engine == "local" else bench.workers
    many = bench.whet(f"half-{engine}", *SFT, *named, "--learner", engine, workers=workers)
    found = worst(alone(bench), many, ("loss",))
    if not found > 0:
        raise RuntimeError("the loss is that of float32")
    return f"loss differs from float32's by {within(found, HALF)} at most"


def kernels(bench: Bench, name: str) -> str:
    """The same with attention kernels by name, in bfloat16."""
    words = ("--learner.precision", "bf16", "--model.attn-implementation", name)
    found = worst(alone(bench), bench.whet(f"attention-{name}", *SFT, *words), ("loss",))
    return f"loss differs from float32's by {within(found, HALF)} at most"


def tf32(bench: Bench) -> str:
    """The same in TensorFloat-32."""
    found = worst(alone(bench), bench.whet("tf32", *SFT, *EXACT, "--learner.tf32", "true"), ("loss",))
    return f"loss differs from float32's by {within(found, HALF)} at most"


def engine(bench: Bench, *words: str) -> str:
    """vLLM answers, weights are pushed after each rollout, and the canary is checked each time."""
    name = "-".join(("vllm", *(word for word in words if not word.startswith("--"))))
    found = bench.ppo(name, "--generator", "vllm", *words, "--importance-correction", "token_weight", steps=4)
    gap = max(row["sampler_gap"] for row in found)
    low = "bfloat16" in words or "bf16" in words
    bound = HALF if low else TOKEN if bench.device == "cpu" else COARSE
    return f"4 pushes arrived; mean log-prob gap to the learner {within(gap, bound)} nats"


def flash() -> tuple[str, ...]:
    """The flash attention kernels that are installed here."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    found = (("flash_attention_2", is_flash_attn_2_available()), ("flash_attention_3", is_flash_attn_3_available()))
    return tuple(name for name, there in found if there)


def learns(bench: Bench) -> str:
    """The reward of a PPO run, first and last five rollouts."""
    found = [row["score"] for row in bench.ppo("learns", steps=40)]
    first, last = sum(found[:5]) / 5, sum(found[-5:]) / 5
    if last <= first + 0.1:
        raise RuntimeError(f"the reward went from {first:.2f} to {last:.2f}")
    return f"reward {first:.2f} -> {last:.2f} in 40 rollouts"


def suites(bench: Bench) -> str:
    """The contract suites of generators, learners and the cluster."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "engines")],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
    )
    told = done.stdout.strip().splitlines()[-1]
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:])
    return told


def main() -> int:
    """Runs all checks; 1 where one failed."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m proof.gpu")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", help="checks whose name has this in it")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print(
            "there is no GPU here; python -m proof.gpu --device cpu runs the same checks without one", file=sys.stderr
        )
        return 2
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    workers = max(2, torch.cuda.device_count()) if given.device == "cpu" else torch.cuda.device_count()
    kind = torch.cuda.get_device_name() if given.device == "cuda" else f"CPU {platform.machine()}"
    names = ("ddp", "fsdp", "zero1", "zero2", "zero3")
    pushes: dict[str, tuple[str, ...]] = {"shared": (), "gloo": ("--generator.transfer", "gloo")}
    if given.device == "cuda":
        # handles reach an engine on the learner's own GPU alone; NCCL one on another alone
        pushes["ipc"] = ("--generator.transfer", "ipc", "--generator.sleep")
        if workers > 1:
            pushes["nccl"] = ("--generator.transfer", "nccl")
        if workers > 2:
            pushes["two GPUs"] = ("--generator.tensor-parallel", "2")
    checks: list[tuple[str, Callable[[Bench], str]]] = [
        *((f"{one}, float32, workers: {workers}", partial(same_numbers, engine=one)) for one in names),
        *((f"{one}, bfloat16, workers: {workers}", partial(half, engine=one)) for one in ("local", *names)),
        *((f"attention, {one}", partial(kernels, name=one)) for one in ("eager", "sdpa", *flash())),
        *(
            [("attention, flex", partial(kernels, name="flex_attention")), ("tf32", tf32)]
            if given.device == "cuda"
            else []
        ),
        *(
            (f"vllm, float32, {how}", lambda bench, words=words: engine(bench, *words, *EXACT))
            for how, words in pushes.items()
        ),
        ("vllm, bfloat16 as the learner", lambda bench: engine(bench, "--learner.precision", "bf16")),
        ("vllm, bfloat16", lambda bench: engine(bench, "--generator.dtype", "bfloat16", *EXACT)),
        ("local, a short learning run", learns),
        ("contract suites", suites),
    ]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given.device, workers, Path(folder))
        made(bench.folder)
        print(f"{kind}, torch {torch.__version__}\n\n| what | device | result | seconds |\n|---|---|---|---|")
        for name, check in checks:
            if given.only and given.only not in name:
                continue
            began = time.perf_counter()
            try:
                told = check(bench)
            except Exception as error:
                failed, told = failed + 1, f"FAILED: {error}"
            print(f"| {name} | {given.device} | {told} | {time.perf_counter() - began:.0f} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
