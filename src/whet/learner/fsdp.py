"""Training with torch's FSDP2: weights, gradients and moments of every role are sharded over the workers."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from whet.errors import RecipeError
from whet.learner.base import LearnerContext, ShardedOptions
from whet.learner.ddp import same_weights
from whet.learner.local import LocalLearner
from whet.models.load import decoder_layers
from whet.models.roles import Role
from whet.models.shell import shells


class FSDPLearner(LocalLearner):
    """Apply `torch.distributed.fsdp.fully_shard` to each decoder layer and to each model with its heads.

    `bf16` computes in bfloat16, while weights, sums of gradients and moments keep the dtype they were loaded in. `offload`
    keeps the shards in CPU memory between uses. Frozen roles are sharded too. Raises RecipeError for an optimizer
    that needs whole matrices.
    """

    autocasts = False

    def __init__(self, *given: Any, offload: bool = False, **options: Any) -> None:
        self.offload = offload
        super().__init__(*given, **options)

    def _place(self) -> None:
        from torch.distributed import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        same_weights(self)
        self._marks = self._marked()
        device = next(iter(self.roles.values())).device
        options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (self.workers.size,))}
        # without this the root stays unsharded after a forward without gradient, and the optimizer does not see its shards
        options["reshard_after_forward"] = True
        if self.offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        inside = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        # the inputs of a shell are a role and a batch, so their tensors must not be cast
        outside = MixedPrecisionPolicy(
            torch.bfloat16, torch.float32, output_dtype=torch.float32, cast_forward_inputs=False
        )
        for shell, roles in shells(list(self.roles.values())).values():
            for role in roles:
                if role.trained and self.optims[role.name].needs_whole():
                    kind = self.optims[role.name].kind
                    raise RecipeError(
                        f"optim.kind: {kind} needs whole matrices, but FSDP shards them; use adamw or ddp"
                    )
                for parameter in role.parameters().values():
                    parameter.requires_grad_(role.trained)  # before sharding: a shard keeps the flag of its creation
            for layer in decoder_layers(shell.model):
                fully_shard(layer, **(options | ({"mp_policy": inside} if self.bf16 else {})))
            fully_shard(shell, **(options | ({"mp_policy": outside} if self.bf16 else {})))
            for role in roles:
                role.shell, role.gather = shell, self._whole
        self._scale = float(self.workers.size)  # FSDP averages gradients over the workers
        super()._place()

    def _clipped(self, role: Role) -> float:
        parameters = [p for p in role.parameters().values() if p.grad is not None]
        norm: Any = torch.nn.utils.clip_grad_norm_(parameters, self.optims[role.name].max_grad_norm, foreach=True)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _whole(self, parameter: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        value: Any = parameter.detach()  # a DTensor if the parameter is sharded
        if not isinstance(value, DTensor):
            return value
        moved: Any = value.to(value.device_mesh.device_type)
        return moved.full_tensor()

    def _fill(self, parameter: Tensor, value: Tensor) -> None:
        parameter.to_local().copy_(self._like(parameter, value).to_local())  # type: ignore[attr-defined]

    def _mix(self, mine: Tensor, other: Tensor, mix: float) -> None:
        own, theirs = (one.to_local() for one in (mine, other))  # type: ignore[attr-defined]
        own.lerp_(theirs.to(own), mix)

    def _like(self, parameter: Tensor, value: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            return value.to(parameter.device)
        # every worker has read the whole tensor, so no communication is needed
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None).to(parameter.device)


Options = ShardedOptions


def check(options: ShardedOptions, context: LearnerContext) -> None:
    """Raise RecipeError for an optimizer that needs whole matrices."""
    if context.whole:
        raise RecipeError(f"optim.kind: {context.whole} needs whole matrices, but fsdp shards them; use adamw or ddp")


def make(options: ShardedOptions, context: LearnerContext) -> Any:
    """Return the class of the learner with its options."""
    return partial(FSDPLearner, bf16=options.in_bf16(context), offload=options.offload)


def shards(context: LearnerContext) -> bool:
    """Return True: every worker has only a shard of the weights."""
    return True
