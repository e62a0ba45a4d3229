"""The online loop: take prompts, collect answers, score, measure, credit, update, publish, record."""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from whet.data import Batch, Element, Group, Prompt, Row, minibatches, order, pad, pad_support, take_elements
from whet.generate import Generator
from whet.generate.fleet import Fleet
from whet.learner import Learner, UpdateResult, look_across
from whet.loops import checkpoint, selfcheck
from whet.loops.ahead import AsynchronousSource, Buffer, Driver, Threads
from whet.loops.interrupt import Stop
from whet.loops.progress import Progress
from whet.loops.record import RunFolder, mean_of
from whet.loops.source import GroupSource, PromptQueue, SynchronousSource, answered
from whet.methods import Algorithm, advantages, clipping, diagnostics, outcome, paired, shaped, spread
from whet.methods.options import Sampling
from whet.methods.parts import mean_reward
from whet.ops import address, masked_mean, masked_sum
from whet.rewards import Weighted, score_all


@dataclass(frozen=True)
class OnlinePlan:
    """How much: rollouts in all, prompts per rollout, answers per update, passes over each rollout, and when to save.

    `target_kl` ends a rollout's updates once KL(old || new) exceeds it (nats per token, a mean over a mini-batch).
    `ema` is the weight of the past in an average of the policy. `equal_start` says that policy and reference began
    with equal weights, which is then checked. Every `refresh` rollouts the
    reference moves by `refresh_mix` towards the policy. With `max_staleness` the generator answers ahead: answers may be of
    weights that many rollouts old, unfinished ones go on under new weights after `segment` tokens, and each of its
    engines works on at most `slots` at a time. `end_ids` are the tokens that end an answer; `canary` is the length of
    the sequence that generator and learner both score after each push; `low_precision` says that the generator
    computes in half precision.
    """

    steps: int
    prompts: int
    mini_batch_size: int
    epochs: int = 1
    seed: int = 0
    ptx_batch: int = 0
    target_kl: float | None = None
    ema: float | None = None
    equal_start: bool = False
    end_ids: tuple[int, ...] = ()
    canary: int = 160
    low_precision: bool = False
    save_every: int = 0
    keep: int = 2
    refresh: int = 0
    refresh_mix: float = 1.0
    max_staleness: int = 0
    segment: int = 64
    slots: int = 256


def train(
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
) -> None:
    """Runs `plan.steps` rollouts with their updates; a resumed run goes on after its last checkpoint, to the same bits."""
    if not algorithm.has_ratio() and (
        plan.epochs > 1 or plan.mini_batch_size < plan.prompts * algorithm.collect.num_generations
    ):
        raise ValueError("a method without ratio takes exactly one update per rollout")
    plan = replace(plan, low_precision=plan.low_precision or learner.low_precision)
    source = _source(algorithm, generator, prompts, sampling, plan, driver)
    generator = source if isinstance(source, AsynchronousSource) else generator
    stream = _Stream(ptx, plan)
    found = checkpoint.resumed(run.checkpoints, learner) if resume else None
    loop: dict[str, Any] = found or {"step": 0, "state": algorithm.init(), "drawn": 0}
    first, state = loop["step"], loop["state"]
    source.restore(loop, first)
    generator.load_weights(learner.publish())
    canary = torch.tensor([token for prompt in prompts for token in prompt.ids][: plan.canary])
    if len(canary) > 1:
        expected = scored(learner, canary)
        selfcheck.published(first, generator, learner.version, canary, expected, expected, plan.low_precision)
    keeper = checkpoint.Keeper(
        run.checkpoints, learner, every=plan.save_every, total=plan.steps, keep=plan.keep, first=first, stop=stop
    )
    with keeper, closing(source), Progress(title, plan.steps, done=first, quiet=quiet) as progress:
        for step in range(first, plan.steps):
            began = time.perf_counter()
            groups, batch, numbers = collected(algorithm.at(state), source, rewards, step, sampling, plan)
            sampled = time.perf_counter()
            state = algorithm.observe(state, outcome(algorithm, batch))
            now = algorithm.at(state)
            whole = batch = with_baseline(now, generator, rewards, groups, batch, sampling, plan)
            generator.sleep()
            if now.pairs:
                whole = advantages(now, batch)
                batch = paired(whole)
            turns = [
                minibatches(len(batch.elements()), plan.mini_batch_size, address(plan.seed, "minibatch", step, epoch))
                for epoch in range(plan.epochs)
            ]
            columns = now.reads() | {"old_entropy"}
            if "support" in batch.columns and "ref_logp" in columns:  # a KL is between whole distributions
                columns |= {"old_full_logp"}
            batch = measured(learner, batch, turns[0], columns)
            if not now.pairs:
                whole = batch = advantages(now, batch)
            canary = canary_of(whole, plan)
            before = scored(learner, canary)
            rows: list[dict[str, float]] = []
            if batch.rows:
                check_rollout(step, batch, plan, now, learner.version)
                rows, batch = updates(now, learner, batch, turns, stream, step, plan)
            if plan.ema is not None:
                learner.blend("ema", "policy", 1 - plan.ema)
            if plan.refresh and (step + 1) % plan.refresh == 0:
                learner.blend("reference", "policy", plan.refresh_mix)
            weights = learner.publish()
            generator.load_weights(weights)
            selfcheck.published(
                step, generator, learner.version, canary, before, scored(learner, canary), plan.low_precision
            )

            names = [one.name for one in rewards]
            numbers |= rollout_numbers(whole, names) | policy_numbers(batch) | mean_of(rows)
            numbers |= {f"state/{key}": value for key, value in state.items()}
            moved = moved_from(learner, batch) if algorithm.steered() and batch.rows else 0.0
            seen = {"kl": numbers.get("kl", 0.0), "kl_old": moved, "entropy": numbers.get("entropy", 0.0)}
            if rows:  # a rollout without a pair has shown nothing
                seen |= {"reward": numbers.get("implicit_reward", 0.0), "sequences": len(whole.rows)}
                state = algorithm.next(state, seen)
            done = step + 1
            run.rollout(done, groups, whole if now.pairs else batch, names)
            seconds = {"seconds": time.perf_counter() - began, "seconds/generate": sampled - began}
            run.metrics(done, **numbers, **seconds)
            progress.advance(numbers)
            keeper.done(done, {"state": dict(state), **source.state()})


def _source(
    algorithm: Algorithm,
    generator: Generator,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    plan: OnlinePlan,
    driver: Driver | None,
) -> GroupSource:
    """Where the groups come from: asked for now, or answered ahead."""
    most = plan.prompts * plan.steps * (1 + algorithm.collect.dynamic_sampling)
    hand, answers = PromptQueue(prompts, most, plan.seed), algorithm.collect.num_generations
    if not plan.max_staleness and driver is None:
        return SynchronousSource(generator, hand, answers, sampling, plan.seed)
    lanes: Sequence[Generator] = generator.lanes if isinstance(generator, Fleet) else [generator]
    buffer = Buffer(
        hand, answers, sampling, plan.seed, steps=plan.steps, prompts=plan.prompts, staleness=plan.max_staleness,
        lanes=len(lanes),
    )  # fmt: skip
    return AsynchronousSource(lanes, buffer, driver or Threads(), slots=plan.slots, segment=plan.segment)


def collected(
    algorithm: Algorithm,
    source: GroupSource,
    rewards: Sequence[Weighted],
    step: int,
    sampling: Sampling,
    plan: OnlinePlan,
) -> tuple[list[Group], Batch, dict[str, float]]:
    """(the groups of a rollout, their batch, what collecting took).

    With `dynamic_sampling`, groups whose answers all have the same rewards teach nothing and are replaced by those of further
    prompts, for at most that many rounds (DAPO's dynamic sampling, bounded); what is still missing is made up of the
    first ones without spread, so that a rollout always has its size.
    """
    kept: list[tuple[Group, Batch]] = []
    spare: list[tuple[Group, Batch]] = []
    rounds = algorithm.collect.dynamic_sampling
    turn, ages = 0, list[int]()
    while len(kept) < plan.prompts and turn <= rounds:
        turn += 1
        groups = source.groups(step, plan.prompts - len(kept))
        ages += source.staleness(step, groups)
        batch = gathered(groups, rewards, sampling)
        if not rounds:
            return groups, batch, _ages(ages, plan)
        useful = spread(algorithm, batch)
        for number, group in enumerate(groups):
            rows = (batch["group"] == number).nonzero()[:, 0].tolist()
            (kept if bool(useful[rows[0]]) else spare).append((group, batch.take(rows)))
    filler = spare[: plan.prompts - len(kept)]
    numbers = _ages(ages, plan) | {"groups_replaced": float(len(spare) - len(filler)), "rounds": float(turn)}
    numbers["groups_with_spread"] = float(len(kept))
    chosen = kept + filler
    return [group for group, _ in chosen], Batch.joined([one for _, one in chosen]), numbers


def _ages(ages: Sequence[int], plan: OnlinePlan) -> dict[str, float]:
    """How many steps old the weights behind a rollout's tokens were, where they may be old."""
    return {"staleness": sum(ages) / len(ages), "staleness_max": float(max(ages))} if plan.max_staleness else {}


def with_baseline(
    algorithm: Algorithm,
    generator: Generator,
    rewards: Sequence[Weighted],
    groups: Sequence[Group],
    batch: Batch,
    sampling: Sampling,
    plan: OnlinePlan,
) -> Batch:
    """The batch with `baseline`, the score of a greedy answer to each prompt, where the method asks for one (ReMax)."""
    if not algorithm.collect.greedy:
        return batch
    greedy = replace(sampling, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
    drawn = [(group.samples[0].draw, group.prompt) for group in groups]
    answers = answered(generator, drawn, 1, greedy, plan.seed)
    score = shaped(algorithm, gathered(answers, rewards, greedy))["score"]
    return batch.with_columns(baseline=score[batch["group"]])


def gathered(groups: Sequence[Group], rewards: Sequence[Weighted], sampling: Sampling) -> Batch:
    """The groups as a batch of rows with group, truncated, temperature, sampler_logp, rewards, token_score, step, and the
    support where some tokens could not be drawn."""
    pairs = [(number, group.prompt, sample) for number, group in enumerate(groups) for sample in group.samples]
    rows = [row for group in groups for row in group.rows()]
    named, dense, step = score_all(rewards, groups)
    supports = [sample.support for _, _, sample in pairs]
    extra = {"support": pad_support([one for one in supports if one is not None])} if None not in supports else {}
    return Batch.of(rows).with_columns(
        group=torch.tensor([number for number, _, _ in pairs]),
        address=torch.tensor([address(sample.draw, sample.answer) >> 1 for _, _, sample in pairs]),
        truncated=torch.tensor([sample.truncated for _, _, sample in pairs]),
        temperature=torch.full((len(rows),), sampling.temperature),
        token_version=pad([torch.tensor(sample.token_versions()) for _, _, sample in pairs]),
        sampler_logp=pad([torch.tensor(sample.sampler_logp) for _, _, sample in pairs]),
        rewards=torch.stack([named[one.name] for one in rewards], 1),
        token_score=dense,
        segment_end=step,
        **extra,
    )


def measured(learner: Learner, batch: Batch, turn: Sequence[Sequence[int]], columns: frozenset[str]) -> Batch:
    """The batch with its measured columns, mini-batch by mini-batch of the first epoch.

    The learner then splits as it will in the first updates, so the ratio there is 1 to the bit.
    """
    out: dict[str, torch.Tensor] = {}
    elements = batch.elements()
    for places in turn:
        part = learner.measure(take_elements(batch, places), columns)
        rows = torch.tensor([row for place in places for row in elements[place]])
        for name in columns:
            values = part[name]
            shape = batch["mask"].shape if values.ndim == 2 else batch["mask"].shape[:1]
            whole = out.setdefault(name, torch.zeros(shape, dtype=values.dtype))
            if values.ndim == 2:
                whole[rows, : values.shape[1]] = values
            else:
                whole[rows] = values
    return batch.with_columns(**out)


def updates(
    algorithm: Algorithm,
    learner: Learner,
    batch: Batch,
    turns: Sequence[Sequence[Sequence[int]]],
    stream: "_Stream",
    step: int,
    plan: OnlinePlan,
) -> tuple[list[dict[str, float]], Batch]:
    """All updates of one rollout: (one row of numbers per update, the batch with the ratio it was last trained at)."""
    clip, rows, ratio = clipping(algorithm), [], torch.ones_like(batch["old_logp"])
    elements = batch.elements()
    for epoch, turn in enumerate(turns):
        for number, places in enumerate(turn):
            mini = take_elements(batch, places)
            mini = mini.with_columns(address=mini["address"] ^ (address(plan.seed, "select", step, epoch) >> 1))
            mini = look_across(learner, algorithm.select, mini)
            streams = {"rollout": mini, **stream.batch(step, epoch * len(turn) + number, len(turn) * len(turns))}
            work = [(term, streams[term.stream], streams[term.stream].counts(term.mask)) for term in algorithm.terms]
            update = learner.update(work)
            if epoch == 0 and number == 0:
                selfcheck.ratio_is_one(step, mini, update.now["rollout"])
            current = mini.with_columns(**update.now["rollout"])
            own = (current["logp"] - current["old_logp"]).exp()
            taken = torch.tensor([row for place in places for row in elements[place]])
            ratio[taken, : own.shape[1]] = own
            rows.append(update_numbers(update) | diagnostics(current, clip) | {"epoch": epoch})
            if algorithm.pairs:
                rows[-1]["implicit_reward"] = mean_reward(algorithm.terms, current.columns)
            if plan.target_kl is not None and rows[-1]["kl_old"] > plan.target_kl:
                rows[-1]["stopped"] = 1.0
                return rows, batch.with_columns(ratio=ratio)
    return rows, batch.with_columns(ratio=ratio)


def moved_from(learner: Learner, batch: Batch) -> float:
    """KL(old || new) after a rollout's last update: the mean over its tokens of ratio - 1 - log ratio, in nats."""
    now = learner.measure(batch, frozenset({"old_logp"}))["old_logp"]
    log_ratio = now - batch["old_logp"]
    return float(masked_mean(torch.expm1(log_ratio) - log_ratio, batch["mask"]))


def check_rollout(step: int, batch: Batch, plan: OnlinePlan, algorithm: Algorithm, version: int) -> None:
    """The self-checks between measuring and training."""
    selfcheck.tokens(step, batch, plan.end_ids)
    selfcheck.finite(step, batch.columns)
    if algorithm.importance_correction is None:  # else the gap is expected, and weighed
        selfcheck.sampler_agrees(step, batch, version, plan.low_precision)
    if step == 0 and plan.equal_start and "ref_logp" in batch.columns:
        selfcheck.kl_is_zero(step, batch)
    if "old_value" not in batch.columns and algorithm.centered and algorithm.truncated.rule != "mask":
        selfcheck.groups_centered(step, batch)


def canary_of(batch: Batch, plan: OnlinePlan) -> torch.Tensor:
    """A sequence longer than a cache block, made of this rollout's tokens, for generator and learner to score."""
    return torch.cat([row.ids for row in batch.rows])[: plan.canary]


def scored(learner: Learner, ids: torch.Tensor) -> torch.Tensor:
    """The learner's log-probs of a sequence's tokens after the first, (S - 1,)."""
    row = Row(ids, 1, torch.ones(len(ids) - 1, dtype=torch.bool))
    return learner.measure(Batch.of([row]), frozenset({"old_logp"}))["old_logp"][0]


def rollout_numbers(batch: Batch, names: Sequence[str]) -> dict[str, float]:
    """What a rollout's answers were like: score and its spread, each reward, length in tokens, share cut off."""
    lengths = torch.tensor([float(row.response) for row in batch.rows])
    out = {"score": float(batch["score"].mean()), "score_std": float(batch["score"].std(correction=0))}
    out |= {"length": float(lengths.mean()), "truncated": float(batch["truncated"].float().mean())}
    return out | {f"reward/{name}": float(batch["rewards"][:, number].mean()) for number, name in enumerate(names)}


def policy_numbers(batch: Batch) -> dict[str, float]:
    """What the policy was like on a rollout: KL to the reference in nats per trained answer, entropy in nats per token,
    and how far the sampler's log-probs are from the learner's."""
    if not batch.rows:
        return {}
    out = {}
    own = batch["old_full_logp"] if "old_full_logp" in batch.columns else batch["old_logp"]
    if "old_exact_kl" in batch.columns or "ref_logp" in batch.columns:
        each = batch["old_exact_kl"] if "old_exact_kl" in batch.columns else own - batch["ref_logp"]
        total = masked_sum(each, batch["mask"], 1)
        out["kl"] = float(total.sum() / batch["mask"].any(1).sum().clamp(min=1))
    out["entropy"] = float(masked_mean(batch["old_entropy"], batch["mask"]))
    gap = (batch["sampler_logp"] - batch["old_logp"])[batch["mask"]].abs()
    return out | {"sampler_gap": float(gap.mean()) if len(gap) else 0.0}


def update_numbers(update: UpdateResult) -> dict[str, float]:
    """An update's losses, gradient norms and learning rates under the names of the logs."""
    norms = {f"grad_norm/{role}": norm for role, norm in update.grad_norm.items()}
    return (
        {f"loss/{name}": value for name, value in update.losses.items()}
        | norms
        | {f"lr/{r}": v for r, v in update.lr.items()}
    )


class _Stream:
    """The ptx stream: which elements of the pre-training data go into which update, by address."""

    def __init__(self, elements: Sequence[Element], plan: OnlinePlan) -> None:
        self.elements, self.size, self.seed = elements, plan.ptx_batch, plan.seed
        self.places: list[tuple[int, int]] = []

    def batch(self, step: int, number: int, per_step: int) -> Mapping[str, Batch]:
        """The "ptx" batch of update `number` of this step; nothing without ptx data."""
        if not self.elements or not self.size:
            return {}
        first = (step * per_step + number) * self.size
        if len(self.places) < first + self.size:
            self.places = order([len(self.elements)], 2 * (first + self.size), address(self.seed, "ptx") >> 1)
        return {"ptx": Batch.of([self.elements[index] for _, index in self.places[first : first + self.size]])}
