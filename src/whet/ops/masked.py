"""Sums, means and whitening over the positions where a mask is True."""

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum `x` where `mask` is True; an empty mask gives 0. Other entries of `x` are ignored, even NaN.

    x, mask: the same shape; dim: the axis to sum over, or None for all axes.

    >>> masked_sum(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False]))
    tensor(3.)
    """
    kept = torch.where(mask, x, torch.zeros_like(x))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Average `x` where `mask` is True; an empty mask gives 0. Shapes are as in `masked_sum`."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, ddof: int = 1, eps: float = 1e-8) -> Tensor:
    """Compute `(x - mean) / (std + eps)` over all True positions, and 0 elsewhere.

    x: (B, T); mask: (B, T). `ddof` 1 divides the variance by n - 1 (TRL, verl), 0 by n (OpenRLHF). With
    `shift_mean=False` the mean is not subtracted: x / (std + eps). If all values are equal, or there are too few of
    them, the result is 0, or x with `shift_mean=False`.
    """
    kept = torch.where(mask, x, torch.zeros_like(x))
    centered = torch.where(mask, kept - masked_mean(kept, mask), torch.zeros_like(x))
    count = mask.sum()
    if count <= max(ddof, 1) or bool(constant(x, mask)):
        return torch.zeros_like(x) if shift_mean else kept
    deviation = (centered.square().sum() / (count - ddof)).sqrt()
    return (centered if shift_mean else kept) / (deviation + eps)


def constant(x: Tensor, mask: Tensor) -> Tensor:
    """Return whether all True positions have the same value, or there are none.

    The values are compared directly, because a computed mean is rounded.
    """
    limit = torch.finfo(x.dtype).max
    same = torch.where(mask, x, -limit).max() == torch.where(mask, x, limit).min()
    return same | ~mask.any()
