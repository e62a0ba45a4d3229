"""Credit: from rewards a token, or scores an answer, to advantages.

Shapes: rewards, values, mask, advantages (B, T); score, group (B,). Walking through time skips the holes of the mask
(tokens that a tool wrote): the next state of a trained token is the next *trained* token. Rewards in holes do not count.
"""

import torch
from torch import Tensor


def monte_carlo(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Return to go: G_t = r_t + gamma G_{t+1}, (B, T); 0 outside the mask.

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

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma gae_lambda A_{t+1}. After the last trained token V is
    `final_value` (B,), 0 when None: an answer that ended earns nothing more. gae_lambda = 0 is one-step TD (more bias, less
    variance), gae_lambda = 1 is Monte-Carlo return minus value (no bias from V, more variance). `gae_lambda` may be (B,), one an answer.
    """
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
    """`gae` with gae_lambda = 1 - 1 / (alpha |y|) per answer, at least 0 (VAPO, Yue et al. 2025, equation 8): (B, T)."""
    length = mask.sum(1).clamp(min=1).to(rewards.dtype)
    return gae(rewards, values, mask, final_value, gamma=gamma, gae_lambda=(1 - 1 / (alpha * length)).clamp(min=0))


def _group_sums(score: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(index of each row's group 0 ... n-1, rows in each row's group, sum of each row's group), each (B,)."""
    index = torch.unique(group, return_inverse=True)[1]
    zeros = torch.zeros(int(index.max()) + 1 if index.numel() else 0, dtype=score.dtype, device=score.device)
    count = zeros.scatter_add(0, index, torch.ones_like(score))[index]
    return index, count, zeros.scatter_add(0, index, score)[index]


def group_center(score: Tensor, group: Tensor) -> Tensor:
    """score - mean of its group (Dr. GRPO), (B,). The mean includes the sample; a group of one gives 0."""
    _, count, total = _group_sums(score, group)
    return score - total / count


def group_zscore(score: Tensor, group: Tensor, *, ddof: int = 1, eps: float = 1e-6) -> Tensor:
    """(score - mean) / (std + eps) within its group (GRPO, Shao et al. 2024, section 4.1.2), (B,).

    `ddof` 1 is the sample deviation (all peers), eps is added after the root (TRL 1e-4, verl 1e-6, OpenRLHF 1e-9).
    A group of one, or one without spread, gives 0.
    """
    centered = group_center(score, group)
    _, count, squares = _group_sums(centered**2, group)
    deviation = (squares / (count - ddof).clamp(min=1)).sqrt()
    index = torch.unique(group, return_inverse=True)[1]
    ends = [
        torch.zeros_like(score).scatter_reduce(0, index, score, how, include_self=False)[index]
        for how in ("amax", "amin")
    ]
    return torch.where(ends[0] > ends[1], centered / (deviation + eps), torch.zeros_like(score))  # a mean is rounded


def leave_one_out(score: Tensor, group: Tensor) -> Tensor:
    """score - mean of the *others* of its group (RLOO, Ahmadian et al. 2024), (B,).

    Raises ValueError for a group of one: it has no others.
    """
    _, count, total = _group_sums(score, group)
    if (count < 2).any():
        raise ValueError("leave_one_out needs at least two answers in every group, got a group of one")
    return score - (total - score) / (count - 1)


def group_mean_scaled(score: Tensor, group: Tensor) -> Tensor:
    """(score - mean) / mean within its group, (B,) (MaxRL, Tajwar et al. 2026); 0 in groups whose mean is 0.

    Made for scores that are never negative, such as 0 / 1 rewards. Raises ValueError for a negative score.
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


def group_normalized(rewards: Tensor, group: Tensor, *, ddof: int = 1, eps: float = 1e-6) -> Tensor:
    """`group_zscore` of each reward by itself, (B, R) -> (B, R): before they are summed (GDPO, Liu et al. 2026, equation 4)."""
    return torch.stack([group_zscore(one, group, ddof=ddof, eps=eps) for one in rewards.unbind(1)], 1)


def group_steps(
    token_reward: Tensor, segment_end: Tensor, group: Tensor, mask: Tensor, *, ddof: int = 1, eps: float = 1e-6
) -> Tensor:
    """GRPO's process form (Shao et al. 2024, section 4.1.3), (B, T): every step's reward is normalized over all steps of the
    group, and a token's advantage is the sum of the normalized rewards of the steps that end at it or later.

    segment_end (B, T) is True on the last token of each step.
    """
    ends = segment_end & mask
    rows = torch.arange(mask.shape[0], device=mask.device)[:, None].expand(mask.shape)[ends]
    normalized = torch.zeros_like(token_reward)
    normalized[ends] = group_zscore(token_reward[ends], group[rows], ddof=ddof, eps=eps)
    return monte_carlo(normalized, mask)


def against_greedy(rewards: Tensor, baseline: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Return to go minus the score of the greedy answer to the same prompt (ReMax, Li et al. 2023, equation 9).

    baseline (B,) -> (B, T). The KL in the rewards is not part of the baseline.
    """
    out = monte_carlo(rewards, mask, gamma=gamma) - baseline[:, None]
    return torch.where(mask, out, torch.zeros_like(out))


def optimal_baseline(
    rewards: Tensor, old_logp: Tensor, old_collision: Tensor, group: Tensor, mask: Tensor, *, gamma: float = 1.0
) -> Tensor:
    """Return to go minus the baseline of least variance at each token place of the group (optimal token baseline,
    Li et al. 2026), (B, T).

    B_t = sum_i W_it G_it / sum_i W_it over the group's answers that reach place t, W_it = sum_{s <= t} (1 - 2 pi_s +
    sum_v pi_v^2) the squared norm of the score function's logit part; `old_collision` (B, T) is sum_v pi_v^2. The own
    answer is included; an answer that is the only one at its place has baseline 0.
    """
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
    """One advantage an answer, given to each of its trained tokens: (B,) -> (B, T)."""
    spread = answer_advantage[:, None].expand(mask.shape)
    return torch.where(mask, spread, torch.zeros_like(spread))
