"""Reward shaping: combine and bound the scores of answers, and place them on tokens.

Shapes: score (B,), mask and results (B, T). Positions where the mask is False get 0, so a row without a True position is
all 0.
"""

import torch
from torch import Tensor

from whet.ops.masked import boolean, masked_mean, whiten


def weighted_sum(rewards: Tensor, *, weights: tuple[float, ...]) -> Tensor:
    """Compute sum_r weights[r] rewards[:, r]: (B, R) -> (B,)."""
    if rewards.shape[1] != len(weights):
        raise ValueError(f"{rewards.shape[1]} rewards but {len(weights)} weights")
    return rewards @ torch.tensor(weights, dtype=rewards.dtype, device=rewards.device)


def minimum(rewards: Tensor, reward_applies: Tensor | None = None, *, weights: tuple[float, ...]) -> Tensor:
    """Compute min_r weights[r] rewards[:, r]: (B, R) -> (B,): worst case of an ensemble (Coste et al. 2023).

    `reward_applies` (B, R) leaves out rewards that do not apply to an answer; without it, all apply. An answer to which
    none applies gets 0.

    >>> minimum(torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]]), weights=(2.0, 1.0))
    tensor([2.])
    """
    own = rewards * torch.tensor(weights, dtype=rewards.dtype, device=rewards.device)
    if reward_applies is None:
        return own.amin(1)
    kept = boolean(reward_applies)
    least = torch.where(kept, own, torch.full_like(own, torch.inf)).amin(1)
    return torch.where(kept.any(1), least, torch.zeros_like(least))


def lower_bound(
    rewards: Tensor, reward_applies: Tensor | None = None, *, weights: tuple[float, ...], k: float = 1.0
) -> Tensor:
    """Compute mean - k x population standard deviation of the weighted rewards: (B, R) -> (B,) (Coste et al. 2023).

    `reward_applies` is as in `minimum`.
    """
    own = rewards * torch.tensor(weights, dtype=rewards.dtype, device=rewards.device)
    if reward_applies is None or bool(boolean(reward_applies).all()):
        return own.mean(1) - k * own.std(1, correction=0)
    mean = masked_mean(own, reward_applies, 1)
    return mean - k * masked_mean((own - mean[:, None]).square(), reward_applies, 1).sqrt()


def standardize(score: Tensor, *, shift: float, scale: float) -> Tensor:
    """Compute (score - shift) / scale, (B,).

    `shift` is the mean score of the first rollout, so that the initial policy has mean score 0. `scale` is the running
    standard deviation of all scores so far.
    """
    return (score - shift) / scale


def batch_normalized(score: Tensor, *, shift_mean: bool = True, ddof: int = 1, eps: float = 1e-8) -> Tensor:
    """Compute (score - mean) / (std + eps) over all answers of a rollout, (B,); `shift_mean=False` keeps the mean."""
    return whiten(score, torch.ones_like(score, dtype=torch.bool), shift_mean=shift_mean, ddof=ddof, eps=eps)


def soft_overlong(score: Tensor, mask: Tensor, *, limit: int, buffer: int = 32) -> Tensor:
    """Subtract a length penalty from the score, (B,) (DAPO, Yu et al. 2025, equation 13).

    The penalty is 0 up to limit - buffer tokens and rises linearly to 1 at `limit`.
    """
    mask = boolean(mask)
    length = mask.sum(1).to(score.dtype)
    return score + ((limit - buffer - length) / buffer).clamp(-1, 0)


def clip_score(score: Tensor, *, bound: float = 5.0) -> Tensor:
    """Compute clip(score, -bound, bound), elementwise (DeepSpeed-Chat: bound 5)."""
    return score.clamp(-bound, bound)


def penalize(score: Tensor, truncated: Tensor, *, amount: float) -> Tensor:
    """Subtract `amount` from the score of answers cut off at the length limit, (B,)."""
    truncated = boolean(truncated)
    return score - amount * truncated.to(score.dtype)


def last_index(mask: Tensor) -> Tensor:
    """Return the last True position of each row, (B,); 0 where there is none."""
    mask = boolean(mask)
    steps = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, steps, torch.zeros_like(steps)).amax(1)


def terminal(score: Tensor, mask: Tensor) -> Tensor:
    """Place the whole score on the last trained token, 0 elsewhere.

    DeepSpeed-Chat and TRL's PPO place it one position later if the row has padding; here it is on the token itself.

    >>> terminal(torch.tensor([2.0]), torch.tensor([[True, True, False]]))
    tensor([[0., 2., 0.]])
    """
    mask = boolean(mask)
    out = torch.zeros(mask.shape, dtype=score.dtype, device=score.device)
    out.scatter_(1, last_index(mask)[:, None], score[:, None])
    return torch.where(mask, out, torch.zeros_like(out))


def uniform(score: Tensor, mask: Tensor) -> Tensor:
    """Place score / |y| on each of the |y| trained tokens; the sum is the score."""
    mask = boolean(mask)
    share = score / mask.sum(1).clamp(min=1)
    return torch.where(mask, share[:, None], torch.zeros_like(share[:, None]))


def linear(score: Tensor, mask: Tensor, *, normalized: bool = False) -> Tensor:
    """Place w_t score on each token with w_t = t / T, where t = 1 ... T counts the trained tokens.

    These weights sum to (T + 1) / 2, so a longer answer gets a larger reward; `normalized=True` makes them sum to 1.
    """
    mask = boolean(mask)
    step = mask.cumsum(1).to(score.dtype)
    length = mask.sum(1, keepdim=True).clamp(min=1).to(score.dtype)
    weight = step / (length * (length + 1) / 2 if normalized else length)
    return torch.where(mask, weight * score[:, None], torch.zeros_like(weight))


def attention(score: Tensor, attention_weight: Tensor, mask: Tensor) -> Tensor:
    """Place alpha_t score on each token; alpha (B, T) >= 0 is normalized to sum to 1 over the trained tokens."""
    mask = boolean(mask)
    kept = torch.where(mask, attention_weight, torch.zeros_like(attention_weight))
    return kept / kept.sum(1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny) * score[:, None]


def dense(token_score: Tensor, mask: Tensor) -> Tensor:
    """Return the per-token scores (B, T) unchanged on the trained tokens."""
    mask = boolean(mask)
    return torch.where(mask, token_score, torch.zeros_like(token_score))


def per_token(kl: Tensor, mask: Tensor) -> Tensor:
    """Return the KL of each trained token, (B, T), in nats."""
    mask = boolean(mask)
    return torch.where(mask, kl, torch.zeros_like(kl))


def per_sequence(kl: Tensor, mask: Tensor, *, mean: bool = True) -> Tensor:
    """Place sum_t KL_t (divided by |y| if `mean`) on the last trained token: one penalty per answer."""
    mask = boolean(mask)
    total = per_token(kl, mask).sum(1)
    return terminal(total / mask.sum(1).clamp(min=1) if mean else total, mask)
