"""What must look across a whole mini-batch, once before each update, at the weights of then and without gradient.

Shapes: logp, advantage, mask (B, T); answer scores, place (B,). The results are columns, so losses still look at one
element at a time.
"""

import torch
from torch import Tensor

from whet.ops.address import uniform
from whet.ops.masked import masked_mean


def covariance(logp: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """(logp - mean logp) (A - mean A) of each token, means over the mini-batch, (B, T): how much a step on it takes from
    the entropy (Cui et al. 2025, equation 10)."""
    centered = [x - masked_mean(x, mask) for x in (logp, advantage)]
    return torch.where(mask, centered[0] * centered[1], torch.zeros_like(logp))


def clip_cov(
    now_logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    address: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    share: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
) -> Tensor:
    """False on `share` of the tokens, drawn among those with a covariance between cov_low and cov_high, True on the others.

    They get no gradient (Clip-Cov, Cui et al. 2025, equation 12: share 2e-4). Tokens that PPO's clip (`clip_low`, `clip_high`)
    stops anyway are not drawn. At least one token is drawn where there is a candidate; which one is
    a function of the answer's `address` (B,) and the token's place in it.
    """
    ratio = (now_logp - old_logp).exp()
    stopped = ((ratio > 1 + clip_high) & (advantage > 0)) | ((ratio < 1 - clip_low) & (advantage < 0))
    cov = covariance(now_logp, advantage, mask)
    candidates = mask & ~stopped & (cov > cov_low) & (cov < cov_high)
    count = min(int(candidates.sum()), max(1, int(share * int(mask.sum()))))
    chance = uniform(0, address[:, None], torch.arange(mask.shape[1], device=mask.device))
    first = torch.where(candidates, chance, torch.ones_like(chance)).flatten().argsort(stable=True)[:count]
    keep = torch.ones(mask.numel(), dtype=torch.bool, device=mask.device)
    keep[first] = False
    return keep.reshape(mask.shape)


def kl_cov(now_logp: Tensor, advantage: Tensor, mask: Tensor, *, share: float = 2e-3) -> Tensor:
    """True on the `share` of tokens with the largest covariance: they pay a KL (KL-Cov, Cui et al. 2025, equation 13)."""
    cov = torch.where(mask, covariance(now_logp, advantage, mask), torch.full_like(now_logp, -torch.inf))
    count = min(int(mask.sum()), max(1, int(share * int(mask.sum()))))
    out = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
    out[torch.argsort(cov.flatten(), descending=True, stable=True)[:count]] = True
    return out.reshape(mask.shape)


def sorted_partner(score: Tensor, other: Tensor, index: Tensor) -> Tensor:
    """For pairs: the k-th largest of `other`'s gaps, where k is the rank of the pair's own gap of `score`; (B,), on both rows.

    score, other (B,), chosen first: optimal transport in one dimension matches sorted with sorted (AOT, Melnyk et al. 2024).
    """
    own, theirs = (x[index == 0] - x[index == 1] for x in (score, other))
    matched = torch.empty_like(theirs)
    matched[torch.argsort(own, stable=True)] = theirs[torch.argsort(theirs, stable=True)]
    return matched.repeat_interleave(2)


def sorted_rival(score: Tensor, index: Tensor) -> Tensor:
    """For pairs, (B,): at a chosen answer of rank k among the chosen the k-th rejected score, and the other way round."""
    chosen, rejected = score[index == 0], score[index == 1]
    up, down = torch.argsort(chosen, stable=True), torch.argsort(rejected, stable=True)
    out = torch.empty_like(score)
    for side, own, theirs in ((0, up, rejected[down]), (1, down, chosen[up])):
        matched = torch.empty_like(theirs)
        matched[own] = theirs
        out[index == side] = matched
    return out


def kl_baseline(log_ratio: Tensor, index: Tensor) -> Tensor:
    """max(0, mean of log pi / pi_ref over the mismatched answers), the same number on every row, (B,).

    log_ratio (B,) sums over an answer; place 1 marks the rows whose answer belongs to another prompt (KTO, Ethayarajh et
    al. 2024, section 4.1: z_0, an estimate of KL(policy || reference)).
    """
    wrong = log_ratio[index == 1]
    mean = wrong.mean().clamp(min=0) if len(wrong) else torch.zeros((), dtype=log_ratio.dtype)
    return mean.expand(log_ratio.shape).clone()
