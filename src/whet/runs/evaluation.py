"""Evaluation while training: build its plan and its judges from the recipe, and check the judges."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from whet.data import Prompt
from whet.distributed import Workers
from whet.errors import Problems, RecipeError
from whet.loops.evaluation import EvalPlan
from whet.loops.metrics import direction
from whet.methods.options import Sampling
from whet.rewards import Weighted
from whet.runs import learners, rewards
from whet.runs import recipe as fields


def plan_of(evaluation: fields.Evaluation) -> EvalPlan:
    """Return the plan of the evaluations of a run."""
    stop, given = evaluation.early_stop, evaluation.greater_is_better
    metric = stop.metric or evaluation.keep_best
    names = [name for name in (evaluation.keep_best, metric) if name is not None]
    higher = frozenset(name for name in names if (direction(name) == "higher" if given is None else given))
    return EvalPlan(evaluation.every, evaluation.keep_best, metric, stop.patience, stop.min_delta, higher)


def sampling_of(recipe: fields.OnlineRecipe) -> Sampling:
    """Return how the answers of an evaluation are sampled: as those of the run, or with a temperature of their own."""
    own = recipe.eval.temperature
    return recipe.sampling if own is None else replace(recipe.sampling, temperature=own)


def judges_of(
    recipe: fields.OnlineRecipe, tokenizer: Any, learner: Any, workers: Workers = Workers()
) -> list[Weighted]:
    """Build the judges, with other names than the rewards. The learner computes those that are reward models; the others share
    the groups over the workers as rewards do."""
    read = learner.columns if learner is not None else lambda *_: {}
    found = [
        rewards.judge_of(one, recipe.model, tokenizer, partial(read, f"judge{number}"), f"eval.judge.{number}")
        for number, one in enumerate(recipe.eval.judge)
    ]
    names = [Weighted(one.name, one.reward) for one in rewards.unbuilt(recipe)]
    return learners.spread(rewards.distinct([*names, *found])[len(names) :], workers)


def check_judges(recipe: fields.OnlineRecipe, tokenizer: Any, prompts: Sequence[Prompt]) -> None:
    """Raise RecipeError or ModelError if a judge cannot be found, read, or called with the columns of the held-out prompts, or one
    error for several judges. Without prompts, which could not be read, what depends on them is left out. Load no models."""
    problems = Problems()
    with problems:
        found = judges_of(recipe, tokenizer, None)
        if prompts:
            rewards.check_columns(found, prompts, "eval.judge")
        _check_names(recipe.eval, [one.name for one in rewards.unbuilt(recipe)], [one.name for one in found])
    for number, one in enumerate(recipe.eval.judge):
        with problems:
            if rewards.is_model(one.source):
                rewards.check_scorer(f"eval.judge.{number}", one.source, recipe, tokenizer, prompts)
    problems.tell()


def _check_names(evaluation: fields.PromptEvaluation, known: Sequence[str], judges: Sequence[str]) -> None:
    """Raise RecipeError if `keep_best` or early stopping names the number of a reward or judge that the run does not have."""
    for option, metric in (("keep_best", evaluation.keep_best), ("early_stop.metric", evaluation.early_stop.metric)):
        parts = (metric or "").split("/", 2)
        if len(parts) < 3 or parts[0] != "eval":
            continue
        kind, name = parts[1], parts[2]
        of = {"judge": judges, "reward": known}.get(kind, [*known, *judges])
        if name not in of:
            raise RecipeError(
                f"eval.{option}: {metric} is not logged; the rewards are {', '.join(known)}, and the judges are "
                f"{', '.join(judges) or 'none'} (a judge with the name of a reward gets a number; give it a name of its own)"
            )
