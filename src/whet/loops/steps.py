"""What the stages of an online run share: the plan of the run, mini-batches, and the log of a step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from whet.data import Batch, Element, lengths_of
from whet.data.batching import per_epoch
from whet.methods.parts import Term
from whet.models.readers import BY_ROLE


@dataclass(frozen=True)
class OnlinePlan:
    """The size and schedule of a run: total steps, prompts per step, elements per mini-batch, epochs per rollout, and saves.

    target_kl            stop the updates of a rollout when KL(old || new) of a mini-batch exceeds it, in nats per token
    ema                  decay of an exponential moving average of the policy
    equal_start          policy and reference start with equal weights; this is checked in the first step
    end_ids              token ids that end an answer
    canary               tokens of the sequence that generator and learner both score after each publish
    low_precision        whether the generator computes in half precision
    sync_every, sync_mix  every `sync_every` steps, the reference moves by the fraction `sync_mix` towards the policy
    max_staleness        largest age in steps of the weights behind a token; above 0, answers are generated ahead
    segment, slots       with max_staleness: tokens per segment of an answer, and concurrent answers per lane
    per_pass             prompts of one pass, whose last step is smaller; None: each step has `prompts`, across passes
    critic_warmup        number of first steps in which only the critic is trained
    save_minutes, save_last  see `checkpoint.Keeper`
    defer                with one update per rollout, take old_logp from the update itself, where nothing before it reads it
    record_every         steps between the rollouts that are written to the run folder; 0: none
    on_divergence        "warn" prints signs of divergence, "stop" ends the run too (see `loops.divergence`)
    """

    steps: int
    prompts: int
    mini_batch_size: int
    epochs: int = 1
    seed: int = 0
    ptx_batch: int = 0
    target_kl: float | None = None
    ema: float | None = None
    equal_start: bool = False
    end_ids: tuple[int, ...] = ()
    canary: int = 160
    low_precision: bool = False
    save_every: int = 0
    keep: int = 2
    sync_every: int = 0
    sync_mix: float = 1.0
    max_staleness: int = 0
    segment: int = 64
    slots: int = 256
    critic_warmup: int = 0
    per_pass: int | None = None
    save_minutes: float = 0.0
    save_last: bool = True
    defer: bool = True
    record_every: int = 1
    on_divergence: str = "warn"

    def prompts_in(self, step: int) -> int:
        """Return the number of prompts of a step.

        >>> [OnlinePlan(4, 4, 4, per_pass=6).prompts_in(step) for step in range(4)]
        [4, 2, 4, 2]
        """
        if self.per_pass is None:
            return self.prompts
        place = step % per_epoch(self.per_pass, self.prompts)
        return min(self.prompts, self.per_pass - place * self.prompts)

    def summed(self, steps: int, amount: Callable[[int], int]) -> int:
        """Return the sum of `amount(prompts of the step)` over the first steps of a run.

        >>> OnlinePlan(4, 4, 4, per_pass=6).summed(3, lambda prompts: prompts)
        10
        """
        if self.per_pass is None:
            return steps * amount(self.prompts)
        each = per_epoch(self.per_pass, self.prompts)
        passes, rest = divmod(steps, each)
        whole = (each - 1) * amount(self.prompts) + amount(self.prompts_in(each - 1))
        return passes * whole + rest * amount(self.prompts)


@dataclass(frozen=True, eq=False)
class MiniBatch:
    """One mini-batch of a rollout. `batch` has its rows and columns; `index` lists its elements in the rollout."""

    batch: Batch
    index: tuple[int, ...]
    epoch: int
    number: int
    step: int = 0
    streams: Mapping[str, Batch] = field(default_factory=dict)


REHEARSED = 16_384
"""Largest number of elements of the batch that is tried before a run. Micro-batches are smaller, unless their budget is above
16,384 times the longest row."""


def longest(sources: Sequence[Sequence[Element]], count: int) -> Batch:
    """Return a batch of the `count` longest elements of all sources, the one that needs most memory, and of at most `REHEARSED` of
    them."""
    lengths = [lengths_of(source) for source in sources]
    ends = np.cumsum([len(own) for own in lengths])
    turn = np.argsort(-np.concatenate(lengths), kind="stable")[: min(count, REHEARSED)]
    owner = np.searchsorted(ends, turn, side="right")
    places = turn - np.where(owner > 0, ends[owner - 1], 0)
    return Batch.of([sources[source][index] for source, index in zip(owner.tolist(), places.tolist(), strict=True)])


def trained_columns(terms: Iterable[Term]) -> dict[str, frozenset[str]]:
    """Return the bare columns that the terms read with gradient, by role."""
    out: dict[str, frozenset[str]] = {}
    for term in terms:
        out[term.role] = out.get(term.role, frozenset()) | (term.reads() & BY_ROLE[term.role])
    return {role: names for role, names in out.items() if names}


RESERVED = ("step", "seconds", "seconds/generate", "seconds/eval", "tokens_per_second")
"""Metrics that the loop writes in each line of metrics.jsonl."""


class StepLog:
    """One step of a loop: its number, counted from 0, and the metrics logged for it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.metrics: dict[str, float] = {}

    def log(self, metrics: Mapping[str, float]) -> None:
        """Add metrics to the line of this step in metrics.jsonl. The line is written when the step ends.

        Raises ValueError for a name that every line has ("step", "seconds"), TypeError for a value that is not a number.
        """
        for name, value in metrics.items():
            number: Any = value
            if getattr(value, "ndim", None) == 0:  # a tensor or an array
                number = number.item()
            if name in RESERVED:
                raise ValueError(f"log: each line has {name!r} already; choose another name")
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise TypeError(f"log: {name} must be a number, got {type(value).__name__}")
            self.metrics[name] = number
