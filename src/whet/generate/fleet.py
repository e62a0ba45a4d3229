"""Several engines as one generator, with load balancing and restart of engines that died."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from torch import Tensor

from whet.data import Sample, Weights
from whet.distributed import RestartBudget
from whet.errors import AttemptFailed, ModelError, RestartsExhausted, WhetError, WorkerDied
from whet.generate.base import Generator, Request

T = TypeVar("T")


NEVER = 5
"""Deaths of an engine that has never answered, after which the run ends: a further start would not help."""
PAUSE, LONGEST = 0.5, 30.0
"""Seconds before another try to start an engine: the first pause, which doubles each time, and the longest pause."""


class Lane:
    """One engine with restarts. If it died, it is built again, gets the last loaded weights, and the call is repeated.

    If the engine cannot be started the first time, the error is raised at once. Raises RestartsExhausted when the restart
    budget `budget` is used up, and AttemptFailed if a new engine would not help.
    """

    def __init__(self, make: Callable[[], Generator], budget: RestartBudget) -> None:
        self._make, self._budget, self._first = make, budget, True
        self._failures: int | None = 0  # deaths before the first answer; None after it
        self._weights: Weights | None = None
        self.own: Generator | None = None
        self.own = self._lasting(lambda own: own)
        self.reports = self.own.reports

    @property
    def version(self) -> int:
        """The version that the engine reports; 0 without an engine."""
        return 0 if self.own is None else self.own.version

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """See `Generator.generate`."""
        samples = self._lasting(lambda own: list(own.generate(requests)))
        self._failures = None
        yield from samples

    def load_weights(self, weights: Weights) -> None:
        """See `Generator.load_weights`. Weights that failed to load are not loaded again after a restart."""
        self._lasting(lambda own: own.load_weights(weights), weights)
        self._weights = weights

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """See `Generator.logprobs`."""
        found = self._lasting(lambda own: own.logprobs(ids))
        self._failures = None
        return found

    def sleep(self) -> None:
        """See `Generator.sleep`."""
        self._lasting(lambda own: own.sleep())

    def close(self) -> None:
        """End the engine without a restart."""
        own, self.own = self.own, None
        if own is not None:
            own.close()

    def _made(self) -> Generator:
        """Start an engine. After the first one, a failure to start raises WorkerDied, like an engine that died."""
        try:
            own = self._make()
        except ModelError as error:
            if self._first:
                raise
            raise WorkerDied(f"generator: an engine could not be started again: {error}") from error
        self._first = False
        return own

    def _lasting(self, work: Callable[[Generator], T], coming: Weights | None = None) -> T:
        """Return the result of `work`, restarting the engine as often as needed.

        A new engine loads the last weights first, unless `work` itself loads weights (`coming`).
        """
        pause = 0.0
        while True:
            try:
                if self.own is None:
                    time.sleep(pause)
                    pause = min(LONGEST, 2 * pause or PAUSE)
                    self.own = self._made()
                    if self._weights is not None and coming is None:
                        self.own.load_weights(self._weights)
                return work(self.own)
            except AttemptFailed:
                raise
            except WorkerDied as error:
                with suppress(Exception):  # errors while closing a dead engine do not matter
                    self.close()
                self.own = None
                if self._first:
                    raise
                self._budget.spend(error)
                if self._failures is not None:
                    self._failures += 1
                    if self._failures >= NEVER:
                        raise RestartsExhausted(
                            f"generator: an engine died {NEVER} times and never answered; the last time: {error}"
                        ) from error


class Fleet:
    """Several engines as one `Generator`. Each engine is built by one of `makes`; all share the restart budget `budget`.

    All requests of one draw go to one engine, which reads their common prompt once. Draws with the most tokens are
    assigned first, each to the engine with the fewest tokens so far. The assignment depends only on the requests. So the
    same requests with the same number of engines give bitwise equal samples, even if an engine was restarted.

    Raises RestartsExhausted when the restart budget is used up. Other errors of an engine are raised as they are.
    """

    def __init__(self, makes: Sequence[Callable[[], Generator]], budget: RestartBudget) -> None:
        self.budget = budget
        self._threads = ThreadPoolExecutor(len(makes), "whet-fleet")
        self.lanes: list[Lane] = []
        """Each engine as a generator with restarts."""
        made, errors = self._every(makes, lambda make: Lane(make, self.budget))
        self.lanes = [lane for lane in made if lane is not None]
        if errors:
            self.close()
            raise errors[0]
        self.reports = frozenset.intersection(*(lane.reports for lane in self.lanes))
        self.version = self.lanes[0].version

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """See `Generator.generate`. The engines work in parallel."""
        shares = deal(requests, len(self.lanes))
        asked = [[requests[place] for place in share] for share in shares]
        answers = self._all(lambda number, lane: list(lane.generate(asked[number])) if asked[number] else [])
        samples: dict[int, Sample] = {}
        for share, own in zip(shares, answers, strict=True):
            samples |= zip(share, own, strict=True)
        yield from (samples[place] for place in range(len(requests)))

    def load_weights(self, weights: Weights) -> None:
        """Load the weights in every engine, or raise the error of one. If an engine then reports a different version,
        `version` is that one."""
        self._all(lambda _, lane: lane.load_weights(weights))
        self.version = next((one.version for one in self.lanes if one.version != weights.version), weights.version)

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Return the log-probs of the first engine."""
        return self.all_logprobs(ids)[0]

    def all_logprobs(self, ids: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the log-probs of every engine."""
        return self._all(lambda _, lane: lane.logprobs(ids))

    def sleep(self) -> None:
        """See `Generator.sleep`."""
        self._all(lambda _, lane: lane.sleep())

    def close(self) -> None:
        """End all engines. May be called more than once."""
        for lane in self.lanes:
            with suppress(WhetError):
                lane.close()
        self._threads.shutdown(wait=False)

    def _all(self, work: Callable[[int, Lane], T]) -> list[T]:
        out, errors = self._every(list(enumerate(self.lanes)), lambda pair: work(*pair))
        if errors:
            raise errors[0]
        return out  # type: ignore[return-value]

    def _every(self, things: Sequence[Any], work: Callable[[Any], T]) -> tuple[list[T | None], list[BaseException]]:
        """Call `work` on all objects in parallel and wait for all. Return the results (None for a failed call) and the errors."""
        futures = [self._threads.submit(work, one) for one in things]
        errors = [error for future in futures if (error := future.exception()) is not None]
        return [None if future.exception() else future.result() for future in futures], errors


def deal(requests: Sequence[Request], count: int) -> list[list[int]]:
    """Assign the requests to `count` engines and return the indices for each, ascending. Given and new tokens count equally.

    >>> from whet.methods.options import Sampling
    >>> from whet.data import Prompt
    >>> asked = [Request(Prompt("", (2,) * n, (), {}), draw, 0, Sampling(4), 0) for draw, n in enumerate((9, 2, 3))]
    >>> deal(asked, 2)
    [[0], [1, 2]]
    """
    draws: dict[int, list[int]] = {}
    for place, request in enumerate(requests):
        draws.setdefault(request.draw, []).append(place)
    cost = {
        draw: len(requests[places[0]].given()) + sum(requests[place].room for place in places)
        for draw, places in draws.items()
    }
    shares: list[list[int]] = [[] for _ in range(count)]
    load = [0] * count
    for draw in sorted(draws, key=lambda one: -cost[one]):
        lightest = load.index(min(load))
        shares[lightest] += draws[draw]
        load[lightest] += cost[draw]
    return [sorted(share) for share in shares]
