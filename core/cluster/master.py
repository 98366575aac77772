"""The master's side of a cluster: takes workers in, keeps an eye on them, and knows which there are."""

from __future__ import annotations

import itertools
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from core.cluster.guest_calls import GuestCalls
from core.cluster.guests import Guests
from core.cluster.messages import Epoch
from core.cluster.node import Node, SharedCheckpoints
from core.cluster.remote_stage import RecordEncoder
from core.config import ClusterSettings
from core.devices import Device
from core.devices.readings import DeviceReading
from core.errors import ClusterRefusedError, DeviceLostError, LinkLostError, NetworkError, VRAMancerError
from core.logs import get_logger
from core.network.certificates import new_identity
from core.network.connection import Connection
from core.network.greeting import GREETING_S, introduce
from core.network.handshake import Hello
from core.network.listener import Listener
from core.network.traffic import LinkStats
from core.network.watch import Watch

if TYPE_CHECKING:
    from core.network.discovery import Advertiser

logger = get_logger(__name__)

MAX_NODES = 1024
_MAX_PENDING = 64
_CONNECTIONS = 3
"""Of a worker."""
_PENDING_S = 10.0
"""Between the first of them and the last."""
_MAX_LEFT_OUT = 32
_TOLD_EVERY_S = 15.0
"""Whoever uses a node that wants to go, unless nodes have come or gone before."""
_LOOK_S = 0.2

Change = Literal["joined", "leaving", "lost"]
"""A node that is leaving works until it is let go."""


@dataclass(slots=True)
class _Pending:
    """A worker of which not all connections have come."""

    address: str
    since_s: float
    sockets: dict[str, Connection] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A node that is not part of the cluster, and why."""

    name: str
    address: str
    reason: str


class Master:
    """Listens from `start` to `close`. Those in `on_change` hear of workers that come and go, in any thread but never
    in one that something waits for. `name` is this machine's in the cluster."""

    def __init__(self, settings: ClusterSettings, key: bytes, *, version: str, host: str, name: str) -> None:
        """Raises `OSError` if the port cannot be had, `ConfigError` if what `settings.tls` needs is missing."""
        self.node, self.name, self.version = uuid.uuid4().hex, name, version
        self.checkpoints = SharedCheckpoints()
        self.encoder = RecordEncoder()
        self.guests = Guests()
        """What devices here hold for stages of nodes."""
        self.on_change: list[Callable[[Change, Node], None]] = []
        self._settings = settings
        self._lock = threading.Lock()
        self._nodes: dict[str, Node] = {}
        self._left_out: list[LeftOut] = []
        self._pending: dict[str, _Pending] = {}
        self._numbers = itertools.count(1)
        self._stage_numbers = itertools.cycle(range(1, 0x10000))
        self._epoch = 0
        self._threads: list[threading.Thread] = []
        self._key, self._identity = key, new_identity() if settings.tls else None
        self._listener = Listener(
            host, settings.port, key, self.node, self._welcomed, self._admit, self._refused, self._identity
        )
        self._watch = Watch(settings.silence_s)
        self._advertiser: Advertiser | None = None
        self._closing = threading.Event()
        self._changes = 0
        self._past = LinkStats()
        self.observe: Callable[[str, float], None] = lambda operation, seconds: None
        self.transferred: Callable[[str, str, str, int, float], None] = lambda *moved: None
        """Hears of tensors that went from a GPU here to one of another process: how, from where to where, bytes,
        seconds."""
        """Hears how long operations on links take, in their threads."""

    @property
    def is_found(self) -> bool:
        """Whether workers find it by themselves."""
        return self._advertiser is not None

    @property
    def tls(self) -> bool:
        """Whether its connections are encrypted, and those between its workers."""
        return self._settings.tls

    @property
    def wait_s(self) -> float:
        """How long requests wait for a node where the others cannot hold the model."""
        return self._settings.wait_s

    @property
    def address(self) -> tuple[str, int]:
        """Where workers are taken in."""
        return self._listener.host, self._listener.port

    def start(self) -> None:
        """Listen, and be found."""
        from core.network.discovery import Advertiser  # which no server without a cluster has to read

        self._listener.start()
        host, port = self.address
        logger.info("taking workers in", address=f"{host}:{port}")
        try:
            self._advertiser = Advertiser([host], port, self.node, tls=self.tls)
        except OSError as error:
            logger.warning("workers cannot find this master by themselves: give them its address", reason=str(error))

    def close(self) -> None:
        """Say goodbye to all."""
        self._closing.set()
        if self._advertiser is not None:
            self._advertiser.close()
        self._listener.close()
        with self._lock:
            nodes = list(self._nodes.values())
            pending, self._pending = list(self._pending.values()), {}
        for each in pending:
            for sock in each.sockets.values():
                sock.close()
        for node in nodes:
            node.close("the master shuts down")
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join()
        self._watch.close()

    # -- who is there -----------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Those that have joined and have not gone, in the order in which they came."""
        with self._lock:
            return tuple(sorted(self._nodes.values(), key=lambda node: node.number))

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """The last ones that were refused."""
        with self._lock:
            return tuple(self._left_out)

    def _observe(self, operation: str, seconds: float) -> None:
        self.observe(operation, seconds)

    def traffic(self) -> LinkStats:
        """What this machine and its nodes have sent each other, those that have gone included."""
        total = LinkStats()
        with self._lock:
            total.add(self._past)
            for node in self._nodes.values():
                total.add(node.traffic())
        return total

    def readings(self) -> dict[str, DeviceReading]:
        """What the nodes' devices said last, by their names in the cluster."""
        return {name: each for node in self.nodes for name, each in node.readings.items()}

    def external_bytes(self) -> dict[str, int]:
        """What other programs take of the nodes' devices, as the nodes have said last, by the devices' names."""
        return {name: nbytes for node in self.nodes for name, nbytes in node.external.items()}

    def hosts(self, devices: Sequence[Device]) -> tuple[Device, ...]:
        """The main memories beside devices of nodes."""
        machines = {device.node for device in devices}
        return tuple(node.host for node in self.nodes if node.name in machines)

    def devices(self, first_index: int) -> tuple[Device, ...]:
        """All devices of all nodes, but for those that want to go."""
        found: list[Device] = []
        for node in self._staying():
            found.extend(node.logical_devices(first_index + len(found)))
        return tuple(found)

    def node_of(self, device: Device) -> Node:
        """The node that has a device. Raises `ClusterRefusedError` if it has gone."""
        for node in self.nodes:
            if node.name == device.node and device.name in node.devices:
                return node
        raise ClusterRefusedError(f"{device.name}: {device.node} is not part of the cluster any more.")

    def has(self, name: str) -> bool:
        """Whether the node of this name is there to stay and its links are alive."""
        return any(node.name == name and node.is_alive for node in self._staying())

    def _staying(self) -> list[Node]:
        return [node for node in self.nodes if not node.leaving]

    def borrow_from(self, node: Node) -> GuestCalls:
        """What a node's devices hold for stages here is reached so. Raises `LinkLostError`."""
        return node.borrow_from(self._connect)

    def _connect(self, host: str, port: int) -> Connection:
        """To a worker, which listens for others that borrow from it."""
        try:
            sock = socket.create_connection((host, port), timeout=GREETING_S, source_address=(self._listener.host, 0))
        except OSError as error:
            raise LinkLostError(f"{host}:{port} cannot be reached: {error.strerror or error}") from error
        try:
            return introduce(sock, self._key, self.node, "guests", self._identity)
        except BaseException:
            sock.close()
            raise

    def new_stage(self) -> int:
        """A number that no stage of this master has had for a long time."""
        with self._lock:
            return next(self._stage_numbers)

    def begin_epoch(self, lost: DeviceLostError) -> None:
        """What is still on its way between nodes belongs to steps that have failed because of what is `lost`: nodes
        drop it, and nobody waits for it any more."""
        with self._lock:
            self._epoch += 1
            epoch, nodes = self._epoch, list(self._nodes.values())
        for stage in [stage for node in nodes for stage in list(node.remotes.values())]:
            stage.expect_no_more(lost)
        for node in nodes:
            self._tell_epoch(node, epoch)

    def _tell_epoch(self, node: Node, epoch: int) -> None:
        try:
            node.call(Epoch(epoch))
            node.begin_epoch(epoch)
        except VRAMancerError as error:
            logger.warning("a node does not hear of a new epoch", node=node.name, reason=error.message)

    # -- coming and going -------------------------------------------------------------------------------------------

    async def _admit(self, hello: Hello, address: str) -> None:
        if hello.kind == "probe":
            raise ClusterRefusedError("nothing is measured by connecting")
        if hello.kind == "guests":
            if hello.node not in self._nodes:
                raise ClusterRefusedError("only nodes of the cluster are lent memory")
            return
        if len(self._nodes) >= MAX_NODES:
            raise ClusterRefusedError(f"the cluster has {MAX_NODES} nodes already")

    def _welcomed(self, sock: Connection, hello: Hello, address: str) -> None:
        """In the listener's loop. A worker is complete with all its connections, but for what it borrows later."""
        if hello.kind == "guests":
            with self._lock:
                node = self._nodes.get(hello.node)
            if node is None:
                sock.close()
            else:
                node.lend_to(sock, self.guests)
            return
        now_s = time.monotonic()
        with self._lock:
            for old in [name for name, each in self._pending.items() if now_s - each.since_s > _PENDING_S]:
                self._drop_pending(old)
            if len(self._pending) >= _MAX_PENDING:
                self._drop_pending(next(iter(self._pending)))
            pending = self._pending.setdefault(hello.node, _Pending(address, now_s))
            before = pending.sockets.pop(hello.kind, None)
            if before is not None:
                before.close()
            pending.sockets[hello.kind] = sock
            if len(pending.sockets) < _CONNECTIONS:
                return
            del self._pending[hello.node]
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            thread = threading.Thread(
                target=self._join, args=(hello.node, address, pending.sockets), name="vrm-joining", daemon=True
            )
            self._threads.append(thread)
        thread.start()

    def _refused(self, address: str, reason: str) -> None:
        """In the listener's loop: before it has said its name."""
        with self._lock:
            others = [each for each in self._left_out if each.name != address]
            self._left_out = [*others, LeftOut(address, address, reason)][-_MAX_LEFT_OUT:]

    def _drop_pending(self, name: str) -> None:
        for sock in self._pending.pop(name).sockets.values():
            sock.close()

    def _join(self, name: str, address: str, sockets: dict[str, Connection]) -> None:
        with self._lock:
            number, epoch = next(self._numbers), self._epoch
        node = Node(
            name, number, address, sockets, self.checkpoints, self._lose, self._leaves, epoch, self._observe,
        )  # fmt: skip
        try:
            self._watch.add(node.control)
            node.join(self.version)
        except VRAMancerError as error:
            logger.warning("a node could not be taken in", address=address, reason=error.message)
            called = node.info.name if node.is_known else address
            with self._lock:
                self._left_out = [*self._left_out, LeftOut(called, address, error.message)][-_MAX_LEFT_OUT:]
            node.close(error.message)
            return
        with self._lock:
            node.adopt_name(_free_name(node.info.name, {other.name for other in self._nodes.values()}))
            before = self._nodes.get(name)
            taken = node.lost is None and not self._closing.is_set()
            if taken:
                if before is not None:
                    self._past.add(before.traffic())
                self._nodes[name] = node
                self._left_out = [each for each in self._left_out if each.name not in (node.info.name, address)]
            now = self._epoch
        if not taken:
            node.close()
            return
        if now != epoch:  # which began while it was measured
            self._tell_epoch(node, now)
        logger.info(
            "a node has joined", node=node.name, address=address, devices=list(node.devices),
            latency_us=round(node.speed.latency_s * 1e6), gigabytes_s=round(node.speed.bandwidth_bytes_s / 1e9, 3),
        )  # fmt: skip
        if before is not None:
            before.close("it has joined anew")
        self._tell("joined", node)

    def _leaves(self, node: Node) -> None:
        """In the thread of the node's calls."""
        logger.info("a node wants to leave", node=node.name)
        with self._lock:
            known = node.id in self._nodes
            thread = threading.Thread(target=self._let_go, args=(node, known), name="vrm-leaving", daemon=True)
            self._threads = [*(thread for thread in self._threads if thread.is_alive()), thread]
        thread.start()

    def _let_go(self, node: Node, known: bool) -> None:
        """Whoever uses it lets go of it first. Whoever cannot is told again when machines have come or gone, and once
        in a while."""
        told_s, told_of = -_TOLD_EVERY_S, -1
        while node.lost is None and not self._closing.is_set():
            if known and (time.monotonic() - told_s > _TOLD_EVERY_S or told_of != self._changes):
                told_of = self._changes
                self._tell("leaving", node)
                told_s = time.monotonic()
            if not node.remotes and not node.kept and not node.lends:
                node.close("nothing of it is in use")
                return
            self._closing.wait(_LOOK_S)

    def _tell(self, change: Change, node: Node) -> None:
        if change != "leaving":
            self._changes += 1
        for hear in tuple(self.on_change):
            try:
                hear(change, node)
            except Exception as error:  # the others hear of it all the same
                logger.error("a change of the cluster could not be dealt with", exc_info=error)

    def _lose(self, node: Node, error: NetworkError) -> None:
        """In one of the node's threads, or in whichever sends to it."""
        with self._lock:
            known = self._nodes.get(node.id) is node
            if known:
                del self._nodes[node.id]
                self._past.add(node.traffic())
            thread = threading.Thread(target=self._part, args=(node, error, known), name="vrm-parting", daemon=True)
            self._threads = [*(thread for thread in self._threads if thread.is_alive()), thread]
        thread.start()

    def _part(self, node: Node, error: NetworkError, known: bool) -> None:
        node.close()
        if known:
            if node.leaving:
                logger.info("a node has left", node=node.name)
            else:
                logger.error("a node is lost", node=node.name, reason=error.message)
            self._tell("lost", node)


def _free_name(name: str, taken: set[str]) -> str:
    """The name, or the next of name-2, name-3 that is free."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(each for each in names if each not in taken)
