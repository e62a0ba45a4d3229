"""Policy losses: each branch of each clip by hand, one gradient at ratio 1, and PPO-KL by enumeration."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from whet.ops import (
    cispo,
    clip,
    dppo,
    dual_clip,
    entropy_bonus,
    gmpo,
    kept,
    kl_on,
    kl_penalized,
    nll,
    reinforce,
    sapo,
    sequence_ratio,
    sequence_token_ratio,
    token_ratio,
    unclipped,
    weighted,
)

from .helpers import bits, close, f64, grad_of, nan

CLIPPED = [  # ratio, A, loss and its derivative by the ratio at low 0.2, high 0.3
    (0.5, 2.0, -1.0, -2.0),  # min(1.0, 1.6)
    (0.9, 2.0, -1.8, -2.0),
    (1.0, 2.0, -2.0, -2.0),
    (1.25, 2.0, -2.5, -2.0),
    (1.5, 2.0, -2.6, 0.0),  # min(3.0, 2.6)
    (0.5, -2.0, 1.6, 0.0),  # min(-1.0, -1.6)
    (0.9, -2.0, 1.8, 2.0),
    (1.0, -2.0, 2.0, 2.0),
    (1.25, -2.0, 2.5, 2.0),
    (1.5, -2.0, 3.0, 2.0),  # min(-3.0, -2.6)
    (1.5, 0.0, 0.0, 0.0),
    (1.5, 0.5, -0.65, 0.0),
    (1.5, -0.5, 0.75, 0.5),
]
DUAL = [  # the same where A >= 0 or ratio <= bound = 1.75
    *CLIPPED,
    (4.0, 2.0, -2.6, 0.0),
    (1.7, -2.0, 3.4, 2.0),
    (4.0, -2.0, 3.5, 0.0),  # 1.75 2, instead of 8
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), CLIPPED)
def test_clip_by_hand_in_every_branch(ratio: float, advantage: float, loss: float, slope: float) -> None:
    close(clip(f64([ratio]), f64([advantage]), clip_low=0.2, clip_high=0.3), [loss])
    close(grad_of(lambda r: clip(r, f64([advantage]), clip_low=0.2, clip_high=0.3), f64([ratio]))[0], [slope])


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), DUAL)
def test_dual_clip_by_hand_in_every_branch(ratio: float, advantage: float, loss: float, slope: float) -> None:
    options = {"clip_low": 0.2, "clip_high": 0.3, "bound": 1.75}
    close(dual_clip(f64([ratio]), f64([advantage]), **options), [loss])
    close(grad_of(lambda r: dual_clip(r, f64([advantage]), **options), f64([ratio]))[0], [slope])


def test_default_dials() -> None:
    ratio, advantage = f64([0.1, 9.0, 9.0, 0.1]), f64([-1.0, 1.0, -1.0, 1.0])
    close(clip(ratio, advantage), [0.8, -1.2, 9.0, -0.1])
    close(dual_clip(ratio, advantage), [0.8, -1.2, 3.0, -0.1])
    close(cispo(f64([-1.0] * 4), ratio, advantage), [-0.1, 1.28, -1.28, 0.1])  # clipped to [0, 1.28]


def test_dual_clip_refers_to_each_token_alone() -> None:
    ratio, advantage = f64([[1.0, 5.0], [5.0, 5.0]]), f64([[-1.0, -1.0], [1.0, -2.0]])
    close(dual_clip(ratio, advantage), [[1.0, 3.0], [-1.2, 6.0]])


def test_unclipped_nll_and_reinforce_by_hand() -> None:
    logp, advantage = f64([-2.0, -0.5]), f64([3.0, -4.0])
    close(unclipped(f64([0.5, 1.5]), advantage), [-1.5, 6.0])
    close(nll(logp), [2.0, 0.5])
    close(reinforce(logp, advantage), [6.0, -2.0])
    close(grad_of(lambda r: unclipped(r, advantage), f64([0.5, 9.0]))[0], [-3.0, 4.0])
    close(grad_of(nll, logp)[0], [-1.0, -1.0])
    close(grad_of(lambda x: reinforce(x, advantage), logp)[0], [-3.0, 4.0])


@pytest.mark.parametrize(("ratio", "weight"), [(0.3, 0.6), (0.6, 0.6), (1.0, 1.0), (1.2, 1.2), (1.5, 1.2)])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_clips_the_weight_and_cuts_off_no_gradient(ratio: float, weight: float, advantage: float) -> None:
    old = f64([-1.0])
    logp = old + math.log(ratio)

    def loss(logp: Tensor) -> Tensor:
        return cispo(logp, token_ratio(logp, old), f64([advantage]), clip_low=0.4, clip_high=0.2)

    close(loss(logp), -weight * advantage * logp)
    close(grad_of(loss, logp)[0], [-weight * advantage])  # nothing through the ratio


def test_a_token_ratio_is_exactly_one_where_both_agree() -> None:
    logp = torch.randn(100, generator=torch.Generator().manual_seed(0))
    for shift in (0.0, -300.0):  # however unlikely the token
        assert (token_ratio(logp + shift, logp + shift) == 1).all()
    close(token_ratio(f64([[-1.0, -2.0]]), f64([[-1.0 - math.log(2), -2.0 + math.log(4)]])), [[2.0, 0.25]])


def test_a_sequence_ratio_is_the_geometric_mean_on_every_token_with_holes_skipped() -> None:
    old = f64([[-1.0, nan, -2.0, nan], [nan] * 4, [-1.0, -1.0, -1.0, -1.0]])
    ratios = f64([[8.0, nan, 2.0, nan], [nan] * 4, [1.0, 16.0, 4.0, 0.25]])
    mask = bits("1010", "0000", "1111")
    # sqrt(8 2) = 4; nothing to look at: 1; (1 16 4 / 4)^(1/4) = 2
    close(sequence_ratio(old + ratios.log(), old, mask), [[4.0] * 4, [1.0] * 4, [2.0] * 4])
    # d (r_1 ... r_n)^(1/n) / d logp_t = ratio / n, once for each of the four positions it stands on
    grad = grad_of(lambda logp: sequence_ratio(logp, old, mask), old + ratios.log())[0]
    close(grad, [[8.0, 0.0, 8.0, 0.0], [0.0] * 4, [2.0] * 4])


def test_at_ratio_one_every_surrogate_has_the_gradient_of_reinforce() -> None:
    old, advantage, mask = f64([[-1.0], [-2.0], [-0.3]]), f64([[1.5], [-0.5], [0.0]]), bits("1", "1", "1")
    surrogates: list[Callable[[Tensor], Tensor]] = [
        lambda x: reinforce(x, advantage),
        lambda x: unclipped(token_ratio(x, old), advantage),
        lambda x: clip(token_ratio(x, old), advantage),
        lambda x: dual_clip(token_ratio(x, old), advantage),
        lambda x: clip(
            sequence_ratio(x, old, mask), advantage, clip_low=3e-4, clip_high=4e-4
        ),  # GSPO, answers of one token
        lambda x: cispo(x, token_ratio(x, old), advantage),
        lambda x: kl_penalized(x, old, advantage, beta=3.0),
        lambda x: clip(sequence_token_ratio(x, old, mask), advantage, clip_low=3e-4, clip_high=4e-4),
        lambda x: sapo(token_ratio(x, old), advantage),
        lambda x: gmpo(x, old, advantage, mask),
        lambda x: dppo(token_ratio(x, old), x, old, advantage),
        lambda x: dppo(token_ratio(x, old), x, old, advantage, divergence="kl"),
        lambda x: weighted(reinforce(x, advantage), torch.ones_like(x)),
        lambda x: kept(clip(token_ratio(x, old), advantage), torch.ones_like(mask)),
        lambda x: kl_on(unclipped(token_ratio(x, old), advantage), x, old, ~mask),
    ]
    for surrogate in surrogates:
        close(grad_of(surrogate, old)[0], -advantage)


def test_kl_penalized_by_hand() -> None:
    # ratio 2, A 3, beta 0.5: -6 + 0.5 (2 - 1 - ln 2)
    loss = kl_penalized(f64([-1.0 + math.log(2)]), f64([-1.0]), f64([3.0]), beta=0.5)
    close(loss, [-6.0 + 0.5 * (1 - math.log(2))])


def test_kl_penalized_is_minus_the_expected_gain_plus_beta_kl_of_old_to_new_by_enumeration() -> None:
    old, new, advantage, beta = f64([0.1, 0.2, 0.3, 0.4]), f64([0.4, 0.3, 0.2, 0.1]), f64([1.0, -2.0, 0.5, 3.0]), 0.7

    def expected(logits: Tensor) -> Tensor:
        return (old * kl_penalized(logits.log_softmax(-1), old.log(), advantage, beta=beta)).sum()

    gain = sum(p * a for p, a in zip(new.tolist(), advantage.tolist(), strict=True))  # E_old[ratio A]
    kl = sum(o * math.log(o / n) for o, n in zip(old.tolist(), new.tolist(), strict=True))
    close(expected(new.log()), -gain + beta * kl)
    # by hand: d gain / d l_v = p_v (A_v - gain), d KL(old || p) / d l_v = p_v - old_v
    close(grad_of(expected, new.log() + 2)[0], -new * (advantage - gain) + beta * (new - old))


def test_the_penalty_of_kl_penalized_is_never_negative_and_keeps_its_digits() -> None:
    log_ratio = torch.tensor([-1e-3, 0.0, 1e-3])
    penalty = kl_penalized(log_ratio, torch.zeros(3), torch.zeros(3), beta=1.0)
    close(penalty, torch.tensor([5e-7, 0.0, 5e-7]), within=1e-9)


# --- ratios of whole answers, token by token -------------------------------------------------------------------------


def test_a_sequence_token_ratio_has_the_value_of_the_sequence_and_the_gradient_of_the_token() -> None:
    old = f64([[-1.0, nan, -2.0, nan], [nan] * 4, [-1.0, -1.0, -1.0, -1.0]])
    ratios = f64([[8.0, nan, 2.0, nan], [nan] * 4, [1.0, 16.0, 4.0, 0.25]])
    mask = bits("1010", "0000", "1111")
    got = sequence_token_ratio(old + ratios.log(), old, mask)
    close(got[mask], [4.0, 4.0] + [2.0] * 4)  # sqrt(8 2); (1 16 4 / 4)^(1/4)
    grad = grad_of(lambda x: torch.where(mask, sequence_token_ratio(x, old, mask), 0.0), (old + ratios.log()))[0]
    # s d pi_t / pi_t: the whole ratio on each of its own tokens, nothing through the product
    close(grad[mask], [4.0, 4.0] + [2.0] * 4)


def test_gspo_token_with_one_advantage_has_the_gradient_of_gspo() -> None:
    # n tokens of one answer share A: gspo's ratio stands n times with slope s / n each; in the token form once with s
    old, mask = f64([[-1.0, -2.0, -0.5]]), bits("111")
    new, advantage = f64([[-0.9, -2.2, -0.4]]), f64([[3.0, 3.0, 3.0]])
    grads = [
        grad_of(lambda x, ratio=ratio: unclipped(ratio(x, old, mask), advantage), new)[0]
        for ratio in (sequence_ratio, sequence_token_ratio)
    ]
    close(grads[0], grads[1])
    close(grads[0], [[-3.0 * math.exp(0.0)] * 3])  # 0.1 - 0.2 + 0.1 = 0: ratio 1


# --- SAPO ------------------------------------------------------------------------------------------------------------


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0, 1.5, 4.0])
@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.5), (-2.0, 3.0), (0.5, 1.5), (-0.1, 3.0)])
def test_sapo_is_a_sigmoid_gate_with_tau_by_the_sign_of_the_advantage(
    ratio: float, advantage: float, tau: float
) -> None:
    def loss(r: Tensor) -> Tensor:
        return sapo(r, f64([advantage]), tau_positive=1.5, tau_negative=3.0)

    s = logistic(tau * (ratio - 1))
    close(loss(f64([ratio])), [-4 / tau * s * advantage])
    close(grad_of(loss, f64([ratio]))[0], [-4 * s * (1 - s) * advantage])  # 4 s (1 - s) is 1 at ratio 1


def test_sapo_by_default_has_tau_1_and_105_and_nothing_for_no_advantage() -> None:
    ratio = f64([2.0, 2.0, 2.0])
    expected = [-4 * logistic(1.0), 4 / 1.05 * logistic(1.05), 0.0]
    close(sapo(ratio, f64([1.0, -1.0, 0.0])), expected)
    close(grad_of(lambda r: sapo(r, f64([0.0] * 3)), ratio)[0], [0.0] * 3)
    assert sapo(ratio.float(), torch.tensor([1.0, -1.0, 0.0])).dtype == torch.float32


# --- GMPO ------------------------------------------------------------------------------------------------------------

GMPO = [  # log-ratios of an answer's two tokens, A, mean of what is kept at low 0.3 and high 0.5, slopes of the mean
    ((0.2, 0.4), 2.0, 0.3, (0.5, 0.5)),  # inside
    ((0.2, 0.9), 2.0, 0.35, (0.5, 0.0)),  # above: A > 0 is clipped to 0.5
    ((0.2, -0.9), 2.0, -0.35, (0.5, 0.5)),  # below: A > 0 keeps -0.9
    ((0.2, 0.4), -2.0, 0.3, (0.5, 0.5)),
    ((0.2, 0.9), -2.0, 0.55, (0.5, 0.5)),  # above: A < 0 keeps 0.9
    ((0.2, -0.9), -2.0, -0.05, (0.5, 0.0)),  # below: A < 0 is clipped to -0.3
    ((0.9, 0.9), 1.0, 0.5, (0.0, 0.0)),
    ((-0.9, -0.9), -1.0, -0.3, (0.0, 0.0)),
]


@pytest.mark.parametrize(("log_ratio", "advantage", "mean", "slope"), GMPO)
@pytest.mark.parametrize("junk", [nan, 50.0])
def test_gmpo_by_hand_for_both_signs_and_both_sides(log_ratio, advantage, mean, slope, junk: float) -> None:
    old = f64([[-1.0, junk, -2.0]])
    new = old + f64([[log_ratio[0], 1.0, log_ratio[1]]])
    given, mask = f64([[advantage, 0.0, advantage]]), bits("101")

    def loss(x: Tensor) -> Tensor:
        return torch.where(mask, gmpo(x, old, given, mask, clip_low=0.3, clip_high=0.5), 0.0)

    each = -math.exp(mean) * advantage
    close(loss(new), [[each, 0.0, each]])
    # it stands on both tokens, so the gradient of the sum is twice that of one
    close(grad_of(loss, new)[0], [[2 * each * slope[0], 0.0, 2 * each * slope[1]]])


def test_gmpo_by_default_clips_at_four_tenths_and_answers_do_not_mix() -> None:
    old, mask = f64([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), bits("11", "11", "00")
    new, advantage = f64([[0.5, 0.1], [-0.5, 0.1], [9.0, 9.0]]), f64([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]])
    up, down = -math.exp((0.4 + 0.1) / 2), math.exp((-0.4 + 0.1) / 2)
    close(gmpo(new, old, advantage, mask), [[up, up], [down, down], [0.0, 0.0]])


# --- DPPO ------------------------------------------------------------------------------------------------------------

QUADRANTS = [  # old probability, new one, A, whether it is stopped at 0.15 in total variation
    (0.5, 0.7, 2.0, True),  # up and already too far up
    (0.5, 0.6, 2.0, False),  # not far enough
    (0.5, 0.3, 2.0, False),  # back up is allowed
    (0.5, 0.3, -2.0, True),  # down and already too far down
    (0.5, 0.4, -2.0, False),
    (0.5, 0.7, -2.0, False),  # back down is allowed
    (0.5, 0.7, 0.0, False),
    (0.01, 0.05, 2.0, False),  # a ratio of 5, but a small move: PPO's clip would stop it
    (0.9, 0.7, -2.0, True),  # a ratio of 0.78, but a large move
]


@pytest.mark.parametrize(("old", "new", "advantage", "stopped"), QUADRANTS)
def test_dppo_stops_what_moved_too_far_in_total_variation(old, new, advantage, stopped: bool) -> None:
    check_dppo(old, new, advantage, stopped, divergence="tv", bound=0.15)
    check_dppo(old, new, advantage, stopped)  # the default


def check_dppo(old: float, new: float, advantage: float, stopped: bool, **options: object) -> None:
    before = f64([math.log(old)])

    def loss(x: Tensor) -> Tensor:
        return dppo(token_ratio(x, before), x, before, f64([advantage]), **options)

    close(loss(f64([math.log(new)])), [-new / old * advantage])  # the value is never changed
    expected = 0.0 if stopped else -new / old * advantage
    close(grad_of(loss, f64([math.log(new)]))[0], [expected])


def two_way(old: float, new: float) -> float:
    """KL of (old, 1 - old) to (new, 1 - new) in plain Python."""
    return old * math.log(old / new) + (1 - old) * math.log((1 - old) / (1 - new))


@pytest.mark.parametrize(
    ("old", "new", "advantage"), [(0.5, 0.7, 2.0), (0.5, 0.3, -2.0), (0.01, 0.05, 2.0), (0.9, 0.7, -2.0)]
)
def test_dppo_stops_at_the_kl_of_old_to_new_of_this_token_or_any_other(old, new, advantage) -> None:
    kl = two_way(old, new)
    assert kl != pytest.approx(two_way(new, old), rel=1e-3) or old + new == 1  # the direction matters
    check_dppo(old, new, advantage, True, divergence="kl", bound=0.999 * kl)
    check_dppo(old, new, advantage, False, divergence="kl", bound=1.001 * kl)
    check_dppo(old, new, -advantage, False, divergence="kl", bound=0.999 * kl)  # the other two quadrants


def test_dppo_tells_a_certain_token_apart() -> None:
    one = f64([0.0])
    got = dppo(f64([1.0]), one, one, f64([1.0]), divergence="kl", bound=1e-9)
    close(got, [-1.0])
    check_dppo(0.5, 1.0, 1.0, True, divergence="kl", bound=10.0)  # KL is infinite; log 0 is bounded, not NaN


def test_dppo_refuses_another_divergence() -> None:
    with pytest.raises(ValueError, match='"tv" or "kl", got \'js\''):
        dppo(f64([1.0]), f64([0.0]), f64([0.0]), f64([1.0]), divergence="js")


# --- what stands around a surrogate ----------------------------------------------------------------------------------


def test_a_weight_scales_value_and_gradient_and_gets_none() -> None:
    loss, weight = f64([[3.0, -2.0]]), f64([[0.5, 0.0]])
    close(weighted(loss, weight), [[1.5, 0.0]])
    of_loss, of_weight = grad_of(lambda x, w: weighted(x, w) + 0 * w, loss, weight)
    close(of_loss, weight)
    close(of_weight, [[0.0, 0.0]])


def test_what_is_not_kept_has_its_value_but_no_gradient() -> None:
    loss, selected = f64([[3.0, -2.0, nan]]), bits("101")
    got = kept(loss, selected)
    close(got[0, :2], [3.0, -2.0])
    close(grad_of(lambda x: kept(x, selected), f64([[3.0, -2.0, 1.0]]))[0], [[1.0, 0.0, 1.0]])


def test_selected_tokens_pay_the_distance_to_the_old_policy() -> None:
    logp, old, selected = f64([[-1.0, -3.0, -1.0]]), f64([[-1.5, -2.0, -9.0]]), bits("110")
    loss = f64([[10.0, 20.0, 30.0]])
    close(kl_on(loss, logp, old, selected, coef=0.5), [[10.25, 20.5, 30.0]])  # 0.5 |0.5|, 0.5 |-1|
    close(kl_on(loss, logp, old, selected), [[10.5, 21.0, 30.0]])
    close(grad_of(lambda x: kl_on(loss, x, old, selected, coef=0.5), logp)[0], [[0.5, -0.5, 0.0]])


def test_the_entropy_bonus_is_minus_the_entropy() -> None:
    close(entropy_bonus(f64([[0.5, 2.0]])), [[-0.5, -2.0]])
    close(grad_of(entropy_bonus, f64([[0.5, 2.0]]))[0], [[-1.0, -1.0]])
