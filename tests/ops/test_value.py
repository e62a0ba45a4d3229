"""The critic's loss in every branch of its clip, and explained variance, by hand."""

import pytest
import torch

from whet.ops import explained_variance, value_loss

from .helpers import bits, close, f64, grad_of, nan


@pytest.mark.parametrize(
    ("value", "old", "returns", "clip", "loss", "slope"),
    [
        (1.0, 0.0, 1.0, 0.2, 0.32, 0.0),  # at the target, but more than 0.2 away: (0.2 - 1)^2 / 2
        (0.1, 0.0, 1.0, 0.2, 0.405, -0.9),  # inside: (0.1 - 1)^2 / 2
        (-0.1, 0.0, -1.0, 0.2, 0.405, 0.9),
        (3.0, 2.0, 0.0, 0.5, 4.5, 3.0),  # moved away: the unclipped error is larger, 9 / 2 instead of 2.5^2 / 2
        (1.0, 2.0, 0.0, 0.5, 1.125, 0.0),  # moved towards, too far: 1.5^2 / 2
        (1.0, 2.0, 4.0, 0.5, 4.5, -3.0),
        (3.0, 2.0, 4.0, 0.5, 1.125, 0.0),
        (3.0, 2.0, 0.0, None, 4.5, 3.0),
        (1.0, 2.0, 0.0, None, 0.5, 1.0),
        (1.0, 0.0, 1.0, None, 0.0, 0.0),
    ],
)
def test_value_loss_by_hand_in_every_branch(value, old, returns, clip, loss, slope) -> None:
    close(value_loss(f64([[value]]), f64([[old]]), f64([[returns]]), clip=clip), [[loss]])
    close(grad_of(lambda v: value_loss(v, f64([[old]]), f64([[returns]]), clip=clip), f64([[value]]))[0], [[slope]])


def test_by_default_values_move_by_at_most_a_fifth() -> None:
    close(value_loss(f64([[1.0, -1.0]]), f64([[0.0, 0.0]]), f64([[1.0, -1.0]])), [[0.32, 0.32]])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1.0, 2.0, nan, 3.0], 1.0),  # perfect
        ([6.0, 7.0, nan, 8.0], 1.0),  # a constant error explains all the variance
        ([9.0, 9.0, nan, 9.0], 0.0),  # a constant
        ([2.0, 2.0, nan, 3.0], 2 / 3),  # errors -1 0 0: squares about their mean 2/3, of 2
        ([3.0, 2.0, nan, 1.0], -3.0),  # the wrong way round: errors -2 0 2, 8 of 2
    ],
)
@pytest.mark.parametrize("junk", [1e6, nan])
def test_explained_variance_by_hand(value: list[float], expected: float, junk: float) -> None:
    close(explained_variance(f64([value]), f64([[1.0, 2.0, junk, 3.0]]), bits("1101")), expected)


def test_explained_variance_looks_over_all_rows_at_once() -> None:
    # returns 0 0 | 4 4, values 0 0 | 2 2: errors 0 0 2 2 have variance 1 of 4
    rows = f64([[0.0, 0.0], [2.0, 2.0]]), f64([[0.0, 0.0], [4.0, 4.0]])
    close(explained_variance(*rows, bits("11", "11")), 0.75)


@pytest.mark.parametrize("mask", ["111", "100", "000"])
def test_explained_variance_is_zero_where_the_returns_are_constant(mask: str) -> None:
    close(explained_variance(f64([[1.0, 2.0, 3.0]]), f64([[2.0, 2.0, 2.0]]), bits(mask)), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_explained_variance_is_zero_for_constant_returns_that_binary_cannot_write(dtype: torch.dtype) -> None:
    value = torch.arange(8, dtype=dtype)[None]
    for junk in (9.0, -9.0, nan):
        returns = torch.tensor([[0.1] * 7 + [junk]], dtype=dtype)
        assert explained_variance(value, returns, bits("11111110")) == 0
