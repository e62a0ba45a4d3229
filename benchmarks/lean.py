"""The parts of the lean hand-written loops: log-probs of answers alone, micro-batches sorted by length, and decoding of Qwen2."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Item = TypeVar("Item")


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return ids (B, T), padded at the right, and the mask of real tokens (B, T)."""
    ids = torch.full((len(rows), max(map(len, rows))), pad)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids, mask


def answer_logps(model: Any, ids: Tensor, mask: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probs (N,) of the tokens from `start` (B,) on, row by row, and where they are, (B, T - 1)."""
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    target = ids[:, 1:]
    keep = (torch.arange(target.shape[1])[None] >= start[:, None] - 1) & (mask[:, 1:] > 0)
    return -F.cross_entropy(model.lm_head(hidden[keep]), target[keep], reduction="none"), keep


def micro_batches(items: Sequence[Item], length: Callable[[Item], int], budget: int) -> list[list[Item]]:
    """Sort by length and cut where rows x longest row would exceed the budget."""
    out: list[list[Item]] = []
    for item in sorted(items, key=length):
        if out and (len(out[-1]) + 1) * length(item) <= budget:
            out[-1].append(item)
        else:
            out.append([item])
    return out


class Decoder:
    """A functional Qwen2 with a static KV cache: weights taken out once, grouped heads by reshape, no module calls.

    Each prompt is read once for all its answers. Finished rows leave the batch when they are 15% of it. `end` is the id that
    ends an answer; -1 never does.
    """

    def __init__(self, model: Any, pad: int, end: int) -> None:
        config = model.config
        self.model, self.pad, self.end = model, pad, end
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.width, self.eps = config.hidden_size // config.num_attention_heads, config.rms_norm_eps
        theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
        inverse = 1.0 / (theta ** (torch.arange(0, self.width, 2).float() / self.width))
        angle = torch.outer(torch.arange(config.max_position_embeddings).float(), inverse)
        self.cos, self.sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    @torch.no_grad()
    def take(self) -> None:
        """Take the present weights of the model."""
        inner = self.model.model
        self.embedding, self.norm = inner.embed_tokens.weight, inner.norm.weight
        self.layers = []
        for layer in inner.layers:
            attn, mlp = layer.self_attn, layer.mlp
            projections = (attn.q_proj, attn.k_proj, attn.v_proj)
            qkv, bias = torch.cat([one.weight for one in projections]), torch.cat([one.bias for one in projections])
            up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
            self.layers.append((*norms, qkv, bias, attn.o_proj.weight, up, mlp.down_proj.weight))

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)

    def _logits(self, ids: Tensor, position: Tensor, keys: Any, values: Any, at: slice, allowed: Tensor) -> Tensor:
        """Return the logits (B, V) after the last of ids (B, T). Keys and values are written to the slots `at`."""
        rows, length = ids.shape
        heads, kv, width = self.heads, self.kv, self.width
        x = self.embedding[ids]
        cos, sin = self.cos[position][:, None], self.sin[position][:, None]
        for number, (first, second, qkv, bias, out, up, down) in enumerate(self.layers):
            y = F.linear(self._normed(x, first), qkv, bias).view(rows, length, heads + 2 * kv, width).transpose(1, 2)
            query = self._turned(y[:, :heads], cos, sin)
            keys[number][:, :, at] = self._turned(y[:, heads : heads + kv], cos, sin)
            values[number][:, :, at] = y[:, heads + kv :]
            k, v = keys[number][:, :, : at.stop], values[number][:, :, : at.stop]
            if length == 1:  # the query heads of a group become positions of one head
                a = F.scaled_dot_product_attention(query.reshape(rows, kv, heads // kv, width), k, v, attn_mask=allowed)
                a = a.reshape(rows, heads, 1, width)
            else:
                a = F.scaled_dot_product_attention(query, k, v, attn_mask=allowed, enable_gqa=True)
            x = x + F.linear(a.transpose(1, 2).reshape(rows, length, heads * width), out)
            gate, linear = F.linear(self._normed(x, second), up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * linear, down)
        return self._normed(x[:, -1], self.norm) @ self.embedding.T

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], answers: int, most: int
    ) -> tuple[list[list[int]], list[Tensor]]:
        """Sample answers of at most `most` tokens. Return their ids and log-probs, prompt by prompt."""
        count, longest = len(prompts), max(map(len, prompts))
        ids, mask = torch.full((count, longest), self.pad), torch.zeros(count, longest, dtype=torch.bool)
        for number, prompt in enumerate(prompts):
            ids[number, longest - len(prompt) :] = torch.tensor(prompt)
            mask[number, longest - len(prompt) :] = True
        keys, values = (
            [torch.zeros(count, self.kv, longest + most, self.width) for _ in self.layers] for _ in range(2)
        )
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        allowed = (causal[None] & mask[:, None]) | torch.eye(longest, dtype=torch.bool)[None]
        position = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self._logits(ids, position, keys, values, slice(0, longest), allowed[:, None])
        owner = torch.arange(count).repeat_interleave(answers)
        keys, values, logits = [one[owner] for one in keys], [one[owner] for one in values], logits[owner]
        mask = torch.cat([mask[owner], torch.ones(len(owner), most, dtype=torch.bool)], 1)
        following, live = mask[:, :longest].sum(1), torch.arange(len(owner))
        done = torch.zeros(len(owner), dtype=torch.bool)
        out, logps = torch.full((len(owner), most), self.pad), torch.zeros(len(owner), most)
        for step in range(most):
            logp = logits.log_softmax(-1)
            total = logp.exp().cumsum(-1)  # inversion; torch.multinomial is about 20 times slower on a CPU
            chosen = torch.searchsorted(total, torch.rand(len(logp), 1) * total[:, -1:])[:, 0]
            chosen = chosen.clamp_(max=logp.shape[1] - 1)
            out[live, step], logps[live, step] = chosen, logp.gather(1, chosen[:, None])[:, 0]
            done = done | (chosen == self.end)
            left = len(live) - int(done.sum())
            if step + 1 == most or left == 0:
                break
            if left <= 0.85 * len(live):
                kept = (~done).nonzero()[:, 0]
                live, chosen, following, mask, done = (one[kept] for one in (live, chosen, following, mask, done))
                keys, values = [one[kept] for one in keys], [one[kept] for one in values]
            at = slice(longest + step, longest + step + 1)
            logits = self._logits(chosen[:, None], following[:, None], keys, values, at, mask[:, None, None, : at.stop])
            following = following + 1
        rows = [row[: row.index(self.end) + 1] if self.end in row else row[: step + 1] for row in out.tolist()]
        return rows, [logps[number, : len(row)].clone() for number, row in enumerate(rows)]
