"""Cutting a Hugging Face causal model into stages, each loaded straight onto its own device.

A stage is the architecture's own class with the parts that other stages hold taken out while the model is still on
`meta`. So `forward` stays the library's: scaling, rotary variants and the final norm are whatever the architecture
does. Layers of other stages become pass-throughs under their own index, because several architectures look up masks
and rotary embeddings by position in the list. What a stage receives is put in front of its first layer, behind
anything that `forward` does to embeddings (granite multiplies them, gpt2 and opt add positions), so it is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from core.costs import Experts, ModelBytes
from core.errors import CheckpointError, UnsupportedModelError
from core.logs import get_logger
from core.models.architecture import Architecture
from core.models.blank import BUILDING, build_blank
from core.models.checkpoint import Checkpoint, is_finite
from core.quantization.linear import QuantModule
from core.quantization.swap import swap_in, tie_heads

logger = get_logger(__name__)

# Modules beside the layers, by the names that architectures give them.
BEFORE_LAYERS = {
    "embed_tokens", "embed_positions", "wte", "wpe", "embed_in", "word_embeddings", "tok_embeddings", "project_in",
}  # fmt: skip
# What configs call the number of experts that a token is routed to.
_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
AFTER_LAYERS = {"norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "final_norm", "project_out"}


@dataclass(frozen=True, slots=True)
class StageSlice:
    """Layers `first .. last - 1` of `num_layers`; the first stage also embeds, the last has norm and head.

    `only`, where given: these layers of them and no ends; `without` are left out. Ends that come from `elsewhere` are
    put in later.
    """

    first: int
    last: int
    num_layers: int
    only: frozenset[int] | None = None
    without: frozenset[int] = frozenset()
    first_elsewhere: bool = False
    last_elsewhere: bool = False

    @property
    def is_first(self) -> bool:
        return self.first == 0 and self.only is None and not self.first_elsewhere

    @property
    def is_last(self) -> bool:
        return self.last == self.num_layers and self.only is None and not self.last_elsewhere

    def holds(self, layer: int) -> bool:
        """Whether the layer is in it."""
        chosen = self.only is None or layer in self.only
        return self.first <= layer < self.last and chosen and layer not in self.without


class PassThrough(nn.Module):
    """Stands where another stage's layer would be. Keeps the layer's plain attributes, which `forward` may look at."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            if isinstance(value, (str, int, bool)) and name != "training":
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class NoEmbedding(nn.Module):
    """Stands where a later stage needs no embedding: whatever `forward` makes of it is replaced before layer one."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(())


def find_decoder(model: nn.Module, num_layers: int) -> tuple[nn.Module, str]:
    """The module that owns the list of decoder layers, and the list's name."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == num_layers:
                return module, name
    raise UnsupportedModelError(f"{type(model).__name__} has no list of {num_layers} decoder layers.")


def _prune(model: Any, part: StageSlice) -> None:
    decoder, list_name = find_decoder(model, part.num_layers)
    layers = getattr(decoder, list_name)
    for index in range(part.num_layers):
        if not part.holds(index):
            layers[index] = PassThrough(layers[index])
    keeps_embedding = part.is_first or (part.is_last and model.config.get_text_config().tie_word_embeddings)
    for name, child in list(decoder.named_children()):
        if name == list_name:
            continue
        if name in BEFORE_LAYERS:
            is_tokens = isinstance(child, nn.Embedding) and child is model.get_input_embeddings()
            if not part.is_first and not (is_tokens and keeps_embedding):
                setattr(decoder, name, nn.Identity() if name == "project_in" else NoEmbedding())
        elif name in AFTER_LAYERS:
            if not part.is_last:
                setattr(decoder, name, nn.Identity())
        elif part.only is not None:
            setattr(decoder, name, nn.Identity())
        elif not (part.is_first and part.is_last) and any(True for _ in child.parameters()):
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be split: the role of its part {name!r} is not known. "
                "It can be served on a single device."
            )
    if not part.is_last:
        head = model.get_output_embeddings()
        for name, child in list(model.named_children()):
            if child is head:
                setattr(model, name, nn.Identity())
        model.all_tied_weights_keys = {}


def stage_class(architecture: Architecture, part: StageSlice) -> type[Any]:
    """A subclass of the architecture's class whose instances hold one stage alone."""
    base = architecture.model_class
    is_whole = part.is_first and part.is_last and not part.without
    if is_whole and architecture.quantization is None:
        return base

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        if not is_whole:
            _prune(self, part)
        swap_in(self, architecture.quantization, architecture.dtype)

    # transformers looks up weight conversions by class name and tells library classes from custom code by module.
    return type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__})


def load_stage(
    architecture: Architecture,
    path: Path,
    part: StageSlice,
    device: torch.device,
    *,
    attention: str,
    on_read: Callable[[int], None] = lambda nbytes: None,
) -> Any:
    """Read one stage's tensors from safetensors onto `device`. Returns the causal model, cut, in eval mode.

    Raises `CheckpointError` if the checkpoint lacks tensors or their shapes do not fit the config.
    """
    try:
        with Checkpoint(path, on_read) as checkpoint:
            model, info = build_stage(architecture, part, device, stored_tensors(architecture, checkpoint), attention)
            _check_numbers(model, path, checkpoint)
    except (RuntimeError, KeyError) as error:
        logger.warning("a stage cannot be loaded", model=path.name, error=repr(error))
        raise CheckpointError(f"The tensors of {path.name} do not match its config.json.") from error
    missing, mismatched = sorted(info["missing_keys"]), sorted(str(item) for item in info["mismatched_keys"])
    if missing:
        raise CheckpointError(f"{path.name} lacks {len(missing)} tensors, such as {missing[0]}.")
    if mismatched:
        raise CheckpointError(f"{path.name} has tensors of the wrong shape: {mismatched[0]}.")
    return model


def stored_tensors(architecture: Architecture, checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What the modules of the model are read from, by name."""
    stored = checkpoint.tensors()
    return stored if architecture.quantization is None else architecture.quantization.tensors(stored)


def _check_numbers(model: Any, path: Path, checkpoint: Checkpoint) -> None:
    """Refuse weights that are not finite. Looked at where they have been put: one at a time, and once."""
    for name, weight in model.named_parameters():
        if is_finite(weight):
            continue
        for stored, tensor in checkpoint.tensors().items():
            if not is_finite(tensor[...]):
                raise CheckpointError(f"{tensor.file}: {stored} holds NaN or infinite numbers.")
        raise CheckpointError(f"{path.name}: {name} has numbers that {weight.dtype} cannot hold.")


def build_stage(
    architecture: Architecture, part: StageSlice, device: torch.device, tensors: Mapping[str, Any], attention: str,
    *, may_mismatch: bool = False,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """The causal model of one stage on `device` from tensors by name, cut, in eval mode; and transformers' report.
    Tensors of a wrong shape are an error unless they `may_mismatch`; then the report has them."""
    with BUILDING:
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            model, info = stage_class(architecture, part).from_pretrained(
                None,
                config=architecture.config,
                state_dict=tensors,
                dtype=architecture.dtype,
                device_map=None if device.type == "cpu" else {"": device},
                attn_implementation=attention,
                generation_config=GenerationConfig(),
                output_loading_info=True,
                ignore_mismatched_sizes=may_mismatch,
            )
        finally:
            transformers_logging.set_verbosity(verbosity)
    tie_heads(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval(), info


def load_layers(
    architecture: Architecture,
    path: Path,
    layers: frozenset[int],
    *,
    attention: str,
    on_read: Callable[[int], None] = lambda nbytes: None,
) -> dict[int, nn.Module]:
    """Read some decoder layers into main memory, to be put into a stage. Raises what `load_stage` raises."""
    part = StageSlice(0, architecture.num_layers, architecture.num_layers, only=layers)
    model = load_stage(architecture, path, part, torch.device("cpu"), attention=attention, on_read=on_read)
    decoder, name = find_decoder(model, architecture.num_layers)
    return {index: getattr(decoder, name)[index] for index in layers}


def blank_model(architecture: Architecture) -> Any:
    """The whole model on `meta`. Raises `CheckpointError` for a config that its class cannot build a model of."""
    model = build_blank(architecture.model_class, architecture.config, architecture.dtype)
    swap_in(model, architecture.quantization, architecture.dtype)
    tie_heads(model)
    return model


def measure_bytes(architecture: Architecture, packing: Callable[[nn.Module], int] | None = None) -> ModelBytes:
    """Count every parameter on `meta`, without weights; `packing` says what a module takes beyond its parameters."""
    model = blank_model(architecture)
    decoder, list_name = find_decoder(model, architecture.num_layers)
    blocks, head = list(getattr(decoder, list_name)), model.get_output_embeddings()

    def nbytes(module: nn.Module | None) -> int:
        if module is None:
            return 0
        total = sum(tensor.nbytes for tensor in _tensors(module))
        if packing is None or (module is head and architecture.tied):
            return total
        return total + packing(module)

    layers = tuple(nbytes(layer) for layer in blocks)
    after = sum(nbytes(child) for name, child in decoder.named_children() if name in AFTER_LAYERS)
    before = nbytes(decoder) - sum(layers) - after
    return ModelBytes(
        embedding=before,
        layers=layers,
        after=after,
        head=nbytes(head),
        tied=architecture.tied,
        num_parameters=_count(model, with_buffers=False),
        layer_parameters=tuple(_count(layer) for layer in blocks),
        head_parameters=_count(head) if head is not None else 0,
        experts=_experts(architecture, blocks),
    )


def _experts(architecture: Architecture, layers: Sequence[nn.Module]) -> Experts | None:
    """The routed experts of all layers; None where there are none, or where nothing says how many a token uses."""
    config = architecture.config.get_text_config()
    per_token = next((int(count) for name in _PER_TOKEN if (count := getattr(config, name, None))), 0)
    nbytes, number = zip(*map(_routed, layers), strict=True)
    return Experts(nbytes, number, per_token) if per_token and any(number) else None


def _routed(layer: nn.Module) -> tuple[int, int]:
    """Bytes and number of a layer's routed experts: tensors with one entry per expert, or a module for each."""
    nbytes, number = 0, 0
    for name, parameter in layer.named_parameters():
        _, within, rest = f".{name}".partition(".experts.")
        if not within:
            continue
        nbytes += parameter.numel() * parameter.element_size()
        index = rest.split(".")[0]
        number = max(number, int(index) + 1 if index.isdigit() else parameter.shape[0])
    return nbytes, number


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _count(module: nn.Module, *, with_buffers: bool = True) -> int:
    """Numbers in a module's tensors, each counted once; of a quantized weight, those that it stands for."""
    total, seen = 0, set[int]()
    for child in module.modules():
        if isinstance(child, QuantModule):
            codes = id(child._buffers["codes"])
            total += 0 if codes in seen else child.num_parameters
            seen.add(codes)
        else:
            tensors = [*child.parameters(recurse=False), *(child.buffers(recurse=False) if with_buffers else ())]
            total += sum(tensor.numel() for tensor in tensors if id(tensor) not in seen)
            seen.update(map(id, tensors))
    return total
