"""Returns, GAE and group advantages: an independent double loop, special cases, holes, and groups of every kind."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from whet.ops import (
    against_greedy,
    broadcast,
    gae,
    gae_adaptive,
    group_center,
    group_mean_scaled,
    group_normalized,
    group_steps,
    group_zscore,
    leave_one_out,
    monte_carlo,
    optimal_baseline,
)

from .helpers import bits, close, f64, grad_of, nan

MASK = bits("11111", "11010", "00000", "01101", "00010")
NOISE = torch.Generator().manual_seed(0)
REWARDS, VALUES = torch.randn(2, 5, 5, dtype=torch.float64, generator=NOISE)
FINAL = torch.randn(5, dtype=torch.float64, generator=NOISE)
DIALS = [(1.0, 0.95), (0.9, 0.8), (0.5, 1.0), (0.9, 0.0), (0.0, 0.7), (1.0, 1.0)]


def double_loop(row: int, gamma: float, gae_lambda: float, final: float) -> dict[int, float]:
    """A_t = sum_l (gamma gae_lambda)^l delta_{t + l} over the trained tokens of a row, by position."""
    trained = [t for t in range(5) if MASK[row, t]]
    v = [VALUES[row, t].item() for t in trained] + [final]
    delta = [REWARDS[row, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(trained)]
    return {
        t: sum((gamma * gae_lambda) ** (j - i) * delta[j] for j in range(i, len(delta))) for i, t in enumerate(trained)
    }


@pytest.mark.parametrize("junk", [100.0, nan])
@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize(("gamma", "gae_lambda"), DIALS)
def test_gae_equals_the_double_sum_over_deltas(gamma: float, gae_lambda: float, bootstrap: bool, junk: float) -> None:
    final = FINAL if bootstrap else None
    rewards, values = (x.masked_fill(~MASK, junk) for x in (REWARDS, VALUES))
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for row in range(5):
        for t, advantage in double_loop(row, gamma, gae_lambda, FINAL[row].item() if bootstrap else 0.0).items():
            expected[row, t] = advantage
    close(gae(rewards, values, MASK, final, gamma=gamma, gae_lambda=gae_lambda), expected)


def test_gae_by_hand() -> None:
    # gamma 1/2, lambda 1/2, V = 2 4 8: delta = 1 + 2 - 2, 0 + 4 - 4, 6 + 8 - 8 with a final value of 16
    rewards, values, mask = f64([[1.0, 0.0, 6.0]]), f64([[2.0, 4.0, 8.0]]), bits("111")
    close(gae(rewards, values, mask, f64([16.0]), gamma=0.5, gae_lambda=0.5), [[1 + 6 / 16, 6 / 4, 6.0]])
    close(gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5), [[1 - 2 / 16, -2 / 4, -2.0]])  # last delta 6 - 8


def test_by_default_gamma_is_one_and_lambda_095() -> None:
    close(gae(f64([[0.0, 1.0]]), f64([[0.0, 0.0]]), bits("11")), [[0.95, 1.0]])
    close(monte_carlo(f64([[0.0, 1.0]]), bits("11")), [[1.0, 1.0]])


@pytest.mark.parametrize("junk", [0.0, 100.0, nan])
def test_a_hole_in_the_mask_is_as_if_it_were_deleted(junk: float) -> None:
    rewards, values = f64([[1.0, junk, 2.0, junk, junk, 4.0]]), f64([[0.5, junk, -1.0, junk, junk, 3.0]])
    mask, kept, final = bits("101001"), [0, 2, 5], f64([7.0])
    whole = gae(rewards, values, mask, final, gamma=0.9, gae_lambda=0.8)
    close(whole[:, kept], gae(rewards[:, kept], values[:, kept], bits("111"), final, gamma=0.9, gae_lambda=0.8))
    close(whole[:, [1, 3, 4]], [[0.0, 0.0, 0.0]])
    # 1 + 0.5 (2 + 0.5 4), 2 + 0.5 4, 4
    close(monte_carlo(rewards, mask, gamma=0.5), [[3.0, 0.0, 4.0, 0.0, 0.0, 4.0]])


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_lambda_one_is_returns_minus_values_and_lambda_zero_is_one_step_td(gamma: float) -> None:
    mask = torch.ones(5, 5, dtype=torch.bool)
    returns = torch.stack([sum(gamma**k * REWARDS[:, t + k] for k in range(5 - t)) for t in range(5)], 1)
    close(monte_carlo(REWARDS, mask, gamma=gamma), returns)
    close(gae(REWARDS, VALUES, mask, gamma=gamma, gae_lambda=1.0), returns - VALUES)
    following = torch.cat([VALUES[:, 1:], FINAL[:, None]], 1)
    close(gae(REWARDS, VALUES, mask, FINAL, gamma=gamma, gae_lambda=0.0), REWARDS + gamma * following - VALUES)


def test_nan_in_holes_reaches_no_gradient_of_gae() -> None:
    # lambda 1, gamma 1: the advantages sum to r_1 + 2 r_2 + 2 final - V_1 - V_2
    row, mask = f64([[1.0, nan, 2.0, nan]]), bits("1010")
    rewards, values, final = grad_of(lambda r, v, f: gae(r, v, mask, f, gae_lambda=1.0), row, row, f64([3.0]))
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


@pytest.mark.parametrize("advantage", [group_center, group_zscore, leave_one_out, group_mean_scaled])
def test_no_answers_no_advantages(advantage: Callable[..., Tensor]) -> None:
    assert advantage(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_broadcast_gives_each_trained_token_the_advantage_of_its_answer() -> None:
    close(broadcast(f64([2.0, -3.0, nan]), bits("101", "110", "000")), [[2.0, 0.0, 2.0], [-3.0, -3.0, 0.0], [0.0] * 3])


# --- lambda per answer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [0.0, nan])
def test_gae_takes_a_lambda_per_answer(junk: float) -> None:
    gae_lambda = f64([0.0, 0.3, 0.6, 0.9, 1.0])
    rewards, values = (x.masked_fill(~MASK, junk) for x in (REWARDS, VALUES))
    whole = gae(rewards, values, MASK, FINAL, gamma=0.9, gae_lambda=gae_lambda)
    for row in range(5):
        expected = [0.0] * 5
        for t, advantage in double_loop(row, 0.9, gae_lambda[row].item(), FINAL[row].item()).items():
            expected[t] = advantage
        close(whole[row], expected)


@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.4, 0.9), (1.0, 1.0), (0.05, 0.9), (1e9, 1.0)])
def test_gae_adaptive_has_a_lambda_for_each_length(alpha: float, gamma: float, bootstrap: bool) -> None:
    rewards, values = (x.masked_fill(~MASK, nan) for x in (REWARDS, VALUES))
    got = gae_adaptive(rewards, values, MASK, FINAL if bootstrap else None, gamma=gamma, alpha=alpha)
    for row, length in enumerate((5, 3, 0, 3, 1)):
        gae_lambda = max(0.0, 1 - 1 / (alpha * max(length, 1)))
        expected = [0.0] * 5
        for t, advantage in double_loop(row, gamma, gae_lambda, FINAL[row].item() if bootstrap else 0.0).items():
            expected[t] = advantage
        close(got[row], expected)


def test_gae_adaptive_by_hand() -> None:
    # alpha 1/2, four tokens: lambda 1 - 1 / 2; without values A = 8 (1/8 1/4 1/2 1); two tokens: lambda 0
    rewards, mask = f64([[0.0, 0.0, 0.0, 8.0], [0.0, 8.0, 0.0, 0.0]]), bits("1111", "1100")
    close(gae_adaptive(rewards, 0 * rewards, mask, alpha=0.5), [[1.0, 2.0, 4.0, 8.0], [0.0, 8.0, 0.0, 0.0]])
    many = torch.zeros(1, 40, dtype=torch.float64)
    many[0, -1] = 1.0
    got = gae_adaptive(many, 0 * many, torch.ones(1, 40, dtype=torch.bool))  # by default 1 - 1 / (0.05 40) = 1/2
    close(got[0, -3:], [0.25, 0.5, 1.0])


# --- groups ----------------------------------------------------------------------------------------------------------


def test_group_mean_scaled_by_hand() -> None:
    # group 5: 1 0 1 1 of mean 3/4; group 0: all wrong; group 9: 2 6 of mean 4; group 7: one answer
    group = torch.tensor([5, 0, 5, 9, 5, 0, 9, 5, 7])
    score = f64([1, 0, 0, 2, 1, 0, 6, 1, 3])
    close(group_mean_scaled(score, group), [1 / 3, 0, -1, -0.5, 1 / 3, 0, 0.5, 1 / 3, 0])


def test_group_mean_scaled_weighs_a_prompt_by_one_over_its_rate() -> None:
    # one right answer of n: it gets n - 1, the others -1
    for n in (2, 5, 8):
        score = torch.zeros(n, dtype=torch.float64)
        score[0] = 1.0
        close(group_mean_scaled(score, torch.zeros(n, dtype=torch.int64)), [n - 1.0] + [-1.0] * (n - 1))


def test_group_mean_scaled_refuses_a_negative_score() -> None:
    with pytest.raises(ValueError, match=r"no score may be negative; got -0\.5"):
        group_mean_scaled(f64([1.0, -0.5]), torch.tensor([0, 0]))


@pytest.mark.parametrize(("ddof", "eps"), [(1, 1e-6), (0, 0.5)])
def test_each_reward_is_normalized_by_itself(ddof: int, eps: float) -> None:
    # group 0 holds rows 0 2 3, group 1 rows 1 4; the second reward is constant in group 0, a hundredfold in group 1
    rewards = f64([[1.0, 5.0], [1.0, 300.0], [3.0, 5.0], [8.0, 5.0], [2.0, 100.0]])
    a, b, c = (math.sqrt(x) + eps for x in ((26 / 2, 0.5, 2e4) if ddof else (26 / 3, 0.25, 1e4)))
    expected = [[-3 / a, 0.0], [-0.5 / b, 100 / c], [-1 / a, 0.0], [4 / a, 0.0], [0.5 / b, -100 / c]]
    got = group_normalized(rewards, torch.tensor([0, 1, 0, 0, 1]), ddof=ddof, eps=eps)
    close(got, expected)
    if ddof == 1:
        close(group_normalized(rewards, torch.tensor([0, 1, 0, 0, 1])), expected)  # the default


def test_a_reward_that_does_not_apply_is_in_no_statistics_of_its_group() -> None:
    """The first reward of the group 0 is known for 1 and 5: mean 3, sample deviation sqrt(8). Alone in group 1 it has no spread."""
    rewards = torch.tensor([[1.0, 7.0], [0.0, 9.0], [5.0, 0.0], [4.0, 2.0], [0.0, 2.0]], dtype=torch.float64)
    applies = torch.tensor([[True, True], [False, True], [True, False], [True, True], [False, True]])
    got = group_normalized(rewards, torch.tensor([0, 0, 0, 1, 1]), applies, eps=0.0)
    a, b = 2 / math.sqrt(8), 1 / math.sqrt(2)
    torch.testing.assert_close(got, torch.tensor([[-a, -b], [0, b], [a, 0], [0, 0], [0, 0]], dtype=torch.float64))
    none = torch.zeros(5, 2, dtype=torch.bool)
    assert torch.equal(group_normalized(rewards, torch.tensor([0, 0, 0, 1, 1]), none), torch.zeros_like(rewards))


# answer 0 has steps that end at its tokens 1 and 3 (token 2 was a tool's), answer 1 one at its token 0;
# answers 2 and 3 are another group
STEP_MASK = bits("1101", "1100", "1110", "1000")
STEP = bits("0101", "1000", "1010", "1000")
STEP_REWARD = [[9.0, 1.0, nan, 3.0], [8.0, 7.0, nan, nan], [2.0, 6.0, 4.0, nan], [2.0, nan, nan, nan]]


@pytest.mark.parametrize(("ddof", "eps"), [(1, 1e-6), (0, 0.5)])
def test_group_steps_by_hand(ddof: int, eps: float) -> None:
    # group 0: steps 1 3 8, mean 4, squares 9 + 1 + 16 = 26; group 1: steps 2 4 2, mean 8/3, squares 4/9 + 16/9 + 4/9
    a = math.sqrt(26 / (3 - ddof)) + eps
    b = math.sqrt(24 / 9 / (3 - ddof)) + eps
    first = [[-4 / a, -4 / a, 0.0, -1 / a], [4 / a, 0.0, 0.0, 0.0]]  # -3 - 1 before and at the first end; then -1
    low, high = -2 / 3 / b, 4 / 3 / b
    second = [[low + high, high, high, 0.0], [low, 0.0, 0.0, 0.0]]
    group = torch.tensor([0, 0, 1, 1])
    close(group_steps(f64(STEP_REWARD), STEP, group, STEP_MASK, ddof=ddof, eps=eps), first + second)
    if ddof == 1:
        close(group_steps(f64(STEP_REWARD), STEP, group, STEP_MASK), first + second)


def test_group_steps_of_one_step_an_answer_is_the_zscore_of_the_answer() -> None:
    mask, step = bits("111", "110", "100"), bits("001", "010", "100")
    score, group = f64([1.0, 3.0, 8.0]), torch.tensor([4, 4, 4])
    reward = torch.where(step, score[:, None], 0.0)
    close(group_steps(reward, step, group, mask), broadcast(group_zscore(score, group), mask))


def test_group_steps_leaves_out_ends_that_are_not_trained() -> None:
    step, mask = bits("11", "01"), bits("10", "01")  # the second end of answer 0 stands in a hole
    got = group_steps(f64([[1.0, 99.0], [0.0, 3.0]]), step, torch.tensor([0, 0]), mask, eps=0.0)
    close(got, [[-1 / math.sqrt(2), 0.0], [0.0, 1 / math.sqrt(2)]])


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_against_greedy_subtracts_the_greedy_score_from_returns_to_go(gamma: float) -> None:
    rewards = f64([[1.0, nan, 2.0], [4.0, nan, nan], [nan] * 3])
    got = against_greedy(rewards, f64([0.5, -1.0, 7.0]), bits("101", "100", "000"), gamma=gamma)
    close(got, [[1 + 2 * gamma - 0.5, 0.0, 1.5], [5.0, 0.0, 0.0], [0.0] * 3])
    if gamma == 1:
        close(against_greedy(rewards, f64([0.5, -1.0, 7.0]), bits("101", "100", "000")), got)


# --- the optimal token baseline --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_the_optimal_baseline_by_hand(gamma: float) -> None:
    # W = 1 - 2 p + c, summed up: answer 0 (1/2, 1/2) -> 1/2, then (1/4, 1/4) -> 1/2 + 3/4; answer 1 (3/4, 5/8) -> 1/8,
    # then (1/2, 1/2) -> 5/8; answer 2 (1/2, 1/2) -> 1/2. Answer 3 is alone in its group.
    p = f64([[0.5, 0.25, nan], [0.75, 0.5, nan], [0.5, nan, nan], [0.5, 0.5, 0.5]])
    collision = f64([[0.5, 0.25, nan], [0.625, 0.5, nan], [0.5, nan, nan], [0.5, 0.5, 0.5]])
    rewards = f64([[1.0, 2.0, nan], [0.0, -4.0, nan], [3.0, nan, nan], [1.0, 0.0, 5.0]])
    group, mask = torch.tensor([2, 2, 2, 8]), bits("110", "110", "100", "111")
    g = [[1 + 2 * gamma, 2.0], [-4 * gamma, -4.0], [3.0]]
    first = (0.5 * g[0][0] + 0.125 * g[1][0] + 0.5 * g[2][0]) / 1.125
    second = (1.25 * g[0][1] + 0.625 * g[1][1]) / 1.875
    alone = [1 + 5 * gamma**2, 5 * gamma, 5.0]
    expected = [[g[0][0] - first, g[0][1] - second, 0], [g[1][0] - first, g[1][1] - second, 0], [g[2][0] - first, 0, 0]]
    got = optimal_baseline(rewards, p.log(), collision, group, mask, gamma=gamma)
    close(got, [*expected, alone])
    if gamma == 1:
        close(optimal_baseline(rewards, p.log(), collision, group, mask), got)


def test_a_certain_token_has_no_energy_and_a_group_of_certain_tokens_no_baseline() -> None:
    one, half = f64([[0.0], [0.0]]), f64([[1.0], [1.0]])
    close(optimal_baseline(f64([[3.0], [5.0]]), one, half, torch.tensor([0, 0]), bits("1", "1")), [[3.0], [5.0]])
    mixed = f64([[0.0], [math.log(0.5)]]), f64([[1.0], [0.5]])  # only the second weighs anything
    close(optimal_baseline(f64([[3.0], [5.0]]), *mixed, torch.tensor([0, 0]), bits("1", "1")), [[-2.0], [0.0]])


def test_the_optimal_baseline_has_the_least_variance_of_all_baselines_by_enumeration() -> None:
    # one token of three: the score function of token y in logits is e_y - p, its squared norm 1 - 2 p_y + sum p^2.
    # Answers in the exact proportions of p (2 3 5 of ten), so means over them are expectations.
    p, reward = [0.2, 0.3, 0.5], [1.0, -2.0, 4.0]
    tokens = [0] * 2 + [1] * 3 + [2] * 5
    collision = sum(x * x for x in p)
    got = optimal_baseline(
        f64([[reward[y]] for y in tokens]), f64([[math.log(p[y])] for y in tokens]), f64([[collision]] * 10),
        torch.zeros(10, dtype=torch.int64), torch.ones(10, 1, dtype=torch.bool),
    )  # fmt: skip
    baseline = reward[0] - got[0, 0].item()
    close(f64([[reward[y]] for y in tokens]) - got, [[baseline]] * 10)

    def variance(b: float) -> float:
        """Trace of the covariance of (R - b)(e_y - p); its mean does not depend on b."""
        second = sum(p[y] * (reward[y] - b) ** 2 * sum(((v == y) - p[v]) ** 2 for v in range(3)) for y in range(3))
        mean = [sum(p[y] * (reward[y] - b) * ((v == y) - p[v]) for y in range(3)) for v in range(3)]
        return second - sum(m * m for m in mean)

    for other in (baseline - 0.01, baseline + 0.01, 0.0, sum(a * b for a, b in zip(p, reward, strict=True))):
        assert variance(baseline) < variance(other)
