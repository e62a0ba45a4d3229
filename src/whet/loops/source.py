"""The order of the prompts, and one request per answer. A source of multi-turn answers would start here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from whet.data import Group, Prompt, order
from whet.errors import CheckpointError
from whet.generate import Generator, Request
from whet.methods.options import Sampling


class PromptQueue:
    """Hand out prompts in a fixed random order.

    `drawn` is the number of prompts handed out. It is part of a checkpoint, because dynamic sampling draws more prompts
    than the steps alone imply. `most` is the largest number of prompts that can be handed out.
    """

    def __init__(self, prompts: Sequence[Prompt], most: int, seed: int) -> None:
        self.prompts, self.drawn = prompts, 0
        self.order = order([len(prompts)], most, seed)

    def prompt(self, draw: int) -> Prompt:
        """Return the prompt with this running number."""
        return self.prompts[self.order[draw][1]]

    def take(self, count: int) -> list[tuple[int, Prompt]]:
        """Return the next `count` prompts with their running numbers."""
        taken = range(self.drawn, self.drawn + count)
        self.drawn += count
        return [(draw, self.prompt(draw)) for draw in taken]


def answered(
    generator: Generator, drawn: Sequence[tuple[int, Prompt]], answers: int, sampling: Sampling, seed: int
) -> list[Group]:
    """Generate `answers` samples for each (draw, prompt) and return one group per prompt."""
    requests = [Request(prompt, draw, answer, sampling, seed) for draw, prompt in drawn for answer in range(answers)]
    samples = list(generator.generate(requests))
    return [Group(prompt, tuple(samples[i * answers : (i + 1) * answers])) for i, (_, prompt) in enumerate(drawn)]


class GroupSource(Protocol):
    """Provide the groups of a rollout."""

    def groups(self, step: int, count: int) -> list[Group]:
        """Return `count` groups for this step."""

    def staleness(self, step: int, groups: Sequence[Group]) -> list[int]:
        """Return the ages in steps of the weights that produced the tokens."""

    def state(self) -> dict[str, Any]:
        """Return what is needed to continue after this step, as JSON values."""

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Restore the result of `state`, to continue with step `step`."""

    def close(self) -> None:
        """Stop generating."""


@dataclass
class SynchronousSource:
    """Generate the groups of each step when they are needed, and wait for them. All tokens are from the current weights."""

    generator: Generator
    queue: PromptQueue
    answers: int
    sampling: Sampling
    seed: int

    def groups(self, step: int, count: int) -> list[Group]:
        """See `GroupSource.groups`."""
        return answered(self.generator, self.queue.take(count), self.answers, self.sampling, self.seed)

    def staleness(self, step: int, groups: Sequence[Group]) -> list[int]:
        """Return [0]: all tokens are from the current weights."""
        return [0]

    def state(self) -> dict[str, Any]:
        """See `GroupSource.state`."""
        return {"drawn": self.queue.drawn}

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """See `GroupSource.restore`. Raises CheckpointError for more prompts than the run can draw."""
        if saved["drawn"] > len(self.queue.order):
            raise CheckpointError(
                f"the checkpoint has drawn {saved['drawn']} prompts, and the run draws at most {len(self.queue.order)}; restore it"
            )
        self.queue.drawn = saved["drawn"]

    def close(self) -> None:
        """See `GroupSource.close`."""
