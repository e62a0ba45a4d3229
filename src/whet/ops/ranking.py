"""Losses of reward models on human comparisons and scores: one loss per element, before the reduction.

Shapes: E elements (pairs, rankings, answers), K answers in a ranking.
"""

import torch
from torch import Tensor
from torch.nn import functional

from whet.ops.masked import boolean


def nth(x: Tensor, index: Tensor, *, n: int) -> Tensor:
    """Return the n-th row of each element, in order: x (B,), index (B,) the row's index in its element -> (E,)."""
    return x[index == n]


def by_element(x: Tensor, element: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x as (E, K) with padding 0, a mask that is False on the padding), for x, element, index (B,)."""
    shape = (int(element.max()) + 1, int(index.max()) + 1) if element.numel() else (0, 0)
    out, valid = (
        torch.zeros(shape, dtype=x.dtype, device=x.device),
        torch.zeros(shape, dtype=torch.bool, device=x.device),
    )
    valid[element, index] = True
    return out.index_put((element, index), x), valid


def pairwise(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, probability: Tensor | float = 1.0
) -> Tensor:
    """Compute -p log sigmoid(g) - (1 - p) log sigmoid(-g) with g = chosen - rejected - margin, (E,).

    This is the Bradley-Terry loss; the margin is that of Llama 2 (Touvron et al. 2023, equation 2). `probability` p that
    the chosen answer is better is 1 for a hard label.
    """
    gap = chosen - rejected - margin
    return -probability * functional.logsigmoid(gap) - (1 - probability) * functional.logsigmoid(-gap)


def log_exp(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Compute log(1 + exp(rejected - chosen)), (E,): equal to `pairwise`, under the name that some recipes use."""
    return functional.softplus(rejected - chosen)


def k_way(scores: Tensor, ranks: Tensor, valid: Tensor | None = None, *, ties: str = "drop") -> Tensor:
    """Average -log sigmoid(s_better - s_worse) over the pairs of each ranking, (E,) (InstructGPT 2022, equation 1).

    scores (E, K); ranks (E, K), 1 is best; valid (E, K) is False on the padding of shorter rankings.
    `ties="drop"`: pairs of equal rank do not count, and the denominator is the number of the other pairs (C(K, 2)
    without ties); a ranking with only ties has loss 0. `ties="half"`: a tied pair adds half of the loss of each order,
    and the denominator is always C(K, 2).

    >>> k_way(torch.tensor([[1.0, 0.0]]), torch.tensor([[1, 2]]))
    tensor([0.3133])
    """
    if ties not in ("drop", "half"):
        raise ValueError(f'ties must be "drop" or "half", got {ties!r}')
    valid = torch.ones_like(ranks, dtype=torch.bool) if valid is None else boolean(valid)
    scores = scores.masked_fill(~valid, 0.0)
    both = valid[:, :, None] & valid[:, None, :]
    better = both & (ranks[:, :, None] < ranks[:, None, :])
    loss = -functional.logsigmoid(scores[:, :, None] - scores[:, None, :])
    weight = better.to(scores.dtype)
    if ties == "half":
        equal = both & (ranks[:, :, None] == ranks[:, None, :])
        itself = torch.eye(ranks.shape[1], dtype=torch.bool, device=ranks.device)
        weight = weight + 0.5 * (equal & ~itself).to(scores.dtype)
    total = torch.where(weight > 0, loss * weight, torch.zeros_like(loss)).sum((1, 2))
    return total / weight.sum((1, 2)).clamp(min=1)


def ranking_loss(score: Tensor, rank: Tensor, element: Tensor, index: Tensor, *, ties: str = "drop") -> Tensor:
    """Compute `k_way` for scores and ranks given as rows, (B,) -> (E,); rankings may differ in length."""
    scores, valid = by_element(score, element, index)
    return k_way(scores, by_element(rank, element, index)[0], valid, ties=ties)


def regression(score: Tensor, target: Tensor) -> Tensor:
    """Compute (score - target)^2 / 2, elementwise, for data with absolute scores."""
    return 0.5 * (score - target) ** 2


def centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Compute (chosen + rejected)^2, (E,): keeps the arbitrary offset of a reward model near 0 (Eisenstein et al. 2023)."""
    return (chosen + rejected) ** 2


def step_loss(token_score: Tensor, segment_label: Tensor) -> Tensor:
    """Compute the cross-entropy of sigmoid(score) and the label in [0, 1] of the step that ends at a token, (B, T).

    It is the loss of process reward models (Uesato et al. 2022; Lightman et al. 2023). Only the last token of each step
    counts, so the mask of the term is `segment_end`.
    """
    return functional.softplus(token_score) - segment_label * token_score
