"""Every loss and estimator far from where e^x is a number: value and gradient against arithmetic without a largest number.

The references are written out in mpmath, and its derivatives are numerical, with 60 digits. What is larger than the largest
float is infinite there too; nothing is NaN, and what does not depend on an overflowing ratio has gradient 0.
"""

from collections.abc import Callable
from typing import Any

import mpmath as mp
import pytest
import torch
from torch import Tensor

from whet import ops
from whet.ops.overflow import exp, expm1, times

from .helpers import grad_of, inf

mp.mp.dps = 60
FAR = [-1000.0, -100.0, -1.5, 0.05, 1.5, 100.0, 1000.0]
MASK = torch.ones(1, 1, dtype=torch.bool)
RATIOS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": ops.token_ratio,
    "sequence": lambda logp, old: ops.sequence_ratio(logp, old, MASK),
    "product": lambda logp, old: ops.product_ratio(logp, old, MASK),
    "sequence_token": lambda logp, old: ops.sequence_token_ratio(logp, old, MASK),
}


def sigmoid(x: Any) -> Any:
    return 1 / (1 + mp.exp(-x))


def logsigmoid(x: Any) -> Any:
    return -mp.log1p(mp.exp(-x)) if x > -2000 else x


def clipped(r: Any, a: Any) -> Any:
    return -min(r * a, min(max(r, mp.mpf("0.8")), mp.mpf("1.2")) * a)


def number(value: Any, dtype: torch.dtype) -> float:
    """An mpmath number as the nearest float, infinite beyond the largest."""
    largest = mp.mpf(torch.finfo(dtype).max)
    return float(value) if abs(value) <= largest else inf * float(mp.sign(value))


def check(
    function: Callable[[Tensor], Tensor],
    reference: Callable[[Any], Any],
    x: float,
    dtype: torch.dtype,
    slope: Any = None,
) -> None:
    """`slope` is the gradient where it is not the derivative, since a part of the loss is detached."""
    point = torch.tensor([[x]], dtype=dtype)
    exact = mp.mpf(float(point))
    value, gradient = function(point), grad_of(function, point)[0]
    derivative = mp.diff(reference, exact) if slope is None else slope(exact)
    within = {"rel": 3e-6 if dtype == torch.float32 else 1e-11, "abs": 1e-6 if dtype == torch.float32 else 1e-13}
    assert float(value) == pytest.approx(number(reference(exact), dtype), **within)
    assert float(gradient) == pytest.approx(number(derivative, dtype), **within)


def far(dtype: Any = (torch.float32, torch.float64)) -> Callable[[Any], Any]:
    def on(test: Any) -> Any:
        return pytest.mark.parametrize("x", FAR)(pytest.mark.parametrize("dtype", dtype, ids=str)(test))

    return on


# --- policy losses: x is the log-ratio --------------------------------------------------------------------------------

SURROGATES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Any, Any], Any]]] = {
    "clip": (ops.clip, clipped),
    "dual_clip": (ops.dual_clip, lambda r, a: min(clipped(r, a), -3 * a) if a < 0 else clipped(r, a)),
    "unclipped": (ops.unclipped, lambda r, a: -r * a),
    "sapo": (
        ops.sapo,
        lambda r, a: -4 / (tau := mp.mpf(1.0 if a > 0 else 1.05)) * sigmoid(tau * (r - 1)) * a,
    ),
}


@far()
@pytest.mark.parametrize("advantage", [1.5, -1.5, 0.0])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", SURROGATES)
def test_a_surrogate_of_any_ratio(name: str, ratio: str, advantage: float, dtype: torch.dtype, x: float) -> None:
    ours, reference = SURROGATES[name]
    a = torch.tensor([[advantage]], dtype=dtype)
    check(lambda t: ours(RATIOS[ratio](t, torch.zeros_like(t)), a), lambda t: reference(mp.exp(t), advantage), x, dtype)


@far()
@pytest.mark.parametrize("advantage", [1.5, -1.5, 0.0])
def test_the_other_policy_losses(advantage: float, dtype: torch.dtype, x: float) -> None:
    a = torch.tensor([[advantage]], dtype=dtype)

    def zero(t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    for beta in (0.5, 1.5):  # with beta = A the exponentials cancel
        check(
            lambda t, beta=beta: ops.kl_penalized(t, zero(t), a, beta=beta),
            lambda t, beta=beta: (beta - advantage) * mp.exp(t) - beta - beta * t,
            x, dtype,
        )  # fmt: skip
    bounded = {1: lambda t: min(t, mp.mpf("0.4")), -1: lambda t: max(t, -mp.mpf("0.4")), 0: lambda t: t}
    side = (advantage > 0) - (advantage < 0)
    check(lambda t: ops.gmpo(t, zero(t), a, MASK), lambda t: -mp.exp(bounded[side](t)) * advantage, x, dtype)
    weight = mp.exp(min(mp.mpf(x), mp.log(mp.mpf("1.28"))))
    check(
        lambda t: ops.cispo(t, ops.token_ratio(t, zero(t)), a),
        lambda t: -weight * advantage * t,
        x, dtype,
    )  # fmt: skip
    # an excluded token's loss counts 0 times, however large it is
    check(lambda t: ops.weighted(ops.unclipped(ops.token_ratio(t, zero(t)), a), zero(t)), lambda t: 0 * t, x, dtype)


@far()
@pytest.mark.parametrize("advantage", [1.5, -1.5, 0.0])
def test_dppo_stops_the_gradient_and_not_the_value(advantage: float, dtype: torch.dtype, x: float) -> None:
    old = torch.tensor([[min(0.0, -x) - 0.5]], dtype=dtype)  # both are log-probs, below 0
    a, start = torch.tensor([[advantage]], dtype=dtype), mp.mpf(float(old))

    def slope(t: Any) -> Any:
        r = mp.exp(t - start)
        away = (advantage > 0 and r > 1) or (advantage < 0 and r < 1)
        return 0 if away and abs(mp.exp(t) - mp.exp(start)) > 0.15 else -r * advantage

    check(
        lambda t: ops.dppo(ops.token_ratio(t, old), t, old, a),
        lambda t: -mp.exp(t - start) * advantage,
        float(old) + x, dtype, slope,
    )  # fmt: skip


# --- KL estimators: x is ref_logp - logp, so the gradient for logp has the other sign ---------------------------------


@far()
def test_the_estimators_of_the_kl(dtype: torch.dtype, x: float) -> None:
    def k3(t: Any) -> Any:
        return mp.expm1(-t) + t

    zero = torch.zeros(1, 1, dtype=dtype)
    check(lambda t: ops.k1(t, zero), lambda t: t, x, dtype)
    check(lambda t: ops.k2(t, zero), lambda t: t**2 / 2, x, dtype)
    check(lambda t: ops.k3(t, zero), k3, x, dtype)
    check(lambda t: ops.k3(t, zero, bound=10.0), lambda t: min(k3(t), mp.mpf(10)), x, dtype)
    check(lambda t: ops.k2_sequence(t, zero, MASK), lambda t: t**2 / 2, x, dtype)


@far()
@pytest.mark.parametrize("gap", [-1000.0, -30.0, 0.0, 0.5, 2.0, 15.0, 50.0, 1000.0])
def test_the_weighted_k3(gap: float, dtype: torch.dtype, x: float) -> None:
    """Both far: the policy from the old one by x, the reference from the policy by `gap`."""
    ref, old = torch.tensor([[x + gap]], dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    point = mp.mpf(float(ref))
    check(
        lambda t: ops.k3_weighted(t, ref, old),
        lambda t: mp.exp(t) * (mp.expm1(point - t) - (point - t)),
        x, dtype, lambda t: -mp.exp(t) * (point - t),
    )  # fmt: skip
    at = torch.tensor([[x]], dtype=dtype)
    here = mp.mpf(float(at))
    check(
        lambda t: ops.k3_weighted(at, t, old),
        lambda t: mp.exp(here) * (mp.expm1(t - here) - (t - here)),
        x + gap, dtype, lambda t: mp.exp(here) * mp.expm1(t - here),
    )  # fmt: skip


# --- importance corrections: values without gradient ------------------------------------------------------------------


@far()
def test_corrections_are_finite(dtype: torch.dtype, x: float) -> None:
    old, sampler = torch.tensor([[x]], dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    ratio = mp.exp(mp.mpf(float(old)))
    within = 1e-6 if dtype == torch.float32 else 1e-12
    for weight in (ops.token_weight, ops.sequence_weight):
        assert float(weight(old, sampler, MASK)) == pytest.approx(float(min(ratio, mp.mpf(2))), rel=within)
    for mask, high in ((ops.token_mask, 5), (ops.sequence_mask, 2)):
        inside = float(ratio) if 0.5 <= ratio <= high else 0.0
        assert float(mask(old, sampler, MASK)) == pytest.approx(inside, rel=within)
    assert float(ops.geometric_mask(old, sampler, MASK)) == float(0.99 <= ratio <= 1.01)


# --- preference losses: x is the gap, or the reward of one answer -----------------------------------------------------

ONE, ZERO = mp.mpf(1), mp.mpf(0)
GAPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Any], Any]]] = {
    "sigmoid": (ops.sigmoid, lambda g: -logsigmoid(g)),
    "sigmoid soft": (
        lambda g: ops.sigmoid(g, 0.75, margin=0.5),
        lambda g: -0.75 * logsigmoid(g - 0.5) - 0.25 * logsigmoid(0.5 - g),
    ),
    "sigmoid wrong": (lambda g: ops.sigmoid(g, torch.zeros_like(g)), lambda g: -logsigmoid(-g)),
    "hinge": (ops.hinge, lambda g: max(ZERO, 1 - g)),
    "ipo": (lambda g: ops.ipo(g, beta=0.5), lambda g: (g / 0.5 - 1) ** 2),
    "exo_pair": (
        lambda g: ops.exo_pair(g, label_smoothing=0.125),
        lambda g: sigmoid(g) * (logsigmoid(g) - mp.log(0.875)) + sigmoid(-g) * (logsigmoid(-g) - mp.log(0.125)),
    ),
    "robust": (
        lambda g: ops.robust(g, label_smoothing=0.125),
        lambda g: (-0.875 * logsigmoid(g) + 0.125 * logsigmoid(-g)) / 0.75,
    ),
    "robust without noise": (lambda g: ops.robust(g, label_smoothing=0.0), lambda g: -logsigmoid(g)),
    "discopop": (
        lambda g: ops.discopop(g, tau=0.125),
        lambda g: -sigmoid(-g / 0.125) * logsigmoid(g) + mp.exp(logsigmoid(g / 0.125) - g),
    ),
    "nca_pair": (
        lambda w: ops.nca_pair(w, torch.zeros_like(w)),
        lambda w: -logsigmoid(w) - logsigmoid(-w) / 2 + mp.log(2) / 2,
    ),
    "bco_pair": (
        lambda w: ops.bco_pair(w, -w, delta=0.5),
        lambda w: -logsigmoid(w - 0.5) - logsigmoid(0.5 + w),
    ),
    "sppo_hard": (
        lambda w: ops.sppo_hard(w, -w, beta=0.5),
        lambda w: (w / 0.5 - 1) ** 2 + (1 - w / 0.5) ** 2,
    ),
    "apo_zero": (lambda w: ops.apo_zero(w, -w), lambda w: 1 - sigmoid(w) + sigmoid(-w)),
    "apo_down": (lambda w: ops.apo_down(w, -w), lambda w: sigmoid(w) + 1 - sigmoid(2 * w)),
    "kto": (
        lambda w: ops.kto(w, torch.ones_like(w).bool(), torch.ones_like(w), beta=0.5),
        lambda w: 1 - sigmoid(w - 0.5),
    ),
    "bco": (lambda w: ops.bco(w, torch.zeros_like(w).bool()), lambda w: -logsigmoid(-w)),
    "aot": (lambda g: ops.aot(g, torch.zeros_like(g)), lambda g: -logsigmoid(g)),
    "apo_zero_unpaired": (
        lambda w: ops.apo_zero_unpaired(w, torch.zeros_like(w).bool()),
        lambda w: sigmoid(w),
    ),
    "pairwise": (lambda s: ops.pairwise(s, torch.zeros_like(s), 0.5), lambda s: -logsigmoid(s - 0.5)),
    "log_exp": (lambda s: ops.log_exp(s, torch.zeros_like(s)), lambda s: -logsigmoid(s)),
    "k_way": (
        lambda s: ops.k_way(torch.cat([s, torch.zeros_like(s)], 1), torch.tensor([[1, 2]])),
        lambda s: -logsigmoid(s),
    ),
    "step_loss": (
        lambda s: ops.step_loss(s, torch.full_like(s, 0.25)),
        lambda s: -0.25 * logsigmoid(s) - 0.75 * logsigmoid(-s),
    ),
}


@far()
@pytest.mark.parametrize("name", GAPS)
def test_a_loss_on_a_gap_or_a_reward(name: str, dtype: torch.dtype, x: float) -> None:
    check(*GAPS[name], x, dtype)


@far()
def test_implicit_rewards(dtype: torch.dtype, x: float) -> None:
    references = {
        "reverse_kl": lambda u: u / 2,
        "forward_kl": lambda u: -mp.exp(-u) / 2,
        "js": lambda u: logsigmoid(u) / 2,
        "alpha": lambda u: -mp.exp(-u / 2),
    }
    for divergence, reference in references.items():
        check(
            lambda u, one=divergence: ops.implicit_reward(u, torch.zeros_like(u), MASK, beta=0.5, divergence=one),
            reference, x, dtype,
        )  # fmt: skip
    check(lambda t: ops.log_odds(-t.abs(), MASK), lambda t: -abs(t) - mp.log(-mp.expm1(-abs(t))), x, dtype)


@far()
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid soft", "hinge", "exo_pair", "robust without noise", "discopop"])
def test_a_gap_that_overflows_by_itself(name: str, dtype: torch.dtype, x: float) -> None:
    """With the forward_kl divergence the gap is an exponential: of an answer that is rejected, and has become impossible, +inf."""
    ours, reference = GAPS[name]

    def gap(u: Tensor) -> Tensor:
        return -ops.implicit_reward(u, torch.zeros_like(u), MASK, beta=0.5, divergence="forward_kl")

    exact = mp.exp(-mp.mpf(float(torch.tensor(x, dtype=dtype)))) / 2

    def slope(u: Any) -> Any:
        return mp.diff(reference, exact) * -exact if exact < 10**6 else (0 if name != "sigmoid soft" else -0.25 * exact)

    check(lambda u: ours(gap(u)), lambda u: reference(mp.exp(-u) / 2), x, dtype, slope)


# --- the primitives ---------------------------------------------------------------------------------------------------


@far()
def test_exponentials_are_torchs_with_a_gradient_of_zero_where_nothing_depends_on_them(
    dtype: torch.dtype, x: float
) -> None:
    check(exp, mp.exp, x, dtype)
    check(expm1, mp.expm1, x, dtype)
    for function in (exp, expm1):
        point = torch.tensor([[x]], dtype=dtype)
        assert grad_of(lambda t, f=function: torch.zeros_like(t) * 0 + f(t).clamp(max=-2.0), point)[0].tolist() == [[0]]


def test_a_product_with_zero_is_zero() -> None:
    assert times(torch.tensor([inf, -inf, 2.0]), torch.tensor([0.0, -1.0, 3.0])).tolist() == [0, inf, 6]
    assert times(torch.tensor([inf, 2.0]), 0.0).tolist() == [0, 0]
    assert grad_of(lambda t: times(t, torch.tensor([0.0, -1.0])), torch.tensor([inf, 2.0]))[0].tolist() == [0, -1]
