"""Answers ahead of the learner: a bounded buffer of groups, continued under newer weights, and who drives the engines meanwhile."""

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
from whet.loops.source import PromptQueue
from whet.loops.staleness import chosen, lead
from whet.methods.options import Sampling


@dataclass
class Pending:
    """A group that was handed out and not yet consumed: when (in steps), to whom, and its answers so far.

    An answer is None before its first token. `ended` is the running number at which the group became complete.
    """

    draw: int
    prompt: Prompt
    begun: int
    lane: int
    answers: list[Sample | None]
    ended: int | None = None

    def left(self) -> int:
        """Answers that are not at their end."""
        return sum(one is None or one.finish == "paused" for one in self.answers)


class Buffer:
    """What is handed out, to which lane, and how far it is. Knows no clock and no thread.

    At most `wanted + lead x prompts` groups are out at a time, `wanted` being what the loop waits for right now: so nothing
    is begun that could not be consumed within the bound (the rules are in `loops.staleness`, their simulator in `planning.schedule`).
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
        """Hand out what the bound allows, each group to the lane with the fewest answers to make."""
        ahead = min(lead(self.staleness), self.steps - 1 - self.step) * self.prompts
        load = [sum(one.left() for one in self.pending if one.lane == lane) for lane in range(self.lanes)]
        for draw, prompt in self.queue.take(max(0, self.wanted + ahead - len(self.pending))):
            lane = load.index(min(load))
            self.pending.append(Pending(draw, prompt, self.step, lane, [None] * self.answers))
            load[lane] += self.answers

    def requests(self, lane: int, slots: int, most: int) -> list[Request]:
        """What a lane works on: its first `slots` unfinished answers, for `most` tokens each."""
        out = []
        for one in self.pending:
            for number, answer in enumerate(one.answers if one.lane == lane else ()):
                if answer is None or answer.finish == "paused":
                    begun = () if answer is None else answer.ids
                    out.append(Request(one.prompt, one.draw, number, self.sampling, self.seed, begun, most))
        return out[:slots]

    def add(self, samples: Sequence[Sample]) -> None:
        """New tokens of answers; a group whose answers are all at their end is complete."""
        by_draw = {one.draw: one for one in self.pending}
        for sample in samples:
            one = by_draw[sample.draw]
            before = one.answers[sample.answer]
            one.answers[sample.answer] = sample if before is None else before.continued(sample)
        for draw in dict.fromkeys(sample.draw for sample in samples):
            if by_draw[draw].ended is None and not by_draw[draw].left():
                by_draw[draw].ended, self.ended = self.ended, self.ended + 1

    def ready(self) -> list[Group] | None:
        """The wanted groups, which leave the buffer; None as long as one has to be waited for."""
        found = chosen(self.pending, self.step, self.wanted, self.staleness, self.prompts)
        if found is None:
            return None
        gone = {one.draw for one in found}
        self.pending = [one for one in self.pending if one.draw not in gone]
        self.wanted = 0
        return [Group(one.prompt, tuple(answer for answer in one.answers if answer is not None)) for one in found]

    def state(self) -> list[dict[str, Any]]:
        """All that is pending, as JSON."""
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
        """What `state` gave; the answers go on where they were, on lanes that are dealt anew."""
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
    """Who lets the lanes work while the loop does something else."""

    def start(self, buffer: Buffer, lanes: Sequence[Generator], slots: int, segment: int) -> None:
        """From now on the lanes answer what the buffer hands out."""

    def groups(self) -> list[Group]:
        """The wanted groups, once they are there. Raises what a lane raised."""

    def still(self, work: Callable[[], Any]) -> Any:
        """The result of `work` while no lane generates: for new weights and for scores."""

    def frozen(self, work: Callable[[], Any]) -> Any:
        """The result of `work` while the buffer does not change."""

    def close(self) -> None:
        """The lanes stop."""


@dataclass
class Threads:
    """Each lane in a thread of its own, one segment after the other."""

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
        except BaseException as error:  # told to the loop, which is elsewhere
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
        """See `Driver.still`. Each lane ends its segment first."""
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
    """Generators that answer ahead of the loop, as one Generator, and the source of the loop's groups."""

    def __init__(self, lanes: Sequence[Generator], buffer: Buffer, driver: Driver, *, slots: int, segment: int) -> None:
        self.lanes, self.buffer, self.driver = list(lanes), buffer, driver
        self.slots, self.segment = slots, segment
        self.reports = frozenset.intersection(*(lane.reports for lane in lanes))
        self.version = lanes[0].version
        self._turn = 0
        self._published: dict[int, int] = {}  # the first step that each version answered for
        self._started = False

    def groups(self, step: int, count: int) -> list[Group]:
        """`count` groups for this step, none older than the bound."""
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
        """How many steps old the weights of each token's are. Raises RunStopped where one is over the bound."""
        versions = [one for group in groups for sample in group.samples for one in sample.token_versions()]
        unknown = set(versions) - self._published.keys()
        if unknown:
            raise RunStopped(
                f"step {step}: an answer has tokens of weights of version {min(unknown)}, which is not known"
            )
        ages = [step - self._published[version] for version in versions]
        if max(ages, default=0) > self.buffer.staleness:
            raise RunStopped(
                f"step {step}: an answer has tokens of weights that are {max(ages)} steps old (bound {self.buffer.staleness})"
            )
        return ages

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """Answers right now, between the segments of the lanes."""
        yield from self.driver.still(lambda: list(self.lanes[0].generate(requests)))

    def load_weights(self, weights: Weights) -> None:
        """All lanes take them between two segments; unfinished answers go on under them."""

        self.driver.still(lambda: run_parallel([partial(lane.load_weights, weights) for lane in self.lanes]))
        self.version = next((one.version for one in self.lanes if one.version != weights.version), weights.version)
        self._published[self.version] = self._turn
        self._turn += 1

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """The scores of the first lane."""
        return self.all_logprobs(ids)[0]

    def all_logprobs(self, ids: Sequence[Tensor]) -> list[list[Tensor]]:
        """The scores of every lane."""
        found = self.driver.still(lambda: run_parallel([partial(all_logprobs, lane, ids) for lane in self.lanes]))
        return [one for several in found for one in several]

    def state(self) -> dict[str, Any]:
        """The buffer and which step each version was for, as JSON; with it the number of prompts handed out."""
        return self.driver.frozen(
            lambda: {
                "drawn": self.buffer.queue.drawn,
                "buffer": self.buffer.state(),
                "published": [[version, step] for version, step in self._published.items() if step >= self._oldest()],
            }
        )

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Go on where `state` was taken, before step `step`."""
        self._turn, self.buffer.queue.drawn = step, saved["drawn"]
        self._published = dict(saved.get("published", []))
        self.buffer.restore(saved.get("buffer", []))

    def _oldest(self) -> int:
        return self._turn - 1 - self.buffer.staleness

    def sleep(self) -> None:
        """The lanes go on."""

    def close(self) -> None:
        """The lanes stop after their segments."""
        self.driver.close()
