"""Build the generator that a recipe names, for training, sampling or evaluation."""

import secrets
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

from whet.cluster.folders import WeightWriter
from whet.data import Chat
from whet.distributed import RestartBudget, Workers
from whet.errors import RecipeError
from whet.generate import GENERATORS, Generator
from whet.generate.base import CheckedGenerator, GeneratorContext, Training
from whet.generate.fleet import Fleet
from whet.generate.shared import SharedGenerator
from whet.learner.local import LocalLearner
from whet.models.roles import Role
from whet.runs import learners, models
from whet.runs import recipe as fields
from whet.runs.adapters import COMMON, Chosen, chosen, named


def chosen_of(recipe: fields.OnlineRecipe | fields.SampleRecipe | fields.EvalRecipe) -> Chosen:
    """Return the generator of a recipe with its options. Raises RecipeError for a wrong name or option."""
    wanted = recipe.generator
    others = COMMON if isinstance(wanted, fields.Generation) else ()
    return chosen(GENERATORS, named(wanted.name, wanted.options, "generator"), "generator", others=others)


def context_of(
    recipe: fields.OnlineRecipe | fields.SampleRecipe | fields.EvalRecipe,
    chat: Chat,
    *,
    workers: int = 1,
    rank: int = 0,
    longest: int = 0,
    policy: Role | None = None,
    role: Callable[[], Role] | None = None,
    gpus: tuple[int, ...] | None = None,
) -> GeneratorContext:
    """Return the context of the generator of a recipe. See `GeneratorContext` and `Training` for the arguments."""
    source = models.source_of(recipe.model)
    lora = recipe.model.lora if isinstance(recipe.model, fields.Model) else None
    training = None
    if isinstance(recipe, fields.OnlineRecipe):
        own, cluster = recipe.generator, recipe.cluster
        training = Training(
            workers, rank, cluster.engines if cluster.address is not None else None, cluster.colocate, own.max_staleness,
            sharded=learners.is_sharded(recipe, max(workers, cluster.learners)),
        )  # fmt: skip
    bf16 = isinstance(recipe, fields.OnlineRecipe) and learners.in_bf16(recipe, max(workers, recipe.cluster.learners))
    dtype = "bfloat16" if bf16 else str(source.torch_dtype()).removeprefix("torch.")
    return GeneratorContext(
        chat, recipe.model.path, dtype, source.torch_device(), recipe.sampling,
        longest=longest, quantized=recipe.model.quantize != "none", lora_rank=lora.rank if lora else None,
        max_num_seqs=recipe.rollout.max_num_seqs if isinstance(recipe, fields.OnlineRecipe) else recipe.max_num_seqs,
        role=role or partial(sampler_role, recipe.model, bf16), policy=policy, training=training, gpus=gpus,
        trust_remote_code=recipe.model.trust_remote_code,
    )  # fmt: skip


def check_generator(recipe: fields.OnlineRecipe, chat: Chat, workers: int) -> None:
    """Raise RecipeError if the generator of the recipe does not support the recipe's options or a server does not answer.
    `workers` is the number of learner processes."""
    wanted = recipe.generator
    if wanted.segment_tokens != fields.Generation().segment_tokens and not wanted.max_staleness:
        raise RecipeError("generator.segment_tokens: answers are waited for; it is for generator.max_staleness above 0")
    if wanted.max_staleness and workers > 1:
        raise RecipeError(
            "generator.max_staleness: torchrun's workers answer and learn in turns; give the engines places of their own "
            "with --cluster auto --cluster.engines 1"
        )
    chosen_of(recipe).check(context_of(recipe, chat, workers=workers))


def engine_of(
    recipe: fields.OnlineRecipe | fields.SampleRecipe | fields.EvalRecipe, context: GeneratorContext, number: int = 0
) -> Generator:
    """Build engine `number` of the generator of a recipe. Raises RecipeError if it reports too little for training."""
    made = chosen_of(recipe).make(replace(context, number=number))
    own = made if type(made).__module__.startswith("whet.") else CheckedGenerator(made)
    if context.training is not None:
        for needed, why in (
            ("sampler_logp", "training compares the log-probs of generator and learner; name them in `reports`"),
            (
                "support",
                "top_p, top_k and min_p need the tokens that could be drawn; leave them out, or use generator local",
            ),
        ):
            if needed not in own.reports and (needed != "support" or context.sampling.truncates):
                own.close()
                raise RecipeError(f"generator.name: {recipe.generator.name} does not report {needed}: {why}")
    return own


def built(
    recipe: fields.OnlineRecipe | fields.SampleRecipe | fields.EvalRecipe, context: GeneratorContext, restarts: int = 0
) -> Generator:
    """Build the generator of a recipe: one in this process, or a fleet of engines that are restarted if they die."""
    engines = chosen_of(recipe).adapter.more("engines")
    if engines is None:
        return engine_of(recipe, context)
    numbers = engines(chosen_of(recipe).options, context)
    return Fleet([partial(engine_of, recipe, context, number) for number in numbers], RestartBudget(restarts))


def generator_of(recipe: fields.OnlineRecipe, chat: Chat, learner: LocalLearner, longest: int) -> Generator:
    """Build the generator of a learner process. Several workers share the requests. `longest` is the longest sequence, in
    tokens."""
    workers = learner.workers
    context = context_of(
        recipe, chat, workers=workers.size, rank=workers.rank, longest=longest, policy=learner.roles["policy"]
    )
    own = built(recipe, context, recipe.cluster.restarts)
    if isinstance(own, Fleet) and _writes_files(recipe, workers, len(own.lanes)):
        attempt = workers.broadcast(secrets.token_hex(8))
        learner.writer = WeightWriter(workers, attempt, adapter=push_of(recipe) == "adapter", everywhere=True)
    return SharedGenerator(own, workers, context.max_num_seqs) if workers.size > 1 else own


def push_of(recipe: fields.OnlineRecipe) -> Literal["weights", "adapter"]:
    """Return what is sent to the generator after an update: "weights" or "adapter"."""
    return "adapter" if getattr(chosen_of(recipe).options, "push", "weights") == "adapter" else "weights"


def _writes_files(recipe: fields.OnlineRecipe, workers: Workers, engines: int) -> bool:
    """Return True if published weights are written to files before engines load them.

    A single learner process that waits for the answers needs no files: each engine reads the weights from its memory. With
    shared memory and several engines, files written once are cheaper.
    """
    several = engines > 1 and getattr(chosen_of(recipe).options, "transfer", "shared") in ("auto", "shared")
    return workers.size > 1 or recipe.generator.max_staleness > 0 or push_of(recipe) == "adapter" or several


def sampler_role(model: fields.Frozen, bf16: bool = False) -> Role:
    """Load a frozen copy of the policy for a generator with its own weights, which computes as the learner does."""
    tokenizer, _ = models.tokenizer_and_chat(model)
    role = models.causal_role("sampler", model, tokenizer, trained=False, seed=0)
    role.compute_in(bf16)
    return role
