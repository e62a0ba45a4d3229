"""Preference losses: gaps by hand, hard, smoothed and soft labels, and the gradient in closed form."""

import math

import pytest
import torch

from whet.ops import answer_logp, dpo, gap, hinge, implicit_reward, ipo, sigmoid

from .helpers import bits, close, f64, grad_of, nan

MASK = bits("1101", "0000", "0110")
LOGP = f64([[-1.0, -2.0, nan, -6.0], [nan] * 4, [nan, -0.5, -1.5, nan]])
REF = f64([[-2.0, -2.0, nan, -2.0], [nan] * 4, [nan, -1.0, -1.5, nan]])


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("mean", "expected", "share"),  # share: what a token of each answer counts
    [(False, [-9.0, 0.0, -2.0], [1.0, 0.0, 1.0]), (True, [-3.0, 0.0, -1.0], [1 / 3, 0.0, 1 / 2])],
)
def test_an_answer_is_scored_by_the_sum_or_mean_of_its_tokens(mean: bool, expected: list, share: list) -> None:
    each = MASK * f64(share)[:, None]
    close(answer_logp(LOGP, MASK, mean=mean), expected)
    close(grad_of(lambda x: answer_logp(x, MASK, mean=mean), LOGP)[0], each)
    # differences 1 0 . -4 and 0.5 0: sums -3 and 0.5
    close(implicit_reward(LOGP, REF, MASK, beta=0.2, mean=mean), [-0.6 * share[0], 0.0, 0.1 * share[2]])
    close(grad_of(lambda x: implicit_reward(x, REF, MASK, beta=0.2, mean=mean), LOGP)[0], 0.2 * each)


def test_by_default_an_answer_is_a_sum() -> None:
    close(answer_logp(LOGP, MASK), [-9.0, 0.0, -2.0])
    close(implicit_reward(LOGP, REF, MASK, beta=1.0), [-3.0, 0.0, 0.5])


def test_the_gap_is_chosen_minus_rejected() -> None:
    close(gap(f64([1.0, 3.0, 10.0, 4.0]), torch.tensor([0, 1, 0, 1])), [-2.0, 6.0])
    close(grad_of(lambda s: gap(s, torch.tensor([0, 1, 0, 1])), f64([0.0] * 4))[0], [1.0, -1.0, 1.0, -1.0])


@pytest.mark.parametrize(
    ("label", "e", "p"),  # p = (1 - e) label + e (1 - label)
    [(1.0, 0, 1.0), (0.0, 0, 0.0), (0.7, 0, 0.7), (1.0, 0.1, 0.9), (0.0, 0.1, 0.1), (0.7, 0.1, 0.66), (0.5, 0.3, 0.5)],
)
@pytest.mark.parametrize("x", [-2.0, 0.0, 0.5])
def test_sigmoid_is_the_cross_entropy_with_a_soft_label(x: float, label: float, e: float, p: float) -> None:
    close(sigmoid(f64([x]), label, label_smoothing=e), [-p * log_sigmoid(x) - (1 - p) * log_sigmoid(-x)])
    close(grad_of(lambda gap: sigmoid(gap, label, label_smoothing=e), f64([x]))[0], [logistic(x) - p])


def test_every_pair_has_its_own_probability() -> None:
    loss = sigmoid(f64([1.0, 1.0]), f64([1.0, 0.25]))
    close(loss, [-log_sigmoid(1.0), -0.25 * log_sigmoid(1.0) - 0.75 * log_sigmoid(-1.0)])


def test_the_default_label_is_hard() -> None:
    close(sigmoid(f64([0.0, 3.0])), [math.log(2), math.log1p(math.exp(-3))])
    close(sigmoid(f64([-1000.0, 1000.0])), [1000.0, 0.0])  # no overflow


def test_a_soft_label_is_cheapest_where_the_sigmoid_of_the_gap_equals_it() -> None:
    close(grad_of(lambda g: sigmoid(g, 0.8), f64([math.log(4)]))[0], [0.0])


def test_hinge_by_hand() -> None:
    close(hinge(f64([-2.0, 0.5, 1.0, 3.0])), [3.0, 0.5, 0.0, 0.0])
    close(grad_of(hinge, f64([-2.0, 0.5, 3.0]))[0], [-1.0, -1.0, 0.0])


def test_ipo_wants_a_gap_of_half_in_units_of_beta_times_log_ratio() -> None:
    # a log-ratio h carries beta: gap = beta h, loss (h - 1 / (2 beta))^2; beta 1/4 wants h = 2
    close(ipo(f64([0.25 * 2.0, 0.25 * 5.0, 0.0, -0.25]), beta=0.25), [0.0, 9.0, 4.0, 9.0])
    close(grad_of(lambda g: ipo(g, beta=0.25), f64([0.25 * 5.0]))[0], [24.0])  # 2 (5 - 2) / beta


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_by_hand_in_value_and_gradient(smoothing: float) -> None:
    # (-1 + 2.5) - (-3 + 2) = 2.5, times beta 0.4 is 1
    four = [f64([x]) for x in (-1.0, -3.0, -2.5, -2.0)]
    expected = -(1 - smoothing) * log_sigmoid(1.0) - smoothing * log_sigmoid(-1.0)
    close(dpo(*four, beta=0.4, label_smoothing=smoothing), [expected])
    slope = 0.4 * (logistic(1.0) - (1 - smoothing))
    grads = grad_of(lambda *x: dpo(*x, beta=0.4, label_smoothing=smoothing), *four)
    close(torch.cat(grads), [slope, -slope, -slope, slope])


def test_by_default_dpo_has_beta_a_tenth_and_hard_labels() -> None:
    close(dpo(f64([-1.0]), f64([-3.0]), f64([-2.0]), f64([-2.0])), [-log_sigmoid(0.2)])


def test_dpo_is_the_sigmoid_of_the_gap_of_implicit_rewards() -> None:
    logp, ref, mask = f64([[-1.0, -2.0], [-4.0, nan]]), f64([[-2.0, -2.5], [-3.0, nan]]), bits("11", "10")
    whole = dpo(f64([-3.0]), f64([-4.0]), f64([-4.5]), f64([-3.0]), beta=0.3)
    close(sigmoid(gap(implicit_reward(logp, ref, mask, beta=0.3), torch.tensor([0, 1]))), whole)
    close(whole, [-log_sigmoid(0.3 * 2.5)])
