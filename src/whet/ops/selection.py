"""Statistics of a whole mini-batch, computed once before each update, with the weights before it and without gradient.

Shapes: logp, advantage, mask (B, T); answer scores, index (B,). The results are columns, so each loss needs only the rows
of its own element.
"""

import torch
from torch import Tensor

from whet.ops.address import uniform
from whet.ops.masked import boolean, masked_mean


def covariance(logp: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """Compute (logp - mean logp) (A - mean A) of each token, with means over the mini-batch, (B, T).

    It measures how much an update on the token reduces the entropy (Cui et al. 2025, equation 10).
    """
    mask = boolean(mask)
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
    """Return False on a random `share` of the tokens, with a covariance between cov_low and cov_high, True on the others.

    The drawn tokens get no gradient (Clip-Cov, Cui et al. 2025, equation 12: share 2e-4). Tokens whose gradient is already 0
    by PPO's clip (`clip_low`, `clip_high`) are not drawn. If there is a candidate, at least one token is drawn. The choice
    depends only on the answer's `address` (B,) and the token's position in the answer.
    """
    mask = boolean(mask)
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
    """Return True on the `share` of tokens with the largest covariance (KL-Cov, Cui et al. 2025, equation 13).

    These tokens get a KL penalty.
    """
    mask = boolean(mask)
    cov = torch.where(mask, covariance(now_logp, advantage, mask), torch.full_like(now_logp, -torch.inf))
    count = min(int(mask.sum()), max(1, int(share * int(mask.sum()))))
    out = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
    out[torch.argsort(cov.flatten(), descending=True, stable=True)[:count]] = True
    return out.reshape(mask.shape)


def sorted_partner(score: Tensor, other: Tensor, index: Tensor) -> Tensor:
    """Match the gaps of `score` with those of `other` by rank; return the matched gap on both rows of each pair, (B,).

    score, other (B,), chosen first. Optimal transport in one dimension matches sorted values (AOT, Melnyk et al. 2024).
    """
    own, theirs = (x[index == 0] - x[index == 1] for x in (score, other))
    matched = torch.empty_like(theirs)
    matched[torch.argsort(own, stable=True)] = theirs[torch.argsort(theirs, stable=True)]
    return matched.repeat_interleave(2)


def sorted_rival(score: Tensor, index: Tensor) -> Tensor:
    """Match chosen and rejected scores by rank, (B,).

    A chosen answer of rank k among the chosen ones gets the rejected score of rank k, and a rejected answer the chosen
    score of its rank.
    """
    chosen, rejected = score[index == 0], score[index == 1]
    up, down = torch.argsort(chosen, stable=True), torch.argsort(rejected, stable=True)
    out = torch.empty_like(score)
    for side, own, theirs in ((0, up, rejected[down]), (1, down, chosen[up])):
        matched = torch.empty_like(theirs)
        matched[own] = theirs
        out[index == side] = matched
    return out


def kl_baseline(log_ratio: Tensor, index: Tensor) -> Tensor:
    """Compute max(0, mean of log pi / pi_ref over the mismatched answers), the same value on each row, (B,).

    log_ratio (B,) is the sum over an answer; index 1 marks the rows whose answer belongs to another prompt (KTO, Ethayarajh
    et al. 2024, section 4.1: z_0, an estimate of KL(policy || reference)).
    """
    wrong = log_ratio[index == 1]
    mean = wrong.mean().clamp(min=0) if len(wrong) else torch.zeros((), dtype=log_ratio.dtype)
    return mean.expand(log_ratio.shape).clone()
