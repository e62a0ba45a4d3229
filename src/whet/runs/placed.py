"""Run on a Ray cluster: check the recipe, start the workers, and build what each worker needs."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from whet.cluster import Attempt, Wanted, connected, survive
from whet.cluster.ray import require, there
from whet.distributed import launched
from whet.errors import RecipeError
from whet.generate import Generator
from whet.learner.local import LocalLearner
from whet.registry import OBJECTS
from whet.rewards import Weighted
from whet.rewards.model import reading
from whet.runs import config, generators, inputs, learners, models, rewards
from whet.runs import recipe as fields
from whet.runs.yaml_text import yaml_tree
from whet.terminal import caution

T = TypeVar("T")


def check_cluster(recipe: fields.OfflineRecipe | fields.OnlineRecipe) -> None:
    """Raise RecipeError for cluster options without a cluster, options that conflict, or if Ray is not installed."""
    wanted, plain = recipe.cluster, fields.Cluster()
    if wanted.address is None:
        for name in ("learners", "engines", "rewards", "colocate", "min_learners"):
            if getattr(wanted, name) != getattr(plain, name):
                raise RecipeError(f"cluster.{name}: there is no cluster; set --cluster auto, or leave it out")
        return
    require()
    for count in {wanted.learners, wanted.min_learners}:
        learners.backend_of(recipe, count)
    if launched():
        raise RecipeError("cluster: torchrun starts the workers, or the cluster does; leave one of them out")
    if wanted.min_learners > wanted.learners:
        raise RecipeError(
            f"cluster.min_learners: at most the {wanted.learners} of cluster.learners; got {wanted.min_learners}"
        )
    if isinstance(recipe, fields.OfflineRecipe) and (wanted.engines or wanted.rewards):
        raise RecipeError("cluster: training on a file has neither engines nor rewards; leave them out")
    if isinstance(recipe, fields.OnlineRecipe):
        if recipe.generator.max_staleness and not wanted.engines:
            raise RecipeError(
                "generator.max_staleness: the learner's workers answer and learn in turns; set cluster.engines"
            )
        if wanted.colocate and not wanted.engines:
            raise RecipeError(
                "cluster.colocate: there are no engines of their own; set cluster.engines, or leave it out"
            )


def on_cluster(
    recipe: fields.OfflineRecipe | fields.OnlineRecipe,
    attempt: Callable[[Attempt, bool], None],
    resume: bool,
    quiet: bool,
) -> None:
    """Run `attempt(workers, resume)` on the cluster. If workers die, run it again from the last checkpoint.
    Raises RestartsExhausted if workers die too often."""
    own = recipe.cluster
    wanted = Wanted(
        own.learners, own.engines, own.rewards, colocate=own.colocate, cpus=own.cpus, min_learners=own.min_learners,
        placement_timeout=own.placement_timeout,
    )  # fmt: skip
    assert own.address is not None
    if not recipe.train.save_every and not quiet:
        caution("train.save_every: a killed worker costs the whole run without checkpoints; set it")
    with connected(own.address, cpus=wanted.total_cpus):
        if there("GPU") and recipe.model.device != "cpu":
            wanted = replace(wanted, gpus=1.0)
            if isinstance(recipe, fields.OnlineRecipe):
                models = any(rewards.is_model(one.source) for one in recipe.reward)
                found = generators.chosen_of(recipe)
                gpus = found.adapter.more("gpus")
                size = 1 if gpus is None else gpus(found.options)
                wanted = replace(wanted, engine_gpus=float(size), reward_gpus=float(models))
        survive(attempt, wanted, restarts=own.restarts, resume=resume, limit=own.timeout, quiet=quiet)


def answers_inside(recipe: fields.OnlineRecipe, longest: int, learner: LocalLearner) -> Generator:
    """Build the generator in the process of a learner worker."""
    _, chat = models.tokenizer_and_chat(recipe.model, recipe.sampling)
    return generators.generator_of(recipe, chat, learner, longest)


def engine_alone(recipe: fields.OnlineRecipe, longest: int, number: int) -> Generator:
    """Build engine `number` in a separate process."""
    _, chat = models.tokenizer_and_chat(recipe.model, recipe.sampling)
    context = generators.context_of(recipe, chat, longest=longest, gpus=())  # Ray has chosen its GPUs
    return generators.engine_of(recipe, context, number)


def carrying(recipe: fields.TrainingRecipe, make: Callable[..., T]) -> Callable[..., T]:
    """Return `make` for another process, with the Python objects that the recipe names."""
    tree = yaml_tree(config.to_yaml(recipe))
    return partial(_made, {name: OBJECTS[name] for _, name in inputs.strings(tree) if name in OBJECTS}, make)


def _made(objects: Mapping[str, Any], make: Callable[..., T], *given: Any) -> T:
    OBJECTS.update(objects)
    return make(*given)


def rewards_alone(recipe: fields.OnlineRecipe) -> list[Weighted]:
    """Build all rewards of the recipe, including reward models, in a separate process."""
    tokenizer, _ = models.tokenizer_and_chat(recipe.model, recipe.sampling)
    roles = rewards.reward_roles(recipe)
    for role in roles.values():
        role.compute_in(learners.in_bf16(recipe, recipe.cluster.learners))
    train = recipe.train
    readers = {
        name: reading(role, train.max_tokens_per_micro_batch, packed=train.padding_free, shared=train.shared_prefix)
        for name, role in roles.items()
    }
    return rewards.rewards_of(recipe, tokenizer, lambda name, *given: readers[name](*given))
