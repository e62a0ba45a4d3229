"""Refusal of weights that are NaN or infinite."""

from collections.abc import Iterable

import torch
from torch import Tensor

from whet.errors import ModelError


def check_finite(where: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ModelError if one of these weights, given with their names, is NaN or infinite."""
    for name, weight in weights:
        if weight.is_floating_point() and weight.numel():
            ends = torch.stack(torch.aminmax(weight.detach() if weight.element_size() > 1 else weight.detach().float()))
            if not bool(torch.isfinite(ends).all()):
                count = int((~torch.isfinite(weight.detach().float())).sum())
                raise ModelError(
                    f"{where}: {name} has {count} of {weight.numel()} values that are NaN or infinite; the file is damaged, or "
                    "training diverged: take another copy or checkpoint"
                )
