"""Estimators of KL(policy || reference) on sampled tokens, the exact KL, and the controllers of its coefficient.

All numbers are nats per token unless said otherwise. With r = ref_logp - logp at a token sampled from the policy,
E[k1] = E[k3] = KL(policy || reference); k2 is biased, small and never negative (Schulman, "Approximating KL divergence", 2020).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from whet.ops.logprobs import WORKSPACE
from whet.ops.masked import masked_sum
from whet.ops.shaping import terminal


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """logp - ref_logp: unbiased, may be negative. Any equal shapes.

    >>> k1(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.5000])
    """
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """(logp - ref_logp)^2 / 2: never negative; its gradient on policy is that of KL(policy || reference)."""
    return 0.5 * (logp - ref_logp) ** 2


def k3(logp: Tensor, ref_logp: Tensor, *, bound: float | None = None) -> Tensor:
    """exp(ref_logp - logp) - 1 - (ref_logp - logp): unbiased and never negative.

    Its gradient on policy is that of KL(reference || policy). `bound` clamps the result to at most that (OpenRLHF and
    verl: 10), which stops the gradient there; None does not.
    """
    log_ratio = ref_logp - logp
    estimate = torch.expm1(log_ratio) - log_ratio
    return estimate if bound is None else estimate.clamp(max=bound)


def k3_weighted(logp: Tensor, ref_logp: Tensor, old_logp: Tensor) -> Tensor:
    """ratio x k3 with the ratio pi / pi_old undetached (DeepSeek-V3.2 2025, equation 7; TRL's form).

    On-policy its gradient is that of the token's KL(policy || reference), where k3's own is not.
    """
    return (logp - old_logp).exp() * k3(logp, ref_logp)


def k2_sequence(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """(sum_t logp - ref_logp)^2 / 2 of a whole answer, on its last trained token: (B, T).

    On-policy its gradient is that of KL(policy || reference) over whole answers, later tokens included, so under
    `sequence_sum` a KL in the loss has the optimum of a KL in the reward.
    """
    total = masked_sum(logp - ref_logp, mask, 1)
    return terminal(0.5 * total**2, mask)


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) of two full distributions given as logits: (..., V) -> (...)."""
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    gap = (logp - ref_logp).masked_fill(logp.isneginf(), 0.0)  # before it is multiplied, for the gradient's sake
    return (logp.exp() * gap).sum(-1)


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: Tensor,
    workspace: int = WORKSPACE,
) -> Tensor:
    """`exact_kl` of softmax((hidden @ weight.T + bias) / temperature) to the reference's, straight from hidden states: (N,).

    hidden (N, H), weight (V, H), bias (V,), temperature (N,); the reference's may have another H. Tokens are taken in
    chunks of at most `workspace` logits, made again in the backward pass.
    """

    def piece(states: Tensor, ref_states: Tensor, scale: Tensor) -> Tensor:
        own, other = linear(states, weight, bias), linear(ref_states, ref_weight, ref_bias)
        precise = [logits if logits.dtype == torch.float64 else logits.float() for logits in (own, other)]
        return exact_kl(precise[0] / scale[:, None], precise[1] / scale[:, None])

    chunk = max(1, workspace // weight.shape[0])
    pieces = [
        checkpoint(piece, *parts, use_reentrant=False)
        for parts in zip(hidden.split(chunk), ref_hidden.split(chunk), temperature.split(chunk), strict=True)
    ]
    return torch.cat(pieces) if pieces else hidden.new_zeros(0)


@dataclass(frozen=True)
class FixedKL:
    """A coefficient that never changes."""

    coef: float
    by = "kl"

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
    by = "kl"

    def next(self, coef: float, kl: float, sequences: int) -> float:
        """The coefficient after a rollout of `sequences` answers whose mean KL was `kl`."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return coef * (1.0 + error * sequences / self.horizon)


@dataclass(frozen=True)
class HalvingKL:
    """Halves the coefficient when kl < target / 1.5 and doubles it when kl > 1.5 target (Schulman et al. 2017, section 4)."""

    coef: float
    target: float
    by = "kl_old"

    def next(self, coef: float, kl: float, sequences: int) -> float:
        """The coefficient after updates at whose end KL(old || new) was `kl` (same unit as `target`)."""
        if kl < self.target / 1.5:
            return coef / 2
        return coef * 2 if kl > self.target * 1.5 else coef


@dataclass(frozen=True)
class AdaptiveEntropy:
    """The weight of an entropy bonus that follows a target entropy (Skywork-OR1, He et al. 2025, section 3.2.4).

    It rises by `step` after a rollout whose entropy (nats per token) was at or below the target and falls by it
    otherwise, within [0, most]. Skywork-OR1 and TRL also switch it off at once above the target; here it only falls.
    """

    coef: float
    target: float
    step: float = 0.005
    most: float = 1.0
    by = "entropy"

    def next(self, coef: float, entropy: float, sequences: int) -> float:
        """The weight after a rollout whose mean entropy per token was `entropy`."""
        return min(max(coef + (self.step if entropy <= self.target else -self.step), 0.0), self.most)


@dataclass(frozen=True)
class RunningMean:
    """coef <- decay coef + (1 - decay) measured: BCO's reward shift (Jung et al. 2024), of the mini-batches (online: the
    rollouts) before."""

    coef: float = 0.0
    decay: float = 0.9
    by = "reward"

    def next(self, coef: float, measured: float, sequences: int) -> float:
        """The mean after a mini-batch (a rollout) whose mean implicit reward was `measured`."""
        return self.decay * coef + (1 - self.decay) * measured


Controller = FixedKL | AdaptiveKL | HalvingKL | AdaptiveEntropy | RunningMean
