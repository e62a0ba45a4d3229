"""Build the learner of a recipe on its backend."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from whet.distributed import Workers, first
from whet.errors import ModelError, RecipeError
from whet.extras import require
from whet.learner.base import LEARNERS, LearnerContext, LearnerOptions, ShardedOptions, WholeOptions
from whet.learner.local import LocalLearner
from whet.methods import Algorithm, Objective
from whet.methods.options import Optim
from whet.models import load
from whet.models.probe import probe
from whet.models.roles import Role
from whet.models.sizes import micro_batch_tokens
from whet.rewards import Weighted
from whet.rewards.shared import RepeatedReward, SharedReward
from whet.runs import config, models, rewards
from whet.runs import recipe as fields
from whet.runs.adapters import AUTO, Chosen, chosen, named
from whet.terminal import caution

RecipeT = TypeVar("RecipeT", bound=fields.TrainingRecipe)


def chosen_of(recipe: fields.TrainingRecipe, workers: int) -> tuple[Chosen, LearnerContext]:
    """Return the learner's backend with its options, and its context.
    Raises RecipeError if it does not support the recipe or the number of workers."""
    learning = recipe.learner
    optims = (recipe.optim, critic_optim(recipe))
    whole = next((one.kind for one in optims if one.needs_whole()), "")
    name, options = learning.backend, dict(learning.options)
    if name == "auto":
        own = config.fields_of(WholeOptions)
        plain = all(one in own or value == getattr(ShardedOptions(), one, None) for one, value in options.items())
        held = whole or options.get("offload_frozen", False)
        name = "local" if workers == 1 and plain else "ddp" if held else AUTO
        if plain and name != AUTO:
            options = {one: value for one, value in options.items() if one in own}
    found = chosen(LEARNERS, named(name, options, "learner"), "learner", "backend")
    refreshed = getattr(getattr(recipe, "rollout", recipe), "sync_reference", fields.SyncReference()).every > 0
    half = models.dtype_of(recipe.model) == "float32" and models.half_by_default(recipe.model.device)
    context = LearnerContext(name, workers, whole, refreshed=refreshed, half=half)
    if isinstance(recipe, fields.OnlineRecipe):
        shared, averaged = recipe.trunk == "shared", recipe.rollout.ema is not None
        context = replace(context, shared_trunk=shared, averaged=averaged)
    _check_precision(recipe, found.options)
    for one in optims:
        if one.needs_bitsandbytes():
            require(f"optim.kind: {one.kind}", "bitsandbytes")
    found.check(context)
    return found, context


def _check_precision(recipe: fields.TrainingRecipe, options: Any) -> None:
    """Raise RecipeError for types of numbers that cannot be trained, or that contradict each other."""
    model = recipe.model
    if model.dtype == "float16":
        raise RecipeError(
            "model.dtype: whet does not train in float16, where small gradients become 0 (it has no loss scaling); leave it at "
            "auto, and set --learner.precision bf16"
        )
    if getattr(options, "precision", None) == "bf16" and model.dtype == "float64":
        raise RecipeError("learner.precision: bf16 computes over float32 weights, and model.dtype is float64; drop one")


def in_bf16(recipe: fields.TrainingRecipe, workers: int) -> bool:
    """Return whether the learner computes in bfloat16 over float32 weights."""
    found, context = chosen_of(recipe, workers)
    return isinstance(found.options, LearnerOptions) and found.options.in_bf16(context)


def backend_of(recipe: fields.OfflineRecipe | fields.OnlineRecipe, workers: int) -> str:
    """Return the name of the learner's backend. Raises RecipeError as `chosen_of`."""
    return chosen_of(recipe, workers)[1].name


def is_sharded(recipe: fields.TrainingRecipe, workers: int) -> bool:
    """Return True if no learner process has all weights of the policy."""
    found, context = chosen_of(recipe, workers)
    shards = found.adapter.more("shards")
    return shards(context) if shards is not None else bool(getattr(found.adapter.home, "sharded", False))


def sized(recipe: RecipeT) -> RecipeT:
    """Return the recipe with the tokens of a micro-batch, for its model and this machine if it names none."""
    if recipe.train.max_tokens_per_micro_batch is not None:
        return recipe
    source = models.source_of(recipe.model)
    threads = recipe.threads or torch.get_num_threads()
    tokens = micro_batch_tokens(load.width(source), source.torch_device().type, threads)
    return replace(recipe, train=replace(recipe.train, max_tokens_per_micro_batch=tokens))  # type: ignore[arg-type]


def critic_optim(recipe: fields.OfflineRecipe | fields.OnlineRecipe) -> Optim:
    """Return the optimizer options of the critic: its own, or those of the policy."""
    return (recipe.critic.optim if isinstance(recipe, fields.OnlineRecipe) else None) or recipe.optim


def learner_of(
    recipe: fields.OfflineRecipe | fields.OnlineRecipe,
    roles: dict[str, Role],
    optims: dict[str, Optim],
    total: int,
    workers: Workers,
    rows: Sequence[Tensor],
) -> LocalLearner:
    """Build a learner of these roles on the backend of the recipe, after trying how they are read on some `rows` (token ids).

    `total` is the number of updates after which the learning-rate schedules end. Raises ModelError as `probe`, and for a
    model whose rows must be read one by one if the weights are sharded or with dropout, which need batches.
    """
    found, context = chosen_of(recipe, workers.size)
    kind: Callable[..., LocalLearner] = found.make(context)
    dropout = recipe.train.dropout if isinstance(recipe.train, fields.Train) else 0.0
    _prepare_precision(found.options, roles, in_bf16(recipe, workers.size))
    for name, role in roles.items():
        probe(role, rows, packed=recipe.train.padding_free)
        if role.paths.padding is False and (is_sharded(recipe, workers.size) or (dropout and role.trained)):
            what = (
                "train.dropout: leave it out"
                if dropout
                else f"learner.backend: {context.name} shards the weights; use ddp"
            )
            raise ModelError(f"{what}, because padding disturbs the {name}, so its rows are read one by one")
    budget = workers.broadcast(sized(recipe).train.max_tokens_per_micro_batch)
    return kind(
        roles, optims, total=total, budget=budget, packed=recipe.train.padding_free, shared=recipe.train.shared_prefix,
        dropout=dropout, seed=recipe.seed, workers=workers,
    )  # fmt: skip


def _prepare_precision(options: Any, roles: dict[str, Role], bf16: bool) -> None:
    """Let the roles compute as the learner will, before they are tried. Raises RecipeError for TF32 without a GPU."""
    for role in roles.values():
        role.compute_in(bf16)
    if getattr(options, "tf32", False):
        device = next(iter(roles.values())).device
        if device.type != "cuda":
            raise RecipeError(f"learner.tf32: the models are on a {device.type}, and TF32 is of GPUs; leave it out")
        torch.set_float32_matmul_precision("high")
    held = {parameter.dtype for role in roles.values() if role.trained for parameter in role.parameters().values()}
    if torch.bfloat16 in held and first():
        caution(
            "model.dtype: the trained weights are bfloat16, in which updates below 0.4 % of a weight are lost; leave it at "
            "auto, and set --learner.precision bf16 to compute in bfloat16 over float32 weights"
        )


def offline_learner(
    recipe: fields.OfflineRecipe,
    objective: Objective,
    total: int,
    tokenizer: Any,
    rows: Sequence[Tensor],
    workers: Workers = Workers(),
) -> LocalLearner:
    """Load the models of an offline run and build its learner. `total` is the number of updates of the run, `rows` some of
    its rows as token ids."""
    load.quiet()
    if isinstance(recipe, fields.RewardModelRecipe):
        role = models.scorer_role(
            "reward", recipe.model, tokenizer, trained=True, seed=recipe.seed, path=recipe.model.path,
            readout=recipe.head.readout,
        )  # fmt: skip
        _check_whole_text(recipe, role)
    else:
        role = models.causal_role("policy", recipe.model, tokenizer, trained=True, seed=recipe.seed)
    roles = {role.name: role}
    if isinstance(recipe, fields.PreferenceRecipe) and "ref_logp" in objective.reads():
        roles["reference"] = models.reference_role(recipe.model, role, recipe.reference, tokenizer)
    return learner_of(recipe, roles, {role.name: recipe.optim}, total, workers, rows)


def _check_whole_text(recipe: fields.RewardModelRecipe, role: Role) -> None:
    """Raise RecipeError for options that need a scalar head on the hidden states of tokens, if the model has none."""
    for name, given in (("head.standardize", recipe.head.standardize), ("train.dropout", recipe.train.dropout)):
        if given and role.whole_text:
            raise RecipeError(
                f"{name}: {recipe.model.path} is read through the forward of its own class, not as a scalar head on its last "
                "token; leave it out"
            )


def online_learner(
    recipe: fields.OnlineRecipe,
    algorithm: Algorithm,
    total: int,
    tokenizer: Any,
    rows: Sequence[Tensor],
    workers: Workers = Workers(),
    *,
    scores: bool = True,
) -> LocalLearner:
    """Load the models of an online run, with its judges, and with its reward models if `scores` is True, and build its learner.
    `rows` are some of its prompts as token ids."""
    load.quiet()
    judges = rewards.judge_roles(recipe)
    cast = models.cast(recipe, algorithm, tokenizer)
    roles = dict(cast.roles) | judges
    if scores:
        roles |= rewards.reward_roles(recipe, roles["policy"] if recipe.trunk == "shared" else None)
    return learner_of(recipe, roles, cast.optims, total, workers, rows)


def shared_rewards(
    recipe: fields.OnlineRecipe, tokenizer: Any, learner: Any, workers: Workers = Workers()
) -> list[Weighted]:
    """Build the rewards. The learner computes reward models. Rewards with `per_group` split the groups over the workers."""
    return spread(rewards.rewards_of(recipe, tokenizer, learner.columns), workers)


def spread(out: list[Weighted], workers: Workers) -> list[Weighted]:
    """Return rewards that split the groups over the workers if they have `per_group`, and otherwise score all groups on each of
    them. An error of one worker is raised on all."""
    if workers.size == 1:
        return out
    return [
        replace(
            one,
            reward=(SharedReward if getattr(one.reward, "per_group", False) else RepeatedReward)(one.reward, workers),
        )
        for one in out
    ]
