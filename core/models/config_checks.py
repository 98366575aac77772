"""What has to hold of the fields of a checkpoint's `config.json` before anything is built from them.

The fields of composite models are looked at as well. `Sizes` of the tensors in the files are the measure of what is
plausible: a config that asks for more than the files hold could take all memory before its first tensor is missed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from core.errors import CheckpointError
from core.models.bounds import EXPERTS, HUGE, LATENT, LIMITS, MOST_EXPERTS
from core.models.json_files import shown

DTYPE_NAMES = ("float32", "float16", "bfloat16", "float64", "auto")
ROPE_TYPES = ("default", *sorted(ROPE_INIT_FUNCTIONS))
_OLD_ROPE_TYPES = {"su": "longrope"}
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
_MAY_BE_ZERO = {
    "moe_intermediate_size", "sliding_window", "num_experts_per_tok", "num_nextn_predict_layers", *EXPERTS, *LATENT,
}  # fmt: skip
_MAY_BE_NULL = {"num_key_value_heads", "head_dim", *_MAY_BE_ZERO}
_MAY_BE_LISTS = {"num_key_value_heads", "intermediate_size"}  # one number per layer


@dataclass(frozen=True, slots=True)
class Sizes:
    """The largest number in tensors' names, which count layers and experts, and the largest dimension of a shape."""

    numbers: int
    dimension: int

    @classmethod
    def of(cls, shapes: Mapping[str, Iterable[int]]) -> Sizes:
        numbers = (int(part) for name in shapes for part in name.split(".") if part.isdecimal() and len(part) < 10)
        return cls(max(numbers, default=-1) + 1, max((size for shape in shapes.values() for size in shape), default=0))

    def most(self, field: str) -> int | None:
        """Of what a config may count or size in this field; None: the files do not say."""
        if field == "num_hidden_layers":
            return self.numbers or None
        if field in EXPERTS:
            return max(self.numbers, self.dimension) or None
        return self.dimension or None if field in ("hidden_size", "vocab_size") else None


def check_raw(
    config: dict[str, Any], aliases: Mapping[str, str], sizes: Sizes | None, *, may_lack_layers: bool = False
) -> None:
    """Types and bounds of the fields, as they are in the file; `aliases` are names that a model type has for them.
    Old names of rotary types are replaced. `may_lack_layers`: it may be embeddings alone. Raises `CheckpointError` with
    the field."""
    _check_finite("", config)
    for where, part in _parts(config):
        for name, most in LIMITS.items():
            given = next((key for key in (aliases.get(name, name), name) if key in part), None)
            lacks_layers = name == "num_hidden_layers" and given is not None and repr(part[given]) == "0"
            if given is not None and not (lacks_layers and may_lack_layers):
                _check_count(where + given, name, part[given], most, sizes)
        _check_experts(where, part, aliases)
        for name in ("dtype", "torch_dtype"):
            value = part.get(name)
            if value is not None and (not isinstance(value, str) or value.removeprefix("torch.") not in DTYPE_NAMES):
                raise field_error(where + name, value, f"one of {', '.join(DTYPE_NAMES)}")
        for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "rope_theta"):
            if part.get(name) is not None:
                _check_number(where + name, part[name], above=0.0 if name == "rope_theta" else -HUGE)
        for name in ("rope_parameters", "rope_scaling"):
            if part.get(name) is not None:
                _check_rope(where + name, part[name])
        check_token_ids(where + "eos_token_id", part.get("eos_token_id"))
        _check_layer_types(where, part, aliases)
        _check_names(where, part)


def _parts(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The config and those inside of it, each with the beginning of its fields' names."""
    yield "", config
    for name, value in config.items():
        if isinstance(value, dict) and name.endswith("_config") and name != "quantization_config":
            yield f"{name}.", value


def check_heads(config: Mapping[str, Any], aliases: Mapping[str, str]) -> None:
    """Raises `CheckpointError` if the hidden size is not divided by the heads: not wrong for all types of models."""
    names = [aliases.get(name, name) for name in ("hidden_size", "num_attention_heads")]
    hidden, heads = (config.get(name) for name in names)
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads:
        raise field_error(names[0], hidden, f"a multiple of {names[1]}, {heads}")


def field_error(field: str, value: object, wanted: str, file: str = "config.json") -> CheckpointError:
    return CheckpointError(f"{file}: {field} is {shown(value)}, but must be {wanted}.", param="model")


def _check_count(field: str, name: str, value: object, most: int, sizes: Sizes | None) -> None:
    if value is None and name in _MAY_BE_NULL:
        return
    if isinstance(value, list) and name in _MAY_BE_LISTS:
        for each in value:
            _check_count(field, name, each, most, sizes)
        return
    least = 0 if name in _MAY_BE_ZERO else 1
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise field_error(field, value, f"an integer from {least} to {most}")
    held = None if sizes is None else sizes.most(name)
    if held is not None and value > held:
        raise field_error(field, value, f"at most {held}, since the files hold no more")


def _check_finite(field: str, value: object) -> None:
    """Whatever a number is for, it has an end; what is inside of lists and objects counts too."""
    if isinstance(value, float) and not -HUGE < value < HUGE:  # nor is NaN
        raise field_error(field, value, "a number that has an end")
    if isinstance(value, (dict, list)):
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            _check_finite(f"{field}.{name}".lstrip("."), each)


def _check_experts(where: str, part: dict[str, Any], aliases: Mapping[str, str]) -> None:
    """All together, since each may be a module."""
    layers = part.get(aliases.get("num_hidden_layers", "num_hidden_layers"))
    for name in EXPERTS:
        each = part.get(aliases.get(name, name))
        if isinstance(each, int) and isinstance(layers, int) and layers * each > MOST_EXPERTS:
            raise field_error(where + name, each, f"at most {MOST_EXPERTS // layers} in each of {layers} layers")


def _check_number(field: str, value: object, *, above: float = -HUGE) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and above < value < HUGE
    if not is_number:  # nor is NaN
        raise field_error(field, value, "a number" if above == -HUGE else f"a number above {above:g}")


def check_token_ids(field: str, value: object, file: str = "config.json") -> None:
    """Raises `CheckpointError` unless the field is a token's number, a list of them, or null."""
    ids = value if isinstance(value, list) else [value]
    if any(token is not None and (isinstance(token, bool) or not isinstance(token, int)) for token in ids):
        raise field_error(field, value, "a token's number, or a list of them", file)


def _check_layer_types(where: str, part: dict[str, Any], aliases: Mapping[str, str]) -> None:
    kinds = part.get("layer_types")
    if kinds is None:
        return
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise field_error(where + "layer_types", kinds, "a list of names, one for each layer")
    layers = part.get(aliases.get("num_hidden_layers", "num_hidden_layers"), part.get("num_hidden_layers"))
    if layers is not None and len(kinds) != layers:
        raise CheckpointError(f"config.json: {where}layer_types names {len(kinds)} layers of {layers}.", param="model")


def _check_names(where: str, part: dict[str, Any]) -> None:
    for name in _ACTIVATIONS:
        value = part.get(name)
        if value is not None and (not isinstance(value, str) or value not in ACT2FN):
            raise field_error(where + name, value, f"one of {', '.join(sorted(ACT2FN))}")


# -- rotary embeddings -------------------------------------------------------------------------------------------

_ROPE_NUMBERS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ROPE_OPTIONAL = (
    "rope_theta", "factor", "attention_factor", "original_max_position_embeddings", "partial_rotary_factor",
    "beta_fast", "beta_slow",
)  # fmt: skip


def _check_rope(field: str, rope: object) -> None:
    """One dictionary, or one for each kind of layer."""
    if not isinstance(rope, dict):
        raise field_error(field, rope, "an object with rope_type and its numbers")
    nested = {name: value for name, value in rope.items() if isinstance(value, dict)}
    if nested:
        for name, value in nested.items():
            _check_rope(f"{field}.{name}", value)
        return
    named = "rope_type" if "rope_type" in rope else "type"
    kind = rope.get(named, "default")
    if isinstance(kind, str) and kind in _OLD_ROPE_TYPES:
        kind = rope[named] = _OLD_ROPE_TYPES[kind]
    if kind not in (*ROPE_TYPES, "mrope", "axial"):
        raise field_error(f"{field}.{named}", kind, f"one of {', '.join(ROPE_TYPES)}")
    for name in _ROPE_NUMBERS.get(kind, ()):
        if rope.get(name) is None:
            raise CheckpointError(f"config.json: {field} of type {kind} lacks {name}.", param="model")
    for name in {*_ROPE_NUMBERS.get(kind, ()), *_ROPE_OPTIONAL} & rope.keys():
        if rope[name] is not None:
            _check_number(f"{field}.{name}", rope[name], above=0.0)
    original = rope.get("original_max_position_embeddings")
    if original is not None and original != int(original):
        raise field_error(f"{field}.original_max_position_embeddings", original, "an integer")
    if rope.get("factor") is not None and rope["factor"] < 1:
        raise field_error(f"{field}.factor", rope["factor"], "at least 1")
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise field_error(f"{field}.high_freq_factor", rope["high_freq_factor"], "above low_freq_factor")
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            _check_factors(f"{field}.{name}", rope.get(name))


def _check_factors(field: str, factors: object) -> None:
    if not isinstance(factors, list) or not factors:
        raise field_error(field, factors, "a list of numbers, one for each frequency")
    for factor in factors:
        _check_number(field, factor, above=0.0)


# -- after the config has been read --------------------------------------------------------------------------------


def check_shape(text: Any) -> None:
    """What fields of a config, as the model's own class has them, mean together. Raises `CheckpointError`."""
    heads, hidden = text.num_attention_heads, text.hidden_size
    head_dim = getattr(text, "head_dim", None)
    if not head_dim and hidden % heads:
        raise field_error("hidden_size", hidden, f"a multiple of num_attention_heads, {heads}")
    groups = getattr(text, "num_key_value_heads", None)
    if isinstance(groups, int) and groups and heads % groups:
        raise field_error("num_attention_heads", heads, f"a multiple of num_key_value_heads, {groups}")
    if getattr(text, "kv_lora_rank", None):
        for name in LATENT[2:]:
            if not getattr(text, name, None):
                raise field_error(name, getattr(text, name, None), "above 0")
    padding = getattr(text, "pad_token_id", None)
    if padding is not None and not -text.vocab_size <= padding < text.vocab_size:
        raise field_error("pad_token_id", padding, f"below vocab_size, {text.vocab_size}")
    for name in EXPERTS:
        count, used = getattr(text, name, None), getattr(text, "num_experts_per_tok", None)
        if isinstance(count, int) and isinstance(used, int) and used > count > 0:
            raise field_error("num_experts_per_tok", used, f"at most {name}, {count}")
    rope = getattr(text, "rope_parameters", None) or {}
    width = head_dim or hidden // heads
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") == "longrope":
            wanted = int(width * (part.get("partial_rotary_factor") or 1.0)) // 2
            for name in ("short_factor", "long_factor"):
                if len(part[name]) != wanted:
                    raise CheckpointError(
                        f"config.json: {name} of the rotary embedding has {len(part[name])} numbers of {wanted}.",
                        param="model",
                    )
