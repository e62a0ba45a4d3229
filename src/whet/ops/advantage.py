"""Advantage estimators, from rewards per token or scores per answer.

Shapes: rewards, values, mask, advantages (B, T); score, group (B,). Positions where the mask is False, such as the
tokens of a tool, are skipped: the next state of a trained token is the next *trained* token, and rewards at skipped
positions do not count.
"""

import torch
from torch import Tensor

from whet.ops.masked import boolean


def monte_carlo(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Compute the discounted return G_t = r_t + gamma G_{t+1}, (B, T); 0 outside the mask.

    >>> monte_carlo(torch.tensor([[1.0, 0.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool), gamma=0.5)
    tensor([[1.5000, 1.0000, 2.0000]])
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, gae_lambda=1.0)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    final_value: Tensor | None = None,
    *,
    gamma: float = 1.0,
    gae_lambda: float | Tensor = 0.95,
) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016, equation 16), (B, T); 0 outside the mask.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma gae_lambda A_{t+1}. After the last trained token, V is
    `final_value` (B,), or 0 when None: no reward follows the end of an answer. gae_lambda = 0 is one-step TD (more bias,
    less variance); gae_lambda = 1 is the Monte-Carlo return minus the value (no bias from V, more variance).
    `gae_lambda` may be (B,), one value per answer.
    """
    mask = boolean(mask)
    running = torch.zeros(rewards.shape[0], dtype=rewards.dtype, device=rewards.device)
    next_value = running if final_value is None else final_value
    out = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * running
        running = torch.where(here, advantage, running)
        next_value = torch.where(here, values[:, t], next_value)
        out[:, t] = torch.where(here, advantage, torch.zeros_like(advantage))
    return out


def gae_adaptive(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    final_value: Tensor | None = None,
    *,
    gamma: float = 1.0,
    alpha: float = 0.05,
) -> Tensor:
    """Compute `gae` with gae_lambda = max(0, 1 - 1 / (alpha |y|)) per answer, (B, T) (VAPO, Yue et al. 2025, equation 8)."""
    mask = boolean(mask)
    length = mask.sum(1).clamp(min=1).to(rewards.dtype)
    return gae(rewards, values, mask, final_value, gamma=gamma, gae_lambda=(1 - 1 / (alpha * length)).clamp(min=0))


def _group_sums(score: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (group index 0 ... n-1 of each row, size of its group, sum of the scores of its group), each (B,)."""
    index = torch.unique(group, return_inverse=True)[1]
    zeros = torch.zeros(int(index.max()) + 1 if index.numel() else 0, dtype=score.dtype, device=score.device)
    count = zeros.scatter_add(0, index, torch.ones_like(score))[index]
    return index, count, zeros.scatter_add(0, index, score)[index]


def group_center(score: Tensor, group: Tensor) -> Tensor:
    """Compute score - mean of its group (Dr. GRPO), (B,). The mean includes the sample; a group of one gives 0."""
    _, count, total = _group_sums(score, group)
    return score - total / count


def group_zscore(score: Tensor, group: Tensor, *, ddof: int = 1, eps: float = 1e-6) -> Tensor:
    """Compute (score - mean) / (std + eps) within each group (GRPO, Shao et al. 2024, section 4.1.2), (B,).

    `ddof` 1 is the sample standard deviation, as in TRL, verl and OpenRLHF. eps is added after the square root
    (TRL 1e-4, verl 1e-6, OpenRLHF 1e-9). A group of one, or a group of equal scores, gives 0.
    """
    centered = group_center(score, group)
    _, count, squares = _group_sums(centered**2, group)
    deviation = (squares / (count - ddof).clamp(min=1)).sqrt()
    index = torch.unique(group, return_inverse=True)[1]
    ends = [
        torch.zeros_like(score).scatter_reduce(0, index, score, how, include_self=False)[index]
        for how in ("amax", "amin")
    ]
    return torch.where(ends[0] > ends[1], centered / (deviation + eps), torch.zeros_like(score))  # the mean is rounded


def leave_one_out(score: Tensor, group: Tensor) -> Tensor:
    """Compute score - mean of the *other* scores of its group (RLOO, Ahmadian et al. 2024), (B,).

    Raises ValueError for a group of one.
    """
    _, count, total = _group_sums(score, group)
    if (count < 2).any():
        raise ValueError("leave_one_out needs at least two answers in every group, got a group of one")
    return score - (total - score) / (count - 1)


def group_mean_scaled(score: Tensor, group: Tensor) -> Tensor:
    """Compute (score - mean) / mean within each group, (B,) (MaxRL, Tajwar et al. 2026); 0 in groups whose mean is 0.

    Use it for nonnegative scores, such as 0 / 1 rewards. Raises ValueError for a negative score.
    """
    if (score < 0).any():
        raise ValueError(
            f"group_mean_scaled divides by the group's mean, so no score may be negative; got {float(score.min())}"
        )
    _, count, total = _group_sums(score, group)
    mean = total / count
    return torch.where(
        mean > 0, (score - mean) / torch.where(mean > 0, mean, torch.ones_like(mean)), torch.zeros_like(mean)
    )


def group_normalized(
    rewards: Tensor, group: Tensor, reward_applies: Tensor | None = None, *, ddof: int = 1, eps: float = 1e-6
) -> Tensor:
    """Apply `group_zscore` to each reward separately, before the sum, (B, R) -> (B, R) (GDPO, Liu et al. 2026, equation 4).

    `reward_applies` (B, R) is False where a reward does not apply to an answer: the result is 0 there, and the group's mean and
    deviation of this reward are those of the other answers. Without it, all apply.
    """
    if reward_applies is None:
        return torch.stack([group_zscore(one, group, ddof=ddof, eps=eps) for one in rewards.unbind(1)], 1)
    out = torch.zeros_like(rewards)
    for number, kept in enumerate(boolean(reward_applies).unbind(1)):
        out[kept, number] = group_zscore(rewards[kept, number], group[kept], ddof=ddof, eps=eps)
    return out


def group_steps(
    token_reward: Tensor, segment_end: Tensor, group: Tensor, mask: Tensor, *, ddof: int = 1, eps: float = 1e-6
) -> Tensor:
    """Compute GRPO advantages with process supervision (Shao et al. 2024, section 4.1.3), (B, T).

    The reward of each step is normalized over all steps of the group. The advantage of a token is the sum of the
    normalized rewards of the steps that end at this token or later. segment_end (B, T) is True on the last token of each step.
    """
    segment_end, mask = boolean(segment_end), boolean(mask)
    ends = segment_end & mask
    rows = torch.arange(mask.shape[0], device=mask.device)[:, None].expand(mask.shape)[ends]
    normalized = torch.zeros_like(token_reward)
    normalized[ends] = group_zscore(token_reward[ends], group[rows], ddof=ddof, eps=eps)
    return monte_carlo(normalized, mask)


def against_greedy(rewards: Tensor, baseline: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Compute the return minus the score of the greedy answer to the same prompt (ReMax, Li et al. 2023, equation 9).

    baseline (B,) -> (B, T). The baseline does not include the KL penalty of the rewards.
    """
    mask = boolean(mask)
    out = monte_carlo(rewards, mask, gamma=gamma) - baseline[:, None]
    return torch.where(mask, out, torch.zeros_like(out))


def optimal_baseline(
    rewards: Tensor, old_logp: Tensor, old_collision: Tensor, group: Tensor, mask: Tensor, *, gamma: float = 1.0
) -> Tensor:
    """Compute the return minus the minimum-variance baseline of each position (optimal token baseline, Li et al. 2026), (B, T).

    B_t = sum_i W_it G_it / sum_i W_it over the answers of the group that reach position t. W_it = sum_{s <= t} (1 - 2 pi_s +
    sum_v pi_v^2) is the squared norm of the score function with respect to the logits; `old_collision` (B, T) is
    sum_v pi_v^2. The sum includes the answer itself. Where only one answer reaches a position, the baseline is 0.
    """
    mask = boolean(mask)
    energy = torch.where(mask, 1 - 2 * old_logp.exp() + old_collision, torch.zeros_like(old_logp)).cumsum(1)
    energy = torch.where(mask, energy, torch.zeros_like(energy))
    to_go = monte_carlo(rewards.to(energy.dtype), mask, gamma=gamma)
    index = torch.unique(group, return_inverse=True)[1]
    zeros = torch.zeros(int(index.max()) + 1, energy.shape[1], dtype=energy.dtype, device=energy.device)
    weight, product, count = (
        zeros.index_add(0, index, x)[index] for x in (energy, energy * to_go, mask.to(energy.dtype))
    )
    alone = (count < 2) | (weight <= 0)
    baseline = torch.where(
        alone, torch.zeros_like(product), product / torch.where(alone, torch.ones_like(weight), weight)
    )
    return torch.where(mask, to_go - baseline, torch.zeros_like(to_go))


def broadcast(answer_advantage: Tensor, mask: Tensor) -> Tensor:
    """Copy the advantage of each answer to all its trained tokens: (B,) -> (B, T)."""
    mask = boolean(mask)
    spread = answer_advantage[:, None].expand(mask.shape)
    return torch.where(mask, spread, torch.zeros_like(spread))
