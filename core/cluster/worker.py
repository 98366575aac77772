"""A worker: joins a master, computes the stages that it is told to, and looks for a master again when that one goes."""

from __future__ import annotations

import errno
import platform
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence

import torch

from core.cluster.group_path import Way
from core.cluster.hosting import StageHost, device_info
from core.cluster.kept_blocks import LENT, KeptBlocks
from core.cluster.messages import Chunk, NodeInfo, ReadFile, Report
from core.cluster.session import REPORT_S, Session
from core.config import Settings
from core.devices import Device, open_main_memory
from core.devices.monitor import GPUMonitor
from core.errors import ClusterRefusedError, ConfigError, LinkLostError, NetworkError
from core.logs import get_logger
from core.network.certificates import new_identity
from core.network.connection import Connection
from core.network.discovery import cluster_port_of, masters
from core.network.greeting import GREETING_S, introduce
from core.network.handshake import Hello, LinkKind
from core.network.link import Link
from core.network.listener import Listener
from core.network.watch import Watch
from core.profiling.profile_store import cpu_name
from core.transfer import TransferManager

logger = get_logger(__name__)

LOOK_S = 10.0
"""That one search for a master takes; searches follow each other until one is found."""
OTHER_PORTS = 100
"""So many above the usual one are tried for other nodes, where nobody chose one."""
_AGAIN_S = 1.0
"""Before the next try to reach a master."""


class Worker:
    """`run` until `stop` or `leave`. `key` is made of the cluster's token; `version` is the program's. `bound_to` is
    the address of the interface that is used; None: whichever leads to the master. Other nodes come to that one."""

    def __init__(
        self, settings: Settings, devices: Sequence[Device], key: bytes, *, version: str, name: str,
        bound_to: str | None = None,
    ) -> None:  # fmt: skip
        """Raises `ConfigError` if what `cluster.tls` needs is missing."""
        self.name = name
        self.node = uuid.uuid4().hex
        self._settings, self._cluster, self._devices = settings, settings.cluster, tuple(devices)
        self._key, self._version = key, version
        self._identity = new_identity() if settings.cluster.tls else None
        self._transfer = TransferManager()
        self._main_memory = open_main_memory(settings.devices).open(self._devices)
        self._main_memory.reserve(LENT, settings.cluster.memory_bytes)
        self._stopped = threading.Event()
        self._watch = Watch(settings.cluster.silence_s)
        self._monitor = GPUMonitor(lambda: self._devices, REPORT_S)
        self._session: Session | None = None
        self._bound_to = bound_to
        self._listener: Listener | None = None

    @property
    def port(self) -> int:
        """Where it listens for other nodes, once it has found a master."""
        assert self._listener is not None
        return self._listener.port

    @property
    def has_joined(self) -> bool:
        """Whether it has a master now."""
        return self._session is not None

    def run(self) -> None:
        """Join, work, and join again, until `stop`. Raises `ClusterRefusedError` if the master will not have this
        node, and `ConfigError` if it cannot listen for others."""
        told = False
        self._monitor.start()
        while not self._stopped.is_set():
            try:
                session = self._join()
            except (NetworkError, OSError) as error:
                if isinstance(error, ClusterRefusedError):
                    raise
                if not told and not self._stopped.is_set():
                    logger.info("no master yet; it is looked for until it is there", reason=str(error))
                    told = True
                self._stopped.wait(_AGAIN_S)
                continue
            told = False
            session.ended.wait()
            self._session = None
            session.close()
            if session.refused is not None:
                raise ClusterRefusedError(f"The master does not take this node: {session.refused}")
            if not self._stopped.is_set():
                logger.warning("the master is lost; looking for it", reason=session.reason)
                self._stopped.wait(_AGAIN_S)

    def stop(self) -> None:
        """Any thread; `run` ends soon."""
        self._stopped.set()
        session = self._session
        if session is not None:
            session.leave("the worker has been stopped")

    def leave(self) -> None:
        """`run` ends once the master has moved elsewhere what is computed here. Any thread, which waits for the
        master's word that it has heard."""
        self._stopped.set()
        session = self._session
        if session is not None:
            session.ask_to_leave()

    def close(self) -> None:
        """After `run`."""
        if self._listener is not None:
            self._listener.close()
        self._monitor.close()
        self._watch.close()
        self._transfer.close()

    def _join(self) -> Session:
        refused: ClusterRefusedError | None = None
        reason = "none has been found on the network"
        for host, port in self._places():
            if self._stopped.is_set():
                break
            try:
                session = Session(self, host, port)
            except ClusterRefusedError as error:
                logger.warning("a master refuses this node", host=host, port=port, reason=error.message)
                refused, reason = error, error.message
            except (OSError, NetworkError) as error:
                reason = error.message if isinstance(error, NetworkError) else error.strerror or str(error)
                reason = f"{host}:{port} is not one: {reason}"
                logger.debug("a master cannot be reached", reason=reason)
            else:
                self._session = session  # before the master knows it, and others through the master
                session.start()
                if self._stopped.is_set():
                    session.leave("the worker has been stopped")
                return session
        if refused is not None and self._cluster.master is not None:
            raise refused
        raise LinkLostError(reason)

    def _places(self) -> Iterator[tuple[str, int]]:
        given = self._cluster.master
        if given is None:
            hosts = [self._bound_to] if self._bound_to is not None else None
            found = masters(self._cluster.port, LOOK_S, hosts, self._stopped)
            try:
                for each in found:
                    logger.info(
                        "a master has been found", by=each.how, address=f"{each.host}:{each.port}", tls=each.tls
                    )
                    yield each.host, each.port
            finally:
                found.close()  # type: ignore[attr-defined]
            return
        host, _, port = given.rpartition(":")
        yield host.strip("[]"), int(port)
        behind = cluster_port_of(host.strip("[]"), int(port))
        if behind is not None:
            yield host.strip("[]"), behind

    # -- other workers ----------------------------------------------------------------------------------------------

    def listen(self, address: str) -> None:
        """Where they come to from now on. Raises `ConfigError` if no port can be had there."""
        if self._listener is not None:
            if self._listener.host == address:
                return
            self._listener.close()
            self._listener = None
        first = self._cluster.worker_port
        others = 0 if not first or "worker_port" in self._cluster.model_fields_set else OTHER_PORTS
        for port in range(first, first + others + 1):
            try:
                self._listener = Listener(
                    address, port, self._key, self.node, self._welcomed, self._admit, identity=self._identity
                )
            except OSError as error:
                if port < first + others and error.errno == errno.EADDRINUSE:
                    continue
                raise ConfigError(
                    f"cluster.worker_port: {address}:{port} cannot be listened on: {error.strerror or error}."
                ) from error
            self._listener.start()
            return

    async def _admit(self, hello: Hello, address: str) -> None:
        if hello.kind not in ("data", "guests") or self._session is None:
            raise ClusterRefusedError(
                "this node is a worker: it takes what other workers compute, and whom its master has it lend to"
            )

    def _welcomed(self, sock: Connection, hello: Hello, address: str) -> None:
        session = self._session
        if session is None:
            sock.close()
        else:
            session.take(sock, hello.node, hello.kind)

    # -- for sessions -----------------------------------------------------------------------------------------------

    def connect(self, host: str, port: int, kind: LinkKind) -> Connection:
        """A greeted connection. Raises `OSError`, `NetworkError`."""
        source = (self._bound_to, 0) if self._bound_to is not None else None
        sock = socket.create_connection((host, port), timeout=GREETING_S, source_address=source)
        try:
            return introduce(sock, self._key, self.node, kind, self._identity)
        except BaseException:
            sock.close()
            raise

    def host(self, way_to: Callable[[str | None], Way], ask: Callable[[ReadFile], Chunk]) -> StageHost:
        """A new one, for one master."""
        has_cards = not all(device.is_main_memory for device in self._devices)
        blocks = KeptBlocks(self._settings, self._main_memory, has_cards=has_cards)
        return StageHost(self._settings, self._devices, self._main_memory, self._transfer, way_to, ask, blocks)

    def watch(self, link: Link) -> None:
        """End it when the other end is silent."""
        self._watch.add(link)

    def report(self, host: StageHost) -> Report:
        """What the master is told now and then."""
        readings = tuple(self._monitor.readings.values())
        return Report(readings, host.uses(), host.external_bytes(), host.blocks.lent_bytes)

    def info(self) -> NodeInfo:
        """What the master is told of this node."""
        return NodeInfo(
            name=self.name,
            version=self._version,
            python=platform.python_version(),
            torch=str(torch.__version__),
            system=f"{platform.system()} {platform.machine()}",
            processor=cpu_name(),
            port=self.port,
            devices=tuple(device_info(device) for device in self._devices),
            lends_bytes=self._cluster.memory_bytes,
            main_bytes=max(0, self._main_memory.free_bytes - (self._settings.memory.host_bytes or 0)),
        )
