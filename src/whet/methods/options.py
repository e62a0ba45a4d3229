"""The options that recipes set: frozen records, light to import, every field with its unit and range."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]
NotNegativeInt = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn."""

    max_new_tokens: Count = 256
    """longest answer, in tokens, the end token included"""
    temperature: NotNegative = 1.0
    """divides the logits; 0 is greedy"""
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """keep the most probable tokens that reach this probability together; 1 is off"""
    top_k: NotNegativeInt = 0
    """keep that many tokens; 0 is off"""
    min_p: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    """keep tokens with at least this share of the most probable one's probability; 0 is off"""

    @property
    def truncates(self) -> bool:
        """Some tokens can never be drawn, so the log-prob sampled with is not the model's own."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True)
class Optim:
    """An optimizer and its learning-rate schedule."""

    lr: Positive = 1e-5
    """peak learning rate"""
    kind: Literal["adamw", "muon"] = "adamw"
    """"muon" acts on the matrices inside the decoder layers, with adamw on the rest"""
    muon_lr: Positive = 0.02
    """peak learning rate of muon's matrices"""
    betas: tuple[float, float] = (0.9, 0.95)
    """adamw's decay of first and second moments"""
    eps: Positive = 1e-8
    """adamw's epsilon"""
    weight_decay: NotNegative = 0.0
    """decoupled weight decay, on matrices alone"""
    max_grad_norm: Positive = 1.0
    """the gradient is scaled down to this norm, per role"""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """how the learning rate falls after the warm-up"""
    warmup_ratio: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    """share of all updates over which it rises"""
    min_lr_ratio: Share = 0.1
    """what it falls to, as a share of lr"""

    def factor(self, update: int, total: int) -> float:
        """The learning rate of update 0 ... total - 1 as a share of `lr`."""
        rising = self.warmup_ratio * total
        if update < rising:
            return (update + 1) / (rising + 1)
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (update - rising) / max(1.0, total - rising))
        left = 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * left


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters instead of all weights (Hu et al. 2021)."""

    rank: Count = 16
    """rank of the update of each matrix"""
    alpha: Count = 32
    """the update is scaled by alpha / rank"""
    targets: str | tuple[str, ...] = "all-linear"
    """module names that get an adapter; "all-linear" is every linear layer but the head"""


@dataclass(frozen=True)
class KL:
    """KL(policy || reference) as a cost in the reward."""

    coef: NotNegative = 0.05
    """coefficient; 0 still measures the KL, the reference stays"""
    controller: Literal["fixed", "adaptive", "halving"] = "fixed"
    """"adaptive" steers towards the target (Ziegler et al. 2019), "halving" halves or doubles the coefficient"""
    target: Positive | None = None
    """KL to aim at, in nats per answer"""
    horizon: Count = 10_000
    """answers over which the adaptive controller acts"""
    estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    """how the KL is estimated on the sampled tokens; "exact" sums over the whole vocabulary"""
    where: Literal["token", "sequence", "sequence_sum"] = "token"
    """"token" charges each token its own; "sequence" charges sum KL / length on the last one, "sequence_sum" sum KL"""


@dataclass(frozen=True)
class Truncated:
    """What happens to an answer cut off at the length limit."""

    rule: Literal["keep", "mask", "penalize", "bootstrap"] = "keep"
    """"mask": its tokens are not trained; "penalize": `amount` is taken off its score; "bootstrap": the critic's value
    after its last token stands for all that would have followed, its score and penalties included"""
    amount: NotNegative = 1.0
    """what a missing end token costs under "penalize", in units of the score"""


@dataclass(frozen=True)
class Value:
    """The critic's loss: squared error to the returns, clipped around the old value."""

    clip_range_vf: Positive | None = 0.2
    """how far the value may move from the old one; null is free"""
    vf_coef: Positive = 1.0
    """its weight beside the policy's loss; the critic is a model of its own, so this scales its gradient alone"""
    gae_lambda: Share | None = None
    """lambda of the critic's own target (VAPO: 1); null is the credit's"""


@dataclass(frozen=True)
class Entropy:
    """A bonus for the entropy of the policy's distributions, in nats per token."""

    ent_coef: NotNegative = 0.001
    """its weight; with a target, the weight it starts with"""
    target: Positive | None = None
    """its weight rises while the rollouts' entropy is at or below this, and falls above it; null keeps it fixed"""
    increment: Positive = 0.005
    """how much the weight rises or falls after each rollout"""
    max_coef: Positive = 1.0
    """largest weight"""
