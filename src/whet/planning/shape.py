"""Shape of a decoder model, read from its config.json: number of parameters, and FLOPs per token.

Letters: H hidden width, A = heads x head width, K = key-value heads x head width, I intermediate width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from whet.errors import RecipeError

KINDS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"head_dim": 128, "qk_norm": True},
    "gemma": {"head_dim": 256, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 256, "tie_word_embeddings": True, "norms": 4},
    "gemma3_text": {"head_dim": 256, "tie_word_embeddings": True, "norms": 4, "qk_norm": True},
    "mixtral": {"num_key_value_heads": 8, "num_local_experts": 8},
    "qwen3_moe": {"qk_norm": True, "decoder_sparse_step": 1},
    "gpt2": {"tie_word_embeddings": True},
}
"""The known model types, with values that their configuration may leave out."""


@dataclass(frozen=True)
class Shape:
    """The dimensions of a decoder model.

    >>> tiny = Shape("llama", hidden=8, layers=1, heads=2, kv_heads=1, head_dim=4, intermediate=16, vocabulary=10)
    >>> tiny.parameters()  # 80 + 80 at the ends, 192 + 384 + 16 in the layer, 8 behind it
    760
    """

    kind: str
    """model type, as in config.json"""
    hidden: int
    """H"""
    layers: int
    """decoder layers"""
    heads: int
    """query heads"""
    kv_heads: int
    """key-value heads"""
    head_dim: int
    """width of one head"""
    intermediate: int
    """I: width of the MLP, or of one expert"""
    vocabulary: int
    """V: rows of the embedding"""
    tied: bool = False
    """the output head shares the weights of the embedding"""
    gated: bool = True
    """the MLP multiplies two projections (SwiGLU, GeGLU)"""
    activation: str = "silu"
    """activation function of the MLP, as in config.json"""
    qkv_bias: bool = False
    """the query, key and value projections have a bias"""
    output_bias: bool = False
    """the attention's output projection has a bias"""
    mlp_bias: bool = False
    """the MLP's projections have biases"""
    qk_norm: bool = False
    """queries and keys are normalized per head"""
    norms: int = 2
    """norms over the hidden width per layer"""
    norm_bias: bool = False
    """the norms have a bias (LayerNorm)"""
    positions: int = 0
    """rows of a learned position embedding; 0 is rotary"""
    experts: int = 0
    """experts of a sparse layer; 0 is dense"""
    active_experts: int = 0
    """experts per token"""
    dense_layers: int = 0
    """layers without experts in a model with experts"""
    dense_intermediate: int = 0
    """I of those layers"""

    @staticmethod
    def of(config: Mapping[str, Any]) -> "Shape":
        """Return the shape that a Hugging Face config.json (as a dict) describes.

        Raises RecipeError for an unknown model type (a wrong count would not be noticed) and for a missing key.

        >>> Shape.of({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257,
        ...           "n_positions": 1024}).parameters()
        124439808
        """
        kind = str(config.get("model_type", ""))
        if kind not in KINDS:
            raise RecipeError(
                f"model.path: the plan supports the model types {', '.join(KINDS)}; config.json has model_type {kind!r}"
            )
        return _gpt2(config) if kind == "gpt2" else _rotary(kind, {**KINDS[kind], **_said(config)})

    @property
    def attention_width(self) -> int:
        """A: total width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """K: total width of all key (or value) heads."""
        return self.kv_heads * self.head_dim

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the linear maps of one layer without experts: name -> (inputs, outputs)."""
        h, a, k, i = self.hidden, self.attention_width, self.kv_width, self.intermediate
        if self.kind == "gpt2":
            return {"attn.c_attn": (h, 3 * h), "attn.c_proj": (h, h), "c_fc": (h, i), "mlp.c_proj": (i, h)}
        attention = {"q_proj": (h, a), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (a, h)}
        return attention | ({} if self.experts else {"gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)})

    def attention_parameters(self) -> int:
        """Return the number of attention weights per layer: 2 H A + 2 H K, plus biases and head norms."""
        h, a, k = self.hidden, self.attention_width, self.kv_width
        biases = (a + 2 * k) * self.qkv_bias + h * self.output_bias
        return 2 * h * a + 2 * h * k + biases + 2 * self.head_dim * self.qk_norm

    def mlp_parameters(self, experts: int | None = None) -> int:
        """Return the number of MLP weights of one (sparse) layer: 3 H I if gated, otherwise 2 H I.

        With experts this is multiplied by their number, plus H per expert for the router.
        """
        h, i = self.hidden, self.intermediate
        one = (3 if self.gated else 2) * h * i + ((2 if self.gated else 1) * i + h) * self.mlp_bias
        if not self.experts:
            return one
        return one * (self.experts if experts is None else experts) + h * self.experts

    def layer_parameters(self) -> int:
        """Return the number of weights of one decoder layer (of a sparse one if there are experts). FSDP gathers one layer at
        a time."""
        return self.attention_parameters() + self.mlp_parameters() + self._norm(self.norms)

    def end_parameters(self, head: str = "language") -> int:
        """Return the number of weights outside the layers: embeddings, last norm and head.

        With `head` "scalar" the head has H weights instead of V H.
        """
        own = self.hidden if head == "scalar" else 0 if self.tied else self.vocabulary * self.hidden
        return (self.vocabulary + self.positions) * self.hidden + self._norm(1) + own

    def parameters(self, head: str = "language") -> int:
        """Return the number of all weights; tied weights count once. `head` is "language", or "scalar" for a critic or reward
        model."""
        dense = replace(self, experts=0, intermediate=self.dense_intermediate or self.intermediate).layer_parameters()
        sparse = self.layers - self.dense_layers
        return sparse * self.layer_parameters() + self.dense_layers * dense + self.end_parameters(head)

    def active_parameters(self, head: str = "language") -> int:
        """Return the number of weights that one token uses: of the experts, only `active_experts` count."""
        spared = self.mlp_parameters() - self.mlp_parameters(self.active_experts) if self.experts else 0
        return self.parameters(head) - (self.layers - self.dense_layers) * spared

    def adapter_parameters(self, rank: int, targets: str | tuple[str, ...] = "all-linear") -> int:
        """Return the number of LoRA weights, A (rank x inputs) and B (outputs x rank), on these linear maps of every layer.

        Hu et al. 2021, section 4.1: rank (inputs + outputs) per map. "all-linear" is every linear map except experts and
        head. Raises RecipeError for a target that the model does not have.
        """
        known = self.linears()
        names = list(known) if targets == "all-linear" else [targets] if isinstance(targets, str) else list(targets)
        chosen = {name: [one for one in known if one == name or one.endswith(f".{name}")] for name in names}
        lost = next((name for name, found in chosen.items() if not found), None)
        if lost is not None:
            raise RecipeError(f"model.lora.targets: {self.kind} has {', '.join(known)} in a layer; got {lost!r}")
        each = {one for found in chosen.values() for one in found}
        return self.layers * sum(rank * sum(known[name]) for name in each)

    def forward_flops(self, tokens: float, *, context: float, head_tokens: float | None = None) -> float:
        """Return the FLOPs of one forward over `tokens` tokens, each of which attends to `context` tokens on average.

        Every weight of a matrix costs one multiply and one add per token: 2 (active matrix weights). Attention adds Q K^T
        and the product with V: 2 A context each, per layer. The head (2 H V) runs only over `head_tokens` (default: all);
        pass 0 for a scalar head. Kaplan et al. 2020, table 1; norms, rotary embeddings and softmax are not counted.
        """
        matrices = self._matrices() * tokens
        attention = 2 * self.layers * self.attention_width * context * tokens
        head = self.hidden * self.vocabulary * (tokens if head_tokens is None else head_tokens)
        return 2.0 * (matrices + attention + head)

    def training_flops(
        self,
        tokens: float,
        *,
        context: float,
        head_tokens: float | None = None,
        checkpointing: bool = False,
        adapters: bool = False,
    ) -> float:
        """Return the FLOPs of forward and backward: 3 forwards, since a backward computes gradients of inputs and of weights.

        With `adapters` the frozen matrices have no weight gradients: 2 forwards, plus once more the attention products,
        whose factors all have gradients (the FLOPs of the adapters themselves are not counted). `checkpointing` adds one
        more forward of the layers.
        """
        once = self.forward_flops(tokens, context=context, head_tokens=head_tokens)
        layers = self.forward_flops(tokens, context=context, head_tokens=0)
        scores = 4.0 * self.layers * self.attention_width * context * tokens
        return (2 * once + scores if adapters else 3 * once) + layers * checkpointing

    def kv_bytes(self, bytes_each: int = 2) -> int:
        """Return the bytes of keys and values of one token in the cache: 2 layers K bytes_each."""
        return 2 * self.layers * self.kv_width * bytes_each

    def _matrices(self) -> float:
        """Return the number of matrix weights inside the layers that one token is multiplied with."""
        attention = sum(inputs * outputs for name, (inputs, outputs) in self.linears().items() if _attends(name))
        width = 3 if self.gated else 2
        sparse = width * self.hidden * self.intermediate * (self.active_experts if self.experts else 1)
        sparse += self.hidden * self.experts
        dense = width * self.hidden * (self.dense_intermediate or self.intermediate)
        return self.layers * attention + (self.layers - self.dense_layers) * sparse + self.dense_layers * dense

    def _norm(self, count: int) -> int:
        return count * self.hidden * (2 if self.norm_bias else 1)


def _attends(name: str) -> bool:
    return name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")) or name.startswith("attn.")


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration without keys whose value is null."""
    return {key: value for key, value in config.items() if value is not None}


def _number(config: Mapping[str, Any], *keys: str) -> int:
    """Return the value of the first key that is present. Raises RecipeError if all are missing or the value is below 1."""
    found = next((config[key] for key in keys if config.get(key) is not None), None)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise RecipeError(f"model.path: its config.json needs {keys[0]}, a whole number of at least 1; got {found!r}")
    return found


def _rotary(kind: str, config: Mapping[str, Any]) -> Shape:
    """Return the shape of Llama and similar models with rotary position embeddings."""
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    bias = bool(config.get("attention_bias", False))
    layers = _number(config, "num_hidden_layers")
    experts = int(config.get("num_local_experts", config.get("num_experts", 0)))
    dense = _dense_layers(config, layers) if experts else 0
    return Shape(
        kind, hidden, layers, heads,
        int(config.get("num_key_value_heads", heads)),
        int(config.get("head_dim", hidden // heads)),
        _number(config, *(["moe_intermediate_size"] if "moe_intermediate_size" in config else []), "intermediate_size"),
        _number(config, "vocab_size"),
        bool(config.get("tie_word_embeddings", False)),
        activation=str(config.get("hidden_activation", config.get("hidden_act", "silu"))),
        qkv_bias=bias or bool(config.get("qkv_bias", False)), output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)), qk_norm=bool(config.get("qk_norm", False)),
        norms=int(config.get("norms", 2)), experts=experts,
        active_experts=_number(config, "num_experts_per_tok") if experts else 0,
        dense_layers=dense, dense_intermediate=_number(config, "intermediate_size") if dense else 0,
    )  # fmt: skip


def _dense_layers(config: Mapping[str, Any], layers: int) -> int:
    """Return the number of layers without experts: those in `mlp_only_layers`, and all but every `decoder_sparse_step`-th."""
    only, step = set(config.get("mlp_only_layers", ())), int(config.get("decoder_sparse_step", 1))
    return sum(layer in only or (layer + 1) % step != 0 for layer in range(layers))


def _gpt2(config: Mapping[str, Any]) -> Shape:
    hidden, heads = _number(config, "n_embd"), _number(config, "n_head")
    return Shape(
        "gpt2", hidden, _number(config, "n_layer"), heads, heads, hidden // heads,
        int(config.get("n_inner") or 4 * hidden), _number(config, "vocab_size"), bool(config.get("tie_word_embeddings", True)),
        gated=False, activation=str(config.get("activation_function", "gelu_new")), qkv_bias=True, output_bias=True,
        mlp_bias=True, norm_bias=True, positions=_number(config, "n_positions"),
    )  # fmt: skip
