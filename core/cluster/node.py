"""A worker as its master sees it: its links, its devices, and the stages that it computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar, cast

import msgspec

from core.cluster.block_calls import BlockCalls
from core.cluster.calls import CALL_S, CallEnd
from core.cluster.checkpoints import read_chunk
from core.cluster.group_path import GroupPath, Means, means_for
from core.cluster.guest_calls import GuestCalls
from core.cluster.guests import Guests, GuestsEnd
from core.cluster.message_types import Nothing
from core.cluster.messages import (
    Ask,
    Chunk,
    DeviceInfo,
    FileRef,
    Leave,
    NodeInfo,
    Reach,
    ReadFile,
    Refuse,
    Report,
    StageUse,
    Welcome,
)
from core.cluster.remote_stage import MasterEnd, RemoteStage
from core.devices import HOST, Device, host_device
from core.devices.device import DeviceSpeed
from core.devices.readings import DeviceReading
from core.errors import ClusterRefusedError, NetworkError, NotFoundError
from core.logs import get_logger
from core.network.connection import Connection
from core.network.echo import LinkSpeed
from core.network.interfaces import Interface
from core.network.link import Link
from core.network.rdma import RDMA_ASKED_S, agent_for
from core.network.traffic import LinkStats
from core.network.watch import HEARTBEAT_S

logger = get_logger(__name__)

A_co = TypeVar("A_co", covariant=True)


class Asked(Protocol[A_co]):
    """A call, which names what answers it."""

    @property
    def answer(self) -> type[A_co]: ...


class SharedCheckpoints:
    """What workers may fetch: checkpoints that this master has told them of, by digest. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Path, tuple[FileRef, ...]]] = {}

    def add(self, digest: str, path: Path, files: tuple[FileRef, ...]) -> None:
        with self._lock:
            self._known[digest] = path, files

    def read(self, asked: ReadFile) -> Chunk:
        """Raises `NotFoundError`."""
        with self._lock:
            known = self._known.get(asked.digest)
        if known is None:
            raise NotFoundError(f"no checkpoint with the digest {asked.digest} is served here.")
        return read_chunk(*known, asked)


class Node:
    """Made of the three connections of a worker that has proved that it knows the token; `join` makes its acquaintance.

    `on_lost` hears of its end, and `on_leave` that it wants to go, in any thread. `remotes` are its stages by number.
    """

    def __init__(
        self, node: str, number: int, address: str, sockets: Mapping[str, Connection],
        checkpoints: SharedCheckpoints, on_lost: Callable[[Node, NetworkError], None],
        on_leave: Callable[[Node], None], epoch: int, observe: Callable[[str, float], None] | None = None,
    ) -> None:  # fmt: skip
        self.id, self.number, self.address = node, number, address
        self.remotes: dict[int, RemoteStage] = {}
        self.kept: set[int] = set()
        """Memories there that an engine counts on: parts of its blocks."""
        self.lends: set[tuple[int, int]] = set()
        """Guests there, with their regions."""
        self._guest_links: list[Link] = []
        self._borrowed: GuestCalls | None = None
        self._borrowing = threading.Lock()
        self.lost: NetworkError | None = None
        self.leaving = False
        self.speed = LinkSpeed(0.0, 0.0)
        self.reached: dict[str, LinkSpeed] = {}
        """Measured links to other workers, by their id."""
        self.devices: dict[str, DeviceInfo] = {}
        """By the device's name in the cluster."""
        self.readings: Mapping[str, DeviceReading] = {}
        """What its devices said last, by their names in the cluster; replaced as a whole."""
        self.uses: Mapping[int, StageUse] = {}
        """What its stages have done, by number; replaced as a whole."""
        self.external: Mapping[str, int] = {}
        """What other programs take of its devices, by their names in the cluster; replaced as a whole."""
        self.lent_bytes = 0
        """What blocks take of the memory that it offers to them, as it has said last."""
        self.name = address
        self._info: NodeInfo | None = None
        self._on_lost, self._on_leave = on_lost, on_leave
        self._checkpoints = checkpoints
        self._calls = CallEnd(Ask, self._serve, self._control_lost, address, self._reported)
        self._end = _DataEnd(self.remotes, self._other_lost, means_for(sockets["data"]))
        self.block_calls = BlockCalls(self._other_lost)
        """What it keeps of KV; `Keep` and `Lend` say where."""
        self.control = Link(
            sockets["control"], 0, number, self._calls, name=address, heartbeat_s=HEARTBEAT_S, observe=observe
        )
        self.data = Link(
            sockets["data"], 0, number, self._end, name=address, observe=observe, new_agent=agent_for(sockets["data"])
        )
        self._blocks = Link(
            sockets["blocks"], 0, number, self.block_calls, name=address, new_agent=agent_for(sockets["blocks"])
        )
        self.interface = Interface.of(sockets["control"].getsockname()[0])
        self.data.epoch = epoch
        self._calls.attach(self.control)
        self._end.attach(self.data)
        self.block_calls.attach(self._blocks)

    @property
    def is_known(self) -> bool:
        """Whether it has said what it is."""
        return self._info is not None

    @property
    def path(self) -> GroupPath:
        """From this process's GPU to the worker's, where both are of one host."""
        return self._end.path

    @property
    def _links(self) -> tuple[Link, ...]:
        return self.control, self.data, self._blocks, *self._guest_links

    @property
    def is_alive(self) -> bool:
        """Whether its links are: known here before anybody hears of their end."""
        return all(link.error is None for link in self._links)

    @property
    def info(self) -> NodeInfo:
        assert self._info is not None
        return self._info

    def join(self, version: str) -> None:
        """Raises `ClusterRefusedError` if it does not fit, and what links raise."""
        for link in self._links[::-1]:
            link.start()
        self._info = info = self.call(Welcome(self.number, version, self.data.epoch))
        if info.version != version:
            reason = f"it has VRAMancer {info.version}, and the master {version}: all nodes need the same"
            self.call(Refuse(reason))
            raise ClusterRefusedError(reason)
        self.data.ask_for_rdma(RDMA_ASKED_S)
        self.path.open()
        self.speed = self._end.echo.measure()
        self._blocks.ask_for_rdma()

    @property
    def latency_s(self) -> float:
        """Half of what the last sign of life took there and back; before there was one, what was measured at first."""
        round_trip_s = self.control.round_trip_s
        return self.speed.latency_s if round_trip_s is None else round_trip_s / 2

    def adopt_name(self, name: str) -> None:
        """What it is called in the cluster, where two machines may have the same name."""
        self.name = name
        for link in self._links:
            link.name = name
        self.devices = {f"{name}/{device.name}": device for device in self.info.devices}

    def logical_devices(self, first_index: int) -> list[Device]:
        """Its devices, as placement sees them."""
        found = []
        for index, (name, info) in enumerate(self.devices.items(), first_index):
            speed = None
            if info.bandwidth_bytes_s is not None and info.flops is not None:
                speed = DeviceSpeed(info.bandwidth_bytes_s, info.flops)
            found.append(Device(name, index, info.kind, "cpu", info.limit_bytes, speed, self.name))
        return found

    @property
    def host(self) -> Device:
        """Its main memory, as far as its devices leave it, for weights that stream in and for KV."""
        return host_device(self.info.main_bytes, self.name)

    def own_name(self, device: str) -> str:
        """What the node itself calls one of its devices, or its main memory."""
        return HOST if device == self.host.name else self.devices[device].name

    def traffic(self) -> LinkStats:
        """What has gone over its links."""
        total = LinkStats()
        for link in self._links:
            total.add(link.stats)
        return total

    def call(self, request: Asked[A_co], timeout_s: float | None = CALL_S) -> A_co:
        """Ask the node. Raises what it raised, and `LinkLostError`."""
        return self._calls.call(cast(msgspec.Struct, request), request.answer, timeout_s)

    def reach(self, other: Node) -> LinkSpeed:
        """Have it connect to another worker, and measure that link once."""
        if other.id not in self.reached:
            found = self.call(Reach(other.id, other.address, other.info.port))
            self.reached[other.id] = LinkSpeed(found.latency_s, found.bandwidth_bytes_s)
        return self.reached[other.id]

    def lend_to(self, sock: Connection, guests: Guests) -> None:
        """It has connected, to use what devices here hold for its stages. Does not wait."""
        end = GuestsEnd(guests, self._other_lost)
        link = Link(sock, 0, self.number, end, name=f"guests of {self.name}", heartbeat_s=HEARTBEAT_S)
        end.attach(link)
        self._add_guest_link(link)

    def borrow_from(self, connect: Callable[[str, int], Connection]) -> GuestCalls:
        """The link by which stages here use what its devices hold for them. Raises `LinkLostError`."""
        with self._borrowing:
            if self._borrowed is None:
                calls = GuestCalls(self._other_lost)
                sock = connect(self.address, self.info.port)
                calls.attach(Link(sock, 0, self.number, calls, name=f"lender {self.name}"))
                self._add_guest_link(calls.link)
                self._borrowed = calls
            return self._borrowed

    def _add_guest_link(self, link: Link) -> None:
        link.epoch = self.data.epoch
        self._guest_links = [*self._guest_links, link]
        link.start()
        if self.lost is not None:  # before it could be told
            link.close(self.lost.message)

    def begin_epoch(self, epoch: int) -> None:
        """On all links that steps use."""
        for link in (self.data, *self._guest_links):
            link.epoch = epoch
        if self._borrowed is not None:
            self._borrowed.begin_epoch(epoch)

    def close(self, reason: str = "") -> None:
        """Not in one of its links' threads."""
        for link in self._links:
            link.close(reason)
        self.path.close()
        self._calls.close()

    def _serve(self, asked: msgspec.Struct) -> msgspec.Struct:
        if isinstance(asked, ReadFile):
            return self._checkpoints.read(asked)
        assert isinstance(asked, Leave)
        if not self.leaving:
            self.leaving = True
            self._on_leave(self)
        return Nothing()

    def _reported(self, report: Report) -> None:
        """In the link's thread."""
        known = {device.name for device in self.devices.values()}
        self.readings = {
            f"{self.name}/{each.device}": replace(each, device=f"{self.name}/{each.device}")
            for each in report.readings if each.device in known
        }  # fmt: skip
        self.uses = {use.stage: use for use in report.stages}
        self.lent_bytes = report.lent_bytes
        self.external = {
            f"{self.name}/{name}": nbytes for name, nbytes in report.external_bytes.items() if name in known
        }

    def _control_lost(self, error: NetworkError) -> None:
        for link in self._links[1:]:
            link.abort(error.message, goodbye=self.control.has_left)
        self._lose(error)

    def _other_lost(self, error: NetworkError) -> None:
        self.control.abort(error.message)
        self._lose(error)

    def _lose(self, error: NetworkError) -> None:
        if self.lost is None:
            self.lost = error
            self._on_lost(self, error)


class _DataEnd(MasterEnd):
    """Tells of the link's end, after the stages have heard of it."""

    def __init__(
        self, stages: dict[int, RemoteStage], on_lost: Callable[[NetworkError], None], means: Means | None
    ) -> None:
        super().__init__(stages, means)
        self._on_lost = on_lost

    def lost(self, error: NetworkError) -> None:
        super().lost(error)
        self._on_lost(error)
