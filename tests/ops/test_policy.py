"""Policy losses: each branch of each clip by hand, one gradient at ratio 1, and PPO-KL by enumeration."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from whet.ops import cispo, clip, dual_clip, kl_penalised, nll, reinforce, sequence_ratio, token_ratio, unclipped

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
    close(clip(f64([ratio]), f64([advantage]), low=0.2, high=0.3), [loss])
    close(grad_of(lambda r: clip(r, f64([advantage]), low=0.2, high=0.3), f64([ratio]))[0], [slope])


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), DUAL)
def test_dual_clip_by_hand_in_every_branch(ratio: float, advantage: float, loss: float, slope: float) -> None:
    dials = {"low": 0.2, "high": 0.3, "bound": 1.75}
    close(dual_clip(f64([ratio]), f64([advantage]), **dials), [loss])
    close(grad_of(lambda r: dual_clip(r, f64([advantage]), **dials), f64([ratio]))[0], [slope])


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
        return cispo(logp, token_ratio(logp, old), f64([advantage]), low=0.4, high=0.2)

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
        lambda x: clip(sequence_ratio(x, old, mask), advantage, low=3e-4, high=4e-4),  # GSPO, answers of one token
        lambda x: cispo(x, token_ratio(x, old), advantage),
        lambda x: kl_penalised(x, old, advantage, beta=3.0),
    ]
    for surrogate in surrogates:
        close(grad_of(surrogate, old)[0], -advantage)


def test_kl_penalised_by_hand() -> None:
    # ratio 2, A 3, beta 0.5: -6 + 0.5 (2 - 1 - ln 2)
    loss = kl_penalised(f64([-1.0 + math.log(2)]), f64([-1.0]), f64([3.0]), beta=0.5)
    close(loss, [-6.0 + 0.5 * (1 - math.log(2))])


def test_kl_penalised_is_minus_the_expected_gain_plus_beta_kl_of_old_to_new_by_enumeration() -> None:
    old, new, advantage, beta = f64([0.1, 0.2, 0.3, 0.4]), f64([0.4, 0.3, 0.2, 0.1]), f64([1.0, -2.0, 0.5, 3.0]), 0.7

    def expected(logits: Tensor) -> Tensor:
        return (old * kl_penalised(logits.log_softmax(-1), old.log(), advantage, beta=beta)).sum()

    gain = sum(p * a for p, a in zip(new.tolist(), advantage.tolist(), strict=True))  # E_old[ratio A]
    kl = sum(o * math.log(o / n) for o, n in zip(old.tolist(), new.tolist(), strict=True))
    close(expected(new.log()), -gain + beta * kl)
    # by hand: d gain / d l_v = p_v (A_v - gain), d KL(old || p) / d l_v = p_v - old_v
    close(grad_of(expected, new.log() + 2)[0], -new * (advantage - gain) + beta * (new - old))


def test_the_penalty_of_kl_penalised_is_never_negative_and_keeps_its_digits() -> None:
    log_ratio = torch.tensor([-1e-3, 0.0, 1e-3])
    penalty = kl_penalised(log_ratio, torch.zeros(3), torch.zeros(3), beta=1.0)
    close(penalty, torch.tensor([5e-7, 0.0, 5e-7]), within=1e-9)
