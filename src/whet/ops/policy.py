"""Policy losses per token: probability ratios, and surrogate losses to minimize.

Shapes (B, T). Log-probs are in nats; ratio = pi / pi_old of the sampled token. The reduction is separate (`whet.ops.reduce`).
A ratio of more than e^88 is infinite in float32. A loss that does not depend on it (behind a clip, with advantage 0) is
finite there, with gradient 0; another one is infinite.
"""

import torch
from torch import Tensor

from whet.ops.masked import boolean, masked_mean, masked_sum
from whet.ops.overflow import exp, expm1, times


def nll(logp: Tensor) -> Tensor:
    """Compute -log pi of each token: the loss of SFT, of pre-training and of the ptx term of PPO."""
    return -logp


def token_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """Compute exp(logp - old_logp), (B, T); exactly 1 where both are equal."""
    return exp(logp - old_logp)


def sequence_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """Compute the geometric mean of the token ratios of an answer, on each token (GSPO, Zheng et al. 2025, equation 7)."""
    return exp(masked_mean(logp - old_logp, mask, 1))[:, None].expand(mask.shape)


def product_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """Compute the product of the token ratios of an answer, pi(y) / pi_old(y), on each token (RLOO in TRL).

    With the reduction `sequence_mean`, the loss of each answer counts once.
    """
    return exp(masked_sum(logp - old_logp, mask, 1))[:, None].expand(mask.shape)


def sequence_token_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """Return the value of `sequence_ratio`, with the gradient of the token's log-prob (GSPO-token, Zheng et al. 2025, equation 14)."""
    mean = masked_mean(logp - old_logp, mask, 1)[:, None].detach()
    return exp(mean + (logp - logp.detach()))


def clip(ratio: Tensor, advantage: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """Compute -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) (PPO, Schulman et al. 2017, equation 7).

    DAPO uses clip_high > clip_low.

    >>> clip(torch.tensor([1.5]), torch.tensor([1.0]))
    tensor([-1.2000])
    """
    # the minimum, written so that it is finite for an infinite ratio and A >= 0
    held = torch.where(advantage < 0, ratio.clamp(min=1 - clip_low), ratio.clamp(max=1 + clip_high))
    return -held * advantage


def dual_clip(
    ratio: Tensor, advantage: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2, bound: float = 3.0
) -> Tensor:
    """Compute `clip`, with the loss limited to -bound A where A < 0 (Ye et al. 2020, equation 5); bound > 1."""
    clipped = clip(ratio, advantage, clip_low=clip_low, clip_high=clip_high)
    return torch.where(advantage < 0, torch.minimum(clipped, -bound * advantage), clipped)


def unclipped(ratio: Tensor, advantage: Tensor) -> Tensor:
    """Compute -ratio A: the surrogate of TRPO (Schulman et al. 2015, equation 14) without its constraint."""
    return -times(ratio, advantage)


def kl_penalized(logp: Tensor, old_logp: Tensor, advantage: Tensor, *, beta: float) -> Tensor:
    """Compute -ratio A + beta KL(old || new) (PPO-KL, Schulman et al. 2017, equation 8).

    The tokens are samples of the old policy, so ratio - 1 - log ratio is an unbiased estimate of KL(old || new). Its
    gradient is unbiased too, and it is never negative.
    """
    log_ratio = logp - old_logp
    # the exponential stands once: infinite minus infinite is not a number
    return times(expm1(log_ratio), beta - advantage) - advantage - beta * log_ratio


def reinforce(logp: Tensor, advantage: Tensor) -> Tensor:
    """Compute -A log pi, the plain policy gradient (Williams 1992).

    It has no ratio that corrects off-policy samples, so it allows one update per rollout.
    """
    return -advantage * logp


def cispo(logp: Tensor, ratio: Tensor, advantage: Tensor, *, clip_low: float = 1.0, clip_high: float = 0.28) -> Tensor:
    """Compute -stop_gradient(clip(ratio, 1 - clip_low, 1 + clip_high)) A log pi (MiniMax-M1 2025).

    Every token keeps a gradient, because only its weight is clipped.
    """
    return -ratio.detach().clamp(1 - clip_low, 1 + clip_high) * advantage * logp


def sapo(ratio: Tensor, advantage: Tensor, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Tensor:
    """Compute -(4 / tau) sigmoid(tau (ratio - 1)) A, where the sign of A selects tau (SAPO, Gao et al. 2025, equation 6).

    It replaces the clip by a sigmoid: the slope is 1 at ratio 1 and decreases smoothly on both sides. Tokens with A = 0 add 0.
    """
    tau = torch.where(advantage > 0, ratio.new_tensor(tau_positive), ratio.new_tensor(tau_negative))
    return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage


def gmpo(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, *, clip_low: float = 0.4, clip_high: float = 0.4
) -> Tensor:
    """Compute -A x geometric mean of the clipped token ratios of an answer (GMPO, Zhao et al. 2025, equation 4), on each token.

    Each log-ratio is clipped to [-clip_low, clip_high], but only where clipping makes the objective smaller (by the sign of A).
    """
    log_ratio = logp - old_logp
    bounded = log_ratio.clamp(-clip_low, clip_high)
    kept = torch.where(advantage > 0, torch.minimum(log_ratio, bounded), torch.maximum(log_ratio, bounded))
    return -times(exp(masked_mean(kept, mask, 1))[:, None], advantage)


def dppo(
    ratio: Tensor, logp: Tensor, old_logp: Tensor, advantage: Tensor, *, divergence: str = "tv", bound: float = 0.15
) -> Tensor:
    """Compute -ratio A, with the gradient stopped at tokens that would move further beyond a divergence bound (DPPO, Qi et al. 2026).

    The divergence is between the binary distributions (this token, any other token) of both policies: "tv"
    |pi - pi_old|, "kl" KL(old || new). The gradient of a token is stopped if its divergence exceeds `bound` and the
    update would increase it (A > 0 and ratio > 1, or A < 0 and ratio < 1).
    """
    if divergence not in ("tv", "kl"):
        raise ValueError(f'divergence must be "tv" or "kl", got {divergence!r}')
    p, old = logp.detach().exp(), old_logp.exp()
    if divergence == "tv":
        distance = (p - old).abs()
    else:
        tiny = torch.finfo(p.dtype).tiny
        rest = (1 - old) * ((1 - old).clamp(min=tiny).log() - (1 - p).clamp(min=tiny).log())
        distance = old * (old_logp - logp.detach()) + rest
    away = ((advantage > 0) & (ratio > 1)) | ((advantage < 0) & (ratio < 1))
    loss = -times(ratio, advantage)
    return torch.where(away & (distance > bound), loss.detach(), loss)


def weighted(loss: Tensor, weight: Tensor) -> Tensor:
    """Compute loss x weight, (B, T): the importance correction of the loss. The weight gets no gradient."""
    return times(loss, weight.detach())


def kept(loss: Tensor, selected: Tensor) -> Tensor:
    """Return the loss, without gradient where `selected` is False (Clip-Cov)."""
    selected = boolean(selected)
    return torch.where(selected, loss, loss.detach())


def kl_on(loss: Tensor, logp: Tensor, old_logp: Tensor, selected: Tensor, *, coef: float = 1.0) -> Tensor:
    """Compute loss + coef |logp - old_logp| where `selected` is True, loss elsewhere (KL-Cov, Cui et al. 2025, equation 13)."""
    selected = boolean(selected)
    return torch.where(selected, loss + coef * (logp - old_logp).abs(), loss)


def entropy_bonus(full_entropy: Tensor) -> Tensor:
    """Compute -H, the negative entropy of each token's distribution over the whole vocabulary, in nats."""
    return -full_entropy
