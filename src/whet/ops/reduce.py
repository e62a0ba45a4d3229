"""From losses a token (or an element) to one number: linear, and always against global counts.

The counts are those of the whole mini-batch, over all micro-batches and workers, so adding up the parts gives the whole
whatever the split. Shapes: loss, mask (B, T), or loss (E,) for `element_mean`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from whet.ops.masked import masked_sum


@dataclass(frozen=True)
class Counts:
    """How much a mini-batch holds in all: trained tokens, sequences that have any, elements (answers, pairs, rankings)."""

    tokens: int
    sequences: int
    elements: int

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.tokens + other.tokens, self.sequences + other.sequences, self.elements + other.elements)


def token_mean(loss: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """sum over all tokens / number of all tokens: long answers weigh more."""
    return masked_sum(loss, mask) / max(counts.tokens, 1)


def sequence_mean(loss: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """(1 / N) sum_i (1 / |y_i|) sum_t: every answer weighs the same. Sequences without tokens are not in N."""
    return (masked_sum(loss, mask, 1) / mask.sum(1).clamp(min=1)).sum() / max(counts.sequences, 1)


def sequence_sum(loss: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """(1 / N) sum_i sum_t: the log-prob of an answer as a whole."""
    return masked_sum(loss, mask) / max(counts.sequences, 1)


def fixed_length(loss: Tensor, mask: Tensor, counts: Counts, *, length: int) -> Tensor:
    """(1 / (N L)) sum_i sum_t with a constant L: no length bias (Dr. GRPO, Liu et al. 2025)."""
    return masked_sum(loss, mask) / (max(counts.sequences, 1) * length)


def element_mean(loss: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """sum of (E,) losses / number of all elements; `mask` is not needed: an element is whole."""
    return torch.sum(loss) / max(counts.elements, 1)
