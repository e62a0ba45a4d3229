"""Who works in a run: the learner, the generator and the rewards of a recipe, in this process or in every worker."""

from collections.abc import Callable
from functools import partial
from typing import Any

from whet.cli import build
from whet.cli import recipe as fields
from whet.dials import Optim
from whet.errors import RecipeError
from whet.generate import Generator
from whet.generate.local import LocalGenerator
from whet.generate.shared import SharedGenerator
from whet.learner.local import LocalLearner
from whet.methods import Algorithm, Objective
from whet.models.roles import Role
from whet.records import Chat
from whet.rewards import Weighted
from whet.rewards.functions import FunctionReward
from whet.rewards.shared import SharedReward
from whet.workers import Workers


def engine_of(recipe: fields.Offline | fields.Online, workers: int) -> str:
    """The learner's engine by name. Raises RecipeError where it cannot work with so many workers."""
    learning = recipe.learner
    engine = {"auto": "local" if workers == 1 else "fsdp"}.get(learning.engine, learning.engine)
    if engine == "local" and workers > 1:
        raise RecipeError(f"learner.engine: local is one process, and there are {workers}; take ddp, fsdp or zero2")
    if engine in ("local", "ddp") and (learning.half or learning.offload):
        what = "half" if learning.half else "offload"
        raise RecipeError(f"learner.{what}: {engine} has no such thing; take fsdp or zero2, or model.dtype")
    if engine.startswith("zero") and isinstance(recipe, fields.Online) and recipe.trunk == "shared":
        raise RecipeError("trunk: DeepSpeed trains one role per model; take separate models, or learner.engine fsdp")
    return engine


def learner_of(
    recipe: fields.Offline | fields.Online,
    roles: dict[str, Role],
    optims: dict[str, Optim],
    total: int,
    workers: Workers,
) -> LocalLearner:
    """A learner of these roles on the recipe's engine; `total` is the number of updates of the whole run."""
    engine, learning = engine_of(recipe, workers.size), recipe.learner
    dials: dict[str, Any] = {"half": learning.half, "offload": learning.offload}
    kind: Callable[..., LocalLearner] = LocalLearner
    if engine == "ddp":
        from whet.learner.replica import ReplicaLearner as kind
    elif engine == "fsdp":
        from whet.learner.fsdp import FSDPLearner

        kind = partial(FSDPLearner, **dials)
    elif engine.startswith("zero"):
        from whet.learner.deepspeed import DeepSpeedLearner

        kind = partial(DeepSpeedLearner, stage=int(engine[-1]), **dials)
    dropout = recipe.train.dropout if isinstance(recipe.train, fields.Train) else 0.0
    return kind(
        roles, optims, total=total, budget=recipe.train.micro_tokens, packed=recipe.train.packing, dropout=dropout,
        seed=recipe.seed, workers=workers,
    )  # fmt: skip


def offline_learner(
    verb: str, recipe: fields.Offline, objective: Objective, total: int, workers: Workers = Workers()
) -> LocalLearner:
    """The learner of a run on rows of a file, its models loaded."""
    tokenizer, _ = build.tokenizer_and_chat(recipe.model)
    if isinstance(recipe, fields.RewardModel):
        role = build.scorer_role(
            "reward", recipe.model, tokenizer, trained=True, seed=recipe.seed, path=recipe.model.path,
            readout=recipe.head.readout,
        )  # fmt: skip
    else:
        role = build.causal_role("policy", recipe.model, tokenizer, trained=True, seed=recipe.seed)
    roles = {role.name: role}
    if isinstance(recipe, fields.Preference) and "ref_logp" in objective.reads():
        roles["reference"] = build.reference_role(recipe.model, role, recipe.reference, tokenizer)
    return learner_of(recipe, roles, {role.name: recipe.optim}, total, workers)


def online_learner(
    recipe: fields.Online, algorithm: Algorithm, total: int, workers: Workers = Workers(), *, scores: bool = True
) -> LocalLearner:
    """The learner of a run on own answers, its models loaded; with `scores` the reward models are among its roles."""
    tokenizer, _ = build.tokenizer_and_chat(recipe.model)
    cast = build.cast(recipe, algorithm, tokenizer)
    roles = dict(cast.roles)
    if scores:
        roles |= build.reward_roles(recipe, tokenizer, roles["policy"] if recipe.trunk == "shared" else None)
    return learner_of(recipe, roles, cast.optims, total, workers)


def rewards_of(recipe: fields.Online, tokenizer: Any, learner: Any, workers: Workers = Workers()) -> list[Weighted]:
    """The rewards; reward models are read by the learner, functions are shared out over the workers."""
    out = build.rewards_of(recipe, tokenizer, learner.columns)
    if workers.size == 1:
        return out
    return [
        Weighted(one.name, SharedReward(one.reward, workers), one.weight)
        if isinstance(one.reward, FunctionReward)
        else one
        for one in out
    ]


def generator_of(recipe: fields.Online, chat: Chat, learner: LocalLearner) -> Generator:
    """The generator of a learner's process; several workers answer together."""
    workers, unit = learner.workers, recipe.rollout.answers_at_once
    own: Generator
    if recipe.generator.engine == "local":
        own = local_generator(recipe, chat, learner)
    else:
        raise NotImplementedError
    return SharedGenerator(own, workers, unit) if workers.size > 1 else own


def local_generator(recipe: fields.Online, chat: Chat, learner: LocalLearner) -> LocalGenerator:
    """Answers from the learner's own policy, or from a copy where its weights are in shards or move meanwhile."""
    policy = learner.roles["policy"]
    shards = engine_of(recipe, learner.workers.size) in ("fsdp", "zero3")
    ahead = recipe.generator.max_staleness > 0
    role = sampler_role(recipe) if shards or ahead else policy
    return LocalGenerator(role, chat.end_ids, chat.text, unit=recipe.rollout.answers_at_once, copy=role is not policy)


def sampler_role(recipe: fields.Online) -> Role:
    """A plain model of the policy's kind for a generator that has its own copy of the weights."""
    tokenizer, _ = build.tokenizer_and_chat(recipe.model)
    return build.causal_role("sampler", recipe.model, tokenizer, trained=False, seed=0)
