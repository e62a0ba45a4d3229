"""Preference optimisation: how an answer is scored, and how a gap between two answers becomes a loss.

Shapes: logp, ref_logp, mask (B, T); answer scores (B,); gaps and losses (E,), in nats.
"""

import torch
from torch import Tensor
from torch.nn import functional

from whet.ops.masked import masked_mean, masked_sum


def answer_logp(logp: Tensor, mask: Tensor, *, mean: bool = False) -> Tensor:
    """Sum (or mean) of the log-probs of an answer's trained tokens, (B,)."""
    return masked_mean(logp, mask, 1) if mean else masked_sum(logp, mask, 1)


def implicit_reward(logp: Tensor, ref_logp: Tensor, mask: Tensor, *, beta: float, mean: bool = False) -> Tensor:
    """beta (log pi(y) - log pi_ref(y)), (B,): the reward for which the policy is optimal, up to a constant per prompt.

    `mean=True` divides both by the answer's length.
    """
    return beta * answer_logp(logp - ref_logp, mask, mean=mean)


def gap(score: Tensor, place: Tensor) -> Tensor:
    """chosen - rejected for pairs given row by row, chosen first: score, place (B,) -> (E,)."""
    return score[place == 0] - score[place == 1]


def sigmoid(gap: Tensor, probability: Tensor | float = 1.0, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of sigmoid(gap) with the probability that the chosen answer is better, (E,).

    -p log sigmoid(gap) - (1 - p) log sigmoid(-gap). `probability` 1 is a hard label; `label_smoothing` e turns p into
    (1 - e) p + e (1 - p) (cDPO, Mitchell 2023).
    """
    p = probability + label_smoothing * (1 - 2 * probability)
    return -p * functional.logsigmoid(gap) - (1 - p) * functional.logsigmoid(-gap)


def hinge(gap: Tensor) -> Tensor:
    """max(0, 1 - gap), (E,) (SLiC, Zhao et al. 2023)."""
    return torch.relu(1 - gap)


def ipo(gap: Tensor, *, beta: float) -> Tensor:
    """(gap / beta - 1 / (2 beta))^2, (E,) for a gap that already carries beta (IPO, Azar et al. 2023, equation 17)."""
    return (gap / beta - 0.5 / beta) ** 2


def dpo(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected))), (E,) (Rafailov et al. 2023, equation 7).

    All four are sums over an answer's tokens, (E,), in nats.

    >>> dpo(*(torch.tensor([v]) for v in (-1.0, -3.0, -2.0, -2.0)), beta=0.5)
    tensor([0.3133])
    """
    gap = beta * ((chosen_logp - ref_chosen_logp) - (rejected_logp - ref_rejected_logp))
    return sigmoid(gap, label_smoothing=label_smoothing)
