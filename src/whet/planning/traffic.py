"""Bytes that travel: shards and gradients per micro-batch and update, weights to the engines, columns; and their seconds.

Every count is what one GPU receives (and sends as much). In a ring of W, gathering shards of S bytes in all, or reducing and
scattering them, moves S (W - 1) / W through every GPU, and an all-reduce is both (Patarasuk and Yuan 2009).
"""

from dataclasses import dataclass
from typing import Literal

from whet.errors import RecipeError
from whet.planning.memory import Layout
from whet.planning.shape import Shape


@dataclass(frozen=True)
class Network:
    """How fast bytes travel, in bytes a second; the defaults are two thirds and a half of what H100 nodes have on paper."""

    inside: float = 300e9
    """a GPU's link to others of its node (NVLink of an H100: 450e9 each way)"""
    between: float = 25e9
    """a GPU's share of the network between nodes (400 Gbit/s a GPU: 50e9)"""
    per_node: int = 8
    """GPUs of a node"""
    host: float = 5e9
    """one process writing or reading files in a node's memory (an assumption; nothing of it was measured on such a node)"""

    def __post_init__(self) -> None:
        for name in ("inside", "between", "per_node", "host"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"network.{name}: above 0; got {getattr(self, name)}")

    def ring(self, workers: int) -> float:
        """Bytes a second through each GPU of a ring: a ring over nodes uses all network cards of a node side by side."""
        if workers <= self.per_node:
            return self.inside
        return min(self.inside, self.between * self.per_node)


@dataclass(frozen=True)
class Traffic:
    """Bytes that each GPU receives, by purpose."""

    gathered: float = 0.0
    """weights, unfolded from their shares"""
    reduced: float = 0.0
    """gradients"""

    @property
    def total(self) -> float:
        """Both."""
        return self.gathered + self.reduced

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.gathered + other.gathered, self.reduced + other.reduced)

    def times(self, count: float) -> "Traffic":
        """That many times as much."""
        return Traffic(self.gathered * count, self.reduced * count)


def ring_share(size: float, workers: int) -> float:
    """Bytes each GPU receives when shards of `size` bytes in all are gathered, or reduced and scattered.

    >>> ring_share(8, 4)
    6.0
    """
    return size * (workers - 1) / workers


def micro_batch(shape: Shape, layout: Layout, count: int, *, head: str = "language", held: int = 4) -> Traffic:
    """Traffic of one trained role's forward and backward over one micro-batch; `count` parameters are trained.

    - fsdp gathers all weights in the forward and again in the backward (`reshard_after_forward` holds for the root too), c
      bytes each, and reduces and scatters gradients in float32.
    - zero3 gathers all weights twice and reduces in c bytes: 3 P c in all (Rajbhandari et al. 2020, section 7.2.2).
    - zero2 reduces in c bytes; local, ddp and zero1 stay silent until the update.
    With layers recomputed (checkpointing) nothing is gathered a third time: they are unfolded for their backward anyway.
    """
    c, w = layout.computes_in(held), layout.workers
    whole = shape.parameters(head)
    if layout.engine == "fsdp":
        return Traffic(ring_share(2 * c * whole, w), ring_share(4 * count, w))
    if layout.engine == "zero3":
        return Traffic(ring_share(2 * c * whole, w), ring_share(c * count, w))
    return Traffic(0.0, ring_share(c * count, w) if layout.engine == "zero2" else 0.0)


def forward(shape: Shape, layout: Layout, *, head: str = "language", held: int = 4) -> Traffic:
    """Traffic of one forward without gradient: all weights gathered once where they lie in shares."""
    c = layout.computes_in(held)
    return Traffic(ring_share(c * shape.parameters(head), layout.workers) if layout.shards else 0.0)


def update(layout: Layout, count: int, *, held: int = 4) -> Traffic:
    """Traffic of one trained role at the optimizer's step, once an update.

    ddp all-reduces 4 T, 2 (W - 1) / W times; zero1 reduces c T to their owners and gathers the new weights back; zero2
    gathers them; fsdp and zero3 have sent everything before.
    """
    c, w = layout.computes_in(held), layout.workers
    if layout.engine == "ddp":
        return Traffic(0.0, 2 * ring_share(4 * count, w))
    if layout.engine in ("zero1", "zero2"):
        return Traffic(ring_share(c * count, w), ring_share(c * count, w) if layout.engine == "zero1" else 0.0)
    return Traffic(0.0)


Route = Literal["files", "broadcast", "handles"]
"""How new weights reach engines: files in memory, a broadcast over NCCL, or handles of memory on the same GPU (IPC)."""


@dataclass(frozen=True)
class WeightPush:
    """New weights for the engines: bytes that every engine GPU receives, what the learner gathers first, and seconds.

    `held` are the bytes that lie in the memory of each node with engines: the last two pushes, and the one that is written.
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
) -> WeightPush:
    """One push of the policy's weights (P bytes_each, as the learner holds them) or of its `adapters` alone (in float32) to E engines.

    Shares are gathered over the learner first; then every GPU of every engine receives the whole and keeps its part. By
    `files` one worker writes them into its node's memory, they travel to the other nodes with engines one after another,
    and all engines read them at the same time. A pipelined `broadcast` takes the time of one copy, whatever E is. Engines
    on the learner's own GPUs (`shared`) are on the nodes of the learner; `handles` need no copy at all.
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
    first = 0 if shared else layout.workers // network.per_node  # nodes that the learner fills alone
    others = nodes - max(first, 1)
    seconds += 2 * size / network.host + others * size / network.between
    return WeightPush(size, gathered, size * receivers, 3 * size, seconds)


def columns(layout: Layout, *, rows: int, tokens: int, count: int) -> float:
    """Bytes each worker receives when `count` float32 columns of `rows` answers with `tokens` tokens are gathered."""
    return ring_share(4.0 * rows * tokens * count, layout.workers)
