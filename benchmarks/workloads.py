"""The fixed work of each benchmark line: which rows, how many per update, which lengths, how many updates. Imports no torch."""

from dataclasses import dataclass

ALGORITHMS = ("sft", "reward", "dpo", "grpo", "rloo", "ppo", "generation")
OFFLINE = ("sft", "reward", "dpo")
SIZES = ("tiny", "nano", "micro", "qwen05", "qwen15")
"""Sizes of the model (see `world.SIZES`). `tiny` shows in seconds that everything runs; its numbers mean nothing. The last two are
the shapes of Qwen2.5 0.5B and 1.5B with random weights, for a GPU (`benchmarks.gpu`)."""
BUDGET = {"tiny": 1536, "nano": 1536, "micro": 1024}
"""Tokens of a micro-batch of the lean loops, padding counted."""


@dataclass(frozen=True)
class Work:
    """The work of one line.

    Offline: the first `rows` rows of the file, `batch` of them per update. Online: `steps` rollouts of `prompts` prompts
    with `answers` answers of at most `max_new` tokens, and `epochs` updates on each. `micro` rows are in one forward of the
    peer. The first `warmup` steps are not counted. `kl` is the coefficient of the KL in the reward.
    """

    micro: int
    warmup: int
    lr: float
    rows: int = 0
    batch: int = 0
    max_len: int = 256
    beta: float = 0.1
    prompts: int = 0
    answers: int = 1
    steps: int = 0
    max_new: int = 128
    epochs: int = 1
    kl: float = 0.0


WORK: dict[str, dict[str, Work]] = {
    "sft": {
        "tiny": Work(rows=16, batch=8, micro=8, warmup=1, lr=1e-4),
        "nano": Work(rows=512, batch=16, micro=16, warmup=4, lr=1e-4),
        "micro": Work(rows=96, batch=16, micro=8, warmup=2, lr=1e-4),
    },
    "reward": {
        "tiny": Work(rows=16, batch=8, micro=8, warmup=1, lr=1e-4),
        "nano": Work(rows=256, batch=16, micro=16, warmup=3, lr=1e-4),
        "micro": Work(rows=64, batch=16, micro=8, warmup=1, lr=1e-4),
    },
    "dpo": {
        "tiny": Work(rows=16, batch=8, micro=8, warmup=1, lr=1e-5),
        "nano": Work(rows=256, batch=16, micro=16, warmup=3, lr=1e-5),
        "micro": Work(rows=64, batch=16, micro=8, warmup=1, lr=1e-5),
    },
    "grpo": {
        "tiny": Work(prompts=2, answers=4, micro=8, steps=2, warmup=1, max_new=16, lr=1e-5),
        "nano": Work(prompts=8, answers=8, micro=16, steps=10, warmup=2, lr=1e-5),
        "micro": Work(prompts=4, answers=8, micro=8, steps=4, warmup=1, lr=1e-6),
    },
    "rloo": {
        "tiny": Work(prompts=2, answers=4, micro=8, steps=2, warmup=1, max_new=16, lr=1e-5, kl=0.05),
        "nano": Work(prompts=8, answers=8, micro=16, steps=10, warmup=2, lr=1e-5, kl=0.05),
        "micro": Work(prompts=4, answers=8, micro=8, steps=4, warmup=1, lr=1e-6, kl=0.05),
    },
    "ppo": {
        "tiny": Work(prompts=8, micro=8, steps=2, warmup=1, max_new=16, lr=1e-5, epochs=4, kl=0.05),
        "nano": Work(prompts=64, micro=16, steps=5, warmup=1, lr=1e-5, epochs=4, kl=0.05),
        "micro": Work(prompts=32, micro=8, steps=3, warmup=1, lr=1e-6, epochs=4, kl=0.05),
    },
    "generation": {
        "tiny": Work(prompts=2, answers=4, micro=8, steps=2, warmup=1, max_new=16, lr=1e-5),
        "nano": Work(prompts=8, answers=8, micro=16, steps=5, warmup=1, lr=1e-5),
        "micro": Work(prompts=4, answers=8, micro=8, steps=5, warmup=1, lr=1e-6),
    },
}

GPU: dict[str, Work] = {
    "dpo": Work(rows=64, batch=16, micro=4, warmup=1, lr=1e-6),
    "grpo": Work(prompts=8, answers=8, micro=16, steps=4, warmup=1, max_new=256, lr=1e-6),
    "ppo": Work(prompts=32, micro=8, steps=3, warmup=1, max_new=256, lr=1e-6, epochs=4, kl=0.05),
}
for _algorithm, _work in GPU.items():
    WORK[_algorithm] |= {"qwen05": _work, "qwen15": _work}
