"""The output of `whet plan`: memory per GPU, placements that fit, communication, time per step, and simulated schedule."""

from collections.abc import Sequence
from dataclasses import replace

from whet.errors import RecipeError
from whet.planning import memory, placement, traffic
from whet.planning.memory import GIB, Bytes, Layout
from whet.planning.placement import GpuPlacement, Hardware, PlannedRun
from whet.terminal import visible

BACKENDS: tuple[memory.Backend, ...] = ("ddp", "zero1", "zero2", "zero3", "fsdp")


def report(
    run: PlannedRun,
    hardware: Hardware,
    *,
    title: str = "plan",
    backend: memory.Backend | None = None,
    learners: int | None = None,
) -> str:
    """Return the text for a run on this hardware.

    `backend` and `learners` restrict the choice of placements. Of those that fit, the fastest is reported. Raises
    RecipeError if none fits; the message says how much memory is missing.
    """
    found = placement.candidates(run, hardware, backend=backend, learners=learners)
    best = found[0]
    sections = [
        ("parameters", _parameters(run)),
        ("suggested", _suggested(run, hardware, found)),
        (
            f"memory of a learner's GPU, GiB ({best.layout.backend} on {best.layout.workers})",
            _memory(run, hardware, best),
        ),
        ("the same GPUs under other backends, GiB a GPU", _others(run, hardware, best)),
        ("memory of an engine's GPU, GiB", _serving(run, hardware, best)),
        ("bytes, received by each GPU", _bytes(run, hardware, best)),
        ("where a step's time goes", _time(run, hardware, best)),
        ("schedule, simulated", _schedule(run, hardware, best)),
        ("assumed", _assumed(run, hardware, best)),
    ]
    out = [f"{title}: {hardware.gpus} GPUs of {hardware.gpu_memory:g} GiB"]
    for heading, lines in sections:
        if lines:
            out += ["", f"{heading}:", *(f"  {line}" for line in lines)]
    return visible("\n".join(out), layout=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return aligned lines: the first column left-aligned, the others right-aligned.

    >>> table(["role", "GiB"], [["policy", "1.5"]])
    ['role    GiB', 'policy  1.5']
    """
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        pairs = list(zip(row, widths, strict=True))
        return "  ".join([pairs[0][0].ljust(pairs[0][1]), *(cell.rjust(width) for cell, width in pairs[1:])])

    return [line(row) for row in (head, *rows)]


def _parameters(run: PlannedRun) -> list[str]:
    lines = [f"policy {_count(run.policy.parameters())}" + _active(run)]
    if run.adapters:
        lines[0] += f", of which nothing is trained but adapters of {_count(run.adapters)} (rank {run.lora_rank})"
    if run.critic is not None:
        lines.append(f"critic {_count(run.critic.parameters('scalar'))}")
    return lines + [f"{name} {_count(shape.parameters(head))}" for name, shape, head in placement.others(run)]


def _active(run: PlannedRun) -> str:
    active = run.policy.active_parameters()
    return f" ({_count(active)} of them for one token)" if active != run.policy.parameters() else ""


def _suggested(run: PlannedRun, hardware: Hardware, found: Sequence[GpuPlacement]) -> list[str]:
    best, layout = found[0], found[0].layout
    lines = [
        best.name,
        best.flags,
        f"train.max_tokens_per_micro_batch {layout.max_tokens_per_micro_batch}{_lowered(run, layout)}",
    ]
    if layout.checkpointing and not run.checkpointing:
        lines.append("model.gradient_checkpointing true: without it not one row fits")
    if layout.offload and not run.offload:
        lines.append("learner.offload true: without it not one row fits (its traffic to the host is not in the times)")
    if not run.low_precision and run.held_bytes == 4:
        faster = placement.times(run, replace(layout, low_precision=True), hardware, 0.0)
        lines.append(
            f"--learner.precision bf16 would compute in bfloat16: measure and update {_seconds(faster.learn)} instead of "
            f"{_seconds(best.times.learn)}"
        )
    other = next((one for one in found if one.shared != best.shared), None)
    if other is not None and best.engines:
        mine, theirs = (placement.estimate(run, hardware, one) for one in (best, other))
        lines.append(f"next best: {other.name} (about {theirs / mine:.2f} x the time of a step)")
    return lines


def _lowered(run: PlannedRun, layout: Layout) -> str:
    if layout.max_tokens_per_micro_batch == run.max_tokens_per_micro_batch:
        return " (the recipe's)"
    if layout.max_tokens_per_micro_batch > run.max_tokens_per_micro_batch:
        return f" (the longest row; the recipe's {run.max_tokens_per_micro_batch} is shorter)"
    return f" (the recipe's {run.max_tokens_per_micro_batch} does not fit)"


def _memory(run: PlannedRun, hardware: Hardware, best: GpuPlacement) -> list[str]:
    parts = placement.parts(run, best.layout)
    rows = [_row(one.name, one.bytes, one.activations.peak if one.activations else 0.0) for one in parts]
    head = ["role", "weights", "gradients", "optimizer", "resident", "gathered", "activations", "on the host"]
    states = sum(one.bytes.states for one in parts)
    total = placement.needed(parts)
    return [
        *table(head, rows),
        f"resident {_gib(states)} + the largest role's gathered weights and activations {_gib(total - states)} = {_gib(total)} GiB: "
        + _verdict(total, hardware.usable),
    ]


def _row(name: str, size: Bytes, peak: float) -> list[str]:
    cells = (size.weights, size.gradients, size.optimizer, size.states, size.working, peak, size.host)
    return [name, *(_gib(one) for one in cells)]


def _verdict(total: float, usable: float) -> str:
    if total <= usable:
        return f"fits, {_gib(usable - total)} of {_gib(usable)} GiB left"
    return f"{_gib(total - usable)} GiB more than the {_gib(usable)} that can be used"


def _others(run: PlannedRun, hardware: Hardware, best: GpuPlacement) -> list[str]:
    if best.layout.workers == 1:
        return []
    rows = []
    for backend in BACKENDS if run.optim == "adamw" else ("ddp",):
        layout = replace(best.layout, backend=backend, low_precision=run.low_precision, offload=False)
        total = placement.needed(placement.parts(run, layout))
        rows.append([backend, _gib(total), _verdict(total, hardware.usable)])
    width = max(len(row[1]) for row in rows)
    return [f"{backend:<6} {total:>{width}}  {verdict}" for backend, total, verdict in rows]


def _serving(run: PlannedRun, hardware: Hardware, best: GpuPlacement) -> list[str]:
    serving = best.serving
    if serving is None:
        return []
    each = run.policy.kv_bytes(run.engine_bytes)
    lines = [
        f"weights {_gib(serving.weights)}, cache {_gib(serving.cache)} = {serving.tokens} tokens of {each} bytes"
        + (f" over {best.tensor_parallel} GPUs" if best.tensor_parallel > 1 else ""),
        f"{serving.sequences} answers of {run.longest} tokens at once; {placement.slots(run, best)} are used",
    ]
    if best.shared:
        lines.append("beside the resident memory of the learner; they sleep while it trains (generator.sleep)")
    return lines


def _bytes(run: PlannedRun, hardware: Hardware, best: GpuPlacement) -> list[str]:
    measured, updated = best.times.received
    speed = hardware.network.ring(best.layout.workers)
    lines = [
        f"{name}: weights gathered {_gib(one.gathered)}{_reduced(one)} GiB a step, "
        f"{_seconds(one.total / speed)} at {speed / 1e9:g} GB/s"
        for name, one in (("measure", measured), ("update", updated))
        if one.total
    ]
    if best.engines:
        held = "bfloat16" if run.lora_rank and run.held_bytes == 2 else "float32"
        what = "the adapter" if run.push_adapter and run.adapters else f"{held} weights"
        sent = f"then {_gib(best.push.received)} GiB to every engine's GPU ({_gib(best.push.everywhere)} GiB in all)"
        sent = "then handed over on each GPU" if not best.push.received else sent
        lines.append(
            f"push: {what}, {_gib(best.push.gathered)} GiB gathered by the learner, {sent}, {_seconds(best.push.seconds)}"
        )
        if best.push.held:
            lines.append(f"in the memory of each node with engines: up to {_gib(best.push.held)} GiB of files for it")
    gathered = traffic.columns(best.layout, rows=run.rows, tokens=run.answer_tokens, count=run.columns)
    lines.append(
        f"columns: {run.columns} of {run.rows} x {run.answer_tokens} numbers, at most {gathered / 2**20:.1f} MiB"
    )
    return lines


def _reduced(one: traffic.Traffic) -> str:
    return f" + gradients reduced {_gib(one.reduced)}" if one.reduced else ""


def _time(run: PlannedRun, hardware: Hardware, best: GpuPlacement) -> list[str]:
    times = best.times
    rows: list[tuple[str, float, str]] = []
    if best.engines:
        outcome = placement.simulated(run, hardware, best, 0)
        rows.append(("generate", sum(one.collected - one.began for one in outcome.steps) / len(outcome.steps), ""))
    both = zip(("measure", "update"), (times.measure, times.update), times.computed, times.sent, strict=True)
    for name, total, computed, sent in both:
        note = f"computation {_seconds(computed)}, communication {_seconds(sent)}: the longer time counts"
        rows.append((name, total, note if sent else ""))
    if best.engines:
        rows.append(("push", times.push, "engines pause"))
    whole = sum(took for _, took, _ in rows)
    return [
        *(f"{name:<9} {_seconds(took):>9}  {took / whole:4.0%}  {note}".rstrip() for name, took, note in rows),
        f"{'serial':<9} {_seconds(whole):>9}",
    ]


def _schedule(run: PlannedRun, hardware: Hardware, best: GpuPlacement) -> list[str]:
    if not best.engines:
        return []
    if best.shared:
        return ["engines and learner take turns on the same GPUs, so there is nothing to overlap: max_staleness 0"]
    rows = []
    for staleness in (0, 1, 2):
        outcome = placement.simulated(run, hardware, best, staleness)
        later = outcome.steps[staleness + 1 :]
        seconds = (later[-1].ended - outcome.steps[staleness].ended) / len(later)
        ages = ", ".join(f"{age}: {count}" for age, count in outcome.staleness.items())
        shares = (outcome.engines_busy, outcome.slots_used, outcome.learner_busy)
        rows.append([str(staleness), _seconds(seconds), *(f"{share:.0%}" for share in shares), ages])
    head = ["max_staleness", "a step", "engines busy", "slots used", "learner busy", "groups by age"]
    return table(head, rows)


def _assumed(run: PlannedRun, hardware: Hardware, best: GpuPlacement) -> list[str]:
    network = hardware.network
    low_precision = best.layout.low_precision or run.held_bytes == 2
    speed = hardware.low_precision_flops if low_precision else hardware.single_flops
    dtype = "in bfloat16" if low_precision else "in float32"
    lines = [
        f"{hardware.usable / GIB:.1f} of {hardware.gpu_memory:g} GiB can be used ({hardware.reserve:.0%} for driver, buffers, fragments); "
        f"a vLLM engine takes {run.engine_memory:.0%} with 2 GiB for its own passes",
        f"computation {dtype}, at {speed / 1e12:g} TFLOP/s: {hardware.training:.0%} reached in updates, {hardware.reading:.0%} in "
        f"forwards; {hardware.bandwidth / 1e12:g} TB/s of memory, {hardware.decoding:.0%} reached while decoding (H100 SXM)",
        f"network: {network.inside / 1e9:g} GB/s a GPU within a node of {network.per_node}, {network.between / 1e9:g} GB/s a GPU "
        f"between nodes, {network.host / 1e9:g} GB/s for files in a node's memory",
    ]
    rows = f"{run.rows} rows a step of {run.prompt_tokens} prompt tokens"
    if run.online:
        rows += f" and {run.mean:g} answer tokens on average (at most {run.answer_tokens}; log-normal, deviation 0.6 of the logarithm)"
        wide = f"{run.prompts * run.policy.forward_flops(run.prompt_tokens, context=run.prompt_tokens / 2, head_tokens=1):.2g}"
        lines.append(f"reading the prompts before decoding ({wide} FLOP a step) and reward functions take no time")
    else:
        rows += f" and {run.mean:g} others"
    return [*lines, f"{rows}; {run.updates} updates x {run.epochs} epochs"]


def _count(number: int) -> str:
    return f"{number / 1e9:.3f}B" if number >= 1e8 else f"{number / 1e6:.3f}M"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= 0.05 * GIB or not size else f"{size / GIB:.3f}"


def _seconds(seconds: float) -> str:
    """Format a duration with about three significant digits, in s, ms or us.

    >>> [_seconds(one) for one in (12.34, 1.234, 0.01234, 0.00001234, 0.0)]
    ['12.3 s', '1.23 s', '12.3 ms', '12.3 us', '0 s']
    """
    for least, unit, name in ((0.0995, 1.0, "s"), (9.95e-5, 1e-3, "ms"), (0.0, 1e-6, "us")):
        if seconds > least:
            return f"{seconds / unit:.{1 if seconds / unit >= 9.95 or unit < 1 else 2}f} {name}"
    return "0 s"


def parse_backend(name: str) -> memory.Backend:
    """Return the backend with this name. Raises RecipeError for an unknown name."""
    if name not in ("local", *BACKENDS):
        raise RecipeError(f"learner.backend: one of local, {', '.join(BACKENDS)}; got {name!r}")
    return name  # type: ignore[return-value]
