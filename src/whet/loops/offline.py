"""The offline loop: elements of a file go through the terms of an objective (SFT, reward models, DPO)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from whet.data import COLUMNS, Batch, Element, order, pad
from whet.learner import Learner, look_across
from whet.loops import checkpoint, selfcheck
from whet.loops.evaluate import held_out
from whet.loops.interrupt import Stop
from whet.loops.progress import Progress
from whet.loops.record import RunFolder
from whet.methods import Objective
from whet.methods.parts import mean_reward


@dataclass(frozen=True)
class OfflinePlan:
    """How long and in which order: updates in all, elements per update, and when to save (0: at the end) and evaluate (0: never).

    `end_ids` are the tokens that end an answer: where a row ends with one, it must be trained. Every `refresh` updates the
    reference moves by `refresh_mix` towards the policy (TR-DPO); `precompute` measures the reference once, before.
    """

    steps: int
    batch: int
    seed: int = 0
    shuffle: bool = True
    save_every: int = 0
    eval_every: int = 0
    keep: int = 2
    end_ids: tuple[int, ...] = ()
    refresh: int = 0
    refresh_mix: float = 1.0
    precompute: bool = False


def train(
    objective: Objective,
    learner: Learner,
    sources: Sequence[Sequence[Element]],
    plan: OfflinePlan,
    run: RunFolder,
    *,
    weights: Sequence[float] | None = None,
    evaluation: Sequence[Element] = (),
    resume: bool = False,
    stop: Stop | None = None,
    title: str = "train",
    quiet: bool = False,
) -> None:
    """Trains until `plan.steps` updates are done; a resumed run goes on after its last checkpoint, to the same bits."""
    places = order(
        [len(source) for source in sources], plan.steps * plan.batch, plan.seed, weights=weights, shuffle=plan.shuffle
    )
    columns = frozenset(name for name in objective.reads() if COLUMNS[name].hop == "measure")
    known = _precomputed(learner, sources, columns, plan.batch) if plan.precompute else {}
    found = checkpoint.resumed(run.checkpoints, learner) if resume else None
    loop: dict[str, Any] = found or {"step": 0, "state": objective.init()}
    first, state = loop["step"], loop["state"]
    keeper = checkpoint.Keeper(
        run.checkpoints, learner, every=plan.save_every, total=plan.steps, keep=plan.keep, first=first, stop=stop
    )
    with keeper, Progress(title, plan.steps, done=first, quiet=quiet) as progress:
        for step in range(first, plan.steps):
            began = time.perf_counter()
            now, taken = objective.at(state), places[step * plan.batch : (step + 1) * plan.batch]
            batch = Batch.of([sources[source][index] for source, index in taken])
            selfcheck.tokens(step, batch, plan.end_ids)
            if known:
                stored = [row for place in taken for row in known[place]]
                batch = batch.with_columns(ref_logp=pad(stored, batch["mask"].shape[1]))
            elif columns:
                batch = learner.measure(batch, columns)
            batch = look_across(learner, objective.select, batch)
            update = learner.update([(term, batch, batch.counts(term.mask)) for term in now.terms])
            if state:
                state = objective.next(
                    state, {"reward": mean_reward(now.terms, {**batch.columns, **update.now["train"]})}
                )
            done = step + 1
            if plan.refresh and done % plan.refresh == 0:
                learner.blend("reference", "policy", plan.refresh_mix)
            numbers = {"loss": sum(update.losses.values()), **update.losses}
            numbers |= {f"grad_norm/{role}": norm for role, norm in update.grad_norm.items()}
            numbers |= {f"lr/{role}": rate for role, rate in update.lr.items()}
            if plan.eval_every and evaluation and (done % plan.eval_every == 0 or done == plan.steps):
                numbers |= {f"eval/{name}": value for name, value in held_out(learner, now, evaluation).items()}
            run.metrics(done, **numbers, tokens=batch.counts().tokens, seconds=time.perf_counter() - began)
            progress.advance(numbers)
            keeper.done(done, {"state": dict(state)})


def _precomputed(
    learner: Learner, sources: Sequence[Sequence[Element]], columns: frozenset[str], size: int
) -> dict[tuple[int, int], list[Tensor]]:
    """The reference's log-probs of every row of every element, by (source, index)."""
    out: dict[tuple[int, int], list[Tensor]] = {}
    for source, elements in enumerate(sources):
        for start in range(0, len(elements), size):
            batch = learner.measure(Batch.of(elements[start : start + size]), columns)
            for place, rows in enumerate(batch.elements()):
                out[source, start + place] = [
                    batch["ref_logp"][row, : batch.rows[row].response].clone() for row in rows
                ]
    return out
