"""What master and workers ask each other over a control link: calls and their answers, as msgpack.

A call is one of the structs of `Call`; each says which struct answers it. Nothing in them is a path to be opened but
`ModelRef.path`, which a worker takes only where the checkpoint there has the digest that the master names.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeAlias

import msgspec

from core.cluster.lending_messages import AddGuest, AddRegion, Borrow, DropGuest, DropRegion, ExpectGuests
from core.cluster.message_types import (
    MAX_CHUNK_BYTES,
    MAX_PAGE_BYTES,
    Bytes,
    DeviceName,
    Digest,
    FileName,
    Layers,
    Message,
    Name,
    NodeId,
    NodeName,
    Nothing,
    Number,
    PageNumbers,
    Place,
    Seconds,
    Text,
)
from core.costs import DeviceProfile, LayerCosts, LinkProfile
from core.devices.device import DeviceKind
from core.devices.readings import DeviceReading
from core.grammars.vocabulary import Vocabulary


class DeviceInfo(Message, frozen=True):
    """A device of a node. `name` is the node's own for it; `bandwidth_bytes_s` and `flops` are an emulated card's."""

    name: DeviceName
    kind: DeviceKind
    limit_bytes: Bytes
    bandwidth_bytes_s: float | None = None
    flops: float | None = None


class NodeInfo(Message, frozen=True):
    """What a worker is. `port` is where it listens for other nodes; `processor` and `system` are for people;
    `lends_bytes` are what the master may keep blocks of KV in, `main_bytes` main memory beside the devices, for layers
    that stream in and KV that devices lend no room to."""

    name: NodeName
    version: Text
    python: Text
    torch: Text
    system: Text
    processor: Text
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    devices: Annotated[tuple[DeviceInfo, ...], msgspec.Meta(max_length=64)]
    lends_bytes: Bytes = 0
    main_bytes: Bytes = 0


class FileRef(Message, frozen=True):
    """A file of a checkpoint: its name, without a directory, and its size."""

    name: FileName
    nbytes: Bytes


class ModelRef(Message, frozen=True):
    """A checkpoint, as its digest tells it from others, and what it is served as (`quantize` as
    `QuantizeChoice.text`). `path` is where the master has it."""

    name: Text
    path: Text
    revision: Text | None
    digest: Digest
    dtype: Name
    files: Annotated[tuple[FileRef, ...], msgspec.Meta(max_length=4096)]
    quantize: Text = ""


class Welcome(Message, frozen=True, tag=True):
    """The master's first call. `number` is the worker's in headers, `epoch` that of the cluster now."""

    number: Number
    version: Text
    epoch: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
    answer: ClassVar[type[NodeInfo]] = NodeInfo


class Refuse(Message, frozen=True, tag=True):
    """The master does not take the worker, and this is why. The worker ends."""

    reason: Text
    answer: ClassVar[type[Nothing]] = Nothing


class Profiles(Message, frozen=True):
    """In the order of the devices that were asked for."""

    profiles: tuple[DeviceProfile, ...]


class Measure(Message, frozen=True, tag=True):
    """How fast devices of the node run layers of a model. `engine` are the settings it would be served with."""

    model: ModelRef
    devices: Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)]
    engine: dict[str, Any]
    answer: ClassVar[type[Profiles]] = Profiles


class Path(Message, frozen=True):
    """A way inside the node, from one of its devices, or its main memory ("host"), to another."""

    source: Name
    target: Name
    link: LinkProfile


class Paths(Message, frozen=True):
    """Between each two of the devices, and from main memory to each."""

    paths: Annotated[tuple[Path, ...], msgspec.Meta(max_length=64 * 64)]


class MeasurePaths(Message, frozen=True, tag=True):
    """How fast devices of the node exchange data."""

    devices: Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)]
    answer: ClassVar[type[Paths]] = Paths


class Reached(Message, frozen=True):
    """The time of a small message one way, and the rate of a large one."""

    latency_s: Seconds
    bandwidth_bytes_s: Seconds


class Reach(Message, frozen=True, tag=True):
    """Have a link to another node, and measure it."""

    node: NodeId
    host: Text
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    answer: ClassVar[type[Reached]] = Reached


class Loaded(Message, frozen=True):
    """What the weights take on the device, with the slots of those that stream in."""

    weight_bytes: Bytes


class Load(Message, frozen=True, tag=True):
    """Read layers `first .. last - 1` of `layers` onto a device. `stage` is the stage's number on all links, unique as
    long as the master lives. `costs` and `profile` predict how long it computes, where that is known; `together` is how
    many stages of the engine compute on the node's processor. The stage that samples has the `vocabulary`. Layers that
    are `streamed` stay in the node's main memory, where they take `streamed_bytes`, and come over `host_link` into two
    slots of `slot_bytes`, which `weight_bytes` counts."""

    stage: Number
    model: ModelRef
    device: Name
    first: Number
    last: Number
    layers: Number
    weight_bytes: Bytes
    workspace_bytes: Bytes
    together: Number
    engine: dict[str, Any]
    costs: LayerCosts | None = None
    profile: DeviceProfile | None = None
    vocabulary: Vocabulary | None = None
    streamed: Annotated[tuple[Number, ...], msgspec.Meta(max_length=4096)] = ()
    streamed_bytes: Bytes = 0
    slot_bytes: Bytes = 0
    host_link: LinkProfile | None = None
    answer: ClassVar[type[Loaded]] = Loaded


class Allocated(Message, frozen=True):
    """Bytes of a page of all the stage's layers, the attention that the device has, and the main memory that the node
    has for what leaves its devices, of all stages that follow each other's `Allocate`."""

    page_bytes: Bytes
    attention: Name
    keeps_bytes: Bytes


class Allocate(Message, frozen=True, tag=True):
    """Give a loaded stage its pages. A block table has up to `table_width` entries. `lenders` are devices of the node
    that may come to hold pages of it."""

    stage: Number
    pages: Bytes
    block_size: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    table_width: Bytes
    lenders: Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)] = ()
    answer: ClassVar[type[Allocated]] = Allocated


class Connect(Message, frozen=True, tag=True):
    """Where a stage's results go: to stage `next` on `node`, of which `Reach` has made a link, or, with `node` None, to
    the master; `feeds`: as hidden states for a stage there. The stage's device is `called` so in the cluster."""

    stage: Number
    called: Name
    takes_hidden: bool
    node: NodeId | None
    next: Number
    feeds: bool
    answer: ClassVar[type[Nothing]] = Nothing


class Keep(Message, frozen=True, tag=True):
    """Have a stage keep its parts of blocks in `slots` slots of main memory: memory number `memory`, which outlives the
    stage. Numbers of stages and memories are the same ones."""

    memory: Number
    stage: Number
    slots: Bytes
    answer: ClassVar[type[Nothing]] = Nothing


class Lend(Message, frozen=True, tag=True):
    """Keep whole blocks of the master's, as memory number `memory`."""

    memory: Number
    answer: ClassVar[type[Nothing]] = Nothing


class Release(Message, frozen=True, tag=True):
    """Free stages and memories; those that are not there are none of the master's any more."""

    numbers: Annotated[tuple[Number, ...], msgspec.Meta(max_length=1024)]
    answer: ClassVar[type[Nothing]] = Nothing


class Epoch(Message, frozen=True, tag=True):
    """Steps of before have failed: frames that still travel for them are dropped from now on."""

    epoch: Annotated[int, msgspec.Meta(ge=1, le=0xFFFFFFFF)]
    answer: ClassVar[type[Nothing]] = Nothing


class PageBytes(Message, frozen=True):
    """Of pages, one after the other: for each layer in order the K page, then the V page."""

    data: Annotated[bytes, msgspec.Meta(max_length=MAX_PAGE_BYTES)]


class ReadPages(Message, frozen=True, tag=True):
    """KV of some of a stage's layers, while the stage is at rest."""

    stage: Number
    layers: Layers
    pages: PageNumbers
    place: Place = 0
    answer: ClassVar[type[PageBytes]] = PageBytes


class WritePages(Message, frozen=True, tag=True):
    """KV for some of a stage's layers, while the stage is at rest."""

    stage: Number
    layers: Layers
    pages: PageNumbers
    data: Annotated[bytes, msgspec.Meta(max_length=MAX_PAGE_BYTES)]
    place: Place = 0
    answer: ClassVar[type[Nothing]] = Nothing


class CopyPages(Message, frozen=True, tag=True):
    """KV of layers that two stages of the node have, from `stage` to stage `to`, while both are at rest."""

    stage: Number
    to: Number
    layers: Layers
    pages: PageNumbers
    others: PageNumbers
    place: Place = 0
    other_place: Place = 0
    answer: ClassVar[type[Nothing]] = Nothing


class Chunk(Message, frozen=True):
    """Some of a file."""

    data: Annotated[bytes, msgspec.Meta(max_length=MAX_CHUNK_BYTES)]


class ReadFile(Message, frozen=True, tag=True):
    """Bytes of a file of the checkpoint with this digest."""

    digest: Digest
    name: FileName
    offset: Bytes
    nbytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_CHUNK_BYTES)]
    answer: ClassVar[type[Chunk]] = Chunk


class Leave(Message, frozen=True, tag=True):
    """The worker is to be stopped: once its layers are elsewhere, the master lets it go."""

    answer: ClassVar[type[Nothing]] = Nothing


class StageUse(Message, frozen=True):
    """What a stage has done since it was loaded."""

    stage: Number
    forwards: Annotated[int, msgspec.Meta(ge=0)]
    busy_s: Seconds
    predicted_s: Seconds
    stream_wait_s: Seconds = 0.0


class Report(Message, frozen=True):
    """How a worker is. No call: it is sent once in a while, and nothing answers it. `readings` have the names that the
    devices have there, and so has `external_bytes`: what other programs take of them beyond what is left to those.
    `lent_bytes` are what blocks take of the memory that is offered to them."""

    readings: Annotated[tuple[DeviceReading, ...], msgspec.Meta(max_length=64)] = ()
    stages: Annotated[tuple[StageUse, ...], msgspec.Meta(max_length=1024)] = ()
    external_bytes: Annotated[dict[Name, Bytes], msgspec.Meta(max_length=64)] = {}
    lent_bytes: Bytes = 0


Ask: TypeAlias = ReadFile | Leave
"""What a worker may ask of its master."""
Call: TypeAlias = (
    Welcome
    | Refuse
    | Measure
    | MeasurePaths
    | Reach
    | Load
    | Allocate
    | AddRegion
    | DropRegion
    | ExpectGuests
    | AddGuest
    | DropGuest
    | Borrow
    | Connect
    | Keep
    | Lend
    | ReadPages
    | WritePages
    | CopyPages
    | Release
    | Epoch
)
"""What a master asks of a worker."""
