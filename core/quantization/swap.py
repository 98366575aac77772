"""Quantized modules in the place of a model's own, while it is on `meta`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from core.errors import UnsupportedModelError
from core.quantization.linear import QuantEmbedding, QuantLinear, QuantModule
from core.quantization.reader import ModuleForm, Quantization, Reader, Role, Stored


def find_modules(model: Any, reader: Reader, stored: Mapping[str, Stored], *, tied: bool) -> dict[str, ModuleForm]:
    """The modules of a whole model (on `meta`) whose weights are quantized. `stored` are the files' tensors, if there
    are any. Raises what the reader raises."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    known = _by_ending(stored)
    found: dict[str, ModuleForm] = {}
    for name, module in model.named_modules():
        size = _shape(module)
        if size is None:
            continue
        place = known.get(_ending(name), name)
        role: Role = "head" if module is head else "embedding" if isinstance(module, nn.Embedding) else "linear"
        form = reader.form(place, *size, role)
        if form is None:
            continue
        if not form.covers(*size):
            raise UnsupportedModelError(
                f"{name} is quantized ({reader.title}), but its {size[1]} columns are not a multiple of 8.",
                param="model",
            )
        found[name] = ModuleForm(form, *size, isinstance(module, nn.Embedding), place)
    if tied and head is not None:
        _tie(model, head, table, found, known)
    return found


def _tie(model: Any, head: nn.Module, table: nn.Module, found: dict[str, ModuleForm], known: Mapping[str, str]) -> None:
    """A tied head is what the embedding is, and is in the files under either's name."""
    names = {id(module): name for name, module in model.named_modules()}
    of_head, of_table = names[id(head)], names[id(table)]
    given = found.pop(of_head, None)
    entry = found.get(of_table)
    if entry is None and given is not None:
        place = known.get(_ending(of_table)) or known.get(_ending(of_head), of_table)
        entry = ModuleForm(given.form, given.n, given.k, True, place)
        found[of_table] = entry
    if entry is not None:
        found[of_head] = ModuleForm(entry.form, entry.n, entry.k, False, None)


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """Of the weight of a module that has a quantized twin."""
    if type(module) is nn.Linear:
        return module.out_features, module.in_features
    if isinstance(module, nn.Embedding) and (type(module) is nn.Embedding or _factor_of(module) is not None):
        return module.num_embeddings, module.embedding_dim
    return None


def _factor_of(module: nn.Embedding) -> float | None:
    """What an embedding multiplies its rows by: Gemma's does."""
    scale = getattr(module, "scalar_embed_scale", None)
    return float(scale) if isinstance(scale, (int, float)) else None


def _ending(name: str) -> str:
    """A module's name without what files may put before it, or leave out."""
    for prefix in ("language_model.", "model.", "language_model.", "model.", "transformer."):
        name = name.removeprefix(prefix)
    return name


def _by_ending(stored: Mapping[str, Stored]) -> dict[str, str]:
    """Modules as the files call them, by their names without such a beginning."""
    return {_ending(module): module for module in (name.rpartition(".")[0] for name in stored)}


def swap_in(model: Any, quantization: Quantization | None, dtype: torch.dtype) -> None:
    """Put quantized modules in their places in a model, or in what of it is left in a stage. On `meta`; a tied head has
    no tensors until `tie_heads`."""
    if quantization is None:
        return
    for name, entry in quantization.modules.items():
        parent_name, _, child_name = name.rpartition(".")
        parent = _submodule(model, parent_name)
        child = getattr(parent, child_name, None)
        if type(child) is nn.Linear:
            new: QuantModule = QuantLinear(
                entry.form, entry.k, entry.n, bias=child.bias is not None, dtype=dtype, device="meta"
            )
        elif isinstance(child, nn.Embedding):
            new = QuantEmbedding(
                entry.form, entry.n, entry.k, dtype=dtype, device="meta", factor=_factor_of(child) or 1.0
            )
        else:
            continue  # another stage's
        if entry.stored is None:
            new._buffers.clear()
        setattr(parent, child_name, new)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    kept = {target: source for target, source in tied.items() if target.rpartition(".")[0] not in quantization.modules}
    model.all_tied_weights_keys = kept


def tie_heads(model: Any) -> None:
    """Give a tied head the tensors of the embedding; the library's loader knows of parameters alone."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, QuantModule) and isinstance(table, QuantModule) and not head._buffers:
        head._buffers.update(table._buffers)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    module: Any = model
    for part in name.split(".") if name else ():
        module = getattr(module, part, None) if isinstance(module, nn.Module) else None
    return module if isinstance(module, nn.Module) else None


def quantized_modules(model: nn.Module) -> Iterator[QuantModule]:
    """All of them."""
    return (module for module in model.modules() if isinstance(module, QuantModule))
