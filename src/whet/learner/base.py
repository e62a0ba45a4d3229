"""The Learner protocol, the table of learners, and the result of an update."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from whet.data import COLUMNS, Batch, Weights
from whet.distributed import Workers
from whet.methods import Part, Term
from whet.models.roles import Role
from whet.ops import Counts
from whet.registry import Registry

Work = Sequence[tuple[Term, Batch, Counts]]
"""One update: the terms of the objective, each with its mini-batch and that mini-batch's global counts."""


@dataclass(frozen=True)
class UpdateResult:
    """The result of one update: the new version, the loss of each term, the gradient norm and learning rate of each role.

    `now` has, per stream, the columns that were computed with gradient, detached, in the order of the mini-batch's rows.
    """

    version: int
    losses: Mapping[str, float]
    grad_norm: Mapping[str, float]
    lr: Mapping[str, float]
    now: Mapping[str, Mapping[str, Tensor]]


class Learner(Protocol):
    """Compute columns and update the weights of all roles. A learner gets whole mini-batches.

    The learner decides how to split a mini-batch into micro-batches; the split changes no result. `workers` are the
    processes that each hold a part of this learner and run the loop. With one process it is `Workers()`.
    """

    version: int
    workers: Workers

    @property
    def low_precision(self) -> bool:
        """True if a role computes in half precision. Other programs then reproduce its numbers only approximately."""

    def measure(self, batch: Batch, columns: frozenset[str]) -> Batch:
        """Return the batch with these measured columns added (see `data.columns`), computed without gradient or dropout."""

    def rehearse(self, batch: Batch, columns: Mapping[str, frozenset[str]]) -> None:
        """Compute and discard the gradient of the largest micro-batch, so that a lack of memory shows before long work.

        `columns` has the bare columns of each trained role. Raises RunStopped with what to lower.
        """

    def forward_backward(self, work: Work) -> UpdateResult:
        """Compute the losses and the gradient of a whole mini-batch. The result has no norms and learning rates yet."""

    def optim_step(self) -> UpdateResult:
        """Clip the gradient of `forward_backward` per role, take one optimizer step, and increase the version by 1."""

    def update(self, work: Work) -> UpdateResult:
        """Call `forward_backward`, then `optim_step`."""

    def columns(self, name: str, batch: Batch, bare: frozenset[str]) -> Mapping[str, Tensor]:
        """Return bare columns (see `models.readers`) of the batch, computed by one role without gradient or dropout."""

    def evaluate(self, work: Work) -> UpdateResult:
        """Compute the losses and columns of `update` without gradient, dropout or optimizer step."""

    def publish(self) -> Weights:
        """Return the policy's weights for a generator, with their version."""

    def blend(self, target: str, source: str, mix: float) -> None:
        """Set target <- (1 - mix) target + mix source, for a moving average of the policy or an update of the reference."""

    def rescale(self, role: str, scale: float, shift: float) -> None:
        """Change the role's head so that its scalar scores s become scale (s + shift)."""

    def save(self, folder: Path) -> None:
        """Save the whole state of the learner in safetensors and JSON files. The format is the same for every backend."""

    def load(self, folder: Path, accepted: Collection[str] = ()) -> None:
        """Restore the state that `save` wrote, bit for bit. Raises CheckpointError if it does not fit this learner, or if the
        weights of a frozen role have changed that `accepted` does not name."""

    def export(
        self,
        role: str,
        folder: Path,
        tokenizer: Any = None,
        *,
        merge: bool = True,
        end_ids: Sequence[int] | None = None,
    ) -> None:
        """Save one role as a standard Hugging Face folder. `end_ids` are the tokens that end a turn; default: those of the
        tokenizer's chat template."""


@dataclass(frozen=True)
class LearnerContext:
    """The facts of a run that a learner's options are checked against.

    name          name of the backend
    workers       number of learner processes
    whole         the kind of optimizer of a role that needs whole weights, such as "muon"; empty if there is none
    shared_trunk  several roles are trained in one model
    averaged      the run has a moving average of the policy
    refreshed     the reference moves towards the policy
    half          the weights are float32 on a GPU that computes in bfloat16
    """

    name: str = "local"
    workers: int = 1
    whole: str = ""
    shared_trunk: bool = False
    averaged: bool = False
    refreshed: bool = False
    half: bool = False


@dataclass(frozen=True)
class LearnerOptions:
    """Options of all learners of whet."""

    precision: Literal["auto", "bf16", "float32"] = "auto"
    """"bf16" computes in bfloat16; weights, their gradients and moments stay float32; "auto" is bf16 on a GPU, float32 on a CPU"""
    tf32: bool = False
    """GPUs multiply float32 matrices as TensorFloat-32, with 10 bits: faster, and other numbers"""

    may_change: ClassVar[tuple[str, ...]] = ("precision",)
    """Options that a resumed run may change. The precision is in the checkpoints, which `LocalLearner.load` compares."""

    def in_bf16(self, context: LearnerContext) -> bool:
        """Return whether a learner with these options computes in bfloat16 over float32 weights."""
        return self.precision == "bf16" or (self.precision == "auto" and context.half)


@dataclass(frozen=True)
class WholeOptions(LearnerOptions):
    """Options of learners that hold whole models."""

    offload_frozen: bool = False
    """keep the reference and reward models in CPU memory while nothing reads them; each reading copies them to the GPU"""

    may_change: ClassVar[tuple[str, ...]] = ("precision", "offload_frozen")


@dataclass(frozen=True)
class ShardedOptions(LearnerOptions):
    """Options of learners that shard their weights."""

    offload: bool = False
    """keep what is sharded in CPU memory between uses"""

    may_change: ClassVar[tuple[str, ...]] = ("precision", "offload")


LEARNERS = Registry(
    "learners",
    {
        "local": "whet.learner.local", "ddp": "whet.learner.ddp", "fsdp": "whet.learner.fsdp",
        "zero1": "whet.learner.deepspeed", "zero2": "whet.learner.deepspeed", "zero3": "whet.learner.deepspeed",
    },
    Learner,
    others=["auto"],
    given=("roles", "optims", "total", "budget", "packed", "shared", "dropout", "seed", "workers"),
)  # fmt: skip
"""The learners by name. `make` returns a constructor with the parameters of `LocalLearner`.

A module may also have `shards(context)`, and a class the attribute `sharded`: whether no process has all weights.
"""


class WeightsWriter(Protocol):
    """Write the published weights of a learner to a folder, from which engines load them."""

    def __call__(self, role: Role) -> Path:
        """Write the weights of a role and return their folder. All workers must call it together."""

    def close(self) -> None:
        """Remove the written folders."""


def look_across(learner: Learner, select: Sequence[tuple[str, Part]], batch: Batch) -> Batch:
    """Add the columns that need the whole mini-batch, computed with the learner's current weights without gradient."""
    if not select:
        return batch
    fresh = frozenset(name for _, one in select for name in one.reads() if COLUMNS[name].stage == "select")
    fresh = frozenset(name for name in fresh if COLUMNS[name].role is not None)
    seen = learner.measure(batch, fresh) if fresh else batch
    return batch.with_columns(**{name: one(seen.columns) for name, one in select})
