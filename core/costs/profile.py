"""What is known of the speed of devices and links, measured or from a datasheet. No torch here."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from core.devices.device import LinkSpeed

ProfileSource = Literal["measured", "datasheet", "emulated", "assumed"]


@dataclass(frozen=True, slots=True)
class Sharing:
    """What it costs the parts of one processor to compute at the same time.

    Attributes:
        processor: that they are parts of, such as "cpu" or "cuda:0".
        parts: how many computed when it was measured, at least 2.
        reading: how many times longer reading weights then takes each of them, at least 1.
        computing: the same for what is limited by the matrix rate.
    """

    processor: str
    parts: int
    reading: float
    computing: float


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """How fast a device runs layers of one dtype.

    Attributes:
        name: of the logical device.
        bandwidth_bytes_s: at which it reads weights.
        flops: `(rows, floating-point operations per second)` of a matrix product, rows ascending; rows between two
            entries are interpolated, rows outside get the nearest entry.
        layer_overhead_s: per layer and forward pass, whatever the size of the batch (launches, small operations).
        step_overhead_s: per forward pass of a stage.
        source: where the numbers are from.
        row_overhead_s: per layer and token beside the matrix products (norms, rotations, activations).
        kv_bandwidth_bytes_s: at which attention gets through KV; None: as fast as through weights.
        sharing: for a part of a processor; the other numbers are those of a part that computes alone.
    """

    name: str
    bandwidth_bytes_s: float
    flops: tuple[tuple[int, float], ...]
    layer_overhead_s: float = 0.0
    step_overhead_s: float = 0.0
    source: ProfileSource = "measured"
    row_overhead_s: float = 0.0
    kv_bandwidth_bytes_s: float | None = None
    sharing: Sharing | None = None

    @property
    def kv_bytes_s(self) -> float:
        """Bytes per second of KV."""
        return self.kv_bandwidth_bytes_s or self.bandwidth_bytes_s

    def among(self, parts: int) -> DeviceProfile:
        """How fast it is while `parts` parts of its processor compute, itself included."""
        shared = self.sharing
        if shared is None or parts < 2:
            return self
        share = (parts - 1) / (shared.parts - 1)  # each further one costs as much
        reading, computing = (1 + share * (times - 1) for times in (shared.reading, shared.computing))
        return replace(
            self,
            bandwidth_bytes_s=self.bandwidth_bytes_s / reading,
            flops=tuple((rows, rate / computing) for rows, rate in self.flops),
            layer_overhead_s=self.layer_overhead_s * reading,
            step_overhead_s=self.step_overhead_s * reading,
            row_overhead_s=self.row_overhead_s * computing,
            kv_bandwidth_bytes_s=self.kv_bytes_s / reading,
            sharing=None,
        )

    def flops_at(self, rows: int) -> float:
        """Operations per second for a product with `rows` rows."""
        points = self.flops
        index = bisect_left(points, rows, key=lambda point: point[0])
        if index == 0:
            return points[0][1]
        if index == len(points):
            return points[-1][1]
        (low, slow), (high, fast) = points[index - 1], points[index]
        return slow + (fast - slow) * (rows - low) / (high - low)


def emulated_profile(name: str, bandwidth_bytes_s: float, flops: float) -> DeviceProfile:
    """A device that keeps to a roofline exactly."""
    return DeviceProfile(name, bandwidth_bytes_s, ((1, flops),), source="emulated")


@dataclass(frozen=True, slots=True)
class LinkProfile(LinkSpeed):
    """One direction between two devices: `latency_s + bytes / bandwidth_bytes_s` for a transfer."""

    method: str = "copy"
    source: ProfileSource = "measured"


FREE_LINK = LinkProfile(float("inf"), 0.0, "none", "assumed")

DATASHEET_LINK = LinkProfile(11.6e9, 30e-6, "staged", "assumed")
"""Between two cards of a plan without a machine: staged through host memory over PCIe 4.0 x8, a common board's."""


@dataclass(frozen=True, slots=True)
class LinkTopology:
    """Links by `(source name, destination name)`; `default` stands for those that are not listed.

    `inside` are links inside other machines, where what one device copies to another goes another way than what one
    stage sends to the next.
    """

    links: Mapping[tuple[str, str], LinkProfile] = field(default_factory=dict)
    default: LinkProfile = FREE_LINK
    inside: Mapping[tuple[str, str], LinkProfile] = field(default_factory=dict)

    def link(self, src: str, dst: str) -> LinkProfile:
        """From one device to another; nothing is paid to stay on one."""
        return FREE_LINK if src == dst else self.links.get((src, dst), self.default)

    def copying(self, src: str, dst: str) -> LinkProfile:
        """The way of what is copied between two devices of one machine, or from its main memory."""
        return self.inside.get((src, dst)) or self.link(src, dst)
