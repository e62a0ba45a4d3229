"""The zoo: how each architecture of transformers is built tiny, and which are left out and why."""

import dataclasses
from typing import Any

import torch

SMALL: dict[str, Any] = {
    "vocab_size": 27, "hidden_size": 32, "d_model": 32, "n_embd": 32, "n_embed": 32, "intermediate_size": 48, "ffn_dim": 48,
    "d_ff": 48, "n_inner": 48, "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "n_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "n_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "sliding_window": 4, "max_position_embeddings": 128, "n_positions": 128, "max_seq_len": 128,
    "initializer_range": 0.2, "init_std": 0.2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip
"""Sizes by the names that configurations give them; those that a configuration has are set."""

LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
GROUPED = LATENT | {"n_group": 1, "topk_group": 1}
INDEXED = GROUPED | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 64}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
DECODER = {"is_decoder": True}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}

MORE: dict[str, dict[str, Any]] = {
    "axk1": GROUPED,
    "axk2": GROUPED,
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "big_bird": DECODER | {"attention_type": "original_full"},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), ROPE | {"mrope_section": [2, 1, 1]}),
    },
    "cwm": {"bos_token_id": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": GROUPED,
    "deepseek_v32": INDEXED,
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 27,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {"vocab_size_per_layer_input": 27, "hidden_size_per_layer_input": 8},
    "glm4_moe_lite": GROUPED,
    "glm_moe_dsa": INDEXED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": LATENT | LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"attention_chunk_size": 4},
    "longcat_flash": LATENT
    | {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "zero_expert_num": 2, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4},
    "minicpm3": LATENT,
    "modernbert-decoder": {"bos_token_id": 1},
    "olmo_hybrid": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 64},
    "xlm": {"emb_dim": 32, "causal": True},
    "xmod": DECODER | {"default_language": "en_XX"},
    "youtu": LATENT,
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "n_mamba_heads": 2,
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "n_mamba_heads": 4,
        "mamba_d_state": 8,
        "chunk_size": 4,
        "adapter_rank": 4,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
} | dict.fromkeys(
    (
        "bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roberta",
        "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
    ),
    DECODER,
)  # fmt: skip
"""What an architecture needs besides `SMALL`."""

LEFT_OUT = {
    **dict.fromkeys(
        (
            "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git", "got_ocr2", "llama4", "mllama",
            "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp",
        ),
        "a model of images or sound with towers of its own; its text model is here where there is one",
    ),
    **dict.fromkeys(("moshi", "musicgen", "musicgen_melody"), "a model of sound: several codebooks per position"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "it drafts for another model, whose states it needs"),
    "blt": "it reads bytes through a second model that cuts them into patches",
    "reformer": "its own forward needs lengths that are a multiple of its chunks",
    "roc_bert": "its shape and pronunciation embeddings cannot be made small (13 million weights)",
}  # fmt: skip
"""Architectures that are not tried, and why."""

BOTH_WAYS = {"cpmant", "prophetnet", "xlnet"}
"""Called causal by transformers, but their forward over token ids looks both ways or depends on the length: refused."""

UNSHIFTED = {
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart", "trocr", "whisper",
    "xlm",
}  # fmt: skip
"""Their own loss compares the logits with the label at the same position: the caller shifts the labels."""

UNCACHED = {
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert", "data2vec-text", "deepseek_v4", "falcon_mamba", "mamba",
    "mamba2", "marian", "mbart", "minimax", "mvp", "openai-gpt", "pegasus", "plbart", "qwen4_exp_text", "recurrent_gemma", "roberta",
    "roberta-prelayernorm", "rwkv", "trocr", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlstm", "xmod",
}  # fmt: skip
"""Decoded without a cache: their state is no `past_key_values`, or their positions do not know about padding on the left."""

TARGETS = {
    "deepseek_v4": ("gate_proj", "up_proj", "down_proj"),
    "llama4_text": ("q_proj", "v_proj"),
    "phimoe": ("q_proj", "v_proj"),
    "zamba": ("in_proj",),
    **dict.fromkeys(("mamba", "falcon_mamba"), ("in_proj", "x_proj")),
    **dict.fromkeys(("mamba2", "bamba", "falcon_h1", "nemotron_h"), ("in_proj",)),
}
"""Layers for LoRA where peft cannot adapt all linear ones, or where layers share a weight (Zamba)."""

SHORT = (
    "llama", "gpt2", "bloom", "opt", "mamba", "lfm2", "jamba", "gpt_oss", "gemma2", "gemma3_text", "falcon", "rwkv", "qwen3_moe",
    "recurrent_gemma", "bert",
)  # fmt: skip
"""The architectures of the short form."""


def kinds() -> list[str]:
    """All architectures that the installed transformers calls causal, without those left out."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in LEFT_OUT]


def model(kind: str, **changes: Any) -> Any:
    """A tiny model of this architecture with random weights in float32."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(config)}
    given = {name: value for name, value in SMALL.items() if name in known}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**(given | MORE.get(kind, {}) | changes))).float().eval()
