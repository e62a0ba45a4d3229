"""The online loop and its stages: generate, score, measure, advantages, updates, publish. `train` calls them in order."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whet.data import COLUMNS, Batch, Element, Group, Pair, Prompt, Row, minibatches, take_elements
from whet.errors import RunStopped
from whet.generate import Generator
from whet.learner import Learner, UpdateResult, look_across
from whet.loops import checkpoint, selfcheck
from whet.loops.ahead import AsynchronousSource, Driver, source_of
from whet.loops.divergence import Divergence
from whet.loops.evaluation import Evaluation, HeldOutPrompts, PromptEvaluator
from whet.loops.experience import (
    PtxStream,
    RolloutScores,
    batch_of,
    entropy_sample,
    gathered,
    measured,
    moved_from,
    policy_numbers,
    rollout_numbers,
    scored,
    scores_of,
    shown_answer,
    update_numbers,
)
from whet.loops.interrupt import Stop
from whet.loops.numbers import answer_numbers, per_second
from whet.loops.progress import Progress
from whet.loops.record import RunFolder, mean_of
from whet.loops.source import answered
from whet.loops.steps import REHEARSED, MiniBatch, OnlinePlan, StepLog, longest, trained_columns
from whet.methods import Algorithm, Term, advantages, clipping, critic_loss, diagnostics, paired, shaped, spread
from whet.methods.options import Sampling
from whet.methods.own import own_loss
from whet.methods.parts import State, mean_reward, name_of
from whet.models.readers import BY_ROLE
from whet.ops import address
from whet.rewards import Weighted

SKIPS = 5
"""Largest number of rollouts in a row that are skipped, because all their answers are truncated and masked."""


class OnlineLoop:
    """The stages of an online run. Use it as a context manager; `steps` yields the steps after the last checkpoint.

    Each step calls generate, score, measure, advantages, then forward_backward and optim_step for every mini-batch, and
    publish. All random numbers depend only on the seed and their address, such as the step. So a resumed run gives
    bitwise identical results, unless answers are generated ahead. A stage that is called outside a step, or before the
    stage that it needs, raises RuntimeError.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        learner: Learner,
        generator: Generator,
        rewards: Sequence[Weighted],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        plan: OnlinePlan,
        run: RunFolder,
        *,
        ptx: Sequence[Element] = (),
        resume: bool = False,
        stop: Stop | None = None,
        title: str = "train",
        quiet: bool = False,
        driver: Driver | None = None,
        evaluation: HeldOutPrompts | None = None,
    ) -> None:
        answers = algorithm.collect.num_generations
        if not algorithm.has_ratio() and (plan.epochs > 1 or plan.mini_batch_size < plan.prompts * answers):
            raise ValueError("a method without ratio takes exactly one update per rollout")
        self.algorithm, self.learner, self.rewards, self.sampling = algorithm, learner, rewards, sampling
        self.plan = replace(plan, low_precision=plan.low_precision or learner.low_precision)
        self.run, self.prompts, self.resume, self.stop, self.title, self.quiet = (
            run,
            prompts,
            resume,
            stop,
            title,
            quiet,
        )
        self.source = source_of(algorithm, generator, prompts, sampling, plan, driver)
        self.generator = self.source if isinstance(self.source, AsynchronousSource) else generator
        self.flat = selfcheck.FlatScores([one.name for one in rewards], plan.steps)
        self.divergence = Divergence()
        self.skipped = 0
        self.stream = PtxStream(ptx, plan.ptx_batch, plan.seed)
        held = evaluation or HeldOutPrompts(None)
        evaluator = PromptEvaluator(
            held, rewards, self.generator, learner, run, plan.seed, "reference" in algorithm.roles()
        )
        self.evaluation = Evaluation(held.plan, evaluator.measure, held.export, run, learner)
        self.step = self.first = self._next = 0
        self.state: State = algorithm.init()
        self._running = False
        self._batch: Batch | None = None
        self._seen: Batch | None = None
        self._turns: list[list[list[int]]] | None = None
        self._stack = ExitStack()
        self._progress: Progress | None = None
        self._keeper: checkpoint.Keeper | None = None

    def __enter__(self) -> "OnlineLoop":
        plan, learner = self.plan, self.learner
        keeper = self._keeper = checkpoint.Keeper(
            self.run.checkpoints, learner, total=plan.steps, every=plan.save_every, minutes=plan.save_minutes, keep=plan.keep,
            last=plan.save_last, stop=self.stop,
        )  # fmt: skip
        begin = {"step": 0, "state": self.state, "drawn": 0, "skipped": 0, "divergence": self.divergence.state()}
        begin |= self.evaluation.saved()
        loop: dict[str, Any] = (keeper.restore(begin, self.run.accepted) if self.resume else None) or begin
        self.first, self.state = loop["step"], loop["state"]
        self._next = self.first
        self.skipped = loop["skipped"]
        self.divergence.restore(loop["divergence"])
        self.evaluation.restore(loop)
        self.source.restore(loop, self.first)
        self.generator.load_weights(learner.publish())
        canary = torch.tensor([token for prompt in self.prompts for token in prompt.ids][: plan.canary])
        if len(canary) > 1:
            expected = scored(learner, canary)
            try:
                selfcheck.published(
                    self.first, self.generator, learner.version, canary, expected, expected, plan.low_precision
                )
            except RunStopped as error:
                self.run.stopped(error, self.first + 1, learner.version, None)
                raise
        if self.first < plan.steps:
            learner.rehearse(self._longest(), trained_columns(self.algorithm.terms))
        self._stack.enter_context(keeper)
        self._stack.enter_context(closing(self.source))
        self._progress = self._stack.enter_context(Progress(self.title, plan.steps, done=self.first, quiet=self.quiet))
        return self

    def _longest(self) -> Batch:
        """Return a mini-batch of the longest prompt with answers of the largest length."""
        prompt, room = max((one.ids for one in self.prompts), key=len), self.sampling.max_new_tokens
        row = Row(torch.tensor([*prompt, *prompt[-1:] * room]), len(prompt), torch.ones(room, dtype=torch.bool))
        size = min(self.plan.mini_batch_size, REHEARSED)
        if self.algorithm.pairs:
            return longest([[Pair(row, row)] * size], size)
        return longest([[row] * size, self.stream.elements], size)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if isinstance(error, RunStopped) and self._running:
                names = [one.name for one in self.rewards]
                self.run.stopped(error, self.step + 1, self.learner.version, self._seen, self._groups, names)
        finally:
            self._stack.__exit__(kind, error, trace)
            if self._keeper is not None:
                self.evaluation.settle(self._keeper.saved)

    def steps(self) -> Iterator[StepLog]:
        """Yield the steps after the last checkpoint. Requesting the next step ends the current one: its metrics and rollout
        are written, and a checkpoint is saved if due. Raise RuntimeError if weights were updated but not published, or if
        the step made no update."""
        if self._running:
            raise RuntimeError(f"steps: step {self.step} was left before its end; leave the session and resume the run")
        found = self.evaluation.start(self._next, self.plan.steps)
        if found and self._progress is not None:
            self._progress.advance(found, 0)
        for step in range(self._next, self.plan.steps):
            if self.evaluation.ended:
                return
            log = StepLog(step)
            self._begin(step)
            yield log
            self._end(log)
            self._next = step + 1

    def _begin(self, step: int) -> None:
        self._running = True
        self.step, self._began = step, time.perf_counter()
        self._sampled = self._began
        self._groups: Sequence[Group] = ()
        self._scores: RolloutScores | None = None
        self._numbers: dict[str, float] = {}
        self._updates: list[dict[str, float]] = []
        self._now = self.algorithm.at(self.state)
        self._batch = self._seen = None
        self._whole: Batch | None = None
        self._turns = None
        self._moved, self._deferred = 0.0, False
        self._mini: MiniBatch | None = None
        self._canary, self._before = torch.zeros(0, dtype=torch.long), torch.zeros(0)
        self._stopped = self._unpublished = self._published = self._trains = False

    def _needs(self, stage: str, before: str = "", done: bool = True) -> None:
        """Raise RuntimeError outside a step, or if the stage `before` was not called in this step."""
        if not self._running:
            raise RuntimeError(f"{stage}: call it inside the loop over steps()")
        if not done:
            raise RuntimeError(f"{stage}: call {before} first in this step")

    def generate(self) -> list[Group]:
        """Return the groups of this step: prompts x answers, with token ids.

        With dynamic sampling, groups whose answers all have the same reward are replaced by groups of further prompts, for
        a bounded number of rounds. The answers are scored for this, and `score` returns these scores.
        """
        rounds, plan = self.algorithm.collect.dynamic_sampling, self.plan
        self._needs("generate")
        if self._groups:
            raise RuntimeError("generate: this step has its answers already; call it once per step")
        if not rounds:
            self._groups = self.source.groups(self.step, plan.prompts_in(self.step))
            self._numbers |= self._ages(self.source.staleness(self.step, self._groups))
        else:
            self._groups, self._scores = self._sampled_dynamically(rounds)
        self._sampled = time.perf_counter()
        return list(self._groups)

    def _sampled_dynamically(self, rounds: int) -> tuple[list[Group], RolloutScores]:
        """Return groups with different rewards; after the last round, fill up with the first groups with equal rewards."""
        kept: list[tuple[Group, RolloutScores]] = []
        spare: list[tuple[Group, RolloutScores]] = []
        turn, ages = 0, list[int]()
        while len(kept) < self.plan.prompts and turn <= rounds:
            turn += 1
            groups = self.source.groups(self.step, self.plan.prompts - len(kept))
            ages += self.source.staleness(self.step, groups)
            scores = scores_of(self.rewards, groups)
            batch = batch_of(groups, scores, self.sampling)
            useful = spread(self._now, batch)
            for number, group in enumerate(groups):
                rows = (batch["group"] == number).nonzero()[:, 0].tolist()
                own = scores.take(rows, max(len(sample.ids) for sample in group.samples))
                (kept if bool(useful[rows[0]]) else spare).append((group, own))
        filler = spare[: self.plan.prompts - len(kept)]
        self._numbers |= self._ages(ages)
        self._numbers |= {"groups_replaced": float(len(spare) - len(filler)), "rounds": float(turn)}
        self._numbers["groups_with_spread"] = float(len(kept))
        chosen = kept + filler
        return [group for group, _ in chosen], RolloutScores.joined([scores for _, scores in chosen])

    def _ages(self, ages: Sequence[int]) -> dict[str, float]:
        """Return mean and maximum of the ages in steps of the tokens' weights; return {} if `max_staleness` is 0."""
        found = {"staleness": sum(ages) / len(ages), "staleness_max": float(max(ages))} if ages else {}
        return found if self.plan.max_staleness else {}

    def score(self, groups: Sequence[Group]) -> RolloutScores:
        """Return the scores of every reward, with the greedy baselines if the method uses them (ReMax)."""
        self._needs("score")
        _check_groups("score", groups)
        scores = self._scores
        if scores is None or list(map(id, groups)) != list(map(id, self._groups)):
            scores = scores_of(self.rewards, groups)
        if not self.algorithm.collect.greedy:
            return scores
        greedy = replace(self.sampling, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
        drawn = [(group.samples[0].draw, group.prompt) for group in groups]
        answers = answered(self.generator, drawn, 1, greedy, self.plan.seed)
        # normalize the baselines with running statistics that include this rollout
        now = self.algorithm.at(self.algorithm.observe(self.state, batch_of(groups, scores, self.sampling)))
        score = shaped(now, gathered(answers, self.rewards, greedy))["score"]
        index = [number for number, group in enumerate(groups) for _ in group.samples]
        return replace(scores, baseline=score[index])

    def measure(
        self,
        groups: Sequence[Group],
        scores: RolloutScores | Mapping[str, Tensor | Sequence[float | None]],
        *,
        defer: bool = False,
    ) -> Batch:
        """Return the batch with the measured columns that the method reads. Split it into mini-batches first, and measure
        those of the first epoch one by one. `scores` may also be the scores (B,) of each reward by its name, as a tensor or as a
        list with None where the reward does not apply. With `defer`, old_logp is left to the only update of the rollout, if
        nothing before it reads old_logp: its own log-probs, without gradient."""
        self._needs("measure")
        _check_groups("measure", groups)
        if self._turns is not None:
            raise RuntimeError("measure: it was called in this step already; call it once per step")
        if isinstance(scores, Mapping):
            names = [one.name for one in self.rewards]
            if sorted(scores) != sorted(names):
                raise ValueError(f"measure: expected the scores of {names}, got those of {list(scores)}")
            scores = RolloutScores.of(groups, {name: scores[name] for name in names})
        count = sum(len(group.samples) for group in groups)
        if len(scores.token) != count:
            raise ValueError(f"measure: the scores are of {len(scores.token)} answers, the groups have {count}")
        batch, plan, learner = batch_of(groups, scores, self.sampling), self.plan, self.learner
        self._groups, self._seen = groups, batch
        self.state = self.algorithm.observe(self.state, batch)
        now = self._now = self.algorithm.at(self.state)
        self.generator.sleep()
        if now.pairs is not None:
            self._whole = advantages(now, batch)
            batch = paired(self._whole, now.pairs)
        self._turns = [
            minibatches(len(batch.elements()), plan.mini_batch_size, address(plan.seed, "minibatch", self.step, epoch))
            for epoch in range(plan.epochs)
        ]
        columns = now.reads() | {"old_entropy"}
        read = now.reads().union(*(term.reads() for term in now.terms))
        if not read & {"old_entropy", "entropy", "full_entropy"}:
            key = address(plan.seed, "entropy", self.step) >> 1
            batch = batch.with_columns(entropy_at=entropy_sample(batch, key))
        if "support" in batch.columns and "ref_logp" in columns:  # a KL compares the full distributions
            columns |= {"old_full_logp"}
        self._deferred = defer and self._defers(columns, batch)
        columns -= {"old_logp", "old_entropy"} if self._deferred else set()
        self._seen = measured(learner, batch, self._turns[0], columns)
        return self._seen

    def _defers(self, columns: frozenset[str], batch: Batch) -> bool:
        """Return whether the only update of this rollout can have the log-probs that are measured otherwise."""
        assert self._turns is not None
        once = len(self._turns) == 1 and len(self._turns[0]) == 1 and self.step >= self.plan.critic_warmup
        policy = {name for name in columns if COLUMNS[name].role == "policy"} - {"old_logp", "old_entropy"}
        return once and not policy and "entropy_at" in batch.columns and "old_logp" in self._now.deferrable()

    def advantages(self, batch: Batch) -> Batch:
        """Return the batch with score, token_reward, advantage and returns (a batch of pairs is returned unchanged)."""
        self._needs("advantages", "measure", self._turns is not None)
        if not self._now.pairs:
            self._whole = batch = advantages(self._now, batch)
        assert self._whole is not None
        self._batch = self._seen = batch
        self._canary = torch.cat([row.ids for row in self._whole.rows])[: self.plan.canary]
        self._before = scored(self.learner, self._canary)
        self._trains = bool(batch.rows) and not self._is_skipped(batch)
        if self._trains:
            self._check(batch)
            if not self._deferred:
                self._check_logprobs(batch)
        if batch.rows:
            self._ratio = torch.ones_like(batch.columns.get("old_logp", batch["sampler_logp"]))
        return batch

    def _is_skipped(self, batch: Batch) -> bool:
        """Return whether no token of a rollout is trained because all answers are truncated and masked, and say so. Raises
        RunStopped if `SKIPS` rollouts before it were skipped too."""
        cut = bool(batch["truncated"].all()) and self._now.truncated.rule == "mask" and not bool(batch["mask"].any())
        self.skipped = self.skipped + 1 if cut else 0
        if not cut:
            return False
        fact = f"all {len(batch.rows)} answers are truncated and masked (truncated.rule), so no token is trained"
        if self.skipped > SKIPS:
            selfcheck.stop(
                self.step,
                f"{fact}, as in the {SKIPS} steps before; raise sampling.max_new_tokens, or set truncated.rule to keep or penalize",
            )
        self.run.caution(f"step {self.step + 1}: {fact}; this rollout is skipped and no weight changes", self.step + 1)
        return True

    def _check(self, batch: Batch) -> None:
        """Run the self-checks of a rollout."""
        step, now = self.step, self._now
        assert self._whole is not None
        selfcheck.tokens(step, batch, self.plan.end_ids, alone=False)
        selfcheck.answers_in_place(step, self._whole, self._groups, self.plan.end_ids)
        if "old_value" not in batch.columns and now.centered and now.truncated.rule != "mask":
            selfcheck.groups_centered(step, batch)

    def _check_logprobs(self, batch: Batch) -> None:
        """Run the self-checks between measuring and training."""
        step, plan, now = self.step, self.plan, self._now
        selfcheck.finite(step, batch.columns)
        corrected = now.importance_correction is not None
        gap = selfcheck.sampler_agrees(step, batch, self.learner.version, plan.low_precision, corrected)
        if gap is not None and self.divergence.once("sampler"):
            self.run.caution(gap, step + 1)
        selfcheck.kl_in_reward(step, batch, now)
        if step == 0 and plan.equal_start and "ref_logp" in batch.columns:
            selfcheck.kl_is_zero(step, batch)

    def minibatches(self, batch: Batch) -> Iterator[MiniBatch]:
        """Yield the mini-batches of all epochs. Stop early when `target_kl` is exceeded."""
        self._needs("minibatches", "advantages", self._batch is not None)
        turns = self._turns or []
        for epoch, turn in enumerate(turns if self._trains else ()):
            for number, index in enumerate(turn):
                if self._stopped:
                    return
                mini = take_elements(batch, index)
                key = address(self.plan.seed, "select", self.step, epoch) >> 1
                mini = mini.with_columns(address=mini["address"] ^ key)
                mini = look_across(self.learner, self._now.select, mini)
                streams = self.stream.batch(self.step, epoch * len(turn) + number, len(turn) * len(turns))
                made = len(self._updates)
                yield MiniBatch(mini, tuple(index), epoch, number, self.step, streams)
                if len(self._updates) == made and (self._now.select or self.plan.target_kl is not None):
                    raise RuntimeError(
                        "minibatches: this method needs the update of a mini-batch before the next one is requested"
                    )

    def forward_backward(self, mini: MiniBatch, loss: Callable[..., Tensor] | None = None) -> UpdateResult:
        """Compute the gradient of the method's terms on a mini-batch; all counts are global.

        `loss` replaces the loss of the policy. It is a function whose positional parameters name columns (logp, old_logp,
        advantage, mask ...). It returns one loss per token, (B, T); the method's reduction averages them.
        """
        self._needs("forward_backward", "advantages", self._batch is not None)
        if not isinstance(mini, MiniBatch):
            raise TypeError(f"forward_backward: expected a mini-batch of minibatches(batch), got {type(mini).__name__}")
        if mini.step != self.step:
            raise ValueError(f"forward_backward: the mini-batch is of step {mini.step}, and this is step {self.step}")
        self._seen = mini.batch
        streams, terms = {"rollout": mini.batch, **mini.streams}, self._now.terms
        if loss is not None:
            own = own_loss(loss, {*mini.batch.columns, "old_logp", *BY_ROLE[terms[0].role]}, terms[0].loss)
            terms = (replace(terms[0], loss=own, name=name_of(loss)), *terms[1:])
        if self.step < self.plan.critic_warmup:
            terms = tuple(term for term in terms if term.role == "critic")
        result = self.learner.forward_backward(_work(terms, streams))
        self._mini = self._measured_late(mini, result) if self._deferred else mini
        return result

    def _measured_late(self, mini: MiniBatch, result: UpdateResult) -> MiniBatch:
        """Add the deferred columns to the rollout and to its only mini-batch, and check them before any weight changes."""
        assert self._batch is not None
        now, whole = result.now["rollout"], dict[str, Tensor]()
        late = {"old_logp": now["logp"], "old_entropy": now["entropy"]}
        elements = self._batch.elements()
        for name, values in late.items():
            self._batch.scatter(whole, name, [row for one in mini.index for row in elements[one]], values)
        self._batch = self._seen = self._batch.with_columns(**whole)
        self._ratio = torch.ones_like(whole["old_logp"])
        self._check_logprobs(self._batch)
        return replace(mini, batch=mini.batch.with_columns(**late))

    def optim_step(self) -> UpdateResult:
        """Clip the gradient and take one optimizer step.

        Raise RuntimeError without a preceding forward_backward, and RunStopped if the ratio of the first update is not 1.
        """
        self._needs("optim_step")
        mini = self._mini
        if mini is None:
            raise RuntimeError("optim_step was called without forward_backward before it")
        if self.stop is not None:
            self.stop.wait_for(f"the end of step {self.step + 1}")
        update, self._mini, self._unpublished = self.learner.optim_step(), None, True
        selfcheck.kl_in_loss(self.step, self._now.terms, update.losses, mini.batch["mask"].shape[1])
        now = update.now.get("rollout", {})
        if mini.epoch == 0 and mini.number == 0:
            selfcheck.ratio_is_one(self.step, mini.batch, now)
        current = mini.batch.with_columns(**({"logp": mini.batch["old_logp"]} | dict(now)))
        self._remember_ratio(mini, current)
        numbers = update_numbers(update) | diagnostics(current, clipping(self._now), critic_loss(self._now))
        numbers["epoch"] = mini.epoch
        if self._now.pairs:
            numbers["implicit_reward"] = mean_reward(self._now.terms, current.columns)
            numbers |= answer_numbers(self._now.terms, current.columns)
        if self.plan.target_kl is not None and numbers["kl_old"] > self.plan.target_kl:
            numbers["stopped"], self._stopped = 1.0, True
        self._updates.append(numbers)
        return update

    def _remember_ratio(self, mini: MiniBatch, current: Batch) -> None:
        assert self._batch is not None
        elements = self._batch.elements()
        rows = [row for one in mini.index for row in elements[one]]
        self._batch.scatter({"ratio": self._ratio}, "ratio", rows, (current["logp"] - current["old_logp"]).exp())

    def publish(self) -> None:
        """Update the moving average and the reference, load the new weights into the generator, and check the result."""
        self._needs("publish")
        if self._published:
            raise RuntimeError("publish: it was called in this step already; call it once, after the last update")
        plan, learner = self.plan, self.learner
        if plan.ema is not None:
            learner.blend("ema", "policy", 1 - plan.ema)
        if plan.sync_every and (self.step + 1) % plan.sync_every == 0:
            learner.blend("reference", "policy", plan.sync_mix)
        self.generator.load_weights(learner.publish())
        self._unpublished, self._published = False, True
        self._seen = self._batch
        if len(self._canary):
            after = scored(learner, self._canary)
            selfcheck.published(
                self.step, self.generator, learner.version, self._canary, self._before, after, plan.low_precision
            )
            self._moved = float((after - self._before).abs().mean())

    def metrics(self) -> dict[str, float]:
        """Return the metrics of this step so far: of the rollout, of the policy, and the means over the updates."""
        self._needs("metrics")
        if self._batch is None or self._whole is None:
            return dict(self._numbers)
        numbers = self._numbers | rollout_numbers(self._whole, [one.name for one in self.rewards])
        numbers |= (policy_numbers(self._batch) if self._trains else {}) | mean_of(self._updates)
        return numbers | {f"state/{key}": value for key, value in self.state.items()}

    def _end(self, log: StepLog) -> None:
        if self._unpublished:
            raise RuntimeError(f"step {self.step}: weights were updated and not published; call publish() in each step")
        if self._batch is None or (self._trains and not self._updates):
            raise RuntimeError(
                f"step {self.step}: no update was made; call forward_backward and optim_step for each mini-batch"
            )
        own, state, done = self.metrics(), self.state, self.step + 1
        batch, whole = self._batch, self._whole
        if batch is not None and whole is not None:
            steered = self.algorithm.steered() and self._trains
            moved = moved_from(self.learner, batch) if steered else 0.0
            seen = {"kl": own.get("kl", 0.0), "kl_old": moved, "entropy": own.get("entropy", 0.0)}
            if self._updates:  # a rollout without updates (no pairs, or skipped) gives no information
                seen |= {"reward": own.get("implicit_reward", 0.0), "sequences": len(whole.rows)}
                state = self.algorithm.next(state, seen)
            trained = batch.with_columns(ratio=self._ratio) if batch.rows else batch
            names = [one.name for one in self.rewards]
            record = self.plan.record_every > 0 and done % self.plan.record_every == 0
            self.run.rollout(done, self._groups, whole if self._now.pairs else trained, names, record=record)
            flat = self.flat.caution(done, whole)
            if flat is not None and self.divergence.once("flat"):
                self.run.caution(flat, done)
        self.state = state
        seconds = {"seconds": time.perf_counter() - self._began, "seconds/generate": self._sampled - self._began}
        if whole is not None:
            own |= per_second(sum(int(row.mask.sum()) for row in whole.rows), seconds["seconds"])
        own |= seconds
        own |= self.evaluation.numbers(done, self.plan.steps, log.metrics | own)
        self.run.metrics(done, log.metrics, **own)
        answers = len(whole.rows) if whole is not None else 0
        signs = self.divergence.signs(done, own, self._moved, answers)
        selfcheck.diverging(self.run, self.step, signs, self.plan.on_divergence)
        assert self._progress is not None
        assert self._keeper is not None
        self._progress.advance(own | log.metrics, sample=partial(shown_answer, self._groups, whole, done))
        self._running = False
        kept = {"skipped": self.skipped, "divergence": self.divergence.state()}
        kept |= {"state": dict(state), **self.source.state(), **self.evaluation.saved()}
        ended, failed = self.evaluation.ended, self.evaluation.failure is not None
        self._keeper.done(done, kept, ended=ended, save=failed)
        self.evaluation.settle(done if ended or done == self.plan.steps else self._keeper.saved)
        self.evaluation.raise_failure()


def _check_groups(stage: str, groups: Sequence[Group]) -> None:
    """Raise ValueError if there are no groups, TypeError for anything else than groups."""
    if not groups:
        raise ValueError(f"{stage}: no groups were given; pass the groups of generate()")
    wrong = next((one for one in groups if not isinstance(one, Group)), None)
    if wrong is not None:
        raise TypeError(f"{stage}: expected the groups of generate(), got {type(wrong).__name__}")


def train(*given: Any, **options: Any) -> None:
    """Run every step of an `OnlineLoop` with these arguments."""
    with OnlineLoop(*given, **options) as loop:
        run_steps(loop)


def run_steps(loop: OnlineLoop) -> None:
    """Run every stage of every step of an online loop."""
    for _ in loop.steps():
        groups = loop.generate()
        scores = loop.score(groups)
        batch = loop.measure(groups, scores, defer=loop.plan.defer)
        batch = loop.advantages(batch)
        for mini in loop.minibatches(batch):
            loop.forward_backward(mini)
            loop.optim_step()
        loop.publish()


def _work(terms: Sequence[Term], streams: Mapping[str, Batch]) -> list[tuple[Term, Batch, Any]]:
    return [(term, streams[term.stream], streams[term.stream].counts(term.mask)) for term in terms]
