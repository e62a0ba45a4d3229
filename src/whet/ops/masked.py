"""Sums, means and whitening over the positions where a mask is True.

In all of `whet.ops` a mask is bool, or has the values 0 and 1 in any other dtype.
"""

import torch
from torch import Tensor


def boolean(mask: Tensor) -> Tensor:
    """Return a mask as bool. Raises ValueError for a mask of another dtype with other values than 0 and 1."""
    if mask.dtype == torch.bool:
        return mask
    wrong = mask[(mask != 0) & (mask != 1)]
    if wrong.numel():
        raise ValueError(f"a mask is bool, or has the values 0 and 1; got {wrong[0].item()} ({mask.dtype})")
    return mask != 0


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum `x` where `mask` is True; an empty mask gives 0. Other entries of `x` are ignored, even NaN.

    x, mask: the same shape; dim: the axis to sum over, or None for all axes.

    >>> masked_sum(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False]))
    tensor(3.)
    """
    mask = boolean(mask)
    kept = torch.where(mask, x, torch.zeros_like(x))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Average `x` where `mask` is True; an empty mask gives 0. Shapes are as in `masked_sum`."""
    mask = boolean(mask)
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def whiten(
    x: Tensor, mask: Tensor, dim: int | None = None, *, shift_mean: bool = True, ddof: int = 1, eps: float = 1e-8
) -> Tensor:
    """Compute `(x - mean) / (std + eps)` over all True positions, or over those along `dim`, and 0 elsewhere.

    x, mask: the same shape. `ddof` 1 divides the variance by n - 1 (TRL, verl), 0 by n (OpenRLHF). With
    `shift_mean=False` the mean is not subtracted: x / (std + eps). If all values are equal, or there are too few of
    them, the result is 0, or x with `shift_mean=False`.

    >>> whiten(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), torch.ones(2, 2), 1, ddof=0)
    tensor([[-1.,  1.],
            [ 0.,  0.]])
    """
    mask = boolean(mask)
    axes = tuple(range(x.ndim)) if dim is None else (dim,)
    count = mask.sum(axes, keepdim=True)
    kept = torch.where(mask, x, torch.zeros_like(x))
    mean = kept.sum(axes, keepdim=True) / count.clamp(min=1)
    centered = torch.where(mask, kept - mean, torch.zeros_like(x))
    flat = (count <= max(ddof, 1)) | constant(x, mask, axes, keepdim=True)
    variance = centered.square().sum(axes, keepdim=True) / (count - ddof).clamp(min=1)
    # not the root of 0, whose gradient is infinite
    deviation = torch.where(flat, torch.ones_like(variance), variance).sqrt()
    scaled = (centered if shift_mean else kept) / (deviation + eps)
    return torch.where(flat, torch.zeros_like(x) if shift_mean else kept, scaled)


def constant(x: Tensor, mask: Tensor, axes: tuple[int, ...] | None = None, *, keepdim: bool = False) -> Tensor:
    """Return whether all True positions (along these axes; None is all) have the same value, or there are none.

    The values are compared directly, because a computed mean is rounded.
    """
    mask = boolean(mask)
    axes = tuple(range(x.ndim)) if axes is None else axes
    if not x.numel():
        return mask.any(axes, keepdim=keepdim).logical_not()
    limit = torch.finfo(x.dtype).max
    ends = torch.where(mask, x, -limit).amax(axes, keepdim), torch.where(mask, x, limit).amin(axes, keepdim)
    return (ends[0] == ends[1]) | ~mask.any(axes, keepdim=keepdim)
