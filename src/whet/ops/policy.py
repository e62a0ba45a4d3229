"""Policy losses per token: ratios, and the surrogates built on them. All are to be minimized; reduction comes later.

Shapes (B, T). Log-probs in nats; ratio = pi / pi_old on the sampled token.
"""

import torch
from torch import Tensor

from whet.ops.masked import masked_mean, masked_sum


def nll(logp: Tensor) -> Tensor:
    """-log pi of each token: the loss of SFT, of pre-training and of PPO's ptx term."""
    return -logp


def token_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """exp(logp - old_logp), (B, T); exactly 1 where both are equal."""
    return (logp - old_logp).exp()


def sequence_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """The geometric mean of the token ratios of an answer, on every token (GSPO, Zheng et al. 2025, equation 7)."""
    return masked_mean(logp - old_logp, mask, 1).exp()[:, None].expand(mask.shape)


def product_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """The product of the token ratios of an answer, on every token: pi(y) / pi_old(y) of the whole answer (TRL's RLOO).

    Under `sequence_mean` each answer's loss counts once.
    """
    return masked_sum(logp - old_logp, mask, 1).exp()[:, None].expand(mask.shape)


def sequence_token_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """The value of `sequence_ratio`, the gradient of each token's own log-prob (GSPO-token, Zheng et al. 2025, equation 14)."""
    return sequence_ratio(logp, old_logp, mask).detach() * (logp - logp.detach()).exp()


def clip(ratio: Tensor, advantage: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) (PPO, Schulman et al. 2017, equation 7; DAPO: clip_high > clip_low).

    >>> clip(torch.tensor([1.5]), torch.tensor([1.0]))
    tensor([-1.2000])
    """
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def dual_clip(
    ratio: Tensor, advantage: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2, bound: float = 3.0
) -> Tensor:
    """PPO's clip, and for A < 0 never above -bound A (Ye et al. 2020, equation 5); bound > 1."""
    clipped = clip(ratio, advantage, clip_low=clip_low, clip_high=clip_high)
    return torch.where(advantage < 0, torch.minimum(clipped, -bound * advantage), clipped)


def unclipped(ratio: Tensor, advantage: Tensor) -> Tensor:
    """-ratio A: the surrogate of TRPO (Schulman et al. 2015, equation 14) without its constraint."""
    return -ratio * advantage


def kl_penalized(logp: Tensor, old_logp: Tensor, advantage: Tensor, *, beta: float) -> Tensor:
    """-ratio A + beta KL(old || new) (PPO-KL, Schulman et al. 2017, equation 8).

    The tokens were sampled from the old policy, so ratio - 1 - log ratio estimates KL(old || new) without bias, in its
    gradient too, and is never negative.
    """
    log_ratio = logp - old_logp
    return -log_ratio.exp() * advantage + beta * (torch.expm1(log_ratio) - log_ratio)


def reinforce(logp: Tensor, advantage: Tensor) -> Tensor:
    """-A log pi (Williams 1992): the plain policy gradient; one update a rollout, there is no ratio to correct for more."""
    return -advantage * logp


def cispo(logp: Tensor, ratio: Tensor, advantage: Tensor, *, clip_low: float = 1.0, clip_high: float = 0.28) -> Tensor:
    """-stop_gradient(clip(ratio, 1 - clip_low, 1 + clip_high)) A log pi (MiniMax-M1 2025): no token's gradient is cut off."""
    return -ratio.detach().clamp(1 - clip_low, 1 + clip_high) * advantage * logp


def sapo(ratio: Tensor, advantage: Tensor, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Tensor:
    """-(4 / tau) sigmoid(tau (ratio - 1)) A with tau by the sign of A (SAPO, Gao et al. 2025, equation 6).

    A soft gate instead of the clip: its slope is 1 at ratio 1 and falls smoothly on either side. Tokens with A = 0 add 0.
    """
    tau = torch.where(advantage > 0, ratio.new_tensor(tau_positive), ratio.new_tensor(tau_negative))
    return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage


def gmpo(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, *, clip_low: float = 0.4, clip_high: float = 0.4
) -> Tensor:
    """-A times the geometric mean of an answer's clipped token ratios (GMPO, Zhao et al. 2025, equation 4), on every token.

    Each log-ratio is clipped to [-clip_low, clip_high], on the side where the sign of A makes clipping the smaller objective.
    """
    log_ratio = logp - old_logp
    bounded = log_ratio.clamp(-clip_low, clip_high)
    kept = torch.where(advantage > 0, torch.minimum(log_ratio, bounded), torch.maximum(log_ratio, bounded))
    return -masked_mean(kept, mask, 1).exp()[:, None] * advantage


def dppo(
    ratio: Tensor, logp: Tensor, old_logp: Tensor, advantage: Tensor, *, divergence: str = "tv", bound: float = 0.15
) -> Tensor:
    """-ratio A, without gradient on tokens that move further away beyond a divergence `bound` (DPPO, Qi et al. 2026).

    The divergence is that of the two-way distribution (this token, any other): "tv" |pi - pi_old|, "kl"
    KL(old || new). A token is stopped where A > 0 and ratio > 1, or A < 0 and ratio < 1, and its divergence exceeds the bound.
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
    loss = -ratio * advantage
    return torch.where(away & (distance > bound), loss.detach(), loss)


def weighted(loss: Tensor, weight: Tensor) -> Tensor:
    """loss x weight, (B, T): the importance correction of a token's loss; no gradient through the weight."""
    return loss * weight.detach()


def kept(loss: Tensor, selected: Tensor) -> Tensor:
    """The loss, without gradient where `selected` is False (Clip-Cov)."""
    return torch.where(selected, loss, loss.detach())


def kl_on(loss: Tensor, logp: Tensor, old_logp: Tensor, selected: Tensor, *, coef: float = 1.0) -> Tensor:
    """loss + coef |logp - old_logp| where `selected` is True (KL-Cov, Cui et al. 2025, equation 13)."""
    return torch.where(selected, loss + coef * (logp - old_logp).abs(), loss)


def entropy_bonus(full_entropy: Tensor) -> Tensor:
    """-H of each token's distribution over the whole vocabulary, in nats: a reward for staying undecided."""
    return -full_entropy
