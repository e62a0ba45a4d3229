"""Reductions of per-token (or per-element) losses to a scalar, divided by global counts.

The counts are those of the whole mini-batch, over all micro-batches and workers. The sum over the parts is therefore the
same for every split. Shapes: loss, mask (B, T), or loss (E,) for `element_mean`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from whet.ops.masked import boolean, masked_sum


@dataclass(frozen=True)
class Counts:
    """Sizes of a mini-batch: trained tokens, sequences with trained tokens, elements (answers, pairs, rankings)."""

    tokens: int
    sequences: int
    elements: int

    @classmethod
    def of(cls, mask: Tensor, elements: int | None = None) -> "Counts":
        """Count a whole mini-batch by its mask (B, T), with one element a row unless `elements` is given.

        >>> Counts.of(torch.tensor([[True, True, False], [False, False, False]]))
        Counts(tokens=2, sequences=1, elements=2)
        """
        mask = boolean(mask)
        return cls(int(mask.sum()), int(mask.any(1).sum()), len(mask) if elements is None else elements)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.tokens + other.tokens, self.sequences + other.sequences, self.elements + other.elements)


def token_mean(loss: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """Compute sum over all tokens / number of all tokens: long answers weigh more."""
    return masked_sum(loss, mask) / max(counts.tokens, 1)


def sequence_mean(loss: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """Compute (1 / N) sum_i (1 / |y_i|) sum_t: all answers weigh the same. N excludes sequences without trained tokens."""
    mask = boolean(mask)
    return (masked_sum(loss, mask, 1) / mask.sum(1).clamp(min=1)).sum() / max(counts.sequences, 1)


def sequence_sum(loss: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """Compute (1 / N) sum_i sum_t: the loss of an answer is the sum over its tokens."""
    return masked_sum(loss, mask) / max(counts.sequences, 1)


def fixed_length(loss: Tensor, mask: Tensor, counts: Counts, *, length: int) -> Tensor:
    """Compute (1 / (N L)) sum_i sum_t with a constant L: no length bias (Dr. GRPO, Liu et al. 2025)."""
    return masked_sum(loss, mask) / (max(counts.sequences, 1) * length)


def element_mean(loss: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """Compute sum of (E,) losses / number of all elements; `mask` is not used."""
    return torch.sum(loss) / max(counts.elements, 1)
