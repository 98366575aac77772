"""Cards by name, with the figures of their makers, as `cards.yaml` lists them. Read at the first question."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec
import yaml

from core.errors import DeviceError

GIB = 1024**3
TABLE = Path(__file__).with_name("cards.yaml")
GPU_SYNTAX = (
    'SIZE@BANDWIDTH such as "24GiB@936GB/s", with "/71TFLOPS" after it where the compute rate is known, '
    'or a card such as "3090"; "*2" after either for two of them'
)

_ANY_OTHER = f"Any other can be given as {GPU_SYNTAX}."
_MOST_SIMILAR = 4
_POSITIVE = msgspec.Meta(gt=0)
_SOME = msgspec.Meta(min_length=1)
_SIZE = re.compile(r"(\d+)\s*gi?b\b")
_LAPTOP_M = re.compile(r"(\d{4}(?:\s*(?:ti|super))?)\s*m\b")
_NO_NAME = re.compile(
    r"\((?:r|tm)\)|\b(?:nvidia|geforce|tesla|amd|radeon|instinct|apple|intel|arc|graphics|gpu|generation|edition|"
    r"workstation|blackwell)\b|\b(?:rtx|gtx|rx)(?=\s*(?:pro\b|a?\d))|\bai pro\b|\bpro(?=\s*[wvb]\d)|(?<=sxm)\d"
)


@dataclass(frozen=True, slots=True)
class Card:
    """A card as its maker describes it.

    Attributes:
        name: with its size where the card is sold with several: "RTX 4060 Ti 16GB".
        memory_bytes: all of it. What can be allocated is less: some tenths of a GiB are the driver's, and macOS gives a
            GPU about three quarters unless told otherwise.
        bandwidth_bytes_s: of its memory.
        flops: dense matrix rate for bf16 or fp16 with fp32 sums, operations per second.
        chip: what kernels are compiled for: "sm_86", "gfx1100", or the name of a generation.
        source: where the figures are from.
        remark: what a plan with it should say; may be empty.
        keys: what `key_of` makes of its names.
    """

    name: str
    memory_bytes: int
    bandwidth_bytes_s: float
    flops: float
    chip: str
    source: str
    remark: str
    keys: frozenset[str]

    @property
    def compute_capability(self) -> int | None:
        """NVIDIA's: 86 for 8.6; None for other cards."""
        return int(self.chip.removeprefix("sm_")) if self.chip.startswith("sm_") else None


class _Row(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, _SOME]
    gib: Annotated[int, _POSITIVE] | Annotated[list[Annotated[int, _POSITIVE]], _SOME] = msgspec.field(name="GiB")
    gb_s: Annotated[float, _POSITIVE] = msgspec.field(name="GB/s")
    tflops: Annotated[float, _POSITIVE] = msgspec.field(name="TFLOPS")
    also: tuple[str, ...] = ()
    chip: str | None = None
    source: str | None = None
    remark: str | None = None


class _Family(msgspec.Struct, forbid_unknown_fields=True):
    family: Annotated[str, _SOME]
    chip: Annotated[str, _SOME]
    source: Annotated[str, _SOME]
    cards: list[_Row]
    remark: str = ""


def read_table(path: Path) -> dict[str, tuple[Card, ...]]:
    """The cards of a file like `cards.yaml` by family, in its order.

    Raises `DeviceError` where it is no such file; it says at which line or field.
    """
    try:
        parsed = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        families = msgspec.convert(parsed, list[_Family])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, msgspec.ValidationError) as error:
        raise DeviceError(f"{path.name} is no table of cards: {error}", param="gpu") from error
    table: dict[str, tuple[Card, ...]] = {}
    for family in families:
        table[family.family] = table.get(family.family, ()) + tuple(_cards(family))
    return table


def _cards(family: _Family) -> Iterator[Card]:
    for row in family.cards:
        sizes = [row.gib] if isinstance(row.gib, int) else row.gib
        for size in sizes:
            yield Card(
                name=f"{row.name} {size}GB" if len(sizes) > 1 else row.name,
                memory_bytes=size * GIB,
                bandwidth_bytes_s=row.gb_s * 1e9,
                flops=row.tflops * 1e12,
                chip=row.chip or family.chip,
                source=row.source or family.source,
                remark=family.remark if row.remark is None else row.remark,
                keys=frozenset(key_of(name)[0] for name in (row.name, *row.also)),
            )


@cache
def _table() -> dict[str, tuple[Card, ...]]:
    return read_table(TABLE)


def known_cards() -> tuple[Card, ...]:
    """All cards of `cards.yaml`, in its order."""
    return tuple(card for cards in _table().values() for card in cards)


def find_card(name: str) -> Card:
    """The card of that name, whatever its case, spaces and maker: "3090", "RTX3090", "NVIDIA GeForce RTX 3090".

    A size may be part of it: "A100 80GB". Without it, the first of the name is meant.

    Raises `DeviceError` if there is no such card, or not with so much memory; it names those that look like it.
    """
    key, size = key_of(name)
    found = [card for card in known_cards() if key in card.keys] or [
        card for card in known_cards() if key.removeprefix("quadro") in card.keys
    ]
    for card in found:
        if size in (None, card.memory_bytes // GIB):
            return card
    if found:
        sold = ", ".join(f"{card.name} has {card.memory_bytes // GIB} GB" for card in found)
        raise DeviceError(f"There is no card {name!r}: {sold}. {_ANY_OTHER}", param="gpu")
    similar = ", ".join(dict.fromkeys(_similar(key)))
    said = f"Did you mean {similar}?" if similar else f"Known are those of the families {', '.join(_table())}."
    raise DeviceError(f"There is no card {name!r}. {said} {_ANY_OTHER}", param="gpu")


def _similar(key: str) -> list[str]:
    """Up to four names of cards whose key contains this one, or else looks like it."""
    names: dict[str, str] = {}
    for card in known_cards():
        for each in card.keys:
            names.setdefault(each, card.name)
    containing = [each for each in names if key and key in each][:_MOST_SIMILAR]
    return [names[each] for each in containing or get_close_matches(key, names, n=_MOST_SIMILAR, cutoff=0.5)]


def key_of(name: str) -> tuple[str, int | None]:
    """A card's name without maker, series, spaces and size, and the size in GiB: "4060ti", 16."""
    text = name.lower().replace("-", " ")
    size = _SIZE.search(text)
    text = _LAPTOP_M.sub(r"\1 laptop", _NO_NAME.sub(" ", _SIZE.sub(" ", text)))
    plain, laptops = re.subn(r"laptop|mobile|notebook", " ", text)
    key = re.sub(r"[^a-z0-9]", "", plain) + ("laptop" if laptops else "")
    return key, int(size[1]) if size else None
