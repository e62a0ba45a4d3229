"""Sums, means and whitening over the positions where a mask is True."""

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x` where `mask` is True; an empty mask gives 0. What `x` holds elsewhere (NaN too) never counts.

    x, mask: the same shape; dim: the axis to sum over, all of them when None.

    >>> masked_sum(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False]))
    tensor(3.)
    """
    kept = torch.where(mask, x, torch.zeros_like(x))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` where `mask` is True; an empty mask gives 0. Shapes as in `masked_sum`."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, ddof: int = 1, eps: float = 1e-8) -> Tensor:
    """`(x - mean) / (std + eps)` over all True positions, and 0 elsewhere.

    x: (B, T); mask: (B, T). `ddof` 1 divides the variance by n - 1 (TRL, verl), 0 by n (OpenRLHF). With
    `shift_mean=False` only the scale changes: x / (std + eps); the mean is never added back to a shifted x.
    Fewer than two True positions: x unchanged in scale, shifted to 0 if `shift_mean`.
    """
    count = mask.sum()
    mean = masked_mean(x, mask)
    if count <= ddof:
        scaled = x - mean if shift_mean else x
    else:
        deviation = (masked_sum((x - mean) ** 2, mask) / (count - ddof)).sqrt()
        scaled = (x - mean if shift_mean else x) / (deviation + eps)
    return torch.where(mask, scaled, torch.zeros_like(x))
