"""The Generator seam: who answers. The protocol, what it is asked, and a scripted fake."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from whet.dials import Sampling
from whet.ops import address, addressed_uniform
from whet.records import Prompt, Sample, Weights


@dataclass(frozen=True)
class Request:
    """One answer asked for. Its random numbers are addressed by (seed, draw, answer, position)."""

    prompt: Prompt
    draw: int
    answer: int
    sampling: Sampling
    seed: int


class Generator(Protocol):
    """Who answers. `generate` yields the samples in the order of the requests."""

    version: int

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """One sample per request, in order. The same requests at the same weights give the same samples."""

    def adopt(self, weights: Weights) -> None:
        """Take these weights whole, or raise; caches of the old ones are dropped."""

    def score(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Log-probs (S - 1,) of given sequences under the adopted weights, at temperature 1: the canary."""


def draw(probabilities: Tensor, requests: Sequence[Request], position: int) -> Tensor:
    """One token per row by inverting the cumulative distribution at the row's addressed uniform number.

    probabilities (B, V) -> (B,). The number depends on (seed, draw, answer, position) alone.
    """
    seeds = torch.tensor([request.seed & (1 << 63) - 1 for request in requests])
    places = [torch.tensor([getattr(request, name) for request in requests]) for name in ("draw", "answer")]
    chance = addressed_uniform(address("sample"), seeds, *places, torch.tensor(position)).to(probabilities.device)
    cumulative = probabilities.double().cumsum(-1)
    token = torch.searchsorted(cumulative, (chance * cumulative[:, -1])[:, None], right=True)[:, 0]
    # rounding must not select a token without probability at the end of the row
    last = probabilities.shape[1] - 1 - (probabilities > 0).flip(-1).int().argmax(-1)
    return torch.minimum(token, last)


class ScriptedGenerator:
    """A generator that answers from a function: the fake for tests of loops.

    `script(prompt, answer)` gives the answer's ids; they end with "stop" unless they reach the limit.
    """

    def __init__(
        self, script: Callable[[Prompt, int], Sequence[int]], text: Callable[[Sequence[int]], str] = str
    ) -> None:
        self.script, self.text, self.version = script, text, 0

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """The scripted answers, each token with log-prob 0."""
        for request in requests:
            full = list(self.script(request.prompt, request.answer))
            ids = tuple(full[: request.sampling.max_new_tokens])
            finish = "stop" if len(ids) == len(full) else "length"
            yield Sample(request.draw, request.answer, ids, (0.0,) * len(ids), self.version, finish, self.text(ids))

    def adopt(self, weights: Weights) -> None:
        """Only the version is taken."""
        self.version = weights.version

    def score(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Log-prob 0 everywhere: a script is certain."""
        return [torch.zeros(len(one) - 1) for one in ids]
