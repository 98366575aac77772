"""A config.json from a GGUF file's metadata: what transformers' classes call what llama.cpp's converter wrote down.

What the metadata do not say is what llama.cpp itself assumes (llama-model.cpp). What would be ignored is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from core.errors import CheckpointError, UnsupportedModelError
from core.models.gguf.header import GgufHeader
from core.models.gguf.names import naming_of

_LLAMA3 = ((8192, 1.0, 4.0),)
"""Original lengths, low and high frequency factors of models that scale rotary frequencies as Llama 3.1 does."""

_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS, _GEMMA3_PATTERN, _GEMMA3_LOCAL_BASE = 46, 62, 6, 10000.0

ReadFloats = Callable[[str], list[float]]


class Metadata:
    """The fields of one architecture."""

    def __init__(self, header: GgufHeader) -> None:
        self.architecture = header.architecture
        self._all = header.metadata

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number above 0. Raises `CheckpointError` if it is anything else, or absent without a default."""
        value = self._all.get(f"{self.architecture}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self._wrong(name, value, "a number above 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Raises `CheckpointError` if it is no number, or absent without a default."""
        value = self._all.get(f"{self.architecture}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._wrong(name, value, "a number")
        return _short(value)

    def _wrong(self, name: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.architecture}.{name} is {value!r}, but must be {wanted}.", param="model")

    def get(self, name: str) -> Any:
        """Whatever the field is; None if it is absent."""
        return self._all.get(f"{self.architecture}.{name}")

    def token(self, name: str) -> int | None:
        """A token's number."""
        value = self._all.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def _short(value: float) -> float:
    """Numbers are kept in 32 bits; 1e-05 is what 9.999999747378752e-06 was before."""
    return float(f"{value:.7g}")


def config_of(header: GgufHeader, read_floats: ReadFloats) -> dict[str, Any]:
    """The config of the model in a GGUF file; `read_floats` reads one of its tensors.

    Raises `CheckpointError` for fields that lack or cannot be right, and `UnsupportedModelError` for what the classes
    of transformers cannot compute.
    """
    data = Metadata(header)
    naming_of(data.architecture)
    if data.get("expert_count"):
        raise UnsupportedModelError("Models with routed experts are not served from GGUF files yet.", param="model")
    for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(data.get(name), list):
            raise UnsupportedModelError(f"Layers that differ in {name} are not served from GGUF files.", param="model")
    table = header.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise CheckpointError("The GGUF file has no token_embd.weight.", param="model")
    heads, hidden = data.count("attention.head_count"), data.count("embedding_length")
    config: dict[str, Any] = {
        "max_position_embeddings": data.count("context_length"),
        "hidden_size": hidden,
        "num_hidden_layers": data.count("block_count"),
        "intermediate_size": data.count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": data.count("attention.head_count_kv", heads),
        "head_dim": data.count("attention.key_length", max(1, hidden // heads)),
        "rms_norm_eps": data.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": table.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "dtype": _dtype(header),
        "quantization_config": {"quant_method": "gguf"},
    }
    if data.count("attention.value_length", config["head_dim"]) != config["head_dim"]:
        raise UnsupportedModelError(
            "Heads whose values are wider than keys are not served from GGUF files.", param="model"
        )
    for name in ("bos", "eos", "padding"):
        config[f"{'pad' if name == 'padding' else name}_token_id"] = data.token(name)
    rope = _rope(data, header, read_floats, config["head_dim"])
    return config | _FAMILIES[data.architecture](data, config, rope)


def _dtype(header: GgufHeader) -> str:
    """What a model is served in: as its weights are if they are not quantized."""
    kinds = {tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1}
    return {frozenset({"F16"}): "float16", frozenset({"F32"}): "float32"}.get(frozenset(kinds), "bfloat16")


# -- rotary embeddings ---------------------------------------------------------------------------------------------


def _rope(data: Metadata, header: GgufHeader, read_floats: ReadFloats, head_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": data.number("rope.freq_base", 10000.0)}
    rotated = data.count("rope.dimension_count", head_dim)
    if rotated != head_dim:
        if data.architecture != "phi3":
            raise UnsupportedModelError(
                f"{rotated} of {head_dim} numbers of a head rotate; not in a GGUF file.", param="model"
            )
        rope["partial_rotary_factor"] = rotated / head_dim
    kind, factor = data.get("rope.scaling.type"), data.get("rope.scaling.factor")
    if "rope_factors_long.weight" in header.tensors:
        return rope | {
            "rope_type": "longrope",
            "long_factor": [_short(each) for each in read_floats("rope_factors_long.weight")],
            "short_factor": [_short(each) for each in read_floats("rope_factors_short.weight")],
            "original_max_position_embeddings": data.count("rope.scaling.original_context_length"),
        }
    if "rope_freqs.weight" in header.tensors:
        return rope | _llama3(read_floats("rope_freqs.weight"), rope["rope_theta"], head_dim)
    if kind in (None, "none") or factor in (None, 0, 1):
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": data.number("rope.scaling.factor")}
    if kind == "yarn":
        return rope | {
            "rope_type": "yarn",
            "factor": data.number("rope.scaling.factor"),
            "original_max_position_embeddings": data.count("rope.scaling.original_context_length"),
        }
    raise UnsupportedModelError(
        f"Rotary embeddings of the type {kind!r} are not served from GGUF files.", param="model"
    )


def _llama3(factors: list[float], theta: float, head_dim: int) -> dict[str, Any]:
    """The fields that these factors, by which frequencies are divided, follow from."""
    factor = _short(max(factors))
    for original, low, high in _LLAMA3:
        expected = [
            _llama3_factor(theta, head_dim, index, factor, original, low, high) for index in range(len(factors))
        ]
        if len(factors) == head_dim // 2 and all(
            math.isclose(given, meant, rel_tol=1e-4) for given, meant in zip(factors, expected, strict=True)
        ):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }  # fmt: skip
    raise UnsupportedModelError("rope_freqs.weight is not what Llama 3.1 scales its frequencies by.", param="model")


def _llama3_factor(
    theta: float, head_dim: int, index: int, factor: float, original: int, low: float, high: float
) -> float:
    length: float = 2 * math.pi * theta ** (2 * index / head_dim)
    if length < original / high:
        return 1.0
    if length > original / low:
        return factor
    smooth = (original / length - low) / (high - low)
    return 1 / ((1 - smooth) / factor + smooth)


# -- families --------------------------------------------------------------------------------------------------------

_Config = dict[str, Any]


def _llama(data: Metadata, config: _Config, rope: _Config) -> _Config:
    window = data.get("attention.sliding_window")
    if window:
        return {
            "model_type": "mistral",
            "sliding_window": data.count("attention.sliding_window"),
            "rope_parameters": rope,
        }
    return {"model_type": "llama", "rope_parameters": rope}


def _qwen(data: Metadata, config: _Config, rope: _Config) -> _Config:
    return {"model_type": data.architecture, "rope_parameters": rope, "use_sliding_window": False}


def _phi3(data: Metadata, config: _Config, rope: _Config) -> _Config:
    """Its class computes the width of a head itself."""
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        raise UnsupportedModelError("Heads of this width are not served from phi3 GGUF files.", param="model")
    window = data.get("attention.sliding_window")
    found: _Config = {"model_type": "phi3", "rope_parameters": rope}
    config.pop("head_dim")
    found["sliding_window"] = data.count("attention.sliding_window") if window else None
    if rope["rope_type"] == "longrope":
        found["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if config.get("pad_token_id") is None:
        found["pad_token_id"] = config.get("eos_token_id")
    return found


def _gemma(data: Metadata, config: _Config, rope: _Config) -> _Config:
    return {"model_type": "gemma", "rope_parameters": rope, "hidden_activation": "gelu_pytorch_tanh"}


def _query_scalar(config: _Config, largest_layers: int) -> int:
    """Only the largest model of a family scales its queries by another width than that of a head."""
    is_largest = config["num_hidden_layers"] == largest_layers
    return int(config["hidden_size"] // config["num_attention_heads"] if is_largest else config["head_dim"])


def _gemma2(data: Metadata, config: _Config, rope: _Config) -> _Config:
    return {
        "model_type": "gemma2",
        "rope_parameters": rope,
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": data.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": data.number("final_logit_softcapping", 30.0),
        "sliding_window": data.count("attention.sliding_window", 4096),
        "query_pre_attn_scalar": _query_scalar(config, _GEMMA2_27B_LAYERS),
    }


def _gemma3(data: Metadata, config: _Config, rope: _Config) -> _Config:
    layers = range(1, config["num_hidden_layers"] + 1)
    if data.get("rope.freq_base") is None:
        rope = rope | {"rope_theta": 1e6}
    return {
        "model_type": "gemma3_text",
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": _GEMMA3_LOCAL_BASE},
        },
        "layer_types": ["sliding_attention" if layer % _GEMMA3_PATTERN else "full_attention" for layer in layers],
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": data.count("attention.sliding_window"),
        "query_pre_attn_scalar": _query_scalar(config, _GEMMA3_27B_LAYERS),
    }


_FAMILIES: Mapping[str, Callable[[Metadata, _Config, _Config], _Config]] = {
    "llama": _llama, "mistral": _llama, "qwen2": _qwen, "qwen3": _qwen, "phi3": _phi3, "gemma": _gemma,
    "gemma2": _gemma2, "gemma3": _gemma3,
}  # fmt: skip
