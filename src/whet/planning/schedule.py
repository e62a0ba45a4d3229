"""Simulation of engines and learner on a virtual clock: waiting times, and staleness of the training data.

It has three parts, which can be used separately. `Window` says which groups are started and which a step takes (no clock).
`Engines` decode (a clock, no steps). `Schedule` runs the loop with both. Times are in seconds, lengths in tokens; steps and
draws count from 0.
"""

import hashlib
import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from whet.errors import RecipeError
from whet.loops.staleness import chosen, lead

Length = Callable[[int, int], int]
"""Function (draw, answer) -> number of tokens of this answer."""


@dataclass
class Handed:
    """A group that was started and not yet taken. `begun` is a step; `ended` a time, None while it is incomplete."""

    draw: int
    begun: int
    ended: float | None = None


class Window:
    """The groups that were started, and the rule for which of them a step takes (see `chosen`).

    While the groups of step s are collected, at most (s + 1 + lead) x prompts groups have been started, in order of draw.
    max_staleness 0 is a synchronous run. With `steps` the run has that many steps, and groups that no step would take are
    not started.

    >>> window = Window(prompts=2, max_staleness=2)
    >>> window.hand_out(0)
    range(0, 4)
    >>> for time, draw in enumerate([3, 0, 1, 2]):
    ...     window.complete(draw, float(time))
    >>> window.take(0)
    (0, 3)
    """

    def __init__(self, prompts: int, max_staleness: int = 0, *, steps: int | None = None) -> None:
        for name, value, least in (("rollout.prompts_per_step", prompts, 1), ("max_staleness", max_staleness, 0)):
            if value < least:
                raise RecipeError(f"{name}: at least {least}; got {value}")
        self.prompts, self.max_staleness, self.steps, self.handed = prompts, max_staleness, steps, 0
        self.open: dict[int, Handed] = {}
        """draw -> the group, ascending"""
        self._asked: tuple[int, int] | None = (
            None  # (step, number of complete groups) of the last `take` without result
        )
        self._complete = 0

    def hand_out(self, step: int) -> range:
        """Start groups at the beginning of this step's collection, and return their draws. Groups that no step of the run
        would take are not started."""
        first, ahead = self.handed, step + 1 + lead(self.max_staleness)
        self.handed = (ahead if self.steps is None else min(ahead, self.steps)) * self.prompts
        self.open.update({draw: Handed(draw, step) for draw in range(first, self.handed)})
        return range(first, self.handed)

    def complete(self, draw: int, time: float) -> None:
        """Mark the group of a draw as complete. Raises ValueError if it was not started, was taken, or is complete already."""
        if draw not in self.open or self.open[draw].ended is not None:
            raise ValueError(f"draw {draw} is not pending")
        self.open[draw].ended = time
        self._complete += 1

    def take(self, step: int) -> tuple[int, ...] | None:
        """Return the draws of this step, ascending, or None if some of them are not complete yet."""
        if self._asked == (step, self._complete):
            return None
        found = chosen(list(self.open.values()), step, self.prompts, self.max_staleness, self.prompts)
        if found is None:
            self._asked = (step, self._complete)
            return None
        for one in found:
            if step - one.begun > self.max_staleness:
                raise ValueError(f"the groups of step {one.begun} are too old in step {step}")
            del self.open[one.draw]
        return tuple(one.draw for one in found)


@dataclass(frozen=True, order=True)
class Ended:
    """The end of an answer: its time, draw, number and engine."""

    time: float
    draw: int
    answer: int
    engine: int


class _Engine:
    """One engine. `work` is the number of tokens that a slot which was always active would have decoded so far.

    An answer that starts at work w ends at work w plus its length, independent of the speed in between. `ends` is the time at
    which the next answer ends.
    """

    def __init__(self, slots: int, token_seconds: Callable[[int], float]) -> None:
        self.slots, self.token_seconds = slots, token_seconds
        self.queue: deque[tuple[int, int, int]] = deque()
        self.active: list[tuple[float, int, int]] = []
        self.time = self.work = self.slot_seconds = self.busy_seconds = 0.0
        self.ends = math.inf

    @property
    def outstanding(self) -> int:
        return len(self.queue) + len(self.active)

    def look_ahead(self) -> None:
        """Compute `ends` from the active answers."""
        self.ends = math.inf
        if self.active:
            self.ends = self.time + max(0.0, self.active[0][0] - self.work) * self.token_seconds(len(self.active))

    def decode(self, to: float) -> list[tuple[int, int]]:
        """Advance to this time, at most `ends`, and return the answers that end then. Call `look_ahead` after filling slots."""
        passed, ended = to - self.time, to >= self.ends
        self.time = to
        if not self.active:
            return []
        self.slot_seconds += passed * len(self.active)
        self.busy_seconds += passed
        if not ended:  # also if, by rounding, the work reaches the end of an answer
            self.work += passed / self.token_seconds(len(self.active))
            return []
        self.work, done = self.active[0][0], []
        while self.active and self.active[0][0] <= self.work:
            _, draw, answer = heapq.heappop(self.active)
            done.append((draw, answer))
        return done


class Engines:
    """E engines with S slots each, which decode one token per `token_seconds` in every active slot.

    `token_seconds` is a number, or a function of the number of active slots. An answer waits in its engine's queue until a
    slot is free. All answers of a group go to the engine with the fewest outstanding answers (ties: the lowest number), so
    that they share the cache of their prompt.
    """

    def __init__(self, count: int, slots: int, token_seconds: float | Callable[[int], float]) -> None:
        for name, value in (("engines", count), ("slots", slots)):
            if value < 1:
                raise RecipeError(f"{name}: at least 1; got {value}")
        speed = cache(token_seconds) if callable(token_seconds) else lambda active: token_seconds
        if not speed(1) > 0:
            raise RecipeError(f"token_seconds: above 0; got {speed(1)}")
        self.time, self.version, self.slots = 0.0, 0, slots
        self.began: dict[tuple[int, int], int] = {}
        """(draw, answer) -> version of the weights that generated its first token"""
        self._each = [_Engine(slots, speed) for _ in range(count)]
        self._ends: list[tuple[float, int]] = []  # a heap; entries that differ from their engine's `ends` are outdated

    def submit(self, draw: int, lengths: Sequence[int]) -> int:
        """Assign a group with answers of these lengths, in tokens, to an engine, and return the number of the engine."""
        if min(lengths) < 1:
            raise RecipeError(f"lengths: an answer has at least 1 token; got {min(lengths)}")
        number = min(range(len(self._each)), key=lambda one: (self._each[one].outstanding, one))
        self._each[number].queue.extend((draw, answer, length) for answer, length in enumerate(lengths))
        self._each[number].decode(self.time)
        self._start(number)
        return number

    def next_end(self) -> float:
        """Return the time at which the next answer ends; infinity if all engines are idle."""
        while self._ends and self._ends[0][0] != self._each[self._ends[0][1]].ends:
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else math.inf

    def run(self, to: float) -> list[Ended]:
        """Advance the clock to this time and return the answers that end until then, in order. Raises ValueError for infinity."""
        if math.isinf(to):
            raise ValueError("the engines are idle, so this would never end")
        ended: list[Ended] = []
        while (now := self.next_end()) <= to:
            number = heapq.heappop(self._ends)[1]
            ended += [Ended(now, draw, answer, number) for draw, answer in self._each[number].decode(now)]
            self._start(number)
        self.time = to
        return sorted(ended)

    def push(self, seconds: float) -> None:
        """Update the weights: all engines pause for `seconds`. Unfinished answers continue with the next version."""
        for one in self._each:
            one.decode(self.time)
        self.time, self.version = self.time + seconds, self.version + 1
        for number, one in enumerate(self._each):
            one.time = self.time
            self._look_ahead(number)

    def used(self) -> tuple[float, float]:
        """Return (slot-seconds, engine-seconds) in which tokens were decoded, summed over all engines."""
        for one in self._each:
            one.decode(self.time)
        return sum(one.slot_seconds for one in self._each), sum(one.busy_seconds for one in self._each)

    @property
    def count(self) -> int:
        """E: number of engines."""
        return len(self._each)

    def _start(self, number: int) -> None:
        """Fill free slots from the engine's queue."""
        one = self._each[number]
        while one.queue and len(one.active) < one.slots:
            draw, answer, length = one.queue.popleft()
            heapq.heappush(one.active, (one.work + length, draw, answer))
            self.began[draw, answer] = self.version
        self._look_ahead(number)

    def _look_ahead(self, number: int) -> None:
        """Compute the engine's `ends` and add it to the heap."""
        one = self._each[number]
        one.look_ahead()
        if one.active:
            heapq.heappush(self._ends, (one.ends, number))


@dataclass(frozen=True)
class ScheduledStep:
    """One step of the loop: times of the start and end of collection, end of learning and end of the push; draws; tokens.

    `staleness` is, per draw, the number of versions that the oldest token of the group is behind the weights that are
    trained on it.
    """

    began: float
    collected: float
    learned: float
    ended: float
    draws: tuple[int, ...]
    staleness: tuple[int, ...]
    tokens: int

    @property
    def seconds(self) -> float:
        """Seconds from the start of the collection to the end of the push."""
        return self.ended - self.began


@dataclass(frozen=True)
class Outcome:
    """The result of a simulated schedule."""

    steps: tuple[ScheduledStep, ...]
    slots_used: float
    """fraction of the slots' time in which a token was decoded"""
    engines_busy: float
    """fraction of the engines' time in which any token was decoded"""
    learner_busy: float
    """fraction of the time in which the learner worked (without pushes)"""

    @property
    def seconds(self) -> float:
        """Total time in seconds."""
        return self.steps[-1].ended

    @property
    def staleness(self) -> dict[int, int]:
        """Number of versions behind -> number of groups, ascending."""
        return dict(sorted(Counter(age for step in self.steps for age in step.staleness).items()))


class Schedule:
    """The training loop on a virtual clock. The caller repeats `collect`, `learn` and `push`.

    `length` gives the length of each answer. To compare with a real run on a virtual clock, use `Engines` with the lengths
    that the run generated, and `Window` with the completions that it saw.

    >>> schedule = Schedule(Engines(1, slots=4, token_seconds=0.5), Window(prompts=2), num_generations=2, length=lambda d, a: 10)
    >>> schedule.collect(), schedule.learn(3.0), schedule.push(1.0)
    ((0, 1), 8.0, 9.0)
    """

    def __init__(self, engines: Engines, window: Window, *, num_generations: int, length: Length) -> None:
        if num_generations < 1:
            raise RecipeError(f"num_generations: at least 1; got {num_generations}")
        self.engines, self.window, self.num_generations, self.length = engines, window, num_generations, length
        self.steps: list[ScheduledStep] = []
        self._left: dict[int, int] = {}
        self._lengths: dict[int, list[int]] = {}
        self._now = ScheduledStep(0.0, 0.0, 0.0, 0.0, (), (), 0)
        self._learned = 0.0

    @property
    def time(self) -> float:
        """The clock, in seconds."""
        return self.engines.time

    def collect(self) -> tuple[int, ...]:
        """Start the groups that this step may start, advance the clock until the step's groups are complete, return their draws."""
        step, began = len(self.steps), self.time
        for draw in self.window.hand_out(step):
            lengths = [self.length(draw, answer) for answer in range(self.num_generations)]
            self._lengths[draw], self._left[draw] = lengths, self.num_generations
            self.engines.submit(draw, lengths)
        while (draws := self.window.take(step)) is None:
            self._run(self.engines.next_end())
        first = [min(self.engines.began[draw, answer] for answer in range(self.num_generations)) for draw in draws]
        ages = tuple(self.engines.version - version for version in first)
        tokens = sum(sum(self._lengths[draw]) for draw in draws)
        self._now = ScheduledStep(began, self.time, self.time, self.time, draws, ages, tokens)
        return draws

    @property
    def tokens(self) -> int:
        """Tokens of the groups of the last collection."""
        return self._now.tokens

    def learn(self, seconds: float) -> float:
        """Let the learner work for `seconds` while the engines continue. Return the time afterwards."""
        self._run(self.time + seconds)
        self._learned += seconds
        self._now = replace(self._now, learned=self.time)
        return self.time

    def push(self, seconds: float) -> float:
        """Update the weights of the engines, which pause for `seconds`, and end the step. Return the time afterwards."""
        self.engines.push(seconds)
        self.steps.append(replace(self._now, ended=self.time))
        return self.time

    def outcome(self) -> Outcome:
        """Return the result of the steps so far."""
        slots, busy = self.engines.used()
        whole = self.engines.count * self.time
        return Outcome(tuple(self.steps), slots / (whole * self.engines.slots), busy / whole, self._learned / self.time)

    def _run(self, to: float) -> None:
        for one in self.engines.run(to):
            self._left[one.draw] -= 1
            if self._left[one.draw] == 0:
                self.window.complete(one.draw, one.time)


def simulate(
    *,
    steps: int,
    prompts: int,
    num_generations: int,
    length: Length,
    engines: int,
    slots: int,
    token_seconds: float | Callable[[int], float],
    learn_seconds: float | Callable[[int], float],
    push_seconds: float = 0.0,
    max_staleness: int = 0,
    ends: bool = True,
) -> Outcome:
    """Simulate `steps` steps. `learn_seconds` is a number, or a function of the tokens of the step.

    With `ends` the run ends after these steps, and groups that none of them takes are not started. Otherwise they are the
    first steps of a longer run.

    >>> simulate(steps=3, prompts=2, num_generations=2, length=lambda draw, answer: 10, engines=1, slots=4, token_seconds=0.5,
    ...          learn_seconds=3.0, push_seconds=1.0).seconds  # 3 x (5 + 3 + 1)
    27.0
    """
    if steps < 1:
        raise RecipeError(f"rollout.num_steps: at least 1; got {steps}")
    schedule = Schedule(
        Engines(engines, slots, token_seconds),
        Window(prompts, max_staleness, steps=steps if ends else None),
        num_generations=num_generations,
        length=length,
    )
    for _ in range(steps):
        schedule.collect()
        schedule.learn(learn_seconds(schedule.tokens) if callable(learn_seconds) else learn_seconds)
        schedule.push(push_seconds)
    return schedule.outcome()


def drawn_from(values: Sequence[int], seed: int = 0) -> Length:
    """Return lengths drawn from `values`, for example those of an earlier run, at the address (seed, draw, answer).

    >>> drawn_from([7])(3, 1)
    7
    """
    if not values:
        raise RecipeError("lengths: at least one length to draw from; got none")
    return lambda draw, answer: values[int(_uniform(seed, draw, answer) * len(values))]


def lognormal(median: float, sigma: float, longest: int, seed: int = 0) -> Length:
    """Return log-normal lengths from 1 to `longest` tokens, drawn at the address (seed, draw, answer).

    `sigma` is the standard deviation of the logarithm.
    """
    from statistics import NormalDist

    normal = NormalDist()

    def length(draw: int, answer: int) -> int:
        chance = min(max(_uniform(seed, draw, answer), 1e-12), 1 - 1e-12)
        return max(1, min(longest, round(median * math.exp(sigma * normal.inv_cdf(chance)))))

    return length


def _uniform(*parts: int) -> float:
    """Return a number in [0, 1) that depends only on its address."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big") / 2**56
