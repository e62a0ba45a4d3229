"""Residual dropout with addressed masks: what a decoder layer adds to the residual stream is thinned out.

The mask of a number depends on (key, row, layer, position, channel) alone, so it does not change with micro-batches,
padding, packing or workers, and a recomputed forward draws the same one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from whet.models.load import decoder_layers
from whet.ops import addressed_uniform


@contextmanager
def residual_dropout(model: nn.Module, rate: float, key: int, rows: Tensor, positions: Tensor) -> Iterator[None]:
    """Within the context every decoder layer's addition to the stream is dropped with probability `rate` per number.

    rows, positions: (B, S) int64, the address of each token. What is kept is scaled by 1 / (1 - rate).
    """
    handles = []
    for number, layer in enumerate(decoder_layers(model) if rate > 0 else []):

        def hook(_module: nn.Module, given: tuple, keywords: dict, output: Any, number: int = number) -> Any:
            before = given[0] if given else keywords["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            channels = torch.arange(after.shape[-1], device=after.device)
            layer_ = torch.tensor(number, device=after.device)
            draw = addressed_uniform(key, layer_, rows[..., None], positions[..., None], channels)
            kept = (draw >= rate).to(after.dtype) / (1 - rate)
            thinned = before + (after - before) * kept
            return (thinned, *output[1:]) if isinstance(output, tuple) else thinned

        handles.append(layer.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
