"""Policy losses per token: ratios, and the surrogates built on them. All are to be minimised; reduction comes later.

Shapes (B, T). Log-probs in nats; ratio = pi / pi_old on the sampled token.
"""

import torch
from torch import Tensor

from whet.ops.masked import masked_mean


def nll(logp: Tensor) -> Tensor:
    """-log pi of each token: the loss of SFT, of pre-training and of PPO's ptx term."""
    return -logp


def token_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """exp(logp - old_logp), (B, T); exactly 1 where both are equal."""
    return (logp - old_logp).exp()


def sequence_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """The geometric mean of the token ratios of an answer, on every token (GSPO, Zheng et al. 2025, equation 7)."""
    return masked_mean(logp - old_logp, mask, 1).exp()[:, None].expand(mask.shape)


def clip(ratio: Tensor, advantage: Tensor, *, low: float = 0.2, high: float = 0.2) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A) (PPO, Schulman et al. 2017, equation 7; DAPO: high > low).

    >>> clip(torch.tensor([1.5]), torch.tensor([1.0]))
    tensor([-1.2000])
    """
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def dual_clip(ratio: Tensor, advantage: Tensor, *, low: float = 0.2, high: float = 0.2, bound: float = 3.0) -> Tensor:
    """PPO's clip, and for A < 0 never above -bound A (Ye et al. 2020, equation 5); bound > 1."""
    clipped = clip(ratio, advantage, low=low, high=high)
    return torch.where(advantage < 0, torch.minimum(clipped, -bound * advantage), clipped)


def unclipped(ratio: Tensor, advantage: Tensor) -> Tensor:
    """-ratio A: the surrogate of TRPO (Schulman et al. 2015, equation 14) without its constraint."""
    return -ratio * advantage


def kl_penalised(logp: Tensor, old_logp: Tensor, advantage: Tensor, *, beta: float) -> Tensor:
    """-ratio A + beta KL(old || new) (PPO-KL, Schulman et al. 2017, equation 8).

    The tokens were sampled from the old policy, so ratio - 1 - log ratio estimates KL(old || new) without bias, in its
    gradient too, and is never negative.
    """
    log_ratio = logp - old_logp
    return -log_ratio.exp() * advantage + beta * (torch.expm1(log_ratio) - log_ratio)


def reinforce(logp: Tensor, advantage: Tensor) -> Tensor:
    """-A log pi (Williams 1992): the plain policy gradient; one update a rollout, there is no ratio to correct for more."""
    return -advantage * logp


def cispo(logp: Tensor, ratio: Tensor, advantage: Tensor, *, low: float = 1.0, high: float = 0.28) -> Tensor:
    """-stop_gradient(clip(ratio, 1 - low, 1 + high)) A log pi (MiniMax-M1 2025): no token's gradient is cut off."""
    return -ratio.detach().clamp(1 - low, 1 + high) * advantage * logp
