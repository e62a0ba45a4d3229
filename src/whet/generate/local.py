"""Decoding with a transformers model in this process: batched, with a cache if it is right. Finished rows make room for others."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from whet.data import Sample, Weights
from whet.errors import RunStopped
from whet.generate.base import GeneratorContext, Request, whole
from whet.generate.draws import Draws
from whet.models.decode import Decoder, decoder
from whet.models.direct import Direct
from whet.models.probe import probe
from whet.models.roles import Role
from whet.ops import token_logprobs

ROOM = 16
"""Waiting prompts enter when this part of all rows is free, if their answers fit; reading one prompt at a time would be slow."""


class LocalGenerator:
    """Sample from a policy role, at most `unit` answers at a time. Tensor shapes depend only on the requests and the weights.

    A token of `end_ids` ends an answer and is part of it. Each prompt is read once, whatever its number of answers (more than
    `unit` are read in parts). Waiting requests take the rows of finished ones. With `copy` the generator owns its role, and
    published weights are copied into it; otherwise it uses the learner's role. Before the first answers the ways to decode are
    tried (see `whet.models.probe`); `decoder` may leave out the fastest ("cached") or all but the slowest ("recomputed"). Ids that
    no token has are never sampled.
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
        decoder: str = "auto",
    ) -> None:
        self.role, self.end_ids, self.text, self.unit, self.copy = role, tuple(end_ids), text, unit, copy
        self.decoder, self.version = decoder, 0

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
        """See `Generator.generate`. The answers are yielded when all are finished."""
        if not requests:
            return
        self._prove([request.given() for request in requests])
        with self.role.sampling():
            samples = self._answers(requests)
        yield from samples

    @torch.no_grad()
    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """See `Generator.logprobs`. Each sequence goes through the same forward with a cache that sampling uses."""
        self._prove([one.tolist() for one in ids])
        out = []
        with self.role.sampling():
            for one in ids:
                logits = decoder(self.role, self.decoder).every(one[:-1])
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

    def _answers(self, requests: Sequence[Request]) -> list[Sample]:
        """Generate all answers. The answers to one prompt enter together, shorter prompts first, as soon as there is room."""
        draws = Draws(requests, self.end_ids, self.role.device, self.role.name)
        waiting = _groups(requests, self.unit)
        own = decoder(self.role, self.decoder)
        plain = not isinstance(own, Direct)  # a model's modules may keep tensors for later forwards
        with torch.no_grad() if plain else torch.inference_mode():
            return self._run(own, draws, waiting)

    def _run(self, own: Decoder, draws: Draws, waiting: list[list[int]]) -> list[Sample]:
        """Generate the answers to the groups of requests that wait. Return all, in the order of the requests."""
        logits = self._enter(own, draws, waiting)
        while True:
            tokens, ended = draws.step(logits)
            gone = int(ended.sum())
            if gone and gone >= own.drop * len(ended):
                rows = _left(ended)
                draws.keep(rows)
                tokens = tokens[rows.to(tokens.device)]
                own.keep(rows)
            left = len(draws.live) if gone < len(ended) else 0
            if not left and not waiting:
                return draws.samples(self.text, self.version)
            logits = own.next(tokens) if left else logits[:0]
            if waiting and (not left or (own.refills and self._fits(len(draws.live), waiting))):
                logits = torch.cat([logits, self._enter(own, draws, waiting)])

    def _enter(self, own: Decoder, draws: Draws, waiting: list[list[int]]) -> Tensor:
        """Let waiting groups enter as long as they fit. Return the logits of their rows, (B, V)."""
        free, entered = self.unit - len(draws.live), list[list[int]]()
        while waiting and len(waiting[0]) <= free:
            free -= len(waiting[0])
            entered.append(waiting.pop(0))
        draws.enter([number for group in entered for number in group])
        owner = torch.tensor([place for place, group in enumerate(entered) for _ in group])
        return own.enter([draws.requests[group[0]].given() for group in entered], owner)

    def _fits(self, live: int, waiting: Sequence[Sequence[int]]) -> bool:
        least = min(self.unit // ROOM, sum(map(len, waiting)))
        return self.unit - live >= max(least, len(waiting[0]))


def _groups(requests: Sequence[Request], unit: int) -> list[list[int]]:
    """Return the numbers of the requests by prompt, at most `unit` together, shorter prompts first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(request.given(), []).append(number)
    ordered = sorted(groups.values(), key=lambda group: (len(requests[group[0]].given()), group[0]))
    return [group[start : start + unit] for group in ordered for start in range(0, len(group), unit)]


def _left(ended: Tensor) -> Tensor:
    """Return the rows that go on: the last ones take the places of those that ended, so that few rows move.

    >>> _left(torch.tensor([False, True, False, False]))
    tensor([0, 3, 2])
    """
    gone = ended.tolist()
    rows = [row for row, over in enumerate(gone) if not over]
    spare = rows[::-1]
    kept = len(rows)
    return torch.tensor([spare.pop(0) if gone[row] else row for row in range(kept)], dtype=torch.long)


@dataclass(frozen=True)
class Options:
    """Options of the generator in this process."""

    decoder: Literal["auto", "cached", "recomputed"] = "auto"
    """how answers are decoded: "auto" is the fastest right way, "cached" transformers' cache, "recomputed" no cache (slow)"""

    may_change = ("decoder",)
    """Options that a resumed run may change."""


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
        role, context.chat.end_ids, context.chat.text, unit=context.max_num_seqs, copy=copies and training is not None,
        decoder=options.decoder,
    )  # fmt: skip
