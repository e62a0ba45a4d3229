"""The Learner seam: who learns. The protocol, and what an update returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from whet.data import COLUMNS, Batch, Weights
from whet.distributed import Workers
from whet.methods import Part, Term
from whet.ops import Counts

Work = Sequence[tuple[Term, Batch, Counts]]
"""One update: the terms of the objective, each with its mini-batch and that mini-batch's global counts."""


@dataclass(frozen=True)
class UpdateResult:
    """What one update did: the new version, each term's loss, each role's gradient norm and learning rate.

    `now` has, per stream, the columns that were read with gradient, detached, in the order of the mini-batch's rows.
    """

    version: int
    losses: Mapping[str, float]
    grad_norm: Mapping[str, float]
    lr: Mapping[str, float]
    now: Mapping[str, Mapping[str, Tensor]]


class Learner(Protocol):
    """Who learns. A mini-batch is handed over whole; how it is split is the learner's business and changes no number.

    `workers` are the processes that all hold a part of this learner and run the loop with it; alone where there is one.
    """

    version: int
    workers: Workers

    @property
    def low_precision(self) -> bool:
        """A role is computed in half precision, so that its numbers are only nearly those of another program."""

    def measure(self, batch: Batch, columns: frozenset[str]) -> Batch:
        """The batch with these measured columns (see `data.columns`), without gradient or dropout."""

    def forward_backward(self, work: Work) -> UpdateResult:
        """Compute the losses and the gradient of a whole mini-batch. The result has no norms and rates yet."""

    def optim_step(self) -> UpdateResult:
        """Clip the gradient of `forward_backward` per role and take one optimizer step; version + 1."""

    def update(self, work: Work) -> UpdateResult:
        """`forward_backward`, then `optim_step`."""

    def columns(self, name: str, batch: Batch, bare: frozenset[str]) -> Mapping[str, Tensor]:
        """Bare columns (see `models.readers`) of the batch as one role reads them, without gradient or dropout."""

    def evaluate(self, work: Work) -> UpdateResult:
        """The same losses and columns without gradient, dropout or step."""

    def publish(self) -> Weights:
        """The policy's weights for a generator, with their version."""

    def blend(self, target: str, source: str, mix: float) -> None:
        """target <- (1 - mix) target + mix source: an average of the policy, or a refreshed reference."""

    def rescale(self, role: str, scale: float, shift: float) -> None:
        """The role's scalar scores s become scale (s + shift)."""

    def save(self, folder: Path) -> None:
        """Everything the learner owns: safetensors and JSON, one form for every engine."""

    def load(self, folder: Path) -> None:
        """Back to the bit what `save` wrote. Raises CheckpointError when it does not fit."""

    def export(self, role: str, folder: Path, tokenizer: Any = None, *, merge: bool = True) -> None:
        """A standard Hugging Face folder of one role."""


def look_across(learner: Learner, select: Sequence[tuple[str, Part]], batch: Batch) -> Batch:
    """The mini-batch with the columns that look across it, computed at the learner's weights of now without gradient."""
    fresh = frozenset(name for _, one in select for name in one.reads() if COLUMNS[name].hop == "select")
    fresh = frozenset(name for name in fresh if COLUMNS[name].role is not None)
    seen = learner.measure(batch, fresh) if fresh else batch
    return batch.with_columns(**{name: one(seen.columns) for name, one in select})
