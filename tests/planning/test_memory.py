"""Bytes by formula against bytes of real models, gradients, optimizers, saved activations and caches, at tiny sizes."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from whet import ops
from whet.data import Batch, Row
from whet.errors import RecipeError
from whet.learner import ddp as replica
from whet.learner.state import CONSTANTS, optimizers_of
from whet.methods.options import LoRA, Optim
from whet.models import load, lora
from whet.models.load import decoder_layers
from whet.models.readers import read
from whet.models.roles import Role
from whet.ops import head
from whet.planning import Layout, Shape, frozen, memory, serving, trained
from whet.planning.memory import GIB

WIDE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}


def shape_of(model: Any) -> Shape:
    return Shape.of(model.config.to_dict())


def rows(count: int = 3, length: int = 64, start: int = 16) -> list[Row]:
    mask = torch.ones(length - start, dtype=torch.bool)
    return [Row(torch.arange(length) % 20, start, mask) for _ in range(count)]


def role(kind: str, rank: int = 0, **changes: Any) -> Role:
    model = tiny.causal_lm(kind, **changes)
    if not rank:
        return Role("policy", model, True)
    return Role(
        "policy", model, True, wrapped=lora.attach(model, LoRA(rank=rank), ("policy",), seed=0), adapter="policy"
    )


def step(one: Role, *, muon: bool = False) -> tuple[int, int, int]:
    """Bytes of (weights, gradients, moments) after a real step of real optimizers."""
    read(one, Batch.of(rows()), frozenset({"logp"}))["logp"].sum().backward()
    own = [parameter for parameter in one.parameters().values() if parameter.grad is not None]
    inside = (
        {id(p) for layer in decoder_layers(one.model) for p in layer.parameters() if p.ndim == 2} if muon else set()
    )
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW([p for p in own if id(p) not in inside])]
    if muon:
        optimizers.append(torch.optim.Muon([p for p in own if id(p) in inside]))
    moments = 0
    for optimizer in optimizers:
        optimizer.step()
        for state in optimizer.state.values():
            moments += sum(value.nbytes for value in state.values() if value.ndim)  # AdamW's step counters are scalars
    weights = {p.data_ptr(): p.nbytes for p in one.model.parameters()}
    return sum(weights.values()), sum(p.grad.nbytes for p in own if p.grad is not None), moments


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_states_are_those_of_a_real_optimizer(kind: str) -> None:
    one = role(kind)
    size = trained(shape_of(one.model), Layout())
    assert (size.weights, size.gradients, size.optimizer) == step(one)
    assert size.working == size.host == 0


def test_muon_has_one_moment_for_matrices_inside_the_layers() -> None:
    one = role("qwen3")
    assert trained(shape_of(one.model), Layout(), optim="muon").optimizer == step(one, muon=True)[2]


def test_moments_in_8_bits_have_the_bytes_of_the_library() -> None:
    one = role("llama", hidden_size=128, intermediate_size=256)  # every matrix is large enough for 8 bits
    read(one, Batch.of(rows()), frozenset({"logp"}))["logp"].sum().backward()
    moments = 0
    for optimizer, _ in optimizers_of(one, Optim(kind="adamw_8bit")):
        optimizer.step()
        for state in optimizer.state.values():
            own = {name: value for name, value in state.items() if name not in CONSTANTS and torch.is_tensor(value)}
            moments += sum(value.nbytes for value in own.values() if value.ndim)
    assert trained(shape_of(one.model), Layout(), optim="adamw_8bit").optimizer == moments


@pytest.mark.parametrize(("dtype", "held"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_adapters_alone_have_gradients_and_moments(dtype: torch.dtype, held: int) -> None:
    one = role("qwen3", rank=4, dtype=dtype)
    shape = shape_of(one.model)
    size = trained(shape, Layout(), adapters=shape.adapter_parameters(4), base_bytes=held)
    assert (size.weights, size.gradients, size.optimizer) == step(one)


def kept(one: Role) -> int:
    """Bytes of all storages that a forward through `read` keeps for the backward, parameters left out, each once."""
    parameters = {p.untyped_storage().data_ptr() for p in one.model.parameters()}
    found: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = read(one, Batch.of(rows()), frozenset({"logp"}))
    assert out["logp"].requires_grad
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_activations_are_what_a_forward_keeps(kind: str, dtype: torch.dtype, checkpointing: bool) -> None:
    """Within 4 %; what is left over is indices, the rotary table and the positions, which do not grow with the model."""
    one = role(kind, dtype=dtype, **WIDE)
    if checkpointing:
        load.checkpoint_activations(one.model)
    told = memory.activations(
        shape_of(one.model), 3 * 64, bytes_each=dtype.itemsize, checkpointing=checkpointing, head_tokens=3 * 48
    )
    assert told.stored == pytest.approx(kept(one), rel=0.04)
    assert told.stored < kept(one)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_activations_and_copies_of_weights_under_autocast(kind: str, checkpointing: bool) -> None:
    """A forward keeps both; with checkpointing the copies of the layers are made again, one layer at a time."""
    wide = {"n_embd": 64, "n_layer": 3} if kind == "gpt2" else WIDE
    one = role(kind, **wide)
    one.compute_in(True)
    if checkpointing:
        load.checkpoint_activations(one.model)
    shape = shape_of(one.model)
    told = memory.activations(
        shape, 3 * 64, bytes_each=2, checkpointing=checkpointing, head_tokens=3 * 48, autocast=True
    )
    copies = trained(shape, Layout(low_precision=True)).working
    assert copies == 2 * (3 * shape.layer_parameters() + 27 * 64)
    left = copies - 2 * 3 * shape.layer_parameters() * checkpointing
    assert told.stored + left == pytest.approx(kept(one), rel=0.2 if kind == "gpt2" and checkpointing else 0.05)


@pytest.mark.parametrize(("checkpointing", "within"), [(False, 0.01), (True, 0.2)])
def test_activations_of_gpt2(checkpointing: bool, within: float) -> None:
    """Under checkpointing its model keeps one hidden state more than the layers' inputs; in a real depth that is nothing."""
    one = role("gpt2", n_embd=64, n_layer=3)
    if checkpointing:
        load.checkpoint_activations(one.model)
    told = memory.activations(shape_of(one.model), 3 * 64, checkpointing=checkpointing, head_tokens=3 * 48)
    assert told.stored == pytest.approx(kept(one), rel=within)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_activations_under_adapters(kind: str, dtype: torch.dtype) -> None:
    """Within 5 %: the first layer's norm keeps nothing, since no gradient passes it; the formula counts it."""
    one = role(kind, rank=4, dtype=dtype, **WIDE)
    told = memory.activations(shape_of(one.model), 3 * 64, bytes_each=dtype.itemsize, head_tokens=3 * 48, rank=4)
    assert told.stored == pytest.approx(kept(one), rel=0.05)


def test_more_logits_than_the_workspace_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.WORKSPACE == head.WORKSPACE == ops.linear_logprobs.__kwdefaults__["workspace"] == 1 << 25
    one = role("llama", **WIDE)
    whole = memory.activations(shape_of(one.model), 3 * 64, head_tokens=3 * 48).stored
    for function in (ops.linear_logprobs, ops.linear_tokens):
        monkeypatch.setitem(function.__kwdefaults__, "workspace", 1000)
    monkeypatch.setattr(memory, "WORKSPACE", 1000)
    told = memory.activations(shape_of(one.model), 3 * 64, head_tokens=3 * 48)
    assert told.stored == pytest.approx(kept(one), rel=0.01)
    assert whole - told.stored == 4 * 27 * (144 - 18)  # 18 tokens fit into half of it, 8 chunks


def test_a_frozen_head_keeps_no_logits() -> None:
    one = role("llama", rank=4, **WIDE)
    shape = shape_of(one.model)
    told = [memory.activations(shape, 3 * 64, head_tokens=n, rank=4).stored for n in (48, 96)]
    assert told[1] - told[0] == 48 * 4 * shape.hidden


@pytest.mark.parametrize(
    ("kind", "dtype"), [("qwen3", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float32)]
)
def test_the_cache_is_transformers_own(kind: str, dtype: torch.dtype) -> None:
    from transformers import DynamicCache

    from whet.models.load import cache_argument

    model, ids = tiny.causal_lm(kind, dtype=dtype), torch.arange(10).repeat(3, 1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **{cache_argument(model): cache})
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert shape_of(model).kv_bytes(dtype.itemsize) * 30 == held


SMALL = Shape("llama", hidden=8, layers=2, heads=2, kv_heads=1, head_dim=4, intermediate=16, vocabulary=10)


WIDER = replace(SMALL, vocabulary=2**24)


def test_shares_by_hand() -> None:
    """P = 1352, of which a layer has 592 and the ends 168; four workers."""
    assert (SMALL.parameters(), SMALL.layer_parameters(), SMALL.end_parameters()) == (1352, 592, 168)

    def size(engine: Any, **options: Any) -> tuple[float, ...]:
        one = trained(SMALL, Layout(engine, 4, **options))
        return one.weights, one.gradients, one.optimizer, one.host

    whole, quarter = 4 * 1352, 1352
    assert size("ddp") == (whole, whole, 2 * whole, 0)
    assert size("fsdp") == size("fsdp", low_precision=True) == (quarter, quarter, 2 * quarter, 0)
    assert size("fsdp", offload=True) == (0, 0, 0, 4 * quarter)
    # DeepSpeed: weights to compute with (2 bytes in half precision), a float32 share and two moments
    assert size("zero1") == (whole, whole, 3 * quarter, 0)
    assert size("zero1", low_precision=True) == (whole / 2, whole / 2, 3 * quarter, 0)
    assert size("zero2", low_precision=True) == (whole / 2, quarter / 2, 3 * quarter, 0)
    assert size("zero3", low_precision=True) == (quarter / 2, quarter / 2, 3 * quarter, 0)
    assert size("zero2", low_precision=True, offload=True) == (whole / 2, 0, 0, 4 * quarter)
    assert size("zero3", low_precision=True, offload=True) == (0, 0, 0, 4 * quarter + quarter / 2)


def test_what_is_unfolded_by_hand() -> None:
    def size(engine: Any, **options: Any) -> float:
        return trained(SMALL, Layout(engine, 4, **options)).working

    assert size("ddp") == 4 * 1352  # the bucket has room for all
    assert memory.REPLICA_BUCKET == replica.BUCKET
    assert trained(WIDER, Layout("ddp", 4)).working == 4 * (memory.REPLICA_BUCKET + 2**27)
    # root and its gradient; two layers, one gradient, its float32 input to the reduce-scatter
    assert size("fsdp") == 2 * 4 * 168 + 592 * (8 + 4 + 4)
    assert size("fsdp", low_precision=True) == 2 * 2 * 168 + 592 * (4 + 2 + 4)
    assert size("zero2") == 4 * 1352 + 1352
    assert size("zero3") == 4 * 1352 + 1352 + 4 * 1352
    assert frozen(SMALL, Layout("fsdp", 4), bytes_each=2).states == 2 * 1352 / 4
    assert frozen(SMALL, Layout("zero2", 4), bytes_each=2).states == 2 * 1352


def test_an_engine_is_filled_with_blocks() -> None:
    """One layer's token is 2 x 4 x 2 bytes, two layers' 32, a block of 16 tokens 512; 2704 bytes of weights."""
    one = serving(SMALL, 10_000, context=40, share=1.0, reserve=0)
    assert (one.weights, one.tokens, one.sequences) == (2704, (10_000 - 2704) // 512 * 16, 14 // 3)
    wide = serving(SMALL, 10_000, context=40, tensor_parallel=2, share=1.0, reserve=0)
    assert (wide.weights, wide.sequences) == (1352, 16 // 3)  # one key-value head cannot be split


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"backend": "local", "workers": 2}, "learner.backend: local runs in one process, but there are 2"),
        ({"backend": "fdsp"}, "learner.backend: one of local, ddp, fsdp, zero1, zero2, zero3; got 'fdsp'"),
        (
            {"backend": "ddp", "workers": 2, "offload": True},
            "learner.offload: ddp does not support it; use fsdp or zero2",
        ),
        ({"backend": "zero3", "workers": 0}, "learner.workers: at least 1; got 0"),
        ({"max_tokens_per_micro_batch": 0}, "learner.max_tokens_per_micro_batch: at least 1; got 0"),
    ],
)
def test_what_cannot_be_laid_out_is_told(options: dict, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        Layout(**options)


def test_muon_in_shares_is_told() -> None:
    with pytest.raises(RecipeError, match=r"optim.kind: muon needs whole matrices, but zero2 shards them"):
        trained(SMALL, Layout("zero2", 4), optim="muon")


def test_an_engine_without_room_is_told() -> None:
    with pytest.raises(
        RecipeError, match=r"--gpu-memory: an engine's weights .* leave no room for an answer of 100 tokens"
    ):
        serving(SMALL, 2 * GIB, context=100)
