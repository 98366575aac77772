"""Calls about KV memory that devices lend stages: of their own machine (regions), and of others (guests)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec

from core.cluster.message_types import Message, Name, NodeId, Nothing, Number, Region, Text


class AddRegion(Message, frozen=True, tag=True):
    """Have memory of `device`, another one of the node or its main memory ("host"), for so many pages of a stage. A
    region of this number that is there already goes: the master has not heard of it."""

    stage: Number
    region: Region
    device: Name
    pages: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    answer: ClassVar[type[Nothing]] = Nothing


class DropRegion(Message, frozen=True, tag=True):
    """Give that memory back. Nothing in flight uses it, and one that is not there is none any more."""

    stage: Number
    region: Region
    answer: ClassVar[type[Nothing]] = Nothing


class LayerPages(Message, frozen=True):
    """What a layer keeps of each token, as in `KVShape`."""

    layer: Number
    kv_heads: Annotated[int, msgspec.Meta(ge=1, le=0xFFFF)]
    key_dim: Annotated[int, msgspec.Meta(ge=1, le=0xFFFF)]
    value_dim: Annotated[int, msgspec.Meta(ge=1, le=0xFFFF)]


class AddGuest(Message, frozen=True, tag=True):
    """Have memory of `device` for so many pages of a stage of another machine, which is guest number `guest` here. As
    with `AddRegion`, a region of this number that is there already goes. `engine` are the settings that it is served
    with."""

    guest: Number
    region: Region
    device: Name
    pages: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    layers: Annotated[tuple[LayerPages, ...], msgspec.Meta(min_length=1, max_length=4096)]
    block_size: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    dtype: Name
    engine: dict[str, Any]
    answer: ClassVar[type[Nothing]] = Nothing


class ExpectGuests(Message, frozen=True, tag=True):
    """Be ready to attend on `devices` for guests with such layers, whose stages have `heads` query heads and, with
    `softcap`, bound their scores. Takes as long as kernels take to compile."""

    devices: Annotated[tuple[Name, ...], msgspec.Meta(min_length=1, max_length=64)]
    layers: Annotated[tuple[LayerPages, ...], msgspec.Meta(min_length=1, max_length=4096)]
    heads: Annotated[int, msgspec.Meta(ge=1, le=0xFFFF)]
    softcap: bool
    block_size: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    dtype: Name
    engine: dict[str, Any]
    answer: ClassVar[type[Nothing]] = Nothing


class DropGuest(Message, frozen=True, tag=True):
    """Give that memory back. Nothing in flight uses it, and one that is not there is none any more."""

    guest: Number
    region: Region
    answer: ClassVar[type[Nothing]] = Nothing


class WorkerPlace(Message, frozen=True):
    """Where a worker listens for others."""

    node: NodeId
    host: Text
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Borrow(Message, frozen=True, tag=True):
    """Use pages that another machine has for a stage, as a region of it: on `lender`, its name in the cluster, of the
    worker that is `at` some place, or, with None, of the master. `DropRegion` ends it."""

    stage: Number
    region: Region
    pages: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    lender: Name
    at: WorkerPlace | None
    answer: ClassVar[type[Nothing]] = Nothing
