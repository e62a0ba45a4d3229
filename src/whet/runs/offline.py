"""Prepare offline runs, which train on rows of a file (pretrain, sft, reward models, preference methods)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, no_grad

from whet.data import Batch, Chat, Element
from whet.data.batching import per_epoch
from whet.errors import Problems, RecipeError
from whet.learner import Learner
from whet.loops import evaluate, offline
from whet.loops.evaluation import HeldOut
from whet.loops.interrupt import Stop
from whet.methods import Objective, compose
from whet.models import tokens
from whet.models.probe import SOME
from whet.runs import checks, config, data, evaluation, folder, learners, models
from whet.runs import recipe as fields
from whet.runs.early import check_evaluation
from whet.runs.slots import checked


@dataclass(frozen=True)
class OfflineJob:
    """The checked inputs of an offline run, without weights."""

    method: str
    recipe: fields.OfflineRecipe
    objective: Objective
    plan: offline.OfflinePlan
    tokenizer: Any
    chat: Chat
    sources: Sequence[Sequence[Element]]
    weights: Sequence[float] | None = None
    held_out: Sequence[Element] = field(default_factory=list)

    @property
    def make(self) -> Callable[..., Learner]:
        """A function that builds the learner of a worker: `make(workers)`."""
        some = [source[number] for source in self.sources for number in range(min(SOME, len(source)))]
        rows = [row.ids for row in Batch.of(some[:SOME]).rows]
        scheduled = self.recipe.optim.schedule_steps or self.plan.steps
        return partial(learners.offline_learner, self.recipe, self.objective, scheduled, self.tokenizer, rows)

    def loop(self, learner: Learner, where: Path, options: folder.Options, stop: Stop) -> offline.OfflineLoop:
        """Open the run folder and return the training loop."""
        run = folder.opened(where, self.recipe, options, self.method, learner.workers)
        held_out = None
        if self.held_out:
            held_out = HeldOut(evaluation.plan_of(self.recipe.eval), partial(self.export, learner), self.held_out)
        return offline.OfflineLoop(
            self.objective, learner, self.sources, self.plan, run, weights=self.weights, evaluation=held_out,
            resume=options.resume, stop=stop, title=self.method, quiet=options.quiet,
        )  # fmt: skip

    def length(self) -> str:
        """Return the length of the run in words: elements, updates and epochs."""
        total, size, steps = sum(map(len, self.sources)), self.plan.batch, self.plan.steps
        if self.weights is not None:
            return f"{total} elements mixed by weight, {steps} updates of {size}"
        each = per_epoch(total, size, self.plan.drop_last)
        last = (
            ""
            if total % size == 0
            else ", the last is left out"
            if self.plan.drop_last
            else f", the last of {total % size}"
        )
        return f"{total} elements, {steps} updates of {size} ({each} in an epoch{last}): {steps / each:.4g} epochs"

    def finish(self, loop: offline.OfflineLoop, where: Path) -> None:
        """Write the trained model to `where / "model"`. With `head.standardize`, standardize its rewards first."""
        recipe, learner = self.recipe, loop.learner
        if isinstance(recipe, fields.RewardModelRecipe) and recipe.head.standardize:
            elements = chain.from_iterable(self.sources)
            _standardize(learner, evaluate.scores(learner, self.objective, elements))
        self.export(learner, where / "model")

    def export(self, learner: Learner, where: Path) -> None:
        """Write the trained model with its current weights to a folder in Hugging Face format."""
        role = "reward" if isinstance(self.recipe, fields.RewardModelRecipe) else "policy"
        merge = self.recipe.model.export == "merged"
        learner.export(role, where, self.tokenizer, merge=merge, end_ids=self.chat.end_ids)


def prepare(method: str, recipe: fields.OfflineRecipe, *, problems: Problems | None = None) -> OfflineJob:
    """Check the recipe and read the rows; load no weights. `problems` are those that were found before. Raises RecipeError,
    DataError or ModelError, or a UserError with several of them: first what the recipe alone shows, then what needs the
    tokenizer."""
    problems = problems or Problems()
    with problems:
        checks.check_optim(recipe.optim, "optim")
    with problems:
        check_evaluation(recipe.eval)
        if (
            isinstance(recipe, fields.RewardModelRecipe)
            and recipe.head.standardize
            and recipe.eval.keep_best is not None
        ):
            raise RecipeError(
                "eval.keep_best: head.standardize changes the model after its last step; leave one of them out"
            )
    name, objective, rewards = method, compose.SFT, isinstance(recipe, fields.RewardModelRecipe)
    with problems:
        if isinstance(recipe, fields.RewardModelRecipe | fields.PreferenceRecipe):
            slots = checked(method, recipe.algorithm, config.leaves(type(recipe)))
            name = recipe.algorithm["name"] if rewards else method
            objective = compose.reward_of(slots) if rewards else compose.preference_of(slots)
        if isinstance(recipe, fields.PreferenceRecipe):
            checks.check_reference(recipe, objective)
        reading = data.reading(name, objective)
        data.check_data(recipe.data, reading)
    problems.tell()
    with problems:
        models.check_code(recipe.model, recipe.model.path, getattr(recipe, "reference", None))
        tokenizer, chat = models.tokenizer_and_chat(recipe.model)
        with problems:
            reader = data.reader_of(recipe.model, recipe.data, chat, closing=rewards)
            refused = data.refused_by(objective) if objective is not compose.SFT else ()
            read = data.Reading(reader, reading, name, refused, recipe.data.cache)
            with problems:
                sources, weights = data.sources_of(recipe.data, read)
            with problems:
                held_out = data.held_out_of(recipe.eval, recipe.data, read)
            if not problems.found:
                data.tell_left_out(reader)
        with problems:
            if isinstance(recipe, fields.RewardModelRecipe):
                lasts = chat.closing_ids[-1:] or chat.end_ids[:1]
                tokens.set_score_pad(tokenizer, lasts, recipe.model.path)
                checks.check_score_adapter(recipe, lasts)
    problems.tell()
    recipe = learners.sized(recipe)
    steps = checks.steps_of(recipe.train, sum(map(len, sources)))
    refresh = getattr(recipe, "sync_reference", fields.SyncReference())
    plan = offline.OfflinePlan(
        steps, recipe.train.batch_size, recipe.seed, recipe.data.shuffle, recipe.train.save_every,
        recipe.train.keep, end_ids=chat.end_ids, sync_every=refresh.every,
        sync_mix=refresh.mix, precompute=getattr(recipe, "precompute", False), drop_last=recipe.train.drop_last,
        save_minutes=recipe.train.save_minutes, save_last=recipe.train.save_last, on_divergence=recipe.train.on_divergence,
    )  # fmt: skip
    return OfflineJob(method, recipe, objective, plan, tokenizer, chat, sources, weights, held_out)


@no_grad()
def _standardize(learner: Learner, scores: Tensor) -> None:
    """Scale and shift the reward model so that its `scores` (n,) have mean 0 and standard deviation 1.

    The scale is stored in the weights of the head. Other tools ignore the shift, which does not change the ranking.
    """
    scale = 1.0 / max(float(scores.double().std(correction=0)), 1e-6)
    learner.rescale("reward", scale, -float(scores.double().mean()))
