"""Asynchronous generation: a bounded buffer of groups, and a driver that runs the engines while the learner trains.

A lane is one generator that works independently of the others. It generates answers in segments of a few tokens.
Weights change only between segments, and an unfinished answer continues under the new weights.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from whet.data import Group, Prompt, Sample, Segment, Weights
from whet.distributed import run_parallel
from whet.errors import RunStopped
from whet.generate import Generator, Request
from whet.generate.base import all_logprobs
from whet.generate.fleet import Fleet
from whet.loops.source import GroupSource, PromptQueue, SynchronousSource
from whet.loops.staleness import chosen, lead
from whet.loops.steps import OnlinePlan
from whet.methods import Algorithm
from whet.methods.options import Sampling


@dataclass
class Pending:
    """A group that was handed out and is not consumed yet: the step at which it began, its lane, and its answers so far.

    An answer is None before its first token. `ended` numbers complete groups in the order of completion.
    """

    draw: int
    prompt: Prompt
    begun: int
    lane: int
    answers: list[Sample | None]
    ended: int | None = None

    def left(self) -> int:
        """Return the number of unfinished answers."""
        return sum(one is None or one.finish == "paused" for one in self.answers)


class Buffer:
    """Keep track of the groups that were handed out, their lanes and their progress. Use no clock and no threads.

    New groups are handed out while fewer than `wanted + lead x prompts` are pending. `wanted` is the number of groups that
    the loop waits for now. So every group can be consumed within the staleness bound. The rules are in `loops.staleness`;
    `planning.schedule` simulates them.
    """

    def __init__(
        self,
        queue: PromptQueue,
        answers: int,
        sampling: Sampling,
        seed: int,
        *,
        steps: int,
        prompts: int,
        staleness: int,
        lanes: int = 1,
    ) -> None:
        self.queue, self.answers, self.sampling, self.seed = queue, answers, sampling, seed
        self.steps, self.prompts, self.staleness, self.lanes = steps, prompts, staleness, lanes
        self.pending: list[Pending] = []
        self.step, self.wanted, self.ended = 0, 0, 0

    def admit(self) -> None:
        """Hand out as many groups as the bound allows, each to the lane with the fewest unfinished answers."""
        ahead = min(lead(self.staleness), self.steps - 1 - self.step) * self.prompts
        load = [sum(one.left() for one in self.pending if one.lane == lane) for lane in range(self.lanes)]
        for draw, prompt in self.queue.take(max(0, self.wanted + ahead - len(self.pending))):
            lane = load.index(min(load))
            self.pending.append(Pending(draw, prompt, self.step, lane, [None] * self.answers))
            load[lane] += self.answers

    def requests(self, lane: int, slots: int, most: int) -> list[Request]:
        """Return requests for the first `slots` unfinished answers of a lane, with at most `most` new tokens each."""
        out = []
        for one in self.pending:
            for number, answer in enumerate(one.answers if one.lane == lane else ()):
                if answer is None or answer.finish == "paused":
                    begun = () if answer is None else answer.ids
                    out.append(Request(one.prompt, one.draw, number, self.sampling, self.seed, begun, most))
        return out[:slots]

    def add(self, samples: Sequence[Sample]) -> None:
        """Append new tokens to answers. A group is complete when all its answers are finished."""
        by_draw = {one.draw: one for one in self.pending}
        for sample in samples:
            one = by_draw[sample.draw]
            before = one.answers[sample.answer]
            one.answers[sample.answer] = sample if before is None else before.continued(sample)
        for draw in dict.fromkeys(sample.draw for sample in samples):
            if by_draw[draw].ended is None and not by_draw[draw].left():
                by_draw[draw].ended, self.ended = self.ended, self.ended + 1

    def ready(self) -> list[Group] | None:
        """Remove the wanted groups from the buffer and return them; return None if one of them is not complete yet."""
        found = chosen(self.pending, self.step, self.wanted, self.staleness, self.prompts)
        if found is None:
            return None
        gone = {one.draw for one in found}
        self.pending = [one for one in self.pending if one.draw not in gone]
        self.wanted = 0
        return [Group(one.prompt, tuple(answer for answer in one.answers if answer is not None)) for one in found]

    def state(self) -> list[dict[str, Any]]:
        """Return all pending groups as JSON values."""
        return [
            {
                "draw": one.draw,
                "begun": one.begun,
                "ended": one.ended,
                "answers": [None if answer is None else _plain(answer) for answer in one.answers],
            }
            for one in self.pending
        ]

    def restore(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Restore the result of `state`. Unfinished answers are continued; groups are assigned to lanes again."""
        for number, one in enumerate(saved):
            answers = [None if answer is None else _sample(answer) for answer in one["answers"]]
            lane = number % self.lanes
            prompt = self.queue.prompt(one["draw"])
            self.pending.append(Pending(one["draw"], prompt, one["begun"], lane, answers, one["ended"]))
            self.ended = max(self.ended, (one["ended"] or 0) + 1)


def _plain(sample: Sample) -> dict[str, Any]:
    own = {name: getattr(sample, name) for name in Sample.__dataclass_fields__}
    return own | {"segments": [[one.author, one.length] for one in sample.segments]}


def _sample(saved: Mapping[str, Any]) -> Sample:
    support = saved["support"]
    return Sample(
        saved["draw"], saved["answer"], tuple(saved["ids"]), tuple(saved["sampler_logp"]), saved["version"],
        saved["finish"], saved["text"], None if support is None else tuple(map(tuple, support)),
        None if saved["versions"] is None else tuple(saved["versions"]),
        tuple(Segment(author, length) for author, length in saved.get("segments", [])),
    )  # fmt: skip


class Driver(Protocol):
    """Run the lanes while the loop does other work."""

    def start(self, buffer: Buffer, lanes: Sequence[Generator], slots: int, segment: int) -> None:
        """Start the lanes; they generate answers for the groups that the buffer hands out."""

    def groups(self) -> list[Group]:
        """Wait for the wanted groups and return them. Raise the error of a lane if one failed."""

    def still(self, work: Callable[[], Any]) -> Any:
        """Return the result of `work`, called while no lane generates (to load weights or to score sequences)."""

    def frozen(self, work: Callable[[], Any]) -> Any:
        """Return the result of `work`, called while the buffer does not change."""

    def close(self) -> None:
        """Stop the lanes."""


@dataclass
class Threads:
    """Run each lane in its own thread, one segment after another."""

    change: threading.Condition = field(default_factory=threading.Condition)
    locks: list[threading.Lock] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)
    error: BaseException | None = None
    over: bool = False

    def start(self, buffer: Buffer, lanes: Sequence[Generator], slots: int, segment: int) -> None:
        """See `Driver.start`."""
        self.buffer, self.slots, self.segment = buffer, slots, segment
        self.locks = [threading.Lock() for _ in lanes]
        self.threads = [
            threading.Thread(target=self._run, args=(number, one), daemon=True) for number, one in enumerate(lanes)
        ]
        for thread in self.threads:
            thread.start()

    def _run(self, number: int, lane: Generator) -> None:
        try:
            while True:
                with self.change:
                    self.buffer.admit()
                    asked = self.buffer.requests(number, self.slots, self.segment)
                    if self.over:
                        return
                    if not asked:
                        self.change.wait(1.0)
                        continue
                with self.locks[number]:
                    samples = list(lane.generate(asked))
                with self.change:
                    self.buffer.add(samples)
                    self.change.notify_all()
        except BaseException as error:  # `groups` raises it in the thread of the loop
            with self.change:
                self.error = error
                self.change.notify_all()

    def groups(self) -> list[Group]:
        """See `Driver.groups`."""
        with self.change:
            self.change.notify_all()
            while (found := self.buffer.ready()) is None:
                if self.error is not None:
                    raise self.error
                self.change.wait(1.0)
            self.change.notify_all()
            return found

    def still(self, work: Callable[[], Any]) -> Any:
        """See `Driver.still`. Each lane first finishes its current segment."""
        with ExitStack() as stack:
            for lock in self.locks:
                stack.enter_context(lock)
            return work()

    def frozen(self, work: Callable[[], Any]) -> Any:
        """See `Driver.frozen`."""
        with self.change:
            return work()

    def close(self) -> None:
        """See `Driver.close`."""
        with self.change:
            self.over = True
            self.change.notify_all()
        for thread in self.threads:
            thread.join()


class AsynchronousSource:
    """A `GroupSource` whose lanes generate ahead of the loop, and a `Generator` that combines these lanes."""

    def __init__(self, lanes: Sequence[Generator], buffer: Buffer, driver: Driver, *, slots: int, segment: int) -> None:
        self.lanes, self.buffer, self.driver = list(lanes), buffer, driver
        self.slots, self.segment = slots, segment
        self.reports = frozenset.intersection(*(lane.reports for lane in lanes))
        self.version = lanes[0].version
        self._turn = 0
        self._published: dict[int, int] = {}  # version -> first step with these weights
        self._started = False

    def groups(self, step: int, count: int) -> list[Group]:
        """Return `count` groups for this step; none began more than `max_staleness` steps earlier."""
        buffer = self.buffer
        if not self._started:
            buffer.step, buffer.wanted, self._started = step, count, True
            self.driver.start(buffer, self.lanes, self.slots, self.segment)
        else:
            self.driver.frozen(lambda: self._want(step, count))
        return self.driver.groups()

    def _want(self, step: int, count: int) -> None:
        self.buffer.step, self.buffer.wanted = step, count

    def staleness(self, step: int, groups: Sequence[Group]) -> list[int]:
        """Return the age in steps of the weights that produced each token.

        Raise RunStopped if an age is over the bound or a version is unknown.
        """
        versions = [one for group in groups for sample in group.samples for one in sample.token_versions()]
        unknown = set(versions) - self._published.keys()
        if unknown:
            raise RunStopped(
                f"step {step + 1}: an answer has tokens of weights of version {min(unknown)}, which is unknown"
            )
        ages = [step - self._published[version] for version in versions]
        if max(ages, default=0) > self.buffer.staleness:
            raise RunStopped(
                f"step {step + 1}: an answer has tokens of weights that are {max(ages)} steps old (bound {self.buffer.staleness})"
            )
        return ages

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """Answer the requests now with the first lane, while no lane generates a segment."""
        yield from self.driver.still(lambda: list(self.lanes[0].generate(requests)))

    def load_weights(self, weights: Weights) -> None:
        """Load the weights on all lanes between two segments. Unfinished answers continue under the new weights."""

        self.driver.still(lambda: run_parallel([partial(lane.load_weights, weights) for lane in self.lanes]))
        self.version = next((one.version for one in self.lanes if one.version != weights.version), weights.version)
        self._published[self.version] = self._turn
        self._turn += 1

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Return the log-probs of the first engine."""
        return self.all_logprobs(ids)[0]

    def all_logprobs(self, ids: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the log-probs of every engine of every lane."""
        found = self.driver.still(lambda: run_parallel([partial(all_logprobs, lane, ids) for lane in self.lanes]))
        return [one for several in found for one in several]

    def state(self) -> dict[str, Any]:
        """Return the number of prompts handed out, the buffer, and the first step of each version, as JSON values."""
        return self.driver.frozen(
            lambda: {
                "drawn": self.buffer.queue.drawn,
                "buffer": self.buffer.state(),
                "published": [[version, step] for version, step in self._published.items() if step >= self._oldest()],
            }
        )

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Restore the result of `state`, to continue with step `step`."""
        self._turn, self.buffer.queue.drawn = step, saved["drawn"]
        self._published = dict(saved.get("published", []))
        self.buffer.restore(saved.get("buffer", []))

    def _oldest(self) -> int:
        return self._turn - 1 - self.buffer.staleness

    def sleep(self) -> None:
        """Do nothing: the lanes continue to generate."""

    def close(self) -> None:
        """Stop the lanes after their current segments."""
        self.driver.close()


def source_of(
    algorithm: Algorithm,
    generator: Generator,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    plan: OnlinePlan,
    driver: Driver | None,
) -> GroupSource:
    """Return the source of the groups: synchronous, or asynchronous with `max_staleness` or a driver."""
    most = plan.prompts * plan.steps * (1 + algorithm.collect.dynamic_sampling)
    queue, answers = PromptQueue(prompts, most, plan.seed), algorithm.collect.num_generations
    if not plan.max_staleness and driver is None:
        return SynchronousSource(generator, queue, answers, sampling, plan.seed)
    lanes: Sequence[Generator] = generator.lanes if isinstance(generator, Fleet) else [generator]
    buffer = Buffer(
        queue, answers, sampling, plan.seed, steps=plan.steps, prompts=plan.prompts, staleness=plan.max_staleness,
        lanes=len(lanes),
    )  # fmt: skip
    return AsynchronousSource(lanes, buffer, driver or Threads(), slots=plan.slots, segment=plan.segment)
