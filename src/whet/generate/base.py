"""The Generator protocol for single-turn answers, its requests, the table of generators, and a scripted one for tests."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from whet.data import Chat, Prompt, Sample, Weights
from whet.errors import ModelError, RecipeError
from whet.extras import require
from whet.methods.options import Sampling
from whet.models.roles import Role
from whet.registry import Registry, called


@dataclass(frozen=True)
class Request:
    """A request for one answer. Its random numbers are addressed by (seed, draw, answer, position).

    `begun` holds the tokens that the answer already has. The answer continues after them, and the sample holds only the
    new tokens. At most `most` new tokens are generated now (0: no such limit). An answer that has then neither ended nor
    reached its limit has the finish "paused". `sampling.max_new_tokens` limits the whole answer.
    """

    prompt: Prompt
    draw: int
    answer: int
    sampling: Sampling
    seed: int
    begun: tuple[int, ...] = ()
    most: int = 0

    def given(self) -> tuple[int, ...]:
        """Return the tokens before the first new one: the prompt and the answer so far."""
        return self.prompt.ids + self.begun

    @property
    def room(self) -> int:
        """The largest number of new tokens that may be generated now."""
        left = self.sampling.max_new_tokens - len(self.begun)
        return min(left, self.most) if self.most else left

    def finish(self, ids: Sequence[int], end_ids: Sequence[int]) -> str:
        """Return the finish of the answer after these new tokens: "stop", "length" or "paused"."""
        if ids and ids[-1] in end_ids:
            return "stop"
        return "length" if len(self.begun) + len(ids) >= self.sampling.max_new_tokens else "paused"


class Generator(Protocol):
    """Generate answers to prompts. `generate` yields the samples in the order of the requests.

    `reports` names what the samples hold besides ids and text: "sampler_logp", and "support" if the generator knows which
    tokens could be drawn under top-p, top-k and min-p. A generator whose engine died raises WorkerDied.
    """

    reports: frozenset[str]

    @property
    def version(self) -> int:
        """The version of the loaded weights; 0 before the first `load_weights`."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """Yield one sample per request, in order. The same requests with the same weights give the same samples."""

    def load_weights(self, weights: Weights) -> None:
        """Load all of these weights, or raise. Caches that were computed with the old weights are dropped."""

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Return log-probs (S - 1,) of each given sequence under the loaded weights, at temperature 1. Used to verify that
        generator and learner have the same weights."""

    def sleep(self) -> None:
        """Allow the generator to release memory; no answers are requested before the next weight update."""

    def close(self) -> None:
        """End the generator and the engines that it started."""


@runtime_checkable
class Several(Protocol):
    """Additional method of a generator that has several engines."""

    def all_logprobs(self, ids: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the result of `logprobs` for every engine."""


def cut(requests: Sequence[Request], size: int) -> list[list[int]]:
    """Split the requests into units of at most `size` and return their indices. Requests of similar length share a unit."""
    turn = sorted(range(len(requests)), key=lambda place: (len(requests[place].given()), place))
    return [turn[start : start + size] for start in range(0, len(turn), size)]


def all_logprobs(generator: Generator, ids: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the result of `logprobs` for every engine of a generator, so that an engine with old weights is found."""
    return generator.all_logprobs(ids) if isinstance(generator, Several) else [generator.logprobs(ids)]


def whole(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight with its Hugging Face name, from the policy role or from a folder of safetensors files.

    Raises ModelError if the folder has no such files.
    """
    assert weights.handle is not None
    if not isinstance(weights.handle, Path):
        yield from weights.handle.whole()
        return
    from safetensors import safe_open

    for file in weight_files(weights.handle):
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, sorted. Raises ModelError if it has none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: no *.safetensors files in it")
    return files


def require_vllm() -> None:
    """Raise RecipeError if vLLM is not installed."""
    require("generator.name: vllm", "vllm")


@dataclass(frozen=True)
class Training:
    """The facts of a training run that a generator's options are checked against.

    workers, rank   number of learner processes, each with a generator, and the number of this one
    engines         generators in processes of their own on a Ray cluster; None without a cluster
    colocate        these share the learners' GPUs
    max_staleness   above 0, answers are generated while the learner trains
    sharded         no learner process has all weights
    """

    workers: int = 1
    rank: int = 0
    engines: int | None = None
    colocate: bool = False
    max_staleness: int = 0
    sharded: bool = False

    @property
    def copies(self) -> bool:
        """Whether the generator needs its own copy of the weights."""
        return self.sharded or self.max_staleness > 0 or bool(self.engines)


@dataclass(frozen=True)
class GeneratorContext:
    """What a generator's options are checked against and a generator is built from.

    chat            conversation format of the model's tokenizer
    model           the model's folder or hub name
    dtype, device   what the model computes in, and where, such as "float32" and "cpu"
    longest         longest sequence, in tokens
    max_num_seqs    answers generated together
    sampling        how tokens are drawn
    quantized       the base of the model has 4-bit weights
    lora_rank       rank of the adapters of the model; None without adapters
    role            loads a frozen copy of the model
    policy          the learner's role, if the learner is in this process
    training        facts of the training run; None for sampling and evaluation
    trust_remote_code  code that comes with the model may run
    number, gpus    number of the engine among those of this process, and its GPUs, if they were chosen already
    """

    chat: Chat
    model: str
    dtype: str
    device: torch.device
    sampling: Sampling
    longest: int = 0
    max_num_seqs: int = 256
    quantized: bool = False
    lora_rank: int | None = None
    role: Callable[[], Role] | None = None
    policy: Role | None = None
    training: Training | None = None
    number: int = 0
    gpus: tuple[int, ...] | None = None
    trust_remote_code: bool = False

    def refuse_quantized(self) -> None:
        """Raise RecipeError for a 4-bit base, which cannot be copied to a generator."""
        if self.quantized:
            raise RecipeError(
                "model.quantize: a 4-bit base cannot be copied to another generator; push the adapter only "
                "(--generator vllm --generator.push adapter), or leave quantize at none"
            )

    def refuse_truncation(self, name: str) -> None:
        """Raise RecipeError for training with top-p, top-k, min-p or min_new_tokens, for a generator that does not report the support."""
        if self.training is not None and self.sampling.truncates:
            raise RecipeError(
                f"sampling: a {name} engine does not say which tokens could be drawn, so ratios would be wrong; leave "
                "top_p, top_k, min_p and min_new_tokens out, or use generator.name local"
            )


GENERATORS = Registry(
    "generators",
    {
        "local": "whet.generate.local", "vllm": "whet.generate.vllm.adapter", "server": "whet.generate.vllm.server",
        "openai": "whet.generate.openai",
    },
    Generator,
)  # fmt: skip
"""The generators by name. They are checked against and made from a `GeneratorContext`.

A module may also have `engines(options, context)`, the numbers of the engines that this process starts in processes of their
own and restarts if they die, and `gpus(options)`, the number of GPUs of each.
"""


class CheckedGenerator:
    """A user's generator as a `Generator`: name the file and line if it raises, and check the samples that it returns.

    Raises RecipeError, also if it does not return one `Sample` per request in their order, with one log-prob per token if it
    reports them.
    """

    def __init__(self, own: Generator) -> None:
        self.own, self.name = own, f"generator {type(own).__name__}"
        self.reports = frozenset(getattr(own, "reports", ()))

    @property
    def version(self) -> int:
        """The version of the loaded weights; 0 if the generator has none."""
        return int(getattr(self.own, "version", 0))

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """See `Generator.generate`."""
        samples = self._call(lambda: list(self.own.generate(requests)), self.own.generate)
        wrong = next((one for one in samples if not isinstance(one, Sample)), None)
        if wrong is not None:
            raise RecipeError(f"{self.name}: generate must yield whet.Sample objects, got {type(wrong).__name__}")
        for request, one in zip(requests, samples, strict=False):
            self._check_sample(one, request)
        if "sampler_logp" in self.reports:
            short = next((one for one in samples if len(one.sampler_logp) != len(one.ids)), None)
            if short is not None:
                raise RecipeError(
                    f"{self.name}: a sample has {len(short.ids)} tokens and {len(short.sampler_logp)} log-probs"
                )
        wanted, got = ([(one.draw, one.answer) for one in each] for each in (requests, samples))
        if got != wanted:
            raise RecipeError(
                f"{self.name} must return one sample per request, in their order, with the draw and answer of the request: "
                f"{wanted[:3]} ...; got {len(got)} of {len(wanted)}: {got[:3]} ..."
            )
        yield from samples

    def _check_sample(self, one: Sample, request: Request) -> None:
        """Raise RecipeError for a sample that no loop can use."""
        said = None
        if not isinstance(one.ids, tuple) or not all(type(token) is int for token in one.ids):
            said = f"ids must be a tuple of int, got {one.ids!r:.60}"
        elif not one.ids and "sampler_logp" in self.reports:
            said = "an answer has no tokens"
        elif len(one.ids) > request.room:
            said = f"an answer has {len(one.ids)} tokens, the request allows {request.room}"
        elif one.finish not in ("stop", "length", "paused"):
            said = f"finish must be stop, length or paused, got {one.finish!r}"
        elif one.versions is None and one.version != self.version:
            said = f"a sample has version {one.version}, but the loaded weights have version {self.version}"
        if said is not None:
            raise RecipeError(f"{self.name}: {said}")

    def load_weights(self, weights: Weights) -> None:
        """See `Generator.load_weights`."""
        self._call(lambda: self.own.load_weights(weights), self.own.load_weights)

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """See `Generator.logprobs`."""
        return self._checked(self._call(lambda: self.own.logprobs(ids), self.own.logprobs), ids)

    def all_logprobs(self, ids: Sequence[Tensor]) -> list[list[Tensor]]:
        """See `Several.all_logprobs`."""
        found = self._call(lambda: all_logprobs(self.own, ids), self.own.logprobs)
        return [self._checked(each, ids) for each in found]

    def _checked(self, found: Any, ids: Sequence[Tensor]) -> list[Tensor]:
        """Raise RecipeError unless these are log-probs (S - 1,) of each sequence."""
        right = isinstance(found, (list, tuple)) and len(found) == len(ids)
        if not right or any(
            tuple(getattr(one, "shape", ())) != (len(own) - 1,) for one, own in zip(found, ids, strict=True)
        ):
            raise RecipeError(
                f"{self.name}: logprobs must return one tensor (S - 1,) per sequence, because training checks with them that the "
                f"generator has the new weights; got {found!r:.80}"
            )
        return list(found)

    def sleep(self) -> None:
        """See `Generator.sleep`."""
        self._call(self.own.sleep, self.own.sleep)

    def close(self) -> None:
        """See `Generator.close`."""
        self._call(self.own.close, self.own.close)

    def _call(self, function: Callable[[], Any], own: Any) -> Any:
        return called(function, self.name, raises=RecipeError, own=own)


class ScriptedGenerator:
    """A generator whose answers come from a function, for tests of loops.

    `script(prompt, answer)` returns the ids of the answer. The finish is "stop" unless they reach the limit.
    """

    reports = frozenset({"sampler_logp"})

    def __init__(
        self, script: Callable[[Prompt, int], Sequence[int]], text: Callable[[Sequence[int]], str] = str
    ) -> None:
        self.script, self.text, self.version = script, text, 0

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """Yield the scripted answers; each token has log-prob 0."""
        for request in requests:
            full = list(self.script(request.prompt, request.answer))[len(request.begun) :]
            ids = tuple(full[: request.room])
            finish = "stop" if len(ids) == len(full) else request.finish(ids, ())
            text = self.text((*request.begun, *ids))
            yield Sample(request.draw, request.answer, ids, (0.0,) * len(ids), self.version, finish, text)

    def load_weights(self, weights: Weights) -> None:
        """Set the version only."""
        self.version = weights.version

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Return log-prob 0 for each token."""
        return [torch.zeros(len(one) - 1) for one in ids]

    def sleep(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
