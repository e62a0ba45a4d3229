"""The parts of a standard pre-norm decoder, found by the structure of a model's modules, whatever its class is called.

Such a model is: embedding -> layers of [norm, q/k/v, rotary embedding, attention over all earlier tokens, o, norm, gated MLP]
-> norm -> head. The numbers are not judged here; `whet.models.probe` compares them with the model's own forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from whet.models.roles import Role
from whet.models.saved_adapters import owner

Product = Callable[[Tensor], Tensor]
JOINED = 1 << 18
"""Largest number of weights of matrices that are copied into one. For larger ones a joint product is not faster."""
MERGED = 1 << 26
"""Largest number of weights of a model into which adapters are merged for decoding; larger ones call the adapted layers."""
WIDE, PIECE = 2048, 512
"""From this number of outputs on, a CPU multiplies few rows by pieces of so many outputs, which fit into its cache
(`python -m benchmarks.generation` measures it)."""
FEW = 128
"""Largest number of such rows."""

ROPE = frozenset(
    {
        "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
        "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "partial_rotary_factor",
    }
)  # fmt: skip
"""Rotary parameters that act in the rotary module only. Others may change attention far beyond the rows that the probe tries."""


@dataclass(frozen=True)
class Layer:
    """One layer: N tokens of width H, with `heads` query heads and `groups` key heads of size D."""

    norm: Product
    qkv: Product
    """(N, H) -> (N, (heads + 2 groups) D)"""
    q_norm: Product | None
    k_norm: Product | None
    out: Product
    mlp_norm: Product
    gate_up: Callable[[Tensor], tuple[Tensor, Tensor]]
    act: Product
    down: Product


@dataclass(frozen=True)
class Structure:
    """The parts of a model, read from its modules as they are now."""

    embed: Product
    rotary: Any
    layers: tuple[Layer, ...]
    norm: Product
    head: Product
    heads: int
    groups: int
    size: int
    scale: float


def structure(role: Role) -> Structure | None:
    """Return the parts of the role's model, or None if it is not known to be a standard decoder.

    The weights are those of the moment: call it again after they changed. Inside `Role.sampling`, the role's adapter is part of
    them. Every weight of the model must have its place, and no option may act beyond the rows that the probe can try.
    """
    if not role.linear_head or role.paths.limit is not None:
        return None
    try:
        return _Reader(role).structure()
    except _Other:
        return None


class _Other(Exception):
    """The model is no standard decoder."""


class _Reader:
    def __init__(self, role: Role) -> None:
        self.model, self.used = role.model, set[int]()
        self.config = role.model.config.get_text_config()
        self.kind = torch.bfloat16 if role.autocast else None
        base = {id(p): p for name, p in self.model.named_parameters() if owner(name) is None}
        self.base = base
        self.merges = sum(p.numel() for p in base.values()) <= MERGED

    def structure(self) -> Structure:
        self._looks_back_everywhere()
        body = self.model.base_model
        kinds = dict(body.named_children())
        lists = [one for one in kinds.values() if isinstance(one, nn.ModuleList)]
        rotary = [one for one in kinds.values() if hasattr(one, "inv_freq")]
        embed, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        norms = [one for one in kinds.values() if _is_norm(one)]
        if body is self.model or len(lists) != 1 or len(rotary) != 1 or len(norms) != 1:
            raise _Other
        if type(embed) is not nn.Embedding or type(head) is not nn.Linear or not len(lists[0]) or _hooked(embed):
            raise _Other
        self.used |= {id(embed.weight), id(head.weight), id(head.bias)}
        attention = _only(lists[0][0], "q_proj")
        size = getattr(attention, "head_dim", None)
        if not isinstance(size, int):
            raise _Other
        heads, rest = divmod(attention.q_proj.out_features, size)
        groups, more = divmod(attention.k_proj.out_features, size)
        if rest or more or heads % groups or size % 2:
            raise _Other
        layers = tuple(self._layer(one, size) for one in lists[0])
        norm = self._norm(norms[0])
        if self.base.keys() - self.used:
            raise _Other  # a weight without a place
        scale = getattr(attention, "scaling", size**-0.5)
        return Structure(
            embed, rotary[0], layers, norm, self._product(head), heads, groups, size, float(scale)
        )  # fmt: skip

    def _looks_back_everywhere(self) -> None:
        """Raise _Other if attention may change with a distance that the probe does not try."""
        config = self.config
        kinds = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None) and kinds != {"full_attention"}
        rope = getattr(config, "rope_parameters", None) or {}
        if window or kinds - {"full_attention"} or getattr(config, "attention_chunk_size", None) or set(rope) - ROPE:
            raise _Other

    def _layer(self, layer: nn.Module, size: int) -> Layer:
        attention, mlp = _only(layer, "q_proj"), _only(layer, "gate_proj")
        norms = [one for one in layer.children() if _is_norm(one)]
        if len(norms) != 2 or getattr(attention, "sliding_window", None):
            raise _Other
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        if (q_norm is None) != (k_norm is None) or (q_norm is not None and q_norm.weight.shape != (size,)):
            raise _Other
        parts = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        mlps: list[Any] = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
        if not all(callable(one) for one in (*parts, *mlps)):
            raise _Other
        gate, up, down, act = mlps
        return Layer(
            self._norm(norms[0]), self._together(parts[:3]),
            None if q_norm is None else self._norm(q_norm), None if k_norm is None else self._norm(k_norm),
            self._product(parts[3]), self._norm(norms[1]), self._pair(gate, up), act, self._product(down),
        )  # fmt: skip

    def _norm(self, module: Any) -> Product:
        if not _is_norm(module) or _hooked(module):
            raise _Other
        self.used.add(id(module.weight))
        if module.weight.dtype != torch.float32:  # it rounds as its own forward does
            return module
        eps: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        return partial(_normed, module, eps)

    def _product(self, module: Any) -> Product:
        found = self._weight(module)
        return module if found is None else _times(*found)

    def _together(self, modules: Sequence[Any]) -> Product:
        """Return one product with several matrices, their outputs one after the other."""
        joined = self._joined(modules)
        if joined is not None:
            return joined
        each = [self._product(one) for one in modules]
        return lambda x: torch.cat([one(x) for one in each], -1)

    def _pair(self, gate: Any, up: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        joined = self._joined([gate, up])
        if joined is not None:
            return lambda x: joined(x).chunk(2, -1)  # type: ignore[return-value]
        one, other = self._product(gate), self._product(up)
        return lambda x: (one(x), other(x))

    def _joined(self, modules: Sequence[Any]) -> Product | None:
        found = [self._weight(one) for one in modules]
        if any(one is None for one in found) or sum(one[0].numel() for one in found if one) > JOINED:
            return None
        weights, biases = zip(*(one for one in found if one), strict=True)
        weight = torch.cat(weights)
        if all(bias is None for bias in biases):
            return _times(weight, None)
        pairs = zip(weights, biases, strict=True)
        return _times(weight, torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in pairs]))

    def _weight(self, module: Any) -> tuple[Tensor, Tensor | None] | None:
        """Return the weight and bias of a linear layer, adapter merged; None if the layer itself must be called."""
        layer = module
        while hasattr(layer, "base_layer"):
            layer = layer.base_layer
        self.used |= {id(p) for p in layer.parameters()}
        if type(layer) is not nn.Linear or _hooked(layer) or _hooked(module):
            return None
        weight = layer.weight
        if module is not layer and not getattr(module, "disable_adapters", True):
            if not self.merges or weight.dtype not in (torch.float32, torch.float64) or self.kind is not None:
                return None
            for adapter in module.active_adapters:
                if adapter in getattr(module, "lora_A", {}):
                    if module.lora_variant.get(adapter) or module.lora_bias.get(adapter) or module.merged:
                        return None
                    weight = weight + module.get_delta_weight(adapter)
        if self.kind is not None and (weight.numel() <= JOINED or (self.merges and not weight.requires_grad)):
            return weight.to(self.kind), None if layer.bias is None else layer.bias.to(self.kind)
        return weight, layer.bias


def _only(module: nn.Module, name: str) -> Any:
    """Return the only child that has a part of this name."""
    found = [one for one in module.children() if hasattr(one, name)]
    if len(found) != 1:
        raise _Other
    return found[0]


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module has one vector of weights, and an epsilon."""
    weights = dict(module.named_parameters())
    return set(weights) == {"weight"} and weights["weight"].ndim == 1 and (
        hasattr(module, "variance_epsilon") or hasattr(module, "eps")
    )  # fmt: skip


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _normed(module: Any, eps: float, x: Tensor) -> Tensor:
    if x.dtype != module.weight.dtype:
        return module(x)
    return functional.rms_norm(x, module.weight.shape, module.weight, eps)


def _times(weight: Tensor, bias: Tensor | None) -> Product:
    wide = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.shape[0] >= WIDE
    return partial(_pieces, weight, bias) if wide else partial(functional.linear, weight=weight, bias=bias)


def _pieces(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Compute `linear(x, weight, bias)`, for few rows by pieces of the outputs."""
    if x.shape[0] > FEW or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return functional.linear(x, weight, bias)
    out = x.new_empty(x.shape[0], weight.shape[0])
    for start in range(0, weight.shape[0], PIECE):
        torch.mm(x, weight[start : start + PIECE].t(), out=out[:, start : start + PIECE])
    return out if bias is None else out.add_(bias)
