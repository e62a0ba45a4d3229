"""Training with DeepSpeed ZeRO, which shards moments (stage 1), also gradients (2), and also weights (3)."""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whet.errors import RecipeError
from whet.extras import require
from whet.learner.base import LearnerContext, ShardedOptions
from whet.learner.ddp import same_weights
from whet.learner.local import LocalLearner
from whet.models.roles import Role
from whet.models.shell import shells

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedLearner(LocalLearner):
    """One DeepSpeed engine per model. `stage` is the ZeRO stage; frozen roles are sharded only at stage 3.

    `bf16` computes in bfloat16 with float32 master weights. `offload` keeps the moments (at stage 3 also the weights) in
    CPU memory. Raises RecipeError for an optimizer that needs whole matrices, and for two trained roles in one model.
    """

    autocasts = False

    def __init__(self, *given: Any, stage: int = 2, offload: bool = False, **options: Any) -> None:
        self.stage, self.offload = stage, offload
        self._engines: dict[str, Any] = {}
        self._touched: set[str] = set()  # roles that have a gradient in this update
        super().__init__(*given, **options)

    def _place(self) -> None:
        same_weights(self)
        self._marks = self._marked()
        deepspeed = imported()
        super()._place()
        for shell, roles in shells(list(self.roles.values())).values():
            trained = [role for role in roles if role.trained]
            if len(trained) > 1:
                raise RecipeError(
                    "trunk: DeepSpeed trains one role per model; use separate models, or learner.backend fsdp"
                )
            if not trained and self.stage < 3:
                if self.bf16 and roles[0].name != "ema":  # ema is only written and exported, so it keeps its precision
                    for parameter in shell.parameters():  # not buffers: DeepSpeed treats the policy in the same way
                        parameter.data = parameter.data.to(torch.bfloat16)
                continue
            for role in trained:
                if self.optims[role.name].needs_whole():
                    kind = self.optims[role.name].kind
                    raise RecipeError(
                        f"optim.kind: {kind} needs whole matrices, but ZeRO shards them; use adamw or ddp"
                    )
            optimizer = self._optimizers[trained[0].name][0][0] if trained else None
            limit = self.optims[trained[0].name].max_grad_norm if trained else 0.0
            if self.stage == 3:
                _register_heads(deepspeed, shell, roles)
            engine, base, *_ = deepspeed.initialize(model=shell, optimizer=optimizer, config=self._config(limit))
            for role in roles:
                role.shell, role.gather = engine, self._whole
            for role in trained:
                self._engines[role.name] = engine
                self._optimizers[role.name] = [(base.optimizer, self.optims[role.name].lr)]
        self._scale = float(self.workers.size)  # DeepSpeed averages gradients over the workers

    def _config(self, limit: float) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage}
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
            if self.stage == 3:
                zero["offload_param"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": limit,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self.bf16},
            "wall_clock_breakdown": False,
        }

    def _clear(self) -> None:
        self._touched.clear()
        for engine in self._engines.values():
            engine.optimizer.zero_grad()
            engine.optimizer.averaged_gradients = {}

    def _backward(self, name: str, loss: Tensor, last: bool) -> None:
        engine = self._engines[name]
        self._touched.add(name)
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss, scale_wrt_gas=False)

    def _clipped(self, role: Role) -> float:
        """Return the gradient norm without clipping. DeepSpeed clips in its step, and the step must wait until the norms of
        all roles were checked."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        if role.name not in self._touched:
            return 0.0
        zero = self._engines[role.name].optimizer
        return float(
            combine_grad_norm_groups(zero._get_norm_groups()) if self.stage == 3 else zero.scaled_global_norm()
        )

    def _step(self, role: Role) -> None:
        if role.name in self._touched:
            self._engines[role.name].step()

    def _shape(self, parameter: Tensor) -> tuple[int, ...]:
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def _whole(self, parameter: Tensor) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        value = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if value is not None:
            return value.detach()
        if not hasattr(parameter, "ds_id"):
            return parameter.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _fill(self, parameter: Tensor, value: Tensor) -> None:
        import deepspeed

        if parameter.requires_grad:  # a frozen parameter has no master copy
            self._put(parameter, value)
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        else:
            parameter.data.copy_(value)

    def _mix(self, mine: Tensor, other: Tensor, mix: float) -> None:
        self._fill(mine, torch.lerp(self._whole(mine), self._whole(other).to(mine.device), mix))

    def _states(self, name: str) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        base = self._optimizers[name][0][0]
        steps = [state["step"] for state in base.state.values() if "step" in state]
        if not steps:
            return
        self._link(name)
        for key, parameter in self.roles[name].parameters().items():
            for moment in MOMENTS:
                value = safe_get_full_optimizer_state(parameter, moment)
                yield f"{key}|{moment}", value.detach()
            yield f"{key}|step", steps[0].detach().reshape(()).clone()

    def _put_states(self, name: str, saved: Mapping[str, Tensor]) -> None:
        if not len(saved):
            return
        step, base = next(saved[key] for key in saved if key.endswith("|step")), self._optimizers[name][0][0]
        zero = self._engines[name].optimizer
        for flat in zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups:
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}  # DeepSpeed creates them in its first step
            base.state[flat] = {"step": step.clone().to(torch.float32), **moments}
        self._link(name)
        parameters = self.roles[name].parameters()
        for key, parameter in parameters.items():
            for moment in MOMENTS:
                self._put(parameter, saved[f"{key}|{moment}"], moment)

    def _put(self, parameter: Any, value: Tensor, moment: str | None = None) -> None:
        """Write a whole value into the master copy of a parameter, or into one of its moments.

        At stage 3 each worker writes its own shard. DeepSpeed's function for whole values fails on the last worker if the
        number of workers does not divide the size of the parameter, and the other workers then wait forever.
        """
        from deepspeed import utils

        value = value.to(parameter.device, torch.float32)
        if self.stage == 3:
            size = parameter.partition_numel()
            flat = torch.nn.functional.pad(value.flatten(), (0, size * self.workers.size - value.numel()))
            own = flat[size * self.workers.rank : size * (self.workers.rank + 1)]
            if moment is None:
                utils.safe_set_local_fp32_param(parameter, own)
            else:
                utils.safe_set_local_optimizer_state(parameter, own, moment)
        elif moment is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, moment)

    def _link(self, name: str) -> None:
        """Link parameters to their moments. ZeRO 1 and 2 do this after the step of the first parameter group, when the other
        groups have no moments yet."""
        optimizer = self._engines[name].optimizer
        if self.stage < 3:
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()


def imported() -> Any:
    """Import deepspeed, with settings that prevent it from compiling ops or guessing an accelerator without a GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in (("DS_BUILD_OPS", "0"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    import deepspeed

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return deepspeed


def _register_heads(deepspeed: Any, shell: Any, roles: list[Role]) -> None:
    """Register with ZeRO-3 the head weights that are read without calling their own module."""
    for role in roles:
        heads = [role.model.get_output_embeddings() if role.linear_head else None, role.head]
        for head in heads:
            for parameter in head.parameters() if head is not None else ():
                deepspeed.zero.register_external_parameter(shell, parameter)


Options = ShardedOptions


def check(options: ShardedOptions, context: LearnerContext) -> None:
    """Raise RecipeError for what DeepSpeed does not support, or if it is not installed."""
    if context.whole:
        raise RecipeError(
            f"optim.kind: {context.whole} needs whole matrices, but {context.name} shards them; use adamw or ddp"
        )
    if options.in_bf16(context) and (context.refreshed or (context.averaged and context.name == "zero3")):
        raise RecipeError(
            "learner.precision: DeepSpeed would keep the averaged reference in half precision; use fsdp, or --learner.precision "
            "float32"
        )
    if context.shared_trunk:
        raise RecipeError("trunk: DeepSpeed trains one role per model; use separate models, or learner.backend fsdp")
    require(f"learner.backend: {context.name}", "deepspeed")


def make(options: ShardedOptions, context: LearnerContext) -> Any:
    """Return the class of the learner with its options."""
    stage = int(context.name[-1])
    return partial(DeepSpeedLearner, stage=stage, bf16=options.in_bf16(context), offload=options.offload)


def shards(context: LearnerContext) -> bool:
    """Return True if every worker has only a shard of the weights, as at stage 3."""
    return context.name == "zero3"
