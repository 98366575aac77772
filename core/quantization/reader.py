"""What the reader of a format has to do, and a checkpoint's tensors as the modules of a quantized model take them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import torch

from core.errors import CheckpointError
from core.quantization.form import WeightForm
from core.quantization.weight import QuantizedWeight

Role: TypeAlias = Literal["linear", "head", "embedding"]

NAMES = {torch.uint8: "U8", torch.int8: "I8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


class Stored(Protocol):
    """A tensor in a file: read when it is indexed with `...`. `get_dtype` in the words of safetensors, or of GGUF."""

    @property
    def file(self) -> str: ...

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, index: Any) -> torch.Tensor: ...


class Reader(Protocol):
    """One format, made of its settings in config.json and of a checkpoint's tensors. `title` is what people call it.

    Raises `UnsupportedModelError`, with the name of what it is, for anything that the inner form cannot hold exactly,
    and `CheckpointError` for tensors that do not belong together.
    """

    title: str
    names: frozenset[str]
    """Modules of the files that are quantized."""

    def form(self, name: str, n: int, k: int, role: Role) -> WeightForm | None:
        """The form of the weight `[n, k]` of a module; None where it is not quantized. `name` is the module's, in the
        files if they have it."""
        ...

    def parts(self, name: str) -> tuple[str, ...]:
        """Tensors of the files that belong to a quantized module, beside its bias; those that are needed first."""
        ...

    def read(self, form: WeightForm, n: int, k: int, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """A module's weight from these tensors, by the last part of their names."""
        ...


@dataclass(frozen=True, slots=True)
class ModuleForm:
    """A quantized module of a model: the shape of its weight, and its form. `stored` is its name in the files."""

    form: WeightForm
    n: int
    k: int
    is_embedding: bool = False
    stored: str | None = None


@dataclass(slots=True)
class _Unpacking:
    """A weight that is read when the first of its tensors is asked for, and forgotten with the last."""

    reader: Reader
    module: ModuleForm
    parts: Mapping[str, Stored]
    left: set[str]
    lock: threading.Lock = field(default_factory=threading.Lock)
    weight: QuantizedWeight | None = None

    def take(self, name: str) -> torch.Tensor:
        with self.lock:
            if self.weight is None:
                self.weight = self._read()
            tensor: torch.Tensor = getattr(self.weight, name)
            self.left.discard(name)
            if not self.left:
                self.weight, self.left = None, set(self.module.form.tensors(self.module.n, self.module.k))
        return tensor

    def _read(self) -> QuantizedWeight:
        module = self.module
        read = {name.rpartition(".")[2]: tensor[...] for name, tensor in self.parts.items()}
        try:
            weight = self.reader.read(module.form, module.n, module.k, read)
        except CheckpointError as error:
            where = next(iter(self.parts.values())).file
            raise CheckpointError(f"{where}: {module.stored}: {error}", param="model") from error
        for name, (shape, dtype) in module.form.tensors(module.n, module.k).items():
            tensor = getattr(weight, name)
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"{module.stored}: its {name} has the shape {list(tensor.shape)}, and {list(shape)} belongs to a "
                    f"weight of {module.n} x {module.k} in {self.reader.title} ({dtype}).",
                    param="model",
                )
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                where = next(iter(self.parts.values())).file
                raise CheckpointError(f"{where}: {module.stored} holds NaN or infinite numbers.", param="model")
        return weight


class UnpackedTensor:
    """One tensor of a quantized weight, in the place of what is in the files."""

    def __init__(self, unpacking: _Unpacking, name: str) -> None:
        module = unpacking.module
        self._unpacking, self._name = unpacking, name
        self.file = next(iter(unpacking.parts.values())).file
        shape, dtype = module.form.tensors(module.n, module.k)[name]
        self.shape, self._dtype = torch.Size(shape), dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return NAMES.get(getattr(torch, self._dtype), self._dtype.upper())

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._unpacking.take(self._name)[index]


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a model is quantized: its modules by name, and the reader of their weights. `key` tells it from others."""

    title: str
    key: str
    modules: Mapping[str, ModuleForm]
    reader: Reader

    def tensors(self, stored: Mapping[str, Stored]) -> dict[str, Stored]:
        """What the model's modules take, by name: what is in the files, but for the quantized weights, which are read
        into the inner form one module at a time.

        Raises `CheckpointError` where a module lacks a tensor.
        """
        found: dict[str, Stored] = dict(stored)
        done = set()
        for name, module in self.modules.items():
            if module.stored is None or module.stored in done:
                continue
            done.add(module.stored)
            parts = {part: stored[part] for part in self.reader.parts(module.stored) if part in stored}
            if not parts:
                raise CheckpointError(f"{name} has no {self.reader.parts(module.stored)[0]}.", param="model")
            for part in parts:
                found.pop(part, None)
            names = module.form.tensors(module.n, module.k)
            unpacking = _Unpacking(self.reader, module, parts, set(names))
            for each in names:
                found[f"{module.stored}.{each}"] = UnpackedTensor(unpacking, each)
        return found
