"""Parts of a stage's model that another stage on the same device uses too, without a second copy of their weights.

A model that moves while it serves has two stages on a device for a time: one that still computes, and one that is being
made ready. Both have modules of their own, bound to their own pages, over the same tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from core.models.stage_model import AFTER_LAYERS, BEFORE_LAYERS, NoEmbedding, StageSlice, find_decoder

_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name)


@dataclass(frozen=True, slots=True)
class SharedParts:
    """Modules that stand ready: decoder layers by number, and what is before and behind the layers, by name."""

    layers: Mapping[int, nn.Module] = field(default_factory=dict)
    before: Mapping[str, nn.Module] = field(default_factory=dict)
    after: Mapping[str, nn.Module] = field(default_factory=dict)
    head: tuple[str, nn.Module] | None = None

    @property
    def nbytes(self) -> int:
        """Of all their tensors."""
        head = () if self.head is None else (self.head[1],)
        return tensor_bytes((*self.layers.values(), *self.before.values(), *self.after.values(), *head))

    def missing(self, part: StageSlice) -> StageSlice:
        """What of a stage still has to be read."""
        return replace(
            part,
            without=part.without | self.layers.keys(),
            first_elsewhere=part.is_first and bool(self.before),
            last_elsewhere=part.is_last and self.head is not None,
        )

    def put_into(self, model: Any, part: StageSlice) -> None:
        """Complete a stage's model whose other parts have been read."""
        decoder, name = find_decoder(model, part.num_layers)
        layers = getattr(decoder, name)
        for index, layer in self.layers.items():
            layers[index] = layer
        for child_name, child in (*self.before.items(), *self.after.items()):
            setattr(decoder, child_name, child)
        if self.head is not None:
            setattr(model, *self.head)


def tensor_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the tensors of some modules, each counted once."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    unique = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    return sum(unique.values())


def share_parts(model: Any, has: StageSlice, wanted: StageSlice, copied: Callable[[nn.Module], None]) -> SharedParts:
    """What a stage with the slice `wanted` can use of the model of one with `has`. `copied` is called with each module
    that is not the original's, to let it forget what it knows of its surroundings.

    Layers that stream, and modules that something has been hung around, are left out; so are the ends, where an
    embedding and a head of one weight come together: the other would have to be read, and would be a second copy.
    """
    decoder, name = find_decoder(model, has.num_layers)
    layers = getattr(decoder, name)
    common = [index for index in range(has.num_layers) if has.holds(index) and wanted.holds(index)]
    shared = {index: share(layers[index], copied) for index in common if _is_plain(layers[index])}
    if joins_tied_ends(has, wanted, tied=model.config.get_text_config().tie_word_embeddings):
        return SharedParts(shared)
    before: dict[str, nn.Module] = {}
    after: dict[str, nn.Module] = {}
    head: tuple[str, nn.Module] | None = None
    children = dict(decoder.named_children())
    if has.is_first and wanted.is_first:
        kept = {key: child for key, child in children.items() if key in BEFORE_LAYERS}
        before = {key: share(child, copied) for key, child in kept.items() if not isinstance(child, NoEmbedding)}
    output = model.get_output_embeddings()
    named = next((key for key, child in model.named_children() if child is output), None)
    if has.is_last and wanted.is_last and named is not None and _is_plain(output):
        after = {key: share(child, copied) for key, child in children.items() if key in AFTER_LAYERS}
        head = (named, share(output, copied))
    return SharedParts(shared, before, after, head)


def joins_tied_ends(has: StageSlice, wanted: StageSlice, *, tied: bool) -> bool:
    """Whether `wanted` has embedding and head, which share a weight if they are `tied`, and `has` only one of them."""
    return tied and wanted.is_first and wanted.is_last and not (has.is_first and has.is_last)


def _is_plain(module: nn.Module) -> bool:
    """Whether nothing replaces the modules' `forward` by something that is bound to these very objects."""
    return not any("forward" in vars(child) or hasattr(child, "_hf_hook") for child in module.modules())


def share(module: nn.Module, copied: Callable[[nn.Module], None]) -> nn.Module:
    """A module with the same tensors and children shared in the same way, without the hooks of the original."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(vars(module))
    for hooks in _HOOKS:
        if isinstance(getattr(module, hooks, None), dict):
            twin.__dict__[hooks] = OrderedDict()
    twin._parameters = dict(module._parameters)
    twin._buffers = dict(module._buffers)
    twin._modules = {name: None if child is None else share(child, copied) for name, child in module._modules.items()}
    copied(twin)
    return twin
