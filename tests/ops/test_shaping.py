"""From a score to token rewards: every placement by hand, with holes, an empty row and NaN in the padding."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from whet import ops
from whet.ops import (
    attention,
    clip_score,
    dense,
    last_index,
    linear,
    lower_bound,
    minimum,
    penalize,
    per_sequence,
    per_token,
    soft_overlong,
    standardize,
    terminal,
    uniform,
    weighted_sum,
)

from .helpers import bits, close, f64, grad_of, nan

MASK = bits("1101", "0000", "0110")  # a hole and a full end; nothing; a late start and a padded end
SCORE = f64([6.0, 5.0, -2.0])
EMPTY = [0.0] * 4


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (terminal, [[0, 0, 0, 6.0], EMPTY, [0, 0, -2.0, 0]]),
        (uniform, [[2.0, 2.0, 0, 2.0], EMPTY, [0, -1.0, -1.0, 0]]),
        # t / T: 1/3 2/3 3/3 and 1/2 2/2; normalized: 1/6 2/6 3/6 and 1/3 2/3
        (linear, [[2.0, 4.0, 0, 6.0], EMPTY, [0, -1.0, -2.0, 0]]),
        (lambda s, m: linear(s, m, normalized=True), [[1.0, 2.0, 0, 3.0], EMPTY, [0, -2 / 3, -4 / 3, 0]]),
    ],
)
def test_a_score_is_placed_by_hand(place: Callable[..., Tensor], expected: list) -> None:
    close(place(SCORE, MASK), expected)
    close(place(torch.where(MASK.any(1), SCORE, nan), MASK), expected)  # an answer without tokens gets nothing at all
    close(grad_of(lambda s: place(s, MASK), SCORE)[0], f64(expected).sum(1) / SCORE)  # it is linear in the score


@pytest.mark.parametrize("junk", [1e9, nan])
def test_attention_shares_the_score_by_weights_renormalized_over_the_trained_tokens(junk: float) -> None:
    alpha = f64([[0.1, 0.2, junk, 0.2], [junk] * 4, [junk, 0.3, 0.1, junk]])
    close(attention(SCORE, alpha, MASK), [[1.2, 2.4, 0, 2.4], EMPTY, [0, -1.5, -0.5, 0]])  # 1/5 2/5 2/5 | 3/4 1/4


@pytest.mark.parametrize("length", [1, 2, 7])
def test_what_the_tokens_earn_together(length: int) -> None:
    mask, score, alpha = torch.ones(1, length, dtype=torch.bool), f64([3.0]), torch.rand(1, length, dtype=torch.float64)
    for placed in (terminal(score, mask), uniform(score, mask), linear(score, mask, normalized=True)):
        close(placed.sum(), 3.0)
    close(attention(score, alpha, mask).sum(), 3.0)
    close(linear(score, mask).sum(), 3.0 * (length + 1) / 2)  # raw: a longer answer earns more


KL = [[0.1, 0.2, nan, 0.6], [nan] * 4, [nan, -0.4, 0.1, nan]]


@pytest.mark.parametrize(
    ("place", "expected", "gradient"),
    [
        (dense, [[0.1, 0.2, 0, 0.6], EMPTY, [0, -0.4, 0.1, 0]], [1, 1, 1]),
        (per_token, [[0.1, 0.2, 0, 0.6], EMPTY, [0, -0.4, 0.1, 0]], [1, 1, 1]),
        (per_sequence, [[0, 0, 0, 0.3], EMPTY, [0, 0, -0.15, 0]], [1 / 3, 0, 1 / 2]),
        (lambda x, m: per_sequence(x, m, mean=False), [[0, 0, 0, 0.9], EMPTY, [0, 0, -0.3, 0]], [1, 1, 1]),
    ],
)
def test_numbers_per_token_by_hand_whatever_the_padding_holds(place, expected: list, gradient: list[float]) -> None:
    close(place(f64(KL), MASK), expected)
    close(grad_of(lambda x: place(x, MASK), f64(KL))[0], MASK * f64(gradient)[:, None])


def test_an_answer_of_one_token_pays_its_kl_once() -> None:
    for mean in (True, False):
        close(per_sequence(f64([[0.5, nan], [nan, 0.25]]), bits("10", "01"), mean=mean), [[0.5, 0.0], [0.0, 0.25]])


def test_the_gradient_of_attention_is_blind_to_the_padding() -> None:
    # s a / (a + b) with a = 1, b = 3, s = 8: d / da = s b / (a + b)^2 = 1.5, d / db = -s a / (a + b)^2 = -0.5
    alpha, mask = f64([[1.0, nan, 3.0, nan]]), bits("1010")
    close(grad_of(lambda x: attention(f64([8.0]), x, mask)[:, :1], alpha)[0], [[1.5, 0.0, -0.5, 0.0]])


def test_last_index_skips_holes_and_is_zero_for_an_empty_row() -> None:
    assert last_index(bits("1101", "1100", "0000", "0110", "1000")).tolist() == [3, 1, 0, 2, 0]


def test_weighted_sum_by_hand() -> None:
    close(weighted_sum(f64([[1.0, 10.0, 100.0], [2.0, 0.0, -1.0]]), weights=(1.0, 0.5, -0.25)), [-19.0, 2.25])
    close(grad_of(lambda r: weighted_sum(r, weights=(2.0, -3.0)), f64([[1.0, 1.0]]))[0], [[2.0, -3.0]])


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0, 1.0)])
def test_weighted_sum_refuses_another_number_of_weights(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=f"2 rewards but {len(weights)} weights"):
        weighted_sum(f64([[1.0, 2.0]]), weights=weights)


def test_clip_score_bounds_both_sides() -> None:
    close(clip_score(f64([-math.inf, -7.0, -5.0, -4.9, 0.0, 4.9, 7.0]), bound=5.0), [-5, -5, -5, -4.9, 0, 4.9, 5])


def test_penalize_takes_the_amount_from_cut_answers_only() -> None:
    score, truncated = f64([1.0, 1.0, -2.0]), torch.tensor([True, False, True])
    close(penalize(score, truncated, amount=1.5), [-0.5, 1.0, -3.5])
    close(grad_of(lambda s: penalize(s, truncated, amount=1.5), score)[0], [1.0, 1.0, 1.0])


ENSEMBLE = f64([[1.0, 4.0, 2.0], [-1.0, 0.5, 6.0]])


def test_minimum_is_the_most_cautious_member() -> None:
    close(minimum(ENSEMBLE, weights=(1.0, 1.0, 1.0)), [1.0, -1.0])
    close(minimum(ENSEMBLE, weights=(1.0, 0.1, -1.0)), [-2.0, -6.0])  # 1 0.4 -2; -1 0.05 -6
    close(grad_of(lambda r: minimum(r, weights=(2.0, 0.25, 2.0)), ENSEMBLE)[0], [[0, 0.25, 0], [2.0, 0, 0]])


def test_lower_bound_is_the_mean_minus_k_population_deviations() -> None:
    # 1 4 2: mean 7/3, squares 21/3 - 49/9 = 14/9; 2 x (-1) 0.5 6 / 2 = -2 0.5 3: mean 1/2, squares 13.25/3 - 1/4
    close(lower_bound(ENSEMBLE[:1], weights=(1.0, 1.0, 1.0)), [7 / 3 - math.sqrt(14) / 3])  # k is 1
    close(lower_bound(ENSEMBLE[1:], weights=(2.0, 1.0, 0.5), k=3.0), [0.5 - 3 * math.sqrt(13.25 / 3 - 0.25)])
    close(lower_bound(ENSEMBLE, weights=(1.0, 1.0, 1.0), k=0.0), [7 / 3, 5.5 / 3])
    close(lower_bound(f64([[3.0]]), weights=(2.0,), k=5.0), [6.0])  # one reward has no spread


APPLIES = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
PARTIAL = f64([[3.0, 0.0, 5.0], [0.0, -4.0, 0.0], [0.0, 0.0, 0.0]])
"""Rewards that do not apply have the score 0, which is neither the least nor in a mean."""


def test_a_reward_that_does_not_apply_is_not_the_minimum() -> None:
    close(minimum(PARTIAL, APPLIES, weights=(1.0, 1.0, 2.0)), [3.0, -4.0, 0.0])
    close(minimum(PARTIAL, torch.ones(3, 3, dtype=torch.bool), weights=(1.0, 1.0, 2.0)), [0.0, -4.0, 0.0])
    close(
        grad_of(lambda r: minimum(r, APPLIES, weights=(1.0, 1.0, 2.0)), PARTIAL)[0],
        [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 0]],
    )


def test_a_reward_that_does_not_apply_is_in_no_mean_and_no_deviation() -> None:
    # 3 and 10: mean 6.5, deviation 3.5; -4 alone
    close(lower_bound(PARTIAL, APPLIES, weights=(1.0, 1.0, 2.0), k=2.0), [6.5 - 2 * 3.5, -4.0, 0.0])
    every = torch.ones(2, 3, dtype=torch.bool)
    close(
        lower_bound(ENSEMBLE, every, weights=(1.0, 1.0, 1.0)), lower_bound(ENSEMBLE, weights=(1.0, 1.0, 1.0)).tolist()
    )


def test_standardize_shifts_then_scales() -> None:
    close(standardize(f64([1.0, 7.0]), shift=3.0, scale=4.0), [-0.5, 1.0])
    close(grad_of(lambda s: standardize(s, shift=3.0, scale=4.0), f64([1.0]))[0], [0.25])


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(0, 0.0), (5, 0.0), (6, 0.0), (7, -0.25), (8, -0.5), (9, -0.75), (10, -1.0), (11, -1.0), (14, -1.0)],
)
def test_soft_overlong_in_its_three_branches(length: int, penalty: float) -> None:
    """Free up to limit - buffer = 6, then linear, then all of it; the limit is 10."""
    mask = torch.zeros(1, 15, dtype=torch.bool)
    mask[0, :length] = True
    close(soft_overlong(f64([2.0]), mask, limit=10, buffer=4), [2.0 + penalty])
    close(soft_overlong(f64([2.0]), mask.flip(1), limit=10, buffer=4), [2.0 + penalty])  # trained tokens are counted


def test_soft_overlong_with_the_whole_limit_as_buffer_falls_from_the_first_token() -> None:
    close(soft_overlong(f64([0.0, 0.0]), bits("1000", "1111"), limit=4, buffer=4), [-0.25, -1.0])


def test_batch_normalized_is_over_all_answers_of_a_rollout() -> None:
    # mean 2, sum of squares about it 14, n - 1 = 3
    score = torch.tensor([-1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    deviation = (14 / 3) ** 0.5
    expected = [(x - 2.0) / (deviation + 1e-8) for x in (-1.0, 2.0, 3.0, 4.0)]
    torch.testing.assert_close(
        ops.batch_normalized(score), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )
    scaled = ops.batch_normalized(score, shift_mean=False, ddof=0, eps=0.5)
    torch.testing.assert_close(scaled, score / ((14 / 4) ** 0.5 + 0.5), rtol=1e-12, atol=1e-12)
