"""Checks of a recipe before a run starts: numbers and options that contradict each other."""

import math
from collections.abc import Sequence

from whet import ops
from whet.data.batching import per_epoch
from whet.errors import RecipeError
from whet.methods import Algorithm, Objective
from whet.methods.options import MOST_STEPS, Optim
from whet.models import load
from whet.runs import models, rewards
from whet.runs import recipe as fields


def check_arithmetic(recipe: fields.OnlineRecipe, algorithm: Algorithm, verb: str) -> int:
    """Return the answers per update. Raises RecipeError for numbers that no run can use."""
    answers = algorithm.collect.num_generations
    total = recipe.rollout.prompts_per_step * (1 if algorithm.pairs else answers)
    mini_batch_size = recipe.rollout.mini_batch_size or total
    if mini_batch_size > total:
        made = "pair each" if algorithm.pairs else f"x {answers} answers"
        raise RecipeError(
            f"rollout.mini_batch_size: a rollout has {recipe.rollout.prompts_per_step} prompts {made} = {total}; "
            f"got {mini_batch_size}; set --rollout.mini-batch-size too"
        )
    if not algorithm.has_ratio() and (mini_batch_size < total or recipe.rollout.ppo_epochs > 1):
        raise RecipeError(
            f"rollout: {verb} has no importance ratio, so it makes one update per "
            "rollout; "
            f"leave rollout.mini_batch_size out and rollout.ppo_epochs at 1 (got {mini_batch_size} of {total}, "
            f"{recipe.rollout.ppo_epochs} epochs)"
        )
    check_reward_options(recipe, algorithm, verb)
    check_roles(recipe, algorithm, verb)
    _check_updates(recipe, algorithm, recipe.rollout.ppo_epochs * -(-total // mini_batch_size))
    return mini_batch_size


def check_reward_options(recipe: fields.OnlineRecipe, algorithm: Algorithm, verb: str) -> None:
    """Raise RecipeError for options of rewards that the method cannot use."""
    whole = algorithm.advantage is None or algorithm.advantage.op is ops.broadcast
    if any(one.dense for one in recipe.reward) and whole:
        raise RecipeError(
            f"reward.dense: {verb} gives one value to the whole answer, so scores per token would be added up; leave it out"
        )
    resized = algorithm.normalize or algorithm.reward_normalization or algorithm.combine.op is not ops.weighted_sum
    if any(one.dense for one in recipe.reward) and resized:
        raise RecipeError(
            "reward.dense: scores per token cannot be rescaled; leave normalize, reward_normalization and combine at their defaults"
        )
    for number, one in enumerate(recipe.reward):
        if one.step is not None and not one.dense:
            raise RecipeError(f"reward.{number}.step: it says where a dense reward has its scores; set dense: true too")
    if len(recipe.reward) == 1 and algorithm.combine.op is not ops.weighted_sum:
        raise RecipeError(
            "algorithm.combine: it needs several rewards, and there is one; give several, or use weighted_sum"
        )


def check_roles(recipe: fields.OnlineRecipe, algorithm: Algorithm, verb: str) -> None:
    """Raise RecipeError for options of roles that the method does not have, and for sampling without randomness."""
    if recipe.rollout.ema is not None and recipe.model.lora is not None:
        raise RecipeError("rollout.ema: an average of the policy needs all weights trained; leave model.lora out")
    if recipe.sampling.temperature == 0:
        raise RecipeError(
            "sampling.temperature: greedy answers to one prompt are all equal, so nothing can be learned; use a temperature "
            "above 0"
        )
    roles = algorithm.roles()
    for name, given, needed in (
        ("reference", recipe.reference is not None, "reference"),
        ("critic", recipe.critic != fields.Critic(), "critic"),
    ):
        if given and needed not in roles:
            raise RecipeError(f"{name}: {verb} as it is set has no {needed}; leave it out")
    if recipe.rollout.sync_reference.mix != 1.0 and not recipe.rollout.sync_reference.every:
        raise RecipeError(
            "rollout.sync_reference.mix: the reference is never updated; set rollout.sync_reference.every"
        )
    if recipe.rollout.sync_reference.every and (recipe.model.lora is not None or "reference" not in algorithm.roles()):
        raise RecipeError(
            "rollout.sync_reference: it needs a reference that is a model of its own: a method with a KL, and no adapters"
        )


def _check_updates(recipe: fields.OnlineRecipe, algorithm: Algorithm, updates: int) -> None:
    """Raise RecipeError for options that need several updates per rollout, if there is one."""
    if updates == 1 and any(one.op is ops.kl_on for term in algorithm.terms for one in term.loss.walk()):
        raise RecipeError(
            "algorithm.select: kl_cov needs several updates per rollout, and there is one; set more "
            "(rollout.mini_batch_size, rollout.ppo_epochs)"
        )
    if recipe.rollout.target_kl is not None and updates == 1:
        raise RecipeError(
            "rollout.target_kl: it ends the updates of a rollout early, and there is one update; set more "
            "(rollout.mini_batch_size, rollout.ppo_epochs) or leave it out"
        )


def check_ptx(recipe: fields.OnlineRecipe, algorithm: Algorithm, verb: str) -> None:
    """Raise RecipeError for a ptx term without data, and for data without a term."""
    needs_ptx = any(term.stream == "ptx" for term in algorithm.terms)
    if needs_ptx and not recipe.ptx.data:
        raise RecipeError(f"ptx.data: {verb} mixes pre-training rows into every update; give --ptx with `text` rows")
    if recipe.ptx.batch_size != fields.Ptx().batch_size and not needs_ptx:
        raise RecipeError(f"ptx.batch_size: {verb} has no ptx term; leave it out, or set --ptx-coef")
    if recipe.ptx.data and not needs_ptx:
        raise RecipeError(f"ptx.data: {verb} has no ptx term; use the instructgpt method, or set --ptx-coef")


def check_reference(recipe: fields.PreferenceRecipe, objective: Objective) -> None:
    """Raise RecipeError for options of the reference if the method has none, or the reference is not a separate model."""
    has = "ref_logp" in objective.reads()
    refresh = recipe.sync_reference
    if not has and (recipe.reference is not None or recipe.precompute or refresh.every):
        raise RecipeError("reference: this method has no reference; leave reference, precompute and sync_reference out")
    if refresh.every and (recipe.precompute or recipe.model.lora is not None):
        raise RecipeError(
            "sync_reference: the reference must be a model of its own; leave precompute and model.lora out"
        )
    if refresh.mix != 1.0 and not refresh.every:
        raise RecipeError("sync_reference.mix: the reference is never updated; set sync_reference.every")


def check_optim(optim: Optim, where: str) -> None:
    """Raise RecipeError for an optimizer option that has no effect with the others."""
    if optim.kind != "muon" and optim.muon_lr != Optim().muon_lr:
        raise RecipeError(f"{where}.muon_lr: the optimizer is {optim.kind}; set {where}.kind to muon, or leave it out")
    if optim.schedule == "constant" and optim.min_lr_ratio != Optim().min_lr_ratio:
        raise RecipeError(
            f"{where}.min_lr_ratio: a constant schedule does not use it; leave it out, or choose another schedule"
        )
    if optim.schedule_steps is not None and optim.schedule == "constant" and not optim.warmup_ratio:
        raise RecipeError(f"{where}.schedule_steps: a constant learning rate has no schedule; leave it out")


def optim_lines(recipe: fields.TrainingRecipe, critic: bool) -> list[str]:
    """Describe the optimizers of a run, one line per trained role; `critic` says whether there is a critic."""
    name = "reward model" if isinstance(recipe, fields.RewardModelRecipe) else "policy"
    optims = {name: recipe.optim}
    if critic and isinstance(recipe, fields.OnlineRecipe):
        optims["critic"] = recipe.critic.optim or recipe.optim
    trained = "" if recipe.model.lora is None else " (LoRA)"
    return [f"{role}{trained}: {optim.words()}" for role, optim in optims.items()]


def cautions(recipe: fields.OnlineRecipe, algorithm: Algorithm) -> list[str]:
    """Return the warnings to print before a run starts."""
    in_reward = algorithm.penalty is not None and algorithm.penalty.estimator.op is not ops.dense
    in_loss = any(
        one.op in (ops.k2, ops.k3, ops.k3_weighted, ops.k2_sequence)
        for term in algorithm.terms
        for one in term.loss.walk()
    )
    fixes = {"kl_in_reward": "--kl-in-reward.estimator exact", "kl_in_loss": "--kl-in-loss exact"}
    return [
        f"algorithm.{slot}: under top_p, top_k, min_p or min_new_tokens a KL estimated on the sampled tokens is biased, since some "
        f"tokens are never sampled; {fixes[slot]} sums over the whole vocabulary"
        for slot, sampled in (("kl_in_reward", in_reward), ("kl_in_loss", in_loss))
        if sampled and recipe.sampling.truncates
    ] + [*_about_correction(recipe, algorithm), *_about_critic(recipe, algorithm)]


def _about_correction(recipe: fields.OnlineRecipe, algorithm: Algorithm) -> list[str]:
    own = recipe.generator.name == "local" and not recipe.generator.max_staleness
    if algorithm.importance_correction is not None and own and recipe.learner.backend in ("auto", "local"):
        return [
            "algorithm.importance_correction: answers are sampled with the learner's own weights, so every correction is 1"
        ]
    if algorithm.importance_correction is None and recipe.generator.max_staleness:
        return [
            "generator.max_staleness: without a correction, answers of older weights are treated as answers of the current ones; "
            "--importance-correction token_weight corrects for the difference"
        ]
    return []


def _about_critic(recipe: fields.OnlineRecipe, algorithm: Algorithm) -> list[str]:
    if (
        recipe.trunk != "shared"
        or "critic" not in algorithm.roles()
        or recipe.critic.path
        or models.first_adapter(recipe)
    ):
        return []
    return [
        f"critic: it begins untrained, since {one.source} is a whole model and its head is for other hidden states than the trunk's; "
        "--critic.path takes a reward model that is saved as an adapter (whet reward with --model.lora.rank 16 --model.export adapter), "
        "and with --trunk separate the critic starts from this one"
        for one in recipe.reward
        if rewards.is_model(one.source)
    ][:1]


def check_score_adapter(recipe: fields.RewardModelRecipe, last_ids: Sequence[int]) -> None:
    """Raise RecipeError for a reward model saved as an adapter whose base pads with a token that texts end with, because an
    adapter is read with the configuration of its base. Also for losses of a router, which reward models do not have."""
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        if getattr(recipe.model, name):
            raise RecipeError(f"model.{name}: a reward model has no such loss in transformers; leave it out")
    pad = load.pad_of(recipe.model.path, recipe.model.trust_remote_code)
    if recipe.model.export == "adapter" and pad in last_ids:
        raise RecipeError(
            f"model.export: the base {recipe.model.path} pads with token {pad}, which scored texts end with, so the adapter would be "
            "read one token early; leave export at merged, or set pad_token_id in the configuration of the base"
        )


def steps_of(train: fields.Train, elements: int) -> int:
    """Return the number of updates of an offline run. Raises RecipeError if `drop_last` would leave out every batch."""
    if train.drop_last and elements < train.batch_size:
        raise RecipeError(
            f"train.drop_last: there are {elements} elements and a batch has {train.batch_size}, so nothing would be trained; "
            "lower train.batch_size"
        )
    if train.num_steps is not None:
        return train.num_steps
    steps = max(1, math.ceil(train.num_epochs * per_epoch(elements, train.batch_size, train.drop_last)))
    check_steps("train.num_epochs", train.num_epochs, steps)
    return steps


def check_steps(name: str, epochs: float, steps: int) -> None:
    """Raise RecipeError for more steps than the names of checkpoints can have."""
    if steps > MOST_STEPS:
        raise RecipeError(f"{name}: {epochs:g} passes are {steps} steps, and a run has at most {MOST_STEPS}; lower it")
