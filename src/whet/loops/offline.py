"""The offline loop: elements of a file go through the terms of an objective (SFT, reward models, DPO)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from whet.learner import Learner
from whet.loops import checkpoint, selfcheck
from whet.loops.evaluate import held_out
from whet.loops.interrupt import Stop
from whet.loops.progress import Progress
from whet.loops.record import Run
from whet.methods import Term
from whet.records import COLUMNS, Batch, Element, order


@dataclass(frozen=True)
class Plan:
    """How long and in which order: updates in all, elements per update, and when to save (0: at the end) and evaluate (0: never).

    `end_ids` are the tokens that end an answer: where a row ends with one, it must be trained.
    """

    steps: int
    batch: int
    seed: int = 0
    shuffle: bool = True
    save_every: int = 0
    eval_every: int = 0
    keep: int = 2
    end_ids: tuple[int, ...] = ()


def train(
    terms: Sequence[Term],
    learner: Learner,
    sources: Sequence[Sequence[Element]],
    plan: Plan,
    run: Run,
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
    columns = frozenset(name for term in terms for name in term.reads() if COLUMNS[name].role is not None)
    found = checkpoint.latest(run.checkpoints) if resume else None
    first = checkpoint.load(found, learner)["step"] if found else 0
    keeper = checkpoint.Keeper(
        run.checkpoints, learner, every=plan.save_every, total=plan.steps, keep=plan.keep, first=first, stop=stop
    )
    with keeper, Progress(title, plan.steps, done=first, quiet=quiet) as progress:
        for step in range(first, plan.steps):
            began = time.perf_counter()
            batch = Batch.of(
                [sources[source][index] for source, index in places[step * plan.batch : (step + 1) * plan.batch]]
            )
            selfcheck.tokens(step, batch, plan.end_ids)
            batch = learner.measure(batch, columns) if columns else batch
            update = learner.update([(term, batch, batch.counts(term.mask)) for term in terms])
            done = step + 1
            numbers = {"loss": sum(update.losses.values()), **update.losses}
            numbers |= {f"grad_norm/{role}": norm for role, norm in update.grad_norm.items()}
            numbers |= {f"lr/{role}": rate for role, rate in update.lr.items()}
            if plan.eval_every and evaluation and (done % plan.eval_every == 0 or done == plan.steps):
                numbers |= {f"eval/{name}": value for name, value in held_out(learner, terms, evaluation).items()}
            run.metrics(done, **numbers, tokens=batch.counts().tokens, seconds=time.perf_counter() - began)
            progress.advance(numbers)
            keeper.done(done, {})
