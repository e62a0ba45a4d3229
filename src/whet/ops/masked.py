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
    Without spread (or with too few True positions for it): 0 where shifted, x itself where not.
    """
    kept = torch.where(mask, x, torch.zeros_like(x))
    centered = torch.where(mask, kept - masked_mean(kept, mask), torch.zeros_like(x))
    count = mask.sum()
    if count <= max(ddof, 1) or bool(constant(x, mask)):
        return torch.zeros_like(x) if shift_mean else kept
    deviation = (centered.square().sum() / (count - ddof)).sqrt()
    return (centered if shift_mean else kept) / (deviation + eps)


def constant(x: Tensor, mask: Tensor) -> Tensor:
    """All True positions hold the same number, or there are none: told by comparing them, since a mean is rounded."""
    limit = torch.finfo(x.dtype).max
    same = torch.where(mask, x, -limit).max() == torch.where(mask, x, limit).min()
    return same | ~mask.any()
