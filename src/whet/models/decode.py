"""Logits of the next token of several sequences, which grow token by token: with a cache of our own, with that of transformers, or by
forwards over all tokens."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from whet.models.direct import Direct
from whet.models.load import cache_argument
from whet.models.roles import Role
from whet.models.structure import structure
from whet.ops.head import precise


class Decoder(Protocol):
    """Sequences of one model. The role must be in its `sampling` context. Tensors of tokens and rows are (B,) int64.

    `refills` says whether rows may enter while others are under way. Finished rows are worth removing when they are at least the
    share `drop` of all rows.
    """

    refills: bool
    drop: float

    def enter(self, prompts: Sequence[Sequence[int]], owner: Tensor) -> Tensor:
        """Append a row for each entry of `owner`, the number of its prompt. Return the logits of the new rows' next tokens,
        (len(owner), V)."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order. A row may be taken several times."""

    def next(self, tokens: Tensor) -> Tensor:
        """Append a token to each sequence. Return the logits (B, V) of the one after it."""

    def every(self, ids: Tensor) -> Tensor:
        """Return the logits (S, V) after each id of one sequence (S,), by the forward that `enter` uses."""


def decoder(role: Role, kind: str = "auto") -> Decoder:
    """Return a decoder of a role in its `sampling` context, by what is right for it (see `whet.models.probe`).

    "auto" is the fastest one: `Direct`, else `Cached`, else `Recomputed`. "cached" leaves out `Direct`; "recomputed" is the last.
    """
    if kind == "auto" and role.paths.decode and (parts := structure(role)) is not None:
        return Direct(role, parts)
    return Recomputed(role) if kind == "recomputed" or role.paths.cache is False else Cached(role)


class Cached:
    """Decode with transformers' cache. Prompts are padded on the left, and the mask and the positions say so."""

    refills, drop = False, 0.25

    def __init__(self, role: Role) -> None:
        self.role = role
        self.cache: Any = None
        self.argument = cache_argument(role.model.base_model if role.linear_head else role.model)
        self.mask = torch.zeros(0, 0, dtype=torch.long)
        self.padded = False

    def enter(self, prompts: Sequence[Sequence[int]], owner: Tensor) -> Tensor:
        """See `Decoder.enter`. No other rows may be under way."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.role.model.config)
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        self.mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            self.mask[row, longest - len(prompt) :] = 1
        self.padded = not bool(self.mask.all())
        logits = self._forward(ids, (self.mask.cumsum(1) - 1).clamp(min=0))
        self.keep(owner)
        return _precise(self.role, logits)[owner.to(logits.device)]

    def keep(self, rows: Tensor) -> None:
        """See `Decoder.keep`."""
        self.mask = self.mask[rows]
        self.cache.reorder_cache(rows.to(self.role.device))

    def next(self, tokens: Tensor) -> Tensor:
        """See `Decoder.next`."""
        self.mask = torch.cat([self.mask, torch.ones(len(tokens), 1, dtype=self.mask.dtype)], 1)
        return _precise(self.role, self._forward(tokens[:, None].cpu(), self.mask.sum(1, keepdim=True) - 1))

    def every(self, ids: Tensor) -> Tensor:
        """See `Decoder.every`."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.role.model.config)
        self.mask, self.padded = torch.ones(1, len(ids), dtype=torch.long), False
        return _precise(self.role, self._forward(ids[None], torch.arange(len(ids))[None], every=True))

    def _forward(self, ids: Tensor, positions: Tensor, *, every: bool = False) -> Tensor:
        """Return the logits after the last id of each row, (B, V), or after each id of the only row, (S, V)."""
        device, model = self.role.device, self.role.model
        given: dict[str, Any] = {
            "input_ids": ids.to(device), "position_ids": positions.to(device), self.argument: self.cache, "use_cache": True,
        }  # fmt: skip
        if self.padded:
            given["attention_mask"] = self.mask.to(device)
        states = model.base_model(**given).last_hidden_state if self.role.linear_head else model(**given).logits
        states = states[0] if every else states[:, -1]
        return model.get_output_embeddings()(states) if self.role.linear_head else states


class Recomputed:
    """Decode without a cache: a forward over all tokens for each new one. Rows are padded on the right, where a causal model
    does not see it, or run one by one if padding disturbs the model."""

    refills, drop = True, 0.0

    def __init__(self, role: Role) -> None:
        self.role = role
        self.rows: list[list[int]] = []

    def enter(self, prompts: Sequence[Sequence[int]], owner: Tensor) -> Tensor:
        """See `Decoder.enter`."""
        self.rows += [list(prompts[number]) for number in owner.tolist()]
        return self._forward([list(prompt) for prompt in prompts])[owner.to(self.role.device)]

    def keep(self, rows: Tensor) -> None:
        """See `Decoder.keep`."""
        self.rows = [list(self.rows[row]) for row in rows.tolist()]

    def next(self, tokens: Tensor) -> Tensor:
        """See `Decoder.next`."""
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        return self._forward(self.rows)

    def _forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        if self.role.paths.padding is False:
            return torch.cat([self._last([row]) for row in rows])
        return self._last(rows)

    def every(self, ids: Tensor) -> Tensor:
        """See `Decoder.every`."""
        return _precise(self.role, self.role.logits(ids[None].to(self.role.device))[0])

    def _last(self, rows: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, rows))
        ids = torch.tensor([[*row] + [row[-1]] * (longest - len(row)) for row in rows]).to(self.role.device)
        at = torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])
        if not self.role.linear_head:
            return _precise(self.role, self.role.logits(ids)[at])
        return _precise(self.role, self.role.model.get_output_embeddings()(self.role.hidden(ids)[at]))


def _precise(role: Role, logits: Tensor) -> Tensor:
    """Return logits in float32 or float64, with -inf for the ids that no token has."""
    return role.close(precise(logits))
