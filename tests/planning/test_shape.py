"""Parameters and FLOPs of a shape are those of the model that transformers builds from the same config.json."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from whet.errors import RecipeError
from whet.methods.options import LoRA
from whet.models import load, lora
from whet.models.roles import Role
from whet.planning import Shape

ODD = {"vocabulary": 37, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3}
COMMON = {
    "vocab_size": 37, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 10, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 7, "num_experts_per_tok": 2, "decoder_sparse_step": 2, "num_experts": 4}


def built(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(COMMON | changes)))


def count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen3", {}),
        ("qwen3", ODD | {"head_dim": 10, "tie_word_embeddings": False, "attention_bias": True}),
        ("llama", {}),
        ("llama", ODD | {"tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True}),
        ("gpt2", {}),
        ("gpt2", {"n_embd": 20, "n_head": 5, "n_layer": 3, "n_inner": 17, "vocabulary": 41}),
    ],
)
def test_parameters_are_those_of_the_saved_model(kind: str, changes: dict, tmp_path: Path) -> None:
    model = tiny.causal_lm(kind, **changes)
    model.save_pretrained(tmp_path)
    assert Shape.of(json.loads((tmp_path / "config.json").read_text())).parameters() == count(model)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
        ("mistral", {}),
        ("gemma", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", EXPERTS),
        ("qwen3_moe", EXPERTS | {"decoder_sparse_step": 1, "mlp_only_layers": [1]}),
    ],
)
def test_parameters_of_the_relatives(kind: str, changes: dict) -> None:
    model = built(kind, **changes)
    assert Shape.of(model.config.to_dict()).parameters() == count(model)


def test_a_published_model_has_its_published_count() -> None:
    llama = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
             "num_attention_heads": 32, "vocab_size": 32000}  # fmt: skip
    assert Shape.of(llama).parameters() == 6_738_415_616  # Llama 2 7B


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_a_scalar_head_takes_the_place_of_the_language_head(kind: str, tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path, kind)
    model = load.load_scorer(load.ModelSource(str(folder)), tiny.tokenizer())
    assert Shape.of(model.config.to_dict()).parameters("scalar") == count(model)


@pytest.mark.parametrize(
    ("kind", "targets"), [("qwen3", "all-linear"), ("llama", ("q_proj", "v_proj")), ("gpt2", "all-linear")]
)
def test_adapters_are_as_many_as_pefts(kind: str, targets: Any) -> None:
    model = tiny.causal_lm(kind)
    wrapped = lora.attach(model, LoRA(rank=3, targets=targets), ("policy",), seed=0)
    own = Role("policy", model, True, wrapped=wrapped, adapter="policy").parameters()
    assert Shape.of(model.config.to_dict()).adapter_parameters(3, targets) == sum(one.numel() for one in own.values())


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_flops_are_those_that_torch_counts(kind: str) -> None:
    """torch counts attention over all S x S pairs, masked ones too: S tokens of context."""
    model, ids = tiny.causal_lm(kind), torch.arange(20).repeat(2, 1)
    model.set_attn_implementation("eager")  # the fused kernel of a CPU is not in its counter
    shape = Shape.of(model.config.to_dict())
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum()
    assert shape.forward_flops(40, context=20) == forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    both = forward.get_total_flops() + backward.get_total_flops()
    assert shape.training_flops(40, context=20) == both


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_flops_under_adapters(kind: str) -> None:
    """Within 6 %: the adapters' own, and what lies before the first adapter needs no gradient."""
    model, ids = (
        tiny.causal_lm(kind, num_hidden_layers=6, hidden_size=128, intermediate_size=256),
        torch.arange(20)[None],
    )
    shape = Shape.of(model.config.to_dict())
    model.set_attn_implementation("eager")
    wrapped = lora.attach(model, LoRA(rank=1), ("policy",), seed=0)
    with FlopCounterMode(display=False) as counted:
        wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    assert shape.training_flops(20, context=20, adapters=True) == pytest.approx(counted.get_total_flops(), rel=0.06)


def test_experts_that_a_token_skips_do_not_work() -> None:
    shape = Shape("mixtral", 8, 1, 2, 1, 4, 16, 10, experts=4, active_experts=2)
    # attention 8 x 8 twice and 8 x 4 twice, the router 8 x 4, two experts of 3 x 8 x 16, the head 8 x 10
    assert shape.forward_flops(1, context=0) == 2 * (192 + 32 + 2 * 384 + 80)
    assert shape.parameters() - shape.active_parameters() == 2 * 384


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "t5"}, "config.json has model_type 't5'"),
        ({"model_type": "llama"}, "its config.json needs hidden_size"),
        ({"model_type": "gpt2", "n_embd": 0}, "needs n_embd, a whole number of at least 1; got 0"),
    ],
)
def test_what_has_no_shape_is_told(config: dict, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        Shape.of(config)


def test_an_unknown_target_is_told() -> None:
    with pytest.raises(RecipeError, match=r"model.lora.targets: llama has q_proj, .* got 'qkv'"):
        Shape("llama", 8, 1, 2, 1, 4, 16, 10).adapter_parameters(4, ("qkv",))


def test_a_plan_loads_nothing_heavy() -> None:
    code = "import sys, whet.planning; print(sorted({'torch', 'transformers', 'numpy', 'yaml'} & sys.modules.keys()))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
