"""Preference optimization: scores of answers, and losses on the gap between two answers.

Shapes: logp, ref_logp, mask (B, T); answer scores (B,); gaps and losses (E,), in nats.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from whet.ops.masked import boolean, masked_mean, masked_sum
from whet.ops.overflow import exp, times


def answer_logp(logp: Tensor, mask: Tensor, *, mean: bool = False) -> Tensor:
    """Compute the sum (or mean) of the log-probs of an answer's trained tokens, (B,)."""
    return masked_mean(logp, mask, 1) if mean else masked_sum(logp, mask, 1)


def implicit_reward(
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    *,
    beta: float,
    mean: bool = False,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
) -> Tensor:
    """Compute beta s(u) with u = log pi(y) - log pi_ref(y), (B,).

    This is the reward for which the policy is optimal, up to a constant per prompt. s depends on the divergence (f-DPO,
    Wang et al. 2023): "reverse_kl" u, "forward_kl" -exp(-u), "js" log sigmoid(u), "alpha" exp((alpha - 1) u) / (alpha - 1).
    alpha is 1 - alpha of the paper (as in TRL): 1 is reverse_kl, and the limit 0 is forward_kl. Both exponentials overflow
    where the policy's probability of an answer is almost 0 (u below about -88 in float32); the run then stops. `mean=True`
    divides u by the answer's length. Raises ValueError for an unknown divergence.
    """
    u = answer_logp(logp - ref_logp, mask, mean=mean)
    if divergence == "reverse_kl" or (divergence == "alpha" and abs(alpha - 1) < 1e-6):
        return beta * u
    if divergence == "forward_kl":
        return -beta * exp(-u)
    if divergence == "js":
        return beta * functional.logsigmoid(u)
    if divergence == "alpha":
        return beta * exp((alpha - 1) * u) / (alpha - 1)
    raise ValueError(f"divergence {divergence!r} is none of reverse_kl, forward_kl, js, alpha")


def policy_score(logp: Tensor, mask: Tensor, *, beta: float, mean: bool = False) -> Tensor:
    """Compute beta log pi(y), (B,), with `mean` the mean per token: a score without reference (CPO; SimPO with `mean`)."""
    return beta * answer_logp(logp, mask, mean=mean)


def log_odds(logp: Tensor, mask: Tensor) -> Tensor:
    """Compute log(p / (1 - p)) with p = exp of the answer's mean log-prob, (B,) (ORPO, Hong et al. 2024, equation 4)."""
    mean = answer_logp(logp, mask, mean=True).clamp(max=-torch.finfo(logp.dtype).eps)  # the odds of p = 1 are infinite
    return mean - torch.log(-torch.expm1(mean))


def gap(score: Tensor, index: Tensor) -> Tensor:
    """Compute chosen - rejected for pairs given as rows, chosen first: score, index (B,) -> (E,)."""
    return score[index == 0] - score[index == 1]


def hard_label(gap: Tensor) -> Tensor:
    """Return 1 for each gap of scores, (E,): the answer with the higher score is the better one for certain."""
    return torch.ones_like(gap)


def bradley_terry(gap: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute sigmoid(gap / temperature), (E,): the probability that the answer with the higher score is preferred.

    gap is a difference of scores (Bradley and Terry 1952). A reward model trained with `pairwise` or `k_way` has temperature
    1; for other scores it is the difference in score at which the better answer wins with probability 0.73.

    >>> bradley_terry(torch.tensor([0.0, 2.0]), temperature=2.0)
    tensor([0.5000, 0.7311])
    """
    return torch.sigmoid(gap / temperature)


def sigmoid(
    gap: Tensor, probability: Tensor | float = 1.0, *, label_smoothing: float = 0.0, margin: float = 0.0
) -> Tensor:
    """Compute the cross-entropy of sigmoid(gap - margin) and the probability that the chosen answer is better, (E,).

    With g = gap - margin: -p log sigmoid(g) - (1 - p) log sigmoid(-g). `probability` 1 is a hard label; `label_smoothing`
    e changes p to (1 - e) p + e (1 - p) (cDPO, Mitchell 2023); `margin` is gamma of SimPO (Meng et al. 2024, equation 6).
    """
    p = probability + label_smoothing * (1 - 2 * probability)
    gap = gap - margin
    return -times(functional.logsigmoid(gap), p) - times(functional.logsigmoid(-gap), 1 - p)


def hinge(gap: Tensor) -> Tensor:
    """Compute max(0, 1 - gap), (E,) (SLiC, Zhao et al. 2023)."""
    return torch.relu(1 - gap)


def ipo(gap: Tensor, *, beta: float) -> Tensor:
    """Compute (gap / beta - 1 / (2 beta))^2, (E,); the gap includes the factor beta (IPO, Azar et al. 2023, equation 17)."""
    return (gap / beta - 0.5 / beta) ** 2


def exo_pair(gap: Tensor, *, label_smoothing: float = 1e-3) -> Tensor:
    """Compute KL(sigmoid(gap) || 1 - e) of Bernoulli distributions, e > 0 the smoothing, (E,) (EXO, Ji et al. 2024, equation 16)."""
    gap = gap.clamp(torch.finfo(gap.dtype).min, torch.finfo(gap.dtype).max)  # the limit at infinity is finite
    keep, swap = math.log1p(-label_smoothing), math.log(label_smoothing)
    better, worse = functional.logsigmoid(gap), functional.logsigmoid(-gap)
    return better.exp() * (better - keep) + worse.exp() * (worse - swap)


def nca_pair(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Compute -log sigmoid(w) - (log sigmoid(-w) + log sigmoid(-l)) / 2, (E,), for rewards w and l (NCA, Chen et al. 2024)."""
    return (
        -functional.logsigmoid(chosen) - 0.5 * functional.logsigmoid(-chosen) - 0.5 * functional.logsigmoid(-rejected)
    )


def robust(gap: Tensor, *, label_smoothing: float = 0.1) -> Tensor:
    """Compute ((1 - e) (-log sigmoid(gap)) - e (-log sigmoid(-gap))) / (1 - 2 e), (E,).

    It is unbiased if labels are flipped with probability e < 1/2 (Robust DPO, Chowdhury et al. 2024, equation 9).
    """
    e = label_smoothing
    return (-(1 - e) * functional.logsigmoid(gap) + times(functional.logsigmoid(-gap), e)) / (1 - 2 * e)


def bco_pair(chosen: Tensor, rejected: Tensor, *, delta: float = 0.0) -> Tensor:
    """Compute -log sigmoid(w - delta) - log sigmoid(delta - l), delta the running mean reward, (E,) (BCO, Jung et al. 2024)."""
    return -functional.logsigmoid(chosen - delta) - functional.logsigmoid(delta - rejected)


def sppo_hard(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Compute (w / beta - 1 / (2 beta))^2 + (l / beta + 1 / (2 beta))^2, (E,).

    The rewards include the factor beta (SPPO, Wu et al. 2024, equation 4.7 with P = 1 or 0).
    """
    return (chosen / beta - 0.5 / beta) ** 2 + (rejected / beta + 0.5 / beta) ** 2


def aot(policy_gap: Tensor, matched: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Compute `sigmoid` of the policy's gap minus the reference's gap of the same rank in the mini-batch, (E,).

    The loss makes the policy's gaps stochastically dominate those of the reference (AOT, Melnyk et al. 2024). `matched`
    is computed by `sorted_partner`.
    """
    return sigmoid(policy_gap - matched, label_smoothing=label_smoothing)


def aot_unpaired(
    chosen: Tensor, rejected: Tensor, rival: Tensor, rival_of_rejected: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Compute `sigmoid` of sorted chosen minus sorted rejected rewards of the mini-batch, (E,) (AOT unpaired, Melnyk et al. 2024).

    `rival` is the rejected reward with the rank of the chosen one; `rival_of_rejected` is the chosen reward with the rank
    of the rejected one. Both come from `sorted_rival` and have no gradient. Each answer adds its own gradient, and the
    value counts once.
    """
    up = sigmoid(chosen - rival, label_smoothing=label_smoothing)
    down = sigmoid(rival_of_rejected - rejected, label_smoothing=label_smoothing)
    return up + down - down.detach()


def apo_zero(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Compute 1 - sigmoid(w) + sigmoid(l), (E,) (APO-zero, D'Oosterlinck et al. 2024, equation 7).

    It raises the chosen answer and lowers the rejected one.
    """
    return 1 - chosen.sigmoid() + rejected.sigmoid()


def apo_down(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Compute sigmoid(w) + 1 - sigmoid(w - l), (E,) (APO-down, D'Oosterlinck et al. 2024, equation 8).

    It lowers both answers, the rejected one more.
    """
    return chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()


def discopop(gap: Tensor, *, tau: float = 0.05) -> Tensor:
    """Compute (1 - m) (-log sigmoid(gap)) + m exp(-gap), m = sigmoid(gap / tau), (E,) (DiscoPOP, Lu et al. 2024, equation 5)."""
    scaled = gap / tau
    return -(-scaled).sigmoid() * functional.logsigmoid(gap) + exp(functional.logsigmoid(scaled) - gap)


def kto(
    score: Tensor, good: Tensor, kl_baseline: Tensor, *, beta: float, desirable: float = 1.0, undesirable: float = 1.0
) -> Tensor:
    """Compute desirable (1 - sigmoid(w - beta z)) for good answers, undesirable (1 - sigmoid(beta z - w)) for bad ones, (E,).

    w is the answer's implicit reward, z = `kl_baseline` in nats, without gradient (KTO, Ethayarajh et al. 2024, equation 7).
    """
    good = boolean(good)
    edge = score - beta * kl_baseline.detach()
    return torch.where(good, desirable * (1 - edge.sigmoid()), undesirable * (1 - (-edge).sigmoid()))


def bco(score: Tensor, good: Tensor, *, delta: float = 0.0) -> Tensor:
    """Compute -log sigmoid(w - delta) for good answers, -log sigmoid(delta - w) for bad ones, (E,) (BCO, Jung et al. 2024)."""
    good = boolean(good)
    edge = score - delta
    return -functional.logsigmoid(torch.where(good, edge, -edge))


def apo_zero_unpaired(score: Tensor, good: Tensor, *, desirable: float = 1.0, undesirable: float = 1.0) -> Tensor:
    """Compute desirable (1 - sigmoid(w)) for good answers, undesirable sigmoid(w) for bad ones, (E,) (unpaired APO-zero)."""
    good = boolean(good)
    return torch.where(good, desirable * (1 - score.sigmoid()), undesirable * score.sigmoid())


def dpo(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute -log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected))), (E,) (Rafailov et al. 2023, equation 7).

    All four are sums over an answer's tokens, (E,), in nats.

    >>> dpo(*(torch.tensor([v]) for v in (-1.0, -3.0, -2.0, -2.0)), beta=0.5)
    tensor([0.3133])
    """
    gap = beta * ((chosen_logp - ref_chosen_logp) - (rejected_logp - ref_rejected_logp))
    return sigmoid(gap, label_smoothing=label_smoothing)
