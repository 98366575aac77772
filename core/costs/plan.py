"""What placement works from, and what it decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from core.costs.profile import DeviceProfile, LinkTopology
from core.devices.device import host_of, machine_of

Objective = Literal["latency", "throughput"]


@dataclass(frozen=True, slots=True)
class Experts:
    """Weights of which a token uses some only. By layer: the bytes of all its routed experts, and how many those are
    (0 in layers that have none); each token is routed to `per_token` of them.
    """

    layer_bytes: tuple[int, ...]
    number: tuple[int, ...]
    per_token: int

    def unread_bytes(self, layer: int, tokens: int) -> float:
        """Bytes of the experts that none of `tokens` tokens is expected to need.

        Routers are trained to use their experts alike, so each of E is one of a token's k with probability k / E, and
        E (1 - (1 - k / E) ** tokens) different ones are read.
        """
        number = self.number[layer]
        return self.layer_bytes[layer] * (1 - self.per_token / number) ** tokens if number else 0.0


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Bytes and operations of a model by part. With `tied` embeddings, a single stage needs no `head_bytes` of its own.

    `kv_bytes_per_token[l]` is what layer `l` keeps for one token; `workspace_bytes` is what any stage needs beside
    weights and KV, `head_workspace_bytes` what the last one needs on top (logits). `layer_flops[l]` and `head_flops`
    are floating-point operations per token; `hidden_bytes` is what one token sends from stage to stage. `layer_bytes`
    count every expert, since all are kept; `read_bytes` those that a batch reads.
    """

    embedding_bytes: int
    layer_bytes: tuple[int, ...]
    after_bytes: int
    head_bytes: int
    tied: bool
    kv_bytes_per_token: tuple[int, ...]
    workspace_bytes: int = 0
    head_workspace_bytes: int = 0
    layer_flops: tuple[int, ...] = ()
    head_flops: int = 0
    hidden_bytes: int = 0
    experts: Experts | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layer_bytes)

    def weight_bytes(self, first: int, last: int) -> int:
        """Weights of a stage with layers `first .. last - 1`."""
        total = sum(self.layer_bytes[first:last])
        if first == 0:
            total += self.embedding_bytes
        if last == self.num_layers:
            total += self.after_bytes + (0 if self.tied and first == 0 else self.head_bytes)
        return total

    def read_bytes(self, layer: int, tokens: int) -> float:
        """Weights of a layer that a batch of `tokens` tokens reads."""
        if self.experts is None:
            return self.layer_bytes[layer]
        return self.layer_bytes[layer] - self.experts.unread_bytes(layer, tokens)

    def stage_workspace_bytes(self, last: int) -> int:
        return self.workspace_bytes + (self.head_workspace_bytes if last == self.num_layers else 0)

    def stage_kv_bytes_per_token(self, first: int, last: int) -> int:
        return sum(self.kv_bytes_per_token[first:last])

    def needed_bytes(self, first: int, last: int, kv_tokens: int) -> int:
        """All that a stage allocates on its device."""
        kv = self.stage_kv_bytes_per_token(first, last) * kv_tokens
        return self.weight_bytes(first, last) + kv + self.stage_workspace_bytes(last)


SLOTS = 2
"""In which the streamed layers of a stage take turns."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Layers `first_layer .. last_layer - 1` on one device, with the bytes they take there.

    `streamed_layers` stay in main memory, where they take `streamed_bytes`, and take turns in two slots of `slot_bytes`
    each on the device; the slots are part of `weight_bytes`.
    """

    device_name: str
    device_index: int
    first_layer: int
    last_layer: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    workspace_bytes: int
    limit_bytes: int
    streamed_layers: tuple[int, ...] = ()
    streamed_bytes: int = 0
    slot_bytes: int = 0

    @property
    def num_layers(self) -> int:
        return self.last_layer - self.first_layer

    @property
    def free_bytes(self) -> int:
        """What stays unused of the device's limit."""
        return self.limit_bytes - self.weight_bytes - self.kv_bytes - self.workspace_bytes


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    """Stages in the order of execution. `kv_tokens` tokens of KV fit on every stage."""

    model_name: str
    strategy: str
    stages: tuple[StagePlan, ...]
    kv_tokens: int
    unused_devices: tuple[str, ...] = ()

    @property
    def streamed_bytes(self) -> int:
        """What layers that stream in take of main memory, on all machines."""
        return sum(self.streamed_by_host().values())

    def streamed_by_host(self) -> dict[str, int]:
        """The same for each machine that has such layers, by the name of its main memory (see `host_of`)."""
        found: dict[str, int] = {}
        for stage in self.stages:
            if stage.streamed_bytes:
                host = host_of(stage.device_name)
                found[host] = found.get(host, 0) + stage.streamed_bytes
        return found


@dataclass(frozen=True, slots=True)
class PlacementDevice:
    """A device to place layers on: bytes that may be allocated, and its speed (the profile takes the device's name)."""

    name: str
    limit_bytes: int
    profile: DeviceProfile

    def __post_init__(self) -> None:
        if self.profile.name != self.name:
            object.__setattr__(self, "profile", replace(self.profile, name=self.name))


@dataclass(frozen=True, slots=True)
class PlacementProblem:
    """What to place, on what, and what counts.

    Attributes:
        model_name: as plans and messages name it.
        costs: bytes and operations of the model.
        devices: in the order that `vram`, `balanced` and layers by hand keep.
        links: between the devices, by name.
        objective: "latency": the time between two tokens of a stream, all streams in one batch. "throughput": tokens of
            all streams per second, with as many cohorts in flight as serve best.
        streams: sequences that decode at the same time.
        context: tokens of each.
        min_kv_tokens: fewer than these are refused.
        max_kv_tokens: more than these are not wanted.
        block_size: KV is counted in whole blocks of so many tokens; both bounds are rounded up.
        layers: by hand: a number for each device, 0 to leave it out; those without a number are left out.
        host_bytes: of main memory for layers that do not fit on the devices (see `core.placement.streaming`).
        far_extent_blocks: blocks that devices lend those of other machines at once; 0: they lend to none.
        node_host_bytes: of that of other machines, by their name. A layer stays in the memory of the machine that
            computes it.

    Raises `ValueError` for no device, two of one name, or numbers that cannot be.
    """

    model_name: str
    costs: LayerCosts
    devices: tuple[PlacementDevice, ...]
    links: LinkTopology
    objective: Objective = "latency"
    streams: int = 1
    context: int = 2048
    min_kv_tokens: int = 1
    max_kv_tokens: int = 2048
    block_size: int = 16
    layers: tuple[int, ...] | None = None
    far_extent_blocks: int = 0
    host_bytes: int = 0
    node_host_bytes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [device.name for device in self.devices]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"placement needs devices with names of their own, not {names}")
        if min(self.streams, self.context, self.block_size, self.min_kv_tokens) < 1:
            raise ValueError("streams, context, block_size and min_kv_tokens must be at least 1")
        if self.max_kv_tokens < self.min_kv_tokens:
            raise ValueError(f"max_kv_tokens {self.max_kv_tokens} is less than min_kv_tokens {self.min_kv_tokens}")

    @property
    def may_stream(self) -> bool:
        """Whether some machine has main memory for layers that do not fit."""
        return self.host_bytes > 0 or any(nbytes > 0 for nbytes in self.node_host_bytes.values())

    def host_room(self, device: str) -> int:
        """Bytes for layers in the main memory beside a device."""
        machine = machine_of(device)
        return self.node_host_bytes.get(machine, 0) if machine else self.host_bytes

    @property
    def least_kv_tokens(self) -> int:
        """`min_kv_tokens` in whole blocks."""
        return self._blocks(self.min_kv_tokens)

    @property
    def wanted_kv_tokens(self) -> int:
        """`max_kv_tokens` in whole blocks."""
        return self._blocks(self.max_kv_tokens)

    @property
    def needed_kv_tokens(self) -> int:
        """What the streams need in whole blocks, within the bounds."""
        blocks = self.streams * self._blocks(self.context)
        return max(self.least_kv_tokens, min(blocks, self.wanted_kv_tokens))

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size) * self.block_size
