"""A surrogate of your own: python examples/own_surrogate.py MODEL, or --surrogate examples/own_surrogate.py:tanh_clip."""

import sys

import torch
from torch import Tensor

import whet


def tanh_clip(ratio: Tensor, advantage: Tensor, *, width: float = 0.2) -> Tensor:
    """-(1 + {width} tanh((rho - 1) / {width})) A"""
    return -(1 + width * torch.tanh((ratio - 1) / width)) * advantage


def short(prompts, completions, **columns):
    """The reward of an answer: the fewer words, the better."""
    return [-len(completion.split()) / 10 for completion in completions]


if __name__ == "__main__":
    rows = [{"prompt": f"one {word}"} for word in ("yes", "no", "good", "bad")]
    options = {"num_steps": 2, "prompts_per_step": 4, "num_generations": 4, "mini_batch_size": 8, "max_new_tokens": 12}
    surrogate = {"name": "examples/own_surrogate.py:tanh_clip", "width": 0.3}
    print(whet.explain("grpo", surrogate=surrogate, **options))
    whet.train(
        "grpo", model=sys.argv[1], reward=short, data=rows, surrogate=surrogate, out="runs/own_surrogate", **options
    )
