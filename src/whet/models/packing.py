"""Rows in one sequence without padding: their pieces, and an attention that keeps rows apart and computes a shared prompt once.

The attention is registered with transformers under `NAME` and replaces a model's "sdpa". Without packed rows it is "sdpa".
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from whet.data import Row
from whet.errors import ModelError

NAME = "whet_packed"
"""The name of the attention in transformers' tables."""
_LAYOUT = "_whet_pieces"
_CHANGES = ("softcap", "s_aux", "position_bias", "cache")
"""Arguments with which a model asks its attention for other numbers than those of a plain softmax."""


@dataclass(frozen=True)
class Pieces:
    """The pieces of one sequence. Piece i has `lengths[i]` tokens and attends to itself, and to all of piece `after[i]` before it,
    if that is not -1."""

    lengths: tuple[int, ...]
    after: tuple[int, ...]
    _masks: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict, repr=False)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest row."""
        return max(n + self._before(number) for number, n in enumerate(self.lengths))

    def positions(self) -> Tensor:
        """Return the position of each token in its row, (1, N)."""
        parts = [torch.arange(n) + self._before(number) for number, n in enumerate(self.lengths)]
        return torch.cat(parts)[None]

    def _before(self, number: int) -> int:
        return self.lengths[self.after[number]] if self.after[number] >= 0 else 0

    def mask(self, length: int, before: int, device: torch.device) -> Tensor:
        """Return which of `before` + `length` keys each of the last `length` tokens attends to, (length, before + length) bool."""
        key = (length, before, device)
        if key not in self._masks:
            self._masks[key] = torch.ones(length, before + length, dtype=torch.bool, device=device).tril(before)
        return self._masks[key]


@dataclass(frozen=True)
class Places:
    """Where the tokens of rows are in flat positions: token p of row r at `shared[r] + p` below `split[r]`, else at `own[r] + p`.

    (B,) each.
    """

    shared: Tensor
    own: Tensor
    split: Tensor

    @staticmethod
    def plain(starts: Tensor) -> "Places":
        """Return the places of rows that start at these flat positions, (B,)."""
        return Places(starts, starts, torch.zeros_like(starts))

    def at(self, row: Tensor, position: Tensor) -> Tensor:
        """Return the flat positions of these positions of these rows, (N,)."""
        return position + torch.where(position < self.split[row], self.shared[row], self.own[row])


@dataclass(frozen=True)
class Packed:
    """Rows in one sequence: their ids (1, N), their pieces, and where their tokens are."""

    ids: Tensor
    pieces: Pieces
    places: Places

    @staticmethod
    def of(rows: Sequence[Row], share: bool) -> "Packed":
        """Pack rows. With `share`, the tokens before the first response token are packed once for all rows that have the same."""
        keys = [row.ids[: row.start].numpy().tobytes() if share else b"" for row in rows]
        counts: dict[bytes, int] = {}
        for key in keys:
            counts[key] = counts.get(key, 0) + 1
        ids: list[Tensor] = []
        lengths, after, where, at = list[int](), list[int](), list[tuple[int, int, int]](), 0
        prompts: dict[bytes, tuple[int, int]] = {}
        for row, key in zip(rows, keys, strict=True):
            split = row.start if share and counts[key] > 1 else 0
            if split and key not in prompts:
                prompts[key] = (len(lengths), at)
                ids.append(row.ids[:split])
                lengths.append(split)
                after.append(-1)
                at += split
            piece, first = prompts[key] if split else (-1, at)
            where.append((first, at - split, split))
            if row.length > split:
                ids.append(row.ids[split:])
                lengths.append(row.length - split)
                after.append(piece)
                at += row.length - split
        return Packed(
            torch.cat(ids)[None], Pieces(tuple(lengths), tuple(after)), Places(*torch.tensor(where).T.contiguous())
        )


_current: ContextVar[Pieces | None] = ContextVar("pieces", default=None)
_windows: ContextVar[list[int] | None] = ContextVar("windows", default=None)


@contextmanager
def pieces_of_forward(pieces: Pieces | None) -> Iterator[None]:
    """Let forwards of models with this attention read one sequence with these pieces, within the context."""
    token = _current.set(pieces)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def local_attention() -> Iterator[list[int]]:
    """Collect the sizes of local attention (sliding windows, chunks) that packed forwards within the context ask for."""
    found: list[int] = []
    token = _windows.set(found)
    try:
        yield found
    finally:
        _windows.reset(token)


def uses(model: Any) -> bool:
    """Return whether a model has this attention."""
    return bool(model.config._attn_implementation == NAME)


def install(model: Any) -> bool:
    """Give a model this attention if it has "sdpa". Return whether it has it now."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if uses(model):
        return True
    if model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    try:
        model.set_attn_implementation(NAME)
    except Exception:  # models refuse it with errors of their own
        model.set_attn_implementation("sdpa")
    return uses(model)


def uninstall(model: Any) -> None:
    """Give a model back its "sdpa" attention."""
    if uses(model):
        model.set_attn_implementation("sdpa")


def _mask(*given: Any, **options: Any) -> Tensor | None:
    """Return an empty mask that carries the pieces to the attention; without packed rows, the mask of "sdpa"."""
    pieces = _current.get()
    if pieces is None:
        from transformers.masking_utils import sdpa_mask

        return sdpa_mask(*given, **options)
    if "allow_is_bidirectional_skip" in options or options.get("use_vmap"):
        raise ModelError("its attention is not only causal")
    local, windows = options.get("local_size"), _windows.get()
    if local and windows is not None:
        windows.append(int(local))
    if local and pieces.longest > local:
        raise ModelError(f"its attention is local, to {local} tokens, and a row has {pieces.longest}")
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=options["device"])
    setattr(mask, _LAYOUT, pieces)
    return mask


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return the attention (1, N, heads, D) of a packed sequence; query (1, heads, N, D), key and value (1, KV heads, N, D)."""
    pieces: Pieces | None = getattr(attention_mask, _LAYOUT, None)
    if pieces is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return out
    asked = [name for name in _CHANGES if options.get(name) is not None]
    if asked or options.get("dropout") or options.get("is_causal") is False or query.shape[:3:2] != key.shape[:3:2]:
        raise ModelError(
            f"its attention is not a plain causal softmax ({', '.join(asked) or 'dropout, or another mask'})"
        )
    lengths = list(pieces.lengths)
    queries, keys, values = (one.split(lengths, 2) for one in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    parts = []
    for number, before in enumerate(pieces.after):
        own_key, own_value, mask = keys[number], values[number], None
        if before >= 0:
            own_key = torch.cat([keys[before], own_key], 2)
            own_value = torch.cat([values[before], own_value], 2)
            mask = pieces.mask(lengths[number], lengths[before], query.device)
            if grouped and query.device.type != "cpu":  # with a mask, the kernels of GPUs take no grouped heads
                times = query.shape[1] // key.shape[1]
                own_key, own_value = (one.repeat_interleave(times, 1) for one in (own_key, own_value))
        parts.append(
            functional.scaled_dot_product_attention(
                queries[number], own_key, own_value, attn_mask=mask, is_causal=mask is None, scale=options.get("scaling"),
                enable_gqa=own_key.shape[1] != query.shape[1],
            )
        )  # fmt: skip
    return torch.cat(parts, 2).transpose(1, 2), None
