"""What a checkpoint's config says about the model, and whether the engine can run it. Of weights, only the headers are
read, and a head that may or may not be the embedding."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from core.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from core.kv_cache.block_table import RopeBorder
from core.logs import get_logger
from core.models.blank import build_blank
from core.models.checkpoint import INDEX, Checkpoint, LazyTensor
from core.models.config_checks import Sizes, check_heads, check_raw, check_shape, field_error
from core.models.formats import refuse_quantized
from core.models.gguf.header import is_gguf
from core.models.gguf.tensors import LazyGgufTensor
from core.models.json_files import read_json_object
from core.quantization.choice import AS_IT_IS, QuantizeChoice
from core.quantization.quantize import Quantizer
from core.quantization.reader import Quantization, Reader
from core.quantization.readers import find_reader
from core.quantization.swap import find_modules

logger = get_logger(__name__)

AnyTensor: TypeAlias = LazyTensor | LazyGgufTensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float32}

_RESTARTING = ("phi3",)
"""Types of models that compute a sequence anew once it is longer than the original length."""
_OWN_SCALES = ("phimoe",)
_MOST_POSITIONS = 1 << 31

_ROWS = 4096
"""Of a vocabulary, compared at one time."""

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
    """A model's shape. `sliding_window` per layer is the number of visible positions, or None for all of them. `rope`:
    where rotary frequencies begin to depend on a sequence's length, if they do. `quantization`: the modules whose
    weights are quantized, if there are any."""

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
    rope: RopeBorder | None = None
    quantization: Quantization | None = None


def read_architecture(path: Path, dtype: str = "auto", quantize: QuantizeChoice = AS_IT_IS) -> Architecture:
    """Read `config.json` of a local model directory, and the headers of its weights where there are any. `quantize`
    says what becomes of plain weights.

    Raises `CheckpointError` with file and field if something cannot be right, and `UnsupportedModelError` for models
    the engine cannot run.
    """
    raw = read_json_object(path / "config.json") if (path / "config.json").is_file() else None
    if raw is None:
        raise CheckpointError(f"{path} has no config.json; a Hugging Face model directory is expected.")
    has_weights = (path / INDEX).is_file() or any(path.glob("*.safetensors")) or is_gguf(path)
    with Checkpoint(path) if has_weights else nullcontext() as checkpoint:
        stored = checkpoint.tensors() if checkpoint is not None else {}
        reader = _reader(path, raw, stored, quantize)
        config = read_config(path, raw, stored)
        text_config = config.get_text_config(decoder=True)
        _refuse_unsupported(config, text_config)
        model_class = _model_class(config)
        check_shape(text_config)
        if getattr(text_config, "tie_word_embeddings", False) and _has_own_head(model_class, stored):
            config.tie_word_embeddings = text_config.tie_word_embeddings = False
    num_layers, rope = int(text_config.num_hidden_layers), _rope_border(text_config)
    found = Architecture(
        config=config,
        model_class=model_class,
        model_type=config.model_type,
        num_layers=num_layers,
        hidden_size=int(text_config.hidden_size),
        num_heads=int(text_config.num_attention_heads),
        vocab_size=int(text_config.vocab_size),
        max_position=_max_position(text_config, rope),
        rope=rope,
        dtype=served_dtype(config, dtype, stored),
        kv_shapes=(_kv_shape(text_config),) * num_layers,
        sliding_windows=_sliding_windows(text_config, num_layers),
        tied=bool(getattr(text_config, "tie_word_embeddings", False)),
    )
    quantization = _quantization(found, reader, stored) if reader is not None else None
    if quantization is not None and quantize.text and not quantization.modules:
        raise UnsupportedModelError(
            f"{model_class.__name__} has no linear layers that quantize={quantize.kind} covers.", param="quantize"
        )
    return replace(found, quantization=quantization) if quantization is not None and quantization.modules else found


def _reader(
    path: Path, raw: dict[str, Any], stored: Mapping[str, AnyTensor], quantize: QuantizeChoice
) -> Reader | None:
    """What reads the weights if they are quantized, or are to be; the config then no longer says so. Raises
    `UnsupportedModelError` for formats without a reader."""
    reader = find_reader(raw, stored)
    if reader is None and is_gguf(path):
        raise UnsupportedModelError(f"{path.name} has its weights in GGUF files; give one of the files.", param="model")
    if reader is None:
        refuse_quantized(path.name, raw, {name: tensor.get_dtype() for name, tensor in stored.items()})
        return Quantizer(quantize) if quantize.text else None
    if quantize.text:
        raise InvalidRequestError(
            f"{path.name} is quantized already ({reader.title}); load it without quantize.", param="quantize"
        )
    if stored and not reader.names and not is_gguf(path):
        raise CheckpointError(
            f"config.json says that weights are quantized ({reader.title}), but no tensor of {path.name} is.",
            param="model",
        )
    for part in (raw, raw.get("text_config")):
        if isinstance(part, dict):
            for name in ("quantization_config", "compression_config"):
                part.pop(name, None)
    return reader


def _quantization(architecture: Architecture, reader: Reader, stored: Mapping[str, AnyTensor]) -> Quantization:
    """Which modules of the model have quantized weights."""
    blank = build_blank(architecture.model_class, architecture.config, architecture.dtype)
    modules = find_modules(blank, reader, stored, tied=architecture.tied)
    lost = sorted(reader.names - {module.stored for module in modules.values()} - _left_out(architecture, reader.names))
    if lost:
        raise UnsupportedModelError(
            f"{lost[0]} is quantized ({reader.title}), and is no linear layer or embedding of "
            f"{architecture.model_class.__name__}; routed experts that are quantized are not supported yet.",
            param="model",
        )
    facts = (reader.title, *(f"{name} {module.form}" for name, module in sorted(modules.items())))
    key = hashlib.blake2b("\n".join(facts).encode(), digest_size=8).hexdigest()
    return Quantization(reader.title, key, modules, reader)


def _left_out(architecture: Architecture, names: Iterable[str]) -> frozenset[str]:
    """Modules of layers behind the last, which predict further tokens and are not loaded."""
    found = ((name, re.search(r"(?:^|\.)layers\.(\d+)\.", name)) for name in names)
    return frozenset(name for name, match in found if match and int(match[1]) >= architecture.num_layers)


def read_config(
    path: Path, raw: dict[str, Any], stored: Mapping[str, AnyTensor], *, may_lack_layers: bool = False
) -> PreTrainedConfig:
    """A `config.json`'s fields, checked, as the class of its model type has them. `stored` are the files' tensors;
    `may_lack_layers`: as in `check_raw`."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise field_error("model_type", model_type, "the name of an architecture")
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise UnsupportedModelError(
                f"{path.name} needs code from its own repository (auto_map); remote code is never run."
            )
        raise UnsupportedModelError(f"config.json of {path.name}: model_type {model_type!r} is not known.")
    config_class = CONFIG_MAPPING[model_type]
    sizes = Sizes.of({name: tensor.get_shape() for name, tensor in stored.items()}) if stored else None
    check_raw(raw, config_class.attribute_map, sizes, may_lack_layers=may_lack_layers)
    try:
        config: PreTrainedConfig = config_class.from_dict(raw)
    except StrictDataclassFieldValidationError as error:
        field = str(error).partition("'")[2].partition("'")[0]
        kind = next((each.type for each in fields(config_class) if each.name == field), "of another type")
        raise field_error(field, raw.get(field), kind.__name__ if isinstance(kind, type) else str(kind)) from error
    except Exception as error:  # whatever the class makes of fields that nobody has checked
        check_heads(raw, config_class.attribute_map)
        logger.warning("a config cannot be read", file=str(path / "config.json"), error=repr(error))
        named = [name for name in raw if len(name) > 3 and re.search(rf"\b{re.escape(name)}\b", str(error))]
        hint = f" Look at {', '.join(named)}." if named else ""
        raise CheckpointError(
            f"config.json of {path.name} is not one of a {model_type} model.{hint}", param="model"
        ) from error
    return config


def _has_own_head(model_class: type[Any], stored: Mapping[str, AnyTensor]) -> bool:
    """Whether the files have a head beside the embedding that is not the same: then it is not tied, whatever the
    config says."""
    for head, embedding in dict(getattr(model_class, "_tied_weights_keys", None) or {}).items():
        first, second = (_stored_as(name, stored) for name in (head, embedding))
        if first is None or second is None or first is second:
            continue
        if first.get_shape() != second.get_shape():
            return True
        for row in range(0, first.get_shape()[0], _ROWS):
            if not torch.equal(first.peek(row, row + _ROWS), second.peek(row, row + _ROWS)):
                return True
    return False


def _stored_as(name: str, stored: Mapping[str, AnyTensor]) -> AnyTensor | None:
    """A tensor by the name that the model has for it; files may add a prefix, or leave one out."""
    if name in stored:
        return stored[name]
    found = [key for key in stored if key.endswith(f".{name}") or ("." in key and name.endswith(f".{key}"))]
    return stored[min(found, key=len)] if found else None


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


def served_dtype(config: PreTrainedConfig, dtype: str, stored: Mapping[str, AnyTensor]) -> torch.dtype:
    """As asked for, or as the config says, or as most of the files' bytes are."""
    if dtype != "auto":
        return DTYPES[dtype]
    named = config.dtype
    if isinstance(named, torch.dtype) and named in DTYPES.values():
        return named
    nbytes: Counter[torch.dtype] = Counter()
    for tensor in stored.values() if named is None else ():
        if tensor.get_dtype() in _STORED_DTYPES:
            nbytes[_STORED_DTYPES[tensor.get_dtype()]] += tensor.nbytes
    return nbytes.most_common(1)[0][0] if nbytes else torch.float32


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


def _max_position(config: PreTrainedConfig, rope: RopeBorder | None) -> int:
    """Positions the model is made for. Dynamic rotary embeddings stretch them by their factor."""
    most = int(getattr(config, "max_position_embeddings", None) or 2048)
    if rope is None:
        return most
    if config.model_type in _OWN_SCALES:  # chosen by the longest sequence of a batch, in its own forward pass
        return min(most, rope.tokens)
    factors = [part["factor"] for part in _moving_ropes(config) if part["rope_type"] == "dynamic"]
    return min(int(most * min(factors, default=1.0)), _MOST_POSITIONS)


def _moving_ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return [part for part in parts if part.get("rope_type") in ("dynamic", "longrope")]


def _rope_border(config: PreTrainedConfig) -> RopeBorder | None:
    """Where frequencies begin to depend on a sequence's length; None where they never do."""
    borders = {
        config.max_position_embeddings if part["rope_type"] == "dynamic" else _original_length(config, part)
        for part in _moving_ropes(config)
    }
    if not borders:
        return None
    exact = len(borders) > 1 or any(part["rope_type"] == "dynamic" for part in _moving_ropes(config))
    return RopeBorder(min(borders), exact, restarts=config.model_type in _RESTARTING and not exact)


def _original_length(config: PreTrainedConfig, part: Mapping[str, Any]) -> int:
    return int(part.get("original_max_position_embeddings") or config.max_position_embeddings)
