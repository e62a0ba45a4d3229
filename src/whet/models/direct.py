"""Decoding on the weights of a standard decoder (`whet.models.structure`), with a cache that is allocated ahead.

Rows enter and leave at any time. All rows write their next token into the same slot of the cache; a row that entered later, or
has a shorter prompt, begins in a later slot.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from whet.errors import RunStopped
from whet.models.roles import Role
from whet.models.structure import Structure
from whet.ops.head import precise

SLOTS = 64
"""Slots by which a cache is allocated ahead, at least; a full one grows by half."""
SPARE = 4
"""Slots before the first row's beginning are given up when they are more than this part of all."""
TOKENS = 4096
"""Tokens of one forward over prompts, at most (or one prompt)."""

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(number of the layer, queries (N, heads, D), keys and values (N, groups, D)) -> (N, heads, D)"""


class Direct:
    """Sequences of one model, see `whet.models.decode.Decoder`. Every prompt is read once, by itself.

    The cache of a layer is (2, rows, groups, slots, D): keys and values. `starts` has the first slot of each row; `at` is the
    slot of the next token.
    """

    refills, drop = True, 0.0

    def __init__(self, role: Role, parts: Structure) -> None:
        self.role, self.parts = role, parts
        self.device = role.device
        self.cache: list[Tensor] = []
        self.starts: list[int] = []
        self.at = self.room = 0
        self.position = torch.zeros(0, dtype=torch.long, device=self.device)
        self.mask: Tensor | None = None
        self.cos = self.sin = torch.zeros(0)

    def enter(self, prompts: Sequence[Sequence[int]], owner: Tensor) -> Tensor:
        """See `Decoder.enter`."""
        before, lengths = len(self.starts), [len(prompt) for prompt in prompts]
        owners = owner.tolist()
        if not before:
            self.at = 0
        needed = max(lengths)
        if needed > self.at:
            self._move(needed - self.at)
        self.starts += [self.at - lengths[number] for number in owners]
        rows = [[before + row for row, own in enumerate(owners) if own == number] for number in range(len(prompts))]
        logits: list[Tensor] = []
        for first, last in _portions(lengths):
            states, kept = self._prompts(prompts[first:last])
            logits.append(states)
            self._put(kept, lengths[first:last], rows[first:last])
        self.position = torch.tensor([self.at - start for start in self.starts], device=self.device)
        self._masked()
        return torch.cat(logits)[owner.to(self.device)]

    def keep(self, rows: Tensor) -> None:
        """See `Decoder.keep`. Only rows that change their place are copied."""
        own = rows.tolist()
        self.starts = [self.starts[row] for row in own]
        to = [place for place, row in enumerate(own) if place != row]
        if to:
            target, source = (torch.tensor(one, device=self.device) for one in (to, [own[place] for place in to]))
            if len(own) > len(self.cache[0][0]):
                self._resize(len(own), self.room)
            for layer in self.cache:
                layer[:, target, :, : self.at] = layer[:, source, :, : self.at]
        self.position = self.position[rows.to(self.device)]
        first = min(self.starts, default=0)
        if first * SPARE > self.at:
            self._move(-first)
        self._masked()

    def next(self, tokens: Tensor) -> Tensor:
        """See `Decoder.next`."""
        if self.at == self.room:
            self._resize(len(self.starts), self.room + max(SLOTS, self.room // 2))
            self._masked()
        states = self._forward(tokens, self.position, self.at + 1, self._one)
        self.at += 1
        self.position = self.position + 1
        return self._logits(states)

    def every(self, ids: Tensor) -> Tensor:
        """See `Decoder.every`."""
        positions = torch.arange(len(ids), device=self.device)
        return self._logits(self._forward(ids.to(self.device), positions, len(ids), self._several([len(ids)], [])))

    # --- the model -----------------------------------------------------------------------------------------------------

    def _forward(self, ids: Tensor, positions: Tensor, longest: int, attend: Attention) -> Tensor:
        """Return the hidden states (N, H) of tokens (N,) at these positions below `longest`, before the last norm."""
        parts, half = self.parts, self.parts.size // 2
        heads, keyed = parts.heads, parts.heads + parts.groups
        x = parts.embed(ids)
        cos, sin = self._rotation(positions, longest, x)
        for number, layer in enumerate(parts.layers):
            y = layer.qkv(layer.norm(x)).view(len(ids), keyed + parts.groups, parts.size)
            turned = y[:, :keyed]
            if layer.q_norm is not None and layer.k_norm is not None:
                turned = torch.cat([layer.q_norm(y[:, :heads]), layer.k_norm(y[:, heads:keyed])], 1)
            other = torch.cat([turned[..., half:], turned[..., :half]], -1)
            turned = (turned * cos).addcmul_(other, sin) if other.dtype == cos.dtype else turned * cos + other * sin
            seen = attend(number, turned[:, :heads], turned[:, heads:], y[:, keyed:])
            x = x + layer.out(seen.reshape(len(ids), -1))
            gate, up = layer.gate_up(layer.mlp_norm(x))
            x = x + layer.down(layer.act(gate).mul_(up))
        return x

    def _logits(self, states: Tensor) -> Tensor:
        logits = precise(self.parts.head(self.parts.norm(states)))
        missing = self.role.missing
        return logits if missing is None else logits.index_fill_(-1, missing.to(logits.device), -torch.inf)

    def _rotation(self, positions: Tensor, longest: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin (N, 1, D) of the positions, the sign of the rotation in sin, from the model's own module."""
        if len(self.cos) < longest:
            all_of_them = torch.arange(longest + max(SLOTS, longest // 2), device=self.device)[None]
            cos, sin = self.parts.rotary(x[:1], all_of_them)
            if cos.shape[-1] != self.parts.size:
                raise RunStopped(f"the rotary embedding of the {self.role.name} does not turn whole heads")
            sin = sin.clone()
            sin[..., : self.parts.size // 2].neg_()
            self.cos, self.sin = cos[0], sin[0]
        return self.cos[positions][:, None], self.sin[positions][:, None]

    def _prompts(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[Tensor]]:
        """Return the logits (P, V) after prompts, and keys and values of their tokens, (2, N, groups, D) of each layer."""
        lengths, kept = [len(prompt) for prompt in prompts], list[Tensor]()
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        states = self._forward(ids, positions, max(lengths), self._several(lengths, kept))
        last = torch.tensor(lengths).cumsum(0) - 1
        return self._logits(states[last.to(self.device)]), kept

    # --- attention -----------------------------------------------------------------------------------------------------

    def _several(self, lengths: Sequence[int], kept: list[Tensor]) -> Attention:
        """Return the attention within sequences one after the other. Keys and values are appended to `kept`."""
        runs = _runs(lengths)

        def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kind = v.dtype
            kept.append(torch.stack([k.to(kind), v]))
            out, start = [], 0
            for count, length in runs:
                own = slice(start, start + count * length)
                own_q, own_k, own_v = (
                    one[own].to(kind).view(count, length, -1, self.parts.size).transpose(1, 2) for one in (q, k, v)
                )
                one = functional.scaled_dot_product_attention(
                    own_q, own_k, own_v, is_causal=True, scale=self.parts.scale, enable_gqa=True
                )
                out.append(one.transpose(1, 2).flatten(0, 1))
                start += count * length
            return torch.cat(out)

        return attend

    def _one(self, number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the keys and values of one new token of each row, and attend to all of the row's tokens."""
        count, groups, size, end = len(q), self.parts.groups, self.parts.size, self.at + 1
        layer = self.cache[number]
        layer[0, :count, :, self.at] = k
        layer[1, :count, :, self.at] = v
        keys, values = layer[0, :count, :, :end], layer[1, :count, :, :end]
        asked = q.reshape(count, groups, -1, size)
        mask = None if self.mask is None else self.mask[:, :, :, :end]
        if layer.device.type != "cpu" or layer.dtype not in (torch.float32, torch.float64):
            return functional.scaled_dot_product_attention(
                asked.to(layer.dtype), keys, values, attn_mask=mask, scale=self.parts.scale
            )
        shape = (count * groups, -1, size)
        asked, keys = asked.reshape(shape), keys.reshape(shape).transpose(1, 2)
        if mask is None:
            scores = torch.bmm(asked.mul_(self.parts.scale), keys)
        else:
            mask = mask.expand(count, groups, 1, end).reshape(-1, 1, end)
            scores = torch.baddbmm(mask, asked, keys, alpha=self.parts.scale)
        return torch.bmm(torch.softmax(scores, -1), values.reshape(shape))

    # --- the cache -----------------------------------------------------------------------------------------------------

    def _put(self, kept: Sequence[Tensor], lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> None:
        """Write keys and values of prompts into the rows of each, which are its answers."""
        if not self.cache:
            shape = 2, 0, self.parts.groups, 0, self.parts.size
            self.cache = [one.new_zeros(shape) for one in kept]
        self._resize(len(self.starts), max(self.at, self.room) if self.room else self.at + SLOTS)
        for layer, new in zip(self.cache, kept, strict=True):
            start = 0
            for length, own in zip(lengths, rows, strict=True):
                value = new[:, start : start + length].transpose(1, 2)[:, None]
                place = slice(own[0], own[-1] + 1) if own and own[-1] - own[0] + 1 == len(own) else own
                layer[:, place, :, self.at - length : self.at] = value
                start += length

    def _resize(self, rows: int, slots: int) -> None:
        """Give the cache at least so many rows and slots."""
        for number, old in enumerate(self.cache):
            _, had, groups, room, size = old.shape
            if rows > had or slots > room:
                grown = max(rows, had), max(slots, room)
                self.cache[number] = old.new_zeros(2, grown[0], groups, grown[1], size)
                self.cache[number][:, :had, :, :room] = old
        self.room = self.cache[0].shape[3]

    def _move(self, by: int) -> None:
        """Move all rows by so many slots."""
        if self.cache and self.starts:
            self._resize(len(self.starts), self.at + by)
            begin = max(0, -by)
            for layer in self.cache:
                layer[:, :, :, begin + by : self.at + by] = layer[:, :, :, begin : self.at].clone()
                if by > 0:
                    layer[:, :, :, :by] = 0
        self.starts = [start + by for start in self.starts]
        self.at += by

    def _masked(self) -> None:
        """Compute the mask (rows, 1, 1, slots) that closes the slots before each row's first; None if there are none."""
        self.mask = None
        if any(self.starts) and self.cache:
            starts = torch.tensor(self.starts, device=self.device)[:, None]
            closed = torch.arange(self.room, device=self.device) < starts
            mask = torch.zeros(closed.shape, dtype=self.cache[0].dtype, device=self.device)
            self.mask = mask.masked_fill_(closed, -torch.inf)[:, None, None]


def _portions(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and last + 1 of adjacent prompts that have at most `TOKENS` tokens together, or are one.

    >>> _portions([4000, 90, 90])
    [(0, 2), (2, 3)]
    """
    out, first, total = [], 0, 0
    for number, length in enumerate(lengths):
        if number > first and total + length > TOKENS:
            out.append((first, number))
            first, total = number, 0
        total += length
    return [*out, (first, len(lengths))]


def _runs(lengths: Sequence[int]) -> list[list[int]]:
    """Return (how many, length) of adjacent equal lengths.

    >>> _runs([3, 3, 4])
    [[2, 3], [1, 4]]
    """
    out: list[list[int]] = []
    for length in lengths:
        if out and out[-1][1] == length:
            out[-1][0] += 1
        else:
            out.append([1, length])
    return out
