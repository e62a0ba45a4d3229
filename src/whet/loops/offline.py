"""The offline loop: train on the elements of data files with the terms of an objective (SFT, reward models, DPO)."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from whet.data import COLUMNS, Batch, Element, epoch_batches, pad
from whet.errors import RunStopped
from whet.learner import Learner, UpdateResult, look_across
from whet.loops import checkpoint, selfcheck
from whet.loops.divergence import Divergence
from whet.loops.evaluation import Evaluation, HeldOut, held_out_numbers
from whet.loops.interrupt import Stop
from whet.loops.numbers import per_second, update_columns
from whet.loops.progress import Progress
from whet.loops.record import RunFolder
from whet.loops.steps import longest, trained_columns
from whet.methods import Objective
from whet.methods.own import own_loss
from whet.methods.parts import State, mean_reward, name_of
from whet.models.readers import BY_ROLE


@dataclass(frozen=True)
class OfflinePlan:
    """The size and schedule of a run: total updates, elements per update, updates between saves.

    The last batch of an epoch is smaller, or left out with `drop_last`. With `save_every` 0, there are no periodic saves.
    `save_minutes` and `save_last`: see `checkpoint.Keeper`; `on_divergence`: see
    `OnlinePlan`. `end_ids` are the token ids that end an answer; the end token of a row must be trained. Every `sync_every`
    updates, the reference moves by the fraction `sync_mix` towards the policy (TR-DPO). `precompute` measures the reference
    once, before training.
    """

    steps: int
    batch: int
    seed: int = 0
    shuffle: bool = True
    save_every: int = 0
    keep: int = 2
    end_ids: tuple[int, ...] = ()
    sync_every: int = 0
    sync_mix: float = 1.0
    precompute: bool = False
    drop_last: bool = False
    save_minutes: float = 0.0
    save_last: bool = True
    on_divergence: str = "warn"


class OfflineLoop:
    """The stages of an offline run. Use it as a context manager; `batches` yields the batches after the last checkpoint.

    Pass each batch to forward_backward, then call optim_step. A resumed run gives bitwise identical results.
    """

    def __init__(
        self,
        objective: Objective,
        learner: Learner,
        sources: Sequence[Sequence[Element]],
        plan: OfflinePlan,
        run: RunFolder,
        *,
        weights: Sequence[float] | None = None,
        evaluation: HeldOut | None = None,
        resume: bool = False,
        stop: Stop | None = None,
        title: str = "train",
        quiet: bool = False,
    ) -> None:
        self.objective, self.learner, self.sources, self.plan, self.run = objective, learner, sources, plan, run
        self.resume, self.stop, self.title, self.quiet = resume, stop, title, quiet
        held = evaluation or HeldOut(None)
        self.evaluation = Evaluation(
            held.plan, lambda *_: held_out_numbers(learner, self._now, held.elements), held.export, run, learner
        )
        self.weights = weights
        self.order = epoch_batches(
            [len(source) for source in sources], plan.steps, plan.batch, plan.seed, weights=weights, shuffle=plan.shuffle,
            drop_last=plan.drop_last,
        )  # fmt: skip
        self.columns = frozenset(name for name in objective.reads() if COLUMNS[name].stage == "measure")
        self.state: State = objective.init()
        self.divergence = Divergence()
        self.step = self.first = self._next = 0
        self._batch: Batch | None = None
        self._seen: Batch | None = None
        self._trained = Batch((), {})
        self._known: dict[tuple[int, int], list[Tensor]] = {}
        self._first: dict[tuple[int, int], int] = {}
        self._numbers: dict[str, float] = {}
        self._stack = ExitStack()
        self._progress: Progress | None = None
        self._keeper: checkpoint.Keeper | None = None

    def __enter__(self) -> "OfflineLoop":
        plan, learner = self.plan, self.learner
        keeper = self._keeper = checkpoint.Keeper(
            self.run.checkpoints, learner, total=plan.steps, every=plan.save_every, minutes=plan.save_minutes, keep=plan.keep,
            last=plan.save_last, stop=self.stop,
        )  # fmt: skip
        begin = {"step": 0, "state": self.state, "divergence": self.divergence.state()}
        begin |= self.evaluation.saved()
        loop: dict[str, Any] = (keeper.restore(begin, self.run.accepted) if self.resume else None) or begin
        self.first, self.state = loop["step"], loop["state"]
        self._next = self.first
        self.divergence.restore(loop["divergence"])
        self.evaluation.restore(loop)
        if self.first < plan.steps:
            learner.rehearse(longest(self.sources, plan.batch), trained_columns(self.objective.terms))
        if plan.precompute:
            self._known = precomputed(learner, self.sources, self.columns, plan.batch)
        self._stack.enter_context(keeper)
        self._progress = self._stack.enter_context(Progress(self.title, plan.steps, done=self.first, quiet=self.quiet))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if isinstance(error, RunStopped) and self._seen is not None:
                self.run.stopped(error, self.step + 1, self.learner.version, self._seen)
        finally:
            self._stack.__exit__(kind, error, trace)
            if self._keeper is not None:
                self.evaluation.settle(self._keeper.saved)

    def batches(self) -> Iterator[Batch]:
        """Yield one batch per step, with the columns that the objective reads. Requesting the next batch ends the step: its
        metrics are written, and a checkpoint is saved if due. Raise RuntimeError if a batch was not trained on."""
        plan = self.plan
        if self._batch is not None:
            raise RuntimeError(
                f"batches: step {self.step} was left before its end; leave the session and resume the run"
            )
        self._now = self.objective.at(self.state)
        found = self.evaluation.start(self._next, plan.steps)
        if found and self._progress is not None:
            self._progress.advance(found, 0)
        for step in range(self._next, plan.steps):
            if self.evaluation.ended:
                return
            self.step, began = step, time.perf_counter()
            self._now, self._numbers = self.objective.at(self.state), {}
            taken = self.order[step]
            batch = self._seen = Batch.of([self.sources[source][index] for source, index in taken])
            selfcheck.tokens(step, batch, plan.end_ids)
            if plan.precompute or self._keeps:
                self._measure_once(taken)
                stored = [row for key in taken for row in self._known[key]]
                batch = batch.with_columns(ref_logp=pad(stored, batch["mask"].shape[1]))
            elif self.columns:
                batch = self.learner.measure(batch, self.columns)
            self._batch = self._seen = look_across(self.learner, self.objective.select, batch)
            yield self._batch
            self._end(began)
            self._next = step + 1

    @property
    def _keeps(self) -> bool:
        """Whether the log-probs of a reference that never changes are kept from the first epoch for the later ones."""
        once = self.weights is None and not self.plan.sync_every and self.columns == {"ref_logp"}
        return once and self.plan.steps > self.order.each

    def _measure_once(self, taken: Sequence[tuple[int, int]]) -> None:
        """Measure these elements if they are not known: with all elements of their batch in the first epoch, so that a resumed run
        has the same bits."""
        missing = [key for key in taken if key not in self._known]
        if not missing:
            return
        if not self._first:
            self._first = {key: number for number in range(self.order.each) for key in self.order[number]}
        left = [key for key in missing if key not in self._first]  # those that `drop_last` left out
        numbers = dict.fromkeys(self._first[key] for key in missing if key in self._first)
        for keys in [*(self.order[number] for number in numbers), *([key] for key in left)]:
            batch = Batch.of([self.sources[source][index] for source, index in keys])
            self._known |= zip(keys, _by_element(self.learner.measure(batch, self.columns)), strict=True)

    def forward_backward(self, batch: Batch, loss: Callable[..., Tensor] | None = None) -> UpdateResult:
        """Compute the gradient of the objective on a batch; all counts are global. `loss` replaces the loss of the first
        term: a function whose positional parameters name columns, and whose result the term's reduction averages."""
        if self._batch is None:
            raise RuntimeError("forward_backward: call it inside the loop over batches()")
        if not isinstance(batch, Batch):
            raise TypeError(f"forward_backward: expected a batch of batches(), got {type(batch).__name__}")
        terms = self._now.terms
        if loss is not None:
            own = own_loss(loss, {*batch.columns, *BY_ROLE[terms[0].role]}, terms[0].loss)
            terms = (replace(terms[0], loss=own, name=name_of(loss)), *terms[1:])
        self._trained = batch
        return self.learner.forward_backward([(term, batch, batch.counts(term.mask)) for term in terms])

    def optim_step(self) -> UpdateResult:
        """Clip the gradient and take one optimizer step. Raise RuntimeError outside the loop over batches."""
        if self._batch is None:
            raise RuntimeError("optim_step: call it inside the loop over batches()")
        if self.stop is not None:
            self.stop.wait_for(f"the end of step {self.step + 1}")
        update, plan = self.learner.optim_step(), self.plan
        if self.state:
            seen = {**self._batch.columns, **update.now["train"]}
            self.state = self.objective.next(self.state, {"reward": mean_reward(self._now.terms, seen)})
        if plan.sync_every and (self.step + 1) % plan.sync_every == 0:
            self.learner.blend("reference", "policy", plan.sync_mix)
        self._numbers = {"loss": sum(update.losses.values()), **update.losses}
        self._numbers |= {f"grad_norm/{role}": norm for role, norm in update.grad_norm.items()}
        self._numbers |= {f"lr/{role}": rate for role, rate in update.lr.items()}
        self._numbers |= update_columns(self._now.terms, self._trained, update.now.get("train", {}))
        return update

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the last update."""
        return dict(self._numbers)

    def _end(self, began: float) -> None:
        plan, done, numbers, batch = self.plan, self.step + 1, self._numbers, self._batch
        self._batch = None
        if not numbers or batch is None:
            raise RuntimeError(f"step {self.step}: the batch was not trained on; call forward_backward and optim_step")
        seconds = time.perf_counter() - began
        numbers |= per_second(batch.counts().tokens, seconds) | {"seconds": seconds}
        numbers |= self.evaluation.numbers(done, plan.steps, numbers)
        self.run.metrics(done, **numbers)
        selfcheck.diverging(self.run, self.step, self.divergence.signs(done, numbers), plan.on_divergence)
        assert self._progress is not None
        assert self._keeper is not None
        self._progress.advance(numbers)
        kept = {"state": dict(self.state), "divergence": self.divergence.state(), **self.evaluation.saved()}
        ended = self.evaluation.ended
        self._keeper.done(done, kept, ended=ended, save=self.evaluation.failure is not None)
        self.evaluation.settle(done if ended or done == plan.steps else self._keeper.saved)
        self.evaluation.raise_failure()


def train(*given: Any, **options: Any) -> None:
    """Run every step of an `OfflineLoop` with these arguments."""
    with OfflineLoop(*given, **options) as loop:
        run_steps(loop)


def run_steps(loop: OfflineLoop) -> None:
    """Make one update per batch of an offline loop."""
    for batch in loop.batches():
        loop.forward_backward(batch)
        loop.optim_step()


def precomputed(
    learner: Learner, sources: Sequence[Sequence[Element]], columns: frozenset[str], size: int
) -> dict[tuple[int, int], list[Tensor]]:
    """Return the reference's log-probs of the rows of each element, as (source, index) -> one tensor (response,) per row."""
    out: dict[tuple[int, int], list[Tensor]] = {}
    for source, elements in enumerate(sources):
        for start in range(0, len(elements), size):
            batch = learner.measure(Batch.of(elements[start : start + size]), columns)
            out |= {(source, start + number): rows for number, rows in enumerate(_by_element(batch))}
    return out


def _by_element(batch: Batch) -> list[list[Tensor]]:
    """Return the reference's log-probs of each element of a batch, one tensor (response,) per row."""
    return [[batch["ref_logp"][row, : batch.rows[row].response].clone() for row in rows] for rows in batch.elements()]
