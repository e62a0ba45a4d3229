"""Evaluation while training: when it runs, what it logs, the best step and its model, and early stopping."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whet.data import Batch, Element, Prompt
from whet.data.files import remove, replace_folder
from whet.errors import CheckpointError, RecipeError, RewardError, WorkerDied, first_line
from whet.generate import Generator
from whet.learner import Learner
from whet.loops.evaluate import answers, held_out, win_rate
from whet.loops.experience import RolloutScores, batch_of, scores_of
from whet.loops.metrics import EVALUATED
from whet.loops.record import RunFolder
from whet.methods import Objective
from whet.methods.options import Sampling
from whet.ops import address, masked_sum
from whet.rewards import Weighted
from whet.terminal import caution

BEST, PENDING = "best", "best.step-"
"""The folder of the best model in the run folder; and the beginning of the name of one that no checkpoint names yet."""

State = dict[str, Any]
"""What an evaluation carries from step to step, as JSON values."""


@dataclass(frozen=True)
class EvalPlan:
    """When a run is evaluated, and what follows from it.

    every       steps between evaluations; there is one at step 0 and one at the end too
    keep_best   name of the logged number whose best step is kept as a model in `best/`; None keeps none
    metric      name of the logged number that `patience` looks at
    patience    evaluations in a row without improvement after which the run ends; None never ends it
    min_delta   smallest change of `metric` that is an improvement
    higher      names of these two numbers that are better when they are higher; others are better when they are lower
    """

    every: int = 0
    keep_best: str | None = None
    metric: str | None = None
    patience: int | None = None
    min_delta: float = 0.0
    higher: frozenset[str] = frozenset()


class Evaluation:
    """Evaluate a run, follow its best step, and say when it ends early.

    `measure(step, start)` returns the numbers of an evaluation after `step` steps, with names that begin with `eval/`. It must
    not change the state of the run. `start` is a dict that it may fill with JSON values at step 0 and read later; it is part of
    the checkpoints. `export(folder)` writes the model with its current weights. The numbers of the first worker count on
    every worker. Without a plan, a run is never evaluated.

    If a reward or judge fails, or the best model cannot be written, the step is complete nevertheless: its numbers are logged and
    a checkpoint is saved, then `raise_failure` raises the error. A resume evaluates the step again.

    The best model is written beside `best/` first. A checkpoint names it, and only then it is moved there: `best/` is always
    the model that the newest checkpoint names, also if a run is killed between the two.
    """

    def __init__(
        self,
        plan: EvalPlan | None,
        measure: Callable[[int, dict[str, Any]], Mapping[str, float]],
        export: Callable[[Path], None],
        run: RunFolder,
        learner: Learner,
    ) -> None:
        self.planned, self.plan = plan is not None, plan or EvalPlan()
        self.measure, self.export, self.run, self.learner = measure, export, run, learner
        self.state = initial()
        self.failure: RewardError | RecipeError | CheckpointError | None = None

    @property
    def ended(self) -> bool:
        """True if the run ends early."""
        return bool(self.state["stopped"])

    def saved(self) -> dict[str, State]:
        """Return what a checkpoint keeps, {} for a run that is never evaluated."""
        return {"eval": self.state} if self.planned else {}

    def restore(self, loop: Mapping[str, Any]) -> None:
        """Go on from the state of a loop. Finish the move of a best model that it names; remove newer ones, whose steps come again."""
        if not self.planned:
            return
        self.state = {**loop["eval"], "start": dict(loop["eval"]["start"])}
        for path in self._pending():
            if path.name == f"{PENDING}{self.state['best_step']}":
                replace_folder(path, self.run.folder / BEST)
            else:
                remove(path)
        step, best = self.state["best_step"], self.run.folder / BEST
        if step >= 0 and self.learner.workers.first and not best.is_dir():
            caution(
                f"{best}: the best model, of step {step}, is missing; it is written again only if a later step is better"
            )

    def settle(self, saved: int) -> None:
        """Move the best model to `best/` if a checkpoint of at least its step names it: `saved` is the step of the newest one, 0
        without one."""
        for path in self._pending() if 0 < saved >= self.state["best_step"] else ():
            replace_folder(path, self.run.folder / BEST)

    def _pending(self) -> list[Path]:
        """Return the folder of a best model that is not in `best/` yet, if there is one and this worker writes."""
        return sorted(self.run.folder.glob(f"{PENDING}*")) if self.learner.workers.first else []

    def due(self, step: int, total: int) -> bool:
        """Return True if the run is evaluated after `step` steps."""
        if not self.planned or step == self.state["at"]:
            return False
        return step in (0, total) or (self.plan.every > 0 and step % self.plan.every == 0)

    def start(self, step: int, total: int) -> dict[str, float]:
        """Evaluate before the first step of a run, and after a step whose evaluation failed before the run was resumed. Log the
        numbers and return them, {} if no evaluation is due. Raises RewardError if a reward or judge fails, RecipeError if
        `keep_best` or the number of early stopping has never been logged."""
        if not self.due(step, total):
            return {}
        found = self.numbers(step, total, self.run.line(step))
        self.raise_failure()
        self.run.amend(step, **found)
        return found

    def numbers(self, step: int, total: int, logged: Mapping[str, float]) -> dict[str, float]:
        """Evaluate after `step` of `total` steps if it is due, and return the numbers to log; {} if it is not, or if it fails (see
        `raise_failure`). `logged` has the other numbers of this step."""
        if not self.due(step, total):
            return {}
        began = time.perf_counter()
        try:
            found = self._after(step, total, logged)
        except (RewardError, RecipeError, CheckpointError) as error:
            self.failure = error
            return {}
        return found | {"seconds/eval": time.perf_counter() - began}

    def raise_failure(self) -> None:
        """Raise the error of the last evaluation, if it failed."""
        if self.failure is not None:
            raise self.failure

    def _after(self, step: int, total: int, logged: Mapping[str, float]) -> dict[str, float]:
        plan, state = self.plan, self.state
        measured = dict(self.measure(step, state["start"]))
        logged, numbers = self.learner.workers.broadcast((dict(logged), measured))  # all workers must decide the same
        known = {**logged, **numbers}
        value = self._value(plan.keep_best, "keep_best", step, known, state["best_step"] >= 0)
        if plan.keep_best is not None and value is not None:
            first = state["best_step"] < 0 and not math.isnan(value)
            if first or (state["best_step"] >= 0 and self._better(plan.keep_best, value, state["best"], 0.0)):
                self._write(step)
                state["best_step"], state["best"] = step, value
        if plan.keep_best is not None and state["best_step"] >= 0:
            numbers[f"{EVALUATED}best_step"] = float(state["best_step"])
        metric = plan.metric if plan.patience is not None else None
        value = self._value(metric, "early_stop", step, known, state["seen"])
        if plan.patience is not None and metric is not None and value is not None:
            first = not state["seen"] and not math.isnan(value)
            if first or (state["seen"] and self._better(metric, value, state["reached"], plan.min_delta)):
                state["seen"], state["reached"], state["waited"] = True, value, 0
            else:
                state["waited"] += 1
            if state["waited"] >= plan.patience and 0 < step < total:
                state["stopped"] = True
                numbers[f"{EVALUATED}stopped_early"] = 1.0
                self.run.caution(
                    f"step {step}: {metric} has not improved in {plan.patience} evaluations (it is {value:.4g}, and was "
                    f"{state['reached']:.4g}); the run ends here (eval.early_stop)",
                    step,
                )
        state["at"] = step
        return numbers

    def _value(self, name: str | None, option: str, step: int, known: Mapping[str, float], seen: bool) -> float | None:
        """Return the number `name`, None without a name. At step 0 only the numbers of an evaluation are known. One that was `seen`
        before and is missing now, such as the score of a judge that applies to no answer, is NaN."""
        if name is None or name in known:
            return None if name is None else known[name]
        if step == 0 and not name.startswith(EVALUATED):
            return None
        if seen:
            self.run.caution(
                f"step {step}: {name} is not logged in this evaluation (eval.{option}); it is no improvement", step
            )
            return math.nan
        held_out = sorted(one for one in known if one.startswith(EVALUATED))
        some = held_out if name.startswith(EVALUATED) and held_out else sorted(known)
        raise RecipeError(f"eval.{option}: no number {name!r} is logged; known are {', '.join(some)}")

    def _better(self, name: str, value: float, than: float, delta: float) -> bool:
        """Return True for an improvement. NaN is none."""
        return value > than + delta if name in self.plan.higher else value < than - delta

    def _write(self, step: int) -> None:
        """Write the model of a new best step beside `best/`, in place of one that no checkpoint names yet."""
        path, error = self.run.folder / f"{PENDING}{step}", None
        try:
            for old in self._pending():
                remove(old)
            self.export(path)
        except WorkerDied:  # a worker failed, not the disk
            raise
        except Exception as failed:  # OSError, or SafetensorError for the same cause, on the worker that writes
            error = first_line(failed)
        told = next((one for one in self.learner.workers.gather(error) if one is not None), None)
        if told is not None:
            raise CheckpointError(
                f"{path}: the best model could not be written ({told}); make room, continue with --resume"
            )


def initial() -> State:
    """Return the state before the first evaluation: the step of the last one, the best step and its value, the value that early
    stopping waits for, for how many evaluations, and the scores of the start by the name of their reward or judge."""
    return {
        "at": -1, "best_step": -1, "best": 0.0, "seen": False, "reached": 0.0, "waited": 0, "stopped": False, "start": {},
    }  # fmt: skip


@dataclass(frozen=True)
class HeldOut:
    """What an offline run is evaluated on: held-out elements. Without a plan, nothing."""

    plan: EvalPlan | None
    export: Callable[[Path], None] = lambda _: None
    elements: Sequence[Element] = ()


@dataclass(frozen=True)
class HeldOutPrompts:
    """What an online run is evaluated on: held-out prompts, the sampling and number of answers to each, and the judges, which score
    answers and are not trained on. Without a plan, nothing."""

    plan: EvalPlan | None
    export: Callable[[Path], None] = lambda _: None
    prompts: Sequence[Prompt] = ()
    sampling: Sampling = Sampling()
    num_generations: int = 1
    judges: Sequence[Weighted] = ()


def held_out_numbers(learner: Learner, objective: Objective, elements: Sequence[Element]) -> dict[str, float]:
    """Return the numbers of an evaluation on held-out elements: the loss of the objective, that of each term, and accuracy, margin
    and calibration error of pairs (see `evaluate.held_out`)."""
    found = held_out(learner, objective, elements)
    losses = {term.label: found.pop(term.label) for term in objective.terms}
    numbers = {"loss": sum(losses.values()), **losses, **found}
    return {f"{EVALUATED}{name}": value for name, value in numbers.items()}


@dataclass(frozen=True)
class PromptEvaluator:
    """Evaluate a policy on held-out prompts: `measure` answers them, always with the same random numbers, and scores the answers
    with the rewards of the run and with the judges.

    The win rate compares the score of each prompt (the mean of its answers) with the one at the start of the run, which is kept
    in the dict `start`. A run that is continued with other prompts has no win rate. `kl` says that the learner has a reference.
    """

    held_out: HeldOutPrompts
    rewards: Sequence[Weighted]
    generator: Generator
    learner: Learner
    run: RunFolder
    seed: int = 0
    kl: bool = False
    told: list[int] = field(default_factory=list)

    def measure(self, step: int, start: dict[str, Any]) -> dict[str, float]:
        """Return the numbers of an evaluation (docs/metrics.md), and write its answers to `eval/step-00000042.parquet`."""
        held, seed = self.held_out, address(self.seed, "eval")
        groups = answers(self.generator, held.prompts, held.sampling, count=held.num_generations, seed=seed)
        self.generator.sleep()
        scores = scores_of(self.rewards, groups)
        judged = {one.name: one.reward.score(groups) for one in held.judges}
        batch = batch_of(groups, scores, held.sampling)
        total = weighted(self.rewards, scores)
        self._check_start(step, start)
        lengths = torch.tensor([float(row.mask.sum()) for row in batch.rows])
        numbers = {
            "score": float(total.mean()), "length": float(lengths.mean()),
            "truncated": float(batch["truncated"].float().mean()),
        }  # fmt: skip
        each = self._kl(batch)
        if each is not None:
            numbers["kl"] = float(each.mean())
        named = {f"reward/{name}": (values, scores.where(name)) for name, values in scores.named.items()}
        named |= {f"judge/{name}": (own.answer, own.known()) for name, own in judged.items()}
        for name, (values, applies) in named.items():
            numbers |= self._of(name, values, applies, start, first=step == 0)
        table: dict[str, list[Any]] = {
            "length": [int(one) for one in lengths.tolist()], "truncated": batch["truncated"].tolist(),
            "kl": [None] * len(total) if each is None else each.tolist(), "score": total.tolist(),
        }  # fmt: skip
        for name, (values, applies) in named.items():
            both = zip(values.tolist(), applies.tolist(), strict=True)
            table[name] = [value if known else None for value, known in both]
        self.run.evaluation(step, groups, table)
        return {f"{EVALUATED}{name}": value for name, value in numbers.items()}

    def _kl(self, batch: Batch) -> Tensor | None:
        """Return log policy(y) - log reference(y) of each answer, (B,), in nats: a sample of KL(policy || reference). None without a
        reference, and for greedy answers, which are no samples."""
        if not self.kl or self.held_out.sampling.temperature == 0:
            return None
        own = "old_full_logp" if "support" in batch.columns else "old_logp"
        seen = self.learner.measure(batch, frozenset({own, "ref_logp"}))
        return masked_sum(seen[own] - seen["ref_logp"], batch["mask"], 1)

    def _asked(self) -> str:
        """Return a hash of the held-out prompts, in their order."""
        return f"{address(*(token for one in self.held_out.prompts for token in (len(one.ids), *one.ids))):016x}"

    def _check_start(self, step: int, start: dict[str, Any]) -> None:
        """Keep the hash of the prompts in `start`. If the scores there are of other prompts, say so once in this session."""
        if start.setdefault("prompts", self._asked()) != self._asked() and not self.told:
            self.told.append(step)
            self.run.caution(
                f"step {step}: the held-out prompts are not those of the start of the run (eval.data); no win rate is logged",
                step,
            )

    def _of(
        self, name: str, values: Tensor, applies: Tensor, start: dict[str, Any], *, first: bool
    ) -> dict[str, float]:
        """Return the mean of one reward or judge, its win rate against the start, and pass@k if its scores are 0 and 1. With `first`
        these are the scores at the start; one that applied to no answer there has no win rate later."""
        count, short = self.held_out.num_generations, name.partition("/")[2]
        shaped, known = values.double().reshape(-1, count), applies.reshape(-1, count)
        if not bool(known.any()):
            return {}
        numbers = {name: float(values[applies].double().mean())}
        others = start.setdefault("others", [])  # rewards and judges that have had scores other than 0 and 1
        if not bool((((shaped == 0) | (shaped == 1)) | ~known).all()) and name not in others:
            others.append(name)
        if bool(known.all()) and name not in others:
            right = (shaped == 1).sum(1).tolist()
            for k in powers(count):
                numbers[f"pass@{k}/{short}"] = sum(pass_at(k, count, one) for one in right) / len(right)
        mean = [float(row[own].mean()) if bool(own.any()) else None for row, own in zip(shaped, known, strict=True)]
        if first:
            start[name] = mean
        same = start["prompts"] == self._asked()
        before = start.get(name, [None] * len(mean)) if same else [None] * len(mean)
        pairs = [(a, b) for a, b in zip(mean, before, strict=True) if a is not None and b is not None]
        if pairs:
            rate = win_rate(*zip(*pairs, strict=True))  # type: ignore[arg-type]
            ends = ("win_rate", "win_rate_low", "win_rate_high")
            numbers |= {f"{end}/{short}": value for end, value in zip(ends, rate, strict=True)}
        return numbers


def weighted(rewards: Sequence[Weighted], scores: RolloutScores) -> Tensor:
    """Return the weighted sum of the rewards of each answer, (B,). A reward that does not apply to an answer adds 0."""
    parts = [one.weight * scores.named[one.name] * scores.where(one.name) for one in rewards]
    return torch.stack(parts).sum(0)


def powers(count: int) -> list[int]:
    """Return the powers of two up to `count`.

    >>> powers(6)
    [1, 2, 4]
    """
    return [1 << place for place in range(count.bit_length())]


def pass_at(k: int, count: int, right: int) -> float:
    """Return the unbiased estimate of the probability that at least one of k answers is right, from `right` of `count` answers:
    1 - C(count - right, k) / C(count, k) (Chen et al. 2021, equation 1).

    >>> pass_at(1, 4, 1), pass_at(2, 4, 1), pass_at(4, 4, 0)
    (0.25, 0.5, 0.0)
    """
    return 1.0 - math.comb(count - right, k) / math.comb(count, k)
