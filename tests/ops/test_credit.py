"""Returns, GAE and group advantages: an independent double loop, special cases, holes, and groups of every kind."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from whet.ops import broadcast, gae, group_center, group_zscore, leave_one_out, monte_carlo

from .helpers import bits, close, f64, grad_of, nan

MASK = bits("11111", "11010", "00000", "01101", "00010")
NOISE = torch.Generator().manual_seed(0)
REWARDS, VALUES = torch.randn(2, 5, 5, dtype=torch.float64, generator=NOISE)
FINAL = torch.randn(5, dtype=torch.float64, generator=NOISE)
DIALS = [(1.0, 0.95), (0.9, 0.8), (0.5, 1.0), (0.9, 0.0), (0.0, 0.7), (1.0, 1.0)]


def double_loop(row: int, gamma: float, lam: float, final: float) -> dict[int, float]:
    """A_t = sum_l (gamma lam)^l delta_{t + l} over the trained tokens of a row, by position."""
    trained = [t for t in range(5) if MASK[row, t]]
    v = [VALUES[row, t].item() for t in trained] + [final]
    delta = [REWARDS[row, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(trained)]
    return {t: sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(delta))) for i, t in enumerate(trained)}


@pytest.mark.parametrize("junk", [100.0, nan])
@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize(("gamma", "lam"), DIALS)
def test_gae_equals_the_double_sum_over_deltas(gamma: float, lam: float, bootstrap: bool, junk: float) -> None:
    final = FINAL if bootstrap else None
    rewards, values = (x.masked_fill(~MASK, junk) for x in (REWARDS, VALUES))
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for row in range(5):
        for t, advantage in double_loop(row, gamma, lam, FINAL[row].item() if bootstrap else 0.0).items():
            expected[row, t] = advantage
    close(gae(rewards, values, MASK, final, gamma=gamma, lam=lam), expected)


def test_gae_by_hand() -> None:
    # gamma 1/2, lambda 1/2, V = 2 4 8: delta = 1 + 2 - 2, 0 + 4 - 4, 6 + 8 - 8 with a final value of 16
    rewards, values, mask = f64([[1.0, 0.0, 6.0]]), f64([[2.0, 4.0, 8.0]]), bits("111")
    close(gae(rewards, values, mask, f64([16.0]), gamma=0.5, lam=0.5), [[1 + 6 / 16, 6 / 4, 6.0]])
    close(gae(rewards, values, mask, gamma=0.5, lam=0.5), [[1 - 2 / 16, -2 / 4, -2.0]])  # last delta 6 - 8


def test_by_default_gamma_is_one_and_lambda_095() -> None:
    close(gae(f64([[0.0, 1.0]]), f64([[0.0, 0.0]]), bits("11")), [[0.95, 1.0]])
    close(monte_carlo(f64([[0.0, 1.0]]), bits("11")), [[1.0, 1.0]])


@pytest.mark.parametrize("junk", [0.0, 100.0, nan])
def test_a_hole_in_the_mask_is_as_if_it_were_deleted(junk: float) -> None:
    rewards, values = f64([[1.0, junk, 2.0, junk, junk, 4.0]]), f64([[0.5, junk, -1.0, junk, junk, 3.0]])
    mask, kept, final = bits("101001"), [0, 2, 5], f64([7.0])
    whole = gae(rewards, values, mask, final, gamma=0.9, lam=0.8)
    close(whole[:, kept], gae(rewards[:, kept], values[:, kept], bits("111"), final, gamma=0.9, lam=0.8))
    close(whole[:, [1, 3, 4]], [[0.0, 0.0, 0.0]])
    # 1 + 0.5 (2 + 0.5 4), 2 + 0.5 4, 4
    close(monte_carlo(rewards, mask, gamma=0.5), [[3.0, 0.0, 4.0, 0.0, 0.0, 4.0]])


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_lambda_one_is_returns_minus_values_and_lambda_zero_is_one_step_td(gamma: float) -> None:
    mask = torch.ones(5, 5, dtype=torch.bool)
    returns = torch.stack([sum(gamma**k * REWARDS[:, t + k] for k in range(5 - t)) for t in range(5)], 1)
    close(monte_carlo(REWARDS, mask, gamma=gamma), returns)
    close(gae(REWARDS, VALUES, mask, gamma=gamma, lam=1.0), returns - VALUES)
    following = torch.cat([VALUES[:, 1:], FINAL[:, None]], 1)
    close(gae(REWARDS, VALUES, mask, FINAL, gamma=gamma, lam=0.0), REWARDS + gamma * following - VALUES)


def test_nan_in_holes_reaches_no_gradient_of_gae() -> None:
    # lambda 1, gamma 1: the advantages sum to r_1 + 2 r_2 + 2 final - V_1 - V_2
    row, mask = f64([[1.0, nan, 2.0, nan]]), bits("1010")
    rewards, values, final = grad_of(lambda r, v, f: gae(r, v, mask, f, lam=1.0), row, row, f64([3.0]))
    close(rewards, [[1.0, 0.0, 2.0, 0.0]])
    close(values, [[-1.0, 0.0, -1.0, 0.0]])
    close(final, [2.0])


# group 7 holds 1 3 8 (mean 4, squares 9 + 1 + 16 = 26), group -2 holds 5 7 (mean 6, squares 2), group 4 holds 9 alone
GROUP, SCORE = torch.tensor([7, -2, 7, 4, -2, 7]), f64([1.0, 5.0, 3.0, 9.0, 7.0, 8.0])


def test_group_center_by_hand() -> None:
    close(group_center(SCORE, GROUP), [-3.0, -1.0, -1.0, 0.0, 1.0, 4.0])


@pytest.mark.parametrize(
    ("ddof", "eps", "of_7", "of_2"),
    [  # the deviation of either group, eps added
        (1, 0.0, math.sqrt(13), math.sqrt(2)),
        (1, 0.5, math.sqrt(13) + 0.5, math.sqrt(2) + 0.5),
        (0, 1.0, math.sqrt(26 / 3) + 1, 2.0),
    ],
)
def test_group_zscore_by_hand(ddof: int, eps: float, of_7: float, of_2: float) -> None:
    z = group_zscore(SCORE[GROUP != 4], GROUP[GROUP != 4], ddof=ddof, eps=eps)
    close(z, [-3 / of_7, -1 / of_2, -1 / of_7, 1 / of_2, 4 / of_7])


def test_by_default_the_sample_deviation_and_1e_6_added_after_the_root() -> None:
    z = 1 / (math.sqrt(2) + 1)  # x - mean = -+1e-6, sample deviation sqrt(2) 1e-6
    close(group_zscore(f64([0.0, 2e-6]), torch.tensor([0, 0])), [-z, z], within=1e-9)


@pytest.mark.parametrize("ddof", [0, 1])
def test_group_zscore_equals_scipy_and_does_not_look_at_other_groups(ddof: int) -> None:
    score = torch.randn(3, 4, dtype=torch.float64, generator=NOISE) * 5
    order = torch.randperm(12, generator=NOISE)
    group = torch.arange(3).repeat_interleave(4)
    z = group_zscore(score.flatten()[order], group[order], ddof=ddof, eps=0.0)
    close(z, f64(stats.zscore(score.numpy(), 1, ddof).flatten().tolist())[order])


@pytest.mark.parametrize("ddof", [0, 1])
def test_a_group_of_one_and_a_group_without_spread_give_zero(ddof: int) -> None:
    score, group = f64([3.0, 0.5, 0.5, 0.5]), torch.tensor([1, 0, 0, 0])
    close(group_center(score, group), [0.0] * 4)
    close(group_zscore(score, group, ddof=ddof), [0.0] * 4)


@pytest.mark.parametrize("score", [0.1, 10.1, 1000.3])
def test_a_group_of_equal_scores_gives_zero_in_float32_too(score: float) -> None:
    z = group_zscore(torch.full((8,), score), torch.zeros(8, dtype=torch.int64))
    assert z.abs().max() < 1e-4


def test_leave_one_out_subtracts_the_mean_of_the_others() -> None:
    score, group = SCORE[GROUP != 4], GROUP[GROUP != 4]
    # 1 - 11/2, 5 - 7, 3 - 9/2, 7 - 5, 8 - 4/2
    close(leave_one_out(score, group), [-4.5, -2.0, -1.5, 2.0, 6.0])
    others = [[s for j, s in enumerate(score.tolist()) if j != i and group[j] == group[i]] for i in range(5)]
    close(leave_one_out(score, group), [s - sum(o) / len(o) for s, o in zip(score.tolist(), others, strict=True)])


def test_leave_one_out_refuses_a_group_of_one() -> None:
    with pytest.raises(ValueError, match="group of one"):
        leave_one_out(SCORE, GROUP)


@pytest.mark.parametrize("advantage", [group_center, group_zscore, leave_one_out])
def test_no_answers_no_advantages(advantage: Callable[..., Tensor]) -> None:
    assert advantage(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_broadcast_gives_each_trained_token_the_advantage_of_its_answer() -> None:
    close(broadcast(f64([2.0, -3.0, nan]), bits("101", "110", "000")), [[2.0, 0.0, 2.0], [-3.0, -3.0, 0.0], [0.0] * 3])
