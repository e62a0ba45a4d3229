"""Draw tokens for many answers at once, and keep them as tensors until the answers are finished."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from whet.data import Sample
from whet.errors import RunStopped
from whet.generate.base import Request
from whet.methods.options import Sampling
from whet.ops import address, addressed_uniform, inverse, log_softmax

AHEAD = 64
"""Positions for which random numbers are computed at once."""
EXTRA = 64
"""Columns by which the table of tokens grows, at least."""


class Draws:
    """The answers to requests. `live` has the number of the request of each row of the batch, on the device of the model.

    Random numbers are addressed by (seed, draw, answer, position), whatever the batch. Tokens, log-probs and ends stay tensors.
    """

    def __init__(self, requests: Sequence[Request], end_ids: Sequence[int], device: torch.device, owner: str) -> None:
        self.requests, self.end_ids, self.owner = requests, tuple(end_ids), owner

        def column(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        self.places = [
            column([one.seed & (1 << 63) - 1 for one in requests]), column([one.draw for one in requests]),
            column([one.answer for one in requests]),
        ]  # fmt: skip
        self.begun = column([len(one.begun) for one in requests])
        self.room = column([one.room for one in requests])
        self.ends = column(sorted(self.end_ids))
        self.least = column([one.sampling.min_new_tokens for one in requests]) - self.begun
        self.closes = bool((self.least > 0).any()) and len(self.ends) > 0
        self.options = list(dict.fromkeys(one.sampling for one in requests))
        self.kind = column([self.options.index(one.sampling) for one in requests])
        self.count = torch.zeros_like(self.room)
        self.ids = torch.zeros(len(requests), 0, dtype=torch.long, device=device)
        self.logps = torch.zeros(len(requests), 0, device=device)
        self.supports: list[list[tuple[int, ...]]] = [[] for _ in requests]
        self.live = column([])
        self.column = AHEAD
        self.chances = torch.zeros(0, 0, dtype=torch.float64)

    def enter(self, numbers: Sequence[int]) -> None:
        """Append rows for these requests."""
        self.live = torch.cat([self.live, torch.tensor(numbers, device=self.live.device)])
        self.column = AHEAD

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order."""
        rows = rows.to(self.live.device)
        self.live, self.chances = self.live[rows], self.chances[rows]

    def step(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the next token of each row from its logits (B, V), which are overwritten. Return (tokens, ended), (B,) each.

        Rows that have ended stay so, and their further tokens count for nothing. Raises RunStopped if a row has a NaN or no finite
        largest logit.
        """
        live, count = self.live, self.count[self.live]
        if self.closes:
            self._close(logits, count < self.least[live])
        if self.column == AHEAD:
            positions = (self.begun[live] + count)[:, None] + torch.arange(AHEAD, device=live.device)
            self.chances = addressed_uniform(address("sample"), *(one[live][:, None] for one in self.places), positions)
            self.column = 0
        chance = self.chances[:, self.column]
        self.column += 1
        token, logp = self._choose(logits, chance)
        return token, self._record(token, logp, count)

    def samples(self, text: Callable[[Sequence[int]], str], version: int) -> list[Sample]:
        """Return the answers, in the order of the requests."""
        counts, ids, logps = self.count.tolist(), self.ids.cpu(), self.logps.cpu()
        out = []
        for number, (request, count) in enumerate(zip(self.requests, counts, strict=True)):
            own = tuple(ids[number, :count].tolist())
            out.append(
                Sample(
                    request.draw, request.answer, own, tuple(logps[number, :count].tolist()), version,
                    request.finish(own, self.end_ids), text((*request.begun, *own)), self._support(number, count),
                )
            )  # fmt: skip
        return out

    def _support(self, number: int, count: int) -> tuple[tuple[int, ...], ...] | None:
        """Return what could be drawn at each position of an answer (see `Sample`); None if everything could, or if it is greedy."""
        request = self.requests[number]
        if not request.sampling.truncates or request.sampling.temperature == 0:
            return None
        if request.sampling.filters:
            return tuple(self.supports[number][:count])
        closed = max(0, min(count, request.sampling.min_new_tokens - len(request.begun)))
        return (tuple(-2 - one for one in sorted(self.end_ids)),) * closed + ((),) * (count - closed)

    def _close(self, logits: Tensor, below: Tensor) -> None:
        """Give end ids probability 0 in rows below their least length."""
        if bool(below.any()):
            logits[:, self.ends] = logits[:, self.ends].masked_fill(below[:, None], -torch.inf)

    def _record(self, token: Tensor, logp: Tensor, count: Tensor) -> Tensor:
        """Append tokens to the answers that have not ended. Return which rows have ended now."""
        if int(self.ids.shape[1]) <= (longest := int(count.max())):
            more = max(EXTRA, longest // 2)
            self.ids = torch.cat([self.ids, self.ids.new_zeros(len(self.ids), more)], 1)
            self.logps = torch.cat([self.logps.to(logp.dtype), logp.new_zeros(len(self.ids), more)], 1)
        live = self.live
        going = self._going(live, count)
        self.ids[live, count] = torch.where(going, token, self.ids[live, count])
        self.logps[live, count] = torch.where(going, logp, self.logps[live, count])
        self.count[live] = count = count + going
        return ~self._going(live, count)

    def _going(self, live: Tensor, count: Tensor) -> Tensor:
        """Return which rows have neither an end id nor all their tokens."""
        last = self.ids[live, (count - 1).clamp(min=0)]
        return (count < self.room[live]) & ((count == 0) | (last[:, None] != self.ends).all(1))

    def _choose(self, logits: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
        """Return (token, its log-prob in the sampling distribution) per row. Rows with the same options are processed together."""
        if len(self.options) == 1:
            return self._alike(logits, chance, self.options[0], self.live)
        token, logp = torch.zeros_like(self.live), logits.new_zeros(len(logits))
        kinds = self.kind[self.live]
        for kind in kinds.unique().tolist():
            rows = (kinds == kind).nonzero()[:, 0]
            token[rows], logp[rows] = self._alike(logits[rows], chance[rows], self.options[kind], self.live[rows])
        return token, logp

    def _alike(self, logits: Tensor, chance: Tensor, sampling: Sampling, live: Tensor) -> tuple[Tensor, Tensor]:
        if sampling.temperature not in (0, 1):
            logits = logits.div_(sampling.temperature)
        top = logits.amax(-1, keepdim=True)
        if not bool(torch.isfinite(top).all()):
            raise RunStopped(
                f"the logits of the {self.owner} are NaN or infinite, so no token can be drawn: training diverged, or its activations "
                "overflow; load it in another dtype (--model.dtype float32 or bfloat16)"
            )
        if sampling.temperature == 0:
            return logits.argmax(-1), logits.new_zeros(len(logits))
        if sampling.filters:
            logits = _truncated(log_softmax(logits), sampling)
            for row, kept in zip(live.tolist(), ~logits.isneginf(), strict=True):
                self.supports[row].append(tuple(kept.nonzero()[:, 0].tolist()))
        else:
            logits = logits.sub_(top)
        token, total = inverse(logits.exp(), chance)
        return token, (logits.gather(-1, token[:, None])[:, 0] - total.log()).to(logits.dtype)


def truncated_logprobs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return log-probs (B, V) of the sampling distribution: temperature, then top-k, top-p, min-p.

    top-p keeps the smallest set of most probable tokens whose total probability reaches it. min-p keeps tokens with at
    least that fraction of the largest probability. Excluded tokens get -inf; the others are normalized again.
    """
    logp = log_softmax(logits / sampling.temperature)
    return _truncated(logp, sampling) if sampling.filters else logp


def _truncated(logp: Tensor, sampling: Sampling) -> Tensor:
    """Exclude tokens from the full distribution by top-k, top-p and min-p."""
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
