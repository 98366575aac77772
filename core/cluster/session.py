"""The time that a worker spends with one master: the links to it and to other workers, and the stages here."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Protocol

import msgspec

from core.cluster.calls import CallEnd
from core.cluster.group_path import Way, means_for
from core.cluster.guest_calls import GuestCalls
from core.cluster.guests import GuestsEnd
from core.cluster.hosted_stage import NodeEnd
from core.cluster.hosting import StageHost
from core.cluster.kept_blocks import BlocksEnd
from core.cluster.lending_messages import AddGuest, AddRegion, Borrow, DropGuest, DropRegion, ExpectGuests
from core.cluster.message_types import Nothing
from core.cluster.messages import (
    Allocate,
    Call,
    Chunk,
    Connect,
    CopyPages,
    Epoch,
    Keep,
    Leave,
    Lend,
    Load,
    Measure,
    MeasurePaths,
    NodeInfo,
    Reach,
    Reached,
    ReadFile,
    ReadPages,
    Refuse,
    Release,
    Report,
    Welcome,
    WritePages,
)
from core.errors import LinkLostError, NetworkError, NotFoundError
from core.logs import get_logger
from core.network.connection import Connection
from core.network.frames import Opcode
from core.network.handshake import LinkKind
from core.network.link import Link
from core.network.rdma import RDMA_ASKED_S, agent_for
from core.network.watch import HEARTBEAT_S

logger = get_logger(__name__)

REPORT_S = 1.0
"""Between two reports on how this node is."""
UNHEARD_S = 3.0
"""After which a master that has begun no new epoch has not noticed that a link between two workers is gone."""


_URGENT = (AddRegion, DropRegion, AddGuest, DropGuest, Borrow)
"""Calls that streams wait for."""


class Home(Protocol):
    """What a session needs of the worker."""

    def listen(self, address: str) -> None: ...

    def connect(self, host: str, port: int, kind: LinkKind) -> Connection: ...

    def host(self, way_to: Callable[[str | None], Way], ask: Callable[[ReadFile], Chunk]) -> StageHost: ...

    def watch(self, link: Link) -> None: ...

    def report(self, host: StageHost) -> Report: ...

    def info(self) -> NodeInfo: ...


class Session:
    """With one master, from `start` to its end: the links and the stages. `ended` is set once the master's control link
    has gone, and `reason` says why."""

    def __init__(self, worker: Home, host: str, port: int) -> None:
        """Raises `OSError`, `NetworkError`, `ConfigError`."""
        self.ended = threading.Event()
        self.reason = ""
        self.refused: str | None = None
        self._worker = worker
        self._master_at = host, port
        self._lock = threading.Lock()
        self._number = 0
        self._epoch = 0
        self._out: dict[str, tuple[Link, NodeEnd]] = {}
        self._in: list[tuple[Link, NodeEnd]] = []
        self._lent: list[Link] = []
        self._borrowed: dict[str | None, GuestCalls] = {}
        self._timers: list[threading.Timer] = []
        self._closed = False
        self._calls = CallEnd(Call, self._serve, self._lost, "master", urgent=_URGENT)
        self._host = worker.host(self._way_to, self._ask)
        with contextlib.ExitStack() as opened:
            control = opened.enter_context(contextlib.closing(worker.connect(host, port, "control")))
            worker.listen(control.getsockname()[0])
            data = opened.enter_context(contextlib.closing(worker.connect(host, port, "data")))
            blocks = opened.enter_context(contextlib.closing(worker.connect(host, port, "blocks")))
            opened.pop_all()
        end = self._end = NodeEnd(self._host.hosted, self._other_lost, means_for(data))
        kept = BlocksEnd(self._host.blocks.memories, self._other_lost)
        self._control = Link(control, 0, 0, self._calls, name="master", heartbeat_s=HEARTBEAT_S)
        self._data = Link(data, 0, 0, end, name="master's data", new_agent=agent_for(data))
        self._blocks = Link(blocks, 0, 0, kept, name="master's blocks", new_agent=agent_for(blocks))
        self._calls.attach(self._control)
        end.attach(self._data)
        kept.attach(self._blocks)
        self._reporting = threading.Thread(target=self._report, name="vrm-report", daemon=True)

    def start(self) -> None:
        """Listen to the master."""
        self._data.start()
        self._blocks.start()
        self._control.start()
        self._worker.watch(self._control)
        self._reporting.start()

    def take(self, sock: Connection, node: str, kind: LinkKind) -> None:
        """Another worker has connected, or the master to borrow. Does not wait."""
        if kind == "guests":
            self._lend(sock, node)
            return
        end = NodeEnd(self._host.hosted, _note_lost, means_for(sock))
        link = Link(
            sock, self._number, 0, end, name=f"node {node[:8]}", heartbeat_s=HEARTBEAT_S, new_agent=agent_for(sock)
        )
        link.epoch = self._epoch
        end.attach(link)
        with self._lock:
            self._in.append((link, end))
        link.start()

    def _lend(self, sock: Connection, node: str) -> None:
        """To whoever has connected."""
        end = GuestsEnd(self._host.guests, _note_lost)
        link = Link(sock, self._number, 0, end, name=f"guests of {node[:8]}", heartbeat_s=HEARTBEAT_S)
        link.epoch = self._epoch
        end.attach(link)
        with self._lock:
            self._lent.append(link)
        link.start()

    def leave(self, reason: str) -> None:
        """Say goodbye to the master. Any thread."""
        self._control.close(reason)

    def ask_to_leave(self) -> None:
        """The master ends it when nothing of it is needed. Any thread."""
        try:
            self._calls.call(Leave(), Nothing)
        except NetworkError as error:
            logger.debug("the master does not hear that this node leaves", reason=error.message)
            self.leave("the worker has been stopped")

    def close(self) -> None:
        """Once it has ended: free the stages, close the links."""
        with self._lock:
            others = [*self._in, *self._out.values()]
            guests = [*self._lent, *(calls.link for calls in self._borrowed.values())]
            self._closed, timers = True, self._timers
        for timer in timers:
            timer.cancel()
            timer.join()
        for link in (self._control, self._data, self._blocks, *guests, *(link for link, _ in others)):
            link.close(self.reason)
        for end in (self._end, *(end for _, end in others)):
            end.path.close()
        self._reporting.join()
        self._calls.close()
        self._host.close()

    def _report(self) -> None:
        """Until the session ends."""
        while not self.ended.wait(REPORT_S):
            with contextlib.suppress(LinkLostError):  # then it ends
                report = self._worker.report(self._host)
                self._control.send(Opcode.REPORT, [msgspec.msgpack.encode(report)])

    def _lost(self, error: NetworkError) -> None:
        self.reason = error.message
        for link in (self._data, self._blocks):
            link.abort(error.message, goodbye=self._control.has_left)
        self.ended.set()

    def _other_lost(self, error: NetworkError) -> None:
        """All links or none."""
        self._control.abort(error.message)

    def _out_lost(self, error: NetworkError) -> None:
        """A link to another worker has ended. Either that one is gone, and the master deals with it; or the way there
        is, and steps that were on it will not arrive: then this node goes, so that the master hears of it."""
        logger.info("a link to another node has ended", reason=error.message)
        timer = threading.Timer(UNHEARD_S, self._give_up, (error, self._epoch))
        timer.name, timer.daemon = "vrm-unheard", True
        with self._lock:
            if self._closed:
                return
            self._timers = [*(each for each in self._timers if each.is_alive()), timer]
            timer.start()

    def _give_up(self, error: NetworkError, epoch: int) -> None:
        if not self.ended.is_set() and self._epoch == epoch and self._host.sends_over_lost_links():
            logger.error("what is computed here does not get on", reason=error.message)
            self._control.abort(f"it cannot reach another node: {error.message}", goodbye=True)

    def _way_to(self, node: str | None) -> Way:
        if node is None:
            return Way(self._data, self._end.path)
        with self._lock:
            if node not in self._out:
                raise NotFoundError(f"there is no link to node {node}")
            link, end = self._out[node]
            return Way(link, end.path)

    def _ask(self, asked: ReadFile) -> Chunk:
        return self._calls.call(asked, Chunk)

    # -- calls, one after the other, but for lent memory: streams wait for that --------------------------------------

    def _serve(self, request: msgspec.Struct) -> msgspec.Struct:
        if isinstance(request, Welcome):
            self._number = request.number
            self._set_epoch(request.epoch)
            logger.info("joined", number=request.number, master_version=request.version)
            return self._worker.info()
        if isinstance(request, Refuse):
            self.refused = request.reason
            return Nothing()
        if isinstance(request, Measure):
            return self._host.measure(request)
        if isinstance(request, MeasurePaths):
            return self._host.measure_paths(request)
        if isinstance(request, Reach):
            return self._reach(request)
        if isinstance(request, Load):
            return self._host.load(request)
        if isinstance(request, Allocate):
            return self._host.allocate(request)
        if isinstance(request, Connect):
            self._host.connect(request)
        elif isinstance(request, AddRegion):
            self._host.add_region(request)
        elif isinstance(request, DropRegion):
            self._host.drop_region(request)
        elif isinstance(request, AddGuest):
            self._host.add_guest(request)
        elif isinstance(request, ExpectGuests):
            self._host.expect_guests(request)
        elif isinstance(request, DropGuest):
            self._host.guests.drop(request.guest, request.region)
        elif isinstance(request, Borrow):
            self._host.borrow(request, self._borrow_from(request))
        elif isinstance(request, Keep):
            self._host.keep(request)
        elif isinstance(request, Lend):
            self._host.blocks.lend(request.memory)
        elif isinstance(request, ReadPages):
            return self._host.read_pages(request)
        elif isinstance(request, WritePages):
            self._host.write_pages(request)
        elif isinstance(request, CopyPages):
            self._host.copy_pages(request)
        elif isinstance(request, Release):
            self._host.release(request)
        elif isinstance(request, Epoch):
            self._set_epoch(request.epoch)
        return Nothing()

    def _reach(self, asked: Reach) -> Reached:
        with self._lock:
            link, end = self._out.get(asked.node, (None, None))
        if link is None or end is None or link.error is not None:
            try:
                sock = self._worker.connect(asked.host, asked.port, "data")
            except OSError as error:
                reason = error.strerror or str(error)
                raise LinkLostError(f"{asked.host}:{asked.port} cannot be reached: {reason}") from error
            end = NodeEnd(self._host.hosted, self._out_lost, means_for(sock))
            link = Link(sock, self._number, 0, end, name=f"node {asked.node[:8]}", new_agent=agent_for(sock))
            link.epoch = self._epoch
            end.attach(link)
            link.start()
            self._worker.watch(link)  # whose other end is silent only if it is gone: nothing is computed to read it
            with self._lock:
                self._out[asked.node] = (link, end)
        link.ask_for_rdma(RDMA_ASKED_S)
        end.path.open()
        speed = end.echo.measure()
        return Reached(speed.latency_s, speed.bandwidth_bytes_s)

    def _borrow_from(self, asked: Borrow) -> GuestCalls:
        """A link to whoever lends, which may be there already. Raises `LinkLostError`."""
        node = asked.at.node if asked.at is not None else None
        host, port = (asked.at.host, asked.at.port) if asked.at is not None else self._master_at
        with self._lock:
            calls = self._borrowed.get(node)
        if calls is not None and calls.link.error is not None:
            calls.link.close()
            calls = None
        if calls is None:
            try:
                sock = self._worker.connect(host, port, "guests")
            except OSError as error:
                raise LinkLostError(f"{host}:{port} cannot be reached: {error.strerror or error}") from error
            calls = GuestCalls(self._other_lost if node is None else _note_lost)
            link = Link(sock, self._number, 0, calls, name=f"lender {(node or 'master')[:8]}")
            calls.attach(link)
            with self._lock:
                link.epoch = self._epoch
                self._borrowed[node] = calls
            link.start()
            self._worker.watch(link)
        return calls

    def _set_epoch(self, epoch: int) -> None:
        with self._lock:
            self._epoch = epoch
            links = [self._data, *self._lent, *(link for link, _ in (*self._in, *self._out.values()))]
            borrowed = list(self._borrowed.values())
            ended = [link for link in self._lent if link.error is not None]
            self._lent = [link for link in self._lent if link.error is None]
        for link in links:
            link.epoch = epoch
        for link in ended:
            link.close()
        for calls in borrowed:
            calls.begin_epoch(epoch)


def _note_lost(error: NetworkError) -> None:
    """Steps that it carried fail at the master, which hears of the node's end from the node."""
    logger.info("a link to another node has ended", reason=error.message)
