"""Writes a Hugging Face Llama checkpoint as GGUF, so that llama.cpp is measured on the very same weights.

Only what plain Llama needs: no rope scaling, no biases; of tokenizers, the tokens and merges of byte-level BPE. How it
splits text is put down as GPT-2's way, whatever it is: the benchmarks feed token ids.
llama.cpp rotates neighbouring pairs where Hugging Face rotates halves, so the rows of the query and key projections
are reordered to match.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open

if TYPE_CHECKING:
    import gguf

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
DTYPES = ("bf16", "f16", "f32")
QUANTIZED = {"q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0", "q4_k_m": "MOSTLY_Q4_K_M"}
"""What llama.cpp's quantizer makes of a file, by the end of its own name for it."""


def interleave_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection from rotated halves to rotated pairs."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def gguf_name(name: str) -> str:
    """The GGUF name of a Llama tensor."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    if module not in LAYER_NAMES or kind != "weight":
        raise ValueError(f"{name}: not a tensor of a plain Llama model")
    return f"blk.{layer}.{LAYER_NAMES[module]}.weight"


def llama_config(model_dir: Path) -> dict[str, Any]:
    """The checkpoint's configuration; raises ``ValueError`` for anything but plain Llama."""
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    if config["model_type"] != "llama":
        raise ValueError(f"model_type {config['model_type']!r}: only llama can be written as GGUF here")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r} is not supported here")
    config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return config


def checkpoint_tensors(model_dir: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint, one at a time."""
    for file in sorted(model_dir.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                yield name, tensors.get_tensor(name)


def _write_header(writer: gguf.GGUFWriter, config: dict[str, Any], dtype: str) -> None:
    import gguf

    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    file_type = {"bf16": "MOSTLY_BF16", "f16": "MOSTLY_F16", "f32": "ALL_F32"}[dtype]
    writer.add_file_type(gguf.LlamaFileType[file_type])


def _write_tokenizer(writer: gguf.GGUFWriter, model_dir: Path, config: dict[str, Any]) -> None:
    """VRAMancer reads no file without a tokenizer."""
    import gguf

    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    special = {each["id"]: each["content"] for each in tokenizer["added_tokens"]}
    vocabulary = {number: token for token, number in tokenizer["model"]["vocab"].items()} | special
    kinds = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(config["vocab_size"])]
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([vocabulary[i] for i in range(config["vocab_size"])])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, dtype: str) -> None:
    import gguf

    if tensor.ndim == 1 or dtype == "f32":  # llama.cpp wants norms in fp32
        writer.add_tensor(name, tensor.float().numpy())
    elif dtype == "f16":
        writer.add_tensor(name, tensor.to(torch.float16).numpy())
    else:
        raw = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint8)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


def _is_newer(target: Path, model_dir: Path) -> bool:
    newest = max(file.stat().st_mtime for file in (*model_dir.glob("*.safetensors"), Path(__file__)))
    return target.is_file() and target.stat().st_mtime >= newest


def export_gguf(model_dir: Path, target: Path, dtype: str = "bf16") -> Path:
    """Write ``target`` unless it is there already and newer than the checkpoint. Needs the ``gguf`` package."""
    import gguf

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if _is_newer(target, model_dir):
        return target
    config = llama_config(model_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f"{target.name}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(staging, "llama")
    try:
        _write_header(writer, config, dtype)
        _write_tokenizer(writer, model_dir, config)
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        for name, tensor in checkpoint_tensors(model_dir):
            if name == "lm_head.weight" and config.get("tie_word_embeddings"):
                continue
            projection = name.split(".")[-2]
            if projection in heads:
                tensor = interleave_rotary(tensor, heads[projection])
            _add_tensor(writer, gguf_name(name), tensor, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)
    return target


def gguf_of(model_dir: Path, folder: Path, dtype: str, threads: int = 1) -> Path:
    """The checkpoint as a GGUF file of one of `DTYPES` or `QUANTIZED` in `folder`, written if it is not there.

    Quantized ones are made by llama.cpp from the checkpoint's own numbers. Needs `gguf`, and llama-cpp-python for them.
    """
    target = folder / f"{model_dir.name}-{dtype}.gguf"
    if dtype not in QUANTIZED:
        return export_gguf(model_dir, target, dtype)
    if _is_newer(target, model_dir):
        return target
    import llama_cpp

    stored = json.loads((model_dir / "config.json").read_text()).get("dtype", "float32")
    own = {"bfloat16": "bf16", "float16": "f16"}.get(stored, "f32")
    source = export_gguf(model_dir, folder / f"{model_dir.name}-{own}.gguf", own)
    staging = target.with_name(f"{target.name}.{os.getpid()}.part")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{QUANTIZED[dtype]}")
    parameters.nthread = threads
    silence = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
    llama_cpp.llama_log_set(silence, None)
    try:
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(staging).encode(), ctypes.byref(parameters))
        if status:
            raise RuntimeError(f"llama.cpp could not make {dtype} of {source} (status {status})")
        staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)
    return target
