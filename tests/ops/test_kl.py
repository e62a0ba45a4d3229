"""KL estimators enumerated over a small vocabulary, the exact KL, and the controllers by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy.special import rel_entr
from torch import Tensor

from whet.ops import AdaptiveKL, FixedKL, HalvingKL, exact_kl, k1, k2, k3

from .helpers import close, f64, grad_of, inf

P, Q = [0.1, 0.2, 0.3, 0.4], [0.4, 0.25, 0.25, 0.1]
POLICY, REFERENCE = f64(P).log(), f64(Q).log()


def kl(p: list[float], q: list[float]) -> float:
    """KL(p || q) in plain Python."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),  # where the policy lies 0.5 above the reference, 0.5 below it, and upon it
    [
        (k1, [0.5, -0.5, 0.0], [1.0, 1.0, 1.0]),
        (k2, [0.125, 0.125, 0.0], [0.5, -0.5, 0.0]),
        (k3, [math.exp(-0.5) - 0.5, math.exp(0.5) - 1.5, 0.0], [1 - math.exp(-0.5), 1 - math.exp(0.5), 0.0]),
    ],
)
def test_estimators_by_hand_in_value_and_slope(estimator: Callable[..., Tensor], value: list, slope: list) -> None:
    logp, ref_logp = f64([[-1.0, -1.5, -3.0]]), f64([[-1.5, -1.0, -3.0]])
    close(estimator(logp, ref_logp), [value])
    grad, ref_grad = grad_of(estimator, logp, ref_logp)
    close(grad, [slope])
    close(ref_grad, -grad)  # only the difference counts


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(estimator: Callable[..., Tensor]) -> None:
    close((f64(P) * estimator(POLICY, REFERENCE)).sum(), kl(P, Q))
    close((f64(Q) * estimator(REFERENCE, POLICY)).sum(), kl(Q, P))


def test_k2_is_half_the_mean_square_of_the_log_ratio_not_the_kl() -> None:
    expected = sum(p * math.log(p / q) ** 2 for p, q in zip(P, Q, strict=True)) / 2
    close((f64(P) * k2(POLICY, REFERENCE)).sum(), expected)
    assert abs(expected - kl(P, Q)) > 0.01


@pytest.mark.parametrize("estimator", [k2, k3])
def test_k2_and_k3_are_never_negative(estimator: Callable[..., Tensor]) -> None:
    log_ratio = torch.linspace(-12, 12, 101, dtype=torch.float64)  # beyond +-10: nothing is clamped
    assert (estimator(log_ratio, 0 * log_ratio) >= 0).all()
    close(estimator(f64([-12.0]), f64([0.0])), [{k2: 72.0, k3: math.exp(12) - 13}[estimator]])


def test_k3_keeps_its_digits_where_both_almost_agree() -> None:
    # e^x - 1 - x = x^2 / 2 + x^3 / 6 + ..., lost in float32 if e^x is rounded first
    close(k3(torch.tensor([-1e-3]), torch.tensor([0.0])), torch.tensor([0.5e-6 + 1e-9 / 6]), within=1e-3 * 0.5e-6)


def enumerated_gradient(estimator: Callable[..., Tensor], logits: Tensor) -> Tensor:
    """E over tokens of the policy of the gradient of the estimator: the weights p carry no gradient."""
    return grad_of(lambda x: x.softmax(-1).detach() * estimator(x.log_softmax(-1), REFERENCE), logits)[0]


def test_expected_gradients_k1_none_k2_of_policy_to_reference_k3_of_reference_to_policy() -> None:
    p, q = f64(P), f64(Q)
    forward = p * ((p / q).log() - kl(P, Q))  # d KL(p || q) / d logits, differentiated by hand
    backward = p - q  # d KL(q || p) / d logits
    close(enumerated_gradient(k1, POLICY + 3), 0 * p)
    close(enumerated_gradient(k2, POLICY + 3), forward)
    close(enumerated_gradient(k3, POLICY + 3), backward)


def test_exact_kl_is_kl_of_first_to_second_in_value_and_gradient() -> None:
    logits, ref_logits = torch.stack([POLICY + 5, REFERENCE]), torch.stack([REFERENCE, POLICY - 7])
    close(exact_kl(logits, ref_logits), [kl(P, Q), kl(Q, P)])
    close(exact_kl(logits, ref_logits), [rel_entr(P, Q).sum(), rel_entr(Q, P).sum()])
    p, q = f64(P), f64(Q)
    grad, ref_grad = grad_of(exact_kl, POLICY, REFERENCE)
    close(grad, p * ((p / q).log() - kl(P, Q)))
    close(ref_grad, q - p)


def test_exact_kl_of_equal_distributions_is_zero() -> None:
    close(exact_kl(POLICY.expand(2, 3, 4), POLICY + 1), [[0.0] * 3] * 2)


def test_logits_of_minus_infinity_add_nothing_to_the_exact_kl_unless_the_reference_alone_has_them() -> None:
    cut, both, full = [0.0, 0.0, -inf], [math.log(3), 0.0, -inf], [0.0, 0.0, 0.0]
    rows = f64([cut, cut, full]), f64([full, both, cut])
    # ln(1/2 / 1/3);  1/2 ln(1/2 / 3/4) + 1/2 ln(1/2 / 1/4) = 1/2 ln(4/3);  1/3 ln(1/3 / 0) = inf
    close(exact_kl(*rows), [math.log(1.5), math.log(4 / 3) / 2, inf])


def test_exact_kl_has_a_gradient_beside_a_logit_of_minus_infinity() -> None:
    grad = grad_of(lambda x: exact_kl(x, f64([math.log(3), 0.0, -inf])), f64([0.0, 0.0, -inf]))[0]
    value = math.log(4 / 3) / 2  # gradient p (log p/q - KL)
    close(grad, [0.5 * (math.log(2 / 3) - value), 0.5 * (math.log(2) - value), 0.0])


def test_the_fixed_controller_hands_back_what_it_gets() -> None:
    assert FixedKL(0.1).next(0.3, 99.0, 64) == 0.3


@pytest.mark.parametrize(
    ("measured", "coef"),
    [
        (6.0, 0.2),  # on target
        (6.6, 0.202),  # error 0.1; 0.2 (1 + 0.1 10 / 100)
        (5.4, 0.198),
        (7.2, 0.204),  # error 0.2, the bound
        (60.0, 0.204),
        (4.8, 0.196),
        (0.0, 0.196),
    ],
)
def test_the_adaptive_controller_moves_by_at_most_a_fifth_per_horizon(measured: float, coef: float) -> None:
    controller = AdaptiveKL(coef=0.1, target=6.0, horizon=100)  # the coefficient to move is the argument, not the first
    assert controller.next(0.2, measured, 10) == pytest.approx(coef, rel=1e-12)


def test_the_default_horizon_is_ten_thousand_answers() -> None:
    assert AdaptiveKL(0.1, 6.0).next(1.0, 60.0, 1000) == pytest.approx(1.02, rel=1e-12)


@pytest.mark.parametrize(
    ("measured", "coef"), [(0.0, 0.2), (1.99, 0.2), (2.0, 0.4), (3.0, 0.4), (4.5, 0.4), (4.51, 0.8), (99.0, 0.8)]
)
def test_the_halving_controller_leaves_the_band_of_one_and_a_half_alone(measured: float, coef: float) -> None:
    assert HalvingKL(coef=0.1, target=3.0).next(0.4, measured, 1) == coef
