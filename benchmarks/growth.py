"""How the cost of whet grows: python -m benchmarks.growth [--only generation training ...] [--short]

CPU seconds of one thread, float32, best of a few repetitions; stages of `whet.Session` timed from outside, on a random Qwen2
(hidden width 128, 4 layers). Each series prints its points and the exponent of cost in size (least squares of the logarithms),
and fails above its bound. `memory` runs each point in a process of its own. `--short` shows in seconds that everything runs.

    generation  cost in answer tokens, lengths 64 to 512: per token at most 1.10 times from the shortest to the longest
    training    cost in real tokens: rows of 64 to 512, and rows of mixed length
    group       cost of an update in distinct tokens: one prompt and 2 to 16 answers
    batch       cost in rows, 4 to 64
    vocabulary  cost of an update in the number of ids, 2,048 to 50,257
    model       cost of an update in parameters of the layers, hidden width 64 to 512
    memory      growth of peak memory against that of full logits (V x T x 4 bytes)
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SHORT = False
BOUNDS = {
    "generation": 1 + math.log(1.10) / math.log(8), "training": 1.15, "group": 1.10, "batch": 1.05, "vocabulary": 1.05,
    "model": 1.10, "memory": 0.25,
}  # fmt: skip
"""Largest exponent of each series. For `memory`: largest growth as a share of the growth of full logits."""


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the slope of log cost in log size, by least squares.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    x, y = [math.log(one) for one in sizes], [math.log(one) for one in costs]
    middle, mean = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle) * (b - mean) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def model(vocabulary: int = 2048, hidden: int = 128) -> tuple[Any, Any]:
    """Return a random Qwen2 and a tokenizer with one token per byte; the model can have more ids."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, Qwen2Config

    from benchmarks.world import SPECIAL, hf_tokenizer

    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=4 * hidden, max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=0,
        pad_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32), hf_tokenizer(inner)


def words(count: int, seed: int = 0) -> str:
    """Return a text of this many tokens."""
    return "".join(chr(97 + (7 * seed + number * number) % 26) for number in range(count))


def common(made: tuple[Any, Any], out: str) -> dict[str, Any]:
    """Return the options of every session here."""
    where = {"model": made[0], "tokenizer": made[1], "out": out, "threads": 1, "model.chat_template": "none"}
    return where | {"model.device": "cpu", "optim.schedule": "constant", "train.save_last": False}


def update_seconds(lengths: Sequence[int], made: tuple[Any, Any], prompt: int = 8) -> float:
    """Return the CPU seconds of one SFT update on rows of these lengths (prompt and answer)."""
    import whet

    repeat = 2 if SHORT else 4
    rows = [
        {"prompt": words(prompt, number), "completion": words(length - prompt - 1, number)}
        for _ in range(repeat) for number, length in enumerate(lengths)
    ]  # fmt: skip
    best = math.inf
    with tempfile.TemporaryDirectory() as out:
        options = common(made, f"{out}/run") | {"data": {"train": rows, "shuffle": False}}
        options |= {"train.batch_size": len(lengths), "train.num_epochs": 1}
        with whet.Session("sft", **options) as session:
            for batch in session.batches():
                assert sum(row.length for row in batch.rows) == sum(lengths)
                began = time.process_time()
                session.forward_backward(batch)
                session.optim_step()
                best = min(best, time.process_time() - began)
    return best


def grouped(made: tuple[Any, Any], prompts: int, answers: int, prompt: int, new: int) -> tuple[float, float]:
    """Return the CPU seconds of generation, and of measuring and one update, of a GRPO step with answers of `new` tokens."""
    import whet
    from benchmarks.fixed import end_option, endless

    best = [math.inf, math.inf]
    rows = [{"prompt": words(prompt, number)} for number in range(prompts)]
    with tempfile.TemporaryDirectory() as out:
        options = common(made, f"{out}/run") | {
            "data": rows,
            "reward": spread,
            "num_generations": answers,
            "kl_in_loss": None,
        }
        options |= {
            "sampling.max_new_tokens": new,
            "rollout": {"num_steps": 2 if SHORT else 3, "prompts_per_step": prompts},
        }
        options |= {f"sampling.{name}": value for name, value in end_option(new).items()}
        with whet.Session("grpo", **options) as session:
            endless(session.loop.generator)  # type: ignore[union-attr]
            for _ in session.steps():
                began = time.process_time()
                groups = session.generate()
                best[0] = min(best[0], time.process_time() - began)
                scores = session.score(groups)
                began = time.process_time()
                batch = session.advantages(session.measure(groups, scores, defer=True))
                for mini in session.minibatches(batch):
                    session.update(mini)
                best[1] = min(best[1], time.process_time() - began)
                session.publish()
    return best[0], best[1]


def spread(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs between answers and costs nothing."""
    return [len(set(one)) / 100 for one in completions]


def generation() -> list[tuple[float, float]]:
    """(answer tokens, seconds)"""
    made, lengths = model(), (8, 16) if SHORT else (64, 128, 256, 512)
    return [(16 * new, grouped(made, 4, 4, 32, new)[0]) for new in lengths]


def training() -> list[tuple[float, float]]:
    """(real tokens, seconds); the last point is of mixed lengths, one long row and many short ones."""
    made, lengths = model(), (16, 32) if SHORT else (64, 128, 256, 512)
    out = [(4.0 * length, update_seconds([length] * 4, made)) for length in lengths]
    mixed = [lengths[-1], *[lengths[0]] * 15]
    return [*out, (float(sum(mixed)), update_seconds(mixed, made))]


def group() -> list[tuple[float, float]]:
    """(distinct tokens, seconds)"""
    made, new = model(), 8 if SHORT else 64
    return [(96 + count * new, grouped(made, 1, count, 96, new)[1]) for count in ((2, 4) if SHORT else (2, 4, 8, 16))]


def batch() -> list[tuple[float, float]]:
    """(rows, seconds)"""
    made = model()
    return [(rows, update_seconds([128] * rows, made)) for rows in ((2, 4) if SHORT else (4, 8, 16, 32, 64))]


def vocabulary() -> list[tuple[float, float]]:
    """(ids, seconds)"""
    sizes = (2048, 4096) if SHORT else (2048, 8192, 16384, 50257)
    return [(size, update_seconds([128] * 8, model(size), prompt=40)) for size in sizes]


def width() -> list[tuple[float, float]]:
    """(parameters of the layers, seconds)"""
    out = []
    for hidden in (32, 64) if SHORT else (64, 128, 256, 512):
        made = model(2048, hidden)
        out.append((float(sum(p.numel() for p in made[0].model.layers.parameters())), update_seconds([128] * 8, made)))
    return out


def memory() -> list[tuple[float, float]]:
    """(bytes of full logits, peak bytes), at one vocabulary and a growing number of tokens of one update"""
    out = []
    for rows in (2, 4) if SHORT else (8, 16, 32, 64):
        command = [sys.executable, "-m", "benchmarks.growth", "--point", str(rows), *(["--short"] if SHORT else [])]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
        out.append((float(rows * 256 * 32768 * 4), float(done.stdout.split()[-1]) * 2**20))
    return out


def point(rows: int) -> None:
    """Print the peak memory in MiB of one update with `rows` rows of 256 tokens, at a vocabulary of 32,768."""
    from benchmarks.meter import peak_rss_mb

    update_seconds([256] * rows, model(32768))
    print(peak_rss_mb())


SERIES: dict[str, Callable[[], list[tuple[float, float]]]] = {
    "generation": generation, "training": training, "group": group, "batch": batch, "vocabulary": vocabulary,
    "model": width, "memory": memory,
}  # fmt: skip


def fitted(name: str, points: Sequence[tuple[float, float]]) -> float:
    """Return the number that a series is bounded in: the exponent, or for memory the share of the growth of full logits."""
    sizes, costs = [size for size, _ in points], [cost for _, cost in points]
    return (costs[-1] - costs[0]) / (sizes[-1] - sizes[0]) if name == "memory" else exponent(sizes, costs)


def main() -> None:
    """Measure, print one JSON line per series, and fail if one grows faster than its bound."""
    global SHORT
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SERIES, default=list(SERIES))
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--point", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="file that gets one JSON line per series")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    SHORT = given.short
    if given.point is not None:
        return point(given.point)
    late = []
    for name in given.only:
        points = SERIES[name]()
        found = fitted(name, points)
        line = {"series": name, "points": points, "fitted": round(found, 3), "bound": round(BOUNDS[name], 3)}
        print(json.dumps(line), flush=True)
        if given.out is not None:
            with given.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
        late += [name] if found > BOUNDS[name] else []
    if late and not SHORT:
        raise SystemExit(f"grows faster than its bound: {', '.join(late)}")
    return None


if __name__ == "__main__":
    main()
