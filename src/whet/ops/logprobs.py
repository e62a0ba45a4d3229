"""Log-probs and entropy of tokens, in nats, from logits or directly from hidden states.

Shapes: N tokens, H hidden size, V vocabulary size; a leading `...` is any batch shape.
"""

import torch
from torch import Tensor
from torch.nn import functional

WORKSPACE = 1 << 24
"""Largest number of logits (entries, not bytes) that `linear_logprobs` keeps in memory at once."""


def token_logprobs(logits: Tensor, ids: Tensor, *, temperature: float = 1.0, support: Tensor | None = None) -> Tensor:
    """Compute log softmax(logits / temperature)[ids]: logits (..., V), ids (...) -> (...), in nats per token.

    `support` (..., S) lists token ids, padded with -1. With it, the softmax is over these tokens only: the log-prob under
    the truncated distribution of top-p, top-k or min-p. A row of only -1 means the whole vocabulary.

    >>> token_logprobs(torch.zeros(1, 4), torch.tensor([2])).exp()
    tensor([0.2500])
    """
    return _within(logits / temperature, support).log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def _within(logits: Tensor, support: Tensor | None, start: int = 0) -> Tensor:
    """Set the logits (..., V) of tokens start ... start + V - 1 to -inf outside `support` (..., S)."""
    if support is None:
        return logits
    local = support - start
    inside = (local >= 0) & (local < logits.shape[-1])
    extra = torch.zeros(*logits.shape[:-1], logits.shape[-1] + 1, dtype=torch.bool, device=logits.device)
    keep = extra.scatter(-1, torch.where(inside, local, logits.shape[-1]), True)[..., :-1]
    return logits.masked_fill(~(keep | (support < 0).all(-1, keepdim=True)), -torch.inf)


def entropy(logits: Tensor, *, temperature: float = 1.0, support: Tensor | None = None) -> Tensor:
    """Compute -sum_v p_v log p_v of softmax(logits / temperature): (..., V) -> (...), in nats per token.

    `support` is as in `token_logprobs`. A logit of -inf has probability 0 and adds 0.
    """
    return _entropy(_within(logits / temperature, support).log_softmax(-1))


def _entropy(logp: Tensor) -> Tensor:
    """Compute -sum p log p from log-probs (..., V) -> (...).

    Log-probs of -inf are set to 0 before the product, so that the gradient is not NaN.
    """
    return -(logp.exp() * logp.masked_fill(logp.isneginf(), 0.0)).sum(-1)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    support: Tensor | None = None,
    with_entropy: bool = True,
    workspace: int = WORKSPACE,
) -> tuple[Tensor, Tensor | None]:
    """Return (logp, entropy) of `ids` under softmax((hidden @ weight.T + bias) / temperature), each (N,), in nats.

    The entropy is None if `with_entropy` is False and computing it needs extra work. With `support` (N, S), both are of
    the distribution over these tokens only (see `token_logprobs`).

    hidden (N, H), weight (V, H), bias (V,), ids (N,), temperature a number or (N,). The vocabulary is processed in
    chunks of at most `workspace` logits, forward and backward, so the full (N, V) logits are never in memory. The
    gradient is computed for hidden, weight and bias.
    """
    if not isinstance(temperature, Tensor):
        temperature = torch.full((hidden.shape[0],), float(temperature), dtype=hidden.dtype, device=hidden.device)
    chunk = max(1, workspace // max(1, hidden.shape[0]))
    if chunk >= weight.shape[0]:
        logp = _within(_tempered(functional.linear(hidden, weight, bias), temperature), support).log_softmax(-1)
        return logp.gather(-1, ids[:, None])[:, 0], _entropy(logp) if with_entropy else None
    return _ChunkedLogprobs.apply(hidden, weight, bias, ids, temperature, support, chunk)


def _tempered(logits: Tensor, temperature: Tensor) -> Tensor:
    """Compute logits / temperature in float32 or float64: half precision is not accurate enough for a log-sum-exp."""
    return (logits if logits.dtype in (torch.float32, torch.float64) else logits.float()) / temperature[:, None]


class _ChunkedLogprobs(torch.autograd.Function):
    """Log-probs and entropy in one pass over the vocabulary; the backward pass makes a second one."""

    @staticmethod
    def _logits(hidden, weight, bias, temperature, support, start, stop):
        piece = functional.linear(hidden, weight[start:stop], None if bias is None else bias[start:stop])
        return _within(_tempered(piece, temperature), support, start)

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, temperature, support, chunk):
        dtype = hidden.dtype if hidden.dtype in (torch.float32, torch.float64) else torch.float32
        count = hidden.shape[0]
        top = torch.full((count,), -torch.inf, dtype=dtype, device=hidden.device)
        total, weighted = torch.zeros_like(top), torch.zeros_like(top)  # sum e^(l - top), sum e^(l - top) l
        chosen = torch.zeros_like(top)
        for start in range(0, weight.shape[0], chunk):
            stop = min(start + chunk, weight.shape[0])
            logits = _ChunkedLogprobs._logits(hidden, weight, bias, temperature, support, start, stop)
            new_top = torch.maximum(top, logits.amax(-1))
            base = new_top.masked_fill(new_top.isneginf(), 0.0)  # -inf: all tokens so far are outside the support
            old_scale, scaled = (top - base).exp(), (logits - base[:, None]).exp()
            total = total * old_scale + scaled.sum(-1)
            weighted = weighted * old_scale + (scaled * logits.masked_fill(logits.isneginf(), 0.0)).sum(-1)
            top = new_top
            inside = (ids >= start) & (ids < stop)
            picked = logits.gather(-1, (ids - start).clamp(0, stop - start - 1)[:, None])[:, 0]
            chosen = torch.where(inside, picked, chosen)
        log_total = top + total.log()
        entropy_ = log_total - weighted / total
        ctx.save_for_backward(hidden, weight, bias, ids, temperature, support, log_total, entropy_)
        ctx.chunk = chunk
        return chosen - log_total, entropy_

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, bias, ids, temperature, support, log_total, entropy_ = ctx.saved_tensors
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for start in range(0, weight.shape[0], ctx.chunk):
            stop = min(start + ctx.chunk, weight.shape[0])
            logp = (
                _ChunkedLogprobs._logits(hidden, weight, bias, temperature, support, start, stop) - log_total[:, None]
            )
            p = logp.exp()
            # d logp_y / d l = 1[y] - p;  d H / d l = -p (log p + H)
            finite = logp.masked_fill(logp.isneginf(), 0.0)
            grad = -p * (grad_logp[:, None] + grad_entropy[:, None] * (finite + entropy_[:, None]))
            inside = (ids >= start) & (ids < stop)
            rows = inside.nonzero()[:, 0]
            grad[rows, ids[rows] - start] += grad_logp[rows]
            grad = (grad / temperature[:, None]).to(hidden.dtype)
            grad_hidden += grad @ weight[start:stop]
            grad_weight[start:stop] = grad.T @ hidden
            if grad_bias is not None:
                grad_bias[start:stop] = grad.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


@torch.no_grad()
def linear_collision(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Tensor,
    support: Tensor | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    """Compute sum_v p_v^2 of the distribution in `linear_logprobs`, (N,): the probability that two draws are equal.

    It has no gradient.
    """
    chunk = max(1, workspace // weight.shape[0])
    out = torch.zeros(hidden.shape[0], dtype=temperature.dtype, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk):
        here = slice(start, start + chunk)
        logits = _tempered(functional.linear(hidden[here], weight, bias), temperature[here])
        logp = _within(logits, None if support is None else support[here]).log_softmax(-1)
        out[here] = (2 * logp).exp().sum(-1)
    return out
