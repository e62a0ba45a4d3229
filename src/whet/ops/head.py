"""A linear head over a vocabulary, computed in chunks of tokens: sizes of the chunks, logits, and gradients.

Shapes: N tokens, R tokens of one chunk, H hidden size, V vocabulary size. A chunk always has the whole vocabulary, so each
token's softmax is computed once, and the products keep the shape of the plain form.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

WORKSPACE = 1 << 25
"""Largest number of logits (entries, not bytes) that a head keeps in memory at once: 128 MiB in float32."""
ROWS = 512
"""Tokens of a chunk on a CPU if nothing is kept for the backward pass. Below 128 a product reads the weight too often (at
V = 49,152 and H = 576 it runs at half speed with 64). Measured at V = 2,048 to 49,152."""
BLOCK = 1 << 20
"""Logits of a block on a CPU: 4 MiB in float32, so that a pass over them finds them in the cache, and temporary copies stay small.
Of 2**16 to 2**26, the smallest costs 10 to 20 % more, and the others differ little."""


def precise(x: Tensor) -> Tensor:
    """Return float32 and float64 tensors unchanged, others as float32: half precision is not accurate enough for a log-sum-exp."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def cast(hidden: Tensor) -> Tensor:
    """Return the hidden states in the dtype in which a product would be computed here: that of the autocast, if one is on."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype == torch.float32:
        return hidden.to(torch.get_autocast_dtype(device))
    return hidden


@dataclass(frozen=True)
class Cut:
    """The chunks of N tokens, and how many of them, from the first, keep their logits for the backward pass."""

    chunks: list[slice]
    kept: int


def cut(tokens: int, vocabulary: int, workspace: int, device: str, *, keep: bool, buffers: int = 1) -> Cut:
    """Cut N tokens into chunks of equal size so that at most `workspace` logits are in memory, and at least one token's.

    `buffers` is the number of (R, V) tensors that a chunk needs. With `keep`, all tokens are one chunk that is kept, if it
    fits. Else the first of the chunks is kept and the others are computed again.
    """
    if keep and tokens * vocabulary * buffers <= workspace:
        return Cut([slice(0, tokens)], 1)
    most = max(1, workspace // (vocabulary * (buffers + keep)))
    if device == "cpu" and not keep:
        most = min(most, ROWS)
    size = -(-tokens // max(1, -(-tokens // most))) or 1
    return Cut([slice(start, min(start + size, tokens)) for start in range(0, tokens, size)], int(keep))


def blocks(logits: Tensor) -> Iterator[slice]:
    """Cut the rows of logits (R, V) into blocks that fit into a cache; elsewhere than on a CPU all rows are one block."""
    size = max(1, BLOCK // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    return (slice(start, min(start + size, len(logits))) for start in range(0, len(logits), size))


@dataclass(frozen=True)
class Head:
    """Tokens and a linear head: hidden (N, H), weight (V, H), bias (V,), temperature (N,), support (N, S) (see `token_logprobs`).

    All products are computed in the dtype of the hidden states, without autocast.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    temperature: Tensor | None = None
    support: Tensor | None = None

    def cast(self) -> "Head":
        """Return it with weight and bias in the dtype of the hidden states."""
        kind = self.hidden.dtype
        bias = None if self.bias is None else self.bias.to(kind)
        return Head(self.hidden, self.weight.to(kind), bias, self.temperature, self.support)

    @property
    def unbounded(self) -> bool:
        """Whether a logit can be -inf."""
        return self.bias is not None or self.support is not None

    def logits(self, rows: slice) -> Tensor:
        """Compute the logits (R, V) of some tokens, float32 or float64, in memory of their own."""
        out = precise(functional.linear(self.hidden[rows], self.weight, self.bias))
        if self.temperature is not None:
            out.div_(self.temperature[rows, None])
        return out if self.support is None else closed_(out, self.support[rows])


def closed_(logits: Tensor, support: Tensor) -> Tensor:
    """Set the logits (R, V) that are not in `support` (R, S) to -inf, in place (see `outside`); a few closed ids need no mask."""
    if bool((support >= 0).any()):
        return logits.masked_fill_(outside(support, logits), -torch.inf)
    rows, places = (support < -1).nonzero(as_tuple=True)
    logits[rows, -2 - support[rows, places]] = -torch.inf
    return logits


def outside(support: Tensor, logits: Tensor) -> Tensor:
    """Return which tokens (..., V) are not in `support` (..., S), token ids padded with -1. A row of only -1 has all tokens, and one
    of other negative numbers -2 - id all but these ids."""
    size, closed = logits.shape[-1], support < -1
    out = torch.ones(*logits.shape[:-1], size + 1, dtype=torch.bool, device=logits.device)
    out = out.scatter_(-1, torch.where(support < 0, size, support), False) & (support >= 0).any(-1, keepdim=True)
    if bool(closed.any()):
        out = out.scatter_(-1, torch.where(closed, -2 - support, size), True)
    return out[..., :-1]


class Gradients:
    """Sums of the gradients for hidden states, weight and bias of a head over its chunks; only those that are needed."""

    def __init__(self, head: Head, needs: tuple[bool, bool, bool]) -> None:
        self.head, self.needs = head, needs
        self.hidden = torch.empty_like(head.hidden) if needs[0] else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, rows: slice, slope: Tensor, factor: Tensor | None) -> None:
        """Add the chunk whose loss has the gradient `slope` (R, V) times `factor` (R,) for the logits."""
        head, kind = self.head, self.head.hidden.dtype
        slope, own = slope.to(kind), head.hidden[rows]
        if head.temperature is not None:
            inverse = 1 / head.temperature[rows]
            factor = inverse if factor is None else factor * inverse
        if self.hidden is not None:
            self.hidden[rows] = _scaled(_over_vocabulary(slope, head.weight), factor)
        if self.needs[1]:
            self.weight = _sum(self.weight, slope.T, _scaled(own, factor))
        if self.needs[2]:
            ones = precise(own.new_ones(len(own), 1))
            self.bias = _sum(self.bias, slope.T, _scaled(ones, factor).to(kind))

    def results(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients for hidden states, weight and bias, in the dtype of each."""
        of_weight = torch.zeros_like(weight) if self.needs[1] and self.weight is None else self.weight
        of_bias = torch.zeros_like(bias) if bias is not None and self.needs[2] and self.bias is None else self.bias
        return (
            self.hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None or bias is None else of_bias.reshape(-1).to(bias.dtype),
        )


def _over_vocabulary(slope: Tensor, weight: Tensor) -> Tensor:
    """Compute slope @ weight. For fewer than 4 rows MKL sums one by one, which loses a digit over 50,000 terms: sum in parts."""
    if len(slope) >= 4 or slope.device.type != "cpu":
        return slope @ weight
    parts = [one @ own for one, own in zip(slope.split(2048, 1), weight.split(2048), strict=True)]
    return torch.stack(parts).sum(0)


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    """Multiply the rows of x by the factor, in its precision."""
    return x if factor is None else (x * factor[:, None]).to(x.dtype)


def _sum(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return total + left @ right, in place; a sum of products of half precision is in float32."""
    if total is None:
        return left @ right
    if right.dtype in (torch.float32, torch.float64):
        return torch.addmm(total, left, right, out=total)
    return precise(total).add_(left @ right)
