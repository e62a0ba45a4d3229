"""Importance correction: each weight by hand inside, at and beyond its bounds, with holes and an empty row."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from whet.ops import geometric_mask, sequence_mask, sequence_weight, token_mask, token_weight, weighted

from .helpers import bits, close, f64, grad_of, nan

# ratios old / sampler of the trained tokens, their product and geometric mean:
# 4 1/4 2 (2, 2^(1/3)); none; 1/8 8 (1, 1); 3 3 (9, 3)
MASK = bits("1101", "0000", "0110", "1100")
RATIO = f64([[4.0, 0.25, nan, 2.0], [nan] * 4, [nan, 0.125, 8.0, nan], [3.0, 3.0, nan, nan]])
SAMPLER = f64([[-3.0, -1.0, nan, -2.0], [nan] * 4, [nan, -1.0, -4.0, nan], [-2.0, -5.0, nan, nan]])
OLD = SAMPLER + RATIO.log()
EMPTY = [0.0] * 4

BY_HAND = [
    ("token_weight, cap 3", partial(token_weight, cap=3.0), [[3, 0.25, 0, 2], EMPTY, [0, 0.125, 3, 0], [3, 3, 0, 0]]),
    ("token_weight, cap 2", token_weight, [[2, 0.25, 0, 2], EMPTY, [0, 0.125, 2, 0], [2, 2, 0, 0]]),
    # products 2, 1 and 9
    (
        "sequence_weight, cap 2.5", partial(sequence_weight, cap=2.5),
        [[2, 2, 0, 2], EMPTY, [0, 1, 1, 0], [2.5, 2.5, 0, 0]],
    ),
    ("sequence_weight, cap 2", sequence_weight, [[2, 2, 0, 2], EMPTY, [0, 1, 1, 0], [2, 2, 0, 0]]),
    # inside: the ratio itself, unbounded; outside 0
    ("token_mask, 0.2 to 3.5", partial(token_mask, low=0.2, high=3.5), [[0, 0.25, 0, 2], EMPTY, EMPTY, [3, 3, 0, 0]]),
    ("token_mask, 0.5 to 5", token_mask, [[4, 0, 0, 2], EMPTY, EMPTY, [3, 3, 0, 0]]),
    ("sequence_mask, 1.5 to 10", partial(sequence_mask, low=1.5, high=10), [[2, 2, 0, 2], EMPTY, EMPTY, [9, 9, 0, 0]]),
    ("sequence_mask, 0.5 to 2", partial(sequence_mask, high=2.0 + 1e-9), [[2, 2, 0, 2], EMPTY, [0, 1, 1, 0], EMPTY]),
    # geometric means 1.26, 1 and 3: kept or not, the weight is 1
    ("geometric_mask, 1.1 to 2", partial(geometric_mask, low=1.1, high=2.0), [[1, 1, 0, 1], EMPTY, EMPTY, EMPTY]),
    ("geometric_mask, 0.99 to 1.01", geometric_mask, [EMPTY, EMPTY, [0, 1, 1, 0], EMPTY]),
    (
        "geometric_mask, 0.5 to 4", partial(geometric_mask, low=0.5, high=4.0),
        [[1, 1, 0, 1], EMPTY, [0, 1, 1, 0], [1, 1, 0, 0]],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("weight", "expected"), [pytest.param(op, by_hand, id=name) for name, op, by_hand in BY_HAND])
@pytest.mark.parametrize("junk", [nan, 1e3, -1e3])
def test_by_hand_whatever_the_padding_holds(weight: Callable[..., Tensor], expected: list, junk: float) -> None:
    old, sampler = OLD.masked_fill(~MASK, junk), SAMPLER.masked_fill(~MASK, 0.0 if junk == junk else nan)
    close(weight(old, sampler, MASK), expected)


ALL = [token_weight, sequence_weight, token_mask, sequence_mask, geometric_mask]


@pytest.mark.parametrize("weight", ALL)
def test_where_both_agree_every_weight_is_one(weight: Callable[..., Tensor]) -> None:
    close(weight(SAMPLER, SAMPLER, MASK), MASK.double())


@pytest.mark.parametrize("weight", ALL)
def test_no_gradient_goes_through_a_weight(weight: Callable[..., Tensor]) -> None:
    old = OLD.clone().requires_grad_()
    assert not weight(old, SAMPLER, MASK).requires_grad


@pytest.mark.parametrize("weight", ALL)
def test_an_answer_is_weighed_by_itself(weight: Callable[..., Tensor]) -> None:
    whole = weight(OLD, SAMPLER, MASK)
    for row in range(4):
        close(weight(OLD[row : row + 1], SAMPLER[row : row + 1], MASK[row : row + 1]), whole[row : row + 1])


@pytest.mark.parametrize("op", [token_mask, sequence_mask, geometric_mask])
@pytest.mark.parametrize(("ratio", "kept"), [(0.49, 0), (0.51, 1), (1.99, 1), (2.01, 0)])
def test_both_bounds_cut_off(op: Callable[..., Tensor], ratio: float, kept: int) -> None:
    got = op(f64([[math.log(ratio)]]), f64([[0.0]]), bits("1"), low=0.5, high=2.0)
    close(got, [[kept if op is geometric_mask else kept * ratio]])


@pytest.mark.parametrize("op", [token_mask, sequence_mask, geometric_mask])
def test_the_bounds_themselves_are_inside(op: Callable[..., Tensor]) -> None:
    close(op(f64([[-1.0]]), f64([[-1.0]]), bits("1"), low=1.0, high=1.0), [[1.0]])


def test_untruncated_weights_make_an_expectation_under_the_sampler_one_under_the_old_policy() -> None:
    # sum_y sampler(y) w(y) f(y) = sum_y old(y) f(y), enumerated over a vocabulary of three
    old, sampler, f = f64([0.2, 0.3, 0.5]), f64([0.5, 0.25, 0.25]), f64([1.0, -2.0, 4.0])
    for op in (token_weight, sequence_weight):
        w = op(old.log()[:, None], sampler.log()[:, None], torch.ones(3, 1, dtype=torch.bool), cap=9.0)[:, 0]
        close((sampler * w * f).sum(), 0.2 - 0.6 + 2.0)


def test_a_weighted_loss_has_the_weighted_gradient() -> None:
    weight = token_weight(OLD, SAMPLER, MASK, cap=3.0)
    loss, through = grad_of(lambda x, w: torch.where(MASK, weighted(x, w), 0.0) + 0 * w, OLD, weight)
    close(loss, weight)
    close(through, [EMPTY] * 4)
