"""Where a rollout's groups come from: prompts in their order, and answers asked for when they are needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from whet.data import Group, Prompt, order
from whet.generate import Generator, Request
from whet.methods.options import Sampling


class PromptQueue:
    """Prompts in the order in which they are handed out; `drawn` counts them, so that a refilled run resumes as well.

    `most` is how many may ever be handed out.
    """

    def __init__(self, prompts: Sequence[Prompt], most: int, seed: int) -> None:
        self.prompts, self.drawn = prompts, 0
        self.order = order([len(prompts)], most, seed)

    def prompt(self, draw: int) -> Prompt:
        """The prompt with this running number."""
        return self.prompts[self.order[draw][1]]

    def take(self, count: int) -> list[tuple[int, Prompt]]:
        """The next `count` prompts with their running numbers."""
        taken = range(self.drawn, self.drawn + count)
        self.drawn += count
        return [(draw, self.prompt(draw)) for draw in taken]


def answered(
    generator: Generator, drawn: Sequence[tuple[int, Prompt]], answers: int, sampling: Sampling, seed: int
) -> list[Group]:
    """`answers` samples for each (draw, prompt)."""
    requests = [Request(prompt, draw, answer, sampling, seed) for draw, prompt in drawn for answer in range(answers)]
    samples = list(generator.generate(requests))
    return [Group(prompt, tuple(samples[i * answers : (i + 1) * answers])) for i, (_, prompt) in enumerate(drawn)]


class GroupSource(Protocol):
    """Where a rollout's groups come from."""

    def groups(self, step: int, count: int) -> list[Group]:
        """`count` groups for this step."""

    def staleness(self, step: int, groups: Sequence[Group]) -> list[int]:
        """How many steps old the weights of each token's are."""

    def state(self) -> dict[str, Any]:
        """What is needed to go on after this step, as JSON."""

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Go on where `state` was taken, before step `step`."""

    def close(self) -> None:
        """Nothing more is generated."""


@dataclass
class SynchronousSource:
    """Groups that are asked for when they are needed, and waited for: nothing is ever old."""

    generator: Generator
    queue: PromptQueue
    answers: int
    sampling: Sampling
    seed: int

    def groups(self, step: int, count: int) -> list[Group]:
        """See `GroupSource.groups`."""
        return answered(self.generator, self.queue.take(count), self.answers, self.sampling, self.seed)

    def staleness(self, step: int, groups: Sequence[Group]) -> list[int]:
        """All of these weights."""
        return [0]

    def state(self) -> dict[str, Any]:
        """See `GroupSource.state`."""
        return {"drawn": self.queue.drawn}

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """See `GroupSource.restore`."""
        self.queue.drawn = saved["drawn"]

    def close(self) -> None:
        """See `GroupSource.close`."""
