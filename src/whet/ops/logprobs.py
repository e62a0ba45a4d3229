"""Log-probs and entropy of tokens, in nats, from logits or directly from hidden states.

Shapes: N tokens, H hidden size, V vocabulary size; a leading `...` is any batch shape. torch's `log_softmax` is not used:
on CPU in float32 its sum over a large vocabulary is biased (mean error -2.4e-6 nats at V = 49,152, -1.3e-5 at 151,936).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

WORKSPACE = 1 << 24
"""Largest number of logits (entries, not bytes) that `linear_logprobs` keeps in memory at once."""


def token_logprobs(logits: Tensor, ids: Tensor, *, temperature: float = 1.0, support: Tensor | None = None) -> Tensor:
    """Compute log softmax(logits / temperature)[ids]: logits (..., V), ids (...) -> (...), in nats per token.

    `support` (..., S) lists token ids, padded with -1. With it, the softmax is over these tokens only: the log-prob under
    the truncated distribution of top-p, top-k or min-p. A row of only -1 means the whole vocabulary, and a row of other
    negative numbers -2 - id all tokens but these ids. Half precision is computed in float32.

    >>> token_logprobs(torch.zeros(1, 4), torch.tensor([2])).exp()
    tensor([0.2500])
    """
    return _Logprobs.apply(_within(precise(logits) / temperature, support), ids, False)[0]


def log_softmax(logits: Tensor) -> Tensor:
    """Compute the log-probs of all tokens, (..., V), from logits (..., V), without the bias of torch's `log_softmax`.

    Half precision is computed in float32. A logit of -inf stays -inf.
    """
    return _LogSoftmax.apply(precise(logits))


def precise(x: Tensor) -> Tensor:
    """Return float32 and float64 tensors unchanged, others as float32: half precision is not accurate enough for a log-sum-exp."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _within(logits: Tensor, support: Tensor | None, start: int = 0) -> Tensor:
    """Set the logits (..., V) of tokens start ... start + V - 1 to -inf outside `support` (..., S)."""
    if support is None:
        return logits
    if bool((support < -1).any()):  # these rows name what is closed
        *rows, _ = places = (support < -1).nonzero(as_tuple=True)
        ids = -2 - support[places] - start
        here = (ids >= 0) & (ids < logits.shape[-1])
        logits = logits.index_put((*(row[here] for row in rows), ids[here]), logits.new_tensor(-torch.inf))
    if bool((support < 0).all()):
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
    return _Logprobs.apply(_within(precise(logits) / temperature, support), None, True)[1]


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

    The entropy is None if `with_entropy` is False. With `support` (N, S), both are of the distribution over these tokens
    only (see `token_logprobs`).

    hidden (N, H), weight (V, H), bias (V,), ids (N,), temperature a number or (N,). The vocabulary is processed in
    chunks of at most `workspace` logits, forward and backward, so the full (N, V) logits are never in memory. The
    gradient is computed for hidden, weight and bias. Under `torch.autocast` the products are in its dtype, in the backward
    pass too, which runs outside of it.
    """
    logp, entropies, _ = linear_tokens(
        hidden, weight, ids, bias=bias, temperature=temperature, support=support, with_entropy=with_entropy, workspace=workspace
    )  # fmt: skip
    return logp, entropies


def linear_tokens(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    support: Tensor | None = None,
    with_entropy: bool = True,
    workspace: int = WORKSPACE,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the results of `linear_logprobs`, and where no token has a larger logit than the one of `ids`, (N,) bool.

    It costs one comparison per token more, since the sums know both logits.
    """
    if not isinstance(temperature, Tensor):
        kind = precise(hidden[:0]).dtype  # half precision would round the temperature
        temperature = torch.full((hidden.shape[0],), float(temperature), dtype=kind, device=hidden.device)
    chunk = max(1, workspace // max(1, hidden.shape[0]))
    if chunk >= weight.shape[0]:
        logits = _tempered(functional.linear(hidden, weight, bias), temperature)
        return _Logprobs.apply(_within(logits, support), ids, with_entropy)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype == torch.float32:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    return _ChunkedLogprobs.apply(hidden, weight, bias, ids, temperature, support, chunk, with_entropy)


def _tempered(logits: Tensor, temperature: Tensor) -> Tensor:
    return precise(logits) / temperature[:, None]


class _Sums:
    """Sums over the vocabulary, which arrives in pieces: sum e^(l - top), sum e^(l - top) (l - top), the logit of `ids`.

    Numbers are relative to the largest logit so far, `top`, so that large logits cost no digits.
    """

    def __init__(self, shape: torch.Size, like: Tensor, ids: Tensor | None, with_entropy: bool) -> None:
        self.ids, self.with_entropy = ids, with_entropy
        self.top = like.new_full(shape, -torch.inf)
        self.total, self.weighted, self.chosen = (torch.zeros_like(self.top) for _ in range(3))

    def add(self, logits: Tensor, start: int) -> None:
        """Add the logits (..., P) of tokens start ... start + P - 1."""
        top = torch.maximum(self.top, logits.amax(-1))
        base = top.masked_fill(top.isneginf(), 0.0)  # -inf: all tokens so far are outside the support
        moved = _finite(self.top - base)
        scale, shifted = moved.exp(), logits - base[..., None]
        if self.with_entropy:
            scaled = shifted.exp()
            own = _finite(shifted).mul_(scaled).sum(-1)
            self.weighted = scale * (self.weighted + moved * self.total) + own
        else:
            scaled = shifted.exp_()
        self.total = self.total * scale + scaled.sum(-1)
        self.top = top
        if self.ids is not None:
            inside, place = _places(self.ids, start, logits.shape[-1])
            self.chosen = torch.where(inside, logits.gather(-1, place[..., None])[..., 0], self.chosen)

    def most_likely(self) -> Tensor | None:
        """Return where the logit of `ids` is the largest one."""
        return None if self.ids is None else self.chosen == self.top

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Return (log-prob of `ids`, entropy, log-sum-exp of the logits)."""
        log_total = self.total.log()
        logp = None if self.ids is None else (self.chosen - self.top) - log_total
        return logp, log_total - self.weighted / self.total if self.with_entropy else None, self.top + log_total


def _gradient(
    logits: Tensor,
    start: int,
    ids: Tensor | None,
    log_total: Tensor,
    entropies: Tensor | None,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Compute the gradient for the logits (..., P) of tokens start ... start + P - 1.

    d logp_y / d l = 1[y] - p;  d H / d l = -p (log p + H).
    """
    logp = logits - log_total[..., None]
    factor: Tensor = torch.zeros_like(log_total) if grad_logp is None else -grad_logp
    if entropies is None or grad_entropy is None:
        out = logp.exp_().mul_(factor[..., None])
    else:
        p = logp.exp()
        out = _finite(logp).add_(entropies[..., None]).mul_(-grad_entropy[..., None])
        out = out.add_(factor[..., None]).mul_(p)
    if ids is not None and grad_logp is not None:
        inside, place = _places(ids, start, logits.shape[-1])
        out.scatter_add_(-1, place[..., None], torch.where(inside, grad_logp, torch.zeros_like(grad_logp))[..., None])
    return out


def _places(ids: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Return which ids are in start ... start + width - 1, and their places there (others are clamped to its ends)."""
    return (ids >= start) & (ids < start + width), (ids - start).clamp(0, width - 1)


def _finite(x: Tensor) -> Tensor:
    """Raise log-probs to at least -10,000, in place: the product with the probability is 0 there, for -inf it would be NaN."""
    return x.clamp_(min=-1e4)


def _constant(ctx: Any, values: Tensor | None) -> Tensor | None:
    """Return a result of a Function that has no gradient."""
    if values is not None:
        ctx.mark_non_differentiable(values)
    return values


class _Logprobs(torch.autograd.Function):
    """Log-probs of `ids` and entropies from logits (..., V); only the logits are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor | None, with_entropy: bool) -> Any:
        sums = _Sums(logits.shape[:-1], logits, ids, with_entropy)
        sums.add(logits, 0)
        logp, entropies, log_total = sums.results()
        ctx.save_for_backward(logits, ids, log_total, entropies)
        return logp, entropies, _constant(ctx, sums.most_likely())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, _: Any) -> Any:
        logits, ids, log_total, entropies = ctx.saved_tensors
        return _gradient(logits, 0, ids, log_total, entropies, grad_logp, grad_entropy), None, None


class _LogSoftmax(torch.autograd.Function):
    """Log-probs of the whole vocabulary; only the result is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        top = logits.amax(-1, keepdim=True)
        total = (logits - top).exp_().sum(-1, keepdim=True)
        logp = (logits - top).sub_(total.log_())
        ctx.save_for_backward(logp)
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (logp,) = ctx.saved_tensors
        return logp.exp().mul_(-grad.sum(-1, keepdim=True)).add_(grad)


class _ChunkedLogprobs(torch.autograd.Function):
    """Log-probs and entropy in one pass over the vocabulary; the backward pass makes a second one.

    Both compute in the dtype of the hidden states, whatever the autocast around them.
    """

    @staticmethod
    def _logits(hidden, weight, bias, temperature, support, start, stop):
        own = None if bias is None else bias[start:stop].to(hidden.dtype)
        piece = functional.linear(hidden, weight[start:stop].to(hidden.dtype), own)
        return _within(_tempered(piece, temperature), support, start)

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, temperature, support, chunk, with_entropy):
        sums = _Sums(ids.shape, precise(hidden[:0]), ids, with_entropy)
        for start in range(0, weight.shape[0], chunk):
            stop = min(start + chunk, weight.shape[0])
            sums.add(_ChunkedLogprobs._logits(hidden, weight, bias, temperature, support, start, stop), start)
        logp, entropies, log_total = sums.results()
        ctx.save_for_backward(hidden, weight, bias, ids, temperature, support, log_total, entropies)
        ctx.chunk = chunk
        return logp, entropies, _constant(ctx, sums.most_likely())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy, _):
        hidden, weight, bias, ids, temperature, support, log_total, entropies = ctx.saved_tensors
        _, of_weight, of_bias, *_ = ctx.needs_input_grad  # with adapters the head is frozen
        grad_hidden = torch.zeros_like(precise(hidden))
        grad_weight = torch.zeros_like(weight) if of_weight else None
        grad_bias = torch.zeros_like(bias) if of_bias else None
        for start in range(0, weight.shape[0], ctx.chunk):
            stop = min(start + ctx.chunk, weight.shape[0])
            logits = _ChunkedLogprobs._logits(hidden, weight, bias, temperature, support, start, stop)
            grad = _gradient(logits, start, ids, log_total, entropies, grad_logp, grad_entropy)
            grad = (grad / temperature[:, None]).to(hidden.dtype)
            grad_hidden += grad @ weight[start:stop].to(hidden.dtype)
            if grad_weight is not None:
                grad_weight[start:stop] = grad.T @ hidden
            if grad_bias is not None:
                grad_bias[start:stop] = grad.sum(0)
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None, None, None, None


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
        logits = _within(logits, None if support is None else support[here])
        scaled = (logits - logits.amax(-1, keepdim=True)).exp_()
        out[here] = scaled.square().sum(-1) / scaled.sum(-1) ** 2
    return out
