"""Prepare online runs, which train on answers of the policy (ppo, grpo and the other online methods)."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from whet.data import Chat, Element, Prompt
from whet.data.batching import per_epoch
from whet.distributed import first, launched
from whet.errors import Problems, RecipeError
from whet.generate import Generator
from whet.learner import Learner
from whet.loops import online
from whet.loops.evaluation import HeldOutPrompts
from whet.loops.interrupt import Stop
from whet.methods import Algorithm, compose
from whet.models import load
from whet.models.probe import SOME
from whet.rewards import Weighted
from whet.runs import checks, config, data, evaluation, folder, generators, learners, models, rewards
from whet.runs import recipe as fields
from whet.runs.early import NO_REWARD, check_evaluation
from whet.runs.slots import checked
from whet.terminal import caution


@dataclass(frozen=True)
class OnlineJob:
    """The checked inputs of an online run, without weights. `longest` is the longest sequence of a generator, in tokens;
    `scheduled` is the number of updates after which the learning-rate schedules end."""

    method: str
    recipe: fields.OnlineRecipe
    algorithm: Algorithm
    plan: online.OnlinePlan
    tokenizer: Any
    chat: Chat
    prompts: Sequence[Prompt]
    longest: int
    updates: int
    scheduled: int
    ptx: Sequence[Element] = field(default_factory=list)
    held_out: Sequence[Prompt] = ()

    @property
    def make(self) -> Callable[..., Learner]:
        """A function that builds the learner of a worker: `make(workers)`."""
        scores = not self.recipe.cluster.rewards
        rows = [torch.tensor(prompt.ids) for prompt in self.prompts[:SOME]]
        return partial(
            learners.online_learner, self.recipe, self.algorithm, self.scheduled, self.tokenizer, rows, scores=scores
        )

    def loop(
        self,
        learner: Learner,
        generator: Generator,
        scorers: Sequence[Weighted],
        where: Path,
        options: folder.Options,
        stop: Stop,
    ) -> online.OnlineLoop:
        """Open the run folder and return the training loop."""
        run = folder.opened(where, self.recipe, options, self.method, learner.workers)
        held_out = None
        if self.held_out:
            own = self.recipe.eval
            held_out = HeldOutPrompts(
                evaluation.plan_of(own), partial(self.export, learner), self.held_out, evaluation.sampling_of(self.recipe),
                own.num_generations, evaluation.judges_of(self.recipe, self.tokenizer, learner, learner.workers),
            )  # fmt: skip
        return online.OnlineLoop(
            self.algorithm, learner, generator, scorers, self.prompts, self.recipe.sampling, self.plan, run, ptx=self.ptx,
            resume=options.resume, stop=stop, title=self.method, quiet=options.quiet,
            evaluation=held_out,
        )  # fmt: skip

    def length(self) -> str:
        """Return the length of the run in words: steps, prompts, answers and passes."""
        plan, answers = self.plan, self.algorithm.collect.num_generations
        total = plan.summed(plan.steps, lambda prompts: prompts)
        return (
            f"{plan.steps} steps of {plan.prompts} prompts with {answers} answers each, {self.updates} updates: "
            f"{total / len(self.prompts):.4g} passes over {len(self.prompts)} prompts"
        )

    def finish(self, loop: online.OnlineLoop, where: Path) -> None:
        """Write the trained policy to `where / "model"`, and its moving average, if any, to `where / "ema"`."""
        self.export(loop.learner, where / "model")
        if self.recipe.rollout.ema is not None:
            loop.learner.export("ema", where / "ema", self.tokenizer, end_ids=self.chat.end_ids)

    def export(self, learner: Learner, where: Path) -> None:
        """Write the policy with its current weights to a folder in Hugging Face format."""
        merge = self.recipe.model.export == "merged"
        learner.export("policy", where, self.tokenizer, merge=merge, end_ids=self.chat.end_ids)


def prepare(
    method: str, recipe: fields.OnlineRecipe, *, recorded: bool = False, problems: Problems | None = None
) -> OnlineJob:
    """Check the recipe and read the prompts; load no weights. With `recorded`, the answers and scores are in the record of a
    run, so generator and rewards are not checked. `problems` are those that were found before. Raises RecipeError, DataError or
    ModelError, or a UserError with several of them: first what the recipe alone shows, then what needs the tokenizer."""
    problems = problems or Problems()
    with problems:
        check_evaluation(recipe.eval)
    for optim, name in ((recipe.optim, "optim"), (recipe.critic.optim, "critic.optim")):
        with problems:
            if optim is not None:
                checks.check_optim(optim, name)
    with problems:
        if recipe.critic.optim and recipe.critic.optim.schedule_steps not in (None, recipe.optim.schedule_steps):
            raise RecipeError("critic.optim.schedule_steps: the critic has the one of optim; leave it out")
    if not recipe.reward:
        with problems:
            raise RecipeError(NO_REWARD)
    longest, weights = recipe.sampling.max_new_tokens, [one.weight for one in recipe.reward] or [1.0]
    with problems:
        slots = checked(method, recipe.algorithm, config.leaves(fields.OnlineRecipe))
        algorithm = compose.online_of(slots, longest=longest, weights=weights)
        with problems:
            mini_batch_size = checks.check_arithmetic(recipe, algorithm, method)
        with problems:
            checks.check_ptx(recipe, algorithm, method)
    problems.tell()
    with problems:
        models.check_code(recipe.model, recipe.model.path, recipe.reference, recipe.critic.path)
        tokenizer, chat = models.tokenizer_and_chat(recipe.model, recipe.sampling)
        prompts: Sequence[Prompt] = []
        held_out: Sequence[Prompt] = []
        with problems:
            reader = data.reader_of(recipe.model, recipe.data, chat, room=recipe.sampling.max_new_tokens)
            reading = data.Reading(reader, "prompts")
            prompts = data.with_all_columns(data.rows_of(recipe.data, reading))
            data.tell_left_out(reader)
            data.check_columns(prompts)
        with problems:
            held_out = data.with_all_columns(data.held_out_of(recipe.eval, recipe.data, reading))
            data.check_columns(held_out, "eval.data")
        with problems:
            ptx_reader = data.reader_of(recipe.model, fields.Rows(), chat)
            ptx = data.ptx_of(recipe.ptx, data.Reading(ptx_reader, "demonstrations"))
        if not recorded:
            with problems:
                generators.check_generator(recipe, chat, int(os.environ["WORLD_SIZE"]) if launched() else 1)
            with problems:
                rewards.check_rewards(recipe, tokenizer, prompts)
            with problems:
                if held_out:
                    rewards.check_rewards(recipe, tokenizer, held_out)
                evaluation.check_judges(recipe, tokenizer, held_out)
    problems.tell()
    for one in checks.cautions(recipe, algorithm) if first() and not recorded else ():
        caution(one)
    recipe = learners.sized(recipe)
    plan, longest = _plan_of(
        recipe, mini_batch_size, chat, prompts, held_out, refilled=bool(algorithm.collect.dynamic_sampling)
    )
    each = 1 if algorithm.pairs else algorithm.collect.num_generations
    updates, scheduled = (
        plan.epochs * plan.summed(steps, lambda prompts: -(-prompts * each // mini_batch_size))
        for steps in (plan.steps, recipe.optim.schedule_steps or plan.steps)
    )
    return OnlineJob(
        method, recipe, algorithm, plan, tokenizer, chat, prompts, longest, updates, scheduled, ptx, held_out
    )


def steps_of(rollout: fields.Rollout, prompts: int) -> int:
    """Return the steps of an online run: `num_steps`, or the steps of `num_epochs` passes over the prompts."""
    if rollout.num_epochs is None:
        return rollout.num_steps
    steps = max(1, math.ceil(rollout.num_epochs * per_epoch(prompts, rollout.prompts_per_step)))
    checks.check_steps("rollout.num_epochs", rollout.num_epochs, steps)
    return steps


def _plan_of(
    recipe: fields.OnlineRecipe,
    mini_batch_size: int,
    chat: Chat,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    refilled: bool,
) -> tuple[online.OnlinePlan, int]:
    """Return the plan of the loop and the longest sequence of a generator, in tokens: prompt and answer, or the canary.
    `refilled`: dynamic sampling draws further prompts, so a step cannot end with a pass."""
    rollout, generator = recipe.rollout, recipe.generator
    positions = load.positions(models.source_of(recipe.model))
    canary = min(160, positions - 1)
    largest = max(len(one.ids) for one in (*prompts, *held_out))
    longest = min(positions, max(canary + 1, largest + recipe.sampling.max_new_tokens))
    dtype = getattr(generators.chosen_of(recipe).options, "dtype", "auto")
    plan = online.OnlinePlan(
        steps=steps_of(rollout, len(prompts)), prompts=rollout.prompts_per_step, mini_batch_size=mini_batch_size,
        epochs=rollout.ppo_epochs, seed=recipe.seed, ptx_batch=recipe.ptx.batch_size, target_kl=rollout.target_kl,
        ema=rollout.ema, equal_start=recipe.reference in (None, recipe.model.path), end_ids=chat.end_ids, canary=canary,
        low_precision=dtype in ("bfloat16", "float16"), save_every=recipe.train.save_every, keep=recipe.train.keep,
        save_minutes=recipe.train.save_minutes, save_last=recipe.train.save_last, on_divergence=recipe.train.on_divergence,
        sync_every=rollout.sync_reference.every, sync_mix=rollout.sync_reference.mix,
        max_staleness=generator.max_staleness, segment=generator.segment_tokens, slots=rollout.max_num_seqs,
        critic_warmup=recipe.critic.warmup_steps, defer=rollout.defer_old_logp, record_every=rollout.record_every,
        per_pass=len(prompts) if rollout.num_epochs is not None and not refilled and not generator.max_staleness else None,
    )  # fmt: skip
    return plan, longest
