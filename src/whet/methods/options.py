"""Options of sampling, optimizer, KL and value loss, and the formula of the learning-rate schedule: dataclasses without torch."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Decay = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
"""A time limit. Python's timers end at 9.2e9 seconds."""
Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
NotNegativeInt = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Elements = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
"""Prompts, answers or rows of one batch or rollout."""
Processes = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
"""Processes, GPUs or connections."""
MOST_STEPS = 99_999_999
"""Largest number of steps of a run: the names of checkpoints and rollouts have eight digits."""
Steps = Annotated[int, msgspec.Meta(ge=1, le=MOST_STEPS)]


@dataclass(frozen=True)
class Sampling:
    """Sampling options of the generator."""

    max_new_tokens: Count = 256
    """maximum length of an answer in tokens, including the end token"""
    temperature: NotNegative = 1.0
    """divisor of the logits; 0 is greedy"""
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """keep the most probable tokens whose total probability reaches this value; 1 is off"""
    top_k: NotNegativeInt = 0
    """keep this many of the most probable tokens; 0 is off"""
    min_p: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    """keep tokens with at least this share of the largest probability; 0 is off"""
    min_new_tokens: NotNegativeInt = 0
    """an answer has at least this many tokens before its end token, which until then has probability 0; 0 is off"""
    skip_special_tokens: bool = False
    """leave special tokens out of the text of answers; without it only the closing end token is left out"""

    def __post_init__(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}")

    @property
    def truncates(self) -> bool:
        """Whether some tokens are excluded, so that the sampling log-prob differs from that of the full distribution."""
        return self.filters or self.min_new_tokens > 0

    @property
    def filters(self) -> bool:
        """Whether improbable tokens are excluded."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True)
class Optim:
    """An optimizer and its learning-rate schedule."""

    lr: Positive = 1e-5
    """peak learning rate; with LoRA the default is 10 times that of full training"""
    kind: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "muon"] = "adamw"
    """optimizer; "muon" updates the matrices of the decoder layers, and adamw the rest. Those with "8bit" keep moments in 8 bits
    (not those of embedding layers), and "paged" ones move moments out of the GPU's memory when it is full; they need bitsandbytes"""
    muon_lr: Positive = 0.02
    """peak learning rate of the matrices updated by muon"""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """decay rates of adamw's first and second moments"""
    eps: Positive = 1e-8
    """epsilon of adamw"""
    weight_decay: NotNegative = 0.0
    """decoupled weight decay, applied only to matrices"""
    max_grad_norm: Positive = 1.0
    """maximum norm of the gradient, per role; larger gradients are scaled down"""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """decay of the learning rate after the warm-up"""
    warmup_ratio: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    """share of all updates used for the warm-up"""
    min_lr_ratio: Share = 0.1
    """final learning rate, as a share of lr; 0 ends at 0"""
    schedule_steps: Steps | None = None
    """steps after which the schedule has ended; set it to extend a run later; default: all steps of the run"""

    def words(self) -> str:
        """Return the optimizer, its learning rate and schedule as text.

        >>> Optim(lr=1e-6, schedule="linear", warmup_ratio=0.1, min_lr_ratio=0.0).words()
        'adamw, learning rate 1e-06: warm-up over 10% of the updates, then linear to 0'
        """
        matrices = f" ({self.muon_lr:g} for matrices)" if self.kind == "muon" else ""
        rising = f"warm-up over {100 * self.warmup_ratio:g}% of the updates, then " if self.warmup_ratio else ""
        end = f"{100 * self.min_lr_ratio:g}% of it" if self.min_lr_ratio else "0"
        falling = "constant" if self.schedule == "constant" else f"{self.schedule} to {end}"
        return f"{self.kind}, learning rate {self.lr:g}{matrices}: {rising}{falling}"

    def needs_whole(self) -> bool:
        """Return True if the optimizer does not work on a shard of a weight."""
        return self.kind != "adamw"

    def needs_bitsandbytes(self) -> bool:
        """Return True if the optimizer is one of the package bitsandbytes."""
        return self.kind not in ("adamw", "muon")

    def depends_on_length(self) -> bool:
        """Return True if the learning rates of the first steps depend on the number of steps of the run."""
        return self.schedule_steps is None and (self.schedule != "constant" or self.warmup_ratio > 0)

    def factor(self, update: int, total: int) -> float:
        """Return the learning rate of update 0, 1, ... as a share of `lr`. The schedule ends after `total` updates."""
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
    """Low-rank adapters, trained instead of all weights (Hu et al. 2021)."""

    rank: Annotated[int, msgspec.Meta(ge=1, le=65_536)] = 16
    """rank of the update of each matrix"""
    alpha: Count = 32
    """scale of the update, which is multiplied by alpha / rank"""
    targets: str | tuple[str, ...] = "all-linear"
    """names of the modules that get an adapter; "all-linear" is every linear layer except the head"""


@dataclass(frozen=True)
class KL:
    """KL(policy || reference) as a penalty in the reward."""

    coef: NotNegative = 0.05
    """coefficient; 0 still loads the reference and measures the KL"""
    controller: Literal["fixed", "adaptive", "halving"] = "fixed"
    """"adaptive" moves the KL toward the target (Ziegler et al. 2019), "halving" halves or doubles the coefficient"""
    target: Positive | None = None
    """target KL, in nats per answer"""
    horizon: Count = 10_000
    """time scale of the adaptive controller, in answers"""
    estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    """estimator of the KL on the sampled tokens; "exact" sums over the whole vocabulary"""
    where: Literal["token", "sequence", "sequence_sum"] = "token"
    """"token" puts its KL on each token; "sequence" puts sum KL / length on the last token, "sequence_sum" sum KL"""


@dataclass(frozen=True)
class Truncated:
    """Treatment of answers cut off at the length limit."""

    rule: Literal["keep", "mask", "penalize", "bootstrap"] = "keep"
    """"mask" does not train it, "penalize" subtracts amount from its score, "bootstrap" uses the critic's final value"""
    amount: NotNegative = 1.0
    """penalty of the rule "penalize", in units of the score"""


@dataclass(frozen=True)
class Value:
    """Loss of the critic: squared error to the returns, clipped around the old value."""

    clip_range_vf: Positive | None = 0.2
    """maximum change of the value from the old value; null is no limit"""
    vf_coef: Positive = 1.0
    """weight of the critic loss; it scales only the critic's gradient, because the critic is a separate model"""
    gae_lambda: Share | None = None
    """lambda of the critic's target (VAPO: 1); null is the lambda of the advantage"""


@dataclass(frozen=True)
class Entropy:
    """A bonus for the entropy of the policy's distributions, in nats per token."""

    ent_coef: NotNegative = 0.001
    """weight of the bonus; with a target, its initial weight"""
    target: Positive | None = None
    """target entropy; the weight rises at or below it and falls above it; null keeps the weight fixed"""
    increment: Positive = 0.005
    """change of the weight after each rollout"""
    max_coef: Positive = 1.0
    """maximum weight"""
