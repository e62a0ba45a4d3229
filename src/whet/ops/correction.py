"""Importance weights that correct for the difference between the old policy of the learner and the generator's policy.

Both log-probs use the same temperature and support, in nats, (B, T). The results are weights (B, T) of the policy loss,
0 where a token is excluded. They carry no gradient.
"""

import torch
from torch import Tensor

from whet.ops.masked import boolean, masked_mean, masked_sum


def token_weight(old_logp: Tensor, sampler_logp: Tensor, mask: Tensor, *, cap: float = 2.0) -> Tensor:
    """Compute min(old / sampler, cap) per token (truncated importance sampling, Yao et al. 2025).

    >>> token_weight(torch.tensor([[0.0, -1.0]]), torch.tensor([[-1.0, -1.0]]), torch.ones(1, 2, dtype=torch.bool))
    tensor([[2., 1.]])
    """
    return _kept(_ratio(old_logp, sampler_logp, mask).clamp(max=cap), mask)


def sequence_weight(old_logp: Tensor, sampler_logp: Tensor, mask: Tensor, *, cap: float = 2.0) -> Tensor:
    """Compute min(prod_t old / sampler, cap) per answer, on each of its tokens; unbiased where the cap is not reached."""
    total = masked_sum(old_logp - sampler_logp, mask, 1).exp().clamp(max=cap)
    return _kept(total[:, None].expand(mask.shape), mask)


def token_mask(old_logp: Tensor, sampler_logp: Tensor, mask: Tensor, *, low: float = 0.5, high: float = 5.0) -> Tensor:
    """Compute old / sampler per token where it is in [low, high], 0 elsewhere (IcePop, Ling team 2025: 0.5 and 5)."""
    ratio = _ratio(old_logp, sampler_logp, mask)
    inside = (ratio >= low) & (ratio <= high)
    return _kept(torch.where(inside, ratio, torch.zeros_like(ratio)), mask)


def sequence_mask(
    old_logp: Tensor, sampler_logp: Tensor, mask: Tensor, *, low: float = 0.5, high: float = 2.0
) -> Tensor:
    """Compute prod_t old / sampler per answer where it is in [low, high], 0 elsewhere (masked importance sampling).

    Each token of an answer gets the weight of the answer.
    """
    total = masked_sum(old_logp - sampler_logp, mask, 1).exp()
    inside = (total >= low) & (total <= high)
    return _kept(torch.where(inside, total, torch.zeros_like(total))[:, None].expand(mask.shape), mask)


def geometric_mask(
    old_logp: Tensor, sampler_logp: Tensor, mask: Tensor, *, low: float = 0.99, high: float = 1.01
) -> Tensor:
    """Return 1 on answers whose geometric mean of old / sampler is in [low, high], 0 on the others (rejection, no weight)."""
    mean = masked_mean(old_logp - sampler_logp, mask, 1).exp()
    inside = (mean >= low) & (mean <= high)
    return _kept(inside.to(old_logp.dtype)[:, None].expand(mask.shape), mask)


def _ratio(old_logp: Tensor, sampler_logp: Tensor, mask: Tensor) -> Tensor:
    mask = boolean(mask)
    return torch.where(mask, old_logp - sampler_logp, torch.zeros_like(old_logp)).exp()


def _kept(weight: Tensor, mask: Tensor) -> Tensor:
    mask = boolean(mask)
    return torch.where(mask, weight, torch.zeros_like(weight)).detach()
