"""What placement asks of a model, by the arithmetic of its family, from `config.json` alone: importing torch and
transformers to build the model on `meta` takes some seconds.

Only what is plain is taken: a family that is known, with fields that mean what they say. Anything else is left to
`core.models.architecture`, which also has the words for what is wrong. Weights are exact; the memory of a step is the
largest of what lives at one time in a layer's attention and in its MLP, as transformers' modules go about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.costs import Experts, ModelBytes, Workspace
from core.costs.model import ALLOCATOR_MARGIN
from core.errors import CheckpointError
from core.models.bounds import LIMITS, MOST_EXPERTS
from core.models.json_files import read_json_object
from core.models.served_dtype import ELEMENT_BYTES
from core.quantization.choice import AS_IT_IS, QuantizeChoice
from core.quantization.form import TILE_BYTES

_INVERSE_BYTES = 4
"""Of a rotary frequency; modules keep two of each pair of a head's numbers."""
_SAMPLING_BYTES = 54
"""Per row and token of the vocabulary, with every parameter of sampling in use."""
_DEQUANTIZING_BYTES = 8.1
"""Per number of a quantized weight that is multiplied with: fp32, and the scales spread over it."""

_ACTIVATIONS = frozenset({"silu", "swish", "swiglu", "gelu", "gelu_pytorch_tanh"})
_ROPES = frozenset({"default", "linear", "llama3", "yarn", "longrope", "su"})
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_HEAD = "lm_head"
_ELSEWHERE = ("quantization_config", "compression_config", "text_config", "auto_map", "use_bidirectional_attention")
"""Fields whose models are not planned by arithmetic."""


@dataclass(frozen=True, slots=True)
class _Family:
    """How a family differs from a Llama.

    Attributes:
        tied: whether the head is the embedding where the config does not say.
        qkv_bias: whether queries, keys and values have biases; None: as `attention_bias` says, then the output too.
        norms: vectors of the hidden size in a layer.
        head_norms: whether queries and keys are normed head by head.
        joint: whether gate and up are one matrix, of which another copy lives for a moment.
        experts: names of the field with a layer's number of routed experts.
        inner: the field with the width of its MLP, or of an expert.
        expert_biases: whether experts and their router have biases, and attention a sink for each head.
        head_dim: whether the config must say it, since its default is not the hidden size over the heads.
    """

    tied: bool = False
    qkv_bias: bool | None = None
    norms: int = 2
    head_norms: bool = False
    joint: bool = False
    experts: tuple[str, ...] = ()
    inner: str = "intermediate_size"
    expert_biases: bool = False
    head_dim: bool = False


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(),
    "mistral": _Family(qkv_bias=False),
    "ministral3": _Family(qkv_bias=False, head_dim=True),
    "granite": _Family(),
    "smollm3": _Family(tied=True),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(head_norms=True, head_dim=True),
    "gemma": _Family(tied=True, head_dim=True),
    "gemma2": _Family(tied=True, norms=4, head_dim=True),
    "gemma3_text": _Family(tied=True, norms=4, head_norms=True, head_dim=True),
    "phi3": _Family(qkv_bias=False, joint=True),
    "mixtral": _Family(qkv_bias=False, experts=("num_local_experts",)),
    "qwen3_moe": _Family(
        head_norms=True, head_dim=True, experts=("num_experts", "num_local_experts"), inner="moe_intermediate_size"
    ),
    "gpt_oss": _Family(experts=("num_local_experts",), expert_biases=True, head_dim=True),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FamilyModel:
    """A model of a known family. `dtype` is that of its checkpoint, or the one that was asked for; `quantize` is what
    its weights become when they are loaded."""

    family: _Family
    dtype: str
    num_layers: int
    hidden_size: int
    inner_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    tied: bool
    has_bias: bool
    has_mlp_bias: bool
    rotary_share: float
    experts: int
    experts_per_token: int
    quantize: QuantizeChoice = AS_IT_IS

    @property
    def _query(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def _key(self) -> int:
        return self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, dtype: str) -> tuple[int, ...]:
        """By layer."""
        return (2 * self._key * ELEMENT_BYTES[dtype],) * self.num_layers

    def weights(self, dtype: str) -> ModelBytes:
        """Of all parts, in this dtype."""
        element = ELEMENT_BYTES[dtype]
        table, routed = self.vocab_size * self.hidden_size, self._routed_parameters()
        layer = self._attention_parameters() + self._mlp_parameters()
        frequencies = int(self.head_dim * self.rotary_share) * _INVERSE_BYTES
        head = table * element - self._saved(_HEAD, self.vocab_size, self.hidden_size, element)
        experts = None
        if self.experts:
            nbytes, number = (routed * element,) * self.num_layers, (self.experts,) * self.num_layers
            experts = Experts(nbytes, number, self.experts_per_token)
        return ModelBytes(
            embedding=(head if self.tied else table * element) + frequencies,
            layers=tuple(
                layer * element
                - sum(
                    self._saved(f"model.layers.{index}.{name}", n, k, element)
                    for name, (n, k) in self._linears().items()
                )
                for index in range(self.num_layers)
            ),
            after=self.hidden_size * element,
            head=head,
            tied=self.tied,
            num_parameters=table * (1 if self.tied else 2) + layer * self.num_layers + self.hidden_size,
            layer_parameters=(layer,) * self.num_layers,
            head_parameters=table,
            experts=experts,
        )

    def workspace(self, dtype: str, tokens: int, rows: int) -> Workspace:
        """For steps of `tokens` tokens of which `rows` are sampled."""
        hidden, inner, per_token = self.hidden_size, self.inner_size, self.experts_per_token
        attention = 2 * hidden + 4 * (self._query + self._key)
        if self.family.head_norms:  # queries, and what norming them in fp32 takes
            attention = max(attention, 3 * hidden + 5 * self._query + (2 * self._key if self.family.norms > 2 else 0))
        if self.experts:  # pairs of a token and an expert: what goes in, gate and up, what is made of them, what is out
            biases = hidden + 2 * inner if self.family.expert_biases else 0
            mlp = 5 * hidden + per_token * (3 * hidden + 7 * inner + biases)
        else:
            mlp = 4 * hidden + (4 if self.family.joint else 3) * inner
        each = (max(attention, mlp) + 2 * self.head_dim) * ELEMENT_BYTES[dtype]
        layers = max(tokens * each, self._dequantizing(tokens * ELEMENT_BYTES[dtype]))
        whole = tokens * hidden * ELEMENT_BYTES[dtype] + rows * self.vocab_size * ELEMENT_BYTES[dtype]
        sampling = _SAMPLING_BYTES * rows * self.vocab_size
        return Workspace(int(ALLOCATOR_MARGIN * layers), int(ALLOCATOR_MARGIN * (max(0, whole - layers) + sampling)))

    def can_quantize(self) -> bool:
        """Whether every layer that is to be quantized can be, and there is one."""
        taken = {
            (n, k) for index in range(self.num_layers) for name, (n, k) in self._linears().items()
            if self.quantize.takes(f"model.layers.{index}.{name}")
        }  # fmt: skip
        if self.quantize.takes(_HEAD, is_head=True):
            taken.add((self.vocab_size, self.hidden_size))
        return bool(taken) and all(self.quantize.form.covers(n, k) for n, k in taken)

    def _linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a layer but for routers: shapes `[n, k]` of their weights."""
        hidden, query, key, inner = self.hidden_size, self._query, self._key, self.inner_size
        found = {"self_attn.o_proj": (hidden, query)}
        if self.family.joint:
            found["self_attn.qkv_proj"] = (query + 2 * key, hidden)
        else:
            found |= {"self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden)}
            found["self_attn.v_proj"] = (key, hidden)
        if self.experts:
            return found
        if self.family.joint:
            found["mlp.gate_up_proj"] = (2 * inner, hidden)
        else:
            found |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
        return found | {"mlp.down_proj": (hidden, inner)}

    def _saved(self, name: str, n: int, k: int, element: int) -> int:
        """Bytes that quantizing a linear layer's weight `[n, k]` saves."""
        if not self.quantize.takes(name, is_head=name == _HEAD):
            return 0
        return n * k * element - self.quantize.form.nbytes(n, k)

    def _dequantizing(self, row_bytes: int) -> float:
        """The most that lives at one time around a product with a quantized weight, where `row_bytes` are those of a
        number of each token."""
        hidden, query, key, inner = self.hidden_size, self._query, self._key, self.inner_size
        beside = {  # what else lives then, in numbers of a token
            "qkv_proj": 3 * hidden, "q_proj": 3 * hidden, "k_proj": 3 * hidden + query,
            "v_proj": 3 * hidden + query + key,
            "o_proj": 3 * hidden + query, "gate_proj": 4 * hidden, "up_proj": 4 * hidden + inner,
            "gate_up_proj": 3 * hidden, "down_proj": 4 * hidden + (3 if self.family.joint else 1) * inner,
        }  # fmt: skip
        most = 0.0
        for name, (n, k) in self._linears().items():
            if any(self.quantize.takes(f"model.layers.{index}.{name}") for index in range(self.num_layers)):
                rows = max(1, TILE_BYTES // (4 * k))
                numbers = beside[name.rpartition(".")[2]] + 2 * self.head_dim + (n if n > rows else 0)
                most = max(most, numbers * row_bytes + _DEQUANTIZING_BYTES * min(n, rows) * k)
        return most

    def _attention_parameters(self) -> int:
        family, hidden = self.family, self.hidden_size
        total = hidden * (2 * self._query + 2 * self._key) + family.norms * hidden
        if family.qkv_bias or self.has_bias:
            total += self._query + 2 * self._key
        if self.has_bias:
            total += hidden
        if family.head_norms:
            total += 2 * self.head_dim
        return total + (self.num_heads if family.expert_biases else 0)

    def _routed_parameters(self) -> int:
        each = 3 * self.hidden_size * self.inner_size
        biases = 2 * self.inner_size + self.hidden_size if self.family.expert_biases else 0
        return self.experts * (each + biases)

    def _mlp_parameters(self) -> int:
        if self.experts:
            router = self.experts * (self.hidden_size + (1 if self.family.expert_biases else 0))
            return self._routed_parameters() + router
        biases = 2 * self.inner_size + self.hidden_size if self.has_mlp_bias else 0
        return 3 * self.hidden_size * self.inner_size + biases


def read_family(path: Path, asked_dtype: str = "auto", quantize: QuantizeChoice = AS_IT_IS) -> FamilyModel | None:
    """The model in a directory, if it is one of a known family and plain; None leaves it to the model's own class,
    which also knows what to say of a layer that `quantize` does not cover."""
    try:
        config = read_json_object(path / "config.json")
    except (CheckpointError, OSError):
        return None
    kind = config.get("model_type")
    family = _FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None or not _is_plain(config, family):
        return None
    dtype = asked_dtype if asked_dtype != "auto" else _dtype(config, path)
    tied = config.get("tie_word_embeddings", family.tied)
    if dtype not in ELEMENT_BYTES or (tied and _may_have_head(path)):
        return None
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    found = FamilyModel(
        family=family,
        dtype=dtype,
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        inner_size=config[family.inner],
        num_heads=heads,
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or hidden // heads,
        vocab_size=config["vocab_size"],
        max_position=config["max_position_embeddings"],
        tied=tied,
        has_bias=family.qkv_bias is None and bool(config.get("attention_bias", family.expert_biases)),
        has_mlp_bias=bool(config.get("mlp_bias", False)),
        rotary_share=float(config.get("partial_rotary_factor", 1.0)),
        experts=_experts(config, family) or 0,
        experts_per_token=config["num_experts_per_tok"] if family.experts else 0,
        quantize=quantize,
    )
    return found if not quantize.text or found.can_quantize() else None


def _is_plain(config: Mapping[str, Any], family: _Family) -> bool:
    """Whether the fields that the arithmetic asks for are there, within bounds, and nothing changes what they mean."""
    counts = ["num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size"]
    counts += ["max_position_embeddings", family.inner]
    counts += ["num_experts_per_tok"] if family.experts else []
    counts += ["head_dim"] if family.head_dim or config.get("head_dim") is not None else []
    if not all(_is_count(config.get(name), LIMITS[name]) for name in counts):
        return False
    layers, heads, groups = (
        config[name] for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    )
    if heads % groups or (config.get("head_dim") is None and config["hidden_size"] % heads):
        return False
    experts = _experts(config, family)
    if family.experts and (not _is_count(experts, MOST_EXPERTS // layers) or config["num_experts_per_tok"] > experts):
        return False
    switches = ("tie_word_embeddings", "attention_bias", "mlp_bias")
    kinds = config.get("layer_types")
    share = config.get("partial_rotary_factor", 1.0)
    return (
        all(config.get(name) in (None, False) for name in _ELSEWHERE)
        and all(isinstance(config.get(name, False), bool) for name in switches)
        and _is_name(config.get("hidden_act", config.get("hidden_activation", "silu")), _ACTIVATIONS)
        and (kinds is None or (isinstance(kinds, list) and len(kinds) == layers))
        and all(_is_name(kind, _LAYER_TYPES) for kind in kinds or ())
        and all(_is_plain_rope(config.get(name)) for name in ("rope_parameters", "rope_scaling"))
        and config.get("decoder_sparse_step", 1) == 1
        and not config.get("mlp_only_layers")
        and isinstance(share, (int, float))
        and 0 < share <= 1
    )


def _experts(config: Mapping[str, Any], family: _Family) -> Any:
    return next((config[name] for name in family.experts if name in config), None)


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _is_name(value: object, known: frozenset[str]) -> bool:
    return isinstance(value, str) and value in known


def _is_plain_rope(rope: object) -> bool:
    if rope is None:
        return True
    if not isinstance(rope, dict):
        return False
    parts = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    return all(_is_name(part.get("rope_type", part.get("type", "default")), _ROPES) for part in parts) and all(
        part.get("partial_rotary_factor", 1.0) == 1.0 for part in parts
    )


def _dtype(config: Mapping[str, Any], path: Path) -> str | None:
    """As the config says; where it does not and there are weights, they have to be looked at."""
    named = config.get("dtype") if config.get("dtype") is not None else config.get("torch_dtype")
    if isinstance(named, str):
        return named.removeprefix("torch.")
    return "float32" if named is None and not _has_weights(path) else None


def _has_weights(path: Path) -> bool:
    return any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json"))


def _may_have_head(path: Path) -> bool:
    """Whether files hold a head, which is then compared with the embedding whatever the config says."""
    from safetensors import SafetensorError, safe_open

    try:
        for file in path.glob("*.safetensors"):
            with safe_open(file, framework="np") as tensors:
                if any(name.endswith("lm_head.weight") for name in tensors.keys()):  # noqa: SIM118  no dict
                    return True
    except (OSError, SafetensorError):
        return True
    return not any(path.glob("*.safetensors")) and _has_weights(path)
