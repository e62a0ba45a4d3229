"""Bytes per GPU of every role, as formulas: weights, gradients, optimizer, what is unfolded while working, activations, KV cache.

Letters: P parameters of a role, T those that are trained, W workers, c bytes of a number in the computation (4, or 2 in
bfloat16); the others as in `shape`. Trained weights and their moments are float32.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from whet.errors import RecipeError
from whet.planning.shape import Shape

Engine = Literal["local", "ddp", "fsdp", "zero1", "zero2", "zero3"]
"""Who holds what: one process (local), a copy each (ddp), shares of everything (fsdp, zero3), of the optimizer (zero1), and of the
gradients too (zero2)."""

GIB = 1 << 30
REPLICA_BUCKET = 1 << 25
"""Most numbers that a replica's learner sums at once, but for the last tensor (`learner.replica.BUCKET`)."""
BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size`: numbers reduced together."""
LIVE = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: parameters that ZeRO-3 keeps unfolded."""
WORKSPACE = 1 << 24
"""Logits that `ops.linear_logprobs` holds at once (its constant of the same name)."""
BLOCK = 16
"""Tokens in one block of vLLM's cache on a GPU."""


@dataclass(frozen=True)
class Layout:
    """How the learner is laid out over its workers. Raises RecipeError for what no engine can do."""

    engine: Engine = "local"
    """who holds what"""
    workers: int = 1
    """W: GPUs that learn together"""
    low_precision: bool = False
    """bfloat16 in the computation, over float32 weights (fsdp, zero)"""
    offload: bool = False
    """what is in shares waits in the host's memory: under zero1 and zero2 the moments, under fsdp and zero3 the weights too"""
    checkpointing: bool = False
    """gradient checkpointing: only the layers' inputs are kept"""
    max_tokens_per_micro_batch: int = 8192
    """tokens of one forward pass, padding counted"""

    def __post_init__(self) -> None:
        if self.engine not in get_args(Engine):
            raise RecipeError(f"learner.backend: one of {', '.join(get_args(Engine))}; got {self.engine!r}")
        for name in ("workers", "max_tokens_per_micro_batch"):
            if getattr(self, name) < 1:
                raise RecipeError(f"learner.{name}: at least 1; got {getattr(self, name)}")
        if self.engine == "local" and self.workers > 1:
            raise RecipeError(f"learner.backend: local is one process, and there are {self.workers}; take fsdp")
        for name, asked in (("precision", self.low_precision), ("offload", self.offload)):
            if asked and self.engine in ("local", "ddp"):
                raise RecipeError(f"learner.{name}: {self.engine} has no such thing; take fsdp or zero2")

    @property
    def shards(self) -> bool:
        """Weights are held in shares."""
        return self.engine in ("fsdp", "zero3")

    def computes_in(self, held: int) -> int:
        """c: bytes of a number in the computation, where weights are held in `held` bytes."""
        return min(held, 2) if self.low_precision else held


@dataclass(frozen=True)
class Bytes:
    """Bytes of one role on one GPU. `working` is what is unfolded or buffered while it computes; `host` is on the CPU's side."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    working: float = 0.0
    host: float = 0.0

    @property
    def states(self) -> float:
        """What stays between two passes."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch's forward leaves for its backward.

    `stored` is what lies there at the forward's end; `recomputed` one layer's share that checkpointing makes anew in
    the backward; `transient` what the pass needs besides, for a moment.
    """

    stored: float
    recomputed: float
    transient: float

    @property
    def peak(self) -> float:
        """All that is there at once, at most."""
        return self.stored + self.recomputed + self.transient


def trained(
    shape: Shape, layout: Layout, *, head: str = "language", adapters: int = 0, base_bytes: int = 4, muon: bool = False
) -> Bytes:
    """The bytes of a policy or critic on each GPU.

    Everything trained (T = P) costs 4 T weights + 4 T gradients + 8 T for AdamW's two moments (Loshchilov and Hutter
    2019, algorithm 2), all float32. With `adapters` > 0 those LoRA weights alone are trained (T = adapters, float32,
    as peft keeps them) over a frozen base of `base_bytes` each. ZeRO's shares (Rajbhandari et al. 2020, section 5):
    zero1 holds 8 T / W of the moments, zero2 also a share of the gradients, zero3 and fsdp a share of the weights too.
    DeepSpeed keeps a float32 master share (4 T / W) beside the weights it computes with, float32 ones included, and these
    are whole in c bytes under zero1 and zero2. See `working` for the rest.

    `muon` has one moment instead of two for the matrices inside the layers; it needs them whole, and raises RecipeError
    where they are not.
    """
    if muon and layout.engine not in ("local", "ddp"):
        raise RecipeError(f"optim.kind: muon needs whole matrices, and {layout.engine} shards them; take adamw, or ddp")
    base = shape.parameters(head)
    count = adapters or base
    share = count / layout.workers
    moments = (8 * count - 4 * _muon(shape, adapters) * muon) / layout.workers
    plain = 4 * count + base_bytes * base * bool(adapters)
    c = layout.computes_in(base_bytes if adapters else 4)
    extra = working(shape, layout, count, head=head, held=base_bytes if adapters else 4)
    if layout.engine in ("local", "ddp"):
        return Bytes(plain, 4 * count, moments * layout.workers, extra)
    if layout.engine == "fsdp":
        states = (plain / layout.workers, 4 * share, moments)
        return Bytes(0, 0, 0, extra, sum(states)) if layout.offload else Bytes(*states, extra)
    gradients = c * count if layout.engine == "zero1" else c * share
    whole = c * (base + count * bool(adapters))
    weights = whole / layout.workers if layout.engine == "zero3" else whole
    optimizer = moments + 4 * share
    if not layout.offload:
        return Bytes(weights, gradients, optimizer, extra)
    if layout.engine == "zero1":
        return Bytes(weights, gradients, 0.0, extra, optimizer)
    if layout.engine == "zero2":
        return Bytes(weights, 0.0, 0.0, extra, optimizer + 4 * share)
    return Bytes(0.0, 0.0, 0.0, extra, optimizer + 4 * share + weights)


def frozen(shape: Shape, layout: Layout, *, head: str = "language", bytes_each: int = 4) -> Bytes:
    """The bytes of a reference or reward model on each GPU: P bytes_each, a share of it under fsdp and zero3.

    In shares it is unfolded layer by layer as a trained role is, without gradients.
    """
    whole = bytes_each * shape.parameters(head)
    if not layout.shards:
        return Bytes(whole)
    unfolded = layout.computes_in(bytes_each) * (shape.end_parameters(head) + 2 * shape.layer_parameters())
    share = whole / layout.workers
    if layout.offload:
        return Bytes(0, 0, 0, unfolded, share)
    return Bytes(share, 0, 0, unfolded)


def working(shape: Shape, layout: Layout, count: int, *, head: str = "language", held: int = 4) -> float:
    """Bytes of weights and gradients that are unfolded, copied or in a bucket while a trained role computes.

    - local: nothing; ddp: the bucket that is summed at once, 4 min(T, `REPLICA_BUCKET` + the largest tensor).
    - fsdp (one unit per layer, the rest is the root): the root's weights, which the backward unfolds first and folds last,
      and its gradient; beside them either two layers (this one, and the next one already on its way) with one layer's
      gradient and its float32 input to the reduce-scatter, or that input for the root.
    - zero1, zero2: the reduce bucket (c `BUCKET`), and the float32 copy of a worker's gradient share in the step (4 T / W).
    - zero3: the same, and up to `LIVE` unfolded parameters.
    """
    c, trains = layout.computes_in(held), count / shape.parameters(head)
    if layout.engine == "local":
        return 0.0
    if layout.engine == "ddp":
        largest = shape.vocabulary * shape.hidden if trains == 1 else 0
        return 4.0 * min(count, REPLICA_BUCKET + largest)
    if layout.engine == "fsdp":
        root, layer = shape.end_parameters(head), shape.layer_parameters()
        ends = c * root * (1 + trains)
        beside = max(2 * c * layer + (c + 4) * layer * trains, 4 * root * trains)
        return ends + beside
    step = 0.0 if layout.offload else 4 * count / layout.workers
    live = c * min(shape.parameters(head), LIVE) if layout.engine == "zero3" else 0
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
) -> Activations:
    """What one forward over `tokens` tokens (padding counted) leaves for its backward, by what each operation keeps.

    Per token and layer, c = `bytes_each`, with fused attention (no S x S matrix is kept):
    - an RMS norm keeps its input in float32 and the normalized rows, (4 + c) H; a LayerNorm its input, c H; the two
      outputs that linear maps read, 2 c H;
    - attention keeps q, k, v and its output, c (2 A + 2 K), and one float32 per head; head norms (4 + c) (A + K);
    - a gated MLP keeps gate, activated gate, up and their product, 4 c I; a plain one 2 c I, and 5 c I under gelu_new, which
      transformers writes out in single operations.
    With experts the MLP counts `active_experts` times with its input each. Under LoRA (`rank` > 0) frozen norms do not keep
    their normalized rows, each map keeps `rank` float32, and where the base is in half precision a float32 copy of its
    input in the place of the input.
    Behind the layers: the last norm; and for the `head_tokens` that the head runs over (default: all) their hidden state
    and, as long as they are at most `WORKSPACE` logits, the float32 log-softmax. More logits are made chunk by chunk,
    twice, and none is kept. With `checkpointing` a layer keeps its input alone, c H (Chen et al. 2016).

    The transient part is the larger of two gradients inside an MLP, and of the head's five buffers of logits with the
    gradient of its weights.
    """
    c, read = bytes_each, tokens if head_tokens is None else head_tokens
    layer = float(tokens * _kept(shape, c, rank))
    norm = _norm(shape, c, bool(rank))
    logits = min(read * shape.vocabulary, WORKSPACE) if head == "language" else 0
    kept_logits = logits if read * shape.vocabulary <= WORKSPACE else 0
    behind = tokens * norm + read * c * shape.hidden + 4 * kept_logits
    inside = 2 * c * tokens * shape.intermediate * max(1, shape.active_experts)
    at_head = 5 * 4 * logits + c * shape.vocabulary * shape.hidden * (head == "language" and rank == 0)
    stored = shape.layers * (tokens * c * shape.hidden if checkpointing else layer) + behind
    return Activations(stored, layer if checkpointing else 0.0, max(inside, at_head))


def _kept(shape: Shape, c: int, rank: int) -> float:
    """Bytes per token and layer."""
    h, a, k, i = shape.hidden, shape.attention_width, shape.kv_width, shape.intermediate
    copied = bool(rank) and c < 4  # the adapters read float32 copies of what the frozen maps read
    norms = shape.norms * _norm(shape, c, bool(rank)) + (0 if copied else 2 * c * h)
    attention = c * (2 * a + 2 * k) + 4 * shape.heads
    if shape.qk_norm:
        attention += (4 if rank else 4 + c) * (a + k) + 4 * (shape.heads + shape.kv_heads)
    wide = (4 if shape.gated else 5 if shape.activation == "gelu_new" else 2) - copied
    mlp = wide * c * i * max(1, shape.active_experts) + 2 * c * h * shape.active_experts
    inputs = sum(one for one, _ in shape.linears().values()) if copied else 0
    return norms + attention + mlp + 4 * inputs + 4 * rank * len(shape.linears())


def _norm(shape: Shape, c: int, frozen_weight: bool) -> float:
    """Bytes per token that one norm over the hidden width keeps."""
    if shape.norm_bias:
        return c * shape.hidden + 8
    return (4 if frozen_weight else 4 + c) * shape.hidden + 4


@dataclass(frozen=True)
class Serving:
    """A vLLM engine on one of its GPUs: its weights, its cache in bytes and tokens, and how many answers fit at once."""

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
    """What fits into an engine of `tensor_parallel` GPUs with `memory` bytes each.

    Of `share` of the memory (vLLM's `gpu_memory_utilization`) the weights (P bytes_each / tensor_parallel) and `reserve`
    for the pass itself are taken off; the rest are blocks of `BLOCK` tokens, of 2 layers K bytes_each a token (Kwon et al.
    2023, section 4), whose heads are split over the GPUs as far as there are some. `sequences` have `context` tokens each.
    Raises RecipeError where not a single sequence fits.
    """  # fmt: skip
    weights = bytes_each * shape.parameters() / tensor_parallel
    split = min(tensor_parallel, shape.kv_heads)
    cache = share * memory - weights - reserve
    blocks = max(0, int(cache // (BLOCK * shape.kv_bytes(bytes_each) / split)))
    sequences = blocks // -(-context // BLOCK)
    if sequences < 1:
        raise RecipeError(
            f"--gpu-memory: an engine's weights ({weights / GIB:.1f} GiB on each of {tensor_parallel} GPUs) leave no room for an "
            f"answer of {context} tokens in {share:g} of {memory / GIB:g} GiB; use more GPUs an engine (--tensor-parallel), or larger ones"
        )
    return Serving(weights, cache, blocks * BLOCK, sequences)


def _muon(shape: Shape, adapters: int) -> int:
    """The numbers that have one moment less under muon: the matrices inside the layers."""
    if adapters:
        return adapters
    inside = sum(inputs * outputs for inputs, outputs in shape.linears().values())
    return shape.layers * inside
