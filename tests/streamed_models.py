"""Models that are larger than the devices they are served on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_models import build_tiny
from transformers import PreTrainedModel

from core.models.architecture import read_architecture
from core.models.stage_model import measure_bytes

LAYERS = 24
_MOE_INNER = 64

CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": LAYERS, "intermediate_size": 256},
    "qwen3": {"num_hidden_layers": LAYERS, "intermediate_size": 256},
    "gemma3_text": {
        "num_hidden_layers": LAYERS,
        "intermediate_size": 256,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * (LAYERS // 4),
    },
    "gpt2": {
        "n_layer": LAYERS,
        "num_hidden_layers": None,
        "n_inner": 768,
        "intermediate_size": None,
        "n_positions": 128,
        "max_position_embeddings": None,
    },
    "mixtral": {"num_hidden_layers": LAYERS, "intermediate_size": _MOE_INNER},
}
"""Of the tiny models' configs: many layers, each large beside its KV."""  # fmt: skip

ENGINE = {
    "engine__block_size": 4, "engine__kv_cache_tokens": 96, "engine__max_num_batched_tokens": 16,
    "engine__max_batch_size": 8, "model__max_model_len": 96,
}  # fmt: skip
"""Settings with which KV and workspace are small beside the weights."""


def build_deep(name: str, directory: Path) -> PreTrainedModel:
    """Like `build_tiny`, with many layers."""
    return build_tiny(name, directory, **CHANGES[name])


def weight_bytes(path: Path) -> int:
    """All weights of a model."""
    weights = measure_bytes(read_architecture(path))
    return weights.embedding + sum(weights.layers) + weights.after + (0 if weights.tied else weights.head)


def half_of_it(path: Path, stages: int, kind: str = "cpu", speed: str = "", room: float = 1.0) -> str:
    """Devices that together have half the bytes of the model's weights, times `room`."""
    limit = int(room * weight_bytes(path) / 2) // stages
    return ",".join([f"{kind}={limit}B{speed}"] * stages)
