"""Learning on several workers that each hold all weights: gradients are summed once per update."""

import torch
from torch import Tensor

from whet.errors import ModelError
from whet.learner.local import LocalLearner, fingerprint
from whet.models.roles import Role

BUCKET = 1 << 25
"""Most numbers that travel in one sum."""


class ReplicaLearner(LocalLearner):
    """Data parallelizm without sharding (DDP): the work is dealt out, the weights are the same everywhere.

    Raises ModelError when the workers did not load the same weights.
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
    """Raises ModelError where the workers' roles differ before they are spread."""
    for name, role in learner.roles.items():
        marks = learner.workers.gather(fingerprint(role.parameters()))
        if len(set(marks)) > 1:
            raise ModelError(
                f"the workers loaded different weights for the {name}; do all machines see the same folder?"
            )
