"""The schedule of engines and learner on a virtual clock: who waits for whom, and how old what is learned from is.

Three pieces, each of use alone: `Window` says which groups are handed out and which a step takes (no clock), `Engines` decode
(a clock, no steps), `Schedule` runs the loop over both. Times are seconds, lengths tokens, steps and draws count from 0.
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
"""How many tokens answer `answer` of draw `draw` will have."""


@dataclass
class Handed:
    """A group that is out."""

    draw: int
    begun: int
    ended: float | None = None


class Window:
    """Which groups are out, and which of them a step takes (see `chosen`).

    While step s is collected at most (s + 1 + lead) x prompts groups have been handed out, in order of draw. max_staleness
    0 is the synchronous run. With `steps` the run ends there, and what no step would take is not begun.

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
            None  # the step, and how many were complete, when there was nothing to take
        )
        self._complete = 0

    def hand_out(self, step: int) -> range:
        """The draws that are handed out when the collection of this step begins; none that no step of the run would take."""
        first, ahead = self.handed, step + 1 + lead(self.max_staleness)
        self.handed = (ahead if self.steps is None else min(ahead, self.steps)) * self.prompts
        self.open.update({draw: Handed(draw, step) for draw in range(first, self.handed)})
        return range(first, self.handed)

    def complete(self, draw: int, time: float) -> None:
        """All answers of the draw have ended. Raises ValueError for one that is not out, or was told before."""
        if draw not in self.open or self.open[draw].ended is not None:
            raise ValueError(f"draw {draw} is not out")
        self.open[draw].ended = time
        self._complete += 1

    def take(self, step: int) -> tuple[int, ...] | None:
        """The draws of this step, ascending, once they are all complete; None before."""
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
    """An answer that ended: when, whose, on which engine."""

    time: float
    draw: int
    answer: int
    engine: int


class _Engine:
    """One engine. `work` counts the tokens each active slot has decoded since the beginning, so an answer ends at the work
    at which it began plus its length, whatever the speed in between. `ends` is when the next one does."""

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
        """`ends` from what is active now."""
        self.ends = math.inf
        if self.active:
            self.ends = self.time + max(0.0, self.active[0][0] - self.work) * self.token_seconds(len(self.active))

    def decode(self, to: float) -> list[tuple[int, int]]:
        """Goes on to this time, at most `ends`; the answers that end there. Call `look_ahead` when the slots are filled."""
        passed, ended = to - self.time, to >= self.ends
        self.time = to
        if not self.active:
            return []
        self.slot_seconds += passed * len(self.active)
        self.busy_seconds += passed
        if not ended:  # even where rounding brings the work up to an answer's end
            self.work += passed / self.token_seconds(len(self.active))
            return []
        self.work, done = self.active[0][0], []
        while self.active and self.active[0][0] <= self.work:
            _, draw, answer = heapq.heappop(self.active)
            done.append((draw, answer))
        return done


class Engines:
    """E engines with S slots each, decoding one token per `token_seconds` in every active slot.

    `token_seconds` is a number, or a function of the active slots where more of them are slower. An answer waits in its
    engine's queue until a slot is free. All answers of a group go to the engine with the fewest outstanding answers
    (ties: the lowest number), so that they share their prompt's cache.
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
        """(draw, answer) -> the version of the weights that made its first token"""
        self._each = [_Engine(slots, speed) for _ in range(count)]
        self._ends: list[tuple[float, int]] = []  # a heap; an entry whose time is no longer its engine's is stale

    def submit(self, draw: int, lengths: Sequence[int]) -> int:
        """The group's answers, of these lengths in tokens, are dealt to an engine, whose number is returned."""
        if min(lengths) < 1:
            raise RecipeError(f"lengths: an answer has at least 1 token; got {min(lengths)}")
        number = min(range(len(self._each)), key=lambda one: (self._each[one].outstanding, one))
        self._each[number].queue.extend((draw, answer, length) for answer, length in enumerate(lengths))
        self._each[number].decode(self.time)
        self._start(number)
        return number

    def next_end(self) -> float:
        """When the next answer ends; infinite when all engines are idle."""
        while self._ends and self._ends[0][0] != self._each[self._ends[0][1]].ends:
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else math.inf

    def run(self, to: float) -> list[Ended]:
        """The clock goes on to this time; the answers that end on the way, in order. Raises ValueError for no time at all."""
        if math.isinf(to):
            raise ValueError("the engines are idle, and would be for ever")
        ended: list[Ended] = []
        while (now := self.next_end()) <= to:
            number = heapq.heappop(self._ends)[1]
            ended += [Ended(now, draw, answer, number) for draw, answer in self._each[number].decode(now)]
            self._start(number)
        self.time = to
        return sorted(ended)

    def push(self, seconds: float) -> None:
        """New weights: nothing is decoded for so long, and what had begun goes on under the next version."""
        for one in self._each:
            one.decode(self.time)
        self.time, self.version = self.time + seconds, self.version + 1
        for number, one in enumerate(self._each):
            one.time = self.time
            self._look_ahead(number)

    def used(self) -> tuple[float, float]:
        """(slot-seconds, engine-seconds) in which tokens were decoded, over all engines."""
        for one in self._each:
            one.decode(self.time)
        return sum(one.slot_seconds for one in self._each), sum(one.busy_seconds for one in self._each)

    @property
    def count(self) -> int:
        """E."""
        return len(self._each)

    def _start(self, number: int) -> None:
        """Free slots take what waits."""
        one = self._each[number]
        while one.queue and len(one.active) < one.slots:
            draw, answer, length = one.queue.popleft()
            heapq.heappush(one.active, (one.work + length, draw, answer))
            self.began[draw, answer] = self.version
        self._look_ahead(number)

    def _look_ahead(self, number: int) -> None:
        """The engine's next end, in the heap as well."""
        one = self._each[number]
        one.look_ahead()
        if one.active:
            heapq.heappush(self._ends, (one.ends, number))


@dataclass(frozen=True)
class ScheduledStep:
    """One step of the loop: when its collection began, was complete, was learned from and pushed; what it took.

    `staleness` has, per draw, how many versions the oldest token of the group is behind the weights that learn from it.
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
        """From the beginning of its collection to the end of its push."""
        return self.ended - self.began


@dataclass(frozen=True)
class Outcome:
    """What a schedule came to."""

    steps: tuple[ScheduledStep, ...]
    slots_used: float
    """share of the slots' time in which a token was decoded"""
    engines_busy: float
    """share of the engines' time in which any token was decoded"""
    learner_busy: float
    """share of the time in which the learner learned (pushes left out)"""

    @property
    def seconds(self) -> float:
        """Total time."""
        return self.steps[-1].ended

    @property
    def staleness(self) -> dict[int, int]:
        """Versions behind -> groups, ascending."""
        return dict(sorted(Counter(age for step in self.steps for age in step.staleness).items()))


class Schedule:
    """The loop, to be driven call by call: `collect`, `learn`, `push`, and again.

    `length` says how long each answer will be. A real run on a virtual clock is compared by driving `Engines` with the
    lengths that it generated, and `Window` with the completions that it saw.

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
        """Hands out what this step may, and lets time pass until its groups are complete; their draws."""
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
        """Tokens of the groups that were collected last."""
        return self._now.tokens

    def learn(self, seconds: float) -> float:
        """The learner works for so long while the engines go on; the time then."""
        self._run(self.time + seconds)
        self._learned += seconds
        self._now = replace(self._now, learned=self.time)
        return self.time

    def push(self, seconds: float) -> float:
        """The weights go to the engines, which pause; the step is over. The time then."""
        self.engines.push(seconds)
        self.steps.append(replace(self._now, ended=self.time))
        return self.time

    def outcome(self) -> Outcome:
        """What the steps so far came to."""
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
    """The whole schedule. `learn_seconds` is a number, or a function of the step's tokens.

    The run `ends` with these steps, and nothing is begun that none of them takes; else they are the first of many.

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
    """Lengths drawn from these, such as those of an earlier run, at the address (seed, draw, answer).

    >>> drawn_from([7])(3, 1)
    7
    """
    if not values:
        raise RecipeError("lengths: at least one length to draw from; got none")
    return lambda draw, answer: values[int(_uniform(seed, draw, answer) * len(values))]


def lognormal(median: float, sigma: float, longest: int, seed: int = 0) -> Length:
    """Log-normal lengths with this median and this deviation of the logarithm, from 1 to `longest` tokens, addressed."""
    from statistics import NormalDist

    normal = NormalDist()

    def length(draw: int, answer: int) -> int:
        chance = min(max(_uniform(seed, draw, answer), 1e-12), 1 - 1e-12)
        return max(1, min(longest, round(median * math.exp(sigma * normal.inv_cdf(chance)))))

    return length


def _uniform(*parts: int) -> float:
    """A number in [0, 1) that is a function of its address alone."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big") / 2**56
