"""Whether a checkpoint's tensors are those of the model that its config describes: a load without numbers, on `meta`,
by the library's own rules for names, joined experts and ties. So a model that does not load is refused before another
one has to make room for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from core.errors import CheckpointError
from core.logs import get_logger
from core.models.architecture import Architecture, read_architecture
from core.models.checkpoint import Checkpoint
from core.models.generation import read_generation
from core.models.json_files import read_json_object
from core.models.stage_model import StageSlice, build_stage, stored_tensors
from core.quantization.choice import AS_IT_IS, QuantizeChoice

logger = get_logger(__name__)

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts",
    "n_routed_experts", "max_position_embeddings", "head_dim",
)  # fmt: skip
_TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tiktoken.model",
)  # fmt: skip
_HARMLESS = ("inv_freq", "masked_bias", "attn.bias", "attention.bias", "embed_positions.weights")
"""Ends of names of what models used to keep in files and compute today."""


def checked_notes(path: Path, dtype: str = "auto", quantize: QuantizeChoice = AS_IT_IS) -> tuple[str, ...]:
    """Check all files of a checkpoint, those of its tokenizer for being JSON alone. Returns what there is to say of
    them; raises `CheckpointError` with file and field, and `UnsupportedModelError`."""
    architecture = read_architecture(path, dtype, quantize)
    if not any((path / name).is_file() for name in _VOCABULARIES):
        raise CheckpointError(f"{path.name} has no tokenizer.json, nor another file of a tokenizer.", param="model")
    for name in _TOKENIZER_JSON:
        if (path / name).is_file():
            read_json_object(path / name)
    return *check_fit(architecture, path), *read_generation(path, architecture.vocab_size).notes


def check_fit(architecture: Architecture, path: Path) -> tuple[str, ...]:
    """What there is to say of tensors that are left out. Raises `CheckpointError` for what lacks, does not fit, or is
    part of a larger model than the config describes."""
    with Checkpoint(path) as checkpoint:
        stored = stored_tensors(architecture, checkpoint)
    blank = {
        name: torch.empty(tensor.shape, device="meta", dtype=architecture.dtype) for name, tensor in stored.items()
    }
    whole = StageSlice(0, architecture.num_layers, architecture.num_layers)
    try:
        _, info = build_stage(architecture, whole, torch.device("meta"), blank, "eager", may_mismatch=True)
    except CheckpointError:
        raise
    except Exception as error:
        logger.warning("tensors cannot be joined", model=path.name, error=repr(error))
        raise CheckpointError(
            f"{path.name} does not match its config.json: its tensors are not those of "
            f"{architecture.model_class.__name__}, or some that belong together differ in shape."
        ) from error
    _refuse_missing(architecture, path, sorted(info["missing_keys"]))
    mismatched = sorted(info["mismatched_keys"], key=str)
    if mismatched:
        name, has, wanted = mismatched[0]
        raise CheckpointError(
            f"{_file_of(name, stored, path)} does not match config.json: {name} has the wrong shape, {list(has)}; "
            f"the config asks for {list(wanted)}{_fields(architecture, has, wanted)}."
        )
    return _left_out(architecture, path, sorted(info["unexpected_keys"]))


def _refuse_missing(architecture: Architecture, path: Path, missing: list[str]) -> None:
    if not missing:
        return
    layer = _layer(missing[0])
    hint = ""
    if layer is not None and layer >= 0 and all((_layer(name) or 0) >= layer for name in missing):
        hint = f" config.json asks for {architecture.num_layers} layers (num_hidden_layers)."
    elif not architecture.tied and any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in missing):
        hint = " Should the head share the embedding, config.json has to say so (tie_word_embeddings)."
    raise CheckpointError(f"{path.name} lacks {len(missing)} tensors, such as {missing[0]}.{hint}")


def _left_out(architecture: Architecture, path: Path, unexpected: list[str]) -> tuple[str, ...]:
    names = [name for name in unexpected if not name.endswith(_HARMLESS)]
    text = architecture.config.get_text_config()
    known = architecture.num_layers + int(getattr(text, "num_nextn_predict_layers", None) or 0)
    more = next((name for name in names if (_layer(name) or 0) >= known), None)
    if more is not None:
        raise CheckpointError(
            f"{path.name} has more layers than the {architecture.num_layers} of its config.json (num_hidden_layers): "
            f"{more}."
        )
    return (f"{len(names)} tensors are not the model's and are left out, such as {names[0]}",) if names else ()


def _layer(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def _file_of(name: str, stored: Mapping[str, Any], path: Path) -> str:
    tensor = next((each for key, each in stored.items() if key == name or name.endswith(f".{key}")), None)
    return f"{tensor.file} of {path.name}" if tensor is not None else path.name


def _fields(architecture: Architecture, has: Any, wanted: Any) -> str:
    """The fields that may be meant where dimensions differ."""
    config = architecture.config.get_text_config()
    sizes = {size for size in wanted if size not in tuple(has)}
    names = [name for name in _SIZES if getattr(config, name, None) in sizes]
    return f" ({', '.join(names)})" if names else ""
