"""Compute steps of a run again from its record: the answers and scores of its rollouts, and a checkpoint. Nothing is written."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whet.data import Batch, Group, Prompt, Sample, Segment, Weights, pad
from whet.errors import DataError, first_line
from whet.generate import Request
from whet.learner import Learner, UpdateResult
from whet.loops import checkpoint, rollouts
from whet.loops.experience import RolloutScores, scored
from whet.loops.metrics import timed
from whet.loops.offline import OfflineLoop, precomputed
from whet.loops.online import MiniBatch, OnlineLoop
from whet.loops.progress import Progress
from whet.loops.record import RunFolder, plain
from whet.methods import Term
from whet.ops import Counts


@dataclass(frozen=True)
class Portion:
    """The losses of one term on the rows of a micro-batch, and their shares in the loss of the update.

    `losses` and `shares` are (B, T), or (E,) for one loss per element. The shares are weight x coefficient x loss, with the
    coefficient of the reduction, so their sum is the part of this micro-batch in the loss. `columns` has all columns of the
    micro-batch, those computed with gradient too; `number` among them is the row in the mini-batch.
    """

    term: Term
    losses: Tensor
    shares: Tensor
    columns: dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """One recomputed update: its mini-batch, the portions of all terms and micro-batches, and its losses by term."""

    mini: MiniBatch
    portions: list[Portion]
    losses: dict[str, float]


@dataclass(frozen=True)
class WatchedTerm(Term):
    """A term that keeps its losses before the reduction in `portions`."""

    portions: list[Portion] = field(default_factory=list)

    def share(self, columns: Any, counts: Counts, masked: dict[str, dict[str, Tensor]] | None = None) -> Tensor:
        """See `Term.share`."""
        losses, mask = self.losses(columns, masked), columns[self.mask]
        free = losses.detach().clone().requires_grad_()
        with torch.enable_grad():  # a reduction is linear: its gradient is the coefficient of each loss
            (coefficient,) = torch.autograd.grad(self.reduced(free, mask, counts), free)
        shares = torch.where(coefficient == 0, 0.0, losses.detach().double() * coefficient.double())
        seen = {name: column.detach() for name, column in columns.items()}
        self.portions.append(Portion(self, losses.detach(), shares, seen))
        return self.reduced(losses, mask, counts)


class RecomputedRun(RunFolder):
    """A run folder that is only read. The metrics and the rollout of step `last` are kept in memory."""

    def __init__(self, folder: Path, last: int, accepted: Sequence[str] = ()) -> None:
        super().__init__(folder, writes=False, accepted=accepted)
        self.last = last
        self.numbers: dict[str, float] = {}
        self.table: dict[str, list[Any]] = {}

    def metrics(self, step: int, also: Mapping[str, float] | None = None, /, **numbers: float) -> None:
        """Keep the numbers of step `last`."""
        if step == self.last:
            self.numbers = {name: plain(value) for name, value in {**numbers, **(also or {})}.items()}

    def stopped(self, *given: Any) -> None:
        """Write nothing."""

    def rollout(
        self, step: int, groups: Sequence[Group], batch: Batch, names: Sequence[str], *, record: bool = True
    ) -> None:
        """Keep the columns of the rollout of step `last`."""
        if step == self.last:
            self.table = rollouts.table_of(groups, batch, names)


class _Unsaved(checkpoint.Keeper):
    """A keeper that saves nothing."""

    def done(self, step: int, state: Any, *, ended: bool = False, save: bool = False) -> None:
        self.step = step


class _Silent:
    """A generator that gives no answers: those of a replay are in its record."""

    reports: frozenset[str] = frozenset()

    def __init__(self, learner: Learner) -> None:
        self.learner, self.version = learner, 0

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        raise RuntimeError("a replay generates no answers")

    def load_weights(self, weights: Weights) -> None:
        self.version = weights.version

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        return [scored(self.learner, one) for one in ids]

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass


class OnlineReplay(OnlineLoop):
    """An online loop whose answers and scores are those of the record. It begins after the checkpoint `found`, or at the start
    of the run without one, and ends with step `run.last`. With `watch`, `updates` has the updates of this step."""

    run: RecomputedRun

    def __init__(
        self, algorithm: Any, learner: Learner, *given: Any, found: Path | None, watch: bool = False, **options: Any
    ) -> None:
        rewards, prompts, sampling, plan, run = given
        plan = replace(plan, steps=run.last, max_staleness=0, canary=2, on_divergence="warn")
        super().__init__(algorithm, learner, _Silent(learner), rewards, prompts, sampling, plan, run, **options)
        self.found, self.watch, self.updates = found, watch, list[Update]()
        self._recorded: RolloutScores | None = None

    def __enter__(self) -> "OnlineReplay":
        _begin(self, self.found)
        return self

    def generate(self) -> list[Group]:
        """Return the groups of the record."""
        self._needs("generate")
        names = [one.name for one in self.rewards]
        self._groups, self._recorded = recorded(self.run.folder, self.step + 1, names)
        return list(self._groups)

    def score(self, groups: Sequence[Group]) -> RolloutScores:
        """Return the scores of the record."""
        assert self._recorded is not None
        return self._recorded

    def forward_backward(self, mini: MiniBatch, loss: Callable[..., Tensor] | None = None) -> UpdateResult:
        """See `OnlineLoop.forward_backward`."""
        return _watched(self, mini, lambda: super(OnlineReplay, self).forward_backward(mini, loss))

    @property
    def batch(self) -> Batch:
        """The batch of the last step with its columns."""
        assert self._batch is not None
        return self._batch

    @property
    def whole(self) -> Batch:
        """The answers of the last step; with pairs, also those that are in no pair."""
        assert self._whole is not None
        return self._whole

    def numbers(self) -> dict[str, float]:
        """Return the metrics of step `run.last`, without those that are not computed again."""
        return {name: value for name, value in self.run.numbers.items() if not timed(name)}


class OfflineReplay(OfflineLoop):
    """An offline loop that begins after the checkpoint `found`, or at the start of the run without one, and ends with step
    `run.last`. With `watch`, `updates` has the update of this step."""

    run: RecomputedRun

    def __init__(
        self,
        objective: Any,
        learner: Learner,
        sources: Any,
        plan: Any,
        run: RecomputedRun,
        *,
        found: Path | None,
        watch: bool = False,
        **options: Any,
    ) -> None:
        last = run.last
        super().__init__(objective, learner, sources, plan, run, **options)
        self.plan = replace(plan, steps=last, on_divergence="warn")
        self.found, self.watch, self.updates, self.batch = found, watch, list[Update](), Batch((), {})

    def __enter__(self) -> "OfflineReplay":
        _begin(self, self.found)
        if self.plan.precompute:
            self._known = precomputed(self.learner, self.sources, self.columns, self.plan.batch)
        return self

    def forward_backward(self, batch: Batch, loss: Callable[..., Tensor] | None = None) -> UpdateResult:
        """See `OfflineLoop.forward_backward`."""
        self.batch = batch
        mini = MiniBatch(batch, tuple(range(len(batch.elements()))), 0, 0, self.step)
        return _watched(self, mini, lambda: super(OfflineReplay, self).forward_backward(batch, loss))

    def numbers(self) -> dict[str, float]:
        """Return the metrics of step `run.last`, without those that are not computed again."""
        return {name: value for name, value in self.run.numbers.items() if not timed(name)}


def _begin(loop: Any, found: Path | None) -> None:
    """Restore the state of a loop from a checkpoint, if there is one. The loop saves nothing."""
    loop._keeper = _Unsaved(loop.run.checkpoints, loop.learner, total=loop.plan.steps)
    if found is not None:
        saved = checkpoint.load(found, loop.learner, loop.run.accepted)
        loop.first, loop.state = saved["step"], saved["state"]
        loop._next = loop.first
    shown = Progress(loop.title, loop.plan.steps, done=loop.first, quiet=loop.quiet)
    loop._progress = loop._stack.enter_context(shown)


def _watched(loop: Any, mini: MiniBatch, call: Callable[[], UpdateResult]) -> UpdateResult:
    """Call forward_backward. In the last step of a loop that is watched, keep the losses before the reductions in `updates`."""
    if not loop.watch or loop.step + 1 < loop.run.last:
        return call()
    now, portions = loop._now, list[Portion]()
    terms = [
        WatchedTerm(**{one.name: getattr(term, one.name) for one in fields(Term)}, portions=portions)
        for term in now.terms
    ]
    loop._now = replace(now, terms=tuple(terms))
    try:
        result = call()
    finally:
        loop._now = now
    loop.updates.append(Update(mini, portions, dict(result.losses)))
    return result


def recorded(folder: Path, step: int, names: Sequence[str]) -> tuple[list[Group], RolloutScores]:
    """Return the groups and the scores of the rollout of a step (from 1). `names` are those of the rewards.

    Raises DataError if the run has no rollout of this step, or one without a column that is needed.
    """
    path = rollouts.path_of(folder, step)
    if not path.is_file():
        raise DataError(
            f"{path}: there is no rollout of step {step}; the step cannot be computed again without its answers"
        )
    table = rollouts.read(folder, step)
    kinds = {name: rollouts.dtype(folder, step, name) for name in ("rewards", "token_score", "baseline")}
    try:
        groups: dict[int, list[tuple[Prompt, Sample]]] = {}
        for row, group in enumerate(table["group"]):
            groups.setdefault(group, []).append((_prompt(table, row), _sample(table, row)))
        given = {name: table[f"{rollouts.REWARD}{name}"] for name in names}
        scores = RolloutScores(
            {
                name: torch.tensor([0.0 if one is None else one for one in own], dtype=kinds["rewards"])
                for name, own in given.items()
            },
            pad([torch.tensor(one, dtype=kinds["token_score"]) for one in table["token_score"]]),
            pad([torch.tensor(one, dtype=torch.bool) for one in table["segment_end"]]),
            torch.tensor(table["baseline"], dtype=kinds["baseline"]) if "baseline" in table else None,
            {name: torch.tensor([one is not None for one in own]) for name, own in given.items() if None in own},
        )
    except KeyError as error:
        raise DataError(f"{path}: it has no column {error}, from which a step is computed again") from error
    except (TypeError, ValueError, IndexError, OverflowError, RuntimeError, AttributeError) as error:
        raise DataError(
            f"{path}: a value of a column is missing or of a wrong type ({first_line(error)}); restore the file"
        ) from error
    if not groups:
        raise DataError(f"{path}: it has no answers; restore the file")
    return [Group(answers[0][0], tuple(one for _, one in answers)) for answers in groups.values()], scores


def _prompt(table: dict[str, list[Any]], row: int) -> Prompt:
    message = {"role": "user", "content": table["prompt"][row]}
    return Prompt(table["prompt_id"][row], tuple(table["prompt_ids"][row]), (message,))


def _sample(table: dict[str, list[Any]], row: int) -> Sample:
    support = table["support"][row] if "support" in table else None
    return Sample(
        table["draw"][row], table["answer"][row], tuple(table["completion_ids"][row]), tuple(table["sampler_logp"][row]),
        table["version"][row], table["finish"][row], table["completion"][row],
        None if support is None else tuple(tuple(one) for one in support), tuple(table["token_version"][row]),
        tuple(Segment(*one) for one in zip(table["authors"][row], table["segment_lengths"][row], strict=True)),
    )  # fmt: skip
