"""What a server's answers are made of, as far as the dashboard shows it. A field that an older server does not have is
as its default says; those that a newer one has beside are passed over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


class Check(msgspec.Struct, frozen=True):
    """How one part of the server is."""

    status: str = "ok"
    detail: str = ""


class Model(msgspec.Struct, frozen=True):
    name: str
    dtype: str = ""
    parameters: int = 0
    max_model_len: int = 0


class DeviceMemory(msgspec.Struct, frozen=True):
    """Who holds a device's memory; `borrowed_bytes` lie elsewhere."""

    name: str
    limit_bytes: int = 0
    weights_bytes: int = 0
    own_kv_bytes: int = 0
    lent_bytes: int = 0
    borrowed_bytes: int = 0
    other_bytes: int = 0
    free_bytes: int = 0


class Blocks(msgspec.Struct, frozen=True):
    """KV blocks; those `with_memory` can be used."""

    size_tokens: int = 0
    with_memory: int = 0
    free: int = 0
    cached: int = 0


class Move(msgspec.Struct, frozen=True):
    """Blocks that went from one tier to another since the start, to None where no tier keeps them."""

    kind: str
    source: str = msgspec.field(name="from")
    target: str | None = msgspec.field(name="to", default=None)
    blocks: int = 0


class Tier(msgspec.Struct, frozen=True):
    """A tier below the devices."""

    tier: str
    medium: str = ""
    blocks: int = 0
    used_bytes: int = 0
    capacity_bytes: int = 0
    hits: int = 0
    misses: int = 0
    stopped: str | None = None
    read_bytes_per_second: float | None = None
    write_bytes_per_second: float | None = None
    moves: tuple[Move, ...] = ()


class Lease(msgspec.Struct, frozen=True):
    borrower: str
    lender: str
    bytes: int = 0
    blocks: int = 0
    state: str = ""
    age_seconds: float = 0.0


class Memory(msgspec.Struct, frozen=True):
    devices: tuple[DeviceMemory, ...] = ()
    kv_blocks: Blocks | None = None
    leases: tuple[Lease, ...] = ()
    tiers: tuple[Tier, ...] = ()
    tier_troubles: Mapping[str, str] = {}


class Stage(msgspec.Struct, frozen=True):
    """A stage of the pipeline; `busy_seconds` and `predicted_seconds` count from its start."""

    device: str
    layers: tuple[int, int]
    index: int = 0
    weight_bytes: int = 0
    streamed_layers: tuple[int, ...] = ()
    kv_bytes: int = 0
    attention: str = ""
    seconds_per_forward: float | None = None
    busy_seconds: float = 0.0
    predicted_seconds: float | None = None


class RateNow(msgspec.Struct, frozen=True):
    predicted: float | None = None


class Prediction(msgspec.Struct, frozen=True):
    now: RateNow = RateNow()


class Pipeline(msgspec.Struct, frozen=True):
    """`/api/pipeline/status`. Without a model there are no memory, stages and prediction."""

    ready: bool
    state: str
    subsystems: Mapping[str, Check] = {}
    model: Model | None = None
    memory: Memory = Memory()
    stages: tuple[Stage, ...] = ()
    prediction: Prediction | None = None
    notes: tuple[str, ...] = ()


class Request(msgspec.Struct, frozen=True):
    id: str
    state: str = ""
    age_seconds: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0


class Queue(msgspec.Struct, frozen=True):
    """`/api/queue/status`; `requests` are the oldest of the unfinished ones."""

    running: int
    waiting: int
    unfinished: int = 0
    limit: int = 0
    requests: tuple[Request, ...] = ()


class Quantiles(msgspec.Struct, frozen=True):
    """Seconds that half, 95 and 99 of a hundred stay below; None while nothing has been measured."""

    count: int = 0
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


class Batcher(msgspec.Struct, frozen=True):
    """`/api/batcher/stats`; `latency` is not there on older servers."""

    generated_tokens: int
    tokens_per_second: float = 0.0
    batch_size: int = 0
    max_batch_size: int = 0
    prefix_hit_rate: float = 0.0
    preemptions: int = 0
    latency: Mapping[str, Quantiles] = {}


class Process(msgspec.Struct, frozen=True):
    uptime_s: float


class System(msgspec.Struct, frozen=True):
    """`/api/system`."""

    process: Process
    hostname: str = ""


class Reading(msgspec.Struct, frozen=True):
    """What the driver says of a card; None where it does not. `other_bytes` are those of other programs."""

    utilization: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    throttling: tuple[str, ...] | None = None
    other_bytes: int | None = None


class Device(msgspec.Struct, frozen=True):
    name: str
    reading: Reading | None = None


class Devices(msgspec.Struct, frozen=True):
    """`/api/gpu`."""

    devices: tuple[Device, ...] = ()


class NamedDevice(msgspec.Struct, frozen=True):
    name: str


class Node(msgspec.Struct, frozen=True):
    hostname: str = ""
    roles: tuple[str, ...] = ()
    devices: tuple[NamedDevice, ...] = ()


class Discovery(msgspec.Struct, frozen=True):
    status: str = ""


class Nodes(msgspec.Struct, frozen=True):
    """`/api/nodes`."""

    nodes: tuple[Node, ...] = ()
    discovery: Discovery = Discovery()


class Task(msgspec.Struct, frozen=True):
    """Work in the background: loading, placing, recovering. `seconds` are those since it began, or that it took."""

    id: int | str
    kind: str
    detail: str | None = None
    resource: str | None = None
    status: str = "running"
    seconds: float = 0.0
    error: str | None = None


class Tasks(msgspec.Struct, frozen=True):
    """`/api/tasks`, which older servers do not have."""

    running: tuple[Task, ...] = ()
    recent: tuple[Task, ...] = ()


def fields_of(answer: msgspec.Struct) -> Mapping[str, Any]:
    """The answer's fields by name, as JSON has them."""
    return msgspec.structs.asdict(answer)
