"""What all messages between master and workers are made of."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=1024)]
Name: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
Bytes: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
Digest: TypeAlias = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
NodeId: TypeAlias = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
FileName: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}$")]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0)]

Layers: TypeAlias = Annotated[tuple[Number, ...], msgspec.Meta(min_length=1, max_length=4096)]
PageNumbers: TypeAlias = Annotated[tuple[Bytes, ...], msgspec.Meta(min_length=1, max_length=1 << 20)]
Region: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=0x7FFF)]
"""Memory that another device lends a stage."""
Place: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=0x7FFF)]
"""A region, or 0: the stage's own device."""
MAX_PAGE_BYTES = 15 << 20
"""Of a message, which has other fields beside."""
MAX_CHUNK_BYTES = 1 << 20
"""Of a file at once: a sign of life has to come between two, also on a slow network."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of either side."""


class Nothing(Message, frozen=True):
    """The answer to what only has to be done."""


NodeName: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]{0,62}$")]
DeviceName: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9.:#_-]{0,63}$")]
"""Both stand in specifications of devices, and on people's screens."""
