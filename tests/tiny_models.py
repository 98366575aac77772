"""Tiny random fp32 models of many architectures, saved as real checkpoints, for golden tests against `generate()`.

Every one has 4 layers and a vocabulary of 96. Settings that could hide a mistake when left at their defaults
(multipliers, windows, soft caps) are given values that matter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 96
LAYERS = 4

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
_ALTERNATE = ["sliding_attention", "full_attention"] * (LAYERS // 2)
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

TINY: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "layer_types": _ALTERNATE},
    "qwen3": {},
    "gemma": {"head_dim": 16},
    "gemma2": {
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 20,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "sliding_window": 5,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "query_pre_attn_scalar": 20,
        "tie_word_embeddings": True,
    },
    "phi3": {"head_dim": None, "sliding_window": 9},
    "olmo2": {"head_dim": None},
    "granite": {
        "head_dim": None,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.5,
        "logits_scaling": 1.7,
    },
    "mixtral": {**_MOE, "head_dim": None},
    "qwen3_moe": {**_MOE},
    "gpt_oss": {
        **_MOE,
        "sliding_window": 6,
        "layer_types": _ALTERNATE,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    },
    "smollm3": {"head_dim": None, "no_rope_layers": [1, 0, 1, 0]},
    "starcoder2": {"head_dim": None, "sliding_window": 8, "use_bias": True},
    "cohere2": {"sliding_window": 6, "layer_types": _ALTERNATE, "logit_scale": 0.5},
    "glm4": {"head_dim": 8, "partial_rotary_factor": 0.5},
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
    "opt": {"ffn_dim": 48, "num_key_value_heads": None, "head_dim": None, "word_embed_proj_dim": 24},
    "gpt2": {
        "n_embd": 32,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 512,
        "num_key_value_heads": None,
        "head_dim": None,
    },
    "phi": {"head_dim": None},
    "nemotron": {"head_dim": 8},
    "deepseek_v3": {
        "head_dim": None,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 24,
    },
}  # fmt: skip


def build_tiny(
    name: str, directory: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Save a random model of the architecture to `directory` and return it, in eval mode.

    `changes` are to its config.
    """
    values = {key: value for key, value in (_BASE | TINY[name] | changes).items() if value is not None}
    implementation = values.pop("attn_implementation")
    config = AutoConfig.for_model(name, **values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases at their defaults would hide a mistake
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return model


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words `w3` .. `w95` are the tokens of the same numbers; text decodes to them with spaces between."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
