"""Residual dropout with counter-based masks, applied to the output that each decoder layer adds to the residual stream.

The mask of an entry depends only on (key, row, layer, position, channel). It therefore does not change with
micro-batches, padding, packing or workers, and a recomputed forward pass draws the same mask.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from whet.models.load import decoder_layers
from whet.ops import addressed_uniform


@contextmanager
def residual_dropout(model: nn.Module, rate: float, key: int, rows: Tensor, positions: Tensor) -> Iterator[None]:
    """Drop entries of what each decoder layer adds to the residual stream with probability `rate`, within the context.

    rows, positions: (B, S) int64, the row and position of each token. Kept entries are scaled by 1 / (1 - rate).
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


class Dropout:
    """Residual dropout of one update: its rate, and the key of its masks.

    As a context manager, it keeps the dropout active until exit, so that a backward pass that recomputes the forward
    pass (gradient checkpointing) draws the same masks. Without a context, the dropout is active for one forward pass.
    """

    def __init__(self, rate: float, key: int) -> None:
        self.rate, self.key = rate, key
        self._held: ExitStack | None = None

    def put_on(self, model: nn.Module, rows: Tensor, positions: Tensor, otherwise: ExitStack) -> None:
        """Activate dropout for one forward pass of this layout, until this context exits, or `otherwise` if there is none."""
        stack = otherwise if self._held is None else self._held
        stack.enter_context(residual_dropout(model, self.rate, self.key, rows, positions))

    def __enter__(self) -> "Dropout":
        self._held = ExitStack()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._held is not None
        self._held.close()
        self._held = None
