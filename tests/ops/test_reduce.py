"""Reductions: each against a literal, linear in its parts, and blind to padding."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from whet.ops import Counts, element_mean, fixed_length, sequence_mean, sequence_sum, token_mean

from .helpers import bits, close, f64, grad_of, nan

LOSS = f64([[1.0, 2.0, nan, 3.0], [nan] * 4, [nan, 10.0, nan, nan], [4.0, 4.0, 4.0, 4.0]])
MASK = bits("1101", "0000", "0100", "1111")  # 3 + 0 + 1 + 4 tokens in 3 sequences that have any
COUNTS = Counts(tokens=8, sequences=3, elements=4)

REDUCTIONS = [  # value, and what one token of each row weighs
    pytest.param(token_mean, 32 / 8, [1 / 8, 0, 1 / 8, 1 / 8], id="token_mean"),
    pytest.param(sequence_mean, (2 + 10 + 4) / 3, [1 / 9, 0, 1 / 3, 1 / 12], id="sequence_mean"),
    pytest.param(sequence_sum, (6 + 10 + 16) / 3, [1 / 3, 0, 1 / 3, 1 / 3], id="sequence_sum"),
    pytest.param(partial(fixed_length, length=16), 32 / 48, [1 / 48, 0, 1 / 48, 1 / 48], id="fixed_length"),
]


@pytest.mark.parametrize(("reduce", "value", "weight"), REDUCTIONS)
def test_by_hand_in_value_and_in_what_a_token_weighs(reduce: Callable[..., Tensor], value: float, weight: list) -> None:
    close(reduce(LOSS, MASK, COUNTS), value)
    close(grad_of(lambda loss: reduce(loss, MASK, COUNTS), LOSS)[0], MASK * f64(weight)[:, None])


@pytest.mark.parametrize("parts", [[[0], [1], [2], [3]], [[3, 0], [2, 1]], [[1], [0, 2, 3]], [[2, 3, 1, 0]]])
@pytest.mark.parametrize(("reduce", "value", "weight"), REDUCTIONS)
def test_the_parts_of_a_mini_batch_sum_to_the_whole(reduce, value: float, weight: list, parts: list[list[int]]) -> None:
    close(sum(reduce(LOSS[rows], MASK[rows], COUNTS) for rows in parts), value)


@pytest.mark.parametrize(("reduce", "value", "weight"), REDUCTIONS)
def test_more_padding_changes_nothing(reduce: Callable[..., Tensor], value: float, weight: list) -> None:
    wide = torch.full((4, 9), nan, dtype=torch.float64)
    mask = torch.zeros(4, 9, dtype=torch.bool)
    wide[:, 3:7], mask[:, 3:7] = LOSS, MASK
    close(reduce(wide, mask, COUNTS), value)


@pytest.mark.parametrize("reduce", [token_mean, sequence_mean, sequence_sum, partial(fixed_length, length=2)])
def test_nothing_to_count_is_zero(reduce: Callable[..., Tensor]) -> None:
    close(reduce(LOSS, torch.zeros_like(MASK), Counts(0, 0, 0)), 0.0)


def test_element_mean_divides_by_all_elements_of_the_mini_batch() -> None:
    losses, mask = f64([1.0, 2.0, 6.0]), bits("0")
    close(element_mean(losses, mask, Counts(tokens=99, sequences=99, elements=4)), 9 / 4)
    close(sum(element_mean(part, mask, COUNTS) for part in losses.split(2)), 9 / 4)
    close(element_mean(losses[:0], mask, Counts(0, 0, 0)), 0.0)


def test_counts_add_up_field_by_field() -> None:
    assert Counts(1, 2, 3) + Counts(10, 20, 30) == Counts(tokens=11, sequences=22, elements=33)
