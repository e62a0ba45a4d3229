"""Build the learner of a recipe on its backend."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from whet.distributed import Workers
from whet.errors import RecipeError
from whet.learner.local import LocalLearner
from whet.methods import Algorithm, Objective
from whet.methods.options import Optim
from whet.models import load
from whet.models.roles import Role
from whet.rewards import Weighted
from whet.rewards.shared import SharedReward
from whet.runs import models, rewards
from whet.runs import recipe as fields


def backend_of(recipe: fields.OfflineRecipe | fields.OnlineRecipe, workers: int) -> str:
    """Return the learner's backend. Raises RecipeError if it does not support the recipe or the number of workers."""
    learning = recipe.learner
    muon = "muon" in (recipe.optim.kind, critic_optim(recipe).kind)
    alone = workers == 1 and not ((learning.precision == "bf16") or learning.offload)
    engine = ("local" if alone else "ddp" if muon else "fsdp") if learning.backend == "auto" else learning.backend
    if muon and engine not in ("local", "ddp"):
        raise RecipeError(f"optim.kind: muon needs whole matrices, but {engine} shards them; use adamw or ddp")
    averaged = isinstance(recipe, fields.OnlineRecipe) and recipe.rollout.ema is not None and engine == "zero3"
    refreshed = getattr(getattr(recipe, "rollout", recipe), "sync_reference", fields.SyncReference()).every
    if (learning.precision == "bf16") and engine.startswith("zero") and (refreshed or averaged):
        raise RecipeError("learner.precision: DeepSpeed would keep the averaged reference in half precision; use fsdp")
    if engine == "local" and workers > 1:
        raise RecipeError(
            f"learner.backend: local runs in one process, but there are {workers} workers; use ddp, fsdp or zero2"
        )
    if engine in ("local", "ddp") and ((learning.precision == "bf16") or learning.offload):
        what = "precision" if (learning.precision == "bf16") else "offload"
        raise RecipeError(f"learner.{what}: {engine} does not support it; use fsdp or zero2, or model.dtype")
    if engine.startswith("zero") and isinstance(recipe, fields.OnlineRecipe) and recipe.trunk == "shared":
        raise RecipeError("trunk: DeepSpeed trains one role per model; use separate models, or learner.backend fsdp")
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        raise RecipeError('learner.backend: deepspeed is not installed; pip install "whet[deepspeed]"')
    return engine


def critic_optim(recipe: fields.OfflineRecipe | fields.OnlineRecipe) -> Optim:
    """Return the optimizer options of the critic: its own, or those of the policy."""
    return (recipe.critic.optim if isinstance(recipe, fields.OnlineRecipe) else None) or recipe.optim


def learner_of(
    recipe: fields.OfflineRecipe | fields.OnlineRecipe,
    roles: dict[str, Role],
    optims: dict[str, Optim],
    total: int,
    workers: Workers,
) -> LocalLearner:
    """Build a learner of these roles on the backend of the recipe. `total` is the number of updates of the run."""
    engine, learning = backend_of(recipe, workers.size), recipe.learner
    options: dict[str, Any] = {"bf16": (learning.precision == "bf16"), "offload": learning.offload}
    kind: Callable[..., LocalLearner] = LocalLearner
    if engine == "ddp":
        from whet.learner.ddp import ReplicaLearner as kind
    elif engine == "fsdp":
        from whet.learner.fsdp import FSDPLearner

        kind = partial(FSDPLearner, **options)
    elif engine.startswith("zero"):
        from whet.learner.deepspeed import DeepSpeedLearner

        kind = partial(DeepSpeedLearner, stage=int(engine[-1]), **options)
    dropout = recipe.train.dropout if isinstance(recipe.train, fields.Train) else 0.0
    return kind(
        roles, optims, total=total, budget=recipe.train.max_tokens_per_micro_batch, packed=recipe.train.packing, dropout=dropout,
        seed=recipe.seed, workers=workers,
    )  # fmt: skip


def offline_learner(
    recipe: fields.OfflineRecipe, objective: Objective, total: int, tokenizer: Any, workers: Workers = Workers()
) -> LocalLearner:
    """Load the models of an offline run and build its learner. `total` is the number of updates of the run."""
    load.quiet()
    if isinstance(recipe, fields.RewardModelRecipe):
        role = models.scorer_role(
            "reward", recipe.model, tokenizer, trained=True, seed=recipe.seed, path=recipe.model.path,
            readout=recipe.head.readout,
        )  # fmt: skip
    else:
        role = models.causal_role("policy", recipe.model, tokenizer, trained=True, seed=recipe.seed)
    roles = {role.name: role}
    if isinstance(recipe, fields.PreferenceRecipe) and "ref_logp" in objective.reads():
        roles["reference"] = models.reference_role(recipe.model, role, recipe.reference, tokenizer)
    return learner_of(recipe, roles, {role.name: recipe.optim}, total, workers)


def online_learner(
    recipe: fields.OnlineRecipe,
    algorithm: Algorithm,
    total: int,
    tokenizer: Any,
    workers: Workers = Workers(),
    *,
    scores: bool = True,
) -> LocalLearner:
    """Load the models of an online run, with its reward models if `scores` is True, and build its learner."""
    load.quiet()
    cast = models.cast(recipe, algorithm, tokenizer)
    roles = dict(cast.roles)
    if scores:
        roles |= rewards.reward_roles(recipe, tokenizer, roles["policy"] if recipe.trunk == "shared" else None)
    return learner_of(recipe, roles, cast.optims, total, workers)


def shared_rewards(
    recipe: fields.OnlineRecipe, tokenizer: Any, learner: Any, workers: Workers = Workers()
) -> list[Weighted]:
    """Build the rewards. The learner computes reward models. Rewards with `per_group` split the groups over the workers."""
    out = rewards.rewards_of(recipe, tokenizer, learner.columns)
    if workers.size == 1:
        return out
    return [
        Weighted(one.name, SharedReward(one.reward, workers), one.weight)
        if getattr(one.reward, "per_group", False)
        else one
        for one in out
    ]
