"""Short ways to write tensors by hand and to compare them strictly."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

nan, inf = float("nan"), float("inf")


def f64(values: Any, *, grad: bool = False) -> Tensor:
    """The numbers as a float64 tensor, a leaf with gradient where asked."""
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def bits(*rows: str) -> Tensor:
    """A mask drawn by hand, (B, T): bits("110", "101")."""
    return torch.tensor([[bit == "1" for bit in row] for row in rows])


def close(actual: Tensor, expected: Any, *, within: float = 1e-12) -> None:
    """Equal in shape, dtype and number; lists and floats stand for float64 tensors; NaN equals nothing."""
    expected = expected if isinstance(expected, Tensor) else f64(expected)
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=within, atol=within)


def grad_of(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The gradient of the sum of `function(*inputs)` for each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return list(torch.autograd.grad(function(*leaves).sum(), leaves))
