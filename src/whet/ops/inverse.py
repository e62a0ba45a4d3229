"""Draw from discrete distributions by inverting their cumulative sums."""

import torch
from torch import Tensor

BLOCK = 256
"""Weights that are summed in their own precision; longer sums are in float64."""


def inverse(weights: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    """Return (index, total) per row: the first index whose cumulative sum of weights exceeds chance x total.

    weights (B, V) are at least 0, and not all 0 in a row; chance (B,) float64 in [0, 1) -> (B,) int64, (B,) float64. An index of
    weight 0 is never returned. Only sums over blocks of 256 weights are in the precision of the weights, so a boundary between
    two indices moves by some 1e-7 of the total at most in float32, at any V.

    >>> inverse(torch.tensor([[1.0, 0.0, 3.0, 0.0]]), torch.tensor([0.25], dtype=torch.float64))
    (tensor([2]), tensor([4.], dtype=torch.float64))
    """
    size = weights.shape[1]
    whole = size // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1) if whole else weights[:, :0]
    if whole < size:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], 1)
    sums = sums.double()
    cumulative = sums.cumsum(-1)
    target = chance[:, None] * cumulative[:, -1:]
    block = _first_above(cumulative, target)
    rest = target - (cumulative.gather(1, block) - sums.gather(1, block))
    columns = block * BLOCK + torch.arange(min(BLOCK, size), device=weights.device)
    own = weights.gather(1, columns.clamp(max=size - 1)).double()
    if size % BLOCK and size > BLOCK:
        own = own.masked_fill(columns >= size, 0.0)
    place = _first_above(own.cumsum(-1), rest)
    return (block * BLOCK + place)[:, 0], cumulative[:, -1]


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Return the first index whose cumulative sum exceeds the target, at most the last one of positive weight, (B, 1)."""
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), last)
