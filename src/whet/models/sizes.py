"""Tokens of a micro-batch: a size for a model's width, the kind of device and the number of threads, measured once."""

from typing import Any

import torch

GPU = 8192
"""Tokens of a forward on a GPU, which small ones leave idle."""
CPU = ((192, 1536), (1 << 60, 1024))
"""(largest width, tokens that one thread of a CPU computes fastest up to it); see docs/speed.md. Larger forwards leave its caches."""
THREADS = 8
"""Threads beyond which a micro-batch does not grow."""


def width_of(config: Any) -> int:
    """Return the width of the hidden states of a model, from its configuration; 1024 if it names none."""
    found = getattr(config.get_text_config(), "hidden_size", None)
    return found if type(found) is int and found > 0 else 1024


def tokens_of(model: Any) -> int:
    """Return the tokens of a micro-batch for a loaded model, on its device."""
    device = model.get_input_embeddings().weight.device.type
    return micro_batch_tokens(width_of(model.config), device, torch.get_num_threads())


def micro_batch_tokens(width: int, device: str, threads: int) -> int:
    """Return the tokens of a micro-batch for a model of this width (`hidden_size`) on a kind of device ("cpu", "cuda").

    Nothing is timed, so runs of one recipe on equal machines have equal micro-batches.

    >>> micro_batch_tokens(128, "cpu", 1), micro_batch_tokens(576, "cpu", 2)
    (1536, 2048)
    """
    if device != "cpu":
        return GPU
    return next(tokens for most, tokens in CPU if width <= most) * max(1, min(threads, THREADS))
