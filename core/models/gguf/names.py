"""GGUF's names of tensors, in the words of transformers' classes, and what llama.cpp's converter changes in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from core.errors import UnsupportedModelError

_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_LLAMA = {**_ATTENTION, **_MLP, "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA2 = {
    **_ATTENTION, **_MLP, "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_PHI3 = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}

FROM_METADATA = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that say what a config says."""


@dataclass(frozen=True, slots=True)
class Naming:
    """How tensors of one architecture are called, and kept. `interleaved`: rows of queries and keys pair neighbours
    where transformers pairs halves. `norms_from_one`: norms have 1 added. `tied`: there is never a head of its own."""

    layer: Mapping[str, str]
    interleaved: bool = False
    norms_from_one: bool = False
    tied: bool = False


NAMINGS: Mapping[str, Naming] = {
    "llama": Naming(_LLAMA, interleaved=True),
    "mistral": Naming(_LLAMA, interleaved=True),
    "qwen2": Naming(_LLAMA),
    "qwen3": Naming({**_LLAMA, **_HEAD_NORMS}),
    "gemma": Naming({**_LLAMA}, norms_from_one=True, tied=True),
    "gemma2": Naming(_GEMMA2, norms_from_one=True, tied=True),
    "gemma3": Naming({**_GEMMA2, **_HEAD_NORMS}, norms_from_one=True, tied=True),
    "phi3": Naming(_PHI3),
}


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's name in the model; `heads` where its rows have to be paired anew, `less` what is subtracted."""

    name: str
    heads: int = 0
    less: float = field(default=0.0)

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or its rows of bytes, as the model has it."""
        if self.heads:
            tensor = pair_halves(tensor, self.heads)
        return tensor.float() - self.less if self.less else tensor


def pair_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows `[heads * d, ...]` of which neighbours rotate together, as those of which halves do."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).flatten(0, 2).contiguous()


def naming_of(architecture: str) -> Naming:
    """Raises `UnsupportedModelError` for an architecture that is not known."""
    if architecture not in NAMINGS:
        raise UnsupportedModelError(
            f"GGUF files of the architecture {architecture!r} are not supported; these are: {', '.join(NAMINGS)}. "
            "Other models are served from their safetensors checkpoints.",
            param="model",
        )
    return NAMINGS[architecture]


def placing(architecture: str, heads: int, kv_heads: int) -> Callable[[str], Place | None]:
    """Tells of each of GGUF's names where its tensor belongs; None for those that the config has said already.
    Raises `UnsupportedModelError` for names that the architecture does not have."""
    naming = naming_of(architecture)

    def place(name: str) -> Place | None:
        if name in FROM_METADATA:
            return None
        match = _LAYER.fullmatch(name)
        if match is None:
            outer, _, kind = name.rpartition(".")
            if outer in _OUTER and kind == "weight":
                less = 1.0 if naming.norms_from_one and outer == "output_norm" else 0.0
                return Place(f"{_OUTER[outer]}.weight", less=less)
            raise _unknown(name, architecture)
        layer, part, kind = match.groups()
        if part not in naming.layer:
            raise _unknown(name, architecture)
        paired = {"attn_q": heads, "attn_k": kv_heads} if naming.interleaved else {}
        less = 1.0 if naming.norms_from_one and part.endswith("norm") else 0.0
        return Place(f"model.layers.{layer}.{naming.layer[part]}.{kind}", paired.get(part, 0), less)

    return place


def _unknown(name: str, architecture: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name} is no tensor of a {architecture} model in GGUF.", param="model")
