"""Which weights are quantized when a model is loaded, and to what. Pure: no torch."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from core.config_schema import ModelSettings
from core.quantization.form import WeightForm

DEFAULT_GROUPS = {"int8": 128, "int4": 64}
HEAD = "head"
"""What a pattern calls the output layer, whatever its name in a model."""

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Last parts of the names of layers that choose experts; they are small, and stay as they are."""


@dataclass(frozen=True, slots=True)
class QuantizeChoice:
    """`kind` is none, int8 or int4; `keep` are patterns of the names of linear layers that stay as they are."""

    kind: str = "none"
    group: int = 0
    keep: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: ModelSettings) -> QuantizeChoice:
        """What the settings say."""
        if settings.quantize == "none":
            return cls()
        group = settings.quantize_group or DEFAULT_GROUPS[settings.quantize]
        return cls(settings.quantize, group, settings.quantize_keep)

    @classmethod
    def parse(cls, text: str) -> QuantizeChoice:
        """The reverse of `text`. Raises `ValueError`."""
        if not text:
            return cls()
        kind, group, *keep = text.split(":")
        if kind not in DEFAULT_GROUPS:
            raise ValueError(f"{kind!r} is no way to quantize")
        return cls(kind, int(group), tuple(keep))

    @property
    def text(self) -> str:
        """All of it in one word, empty if nothing is quantized."""
        return "" if self.kind == "none" else ":".join((self.kind, str(self.group), *self.keep))

    @property
    def title(self) -> str:
        """For people, such as `int4, groups of 64`; empty if nothing is quantized."""
        return "" if self.kind == "none" else f"{self.kind}, groups of {self.group}"

    @property
    def form(self) -> WeightForm:
        """What a quantized weight becomes."""
        if self.kind == "int8":
            return WeightForm(8, self.group, offset=128)
        return WeightForm(4, self.group, zero="float16")

    def takes(self, name: str, *, is_head: bool = False) -> bool:
        """Whether the linear layer of this name is quantized."""
        if self.kind == "none" or name.rpartition(".")[2] in ROUTERS:
            return False
        if is_head and HEAD in self.keep:
            return False
        return not any(fnmatchcase(name, pattern) or name.endswith(f".{pattern}") for pattern in self.keep)


AS_IT_IS = QuantizeChoice()
