"""From a run in plain values to who sits where: what fits, with which micro-batches, and how long each part of a step takes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from whet.errors import RecipeError
from whet.planning import memory, traffic
from whet.planning.memory import GIB, Activations, Bytes, Layout, Serving
from whet.planning.schedule import Length, Outcome, lognormal, simulate
from whet.planning.shape import Shape
from whet.planning.traffic import Network, Traffic


@dataclass(frozen=True)
class PlannedRun:
    """What a plan needs to know of a recipe, in plain values."""

    policy: Shape
    """the model that is trained"""
    critic: Shape | None = None
    """the critic's backbone, where the method has one"""
    reference: Shape | None = None
    """the reference's, where it is a model of its own"""
    base_read: bool = False
    """the reference is the policy's base under its adapters: no memory, but a forward of its own"""
    rewards: tuple[tuple[str, Shape], ...] = ()
    """(name, backbone) of each reward model"""
    average: bool = False
    """an average of the policy is kept (rollout.ema)"""
    online: bool = True
    """answers are generated; else rows are read"""
    prompts: int = 64
    """groups of a step; offline: elements of an update"""
    num_generations: int = 1
    """answers of a group; offline: rows of an element (2 for pairs)"""
    prompt_tokens: int = 512
    """mean tokens of a prompt"""
    answer_tokens: int = 1024
    """longest answer"""
    mean_answer: float | None = None
    """mean tokens of an answer; default: half of the longest"""
    updates: int = 1
    """updates of one pass over a step's answers"""
    epochs: int = 1
    """passes"""
    max_tokens_per_micro_batch: int = 8192
    """the recipe's train.max_tokens_per_micro_batch; the plan lowers it where it does not fit"""
    checkpointing: bool = False
    """the recipe's model.gradient_checkpointing; the plan sets it where nothing fits without"""
    low_precision: bool = False
    """learner.half: bfloat16 computation over float32 weights"""
    offload: bool = False
    """learner.offload"""
    engine_bytes: int = 2
    """generator.dtype: bytes of a number in the engines, 2 or 4"""
    push_adapter: bool = False
    route: traffic.Route = "files"
    beside: bool = False
    """engines may not share the learner's GPUs (they answer ahead)"""
    tensor_parallel: int = 0
    """GPUs of an engine; 0 leaves it to the plan"""
    """generator.push: the adapter alone travels to the engines"""
    engine_memory: float = 0.9
    """generator.gpu_memory_utilization: the share of a GPU's memory that an engine takes"""
    lora_rank: int = 0
    """rank of the adapters; 0 trains all weights"""
    lora_targets: str | tuple[str, ...] = "all-linear"
    """what they are put on"""
    one_trunk: bool = False
    """policy, critic and rewards are adapters on one base"""
    held_bytes: int = 4
    """bytes of a frozen number: 4, or 2 (model.dtype bfloat16, or adapters on a GPU)"""
    muon: bool = False
    """the optimizer is muon"""
    columns: int = 8
    """float32 columns per answer token that are gathered from the learner's workers in a step"""

    def __post_init__(self) -> None:
        if not 0 < self.engine_memory <= 1:
            raise RecipeError(
                f"generator.gpu_memory_utilization: a share above 0 and at most 1; got {self.engine_memory}"
            )
        for name in (
            "prompts",
            "num_generations",
            "prompt_tokens",
            "answer_tokens",
            "updates",
            "epochs",
            "max_tokens_per_micro_batch",
        ):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}: at least 1; got {getattr(self, name)}")
        if not 1 <= self.mean <= self.answer_tokens:
            raise RecipeError(
                f"--mean-answer: between 1 and the longest answer, {self.answer_tokens} tokens (sampling.max_new_tokens); "
                f"got {self.mean:g}"
            )

    @property
    def mean(self) -> float:
        """Mean tokens of an answer."""
        return (self.answer_tokens + 1) / 2 if self.mean_answer is None else self.mean_answer

    @property
    def rows(self) -> int:
        """Answers of a step."""
        return self.prompts * self.num_generations

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.prompt_tokens + self.answer_tokens

    @property
    def tokens(self) -> float:
        """Tokens of a step, prompts counted with every answer."""
        return self.rows * (self.prompt_tokens + self.mean)

    @property
    def adapters(self) -> int:
        """LoRA weights of one trained role; 0 without."""
        return self.policy.adapter_parameters(self.lora_rank, self.lora_targets) if self.lora_rank else 0

    def lengths(self) -> Length:
        """The answers' lengths that the simulation assumes: log-normal with deviation 0.6, cut at the longest."""
        return lognormal(self.mean * 0.8353, 0.6, self.answer_tokens)  # its mean is its median x exp(0.6^2 / 2)


@dataclass(frozen=True)
class Hardware:
    """The GPUs, and how much of what they promise is reached. Speeds are those of an H100 SXM's data sheet, without sparsity."""

    gpus: int
    """how many"""
    gpu_memory: float
    """GiB of each"""
    network: Network = Network()
    """how fast bytes travel"""
    low_precision_flops: float = 989e12
    """bfloat16 operations a second"""
    single_flops: float = 67e12
    """float32 operations a second"""
    bandwidth: float = 3.35e12
    """bytes a second from the GPU's memory"""
    training: float = 0.4
    """share of those operations reached in updates"""
    reading: float = 0.5
    """share reached in forwards without gradient"""
    decoding: float = 0.6
    """share of the bandwidth reached while decoding"""
    reserve: float = 0.08
    """share of the memory left to the driver, to communication buffers and to fragments"""

    def __post_init__(self) -> None:
        for name, option in (("gpus", "--gpus"), ("gpu_memory", "--gpu-memory")):
            if not getattr(self, name) > 0:
                raise RecipeError(f"{option}: above 0; got {getattr(self, name)}")

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a plan may fill."""
        return self.gpu_memory * GIB * (1 - self.reserve)


@dataclass(frozen=True)
class StepPhase:
    """One role on one GPU of the learner."""

    name: str
    bytes: Bytes
    activations: Activations | None = None


@dataclass(frozen=True)
class Times:
    """Seconds of one step's parts. Computation and communication overlap, and the longer of both counts."""

    measure: float
    update: float
    push: float
    computed: tuple[float, float]
    """seconds of computation of (measure, update)"""
    sent: tuple[float, float]
    """seconds of communication of (measure, update)"""
    received: tuple[Traffic, Traffic]
    """bytes each GPU receives in (measure, update)"""

    @property
    def learn(self) -> float:
        """Measure and update."""
        return self.measure + self.update


@dataclass(frozen=True)
class GpuPlacement:
    """Who sits where: a learner over `layout.workers` GPUs, and engines beside it or, `shared`, on the same GPUs."""

    layout: Layout
    engines: int
    tensor_parallel: int
    shared: bool
    serving: Serving | None
    times: Times
    push: traffic.WeightPush

    @property
    def name(self) -> str:
        """In words."""
        learner = f"learner {self.layout.engine} on {_counted(self.layout.workers, 'GPU')}"
        if not self.engines:
            return learner
        each = f" of {self.tensor_parallel} GPUs" if self.tensor_parallel > 1 else ""
        where = "on the same GPUs, in turns" if self.shared else "beside it"
        return f"{learner}, {_counted(self.engines, 'engine')}{each} {where}"

    @property
    def flags(self) -> str:
        """What a recipe needs for it, as on the command line."""
        layout, engines = self.layout, self.engines
        words = {
            f"--learner {layout.engine}": True,
            f"--train.max-tokens-per-micro-batch {layout.max_tokens_per_micro_batch}": True,
            "--model.gradient-checkpointing": layout.checkpointing,
            "--learner.precision bf16": layout.low_precision,
            "--learner.offload": layout.offload,
            f"--cluster auto --cluster.learners {layout.workers}": layout.workers + engines > 1,
            f"--generator vllm --cluster.engines {engines}": engines > 0,
            f"--generator.tensor-parallel {self.tensor_parallel}": self.tensor_parallel > 1,
            "--cluster.colocate --generator.sleep": self.shared,
        }
        return " ".join(word for word, used in words.items() if used)


def parts(run: PlannedRun, layout: Layout) -> list[StepPhase]:
    """Every role on one GPU of the learner."""
    held, rank = run.held_bytes if run.lora_rank else 4, run.lora_rank
    out = []
    for name, shape, head in (("policy", run.policy, "language"), ("critic", run.critic, "scalar")):
        if shape is None:
            continue
        adapters = shape.adapter_parameters(rank, run.lora_targets) if rank else 0
        size = memory.trained(shape, layout, head=head, adapters=adapters, base_bytes=held, muon=run.muon)
        if run.one_trunk and name == "critic":  # the base is there already
            alone = memory.trained(shape, Layout(), adapters=adapters)
            over = layout.workers if layout.engine != "ddp" else 1
            size = Bytes(4 * adapters / over, alone.gradients / over, alone.optimizer / over)
        read = memory.activations(
            shape, layout.max_tokens_per_micro_batch, bytes_each=layout.computes_in(held), checkpointing=layout.checkpointing,
            head_tokens=_answered(run, layout.max_tokens_per_micro_batch), head=head, rank=rank,
        )  # fmt: skip
        out.append(StepPhase(name, size, read))
    for name, shape, head in others(run):
        out.append(StepPhase(name, memory.frozen(shape, layout, head=head, bytes_each=run.held_bytes)))
    return out


def others(run: PlannedRun) -> list[tuple[str, Shape, str]]:
    """(name, shape, head) of the frozen roles that are models of their own."""
    out = [("reference", run.reference, "language")] if run.reference is not None else []
    out += [] if run.one_trunk else [(name, shape, "scalar") for name, shape in run.rewards]
    return out + ([("ema", run.policy, "language")] if run.average else [])  # type: ignore[return-value]


def needed(parts_: list[StepPhase]) -> float:
    """Bytes of a learner's GPU: all states, and of what is unfolded and kept for a backward the largest role's.

    Roles take turns: a micro-batch of one is forward and backward before that of the next begins.
    """
    now = [one.bytes.working + (one.activations.peak if one.activations else 0.0) for one in parts_]
    return sum(one.bytes.states for one in parts_) + max(now)


def fitting(run: PlannedRun, layout: Layout, usable: float) -> Layout | None:
    """The layout with the most micro-batch tokens that fit, at most the recipe's; None where not even one row does."""
    most = max(run.max_tokens_per_micro_batch, run.longest)
    sizes = {
        most,
        *(size for size in (1 << power for power in range(8, 31)) if run.longest <= size < most),
        run.longest,
    }
    for size in sorted(sizes, reverse=True):
        tried = replace(layout, max_tokens_per_micro_batch=size)
        if needed(parts(run, tried)) <= usable:
            return tried
    return None


def layouts(run: PlannedRun, engine: memory.Engine, workers: int) -> Iterator[Layout]:
    """The ways to lay an engine out, from the recipe's own to the slowest that holds least."""
    low_precision = run.low_precision and engine not in ("local", "ddp")
    first = Layout(
        engine,
        workers,
        low_precision,
        run.offload,
        checkpointing=run.checkpointing,
        max_tokens_per_micro_batch=run.max_tokens_per_micro_batch,
    )
    yield first
    if not run.checkpointing:
        yield replace(first, checkpointing=True)
    if not run.offload and engine not in ("local", "ddp"):
        yield replace(first, checkpointing=True, offload=True)


def natural(run: PlannedRun, workers: int) -> memory.Engine:
    """The engine that is taken where none is named: local alone, ddp where muon needs whole matrices, else fsdp."""
    if workers == 1 and not (run.low_precision or run.offload):
        return "local"
    return "ddp" if run.muon else "fsdp"


def times(run: PlannedRun, layout: Layout, hardware: Hardware, pushed: float) -> Times:
    """How long measure, update and push of one step take."""
    flops = hardware.low_precision_flops if layout.low_precision or run.held_bytes == 2 else hardware.single_flops
    context, answered = (run.prompt_tokens + run.mean) / 2, run.rows * run.mean
    batches = run.updates * -(-int(run.tokens / run.updates) // (layout.workers * layout.max_tokens_per_micro_batch))
    base = run.held_bytes if run.lora_rank else 4
    policies = [(run.policy, "language"), *([(run.critic, "scalar")] if run.critic is not None else [])]
    readers = [*policies, *((shape, head) for name, shape, head in others(run) if name != "ema")]
    readers += [(run.policy, "language")] * run.base_read
    if not run.online:
        readers = readers[len(policies) :]

    def head_tokens(head: str) -> float:
        return answered if head == "language" else 0.0

    measured = sum(
        shape.forward_flops(run.tokens, context=context, head_tokens=head_tokens(head)) for shape, head in readers
    )
    learned = run.epochs * sum(
        shape.training_flops(
            run.tokens,
            context=context,
            head_tokens=head_tokens(head),
            checkpointing=layout.checkpointing,
            adapters=run.lora_rank > 0,
        )
        for shape, head in policies
    )
    measuring, updating = Traffic(), Traffic()
    for shape, head in readers:
        measuring += traffic.forward(shape, layout, head=head, held=base).times(batches)
    for shape, head in policies:
        count = shape.adapter_parameters(run.lora_rank, run.lora_targets) if run.lora_rank else shape.parameters(head)
        updating += traffic.micro_batch(shape, layout, count, head=head, held=base).times(batches * run.epochs)
        updating += traffic.update(layout, count, held=base).times(run.updates * run.epochs)
    speed = hardware.network.ring(layout.workers)
    computed = (
        measured / (layout.workers * flops * hardware.reading),
        learned / (layout.workers * flops * hardware.training),
    )
    sent = (measuring.total / speed, updating.total / speed)
    return Times(max(computed[0], sent[0]), max(computed[1], sent[1]), pushed, computed, sent, (measuring, updating))


def token_seconds(run: PlannedRun, hardware: Hardware, tensor_parallel: int, active: int) -> float:
    """Seconds in which an engine decodes one token in each of `active` slots.

    Every token reads all weights and its sequences' cache from memory (Pope et al. 2022, section 2.1), or is bound by its
    operations where many are decoded at once; the longer counts.
    """
    context = run.prompt_tokens + run.mean / 2
    size, flops = run.engine_bytes, hardware.low_precision_flops if run.engine_bytes == 2 else hardware.single_flops
    read = (size * run.policy.parameters() + active * context * run.policy.kv_bytes(size)) / tensor_parallel
    worked = active * run.policy.forward_flops(1, context=context) / tensor_parallel
    return max(read / (hardware.bandwidth * hardware.decoding), worked / (flops * hardware.reading))


def placed(
    run: PlannedRun, hardware: Hardware, layout: Layout, *, tensor_parallel: int, shared: bool
) -> GpuPlacement | None:
    """The placement with this learner; None where it does not fit."""
    if shared and layout.workers != hardware.gpus:
        return None
    fits = fitting(run, layout, hardware.usable)
    if fits is None:
        return None
    if not run.online:
        return GpuPlacement(fits, 0, 1, False, None, times(run, fits, hardware, 0.0), traffic.WeightPush(0, 0, 0, 0, 0))
    engines = (hardware.gpus - (0 if shared else fits.workers)) // tensor_parallel
    if engines < 1:
        return None
    stays = sum(one.bytes.states for one in parts(run, fits)) if shared else 0.0
    try:
        serving = memory.serving(
            run.policy,
            hardware.gpu_memory * GIB - stays,
            context=run.longest,
            tensor_parallel=tensor_parallel,
            share=run.engine_memory,
            bytes_each=run.engine_bytes,
        )
    except RecipeError:
        return None
    pushed = traffic.push(
        run.policy, fits, hardware.network, engines=engines, tensor_parallel=tensor_parallel, shared=shared,
        adapters=run.adapters if run.push_adapter else 0, bytes_each=run.held_bytes if run.lora_rank else 4,
        route=run.route if fits.workers == 1 else "files",
    )  # fmt: skip
    return GpuPlacement(
        fits, engines, tensor_parallel, shared, serving, times(run, fits, hardware, pushed.seconds), pushed
    )


def slots(run: PlannedRun, placement: GpuPlacement) -> int:
    """Answers that one engine decodes at once: what its cache holds, at most its share of what may be out (256: vLLM's
    `max_num_seqs`)."""
    assert placement.serving is not None
    return min(placement.serving.sequences, 256)


def simulated(run: PlannedRun, hardware: Hardware, placement: GpuPlacement, max_staleness: int) -> Outcome:
    """The schedule of a few steps (at least 4, and about 20,000 answers at most)."""
    number = max(4 + max_staleness, min(12, 20_000 // run.rows))
    return simulate(
        steps=number, prompts=run.prompts, num_generations=run.num_generations, length=run.lengths(), engines=placement.engines,
        slots=slots(run, placement),
        token_seconds=lambda active: token_seconds(run, hardware, placement.tensor_parallel, active),
        learn_seconds=placement.times.learn, push_seconds=placement.times.push, max_staleness=max_staleness, ends=False,
    )  # fmt: skip


def estimate(run: PlannedRun, hardware: Hardware, placement: GpuPlacement) -> float:
    """Seconds of a step, quickly: in turns the sum, beside each other the longer, with the mean answer's length.

    It chooses between placements alone; what is printed is simulated.
    """
    if not placement.engines:
        return placement.times.learn
    each = -(-run.rows // placement.engines)
    at_once = min(each, slots(run, placement))
    generate = each / at_once * run.mean * token_seconds(run, hardware, placement.tensor_parallel, at_once)
    if placement.shared:  # the last answers of a step are waited for
        generate += (run.answer_tokens - run.mean) * token_seconds(run, hardware, placement.tensor_parallel, 1)
        return generate + placement.times.learn + placement.times.push
    return max(generate, placement.times.learn) + placement.times.push


def candidates(
    run: PlannedRun, hardware: Hardware, *, engine: memory.Engine | None = None, learners: int | None = None
) -> list[GpuPlacement]:
    """The placements that fit, the quickest first. Raises RecipeError, with what is short by how much, where none does."""
    if learners is not None and not 1 <= learners <= hardware.gpus:
        raise RecipeError(f"--learners: between 1 and the {hardware.gpus} GPUs; got {learners}")
    node = hardware.network.per_node
    counts = [learners] if learners else sorted({*_halves(hardware.gpus), *range(node, hardware.gpus + 1, node)})
    found = []
    for workers in counts if run.online else [learners or hardware.gpus]:
        kind = engine or natural(run, workers)
        if kind == "local" and workers > 1:
            continue
        for shared in (False,) if run.beside or run.tensor_parallel > 1 else (False, True):
            options = (
                placed(run, hardware, layout, tensor_parallel=width, shared=shared)
                for layout in layouts(run, kind, workers)
                # an engine over several GPUs has them for itself
                for width in ((1,) if shared else (run.tensor_parallel,) if run.tensor_parallel else (1, 2, 4, 8))
            )
            first = next((one for one in options if one is not None), None)
            found += [first] if first is not None else []
    if not found:
        _refuse(run, hardware, engine)
    return sorted(found, key=lambda one: estimate(run, hardware, one))


def _refuse(run: PlannedRun, hardware: Hardware, engine: memory.Engine | None) -> None:
    """Raises the error that says what is short."""
    kind = engine or natural(run, hardware.gpus)
    workers = 1 if kind == "local" else hardware.gpus
    smallest = [replace(one, max_tokens_per_micro_batch=run.longest) for one in layouts(run, kind, workers)][-1]
    least = needed(parts(run, smallest))
    if least > hardware.usable:
        raise RecipeError(
            f"--gpu-memory: {kind} on all {workers} GPUs needs {least / GIB:.1f} GiB on each, with checkpointing and offload where "
            f"there is any and one row of {run.longest} tokens at a time; {hardware.usable / GIB:.1f} of {hardware.gpu_memory:g} GiB "
            "can be used; take more or larger GPUs, adapters (--model.lora.rank 16), or shorter rows"
        )
    memory.serving(
        run.policy,
        hardware.gpu_memory * GIB,
        context=run.longest,
        tensor_parallel=min(8, hardware.gpus),
        share=run.engine_memory,
        bytes_each=run.engine_bytes,
    )
    raise RecipeError(
        f"--gpus: a learner and an engine do not fit on {hardware.gpus} GPUs of {hardware.gpu_memory:g} GiB, neither beside "
        "each other nor in turns; take more or larger GPUs, or adapters (--model.lora.rank 16)"
    )


def _halves(count: int) -> list[int]:
    """1, 2, 4, ... and the count itself."""
    return [*(1 << power for power in range(count.bit_length())), count]


def _answered(run: PlannedRun, tokens: int) -> int:
    """The answer tokens among so many tokens of a micro-batch, on average."""
    return -(-int(tokens * run.mean) // int(run.prompt_tokens + run.mean))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
