"""Exponentials and products that are right, in value and gradient, where e^x is infinite: times 0 it is 0."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def exp(x: Tensor) -> Tensor:
    """Compute e^x, any shape. Where the gradient of the result is 0, that of x is 0 too, even if e^x is infinite.

    torch's own gradient there is 0 x inf = NaN: a probability ratio behind a clip makes the whole update NaN.
    """
    return _Exp.apply(x, False)


def expm1(x: Tensor) -> Tensor:
    """Compute e^x - 1, any shape, with the gradient of `exp`."""
    return _Exp.apply(x, True)


def times(x: Tensor, weight: Tensor | float) -> Tensor:
    """Compute x weight, and 0 where the weight is 0, even if x is infinite. Shapes are broadcast."""
    return torch.where(torch.as_tensor(weight == 0, device=x.device), torch.zeros_like(x), x * weight)


class _Exp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, less_one: bool) -> Tensor:
        ctx.save_for_backward(x)
        return torch.expm1(x) if less_one else x.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return torch.where(grad == 0, torch.zeros_like(x), grad * x.exp()), None
