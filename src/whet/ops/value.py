"""Loss of the critic, and its explained variance. Shapes (B, T)."""

import torch
from torch import Tensor

from whet.ops.masked import constant, masked_mean


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, *, clip: float | None = 0.2) -> Tensor:
    """Compute max((V - R)^2, (V_clipped - R)^2) / 2 with V_clipped = old_value + clip(V - old_value, -clip, clip), (B, T).

    This is the form of OpenAI's PPO; `clip=None` gives the plain squared error.

    >>> value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]))
    tensor([0.3200])
    """
    squared = (value - returns) ** 2
    if clip is not None:
        clipped = old_value + (value - old_value).clamp(-clip, clip)
        squared = torch.maximum(squared, (clipped - returns) ** 2)
    return 0.5 * squared


def explained_variance(value: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Compute 1 - Var(R - V) / Var(R) over the mask, a scalar.

    1 is a perfect fit; 0 is no better than a constant. If R is constant, the result is 0.
    """
    error = returns - value
    spread = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    left = masked_mean((error - masked_mean(error, mask)) ** 2, mask)
    explained = 1 - left / spread.clamp(min=torch.finfo(spread.dtype).tiny)
    return torch.where(constant(returns, mask), torch.zeros_like(spread), explained)
