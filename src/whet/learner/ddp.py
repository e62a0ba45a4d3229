"""Data-parallel training (DDP): every worker holds all weights, and gradients are summed once per update."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from whet.errors import ModelError
from whet.learner.base import LearnerContext, WholeOptions
from whet.learner.local import LocalLearner, fingerprint
from whet.models.roles import Role

BUCKET = 1 << 25
"""Size of a bucket of gradients that are summed together, in elements. The last tensor of a bucket may exceed it."""


class ReplicaLearner(LocalLearner):
    """Data parallelism without sharding (DDP): the rows are split over the workers, the weights are replicated.

    Raises ModelError if the workers did not load the same weights.
    """

    def _place(self) -> None:
        super()._place()
        same_weights(self)

    def _clipped(self, role: Role) -> float:
        import torch.distributed as dist

        gradients = [p.grad for p in role.parameters().values() if p.grad is not None]
        bucket: list[Tensor] = []
        for number, gradient in enumerate(gradients):
            bucket.append(gradient)
            full = sum(one.numel() for one in bucket) >= BUCKET
            if full or number + 1 == len(gradients) or gradients[number + 1].dtype != gradient.dtype:
                flat = torch.cat([one.flatten() for one in bucket])
                dist.all_reduce(flat)
                for one, summed in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
                    one.copy_(summed.view_as(one))
                bucket = []
        return super()._clipped(role)


def same_weights(learner: LocalLearner) -> None:
    """Raise ModelError if the weights of a role differ between workers. Called before the weights are sharded."""
    for name, role in learner.roles.items():
        marks = learner.workers.gather(fingerprint(role.parameters()))
        if len(set(marks)) > 1:
            raise ModelError(
                f"the workers loaded different weights for the {name}; do all machines see the same folder?"
            )


Options = WholeOptions


def make(options: WholeOptions, context: LearnerContext) -> Any:
    """Return the class of the learner with its options."""
    return partial(ReplicaLearner, bf16=options.in_bf16(context), offload_frozen=options.offload_frozen)
