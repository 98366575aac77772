"""What a checkpoint's config says about the model, and whether the engine can run it. Nothing here reads weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from core.errors import CheckpointError, UnsupportedModelError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_RECURRENT_LAYER_TYPES = ("mamba", "linear_attention", "recurrent", "conv", "hybrid", "rwkv", "ssm", "moe_mamba")
_SUPPORTED_LAYER_TYPES = ("full_attention", "sliding_attention", "attention")


@dataclass(frozen=True, slots=True)
class KVShape:
    """Per token and layer: `num_kv_heads` keys of `key_dim` numbers and as many values of `value_dim`."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    def bytes_per_token(self, element_bytes: int) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim) * element_bytes


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model's shape. `sliding_window` per layer is the number of visible positions, or None for all of them."""

    config: PreTrainedConfig
    model_class: type[Any]
    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int
    max_position: int
    dtype: torch.dtype
    kv_shapes: tuple[KVShape, ...]
    sliding_windows: tuple[int | None, ...]
    tied: bool


def read_architecture(path: Path, dtype: str = "auto") -> Architecture:
    """Read `config.json` of a local model directory.

    Raises `CheckpointError` if it cannot be read and `UnsupportedModelError` for models the engine cannot run.
    """
    config = _read_config(path)
    text_config = config.get_text_config(decoder=True)
    _refuse_unsupported(config, text_config)
    model_class = _model_class(config)
    num_layers = int(text_config.num_hidden_layers)
    return Architecture(
        config=config,
        model_class=model_class,
        model_type=config.model_type,
        num_layers=num_layers,
        hidden_size=int(text_config.hidden_size),
        num_heads=int(text_config.num_attention_heads),
        vocab_size=int(text_config.vocab_size),
        max_position=_max_position(text_config),
        dtype=_dtype(config, dtype),
        kv_shapes=(_kv_shape(text_config),) * num_layers,
        sliding_windows=_sliding_windows(text_config, num_layers),
        tied=bool(getattr(text_config, "tie_word_embeddings", False)),
    )


def _read_config(path: Path) -> PreTrainedConfig:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json; a Hugging Face model directory is expected.")
    try:
        raw, _ = PreTrainedConfig.get_config_dict(str(path), local_files_only=True)
        if "auto_map" in raw and raw.get("model_type") not in CONFIG_MAPPING:
            raise UnsupportedModelError(
                f"{path.name} needs code from its own repository (auto_map); remote code is never run."
            )
        return AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"config.json of {path.name} cannot be used: {error}") from error


def _model_class(config: PreTrainedConfig) -> type[Any]:
    try:
        model_class: type[Any] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise UnsupportedModelError(f"model type {config.model_type!r} is not a causal language model.") from None
    if not getattr(model_class, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{model_class.__name__} does not run its attention through transformers' attention interface."
        )
    if getattr(model_class, "_is_stateful", False):
        raise UnsupportedModelError(f"{model_class.__name__} has recurrent state, which is not supported yet.")
    return model_class


def _refuse_unsupported(config: PreTrainedConfig, text_config: PreTrainedConfig) -> None:
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; only causal models are supported.")
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{name}: quantized checkpoints are not supported yet; use bf16, fp16 or fp32.")
    layer_types = getattr(text_config, "layer_types", None) or ()
    recurrent = sorted({kind for kind in layer_types if any(word in kind for word in _RECURRENT_LAYER_TYPES)})
    if recurrent:
        raise UnsupportedModelError(f"{name} has recurrent layers ({', '.join(recurrent)}), not supported yet.")
    unknown = sorted(set(layer_types) - set(_SUPPORTED_LAYER_TYPES))
    if unknown:
        raise UnsupportedModelError(f"{name} has layers of an unsupported kind: {', '.join(unknown)}.")
    if getattr(text_config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(f"{name} shares KV between layers, which is not supported yet.")
    if getattr(text_config, "use_bidirectional_attention", False):
        raise UnsupportedModelError(f"{name} attends in both directions; only causal models are supported.")


def _dtype(config: PreTrainedConfig, dtype: str) -> torch.dtype:
    if dtype != "auto":
        return DTYPES[dtype]
    stored = getattr(config, "dtype", None) or torch.float32
    return stored if stored in DTYPES.values() else torch.float32


def _kv_shape(config: PreTrainedConfig) -> KVShape:
    heads = int(config.num_attention_heads)
    if getattr(config, "kv_lora_rank", None):  # multi-head latent attention, expanded to full heads
        key_dim = int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim)
        return KVShape(heads, key_dim, int(config.v_head_dim))
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return KVShape(kv_heads, head_dim, head_dim)


def _sliding_windows(config: PreTrainedConfig, num_layers: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return (None,) * num_layers
    layer_types = getattr(config, "layer_types", None)
    if not layer_types:
        return (int(window),) * num_layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in layer_types)


def _max_position(config: PreTrainedConfig) -> int:
    """Positions the model is made for. Rotary embeddings whose frequencies change with the longest sequence at hand
    (`dynamic`, `longrope`) would make a request depend on its neighbours; they serve up to where the change begins.
    """
    most = int(getattr(config, "max_position_embeddings", None) or 2048)
    rope = getattr(config, "rope_parameters", None) or {}
    layers = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if not any(part.get("rope_type") in ("dynamic", "longrope") for part in layers):
        return most
    original = [part.get("original_max_position_embeddings") for part in layers]
    original.append(getattr(config, "original_max_position_embeddings", None))
    return min([most, *(int(limit) for limit in original if limit)])
