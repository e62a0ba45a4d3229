"""How many samples and real tokens (padding not counted) the loops train per CPU second on a fixed workload.

    python -m benchmarks.throughput [sft dpo reward ppo grpo] [--world DIR] [--short]

`--world DIR` takes `model/`, `sft.jsonl` (prompt, completion), `pref.jsonl` (prompt, chosen, rejected) and `prompts.jsonl`
from a folder, so that a peer can be run on the very same work; without it a world is made: a Qwen3 of hidden width 128 with 4
layers and 2,048 words, and rows of log-normal lengths. Start-up is not counted: the first updates are left out. One thread.
Absolute numbers of a shared machine mean little; compare two programs in one run. `--short` shows in seconds that all of it
runs; its numbers mean nothing.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

WARM = {"sft": 4, "dpo": 3, "reward": 3, "grpo": 2, "ppo": 1}
"""steps that are not counted"""


def make_world(folder: Path, seed: int = 0, *, short: bool = False) -> None:
    """A model folder and the rows of every workload; with `short` a small model and few short rows."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    stream = random.Random(f"bench {seed}")
    words = [f"w{number}" for number in range(2040)]
    inner = Tokenizer(
        models.WordLevel({w: n for n, w in enumerate(["<pad>", "<eos>", "<unk>", "<user>", "<bot>", *words])}, "<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} {% else %}<bot> {{ m['content'] }} <eos> {% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
    )
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=2048, hidden_size=32 if short else 128, intermediate_size=512, num_hidden_layers=1 if short else 4,
        num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    def text(median: float, low: int, high: int) -> str:
        length = int(min(high, max(low, stream.lognormvariate(0, 0.6) * median)))
        return " ".join(stream.choices(words, k=min(length, 8) if short else length))

    count = 96 if short else 512
    rows = [{"prompt": text(40, 8, 120), "completion": text(60, 8, 128)} for _ in range(count)]
    pairs = [
        {"prompt": text(40, 8, 120), "chosen": text(60, 8, 128), "rejected": text(60, 8, 128)}
        for _ in range(80 if short else 256)
    ]
    prompts = [{"prompt": text(40, 8, 120)} for _ in range(256)]
    for name, own in (("sft", rows), ("pref", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))


def measured(workload: str, world: Path, out: Path, *, short: bool = False) -> dict[str, Any]:
    """One workload run through its verb; throughput over the steps after the first few (`WARM`)."""
    import whet
    from whet.loops import record

    stamps: list[float] = []
    write = record.RunFolder.metrics

    def stamped(run: Any, step: int, also: Any = None, /, **numbers: float) -> None:
        stamps.append(time.process_time())
        write(run, step, also, **numbers)

    record.RunFolder.metrics = stamped  # type: ignore[method-assign]
    common: dict[str, Any] = {"model": str(world / "model"), "out": str(out / workload), "threads": 1, "lr": 1e-5}
    online = {"data": str(world / "prompts.jsonl"), "max_new_tokens": 8 if short else 128}
    function = {"reward": f"{__name__}:length"}
    if workload == "sft":
        whet.train("sft", data=str(world / "sft.jsonl"), **common, **{"train.batch_size": 16, "train.num_epochs": 1})
    elif workload in ("dpo", "reward"):
        method = {"algorithm.name": "pairwise"} if workload == "reward" else {}
        whet.train(
            workload,
            data=str(world / "pref.jsonl"),
            **common,
            **method,
            **{"train.batch_size": 16, "train.num_epochs": 1},
        )
    elif workload == "grpo":
        rollout = {"rollout.num_steps": 6, "rollout.prompts_per_step": 8, "num_generations": 8, "kl_in_loss": None}
        whet.train("grpo", **common, **online, **function, **rollout)
    elif workload == "ppo":
        rollout = {
            "rollout.num_steps": 3,
            "rollout.prompts_per_step": 64,
            "rollout.mini_batch_size": 16,
            "rollout.ppo_epochs": 4,
        }
        whet.train("ppo", **common, **online, **function, **rollout)
    rows = record.read_metrics(out / workload)[WARM[workload] :]
    record.RunFolder.metrics = write  # type: ignore[method-assign]
    seconds = stamps[-1] - stamps[WARM[workload] - 1]
    samples = {"sft": 16, "dpo": 16, "reward": 16, "grpo": 64, "ppo": 64}[workload] * len(rows)
    tokens = sum(row.get("tokens", row.get("length", 0) * (64 if workload in ("grpo", "ppo") else 0)) for row in rows)
    return {
        "workload": workload, "steps": len(rows), "samples_per_cpu_s": round(samples / seconds, 2),
        "trained_tokens_per_cpu_s": round(tokens / seconds, 1), "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip


def length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that costs nothing: the number of words."""
    return [len(completion.split()) / 64 for completion in completions]


def main() -> None:
    """Prints one JSON line per workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=["sft", "dpo", "reward", "ppo", "grpo"])
    parser.add_argument("--world", type=Path)
    parser.add_argument("--short", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = chosen.world or Path(folder) / "world"
        if chosen.world is None:
            make_world(world, short=chosen.short)
        for workload in chosen.workloads:
            print(json.dumps(measured(workload, world, Path(folder), short=chosen.short)), flush=True)


if __name__ == "__main__":
    main()
