"""Reads an encoder from a directory: transformers' own model, in the dtype of its files, on one device.

What is checked comes before anything is allocated: the files, the config, the layout, the memory.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING
from transformers.utils import logging as transformers_logging

from core.devices import DeviceBudget
from core.embedding.encoder import Encoder
from core.embedding.layout import Layout, read_layout
from core.errors import CheckpointError, UnsupportedModelError, VRAMancerError
from core.logs import get_logger
from core.models.architecture import read_config, served_dtype
from core.models.blank import BUILDING
from core.models.checkpoint import Checkpoint
from core.models.formats import refuse_quantized
from core.models.json_files import read_json_object, shown
from core.models.resolve import ResolvedModel
from core.models.tokenizer import Tokenizer

logger = get_logger(__name__)

Kind = Literal["embedding", "reranker"]
WEIGHTS, WORKSPACE = "embedding weights", "embedding workspace"
"""What they are called in a device's ledger."""

_CLASSIFIERS = "ForSequenceClassification"
_MANY_TOKENS = 1 << 20
"""Lengths of tokenizers beyond it mean that there is no limit."""
_OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "data2vec-text"})
"""Types whose positions are counted from behind the padding token's number on."""
_WORKSPACE_WIDTHS = 16
"""Vectors of the hidden size that a layer holds for each token at a time: q, k, v, their products, copies of them; and
for the intermediate size:"""
_WORKSPACE_INTERMEDIATES = 3


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """What clients may know of a loaded encoder. `dimensions` are those of its vectors; a reranker has scores."""

    kind: Kind
    name: str
    path: Path
    source: str
    created: int
    max_model_len: int
    vocab_size: int
    dimensions: int
    dtype: str
    device: str
    num_parameters: int
    layout: Layout
    tokenizer: Tokenizer = field(repr=False)

    def knows(self, name: str) -> bool:
        """Whether clients may call the model by this name."""
        names = (self.name, self.name.rpartition("/")[2], self.source, str(self.path))
        asked = name.strip("/")
        return bool(asked) and any(asked == known.strip("/") for known in names)


def load_encoder(
    resolved: ResolvedModel, source: str, budget: DeviceBudget, *, max_batch_tokens: int
) -> tuple[EncoderInfo, Encoder]:
    """Read the model in `resolved`, which was asked for as `source`, onto the budget's device.

    Raises `CheckpointError` and `UnsupportedModelError` for what is in the directory, `OutOfDeviceMemoryError` where it
    does not fit; nothing stays allocated or reserved then.
    """
    layout = read_layout(resolved.path, otherwise="mean")
    path = resolved.path / layout.folder
    raw = read_json_object(path / "config.json")
    with Checkpoint(path) as checkpoint:
        stored = checkpoint.tensors()
        refuse_quantized(resolved.name, raw, {name: tensor.get_dtype() for name, tensor in stored.items()})
        config = read_config(path, raw, stored, may_lack_layers=True)
        dtype = served_dtype(config, "auto", stored)
        weight_bytes = sum(math.prod(tensor.get_shape()) for tensor in stored.values()) * dtype.itemsize
    kind = _kind(resolved.name, config)
    if not layout.named and kind == "embedding" and _is_causal(config):
        layout = read_layout(resolved.path, otherwise="lasttoken")
    activation = _activation(raw) if kind == "reranker" else None
    tokenizer = Tokenizer.from_directory(path)
    length = _max_length(path, config, layout)
    budget.reserve(WEIGHTS, weight_bytes)
    try:
        budget.reserve(WORKSPACE, workspace_bytes(config, dtype, max(max_batch_tokens, length)))
        model = _read_model(path, config, dtype, kind).to(budget.device.torch_device).eval()
        encoder = Encoder(model, layout, torch.device(budget.device.torch_device), _pad_id(config), activation)
        _try_out(resolved.name, encoder)
    except BaseException as error:
        release(budget)
        if isinstance(error, VRAMancerError) or not isinstance(error, Exception):
            raise
        logger.warning("an encoder cannot be built", model=resolved.name, error=repr(error))
        raise CheckpointError(
            f"{resolved.name} cannot be built from its files: {type(error).__name__}; the log has the cause.",
            param="model",
        ) from error
    info = EncoderInfo(
        kind=kind,
        name=resolved.name,
        path=resolved.path,
        source=source,
        created=int(time.time()),
        max_model_len=length,
        vocab_size=int(config.get_text_config().vocab_size),
        dimensions=int(config.get_text_config().hidden_size) * len(layout.poolings) if kind == "embedding" else 1,
        dtype=str(dtype).removeprefix("torch."),
        device=budget.device.name,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        layout=layout,
        tokenizer=tokenizer,
    )
    return info, encoder


def release(budget: DeviceBudget) -> None:
    """Give an encoder's memory back."""
    budget.release(WEIGHTS)
    budget.release(WORKSPACE)


def workspace_bytes(config: PreTrainedConfig, dtype: torch.dtype, tokens: int) -> int:
    """What a forward pass over so many tokens holds at its peak: a layer's activations, and the pooled numbers in
    fp32."""
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    return tokens * (
        (_WORKSPACE_WIDTHS * hidden + _WORKSPACE_INTERMEDIATES * inner) * dtype.itemsize
        + 2 * hidden * torch.float32.itemsize
    )


def _kind(name: str, config: PreTrainedConfig) -> Kind:
    """By the architecture that the config names."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model, which gives no embeddings here.", param="model"
        )
    if not any(str(each).endswith(_CLASSIFIERS) for each in getattr(config, "architectures", None) or ()):
        return "embedding"
    if config.num_labels != 1:
        raise UnsupportedModelError(
            f"{name} sorts texts into {config.num_labels} classes; a reranker has one label.", param="model"
        )
    return "reranker"


def _is_causal(config: PreTrainedConfig) -> bool:
    names = [str(name) for name in getattr(config, "architectures", None) or ()]
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def _activation(raw: Mapping[str, Any]) -> str:
    """What makes a score of a reranker's output: "sigmoid" or "identity", as sentence-transformers keeps it."""
    kept = raw.get("sentence_transformers")
    named = kept.get("activation_fn") if isinstance(kept, dict) else raw.get("sbert_ce_default_activation_function")
    last = str(named or "Sigmoid").rpartition(".")[2]
    if last not in ("Sigmoid", "Identity"):
        raise UnsupportedModelError(
            f"config.json: the activation of the reranker's score is {shown(named)}; Sigmoid and Identity are "
            "supported.",
            param="model",
        )
    return last.lower()


def _max_length(path: Path, config: PreTrainedConfig, layout: Layout) -> int:
    """The least of what the layout, the tokenizer and the positions of the model allow."""
    text = config.get_text_config()
    most = int(getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 512)
    if config.model_type in _OFFSET_POSITIONS:
        most -= int(text.pad_token_id or 0) + 1
    file = path / "tokenizer_config.json"
    named = read_json_object(file).get("model_max_length") if file.is_file() else None
    limits = [most, layout.max_seq_length]
    if isinstance(named, (int, float)) and 0 < named < _MANY_TOKENS:
        limits.append(int(named))
    return max(1, min(limit for limit in limits if limit is not None))


def _pad_id(config: PreTrainedConfig) -> int:
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0


def _read_model(path: Path, config: PreTrainedConfig, dtype: torch.dtype, kind: Kind) -> Any:
    mapping = MODEL_MAPPING if kind == "embedding" else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    try:
        found = mapping[type(config)]
    except KeyError:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} has no {'encoder' if kind == 'embedding' else 'reranker'} in "
            "transformers.",
            param="model",
        ) from None
    model_class: Any = found[0] if isinstance(found, tuple) else found
    more = {}
    if kind == "embedding" and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        more["add_pooling_layer"] = False
    with BUILDING:
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            model, told = model_class.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **more,
            )
        finally:
            transformers_logging.set_verbosity(verbosity)
    missing = sorted(name for name in told["missing_keys"] if "pooler" not in name or kind == "reranker")
    wrong = sorted(str(each) for each in told["mismatched_keys"])
    if missing or wrong:
        raise CheckpointError(
            f"{path.name} lacks {missing[0]}." if missing else f"{path.name} has {wrong[0]} in another shape.",
            param="model",
        )
    return model


def _try_out(name: str, encoder: Encoder) -> None:
    """Compute something, so that a model that was loaded is one that works."""
    values = encoder([[0, 0]], None, [0])
    if not bool(torch.isfinite(torch.from_numpy(values)).all()):
        raise CheckpointError(f"{name} computes numbers that are not finite; its weights are damaged.", param="model")
