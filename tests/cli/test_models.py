"""Models that people bring, from the command line: what is wrong is refused before work, what is slow is said and right."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, BloomConfig, RwkvConfig

from .helpers import one_message, whet

TEXTS = ["a b c", "d", "e f g h yes", "no maybe please", "thanks hello", "good bad one two"]
SMALL = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "vocab_size": 27}
KINDS = {
    "bloom": lambda: BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2),
    "rwkv": lambda: RwkvConfig(**SMALL, hidden_size=32, num_hidden_layers=2, context_length=128),
}


def folder(path: Path, kind: str) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(KINDS[kind]()).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def demonstrations(path: Path) -> Path:
    return tiny.write_jsonl(
        path, [{"prompt": one, "completion": two} for one, two in zip(TEXTS, TEXTS[::-1], strict=True)]
    )


def damaged(path: Path, name: str, value: float, file: str = "model.safetensors") -> None:
    """Overwrite one value of one tensor of a saved folder."""
    weights = load_file(path / file)
    weights[name].view(-1)[5] = value
    save_file(weights, path / file, metadata={"format": "pt"})


SFT = ("--train.num-steps", 2, "--batch-size", 2, "--quiet")


def test_a_model_without_packed_rows_is_padded_with_a_line(capsys: Any, tmp_path: Path) -> None:
    model, data = folder(tmp_path / "m", "bloom"), demonstrations(tmp_path / "d.jsonl")
    said = whet(capsys, "sft", "--model", model, "--data", data, "--out", tmp_path / "o", *SFT)
    assert said.status == 0
    assert "policy: its attention (eager) has no packed rows; they are padded" in said.error
    off = ("--padding-free", "false", "--out", tmp_path / "p")
    said = whet(capsys, "sft", "--model", model, "--data", data, *off, *SFT)
    assert said.status == 0
    assert "packed" not in said.error
    losses = [
        [json.loads(one)["loss"] for one in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in "op"
    ]
    assert losses[0] == losses[1]


def test_a_policy_that_looks_both_ways_is_refused_by_every_verb(capsys: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = tmp_path / "m"
    BertLMHeadModel(BertConfig(**SMALL, **small)).save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    data = demonstrations(tmp_path / "d.jsonl")
    for verb, *more in (("sft", *SFT), ("sample", "--max-new-tokens", 4), ("eval",)):
        said = whet(capsys, verb, "--model", model, "--data", data, "--out", tmp_path / f"{verb}.jsonl", *more)
        assert said.status != 0, verb
        one_message(said.error.splitlines(keepends=True)[-1], ["policy", "no causal language model"])


def test_a_model_with_a_state_answers_as_its_own_forward(capsys: Any, tmp_path: Path) -> None:
    path, data = folder(tmp_path / "m", "rwkv"), demonstrations(tmp_path / "d.jsonl")
    said = whet(
        capsys, "sample", "--model", path, "--data", data, "--out", tmp_path / "s.jsonl", "--max-new-tokens", 6,
        "--temperature", 0, "--num-generations", 1,
    )  # fmt: skip
    assert said.status == 0, said.error
    assert "answers are generated without one, which is slow" in said.error
    tokenizer, model = tiny.tokenizer(), AutoModelForCausalLM.from_pretrained(path).eval()
    for row in map(json.loads, (tmp_path / "s.jsonl").read_text().splitlines()):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
        )
        start = len(ids)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in (1, tokenizer.convert_tokens_to_ids("<end>")):
                break
        assert row["response_ids"][0] == ids[start:]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_refused_by_name(value: float, capsys: Any, tmp_path: Path) -> None:
    model, data = tiny.folder(tmp_path / "m"), demonstrations(tmp_path / "d.jsonl")
    name = "model.layers.1.mlp.up_proj.weight"
    damaged(model, name, value)
    for verb, *more in (("sft", *SFT), ("sample", "--max-new-tokens", 4), ("eval",)):
        said = whet(capsys, verb, "--model", model, "--data", data, "--out", tmp_path / f"{verb}.jsonl", *more)
        assert said.status != 0, verb
        one_message(said.error, [str(model), name, "1 of 1536 values that are NaN or infinite"])
