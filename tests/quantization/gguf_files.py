"""GGUF files of tiny models, written with the `gguf` package as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

Array = np.ndarray[Any, Any]

LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up",
}  # fmt: skip
FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str, architecture: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    names = {**LAYER, **(FOUR_NORMS if architecture in ("gemma2", "gemma3") else {})}
    return f"blk.{layer}.{names[part]}.{kind}"


def pairs_of(rows: Array, heads: int) -> Array:
    """llama.cpp rotates neighbours where transformers rotates halves."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def random_blocks(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Any bytes at all, but for the scales in fp16: these are small and finite."""
    quantization = gguf.GGMLQuantizationType[kind]
    columns, nbytes = gguf.GGML_QUANT_SIZES[quantization]
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // columns, nbytes), dtype=np.uint8)
    for place in {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
                  "Q4_1": (0, 2), "Q5_1": (0, 2)}.get(kind, (0,)):  # fmt: skip
        scales = rng.uniform(-0.003, 0.003, raw.shape[:-1]).astype(np.float16)
        raw[..., place : place + 2] = scales[..., None].view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


def quantized(kind: str) -> Callable[[Array], tuple[Array, Array]]:
    """Turns a weight into bytes and what they mean: by the library where it can, else it takes random ones."""
    rng = np.random.default_rng(0)
    quantization = gguf.GGMLQuantizationType[kind]

    def make(weight: Array) -> tuple[Array, Array]:
        try:
            raw = gguf.quants.quantize(weight, quantization)
        except NotImplementedError:
            raw = random_blocks(kind, weight.shape, rng)
        return raw, gguf.quants.dequantize(raw, quantization).astype(np.float32)

    return make


def write_gguf(
    model: PreTrainedModel, file: Path, architecture: str, kind: str = "F32", *,
    metadata: Mapping[str, Any] | None = None, tokenizer: Mapping[str, Any] | None = None,
    kinds: Mapping[str, str] | None = None, more: Mapping[str, Array] | None = None,
) -> Path:  # fmt: skip
    """Write a model's weights in a type (`kinds`: others for names that end so), and give the model what they mean.

    `metadata` are further fields of the architecture; `tokenizer` is what a tokenizer.json with
    byte-level BPE holds."""
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    for name, value in (metadata or {}).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{name}", value)
    _add_tokenizer(writer, tokenizer, config)
    tied = bool(config.tie_word_embeddings)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        if tied and name == "lm_head.weight":
            continue
        _add(writer, name, parameter, architecture, kind, kinds or {}, heads if architecture == "llama" else {})
    for name, array in (more or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(
    writer: gguf.GGUFWriter, name: str, parameter: torch.nn.Parameter, architecture: str, kind: str,
    kinds: Mapping[str, str], heads: Mapping[str, int],
) -> None:  # fmt: skip
    weight = parameter.detach().float().numpy()
    count, target = heads.get(name.split(".")[-2]), gguf_name(name, architecture)
    kind = next((other for ending, other in kinds.items() if target.endswith(ending)), kind)
    if weight.ndim == 1:
        more = 1.0 if architecture.startswith("gemma") else 0.0
        writer.add_tensor(target, pairs_of(weight + more, count) if count else weight + more)
    elif kind == "F32":
        writer.add_tensor(target, pairs_of(weight, count) if count else weight)
    elif kind == "F16":
        half = weight.astype(np.float16)
        parameter.data.copy_(torch.from_numpy(half.astype(np.float32)))
        writer.add_tensor(target, pairs_of(half, count) if count else half)
    else:
        raw, meaning = quantized(kind)(weight)
        parameter.data.copy_(torch.from_numpy(meaning))
        rows = pairs_of(raw, count) if count else raw
        writer.add_tensor(target, np.ascontiguousarray(rows), raw_dtype=gguf.GGMLQuantizationType[kind])


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Mapping[str, Any] | None, config: Any) -> None:
    if tokenizer is None:
        tokens = ["<pad>", "<s>", "</s>", *map(chr, range(33, 125)), "ab"]
        merges, control, pre = ["a b"], {0, 1, 2}, "gpt-2"
        assert len(tokens) == config.vocab_size
    else:
        added = {each["id"]: each["content"] for each in tokenizer["added_tokens"]}
        vocabulary = {number: token for token, number in tokenizer["model"]["vocab"].items()} | added
        tokens = [vocabulary[number] for number in range(len(vocabulary))]
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in tokenizer["model"]["merges"]]
        control, pre = set(added), "smollm"
        writer.add_add_bos_token(True)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL if index in control else gguf.TokenType.NORMAL for index in range(len(tokens))]
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "pad"):
        number = getattr(config, f"{name}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
