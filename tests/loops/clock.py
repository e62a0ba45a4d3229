"""Lanes on a virtual clock: real answers of real weights, made as fast as the clock says. It drives `loops.ahead.Ahead`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from whet.data import Group
from whet.generate import Generator
from whet.loops.ahead import Buffer


@dataclass
class VirtualClock:
    """Every lane makes one segment of tokens for each of its slots in `token_seconds` a token.

    The learner takes `learn_seconds` between its groups and its next weights, which pause the lanes for `push_seconds`.
    """

    token_seconds: float
    learn_seconds: float
    push_seconds: float
    time: float = 0.0
    owed: float | None = None
    """the learner's time that has not passed yet; None while groups are waited for"""
    collected: list[float] = field(default_factory=list)
    """when each step had its groups"""

    def start(self, buffer: Buffer, lanes: Sequence[Generator], slots: int, segment: int) -> None:
        self.buffer, self.lanes, self.slots, self.segment = buffer, lanes, slots, segment
        self.free = [0.0] * len(lanes)  # until when each lane is busy
        self.made: list[Any] = [None] * len(lanes)  # what it then has

    def groups(self) -> list[Group]:
        for _ in range(5000):
            if (found := self.buffer.ready()) is not None:
                break
            self._run(self._next())
        else:
            raise AssertionError("answers never end")
        self.collected.append(self.time)
        self.owed = self.learn_seconds
        return found

    def still(self, work: Callable[[], Any]) -> Any:
        if self.owed is not None:
            self._run(self.time + self.owed)
            self.owed = None
            self.time += self.push_seconds
            self.free = [one + self.push_seconds for one in self.free]
        return work()

    def frozen(self, work: Callable[[], Any]) -> Any:
        return work()

    def close(self) -> None:
        pass

    def _next(self) -> float:
        self._begin()
        busy = [one for one, made in zip(self.free, self.made, strict=True) if made is not None]
        assert busy, "all lanes are idle, and groups are waited for"
        return min(busy)

    def _begin(self) -> None:
        """Idle lanes take what there is to do; the tokens are made at once, and are there when the clock says so."""
        self.buffer.admit()
        for number, lane in enumerate(self.lanes):
            if self.made[number] is None:
                asked = self.buffer.requests(number, self.slots, self.segment)
                if asked:
                    self.made[number] = list(lane.generate(asked))
                    longest = max(len(one.ids) for one in self.made[number])
                    self.free[number] = self.time + longest * self.token_seconds

    def _run(self, to: float) -> None:
        while (now := self._upcoming()) <= to:
            self.time = now
            for number in range(len(self.lanes)):
                if self.made[number] is not None and self.free[number] <= now:
                    self.buffer.add(self.made[number])
                    self.made[number] = None
        self.time = max(self.time, to)

    def _upcoming(self) -> float:
        self._begin()
        return min((f for f, made in zip(self.free, self.made, strict=True) if made is not None), default=float("inf"))
