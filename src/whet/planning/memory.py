"""Memory per GPU as formulas: weights, gradients, optimizer, temporary buffers, activations and KV cache of each role.

Letters: P parameters of a role, T trained parameters, W workers, c bytes per number in the computation (4, or 2 in
bfloat16); the others as in `shape`. Trained weights and their moments are float32.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from whet.errors import RecipeError
from whet.planning.shape import Shape

Backend = Literal["local", "ddp", "fsdp", "zero1", "zero2", "zero3"]
"""What is sharded over the workers: nothing, one process (local); nothing, replicas (ddp); everything (fsdp, zero3); the optimizer
(zero1); the optimizer and the gradients (zero2)."""

GIB = 1 << 30
REPLICA_BUCKET = 1 << 25
"""Gradient elements that ddp sums at once, not counting the last tensor (`learner.ddp.BUCKET`)."""
BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size`: elements that are reduced together."""
LIVE = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: parameters that ZeRO-3 keeps gathered."""
WORKSPACE = 1 << 25
"""Number of logits that `ops.linear_logprobs` holds at once (its constant of the same name)."""
NORM_READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "attn.c_attn", "c_fc")
"""The linear maps of a layer whose input is the output of a norm."""
SAVED = {"muon": 4.0, "adamw_8bit": 6 - 1 / 32, "paged_adamw_8bit": 6 - 1 / 32}
"""Bytes of moments per weight inside the layers that a kind of optimizer does not have, of the 8 of AdamW."""
BLOCK = 16
"""Tokens in one block of vLLM's KV cache on a GPU."""


@dataclass(frozen=True)
class Layout:
    """The distribution of the learner over its workers. Raises RecipeError for options that the backend does not support."""

    backend: Backend = "local"
    """what is sharded"""
    workers: int = 1
    """W: number of GPUs of the learner"""
    low_precision: bool = False
    """compute in bfloat16 with float32 weights"""
    offload: bool = False
    """keep shards in host memory between uses: with zero1 and zero2 the moments, with fsdp and zero3 also the weights"""
    checkpointing: bool = False
    """gradient checkpointing: keep only the inputs of the layers"""
    max_tokens_per_micro_batch: int = 8192
    """tokens of one forward, including padding"""

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend):
            raise RecipeError(f"learner.backend: one of {', '.join(get_args(Backend))}; got {self.backend!r}")
        for name in ("workers", "max_tokens_per_micro_batch"):
            if getattr(self, name) < 1:
                raise RecipeError(f"learner.{name}: at least 1; got {getattr(self, name)}")
        if self.backend == "local" and self.workers > 1:
            raise RecipeError(
                f"learner.backend: local runs in one process, but there are {self.workers} workers; use fsdp"
            )
        if self.offload and self.backend in ("local", "ddp"):
            raise RecipeError(f"learner.offload: {self.backend} does not support it; use fsdp or zero2")

    @property
    def shards(self) -> bool:
        """True if weights are sharded."""
        return self.backend in ("fsdp", "zero3")

    def autocasts(self, held: int) -> bool:
        """Return True if each operation casts its own inputs to bfloat16, as under torch's autocast."""
        return self.low_precision and held == 4 and self.backend in ("local", "ddp")

    def computes_in(self, held: int) -> int:
        """Return c, the bytes per number in the computation, for weights stored with `held` bytes per number."""
        return min(held, 2) if self.low_precision else held


@dataclass(frozen=True)
class Bytes:
    """Bytes of one role on one GPU. `working` is gathered weights and buffers during computation; `host` is in CPU memory."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    working: float = 0.0
    host: float = 0.0

    @property
    def states(self) -> float:
        """Bytes that stay allocated between two passes."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Activations:
    """Bytes of activations of one micro-batch.

    `stored` is kept from the forward for the backward. `recomputed` is one layer's activations, which checkpointing
    computes again in the backward. `transient` is needed only for a short time during the pass.
    """

    stored: float
    recomputed: float
    transient: float

    @property
    def peak(self) -> float:
        """Upper bound of the bytes that are allocated at once."""
        return self.stored + self.recomputed + self.transient


def trained(
    shape: Shape,
    layout: Layout,
    *,
    head: str = "language",
    adapters: int = 0,
    base_bytes: int = 4,
    optim: str = "adamw",
) -> Bytes:
    """Return the bytes of a policy or critic on each GPU.

    Full training (T = P) needs 4 T bytes for weights + 4 T for gradients + 8 T for AdamW's two moments (Loshchilov and
    Hutter 2019, algorithm 2), all float32. With `adapters` > 0 only that number of LoRA weights is trained (T = adapters,
    float32 as in peft), with a frozen base of `base_bytes` per weight. Shards of ZeRO (Rajbhandari et al. 2020, section
    5): zero1 holds 8 T / W of the moments, zero2 also a shard of the gradients, zero3 and fsdp also a shard of the
    weights. DeepSpeed keeps a float32 master shard (4 T / W) in addition to the weights it computes with, even if these
    are float32. With zero1 and zero2 the weights it computes with are not sharded and have c bytes each. See `working` for
    the rest.

    `optim` is the kind of optimizer (see `Optim`). For the matrices inside the layers, muon has one moment instead of two, and
    moments in 8 bits have 2 bytes and 1/32 for their scales. Raises RecipeError if it needs whole matrices and they are sharded.
    """
    if optim != "adamw" and layout.backend not in ("local", "ddp"):
        raise RecipeError(
            f"optim.kind: {optim} needs whole matrices, but {layout.backend} shards them; use adamw or ddp"
        )
    base = shape.parameters(head)
    count = adapters or base
    share = count / layout.workers
    moments = (8 * count - SAVED.get(optim, 0) * _inside(shape, adapters)) / layout.workers
    plain = 4 * count + base_bytes * base * bool(adapters)
    c = layout.computes_in(base_bytes if adapters else 4)
    extra = working(shape, layout, count, head=head, held=base_bytes if adapters else 4)
    if layout.backend in ("local", "ddp"):
        return Bytes(plain, 4 * count, moments * layout.workers, extra)
    if layout.backend == "fsdp":
        states = (plain / layout.workers, 4 * share, moments)
        return Bytes(0, 0, 0, extra, sum(states)) if layout.offload else Bytes(*states, extra)
    gradients = c * count if layout.backend == "zero1" else c * share
    whole = c * (base + count * bool(adapters))
    weights = whole / layout.workers if layout.backend == "zero3" else whole
    optimizer = moments + 4 * share
    if not layout.offload:
        return Bytes(weights, gradients, optimizer, extra)
    if layout.backend == "zero1":
        return Bytes(weights, gradients, 0.0, extra, optimizer)
    if layout.backend == "zero2":
        return Bytes(weights, 0.0, 0.0, extra, optimizer + 4 * share)
    return Bytes(0.0, 0.0, 0.0, extra, optimizer + 4 * share + weights)


def frozen(shape: Shape, layout: Layout, *, head: str = "language", bytes_each: int = 4) -> Bytes:
    """Return the bytes of a reference or reward model on each GPU: P bytes_each, divided by W with fsdp and zero3.

    A sharded model is gathered layer by layer like a trained role, without gradients.
    """
    whole = bytes_each * shape.parameters(head)
    if not layout.shards:
        return Bytes(whole)
    gathered = layout.computes_in(bytes_each) * (shape.end_parameters(head) + 2 * shape.layer_parameters())
    share = whole / layout.workers
    if layout.offload:
        return Bytes(0, 0, 0, gathered, share)
    return Bytes(share, 0, 0, gathered)


def working(shape: Shape, layout: Layout, count: int, *, head: str = "language", held: int = 4) -> float:
    """Return the bytes of gathered weights, gradient copies and buckets while a trained role computes.

    - local: nothing; ddp: one bucket of summed gradients, 4 min(T, `REPLICA_BUCKET` + the largest tensor). In bfloat16 at least
      the copies of the weights of layers and language head, 2 bytes each, which the forward keeps for the backward.
    - fsdp (one unit per layer, the rest is the root): the root's weights, which the backward gathers first and frees last,
      and its gradient. In addition the larger of: two layers (the current one and the prefetched next one) with one layer's
      gradient and its float32 input of the reduce-scatter, or this input of the root.
    - zero1, zero2: the reduce bucket (c `BUCKET`), and in the step the float32 copy of a worker's gradient shard (4 T / W).
    - zero3: the same, and up to `LIVE` gathered parameters.
    """
    c, trains = layout.computes_in(held), count / shape.parameters(head)
    top = shape.vocabulary * shape.hidden if head == "language" else 0
    copies = 2.0 * (shape.layers * shape.layer_parameters() + top) if layout.autocasts(held) else 0.0
    if layout.backend == "local":
        return copies
    if layout.backend == "ddp":
        largest = shape.vocabulary * shape.hidden if trains == 1 else 0
        return max(copies, 4.0 * min(count, REPLICA_BUCKET + largest))
    if layout.backend == "fsdp":
        root, layer = shape.end_parameters(head), shape.layer_parameters()
        ends = c * root * (1 + trains)
        beside = max(2 * c * layer + (c + 4) * layer * trains, 4 * root * trains)
        return ends + beside
    step = 0.0 if layout.offload else 4 * count / layout.workers
    live = c * min(shape.parameters(head), LIVE) if layout.backend == "zero3" else 0
    return c * min(count, BUCKET) + step + live


def activations(
    shape: Shape,
    tokens: int,
    *,
    bytes_each: int = 4,
    checkpointing: bool = False,
    head_tokens: int | None = None,
    head: str = "language",
    rank: int = 0,
    autocast: bool = False,
) -> Activations:
    """Return the activations of one forward over `tokens` tokens (including padding), summed over its operations.

    Per token and layer, c = `bytes_each`, with fused attention (no S x S matrix is kept):
    - an RMS norm keeps its input in float32 and the normalized rows, (4 + c) H; a LayerNorm keeps its input, c H; the
      outputs of the two norms are kept as inputs of linear maps, 2 c H;
    - attention keeps q, k, v and its output, c (2 A + 2 K), and one float32 per head; head norms keep (4 + c) (A + K);
    - a gated MLP keeps gate, activated gate, up and their product, 4 c I; an ungated MLP keeps 2 c I, or 5 c I with
      gelu_new, which transformers computes as separate operations.
    With experts the MLP counts `active_experts` times, each time with its input. With LoRA (`rank` > 0) frozen norms do not
    keep their normalized rows, each linear map keeps `rank` float32 numbers, and if the base is in half precision it keeps
    a float32 copy of its input instead of the input.
    After the layers: the last norm, and for the `head_tokens` that go through the head (default: all) their hidden states.
    A trained head keeps 20 for each token, and the probabilities, c each, if there are at most `WORKSPACE` of them; else
    those of a first chunk of at most half as many, and the others are computed twice. With LoRA the head keeps the gradient
    of the hidden states instead of all this.
    (With an entropy in the loss they are float32, and half as many.) With `checkpointing` a layer keeps only its input, c H
    (Chen et al. 2016).

    With `autocast` (c = 2) hidden states between the layers and norms stay float32, and each linear map that reads a norm keeps
    its own copy of it, c H.

    The transient part is the larger of: two gradients inside an MLP, or two buffers of a chunk's logits in the head with
    the gradient of its weights.
    """
    c, read = bytes_each, tokens if head_tokens is None else head_tokens
    layer = float(tokens * _kept(shape, c, rank, autocast))
    between = 4 if autocast else c
    norm = _norm(shape, between, bool(rank))
    logits = min(read * shape.vocabulary, WORKSPACE) if head == "language" else 0
    kept_logits = 0 if rank else logits if read * shape.vocabulary <= WORKSPACE else _chunk(read, shape.vocabulary)
    behind = tokens * norm + read * c * shape.hidden + c * kept_logits
    behind += 20 * read * (head == "language" and rank == 0)
    inside = 2 * c * tokens * shape.intermediate * max(1, shape.active_experts)
    at_head = 2 * 4 * logits + c * shape.vocabulary * shape.hidden * (head == "language" and rank == 0)
    stored = shape.layers * (tokens * between * shape.hidden if checkpointing else layer) + behind
    return Activations(stored, layer if checkpointing else 0.0, max(inside, at_head))


def _chunk(tokens: int, vocabulary: int) -> int:
    """Return the number of logits in one chunk of the head if all do not fit (`ops.head.cut`)."""
    most = max(1, WORKSPACE // (2 * vocabulary))
    return -(-tokens // -(-tokens // most)) * vocabulary


def _kept(shape: Shape, c: int, rank: int, autocast: bool) -> float:
    """Return the bytes of activations per token and layer."""
    h, a, k, i = shape.hidden, shape.attention_width, shape.kv_width, shape.intermediate
    copied = bool(rank) and c < 4 and not autocast  # the adapters read float32 copies of the inputs of the frozen maps
    readers = sum(name in NORM_READERS for name in shape.linears()) if autocast else 2
    norms = shape.norms * _norm(shape, 4 if autocast else c, bool(rank)) + (0 if copied else readers * c * h)
    attention = c * (2 * a + 2 * k) + 4 * shape.heads
    if shape.qk_norm:
        attention += (4 if rank else 4 + c) * (a + k) + 4 * (shape.heads + shape.kv_heads)
    wide = (4 if shape.gated else 5 if shape.activation == "gelu_new" else 2) - copied
    mlp = wide * c * i * max(1, shape.active_experts) + 2 * c * h * shape.active_experts
    inputs = sum(one for one, _ in shape.linears().values()) if copied else 0
    return norms + attention + mlp + 4 * inputs + 4 * rank * len(shape.linears())


def _norm(shape: Shape, c: int, frozen_weight: bool) -> float:
    """Return the bytes per token that one norm over the hidden width keeps."""
    if shape.norm_bias:
        return c * shape.hidden + 8
    return (4 if frozen_weight else 4 + c) * shape.hidden + 4


@dataclass(frozen=True)
class Serving:
    """Memory of a vLLM engine on each of its GPUs: bytes of weights and of the KV cache, and the capacity of the cache.

    `tokens` is the number of tokens in the cache, `sequences` the number of answers that fit at the same time.
    """

    weights: float
    cache: float
    tokens: int
    sequences: int


def serving(
    shape: Shape,
    memory: float,
    *,
    context: int,
    tensor_parallel: int = 1,
    bytes_each: int = 2,
    share: float = 0.9,
    reserve: float = 2 * GIB,
) -> Serving:
    """Return the memory and capacity of an engine on `tensor_parallel` GPUs with `memory` bytes each.

    The engine uses `share` of the memory (vLLM's `gpu_memory_utilization`). The cache gets what is left after the weights
    (P bytes_each / tensor_parallel) and `reserve` bytes for the forward. It consists of blocks of `BLOCK` tokens with
    2 layers K bytes_each per token (Kwon et al. 2023, section 4). Key-value heads are split over the GPUs, over at most as
    many GPUs as there are heads. A sequence has `context` tokens. Raises RecipeError if not even one sequence fits.
    """  # fmt: skip
    weights = bytes_each * shape.parameters() / tensor_parallel
    split = min(tensor_parallel, shape.kv_heads)
    cache = share * memory - weights - reserve
    blocks = max(0, int(cache // (BLOCK * shape.kv_bytes(bytes_each) / split)))
    sequences = blocks // -(-context // BLOCK)
    if sequences < 1:
        raise RecipeError(
            f"--gpu-memory: an engine's weights ({weights / GIB:.1f} GiB on each of {tensor_parallel} GPUs) leave no room for an "
            f"answer of {context} tokens in {share:g} of {memory / GIB:g} GiB; use more GPUs per engine (--tensor-parallel), or larger GPUs"
        )
    return Serving(weights, cache, blocks * BLOCK, sequences)


def _inside(shape: Shape, adapters: int) -> int:
    """Return the number of trained weights in matrices inside the layers."""
    if adapters:
        return adapters
    inside = sum(inputs * outputs for inputs, outputs in shape.linears().values())
    return shape.layers * inside
