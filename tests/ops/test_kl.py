"""KL estimators enumerated over a small vocabulary, the exact KL, and the controllers by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy.special import rel_entr
from torch import Tensor

from whet.ops import (
    AdaptiveEntropy,
    AdaptiveKL,
    FixedKL,
    HalvingKL,
    RunningMean,
    exact_kl,
    k1,
    k2,
    k2_sequence,
    k3,
    k3_weighted,
    linear_kl,
)

from .helpers import bits, close, f64, grad_of, inf, nan

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


# --- the other estimators --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [None, 0.2, 10.0])
def test_a_bound_clamps_k3_and_stops_its_gradient(bound: float | None) -> None:
    # ref - new: 0.5, -0.5, 3: e^x - 1 - x
    raw = [math.exp(0.5) - 1.5, math.exp(-0.5) - 0.5, math.exp(3) - 4]
    slope = [1 - math.exp(0.5), 1 - math.exp(-0.5), 1 - math.exp(3)]
    logp, ref_logp = f64([-1.0, -1.0, -4.0]), f64([-0.5, -1.5, -1.0])
    close(k3(logp, ref_logp, bound=bound), [x if bound is None else min(x, bound) for x in raw])
    grad = grad_of(lambda x: k3(x, ref_logp, bound=bound), logp)[0]
    close(grad, [0.0 if bound is not None and x > bound else d for x, d in zip(raw, slope, strict=True)])


@pytest.mark.parametrize("old", [-1.0, -1.3])
def test_k3_weighted_by_hand(old: float) -> None:
    # rho (r - 1 - log r): rho = e^(-1 - old), log r = 0.5; slope rho (r - 1 - log r) + rho (1 - r) = -rho log r
    rho, value = math.exp(-1.0 - old), math.exp(0.5) - 1.5
    given = f64([-1.0]), f64([-0.5]), f64([old])
    close(k3_weighted(*given), [rho * value])
    close(grad_of(lambda x: k3_weighted(x, *given[1:]), given[0])[0], [-0.5 * rho])


def test_on_policy_the_expected_gradient_of_k3_weighted_is_that_of_policy_to_reference() -> None:
    p, q = f64(P), f64(Q)

    def weighted(logp: Tensor, ref_logp: Tensor) -> Tensor:
        return k3_weighted(logp, ref_logp, POLICY)

    close(enumerated_gradient(weighted, POLICY + 3), p * ((p / q).log() - kl(P, Q)))


def test_off_policy_k3_weighted_still_estimates_the_kl_of_the_policy_and_its_gradient() -> None:
    """Tokens from an older policy, all of them: E_old[rho k3] = KL(p || q), in gradient too."""
    old, p, q = f64([0.25, 0.25, 0.3, 0.2]), f64(P), f64(Q)

    def expected(logits: Tensor) -> Tensor:
        return (old * k3_weighted(logits.log_softmax(-1), REFERENCE, old.log())).sum()

    close(expected(POLICY), kl(P, Q))
    close(grad_of(expected, POLICY - 2)[0], p * ((p / q).log() - kl(P, Q)))


@pytest.mark.parametrize("junk", [nan, 1e3])
def test_k2_sequence_by_hand_on_the_last_trained_token(junk: float) -> None:
    # differences 1 0 . -4 (sum -3), none, 0.5 0 (sum 0.5)
    logp = f64([[-1.0, -2.0, junk, -6.0], [junk] * 4, [junk, -0.5, -1.5, junk]])
    ref = f64([[-2.0, -2.0, junk, -2.0], [junk] * 4, [junk, -1.0, -1.5, junk]])
    mask = bits("1101", "0000", "0110")
    close(k2_sequence(logp, ref, mask), [[0, 0, 0, 4.5], [0.0] * 4, [0, 0, 0.125, 0]])
    grad = grad_of(lambda x: k2_sequence(x, ref, mask), logp)[0]
    slope = mask * f64([-3.0, 0.0, 0.5])[:, None]  # the sum, on every token of the answer
    close(grad, slope)
    close(grad_of(lambda x: k2_sequence(logp, x, mask), ref)[0], -slope)


def test_on_policy_k2_sequence_has_the_gradient_of_the_kl_over_whole_answers() -> None:
    """Two tokens of three, the second depends on the first: all nine answers."""
    noise = torch.Generator().manual_seed(0)
    first, ref_first = torch.randn(2, 3, dtype=torch.float64, generator=noise)
    second, ref_second = torch.randn(2, 3, 3, dtype=torch.float64, generator=noise)

    def answers(first: Tensor, second: Tensor) -> Tensor:
        """The log-probs of both tokens of every answer: (9, 2)."""
        a, b = first.log_softmax(-1), second.log_softmax(-1)
        return torch.stack([a[:, None].expand(3, 3), b], -1).reshape(9, 2)

    reference, mask = answers(ref_first, ref_second), torch.ones(9, 2, dtype=torch.bool)

    def estimated(first: Tensor, second: Tensor) -> Tensor:
        logp = answers(first, second)
        return logp.sum(1).exp().detach() @ k2_sequence(logp, reference, mask).sum(1)

    def exact(first: Tensor, second: Tensor) -> Tensor:
        total = answers(first, second).sum(1)
        return (total.exp() * (total - reference.sum(1))).sum()

    for one, other in zip(grad_of(estimated, first, second), grad_of(exact, first, second), strict=True):
        close(one, other)
    # k2 token by token has another one: it does not see what a first token does to the second
    per_token = grad_of(
        lambda a, b: answers(a, b).sum(1).exp().detach() @ k2(answers(a, b), reference).sum(1), first, second
    )
    assert (per_token[0] - grad_of(exact, first, second)[0]).abs().max() > 0.01


# --- the exact KL from hidden states ---------------------------------------------------------------------------------


def heads(n: int = 7, v: int = 5) -> list[Tensor]:
    """hidden (N, 3), weight (V, 3), hidden (N, 2) and weight (V, 2) of the reference, both biases (V,)."""
    noise = torch.Generator().manual_seed(0)
    shapes = [(n, 3), (v, 3), (n, 2), (v, 2), (v,), (v,)]
    return [torch.randn(*shape, dtype=torch.float64, generator=noise) for shape in shapes]


@pytest.mark.parametrize("workspace", [1, 5, 10, 14, 35, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_kl_is_exact_kl_in_value_and_gradient_however_it_is_chunked(workspace: int, with_bias: bool) -> None:
    temperature = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)

    def ours(h: Tensor, w: Tensor, rh: Tensor, rw: Tensor, b: Tensor, rb: Tensor) -> Tensor:
        given = {"bias": b, "ref_bias": rb} if with_bias else {}
        return (
            weights * linear_kl(h, w, rh, rw, **given, temperature=temperature, workspace=workspace)
            + 0 * (b + rb).sum()
        )

    def theirs(h: Tensor, w: Tensor, rh: Tensor, rw: Tensor, b: Tensor, rb: Tensor) -> Tensor:
        on = 1 if with_bias else 0
        return weights * exact_kl(
            (h @ w.T + on * b) / temperature[:, None], (rh @ rw.T + on * rb) / temperature[:, None]
        )

    close(ours(*heads()), theirs(*heads()))
    for one, other in zip(grad_of(ours, *heads()), grad_of(theirs, *heads()), strict=True):
        close(one, other)


@pytest.mark.parametrize("workspace", [1, 30, 1000])
@pytest.mark.parametrize("trained", [(0,), (1,), (0, 1, 4), (0, 2), (3,), (5,), (2, 3, 5)])
def test_linear_kl_computes_the_gradients_that_are_needed_and_again(workspace: int, trained: tuple[int, ...]) -> None:
    inputs = [x.requires_grad_(n in trained) for n, x in enumerate(heads())]
    h, w, rh, rw, b, rb = inputs
    wanted = [x for x in inputs if x.requires_grad]
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
    ours = (weights * linear_kl(h, w, rh, rw, bias=b, ref_bias=rb, workspace=workspace)).sum()
    theirs = (weights * exact_kl(h @ w.T + b, rh @ rw.T + rb)).sum()
    first, second = (torch.autograd.grad(ours, wanted, retain_graph=True) for _ in "12")
    for one, two, other in zip(first, second, torch.autograd.grad(theirs, wanted), strict=True):
        assert torch.equal(one, two)
        close(one, other)


def test_linear_kl_with_a_token_ruled_out_in_both() -> None:
    out = f64([0.0, -inf, 0.0, 0.0, 0.0])
    h, w, rh, rw, _, _ = heads()
    got = linear_kl(h.requires_grad_(), w, rh, rw, bias=out, ref_bias=out)
    kept = [0, 2, 3, 4]
    expected = exact_kl(h @ w[kept].T, rh @ rw[kept].T)
    close(got.detach(), expected.detach())
    close(*(torch.autograd.grad(one.sum(), h)[0] for one in (got, expected)))


def test_linear_kl_by_hand() -> None:
    # one hidden number 1, so the logits are the weights: p and q
    one = f64([[1.0]])
    for scale in (1.0, 2.0):
        got = linear_kl(one, scale * POLICY[:, None], one, scale * REFERENCE[:, None], temperature=f64([scale]))
        close(got, [kl(P, Q)])
    assert linear_kl(one[:0], POLICY[:, None], one[:0], REFERENCE[:, None], temperature=f64([])).shape == (0,)


def test_linear_kl_of_half_precision_is_summed_in_float32() -> None:
    hidden, weight, ref_hidden, ref_weight, *_ = (x.bfloat16() for x in heads())
    temperature = torch.ones(7)
    got = linear_kl(hidden, weight, ref_hidden, ref_weight, temperature=temperature, workspace=10)
    own, other = torch.nn.functional.linear(hidden, weight), torch.nn.functional.linear(ref_hidden, ref_weight)
    close(got, exact_kl(own.double(), other.double()).float(), within=1e-5)


# --- the other controllers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coef", "entropy", "after"),
    [
        (0.5, 0.19, 0.75),  # below the target: up by a step
        (0.5, 0.2, 0.75),  # at the target
        (0.5, 0.21, 0.25),  # above
        (0.9, 0.0, 1.0),  # no further than the most
        (0.1, 9.0, 0.0),  # no further than 0
        (0.0, 9.0, 0.0),
        (1.0, 0.0, 1.0),
    ],
)
def test_the_entropy_controller_steps_up_and_down(coef: float, entropy: float, after: float) -> None:
    controller = AdaptiveEntropy(coef=0.3, target=0.2, step=0.25, most=1.0)
    assert controller.next(coef, entropy, 64) == pytest.approx(after, abs=1e-15)
    assert controller.by == "entropy"


def test_the_entropy_controller_by_default_steps_by_five_thousandths_up_to_one() -> None:
    assert AdaptiveEntropy(0.0, 0.2).next(0.5, 0.0, 1) == pytest.approx(0.505, rel=1e-12)
    assert AdaptiveEntropy(0.0, 0.2).next(0.999, 0.0, 1) == 1.0


def test_the_running_mean_keeps_nine_tenths() -> None:
    assert RunningMean().coef == 0.0
    value = 0.0
    for reward in (10.0, -4.0, 2.0):
        value = RunningMean().next(value, reward, 8)
    # 0.1 (0.81 10 - 0.9 4 + 2)
    assert value == pytest.approx(0.1 * (8.1 - 3.6 + 2), rel=1e-12)
    assert RunningMean(decay=0.5).next(4.0, 0.0, 1) == 2.0
    assert RunningMean().by == "reward"


@pytest.mark.parametrize("vocabulary", [50_000, 152_000])
def test_the_kl_over_a_real_vocabulary_is_that_of_float64(vocabulary: int) -> None:
    noise = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(24, 16, generator=noise), 0.6 * torch.randn(vocabulary, 16, generator=noise)
    weight[:24] += 0.8 * hidden  # peaked, as of a trained model
    other = hidden + 0.3 * torch.randn(24, 16, generator=noise)

    def exact(hidden: Tensor) -> Tensor:
        own, ref = hidden @ weight.double().T, other.double() @ weight.double().T
        return (own.softmax(-1) * (own.log_softmax(-1) - ref.log_softmax(-1))).sum(-1)

    def ours(hidden: Tensor) -> Tensor:
        return linear_kl(hidden, weight, other, weight, temperature=torch.ones(24), workspace=5 * vocabulary)

    expected = exact(hidden.double())
    assert float(ours(hidden).double().mean()) == pytest.approx(float(expected.mean()), rel=1e-6)
    direct = exact_kl(hidden @ weight.T, other @ weight.T)
    assert float(direct.double().mean()) == pytest.approx(float(expected.mean()), rel=1e-6)
    one, two = grad_of(ours, hidden)[0].double(), grad_of(exact, hidden.double())[0]
    assert (one - two).norm() <= 3e-6 * two.norm()
