"""Tiny real models and tokenizers made on the spot: what every test of models and loops stands on."""

from pathlib import Path
from typing import Any

import torch

WORDS = "a b c d e f g h yes no maybe please thanks hello good bad one two three four".split()  # noqa: SIM905
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} <end>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tokenizer(*, template: str | None = TEMPLATE, pad: bool = True) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>", "<end>"]
    vocabulary = {word: number for number, word in enumerate(special + WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    out = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>" if pad else None,
        additional_special_tokens=["<user>", "<assistant>", "<system>", "<end>"],
    )  # fmt: skip
    out.chat_template = template
    return out


def config(kind: str = "qwen3", vocabulary: int = 27, **changes: Any) -> Any:
    from transformers import GPT2Config, LlamaConfig, Qwen3Config

    common = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
        "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "qwen3":
        return Qwen3Config(**(common | {"head_dim": 8, "tie_word_embeddings": True} | changes))
    if kind == "llama":
        return LlamaConfig(**(common | {"tie_word_embeddings": False} | changes))
    small = {
        "vocab_size": vocabulary,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "initializer_range": 0.2,
    }
    return GPT2Config(**(small | {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0} | changes))


def causal_lm(kind: str = "qwen3", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(kind, **changes)).to(dtype).eval()


def folder(path: Path, kind: str = "qwen3", *, seed: int = 0, template: str | None = TEMPLATE, **changes: Any) -> Path:
    """A model folder with its tokenizer, as the hub would serve it."""
    causal_lm(kind, seed=seed, **changes).save_pretrained(path)
    tokenizer(template=template).save_pretrained(path)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    import json

    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
