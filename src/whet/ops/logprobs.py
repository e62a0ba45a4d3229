"""Log-probs and entropy of tokens, in nats, from logits or directly from hidden states.

Shapes: N tokens, H hidden size, V vocabulary size; a leading `...` is any batch shape. torch's `log_softmax` is not used:
on CPU in float32 its sum over a large vocabulary is biased (mean error -2.4e-6 nats at V = 49,152, -1.3e-5 at 151,936).
"""

from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from whet.ops.head import WORKSPACE, Cut, Gradients, Head, blocks, cast, cut, outside, precise


def token_logprobs(logits: Tensor, ids: Tensor, *, temperature: float = 1.0, support: Tensor | None = None) -> Tensor:
    """Compute log softmax(logits / temperature)[ids]: logits (..., V), ids (...) -> (...), in nats per token.

    `support` (..., S) lists token ids, padded with -1. With it, the softmax is over these tokens only: the log-prob under
    the truncated distribution of top-p, top-k or min-p. A row of only -1 means the whole vocabulary, and a row of other
    negative numbers -2 - id all tokens but these ids. Half precision is computed in float32.

    >>> token_logprobs(torch.zeros(1, 4), torch.tensor([2])).exp()
    tensor([0.2500])
    """
    return _Logprobs.apply(_within(precise(logits), temperature, support), ids, False)[0]


def log_softmax(logits: Tensor) -> Tensor:
    """Compute the log-probs of all tokens, (..., V), from logits (..., V), without the bias of torch's `log_softmax`.

    Half precision is computed in float32. A logit of -inf stays -inf.
    """
    return _LogSoftmax.apply(precise(logits))


def _within(logits: Tensor, temperature: float, support: Tensor | None) -> Tensor:
    """Divide logits (..., V) by the temperature, and set them to -inf outside `support` (..., S)."""
    if temperature != 1.0:
        logits = logits / temperature
    return logits if support is None else logits.masked_fill(outside(support, logits), -torch.inf)


def entropy(logits: Tensor, *, temperature: float = 1.0, support: Tensor | None = None) -> Tensor:
    """Compute -sum_v p_v log p_v of softmax(logits / temperature): (..., V) -> (...), in nats per token.

    `support` is as in `token_logprobs`. A logit of -inf has probability 0 and adds 0.
    """
    return _Logprobs.apply(_within(precise(logits), temperature, support), None, True)[1]


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Tensor | float | None = None,
    support: Tensor | None = None,
    with_entropy: bool | Tensor = True,
    workspace: int = WORKSPACE,
) -> tuple[Tensor, Tensor | None]:
    """Return (logp, entropy) of `ids` under softmax((hidden @ weight.T + bias) / temperature), each (N,), in nats.

    `with_entropy` False returns None for the entropy. A mask (N,) computes it, without gradient, for the tokens where it is
    True, and returns 0 for the others: a sample for logs. (A mask on the CPU needs no synchronization with another device.)
    With `support` (N, S), both are of the distribution over these tokens only (see `token_logprobs`).

    hidden (N, H), weight (V, H), bias (V,), ids (N,), temperature a number or (N,); None and 1.0 do not divide. Tokens are
    processed in chunks, so that at most `workspace` logits (at least those of one token) are in memory. If all fit, the
    backward pass uses the probabilities of the forward pass; else it computes those of later chunks again. If only the hidden
    states need a gradient, and the entropy has none, the forward pass computes it and nothing is kept or computed again. The
    gradient is computed for hidden, weight and bias, where they need it. Under `torch.autocast` the products are in its
    dtype, in the backward pass too, which runs outside of it.
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
    temperature: Tensor | float | None = None,
    support: Tensor | None = None,
    with_entropy: bool | Tensor = True,
    workspace: int = WORKSPACE,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the results of `linear_logprobs`, and where no token has a larger logit than the one of `ids`, (N,) bool.

    It costs one comparison per token more, since the sums know both logits.
    """
    if isinstance(temperature, float | int):
        kind = precise(hidden[:0]).dtype  # half precision would round the temperature
        temperature = None if temperature == 1 else torch.full_like(hidden[:, 0], float(temperature), dtype=kind)
    if isinstance(with_entropy, Tensor):
        with_entropy = with_entropy.cpu()
    given = (cast(hidden), weight, bias, ids, temperature, support, with_entropy, workspace)
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in given[:3]):
        return _Linear.apply(*given)
    with torch.no_grad():
        done = _forward(Head(*given[:3], temperature, support), ids, with_entropy, workspace, (False, False, False))
    return done.logp, done.entropies, done.correct


def _sums(
    x: Tensor, ids: Tensor | None, some: EllipsisType | Tensor | None, unbounded: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Return (log-prob of `ids`, entropy of the rows `some`, whether `ids` are most likely, largest logit, sum e^(l - largest)).

    Replaces the logits x (..., V) by e^(l - largest). `unbounded`: logits can be -inf.
    """
    top = x.amax(-1, keepdim=True)
    top.masked_fill_(top.isneginf(), 0.0)
    x.sub_(top)
    chosen = None if ids is None else x.gather(-1, ids[..., None])[..., 0]
    shifted = None if some is None else x[some].clone() if some is ... else x[some]
    x.exp_()
    total = x.sum(-1)
    log_total, entropies = total.log(), None
    if some is not None and shifted is not None:
        if unbounded:
            _finite(shifted)
        entropies = log_total[some] - shifted.mul_(x[some]).sum(-1) / total[some]
    if chosen is None:
        return None, entropies, None, top[..., 0], total
    return chosen - log_total, entropies, chosen == 0, top[..., 0], total


def _finite(x: Tensor) -> Tensor:
    """Raise log-probs to at least -10,000, in place: the product with the probability is 0 there, for -inf it would be NaN."""
    return x.clamp_(min=-1e4)


def _inside(ids: Tensor, support: Tensor | None, like: Tensor) -> Tensor:
    """Return 1 for each id, (R, 1), and 0 for those outside the support, whose logit has no gradient."""
    if support is None:
        return like.new_ones(len(ids), 1)
    open_ = ((support < 0).all(-1) | (support == ids[:, None]).any(-1)) & ~(support == -2 - ids[:, None]).any(-1)
    return open_[:, None].to(like.dtype)


def _slope(p: Tensor, ids: Tensor, support: Tensor | None) -> Tensor:
    """Turn probabilities (R, V) into p - 1[ids], in place: the gradient of -log p for the logits."""
    return p.scatter_add_(-1, ids[:, None], -_inside(ids, support, p))


@dataclass
class _Done:
    """Results of a forward pass, (N,) each, and what the backward pass needs."""

    logp: Tensor
    entropies: Tensor | None
    correct: Tensor
    top: Tensor
    total: Tensor
    kept: list[Tensor]
    """p - 1[ids] of the first chunks, (R, V)"""
    of_hidden: Tensor | None = None
    """the gradient of -logp for the hidden states, (N, H), if nothing else needs one"""

    @classmethod
    def empty(cls, like: Tensor, ids: Tensor, with_entropy: bool) -> "_Done":
        """Return it with memory for N tokens."""
        logp, top, total = (like.new_zeros(len(ids)) for _ in range(3))
        return cls(
            logp,
            like.new_zeros(len(ids)) if with_entropy else None,
            ids.new_zeros(len(ids), dtype=torch.bool),
            top,
            total,
            [],
        )


def _plan(head: Head, workspace: int, keep: bool, both: bool) -> Cut:
    """Cut the tokens; the gradient of the entropy needs a copy of the logits that are kept."""
    tokens, vocabulary = len(head.hidden), len(head.weight)
    return cut(tokens, vocabulary, workspace, head.hidden.device.type, keep=keep, buffers=1 + both)


def _forward(
    given: Head, ids: Tensor, with_entropy: bool | Tensor, workspace: int, needs: tuple[bool, bool, bool]
) -> _Done:
    both = with_entropy is True and any(needs)
    early = needs == (True, False, False) and not both
    head = given.cast()
    plan = _plan(head, workspace, any(needs) and not early, both)
    done = _Done.empty(precise(head.hidden[:0]), ids, with_entropy is not False)
    gradients = Gradients(head, needs if early else (False, False, False))
    with torch.autocast(head.hidden.device.type, enabled=False):
        for number, rows in enumerate(plan.chunks):
            x = head.logits(rows)
            for part in blocks(x):
                at = slice(rows.start + part.start, rows.start + part.stop)
                _reduce(
                    x[part],
                    ids[at],
                    with_entropy if isinstance(with_entropy, bool) else with_entropy[at],
                    head,
                    done,
                    at,
                )
                if early or number < plan.kept:
                    _slope(
                        x[part].div_(done.total[at, None]), ids[at], None if head.support is None else head.support[at]
                    )
            if early:
                gradients.add(rows, x, None)
            elif number < plan.kept:
                done.kept.append(x if both else x.to(head.hidden.dtype))
            del x
    done.of_hidden = gradients.hidden
    return done


def _reduce(x: Tensor, ids: Tensor, with_entropy: bool | Tensor, head: Head, done: _Done, at: slice) -> None:
    """Write the results of the tokens `at`, whose logits x (R, V) become e^(l - largest)."""
    some: EllipsisType | Tensor | None = ... if with_entropy is True else None
    if isinstance(with_entropy, Tensor) and bool(with_entropy.any()):
        some = with_entropy.nonzero()[:, 0].to(x.device)
    logp, entropies, correct, top, total = _sums(x, ids, some, head.unbounded)
    assert logp is not None
    assert correct is not None
    done.logp[at], done.correct[at], done.top[at], done.total[at] = logp, correct, top, total
    if entropies is not None and done.entropies is not None:
        done.entropies[at][some] = entropies


class _Linear(torch.autograd.Function):
    """Log-probs, entropies and `correct` from hidden states (see `linear_logprobs`)."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, temperature, support, with_entropy, workspace):
        ctx.set_materialize_grads(False)
        needs = tuple(ctx.needs_input_grad[:3])
        done = _forward(Head(hidden, weight, bias, temperature, support), ids, with_entropy, workspace, needs)
        ctx.early, ctx.workspace, ctx.both = done.of_hidden is not None, workspace, with_entropy is True
        if ctx.early:
            ctx.save_for_backward(done.of_hidden)
        else:
            given = (hidden, weight, bias, ids, temperature, support)
            ctx.save_for_backward(*given, done.logp, done.entropies, done.top, done.total, *done.kept)
        ctx.mark_non_differentiable(done.correct)
        if done.entropies is not None and not ctx.both:
            ctx.mark_non_differentiable(done.entropies)
        return done.logp, done.entropies, done.correct

    @staticmethod
    @once_differentiable
    def backward(ctx, of_logp, of_entropy, _):
        if of_logp is None and of_entropy is None:
            return (None,) * 8
        rest = (None,) * 5
        if ctx.early:
            (of_hidden,) = ctx.saved_tensors
            return (of_hidden * -of_logp[:, None]).to(of_hidden.dtype), None, None, *rest
        hidden, weight, bias, ids, temperature, support, logp, entropies, top, total, *kept = ctx.saved_tensors
        done = _Done(logp, entropies, ids, top, total, kept)
        head = Head(hidden, weight, bias, temperature, support).cast()
        gradients = Gradients(head, ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            for number, rows in enumerate(_plan(head, ctx.workspace, True, ctx.both).chunks):
                if of_entropy is None:
                    x = kept[number] if number < len(kept) else _again(head, ids, done, rows)
                    gradients.add(rows, x, None if of_logp is None else -of_logp[rows])
                else:
                    x = kept[number].clone() if number < len(kept) else _again(head, ids, done, rows)
                    inside = _inside(ids[rows], None if support is None else support[rows], x)
                    up = None if of_logp is None else of_logp[rows]
                    _with_entropy(x, ids[rows], inside, up, of_entropy[rows], done, rows)
                    gradients.add(rows, x, None)
                del x
        return *gradients.results(weight, bias), *rest


def _again(head: Head, ids: Tensor, done: _Done, rows: slice) -> Tensor:
    """Compute p - 1[ids] of a chunk, (R, V), once more."""
    x = head.logits(rows)
    for part in blocks(x):
        at = slice(rows.start + part.start, rows.start + part.stop)
        x[part].sub_(done.top[at, None]).exp_().div_(done.total[at, None])
        _slope(x[part], ids[at], None if head.support is None else head.support[at])
    return x


def _with_entropy(
    x: Tensor, ids: Tensor, inside: Tensor, of_logp: Tensor | None, of_entropy: Tensor, done: _Done, rows: slice
) -> None:
    """Turn p - 1[ids] of a chunk (R, V) into the gradient of the loss for its logits, in place.

    d logp_y / d l = 1[y] - p;  d H / d l = -p (log p + H).
    """
    x.scatter_(-1, ids[:, None], done.logp[rows, None].exp())  # p again
    assert done.entropies is not None
    for part in blocks(x):
        at = slice(rows.start + part.start, rows.start + part.stop)
        factor = _finite(x[part].log()).add_(done.entropies[at, None]).mul_(-of_entropy[part, None])
        x[part].mul_(factor if of_logp is None else factor.sub_(of_logp[part, None]))
    if of_logp is not None:
        x.scatter_add_(-1, ids[:, None], of_logp[:, None] * inside)


class _Logprobs(torch.autograd.Function):
    """Log-probs of `ids` and entropies from logits (..., V); only the logits are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor | None, with_entropy: bool) -> Any:
        ctx.set_materialize_grads(False)
        logp, entropies, _, top, total = _sums(logits.clone(), ids, ... if with_entropy else None, True)
        ctx.save_for_backward(logits, ids, top + total.log(), entropies)
        return logp, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logp: Tensor | None, of_entropy: Tensor | None) -> Any:
        if of_logp is None and of_entropy is None:
            return None, None, None
        logits, ids, log_total, entropies = ctx.saved_tensors
        logp = logits - log_total[..., None]
        if of_entropy is None:
            assert of_logp is not None
            out = logp.exp_().mul_(-of_logp[..., None])
        else:
            p = logp.exp()
            out = _finite(logp).add_(entropies[..., None]).mul_(-of_entropy[..., None])
            out = (out if of_logp is None else out.sub_(of_logp[..., None])).mul_(p)
        if of_logp is not None:
            out.scatter_add_(-1, ids[..., None], of_logp[..., None])
        return out, None, None


class _LogSoftmax(torch.autograd.Function):
    """Log-probs of the whole vocabulary; only the result is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        top = logits.amax(-1, keepdim=True)
        logp = logits - top
        total = logp.exp().sum(-1, keepdim=True)
        logp.sub_(total.log_())
        ctx.save_for_backward(logp)
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (logp,) = ctx.saved_tensors
        return logp.exp().mul_(-grad.sum(-1, keepdim=True)).add_(grad)


@torch.no_grad()
def linear_collision(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Tensor | None = None,
    support: Tensor | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    """Compute sum_v p_v^2 of the distribution in `linear_logprobs`, (N,): the probability that two draws are equal.

    It has no gradient.
    """
    head = Head(hidden, weight, bias, temperature, support)
    out = torch.zeros(len(hidden), dtype=precise(hidden[:0]).dtype, device=hidden.device)
    for rows in cut(len(hidden), len(weight), workspace, hidden.device.type, keep=False, buffers=2).chunks:
        x = head.logits(rows)
        x.sub_(x.amax(-1, keepdim=True)).exp_()
        total = x.sum(-1)
        out[rows] = x.square_().sum(-1) / total**2
        del x
    return out
