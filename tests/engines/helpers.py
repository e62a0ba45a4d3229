"""Tiny models that vLLM's CPU kernels take, pushes that go wrong on purpose, and transformers as the judge."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from generate.contract import END
from models import helpers as h
from torch import Tensor

from whet.data import Sample
from whet.generate import Request
from whet.generate.draws import truncated_logprobs
from whet.methods.options import Sampling
from whet.models.roles import Role

SHAPE: dict[str, Any] = {"hidden_size": 64, "head_dim": 32, "max_position_embeddings": 512}
"""vLLM's CPU attention wants heads of 32 at least, and its cache has blocks of 128 tokens."""
LENGTH = 400
LONG = tuple(torch.randint(6, 27, (300,), generator=torch.Generator().manual_seed(9)).tolist())
"""A prompt over more than two cache blocks."""


def role(kind: str, seed: int) -> Role:
    """A policy in float32."""
    return h.policy(kind, seed=seed, dtype=torch.float32, **SHAPE)


def folder(path: Path, kind: str, seed: int) -> Path:
    """Its folder, without a tokenizer: vLLM sees token ids alone."""
    tiny.causal_lm(kind, seed=seed, **SHAPE).save_pretrained(path)
    return path


def text(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def options(**changes: Any) -> dict[str, Any]:
    return {"max_model_len": LENGTH, "kv_cache_mib": 64} | changes


def asked(sampling: Sampling = Sampling(6), count: int = 4) -> list[Request]:
    """Answers to a short prompt and to one that is longer than a cache block."""
    prompts = [h.prompt(0, (2, 3, 4)), h.prompt(1, LONG)]
    return [
        Request(prompt, draw, answer, sampling, 7) for draw, prompt in enumerate(prompts) for answer in range(count)
    ]


def logps(model: Any, ids: Sequence[int], sampling: Sampling | None = None) -> Tensor:
    """Log-probs (S - 1,) of all but the first token by transformers."""
    whole = torch.tensor(ids)
    logits = h.full_logits(model, whole)[:-1]
    logp = logits.log_softmax(-1) if sampling is None else truncated_logprobs(logits, sampling)
    return logp.gather(-1, whole[1:, None])[:, 0]


def score_gap(generator: Any, model: Any) -> float:
    """Largest difference of the engine's scores to transformers."""
    sequences = [torch.tensor(LONG), torch.tensor(LONG[:7]), torch.tensor(LONG[40:170])]
    pairs = zip(generator.logprobs(sequences), sequences, strict=True)
    return max(float((got - logps(model, ids.tolist())).abs().max()) for got, ids in pairs)


def sampling_gap(samples: Sequence[Sample], requests: Sequence[Request], model: Any) -> float:
    """Largest difference of the log-probs sampled with to transformers, under the request's own options."""
    worst = 0.0
    for sample, request in zip(samples, requests, strict=True):
        whole = logps(model, request.prompt.ids + request.begun + sample.ids, request.sampling)
        worst = max(worst, float((torch.tensor(sample.sampler_logp) - whole[-len(sample.ids) :]).abs().max()))
    return worst


def runs(pid: int) -> bool:
    """The process is there, and not only as the record that its parent has not asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def plain(samples: Sequence[Sample]) -> list[tuple]:
    """All of them but the version."""
    return [(s.draw, s.answer, s.ids, s.sampler_logp, s.finish, s.text) for s in samples]


class Handle:
    """Weights that are not quite a role's: `change` sees its named tensors."""

    def __init__(
        self, of: Role, change: Callable[[Iterator[tuple[str, Tensor]]], Iterator[tuple[str, Tensor]]]
    ) -> None:
        self.of, self.change = of, change

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        return self.change(self.of.whole())


def missing(pairs: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return (pair for pair in pairs if not pair[0].endswith("layers.1.mlp.up_proj.weight"))


def unknown(pairs: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    yield from pairs
    yield "model.layers.9.mlp.up_proj.weight", torch.zeros(2)


def twice(pairs: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for pair in pairs:
        yield pair
        if pair[0].endswith("layers.1.mlp.up_proj.weight"):
            yield pair


def reshaped(pairs: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in pairs:
        yield name, tensor.T if name.endswith("layers.1.mlp.up_proj.weight") else tensor


def stops(after: int) -> Callable[[Iterator[tuple[str, Tensor]]], Iterator[tuple[str, Tensor]]]:
    """Weights whose source fails after that many tensors."""

    def change(pairs: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for number, pair in enumerate(pairs):
            if number == after:
                raise OSError("the disk is gone")
            yield pair

    return change


__all__ = ["END", "LENGTH", "LONG", "SHAPE"]
