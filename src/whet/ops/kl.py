"""Estimators of KL(policy || reference) on sampled tokens, the exact KL, and the controllers of its coefficient.

All values are in nats per token unless stated otherwise. With r = ref_logp - logp at a token sampled from the policy,
E[k1] = E[k3] = KL(policy || reference). k2 is biased (the bias is small) and never negative (Schulman, "Approximating KL
divergence", 2020).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from whet.ops.head import WORKSPACE, Cut, Gradients, Head, blocks, cast, cut, precise
from whet.ops.logprobs import log_softmax
from whet.ops.masked import masked_sum
from whet.ops.overflow import expm1, times
from whet.ops.shaping import terminal


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Compute logp - ref_logp: unbiased, may be negative. Any equal shapes.

    >>> k1(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.5000])
    """
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Compute (logp - ref_logp)^2 / 2: never negative. On-policy, its gradient is that of KL(policy || reference)."""
    return 0.5 * (logp - ref_logp) ** 2


def k3(logp: Tensor, ref_logp: Tensor, *, bound: float | None = None) -> Tensor:
    """Compute exp(ref_logp - logp) - 1 - (ref_logp - logp): unbiased and never negative.

    On-policy, its gradient is that of KL(reference || policy). The result is clamped to at most `bound` (OpenRLHF and
    verl: 10), and clamped tokens get no gradient. None does not clamp.
    """
    log_ratio = ref_logp - logp
    estimate = expm1(log_ratio) - log_ratio
    return estimate if bound is None else estimate.clamp(max=bound)


def k3_weighted(logp: Tensor, ref_logp: Tensor, old_logp: Tensor) -> Tensor:
    """Compute ratio x k3, with gradient through the ratio pi / pi_old (DeepSeek-V3.2 2025, equation 7; as in TRL).

    On-policy, its gradient is that of KL(policy || reference) of the token. The gradient of k3 alone is not.
    """
    return _WeightedK3.apply(logp, ref_logp, old_logp)


class _WeightedK3(torch.autograd.Function):
    """e^r (e^g - 1 - g) with r = logp - old_logp and g = ref_logp - logp.

    Its gradient for logp, -g e^r, is a difference of two terms of size e^(r + g), which cancel in float32 from g = 15 on.
    """

    @staticmethod
    def forward(ctx: Any, logp: Tensor, ref_logp: Tensor, old_logp: Tensor) -> Tensor:
        ratio, gap = logp - old_logp, ref_logp - logp
        far = gap.clamp(min=1.0)
        value = torch.where(
            gap > 1,
            (ratio + far + torch.log1p(-(1 + far) * (-far).exp())).exp(),
            times(ratio.exp(), torch.expm1(gap) - gap),
        )
        ctx.save_for_backward(ratio, gap, value)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        ratio, gap, value = ctx.saved_tensors
        far = gap.clamp(min=1.0)
        of_ref = torch.where(
            gap > 1, (ratio + far + torch.log1p(-(-far).exp())).exp(), times(ratio.exp(), torch.expm1(gap))
        )
        return times(times(ratio.exp(), -gap), grad), times(of_ref, grad), times(-value, grad)


def k2_sequence(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """Compute (sum_t logp - ref_logp)^2 / 2 of each answer, placed on its last trained token: (B, T).

    On-policy, its gradient is that of KL(policy || reference) over whole answers, including the effect on later tokens.
    With the reduction `sequence_sum`, a KL in the loss then has the same optimum as a KL in the reward.
    """
    total = masked_sum(logp - ref_logp, mask, 1)
    return terminal(0.5 * total**2, mask)


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Compute KL(p || q) = sum_v p_v (log p_v - log q_v) of two distributions given as logits: (..., V) -> (...)."""
    logp, ref_logp = log_softmax(logits), log_softmax(ref_logits)
    gap = (logp - ref_logp).masked_fill(logp.isneginf(), 0.0)  # before the product, so that the gradient is not NaN
    return (logp.exp() * gap).sum(-1)


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: Tensor | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    """Compute `exact_kl` of softmax((hidden @ weight.T + bias) / temperature) and the same for the reference: (N,).

    hidden (N, H), weight (V, H), bias (V,), temperature (N,); H of the reference may differ. Tokens are processed in chunks
    with at most `workspace` logits of both together. What is kept for the backward pass, and what it computes again, is as in
    `linear_logprobs`; the gradient is computed where it is needed.
    """
    given = (cast(hidden), weight, bias, cast(ref_hidden), ref_weight, ref_bias, temperature)
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in given):
        return _LinearKL.apply(*given, workspace)
    with torch.no_grad():
        return _Heads.of(given, workspace, (False,) * 6).run(early=False)[0]


@dataclass(frozen=True)
class _Heads:
    """The heads of a policy and of a reference, and the chunks of their tokens."""

    own: Head
    other: Head
    needs: tuple[bool, ...]
    """for which gradients are needed: hidden, weight and bias of the policy, and of the reference"""
    plan: Cut

    @classmethod
    def of(cls, given: Sequence[Any], workspace: int, needs: tuple[bool, ...]) -> "_Heads":
        """Build it from hidden, weight and bias of both, and the temperature."""
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature = given
        own, other = (
            Head(hidden, weight, bias, temperature).cast(),
            Head(ref_hidden, ref_weight, ref_bias, temperature).cast(),
        )
        keep = any(needs) and not cls.early(needs)
        plan = cut(len(own.hidden), len(own.weight), workspace, own.hidden.device.type, keep=keep, buffers=2)
        return cls(own, other, needs, plan)

    @staticmethod
    def early(needs: tuple[bool, ...]) -> bool:
        """Return whether the forward pass can compute the gradient: only hidden states need one."""
        return any(needs) and not any(needs[n] for n in (1, 2, 4, 5))

    def chunk(self, rows: slice, slopes: bool) -> tuple[Tensor, list[Tensor | None]]:
        """Return the KL of a chunk, (R,), and its gradients for the logits of policy and reference, (R, V), where needed.

        d KL / d l_p = p (log p - log q - KL);  d KL / d l_q = q - p.
        """
        x, y = self.own.logits(rows), self.other.logits(rows)
        out = torch.empty(len(x), dtype=x.dtype, device=x.device)
        for at in blocks(x):
            logp, logq = x[at], y[at]
            for one in (logp, logq):
                one.sub_(one.amax(-1, keepdim=True))
                one.sub_(one.exp().sum(-1, keepdim=True).log_())
            p = logp.exp()
            q = logq.exp() if slopes and any(self.needs[3:]) else None
            gap = logp.sub_(logq)
            if self.own.unbounded:
                gap.masked_fill_(p == 0, 0.0)  # before the product, so that it is not NaN
            out[at] = (gap * p).sum(-1)
            if slopes:
                gap.sub_(out[at, None]).mul_(p)
                if q is not None:
                    torch.sub(q, p, out=logq)
        return out, [x if any(self.needs[:3]) else None, y if any(self.needs[3:]) else None]

    def gradients(self) -> tuple[Gradients, Gradients]:
        """Return sums for both, still empty."""
        return Gradients(self.own, self.needs[:3]), Gradients(self.other, self.needs[3:])  # type: ignore[arg-type]

    def run(self, early: bool) -> tuple[Tensor, list[Tensor | None]]:
        """Return the KL, (N,), and the gradients for the hidden states (`early`) or for the logits of the chunks that are kept."""
        out, kept = precise(self.own.hidden[:0]).new_zeros(len(self.own.hidden)), []
        sums = self.gradients() if early else ()
        with torch.autocast(self.own.hidden.device.type, enabled=False):
            for number, rows in enumerate(self.plan.chunks):
                out[rows], slopes = self.chunk(rows, early or number < self.plan.kept)
                for one, slope in zip(sums, slopes, strict=False):
                    if slope is not None:
                        one.add(rows, slope, None)
                if not early and number < self.plan.kept:
                    kept = [None if slope is None else slope.to(self.own.hidden.dtype) for slope in slopes]
                del slopes
        return out, [one.hidden for one in sums] if early else kept


class _LinearKL(torch.autograd.Function):
    """See `linear_kl`."""

    @staticmethod
    def forward(ctx, *given):
        *tensors, workspace = given
        heads = _Heads.of(tuple(tensors), workspace, ctx.needs_input_grad[:6])
        out, kept = heads.run(heads.early(heads.needs))
        ctx.workspace, ctx.kept = workspace, len(kept)
        ctx.save_for_backward(*kept, *([] if heads.early(heads.needs) else tensors))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kept, tensors = ctx.saved_tensors[: ctx.kept], ctx.saved_tensors[ctx.kept :]
        if not tensors:
            own, other = (None if one is None else (one * grad[:, None]).to(one.dtype) for one in kept)
            return own, None, None, other, None, None, None, None
        heads = _Heads.of(tensors, ctx.workspace, ctx.needs_input_grad[:6])
        sums = heads.gradients()
        with torch.autocast(heads.own.hidden.device.type, enabled=False):
            for number, rows in enumerate(heads.plan.chunks):
                slopes = kept if number < heads.plan.kept else heads.chunk(rows, True)[1]
                for one, slope in zip(sums, slopes, strict=False):
                    if slope is not None:
                        one.add(rows, slope, grad[rows])
                del slopes
        return *sums[0].results(*tensors[1:3]), *sums[1].results(*tensors[4:6]), None, None


@dataclass(frozen=True)
class FixedKL:
    """Controller that keeps the coefficient constant."""

    coef: float
    by = "kl"

    def next(self, coef: float, kl: float, sequences: int) -> float:
        """Return `coef` unchanged."""
        return coef


@dataclass(frozen=True)
class AdaptiveKL:
    """Proportional controller that moves the KL toward `target` (Ziegler et al. 2019, section 2.2).

    e = clip(kl / target - 1, -0.2, 0.2); coef <- coef (1 + e sequences / horizon).
    `target` is in nats per answer, `horizon` in answers.
    """

    coef: float
    target: float
    horizon: int = 10_000
    by = "kl"

    def next(self, coef: float, kl: float, sequences: int) -> float:
        """Return the coefficient after a rollout of `sequences` answers with mean KL `kl`."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return coef * (1.0 + error * sequences / self.horizon)


@dataclass(frozen=True)
class HalvingKL:
    """Controller that halves `coef` when kl < target / 1.5 and doubles it when kl > 1.5 target (Schulman et al. 2017, section 4)."""

    coef: float
    target: float
    by = "kl_old"

    def next(self, coef: float, kl: float, sequences: int) -> float:
        """Return the coefficient after a measured `kl`, in the unit of `target`.

        `kl` is KL(old || new) at the end of the updates, or the KL to the reference for a KL in the reward.
        """
        if kl < self.target / 1.5:
            return coef / 2
        return coef * 2 if kl > self.target * 1.5 else coef


@dataclass(frozen=True)
class AdaptiveEntropy:
    """Controller of the entropy bonus's weight for a target entropy (Skywork-OR1, He et al. 2025, section 3.2.4).

    After each rollout, the weight rises by `step` if the entropy (nats per token) was at or below the target, and falls
    by `step` otherwise. It stays within [0, most]. Skywork-OR1 and TRL also set it to 0 at once above the target; this
    controller does not.
    """

    coef: float
    target: float
    step: float = 0.005
    most: float = 1.0
    by = "entropy"

    def next(self, coef: float, entropy: float, sequences: int) -> float:
        """Return the weight after a rollout with mean entropy per token `entropy`."""
        return min(max(coef + (self.step if entropy <= self.target else -self.step), 0.0), self.most)


@dataclass(frozen=True)
class RunningMean:
    """Exponential moving average coef <- decay coef + (1 - decay) measured: the reward shift of BCO (Jung et al. 2024).

    It averages over the previous mini-batches (online: rollouts).
    """

    coef: float = 0.0
    decay: float = 0.9
    by = "reward"

    def next(self, coef: float, measured: float, sequences: int) -> float:
        """Return the average after a mini-batch (online: a rollout) with mean implicit reward `measured`."""
        return self.decay * coef + (1 - self.decay) * measured


Controller = FixedKL | AdaptiveKL | HalvingKL | AdaptiveEntropy | RunningMean
