"""Estimators of KL(policy || reference) on sampled tokens, the exact KL, and the controllers of its coefficient.

All numbers are nats per token unless said otherwise. With r = ref_logp - logp at a token sampled from the policy,
E[k1] = E[k3] = KL(policy || reference); k2 is biased, small and never negative (Schulman, "Approximating KL divergence", 2020).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """logp - ref_logp: unbiased, may be negative. Any equal shapes.

    >>> k1(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.5000])
    """
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """(logp - ref_logp)^2 / 2: never negative; its gradient on policy is that of KL(policy || reference)."""
    return 0.5 * (logp - ref_logp) ** 2


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """exp(ref_logp - logp) - 1 - (ref_logp - logp): unbiased and never negative.

    Its gradient on policy is that of KL(reference || policy). Not clamped (OpenRLHF and verl clamp to +-10).
    """
    log_ratio = ref_logp - logp
    return torch.expm1(log_ratio) - log_ratio


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) of two full distributions given as logits: (..., V) -> (...)."""
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    gap = (logp - ref_logp).masked_fill(logp.isneginf(), 0.0)  # before it is multiplied, for the gradient's sake
    return (logp.exp() * gap).sum(-1)


@dataclass(frozen=True)
class FixedKL:
    """A coefficient that never changes."""

    coef: float

    def next(self, coef: float, kl: float, sequences: int) -> float:
        """The coefficient after a rollout of `sequences` answers whose mean KL was `kl`: unchanged."""
        return coef


@dataclass(frozen=True)
class AdaptiveKL:
    """Proportional control towards `target` (Ziegler et al. 2019, section 2.2).

    e = clip(kl / target - 1, -0.2, 0.2); coef <- coef (1 + e sequences / horizon).
    `target` is in nats per answer, `horizon` in answers.
    """

    coef: float
    target: float
    horizon: int = 10_000

    def next(self, coef: float, kl: float, sequences: int) -> float:
        """The coefficient after a rollout of `sequences` answers whose mean KL was `kl`."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return coef * (1.0 + error * sequences / self.horizon)


@dataclass(frozen=True)
class HalvingKL:
    """Halves the coefficient when kl < target / 1.5 and doubles it when kl > 1.5 target (Schulman et al. 2017, section 4)."""

    coef: float
    target: float

    def next(self, coef: float, kl: float, sequences: int) -> float:
        """The coefficient after updates at whose end KL(old || new) was `kl` (same unit as `target`)."""
        if kl < self.target / 1.5:
            return coef / 2
        return coef * 2 if kl > self.target * 1.5 else coef


Controller = FixedKL | AdaptiveKL | HalvingKL
