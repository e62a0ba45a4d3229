"""Preference losses: gaps by hand, hard, smoothed and soft labels, and the gradient in closed form."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from whet.ops import (
    answer_logp,
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    apo_zero_unpaired,
    bco,
    bco_pair,
    discopop,
    dpo,
    exo_pair,
    gap,
    hinge,
    implicit_reward,
    ipo,
    kto,
    log_odds,
    nca_pair,
    policy_score,
    robust,
    sigmoid,
    sorted_partner,
    sorted_rival,
    sppo_hard,
)

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


# --- scores ----------------------------------------------------------------------------------------------------------

U, BETA = (-3.0, 0.0, 0.5), 0.2  # the sums of the answers' log-ratios; the second answer is empty
LINKS: list[tuple[str, dict[str, Any], Callable[[float], float], Callable[[float], float]]] = [
    ("reverse_kl", {}, lambda u: u, lambda u: 1.0),
    ("forward_kl", {}, lambda u: -math.exp(-u), lambda u: math.exp(-u)),
    ("js", {}, log_sigmoid, lambda u: logistic(-u)),
    ("alpha", {}, lambda u: -2 * math.exp(-u / 2), lambda u: math.exp(-u / 2)),  # by default 1/2
    ("alpha", {"alpha": 0.25}, lambda u: -math.exp(-0.75 * u) / 0.75, lambda u: math.exp(-0.75 * u)),
    ("alpha", {"alpha": 2.0}, math.exp, math.exp),
    ("alpha", {"alpha": 1.0}, lambda u: u, lambda u: 1.0),  # the limit
    ("alpha", {"alpha": 0.0}, lambda u: -math.exp(-u), lambda u: math.exp(-u)),  # forward KL
]


@pytest.mark.parametrize(("divergence", "options", "link", "slope"), LINKS)
@pytest.mark.parametrize("mean", [False, True])
def test_each_divergence_has_its_link(divergence: str, options: dict, link: Any, slope: Any, mean: bool) -> None:
    each = [1 / 3, 0.0, 1 / 2] if mean else [1.0, 0.0, 1.0]
    u = [x * n if mean else x for x, n in zip(U, (1 / 3, 1.0, 1 / 2), strict=True)]

    def score(logp: Tensor) -> Tensor:
        return implicit_reward(logp, REF, MASK, beta=BETA, mean=mean, divergence=divergence, **options)

    close(score(LOGP), [BETA * link(x) for x in u])
    close(grad_of(score, LOGP)[0], MASK * f64([BETA * slope(x) * n for x, n in zip(u, each, strict=True)])[:, None])


@pytest.mark.parametrize(("divergence", "options", "link", "slope"), LINKS)
def test_each_link_is_the_derivative_of_its_divergence_up_to_a_constant(divergence, options, link, slope) -> None:
    """The policy that maximizes E[r] - beta D_f(pi || pi_ref) has r = beta f'(pi / pi_ref) + constant."""
    alpha = options.get("alpha", 0.5)
    f = {
        "reverse_kl": lambda t: t * math.log(t),
        "forward_kl": lambda t: -math.log(t),
        "js": lambda t: t * math.log(t) - (t + 1) * math.log((t + 1) / 2),
        "alpha": lambda t: (t**alpha - 1) / (alpha * (alpha - 1)) if alpha not in (0.0, 1.0) else t * math.log(t),
    }[divergence]
    if divergence == "alpha" and alpha == 0.0:
        f = lambda t: -math.log(t)  # noqa: E731
    prime = [(f(math.exp(u) + 1e-6) - f(math.exp(u) - 1e-6)) / 2e-6 for u in (-1.0, 0.7)]
    assert link(0.7) - link(-1.0) == pytest.approx(prime[1] - prime[0], rel=1e-7)


def test_another_divergence_is_refused() -> None:
    with pytest.raises(ValueError, match="'tv' is none of reverse_kl, forward_kl, js, alpha"):
        implicit_reward(LOGP, REF, MASK, beta=1.0, divergence="tv")


@pytest.mark.parametrize(
    ("mean", "expected", "share"), [(False, [-2.7, 0, -0.6], [1, 0, 1]), (True, [-0.9, 0, -0.3], [1 / 3, 0, 1 / 2])]
)
def test_a_policy_score_needs_no_reference(mean: bool, expected: list, share: list) -> None:
    close(policy_score(LOGP, MASK, beta=0.3, mean=mean), expected)
    slope = MASK * f64(share)[:, None] * 0.3
    close(grad_of(lambda x: policy_score(x, MASK, beta=0.3, mean=mean), LOGP)[0], slope)
    close(policy_score(LOGP, MASK, beta=1.0), [-9.0, 0.0, -2.0])


def test_log_odds_by_hand() -> None:
    # mean log-probs log 1/4 and log 2/3: odds 1/3 and 2
    logp, mask = f64([[math.log(1 / 8), nan, math.log(1 / 2)], [math.log(2 / 3), nan, nan]]), bits("101", "100")
    close(log_odds(logp, mask), [math.log(1 / 3), math.log(2)])
    # d log(p / (1 - p)) / d log p = 1 / (1 - p), over the length
    close(grad_of(lambda x: log_odds(x, mask), logp)[0], [[2 / 3, 0, 2 / 3], [3.0, 0, 0]])


def test_log_odds_keep_their_digits_for_likely_answers() -> None:
    # p = e^-x, 1 - p = x - x^2 / 2 + ...: log odds -x - log(x - x^2 / 2 + x^3 / 6)
    x = 1e-9
    close(log_odds(f64([[-x]]), bits("1")), [-x - math.log(x - x * x / 2)])


# --- losses by hand --------------------------------------------------------------------------------------------------

GAPS = (-2.0, 0.0, 0.5, 3.0)


def kl(p: float, q: float) -> float:
    """KL of (p, 1 - p) to (q, 1 - q)."""
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def exo_slope(g: float, e: float) -> float:
    """d/dg of KL(s || 1 - e): s (1 - s) (log s/(1 - s) - log (1 - e)/e)."""
    return logistic(g) * logistic(-g) * (g - math.log((1 - e) / e))


def discopop_slope(g: float, tau: float) -> float:
    m = logistic(g / tau)
    return m * (1 - m) / tau * (log_sigmoid(g) + math.exp(-g)) - (1 - m) * logistic(-g) - m * math.exp(-g)


OF_A_GAP: list[tuple[str, Callable[..., Tensor], Callable[[float], float], Callable[[float], float]]] = [
    ("margin", partial(sigmoid, margin=0.7), lambda g: -log_sigmoid(g - 0.7), lambda g: -logistic(0.7 - g)),
    (
        "margin and smoothing",
        partial(sigmoid, margin=0.7, label_smoothing=0.2),
        lambda g: -0.8 * log_sigmoid(g - 0.7) - 0.2 * log_sigmoid(0.7 - g),
        lambda g: logistic(g - 0.7) - 0.8,
    ),
    ("exo", exo_pair, lambda g: kl(logistic(g), 0.999), lambda g: exo_slope(g, 0.001)),
    (
        "exo, smoother",
        partial(exo_pair, label_smoothing=0.2),
        lambda g: kl(logistic(g), 0.8),
        lambda g: exo_slope(g, 0.2),
    ),
    (
        "robust",
        robust,
        lambda g: (-0.9 * log_sigmoid(g) + 0.1 * log_sigmoid(-g)) / 0.8,
        lambda g: (-0.9 * logistic(-g) - 0.1 * logistic(g)) / 0.8,
    ),
    ("robust, certain", partial(robust, label_smoothing=0.0), lambda g: -log_sigmoid(g), lambda g: -logistic(-g)),
    (
        "discopop",
        discopop,
        lambda g: -logistic(-g / 0.05) * log_sigmoid(g) + logistic(g / 0.05) * math.exp(-g),
        lambda g: discopop_slope(g, 0.05),
    ),
    (
        "discopop, softer",
        partial(discopop, tau=2.0),
        lambda g: -logistic(-g / 2) * log_sigmoid(g) + logistic(g / 2) * math.exp(-g),
        lambda g: discopop_slope(g, 2.0),
    ),
]


@pytest.mark.parametrize(("loss", "value", "slope"), [pytest.param(*row[1:], id=row[0]) for row in OF_A_GAP])
def test_a_loss_of_a_gap_in_value_and_slope(loss: Callable[..., Tensor], value: Any, slope: Any) -> None:
    close(loss(f64(GAPS)), [value(g) for g in GAPS], within=1e-11)
    close(grad_of(loss, f64(GAPS))[0], [slope(g) for g in GAPS], within=1e-11)


REWARDS = [(-2.0, 1.0), (0.0, 0.0), (0.5, -1.5), (3.0, 2.0)]
OF_TWO_REWARDS: list[tuple[str, Callable[..., Tensor], Callable[[float, float], tuple[float, float, float]]]] = [
    # value, slope by the chosen reward w, slope by the rejected reward r
    (
        "nca",
        nca_pair,
        lambda w, r: (
            -log_sigmoid(w) - 0.5 * log_sigmoid(-w) - 0.5 * log_sigmoid(-r),
            -logistic(-w) + 0.5 * logistic(w),
            0.5 * logistic(r),
        ),
    ),
    (
        "bco",
        partial(bco_pair, delta=0.4),
        lambda w, r: (-log_sigmoid(w - 0.4) - log_sigmoid(0.4 - r), -logistic(0.4 - w), logistic(r - 0.4)),
    ),
    ("bco, no shift", bco_pair, lambda w, r: (-log_sigmoid(w) - log_sigmoid(-r), -logistic(-w), logistic(r))),
    (
        "sppo",  # beta 1/4: targets 2 and -2 for the log-ratios 4 w and 4 r
        partial(sppo_hard, beta=0.25),
        lambda w, r: ((4 * w - 2) ** 2 + (4 * r + 2) ** 2, 8 * (4 * w - 2), 8 * (4 * r + 2)),
    ),
    (
        "apo zero",
        apo_zero,
        lambda w, r: (1 - logistic(w) + logistic(r), -logistic(w) * logistic(-w), logistic(r) * logistic(-r)),
    ),
    (
        "apo down",
        apo_down,
        lambda w, r: (
            logistic(w) + 1 - logistic(w - r),
            logistic(w) * logistic(-w) - logistic(w - r) * logistic(r - w),
            logistic(w - r) * logistic(r - w),
        ),
    ),
]


@pytest.mark.parametrize(("loss", "by_hand"), [pytest.param(*row[1:], id=row[0]) for row in OF_TWO_REWARDS])
def test_a_loss_of_two_rewards_in_value_and_slopes(loss: Callable[..., Tensor], by_hand: Any) -> None:
    chosen, rejected = f64([w for w, _ in REWARDS]), f64([x for _, x in REWARDS])
    values, up, down = zip(*(by_hand(w, x) for w, x in REWARDS), strict=True)
    close(loss(chosen, rejected), list(values))
    grads = grad_of(loss, chosen, rejected)
    close(grads[0], list(up))
    close(grads[1], list(down))


def test_where_each_loss_pushes() -> None:
    """At equal rewards of 0 the chosen goes up and the rejected down; apo down takes the chosen's down as well."""
    zero = f64([0.0])
    for loss in (nca_pair, bco_pair, partial(sppo_hard, beta=0.1), apo_zero):
        up, down = grad_of(loss, zero, zero)
        assert up < 0 < down
    for loss in (sigmoid, robust, exo_pair, hinge, partial(ipo, beta=0.1)):
        assert grad_of(loss, zero)[0] < 0
    for far in (f64([-1.0]), f64([1.0])):  # discopop is not convex: it rises at 0
        assert grad_of(discopop, far)[0] < 0 < grad_of(discopop, zero)[0]
    chosen, rejected = grad_of(apo_down, f64([0.0]), f64([-3.0]))
    assert chosen > 0
    assert rejected > 0


def test_exo_is_zero_where_the_sigmoid_of_the_gap_is_the_smoothed_label() -> None:
    best = f64([math.log(0.8 / 0.2)])
    close(exo_pair(best, label_smoothing=0.2), [0.0])
    close(grad_of(partial(exo_pair, label_smoothing=0.2), best)[0], [0.0])


@pytest.mark.parametrize("e", [0.0, 0.1, 0.4])
def test_robust_is_unbiased_under_flipped_labels(e: float) -> None:
    # (1 - e) L(g) + e L(-g) is the loss of clean labels
    g = f64(GAPS)
    noisy = (1 - e) * robust(g, label_smoothing=e) + e * robust(-g, label_smoothing=e)
    close(noisy, [-log_sigmoid(x) for x in GAPS], within=1e-11)


def test_a_smoothed_label_is_not_unbiased_but_bounded_below() -> None:
    noisy = 0.9 * sigmoid(f64([2.0]), label_smoothing=0.1) + 0.1 * sigmoid(f64([-2.0]), label_smoothing=0.1)
    assert abs(noisy.item() + log_sigmoid(2.0)) > 0.1


def test_no_loss_overflows_where_gaps_are_large() -> None:
    far = f64([-500.0, 500.0])
    e = 1e-3
    close(exo_pair(far), [-math.log(e), -math.log1p(-e)])
    close(nca_pair(far, far), [500.0, 0.0 + 250.0 + 250.0])
    close(robust(far), [0.9 * 500 / 0.8, -0.1 * 500 / 0.8])
    close(bco_pair(far, -far), [1000.0, 0.0])
    close(apo_zero(far, far), [1.0, 1.0])
    close(apo_down(far, -far), [1.0, 1.0])


# --- AOT -------------------------------------------------------------------------------------------------------------

PLACE = torch.tensor([0, 1] * 6)
NOISE = torch.Generator().manual_seed(0)
NOW, THEN = torch.randn(2, 12, dtype=torch.float64, generator=NOISE)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_aot_is_the_loss_of_sorted_gaps_minus_sorted_reference_gaps(smoothing: float) -> None:
    def ours(score: Tensor) -> Tensor:
        matched = sorted_partner(score.detach(), THEN, PLACE)[::2]
        return aot(gap(score, PLACE), matched, label_smoothing=smoothing)

    def theirs(score: Tensor) -> Tensor:
        delta = torch.sort(score[::2] - score[1::2])[0] - torch.sort(THEN[::2] - THEN[1::2])[0]
        return -(1 - smoothing) * functional.logsigmoid(delta) - smoothing * functional.logsigmoid(-delta)

    close(ours(NOW).sum(), theirs(NOW).sum())
    close(grad_of(ours, NOW)[0], grad_of(theirs, NOW)[0])
    assert grad_of(ours, NOW)[0].abs().min() > 1e-3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_aot_unpaired_is_the_loss_of_sorted_chosen_minus_sorted_rejected(smoothing: float) -> None:
    def ours(score: Tensor) -> Tensor:
        rival = sorted_rival(score.detach(), PLACE)
        return aot_unpaired(score[::2], score[1::2], rival[::2], rival[1::2], label_smoothing=smoothing)

    def theirs(score: Tensor) -> Tensor:
        delta = torch.sort(score[::2])[0] - torch.sort(score[1::2])[0]
        return -(1 - smoothing) * functional.logsigmoid(delta) - smoothing * functional.logsigmoid(-delta)

    close(ours(NOW).sum(), theirs(NOW).sum())
    close(grad_of(ours, NOW)[0], grad_of(theirs, NOW)[0])


def test_the_gradient_of_aot_does_not_depend_on_how_the_mini_batch_is_split() -> None:
    rival = sorted_rival(NOW, PLACE)

    def share(rows: slice) -> Callable[[Tensor], Tensor]:
        return lambda s: aot_unpaired(s[rows][::2], s[rows][1::2], rival[rows][::2], rival[rows][1::2])

    whole = grad_of(share(slice(0, 12)), NOW)[0]
    close(grad_of(share(slice(0, 4)), NOW)[0] + grad_of(share(slice(4, 12)), NOW)[0], whole)


# --- answers that are good or bad ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("w", "z"), [(1.0, 0.0), (1.0, 2.0), (-0.5, 4.0)])
def test_kto_for_both_labels(w: float, z: float) -> None:
    # beta 1/4, z in nats: the edge is w - z / 4
    options = {"beta": 0.25, "desirable": 1.5, "undesirable": 0.5}
    s = logistic(w - z / 4)
    both, good = f64([w, w]), torch.tensor([True, False])
    baseline = f64([z, z])
    close(kto(both, good, baseline, **options), [1.5 * (1 - s), 0.5 * s])
    of_score, of_baseline = grad_of(lambda x, y: kto(x, good, y, **options) + 0 * y, both, baseline)
    close(of_score, [-1.5 * s * (1 - s), 0.5 * s * (1 - s)])  # good up, bad down
    close(of_baseline, [0.0, 0.0])
    close(kto(both, good, baseline, beta=0.25), [1 - s, s])


@pytest.mark.parametrize("w", [-2.0, 0.0, 1.0])
def test_losses_on_single_answers_for_both_labels(w: float) -> None:
    both, good = f64([w, w]), torch.tensor([True, False])
    close(bco(both, good, delta=0.4), [-log_sigmoid(w - 0.4), -log_sigmoid(0.4 - w)])
    close(grad_of(lambda x: bco(x, good, delta=0.4), both)[0], [-logistic(0.4 - w), logistic(w - 0.4)])
    close(bco(both, good), [-log_sigmoid(w), -log_sigmoid(-w)])
    s = logistic(w)
    close(apo_zero_unpaired(both, good, desirable=1.5, undesirable=0.5), [1.5 * (1 - s), 0.5 * s])
    slope = [-1.5 * s * (1 - s), 0.5 * s * (1 - s)]
    close(grad_of(lambda x: apo_zero_unpaired(x, good, desirable=1.5, undesirable=0.5), both)[0], slope)
    close(apo_zero_unpaired(both, good), [1 - s, s])


def test_a_pair_is_a_good_and_a_bad_answer() -> None:
    chosen, rejected, good = f64([0.7]), f64([-1.2]), torch.tensor([True, False])
    both = torch.cat([chosen, rejected])
    close(bco(both, good, delta=0.3).sum(), bco_pair(chosen, rejected, delta=0.3)[0])
    close(apo_zero_unpaired(both, good).sum(), apo_zero(chosen, rejected)[0])
