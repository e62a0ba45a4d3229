"""Logits of the next token of several sequences, which grow token by token: with a cache, or by forwards over all tokens."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from whet.errors import RunStopped
from whet.models.roles import Role
from whet.ops.head import precise


class Decoder(Protocol):
    """Sequences of one model. The role must be in its `sampling` context. Tensors of tokens and rows are (B,) int64."""

    def first(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Return the logits (B, V) of the token after each prompt."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order. A row may be taken several times."""

    def next(self, tokens: Tensor) -> Tensor:
        """Append a token to each sequence. Return the logits (B, V) of the one after it."""

    def every(self, ids: Tensor) -> Tensor:
        """Return the logits (S, V) after each id of one sequence (S,), by the forward that `first` uses."""


def decoder(role: Role) -> Decoder:
    """Return a decoder with a cache, or without one for a role whose cache is wrong (see `whet.models.probe`)."""
    return Recomputed(role) if role.paths.cache is False else Cached(role)


class Cached:
    """Decode with transformers' cache. Prompts are padded on the left, and the mask and the positions say so."""

    def __init__(self, role: Role) -> None:
        from transformers import DynamicCache

        self.role = role
        self.cache: Any = DynamicCache(config=role.model.config)
        self.mask = torch.zeros(0, 0, dtype=torch.long)

    def first(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `Decoder.first`."""
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        self.mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            self.mask[row, longest - len(prompt) :] = 1
        return _drawable(self.role, self._forward(ids, (self.mask.cumsum(1) - 1).clamp(min=0)))

    def keep(self, rows: Tensor) -> None:
        """See `Decoder.keep`."""
        self.mask = self.mask[rows]
        self.cache.reorder_cache(rows.to(self.role.device))

    def next(self, tokens: Tensor) -> Tensor:
        """See `Decoder.next`."""
        self.mask = torch.cat([self.mask, torch.ones(len(tokens), 1, dtype=self.mask.dtype)], 1)
        return _drawable(self.role, self._forward(tokens[:, None].cpu(), self.mask.sum(1, keepdim=True) - 1))

    def every(self, ids: Tensor) -> Tensor:
        """See `Decoder.every`."""
        self.mask = torch.ones(1, len(ids), dtype=torch.long)
        return _precise(self.role, self._forward(ids[None], torch.arange(len(ids))[None], every=True))

    def _forward(self, ids: Tensor, positions: Tensor, *, every: bool = False) -> Tensor:
        """Return the logits after the last id of each row, (B, V), or after each id of the only row, (S, V)."""
        device, model = self.role.device, self.role.model
        given: dict[str, Any] = {
            "input_ids": ids.to(device), "attention_mask": self.mask.to(device), "position_ids": positions.to(device),
            "past_key_values": self.cache, "use_cache": True,
        }  # fmt: skip
        states = model.base_model(**given).last_hidden_state if self.role.linear_head else model(**given).logits
        states = states[0] if every else states[:, -1]
        return model.get_output_embeddings()(states) if self.role.linear_head else states


class Recomputed:
    """Decode without a cache: a forward over all tokens for each new one. Rows are padded on the right, where a causal model
    does not see it, or run one by one if padding disturbs the model."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.rows: list[list[int]] = []

    def first(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `Decoder.first`."""
        self.rows = [list(prompt) for prompt in prompts]
        return self._forward()

    def keep(self, rows: Tensor) -> None:
        """See `Decoder.keep`."""
        self.rows = [list(self.rows[row]) for row in rows.tolist()]

    def next(self, tokens: Tensor) -> Tensor:
        """See `Decoder.next`."""
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        return self._forward()

    def _forward(self) -> Tensor:
        if self.role.paths.padding is False:
            return torch.cat([self._last([row]) for row in self.rows])
        return self._last(self.rows)

    def every(self, ids: Tensor) -> Tensor:
        """See `Decoder.every`."""
        return _precise(self.role, self.role.logits(ids[None].to(self.role.device))[0])

    def _last(self, rows: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, rows))
        ids = torch.tensor([[*row] + [row[-1]] * (longest - len(row)) for row in rows]).to(self.role.device)
        at = torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])
        if not self.role.linear_head:
            return _drawable(self.role, self.role.logits(ids)[at])
        return _drawable(self.role, self.role.model.get_output_embeddings()(self.role.hidden(ids)[at]))


def _precise(role: Role, logits: Tensor) -> Tensor:
    """Return logits in float32 or float64, with -inf for the ids that no token has."""
    return role.close(precise(logits))


def _drawable(role: Role, logits: Tensor) -> Tensor:
    """Return `_precise` logits (B, V). Raises RunStopped if there is a NaN or no finite largest one: no token can be drawn."""
    logits = _precise(role, logits)
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        raise RunStopped(
            f"the logits of the {role.name} are NaN or infinite, so no token can be drawn: training diverged, or its activations "
            "overflow; load it in another dtype (--model.dtype float32 or bfloat16)"
        )
    return logits
