"""Decoding with a transformers model in this process: batched, with a cache if it is right, and removal of finished rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whet.data import Sample, Weights
from whet.errors import RunStopped
from whet.generate.base import GeneratorContext, Request, cut, draw, whole
from whet.methods.options import Sampling
from whet.models.decode import decoder
from whet.models.probe import probe
from whet.models.roles import Role
from whet.ops import log_softmax, token_logprobs

DROP_SHARE = 0.25
"""Finished rows are removed from the batch when they are at least this share of its rows."""


class LocalGenerator:
    """Sample from a policy role. The requests are split into units of at most `unit`, so that tensor shapes depend only on
    the requests.

    A token of `end_ids` ends an answer and is part of it. Each prompt is read once, whatever its number of answers. With
    `copy` the generator owns its role, and published weights are copied into it; otherwise it uses the learner's role.
    Before the first answers the role's cache is tried (see `whet.models.probe`); a model whose cache is wrong decodes without.
    Ids that no token has are never sampled.
    """

    reports = frozenset({"sampler_logp", "support"})

    def __init__(
        self,
        role: Role,
        end_ids: Sequence[int],
        text: Callable[[Sequence[int]], str],
        *,
        unit: int = 256,
        copy: bool = False,
    ) -> None:
        self.role, self.end_ids, self.text, self.unit, self.copy = role, tuple(end_ids), text, unit, copy
        self.version = 0

    def load_weights(self, weights: Weights) -> None:
        """Take the learner's policy role, or copy the weights into the own role. No cache is kept between calls.

        Raises RunStopped if the published weights are not those of the whole model.
        """
        if not self.copy:
            assert isinstance(weights.handle, Role)
            self.role, self.version = weights.handle, weights.version
            return
        left = dict(self.role.model.named_parameters())
        with torch.no_grad():
            for name, value in whole(weights):
                parameter = left.pop(name, None)
                if parameter is None or parameter.shape != value.shape:
                    raise RunStopped(
                        f"the weight update of version {weights.version} has no {name} of this shape; is it another model?"
                    )
                parameter.copy_(value)
        if left:
            raise RunStopped(f"the weight update of version {weights.version} lacks {', '.join(sorted(left)[:3])}")
        self.version = weights.version

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """See `Generator.generate`. Within a call, requests of similar prompt length share a unit."""
        samples: list[Sample | None] = [None] * len(requests)
        self._prove([request.given() for request in requests])
        with self.role.sampling():
            for places in cut(requests, self.unit):
                for place, sample in zip(places, self._unit([requests[place] for place in places]), strict=True):
                    samples[place] = sample
        yield from (sample for sample in samples if sample is not None)

    @torch.no_grad()
    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """See `Generator.logprobs`. Each sequence goes through the same forward with a cache that sampling uses."""
        self._prove([one.tolist() for one in ids])
        out = []
        with self.role.sampling():
            for one in ids:
                logits = decoder(self.role).every(one[:-1])
                out.append(token_logprobs(logits, one[1:].to(logits.device)).cpu())
        return out

    def _prove(self, rows: Sequence[Sequence[int]]) -> None:
        """Try decoding on the first of these rows, once per role, before the first answer."""
        if rows and self.role.paths.cache is None:
            probe(self.role, [torch.tensor(row) for row in rows], cached=True)

    def sleep(self) -> None:
        """Do nothing: the weights belong to the learner, or are kept for the next answers."""

    def close(self) -> None:
        """Do nothing."""

    def _unit(self, requests: Sequence[Request]) -> list[Sample]:
        prompts = list(dict.fromkeys(request.given() for request in requests))
        own = decoder(self.role)
        logits = own.first(prompts)
        number = {prompt: row for row, prompt in enumerate(prompts)}
        owner = torch.tensor([number[request.given()] for request in requests])
        live = list(range(len(requests)))  # the request index of each row of the batch
        logits = logits[owner.to(logits.device)]
        own.keep(owner)
        tokens: list[list[int]] = [[] for _ in requests]
        logps: list[list[float]] = [[] for _ in requests]
        supports: list[list[tuple[int, ...]]] = [[] for _ in requests]
        ended = [False] * len(requests)
        limit = max(request.room for request in requests)
        for position in range(limit):
            chosen, logp, support = _choose(logits, [requests[index] for index in live], position)
            for index, token, value, could in zip(live, chosen.tolist(), logp.tolist(), support, strict=True):
                if not ended[index]:
                    tokens[index].append(token)
                    logps[index].append(value)
                    supports[index].append(could)
                    full = len(tokens[index]) >= requests[index].room
                    ended[index] = full or token in self.end_ids
            left = [row for row, index in enumerate(live) if not ended[index]]
            if not left:
                break
            if len(live) - len(left) >= DROP_SHARE * len(live):
                own.keep(torch.tensor(left))
                live, chosen = [live[row] for row in left], chosen[torch.tensor(left, device=chosen.device)]
            logits = own.next(chosen)
        return [
            Sample(
                request.draw, request.answer, tuple(ids_), tuple(logp_), self.version,
                request.finish(ids_, self.end_ids), self.text((*request.begun, *ids_)),
                tuple(support_) if request.sampling.truncates and request.sampling.temperature > 0 else None,
            )
            for request, ids_, logp_, support_ in zip(requests, tokens, logps, supports, strict=True)
        ]  # fmt: skip


def _choose(logits: Tensor, requests: Sequence[Request], position: int) -> tuple[Tensor, Tensor, list[tuple[int, ...]]]:
    """Sample one token per row. Return (token, its log-prob in the sampling distribution, support), each per row.

    The support is the tokens that could be drawn if the options exclude some, otherwise (). Rows with the same options are
    processed together.
    """
    options = {request.sampling for request in requests}
    token = torch.zeros(len(requests), dtype=torch.long, device=logits.device)
    logp = torch.zeros(len(requests), dtype=logits.dtype, device=logits.device)
    support: list[tuple[int, ...]] = [()] * len(requests)
    for sampling in options:
        rows = [row for row, request in enumerate(requests) if request.sampling == sampling]
        index = torch.tensor(rows, device=logits.device)
        if sampling.temperature == 0:
            token[index] = logits[index].argmax(-1)
            continue
        processed = truncated_logprobs(logits[index], sampling)
        chosen = draw(processed.exp(), [requests[row] for row in rows], position)
        token[index], logp[index] = chosen, processed.gather(-1, chosen[:, None])[:, 0]
        if sampling.truncates:
            for row, kept in zip(rows, ~processed.isneginf(), strict=True):
                support[row] = tuple(kept.nonzero()[:, 0].tolist())
    return token, logp, support


def truncated_logprobs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return log-probs (B, V) of the sampling distribution: temperature, then top-k, top-p, min-p.

    top-p keeps the smallest set of most probable tokens whose total probability reaches it. min-p keeps tokens with at
    least that fraction of the largest probability. Excluded tokens get -inf; the others are normalized again.
    """
    logp = log_softmax(logits / sampling.temperature)
    if not sampling.truncates:
        return logp
    ordered, index = torch.sort(logp, dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_k:
        keep[:, sampling.top_k :] = False
    if sampling.top_p < 1:
        p = torch.where(keep, ordered.exp(), torch.zeros_like(ordered))
        p = p / p.sum(-1, keepdim=True)
        keep &= p.cumsum(-1) - p < sampling.top_p
    if sampling.min_p:
        keep &= ordered >= ordered[:, :1] + torch.tensor(sampling.min_p).log()
    kept = torch.zeros_like(keep).scatter(-1, index, keep)
    return log_softmax(logp.masked_fill(~kept, -torch.inf))


@dataclass(frozen=True)
class Options:
    """The generator of transformers has no options."""


def check(options: Options, context: GeneratorContext) -> None:
    """Raise RecipeError for a 4-bit model of which a copy would be needed."""
    if context.training is not None and context.training.copies:
        context.refuse_quantized()


def make(options: Options, context: GeneratorContext) -> LocalGenerator:
    """Build a generator on the learner's policy, or on a copy if its weights are sharded or it generates during updates."""
    training, role = context.training, context.policy
    copies = role is None or (training is not None and training.copies)
    if copies:
        assert context.role is not None
        role = context.role()
    assert role is not None
    return LocalGenerator(
        role, context.chat.end_ids, context.chat.text, unit=context.max_num_seqs, copy=copies and training is not None
    )
