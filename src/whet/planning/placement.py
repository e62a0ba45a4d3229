"""Placements of learner and engines on GPUs: which fit, with which micro-batch size, and the time of each part of a step."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from whet.errors import RecipeError
from whet.planning import memory, traffic
from whet.planning.memory import GIB, Activations, Bytes, Layout, Serving
from whet.planning.run import Hardware, PlannedRun
from whet.planning.schedule import Outcome, simulate
from whet.planning.shape import Shape
from whet.planning.traffic import Traffic


@dataclass(frozen=True)
class StepPhase:
    """Memory of one role on one GPU of the learner."""

    name: str
    bytes: Bytes
    activations: Activations | None = None


@dataclass(frozen=True)
class Times:
    """Seconds of the parts of one step. Computation and communication overlap, so the longer of the two counts."""

    measure: float
    update: float
    push: float
    computed: tuple[float, float]
    """seconds of computation of (measure, update)"""
    sent: tuple[float, float]
    """seconds of communication of (measure, update)"""
    received: tuple[Traffic, Traffic]
    """bytes that each GPU receives in (measure, update)"""

    @property
    def learn(self) -> float:
        """Seconds of measure and update together."""
        return self.measure + self.update


@dataclass(frozen=True)
class GpuPlacement:
    """A learner on `layout.workers` GPUs, and engines on other GPUs or, with `shared`, on the same GPUs."""

    layout: Layout
    engines: int
    tensor_parallel: int
    shared: bool
    serving: Serving | None
    times: Times
    push: traffic.WeightPush

    @property
    def name(self) -> str:
        """Description of the placement for the report."""
        learner = f"learner {self.layout.backend} on {_counted(self.layout.workers, 'GPU')}"
        if not self.engines:
            return learner
        each = f" of {self.tensor_parallel} GPUs" if self.tensor_parallel > 1 else ""
        where = "on the same GPUs, alternating" if self.shared else "beside it"
        return f"{learner}, {_counted(self.engines, 'engine')}{each} {where}"

    @property
    def flags(self) -> str:
        """The command line options for this placement."""
        layout, engines = self.layout, self.engines
        words = {
            f"--learner {layout.backend}": True,
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
    """Return the memory of every role on one GPU of the learner."""
    held, rank = run.held_bytes if run.lora_rank else 4, run.lora_rank
    out = []
    for name, shape, head in (("policy", run.policy, "language"), ("critic", run.critic, "scalar")):
        if shape is None:
            continue
        adapters = shape.adapter_parameters(rank, run.lora_targets) if rank else 0
        size = memory.trained(shape, layout, head=head, adapters=adapters, base_bytes=held, optim=run.optim)
        if run.one_trunk and name == "critic":  # the base is already counted
            alone = memory.trained(shape, Layout(), adapters=adapters)
            over = layout.workers if layout.backend != "ddp" else 1
            size = Bytes(4 * adapters / over, alone.gradients / over, alone.optimizer / over)
        read = memory.activations(
            shape, layout.max_tokens_per_micro_batch, bytes_each=layout.computes_in(held), checkpointing=layout.checkpointing,
            head_tokens=_answered(run, layout.max_tokens_per_micro_batch), head=head, rank=rank, autocast=layout.autocasts(held),
        )  # fmt: skip
        out.append(StepPhase(name, size, read))
    for name, shape, head in others(run):
        out.append(StepPhase(name, memory.frozen(shape, layout, head=head, bytes_each=run.held_bytes)))
    return out


def others(run: PlannedRun) -> list[tuple[str, Shape, str]]:
    """Return (name, shape, head) of the frozen roles that are separate models."""
    out = [("reference", run.reference, "language")] if run.reference is not None else []
    out += [] if run.one_trunk else [(name, shape, "scalar") for name, shape in run.rewards]
    return out + ([("ema", run.policy, "language")] if run.average else [])  # type: ignore[return-value]


def needed(parts_: list[StepPhase]) -> float:
    """Return the bytes on a learner's GPU: the states of all roles, and the working memory and activations of the largest.

    Roles do not compute at the same time: forward and backward of one role's micro-batch end before those of the next role.
    """
    now = [one.bytes.working + (one.activations.peak if one.activations else 0.0) for one in parts_]
    return sum(one.bytes.states for one in parts_) + max(now)


def fitting(run: PlannedRun, layout: Layout, usable: float) -> Layout | None:
    """Return the layout with the most micro-batch tokens that fit, at most the recipe's or those of the longest row.

    None if not even one row fits.
    """
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


def layouts(run: PlannedRun, backend: memory.Backend, workers: int) -> Iterator[Layout]:
    """Yield the layouts of a backend to try, from the recipe's own to the slowest with the least memory."""
    first = Layout(
        backend,
        workers,
        run.low_precision,
        run.offload,
        checkpointing=run.checkpointing,
        max_tokens_per_micro_batch=run.max_tokens_per_micro_batch,
    )
    yield first
    if not run.checkpointing:
        yield replace(first, checkpointing=True)
    if not run.offload and backend not in ("local", "ddp"):
        yield replace(first, checkpointing=True, offload=True)


def natural(run: PlannedRun, workers: int) -> memory.Backend:
    """Return the default backend: local for one worker, ddp for an optimizer that needs whole matrices, otherwise fsdp."""
    if workers == 1 and not run.offload:
        return "local"
    return "ddp" if run.optim != "adamw" else "fsdp"


def times(run: PlannedRun, layout: Layout, hardware: Hardware, pushed: float) -> Times:
    """Estimate the seconds of measure and update of one step. `pushed` is the seconds of the weight update of the engines."""
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
    """Return the seconds in which an engine decodes one token in each of `active` slots.

    This is the longer of two times: reading all weights and the KV cache of the active sequences from memory (Pope et al.
    2022, section 2.1), and the arithmetic, which dominates with many active slots.
    """
    context = run.prompt_tokens + run.mean / 2
    size, flops = run.engine_bytes, hardware.low_precision_flops if run.engine_bytes == 2 else hardware.single_flops
    read = (size * run.policy.parameters() + active * context * run.policy.kv_bytes(size)) / tensor_parallel
    worked = active * run.policy.forward_flops(1, context=context) / tensor_parallel
    return max(read / (hardware.bandwidth * hardware.decoding), worked / (flops * hardware.reading))


def placed(
    run: PlannedRun, hardware: Hardware, layout: Layout, *, tensor_parallel: int, shared: bool
) -> GpuPlacement | None:
    """Return the placement with this learner, or None if it does not fit."""
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
    resident = sum(one.bytes.states for one in parts(run, fits)) if shared else 0.0
    try:
        serving = memory.serving(
            run.policy,
            hardware.gpu_memory * GIB - resident,
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
        direct=fits.workers == engines == 1 and not (run.beside or run.push_adapter),
    )  # fmt: skip
    return GpuPlacement(
        fits, engines, tensor_parallel, shared, serving, times(run, fits, hardware, pushed.seconds), pushed
    )


def slots(run: PlannedRun, placement: GpuPlacement) -> int:
    """Return the number of answers that one engine decodes at once: those that fit into its cache, at most 256 (vLLM's
    `max_num_seqs`)."""
    assert placement.serving is not None
    return min(placement.serving.sequences, 256)


def simulated(run: PlannedRun, hardware: Hardware, placement: GpuPlacement, max_staleness: int) -> Outcome:
    """Simulate a few steps: at least 4 + `max_staleness`, and up to 12 as long as there are at most about 20,000 answers."""
    number = max(4 + max_staleness, min(12, 20_000 // run.rows))
    return simulate(
        steps=number, prompts=run.prompts, num_generations=run.num_generations, length=run.lengths(), engines=placement.engines,
        slots=slots(run, placement),
        token_seconds=lambda active: token_seconds(run, hardware, placement.tensor_parallel, active),
        learn_seconds=placement.times.learn, push_seconds=placement.times.push, max_staleness=max_staleness, ends=False,
    )  # fmt: skip


def estimate(run: PlannedRun, hardware: Hardware, placement: GpuPlacement) -> float:
    """Return a quick estimate of the seconds of a step, with the mean answer length.

    If engines and learner share GPUs it is the sum of their times, otherwise the longer time. It is used only to choose
    between placements; the report prints simulated times.
    """
    if not placement.engines:
        return placement.times.learn
    each = -(-run.rows // placement.engines)
    at_once = min(each, slots(run, placement))
    generate = each / at_once * run.mean * token_seconds(run, hardware, placement.tensor_parallel, at_once)
    if placement.shared:  # the learner waits for the longest answers of a step
        generate += (run.answer_tokens - run.mean) * token_seconds(run, hardware, placement.tensor_parallel, 1)
        return generate + placement.times.learn + placement.times.push
    return max(generate, placement.times.learn) + placement.times.push


def candidates(
    run: PlannedRun, hardware: Hardware, *, backend: memory.Backend | None = None, learners: int | None = None
) -> list[GpuPlacement]:
    """Return the placements that fit, the fastest first.

    Raises RecipeError if none fits; the message says how much memory is missing.
    """
    if learners is not None and not 1 <= learners <= hardware.gpus:
        raise RecipeError(f"--learners: between 1 and the {hardware.gpus} GPUs; got {learners}")
    node = hardware.network.per_node
    counts = [learners] if learners else sorted({*_halves(hardware.gpus), *range(node, hardware.gpus + 1, node)})
    found = []
    for workers in counts if run.online else [learners or hardware.gpus]:
        kind = backend or natural(run, workers)
        if kind == "local" and workers > 1:
            continue
        for shared in (False,) if run.beside or run.tensor_parallel > 1 else (False, True):
            options = (
                placed(run, hardware, layout, tensor_parallel=width, shared=shared)
                for layout in layouts(run, kind, workers)
                # an engine over several GPUs does not share them with the learner
                for width in ((1,) if shared else (run.tensor_parallel,) if run.tensor_parallel else (1, 2, 4, 8))
            )
            first = next((one for one in options if one is not None), None)
            found += [first] if first is not None else []
    if not found:
        _refuse(run, hardware, backend)
    return sorted(found, key=lambda one: estimate(run, hardware, one))


def _refuse(run: PlannedRun, hardware: Hardware, backend: memory.Backend | None) -> None:
    """Raise RecipeError with the reason why no placement fits."""
    kind = backend or natural(run, hardware.gpus)
    workers = 1 if kind == "local" else hardware.gpus
    smallest = [replace(one, max_tokens_per_micro_batch=run.longest) for one in layouts(run, kind, workers)][-1]
    least = needed(parts(run, smallest))
    if least > hardware.usable:
        raise RecipeError(
            f"--gpu-memory: {kind} on all {workers} GPUs needs {least / GIB:.1f} GiB on each, with checkpointing and offload if "
            f"supported, for one row of {run.longest} tokens at a time; {hardware.usable / GIB:.1f} of {hardware.gpu_memory:g} GiB "
            "can be used; use more or larger GPUs, adapters (--model.lora.rank 16), or shorter rows"
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
        f"--gpus: a learner and an engine do not fit on {hardware.gpus} GPUs of {hardware.gpu_memory:g} GiB, neither on "
        "separate GPUs nor on shared ones; use more or larger GPUs, or adapters (--model.lora.rank 16)"
    )


def _halves(count: int) -> list[int]:
    """Return the powers of two up to `count`, and `count`."""
    return [*(1 << power for power in range(count.bit_length())), count]


def _answered(run: PlannedRun, tokens: int) -> int:
    """Return the mean number of answer tokens among `tokens` tokens of a micro-batch."""
    return -(-int(tokens * run.mean) // int(run.prompt_tokens + run.mean))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
