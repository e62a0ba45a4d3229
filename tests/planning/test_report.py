"""The plan's numbers by hand, what it promises to fit does, what cannot be is told, and the page's examples are fresh."""

import re
from dataclasses import replace

import pytest

from whet.errors import RecipeError
from whet.planning import Hardware, Layout, Network, PlannedRun, Shape, parse_backend, placement, report
from whet.planning.memory import GIB

from . import page

SMALL = Shape("llama", hidden=512, layers=4, heads=8, kv_heads=4, head_dim=64, intermediate=1024, vocabulary=4096)
RUN = PlannedRun(SMALL, critic=SMALL, reference=SMALL, rewards=(("judge", SMALL),), prompts=16, num_generations=2, prompt_tokens=30,
          answer_tokens=40, mean_answer=20, updates=2, epochs=3, max_tokens_per_micro_batch=64)  # fmt: skip


def lines(run: PlannedRun = RUN, hardware: Hardware = Hardware(1, 4.0), **choice: object) -> list[str]:
    return [line.strip() for line in report(run, hardware, **choice).splitlines()]  # type: ignore[arg-type]


def test_the_examples_of_the_page_are_fresh() -> None:
    assert page.PAGE.read_text() == page.text(), "run python -m tests.planning.page"


def test_the_table_by_hand() -> None:
    """P = 2 x 4096 x 512 + 4 x (2 x 512 x 512 + 2 x 512 x 256 + 3 x 512 x 1024 + 1024) + 512 = 13,636,096 numbers."""
    assert SMALL.parameters() == 13_636_096
    told = lines(replace(RUN, rewards=(), critic=None))
    policy = next(line for line in told if line.startswith("policy ") and "M" not in line)
    whole = 4 * 13_636_096 / GIB  # 0.0508
    assert policy.split()[1:5] == [
        f"{one:.1f}" if one >= 0.05 else f"{one:.3f}" for one in (whole, whole, 2 * whole, 4 * whole)
    ]
    reference = next(line for line in told if line.startswith("reference ") and "M" not in line)
    assert reference.split()[1:6] == [f"{whole:.1f}", "0.0", "0.0", f"{whole:.1f}", "0.0"]


def test_every_role_is_there_once() -> None:
    roles = [one.name for one in placement.parts(replace(RUN, average=True), Layout("fsdp", 4))]
    assert roles == ["policy", "critic", "reference", "judge", "ema"]
    under = [one.name for one in placement.parts(replace(RUN, reference=None, lora_rank=4, one_trunk=True), Layout())]
    assert under == ["policy", "critic"]


def test_roles_take_turns() -> None:
    parts = placement.parts(RUN, Layout())
    peaks = [one.activations.peak for one in parts if one.activations]
    assert len(peaks) == 2
    assert placement.needed(parts) == sum(one.bytes.states for one in parts) + max(peaks)


def test_a_critic_on_the_policys_trunk_is_its_adapters_alone() -> None:
    own = placement.parts(replace(RUN, lora_rank=4, one_trunk=True), Layout("fsdp", 4))[1].bytes
    count = SMALL.adapter_parameters(4)
    assert (own.weights, own.gradients, own.optimizer) == (count, count, 2 * count)  # 4, 4 and 8 bytes over 4 workers


@pytest.mark.parametrize("memory", [0.6, 0.8, 1.0, 2.0])
@pytest.mark.parametrize("gpus", [1, 3, 8])
def test_what_is_promised_to_fit_does_and_more_would_not(gpus: int, memory: float) -> None:
    run, hardware = replace(RUN, max_tokens_per_micro_batch=1 << 14, online=False), Hardware(gpus, memory)
    for one in placement.candidates(run, hardware):
        assert placement.needed(placement.parts(run, one.layout)) <= hardware.usable
        if one.layout.max_tokens_per_micro_batch < run.max_tokens_per_micro_batch:
            more = replace(one.layout, max_tokens_per_micro_batch=2 * one.layout.max_tokens_per_micro_batch)
            assert placement.needed(placement.parts(run, more)) > hardware.usable
        assert one.layout.max_tokens_per_micro_batch >= run.longest


def test_a_placement_uses_no_more_gpus_than_there_are() -> None:
    hardware = Hardware(6, 10.0)
    found = placement.candidates(RUN, hardware)
    assert {one.shared for one in found} == {True, False}
    for one in found:
        beside = 0 if one.shared else one.layout.workers
        assert beside + one.engines * one.tensor_parallel <= 6
    chosen = placement.candidates(RUN, hardware, backend="zero2", learners=2)
    assert {(one.layout.backend, one.layout.workers) for one in chosen} == {("zero2", 2)}


def test_the_flags_of_a_placement_are_a_recipes() -> None:
    from whet.cli.main import parsed
    from whet.runs import config
    from whet.runs.recipe import OnlineRecipe

    for one in placement.candidates(RUN, Hardware(6, 10.0)):
        recipe = config.resolve(OnlineRecipe, "ppo", None, parsed(one.flags.split())[1])
        assert recipe.learner.backend == one.layout.backend
        assert (recipe.cluster.learners, recipe.cluster.engines) == (one.layout.workers, one.engines)
        assert recipe.cluster.colocate == recipe.generator.options.get("sleep", False) == one.shared
        assert recipe.generator.options.get("tensor_parallel", 1) == one.tensor_parallel
        assert recipe.train.max_tokens_per_micro_batch == one.layout.max_tokens_per_micro_batch
    ahead = placement.candidates(replace(RUN, beside=True, tensor_parallel=2), Hardware(6, 10.0))
    assert {(one.shared, one.tensor_parallel) for one in ahead} == {(False, 2)}


def test_seconds_by_hand() -> None:
    """One GPU that reaches everything it promises: 32 rows of 50 tokens, 20 of them answer."""
    hardware = Hardware(1, 1.0, single_flops=1e9, training=1.0, reading=1.0)
    once = SMALL.forward_flops(1600, context=25, head_tokens=640)
    headless = SMALL.forward_flops(1600, context=25, head_tokens=0)
    took = placement.times(RUN, Layout(max_tokens_per_micro_batch=64), hardware, 0.0)
    assert took.measure == pytest.approx((2 * once + 2 * headless) / 1e9)  # policy, reference; critic, reward
    assert took.update == pytest.approx(3 * 3 * (once + headless) / 1e9)  # three epochs
    assert took.sent == (0, 0)
    light = replace(RUN, critic=None, rewards=(), reference=None, lora_rank=4, base_read=True)
    took = placement.times(light, Layout(max_tokens_per_micro_batch=64), hardware, 0.0)
    assert took.measure == pytest.approx(2 * once / 1e9)


def test_traffic_counts_micro_batches() -> None:
    """1600 tokens in two updates over 2 workers: 800 / (2 x 64) -> 7 micro-batches each, 14 in an epoch."""
    hardware = Hardware(2, 1.0, network=Network(inside=1e6))
    run = replace(RUN, critic=None, rewards=())
    took = placement.times(run, Layout("fsdp", 2, max_tokens_per_micro_batch=64), hardware, 0.0)
    count = SMALL.parameters()
    assert took.received[0].gathered == pytest.approx(14 * 2 * 4 * count / 2)  # policy and reference
    assert took.received[1].gathered == pytest.approx(3 * 14 * 4 * 2 * count / 2)
    assert took.received[1].reduced == pytest.approx(3 * 14 * 4 * count / 2)
    assert took.sent[1] == pytest.approx(took.received[1].total / 1e6)
    assert took.update == max(took.computed[1], took.sent[1])


def test_decoding_waits_for_memory_and_then_for_operations() -> None:
    hardware = Hardware(1, 1.0, bandwidth=1e6, decoding=1.0, low_precision_flops=1e18)
    read = 2 * SMALL.parameters() + 5 * 40 * SMALL.kv_bytes()  # 30 + 20 / 2 tokens of context
    assert placement.token_seconds(RUN, hardware, 1, 5) == pytest.approx(read / 1e6)
    assert placement.token_seconds(RUN, hardware, 2, 5) == pytest.approx(read / 2e6)
    slow = replace(hardware, low_precision_flops=1.0, reading=1.0)
    assert placement.token_seconds(RUN, slow, 1, 5) == pytest.approx(5 * SMALL.forward_flops(1, context=40))


def test_an_offline_run_has_no_engines() -> None:
    told = lines(replace(RUN, online=False, rewards=(), critic=None), Hardware(4, 2.0), title="dpo")
    assert told[0] == "dpo: 4 GPUs of 2 GiB"
    assert "learner fsdp on 4 GPUs" in told
    assert not any(line.startswith(("generate", "push", "schedule", "max_staleness")) for line in told)


def test_every_assumption_has_its_number() -> None:
    hardware = Hardware(8, 10.0, Network(200e9, 12e9, 4), training=0.31, reading=0.47, decoding=0.53, reserve=0.11)
    told = "\n".join(lines(RUN, hardware))
    assumed = told[told.index("assumed:") :]
    for number in (
        "11%",
        "31%",
        "47%",
        "53%",
        "67 TFLOP/s",
        "3.35 TB/s",
        "200 GB/s",
        "12 GB/s",
        "node of 4",
        "32 rows",
        "20 answer",
    ):
        assert number in assumed, number


def test_ahead_a_step_is_shorter_and_the_ages_stay_within_the_bound() -> None:
    told = "\n".join(lines(page.PPO, Hardware(64, 80.0)))
    rows = re.findall(r"^([012]) +([\d.]+) s +\d+% .*?((?:\d+: \d+(?:, )?)+)$", told, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [0, 1, 2]
    seconds = [float(row[1]) for row in rows]
    assert seconds == sorted(seconds, reverse=True)
    assert all(max(int(age) for age in re.findall(r"(\d+):", row[2])) <= int(row[0]) for row in rows)


def test_half_precision_is_offered_and_taken() -> None:
    told = lines(RUN, Hardware(4, 4.0))
    assert any(line.startswith("--learner.precision bf16 would compute in bfloat16") for line in told)
    low_precision = "\n".join(lines(replace(RUN, low_precision=True), Hardware(4, 4.0)))
    assert "learner.precision bf16 would" not in low_precision
    assert "computation in bfloat16, at 989 TFLOP/s" in low_precision
    assert "learner local on 1 GPU" in "\n".join(lines(replace(RUN, low_precision=True)))


def test_muon_is_planned_where_matrices_are_whole() -> None:
    told = "\n".join(lines(replace(RUN, optim="muon"), Hardware(4, 4.0), learners=2))
    assert "learner ddp on 2 GPUs" in told
    assert "zero2" not in told


def test_what_was_changed_to_fit_is_said() -> None:
    run = replace(RUN, max_tokens_per_micro_batch=1 << 15, online=False)
    assert any("(the recipe's 32768 does not fit)" in line for line in lines(run, Hardware(1, 1.2)))
    assert "train.max_tokens_per_micro_batch 70 (the longest row; the recipe's 64 is shorter)" in lines()


@pytest.mark.parametrize(
    ("run", "hardware", "choice", "what"),
    [
        ({}, {"gpus": 0}, {}, "--gpus: above 0; got 0"),
        ({}, {"gpu_memory": -1.0}, {}, "--gpu-memory: above 0; got -1.0"),
        ({}, {}, {"learners": 3}, "--learners: between 1 and the 1 GPUs; got 3"),
        ({}, {"gpu_memory": 0.1}, {}, r"--gpu-memory: local on all 1 GPUs needs 0.\d GiB on each, .* use more or larger GPUs"),
        ({}, {"gpu_memory": 2.0}, {}, "--gpu-memory: an engine's weights"),
        ({"mean_answer": 50}, {}, {}, "--mean-answer: between 1 and the longest answer, 40 tokens .* got 50"),
        ({"prompts": 0}, {}, {}, "prompts: at least 1; got 0"),
        ({"engine_memory": 1.2}, {}, {}, "generator.gpu_memory_utilization: must be above 0 and at most 1; got 1.2"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told(run: dict, hardware: dict, choice: dict, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        report(replace(RUN, **run), Hardware(**({"gpus": 1, "gpu_memory": 1.0} | hardware)), **choice)


def test_an_unknown_engine_is_told() -> None:
    assert parse_backend("zero2") == "zero2"
    with pytest.raises(RecipeError, match=r"learner.backend: one of local, ddp, .* got 'fdsp'"):
        parse_backend("fdsp")
