"""Residual dropout with addressed masks: what a decoder layer adds to the residual stream is thinned out.

The mask of a number depends on (key, row, layer, position, channel) alone, so it does not change with micro-batches,
padding, packing or workers, and a recomputed forward draws the same one.
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


class Dropout:
    """Residual dropout of one update: its rate, and the key that its masks are drawn from.

    As a context manager it keeps the masks on until it is left, so that a backward pass that recomputes its forward
    (gradient checkpointing) draws them again. Outside of one they are on for a single forward.
    """

    def __init__(self, rate: float, key: int) -> None:
        self.rate, self.key = rate, key
        self._held: ExitStack | None = None

    def put_on(self, model: nn.Module, rows: Tensor, positions: Tensor, otherwise: ExitStack) -> None:
        """Dropout for one forward of this layout, until this context is left, or `otherwise` where there is none."""
        stack = otherwise if self._held is None else self._held
        stack.enter_context(residual_dropout(model, self.rate, self.key, rows, positions))

    def __enter__(self) -> "Dropout":
        self._held = ExitStack()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._held is not None
        self._held.close()
        self._held = None
