"""Communication in bytes and seconds: shards and gradients, weight updates of the engines, and gathered columns.

Every count is the number of bytes that one GPU receives; it sends as many. In a ring of W GPUs, an all-gather or a
reduce-scatter of S bytes in total moves S (W - 1) / W through every GPU. An all-reduce is both (Patarasuk and Yuan 2009).
"""

from dataclasses import dataclass
from typing import Literal

from whet.errors import RecipeError
from whet.planning.memory import Layout
from whet.planning.shape import Shape


@dataclass(frozen=True)
class Network:
    """Network speeds in bytes per second. By default 2/3 (`inside`) and 1/2 (`between`) of the data sheet of H100 nodes."""

    inside: float = 300e9
    """speed of a GPU's link to other GPUs of its node (NVLink of an H100: 450e9 in each direction)"""
    between: float = 25e9
    """a GPU's share of the network between nodes (400 Gbit/s per GPU: 50e9)"""
    per_node: int = 8
    """GPUs per node"""
    host: float = 5e9
    """speed of one process that writes or reads files in a node's memory (an assumption, not measured on such a node)"""

    def __post_init__(self) -> None:
        for name in ("inside", "between", "per_node", "host"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"network.{name}: above 0; got {getattr(self, name)}")

    def ring(self, workers: int) -> float:
        """Return bytes per second through each GPU of a ring. A ring over several nodes uses all network cards of a node."""
        if workers <= self.per_node:
            return self.inside
        return min(self.inside, self.between * self.per_node)


@dataclass(frozen=True)
class Traffic:
    """Bytes that each GPU receives, by purpose."""

    gathered: float = 0.0
    """weights, all-gathered from their shards"""
    reduced: float = 0.0
    """gradients, reduced"""

    @property
    def total(self) -> float:
        """Sum of gathered and reduced bytes."""
        return self.gathered + self.reduced

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.gathered + other.gathered, self.reduced + other.reduced)

    def times(self, count: float) -> "Traffic":
        """Return the traffic multiplied by `count`."""
        return Traffic(self.gathered * count, self.reduced * count)


def ring_share(size: float, workers: int) -> float:
    """Return the bytes each GPU receives in an all-gather or a reduce-scatter of `size` bytes in total.

    >>> ring_share(8, 4)
    6.0
    """
    return size * (workers - 1) / workers


def micro_batch(shape: Shape, layout: Layout, count: int, *, head: str = "language", held: int = 4) -> Traffic:
    """Return the traffic of one trained role's forward and backward over one micro-batch; `count` parameters are trained.

    - fsdp gathers all weights in the forward and again in the backward (`reshard_after_forward` applies to the root too), c
      bytes each, and reduce-scatters gradients in float32.
    - zero3 gathers all weights twice and reduces gradients in c bytes: 3 P c in total (Rajbhandari et al. 2020, section
      7.2.2).
    - zero2 reduces gradients in c bytes; local, ddp and zero1 communicate only in the update.
    Gradient checkpointing causes no third gather: the weights of a layer are gathered for its backward anyway.
    """
    c, w = layout.computes_in(held), layout.workers
    whole = shape.parameters(head)
    if layout.backend == "fsdp":
        return Traffic(ring_share(2 * c * whole, w), ring_share(4 * count, w))
    if layout.backend == "zero3":
        return Traffic(ring_share(2 * c * whole, w), ring_share(c * count, w))
    return Traffic(0.0, ring_share(c * count, w) if layout.backend == "zero2" else 0.0)


def forward(shape: Shape, layout: Layout, *, head: str = "language", held: int = 4) -> Traffic:
    """Return the traffic of one forward without gradient: all weights are gathered once if they are sharded."""
    c = layout.computes_in(held)
    return Traffic(ring_share(c * shape.parameters(head), layout.workers) if layout.shards else 0.0)


def update(layout: Layout, count: int, *, held: int = 4) -> Traffic:
    """Return the traffic of one trained role at the optimizer step, once per update.

    ddp all-reduces the 4 T bytes of gradients, which is 4 T x 2 (W - 1) / W. zero1 reduces c T bytes and gathers the new
    weights. zero2 gathers the new weights. fsdp and zero3 communicate nothing in the step.
    """
    c, w = layout.computes_in(held), layout.workers
    if layout.backend == "ddp":
        return Traffic(0.0, 2 * ring_share(4 * count, w))
    if layout.backend in ("zero1", "zero2"):
        return Traffic(ring_share(c * count, w), ring_share(c * count, w) if layout.backend == "zero1" else 0.0)
    return Traffic(0.0)


CHUNK = 256 << 20
"""Bytes of the weights that are sent at a time (`generate.vllm.push.CHUNK`)."""
Route = Literal["files", "broadcast", "handles"]
"""How new weights are sent to engines: files in memory, an NCCL broadcast, or handles of memory on the same GPU (IPC)."""


@dataclass(frozen=True)
class WeightPush:
    """One weight update of the engines.

    received    bytes that each engine GPU receives
    gathered    bytes that each learner GPU receives before, when the shards are gathered
    everywhere  bytes that all engine GPUs together receive
    held        bytes of files in the memory of each node with engines: the last two updates, and the one being written; or
                a chunk, if the only engine reads the weights from the memory of the only learner process
    seconds     duration
    """

    received: float
    gathered: float
    everywhere: float
    held: float
    seconds: float


def push(
    shape: Shape,
    layout: Layout,
    network: Network,
    *,
    engines: int,
    tensor_parallel: int = 1,
    bytes_each: int = 4,
    adapters: int = 0,
    shared: bool = False,
    route: Route = "files",
    direct: bool = False,
) -> WeightPush:
    """Estimate one weight update of E engines: P weights of `bytes_each` bytes, or only the float32 LoRA `adapters`.

    The learner gathers its shards first. Then every GPU of every engine receives all weights and keeps its part. With the
    route "files" one worker writes files into its node's memory, they are copied to the other nodes with engines one
    after another, and all engines read them in parallel. A pipelined "broadcast" takes the time of one copy for any E.
    With `shared` the engines are on the learner's GPUs and nodes. The route "handles" needs no copy. With `direct`, one
    learner process sends files to one engine chunk by chunk and removes each after it was read.
    """  # fmt: skip
    size = 4.0 * adapters if adapters else float(bytes_each * shape.parameters())
    gathered = ring_share(size, layout.workers) if layout.shards else 0.0
    seconds = gathered / network.ring(layout.workers)
    if route == "handles":
        return WeightPush(0.0, gathered, 0.0, 0.0, seconds)
    receivers = engines * tensor_parallel
    gpus = max(layout.workers, receivers) if shared else layout.workers + receivers
    if route == "broadcast":
        speed = network.inside if gpus <= network.per_node else network.between
        return WeightPush(size, gathered, size * receivers, 0.0, seconds + size / speed)
    nodes = -(-gpus // network.per_node)
    first = 0 if shared else layout.workers // network.per_node  # nodes with learner GPUs only
    others = nodes - max(first, 1)
    seconds += 2 * size / network.host + others * size / network.between
    return WeightPush(size, gathered, size * receivers, min(size, CHUNK) if direct else 3 * size, seconds)


def columns(layout: Layout, *, rows: int, tokens: int, count: int) -> float:
    """Return the bytes each worker receives when `count` float32 columns of `rows` answers x `tokens` tokens are gathered."""
    return ring_share(4.0 * rows * tokens * count, layout.workers)
