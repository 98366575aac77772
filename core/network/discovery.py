"""How a worker finds its master: mDNS (`_vramancer._tcp`), and beside it a broadcast over UDP, for networks that let no
multicast through. Both only find; whether a master is the right one is what the handshake tells.

Nothing that is sent depends on the cluster's token. Whether the master encrypts is said too, for whoever reads the log:
anybody can say so, and nothing is decided by it.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import queue
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import msgspec
import psutil
import structlog
from zeroconf import IPVersion, ServiceBrowser, ServiceInfo, ServiceListener, Zeroconf

from core.decoding import UNREADABLE

SERVICE = "_vramancer._tcp.local."
ASKED_EVERY_S = 0.5
_QUESTION = b"VTP\1 where is the master?\n"
_MAX_ANSWER_BYTES = 512
_API_TIMEOUT_S = 5.0
_LOOK_S = 0.25
_ANSWERS_PER_S = 50
"""That a master gives to broadcasts; more questions stay unanswered for the rest of the second."""

logger = structlog.get_logger(__name__)

How = Literal["mdns", "broadcast", "given"]


class Found(NamedTuple):
    """Where a master may be, and how that is known."""

    host: str
    port: int
    how: How
    tls: bool = False
    """Whether its connections are encrypted, as it says."""


class _Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """To a broadcast: where the master listens, at the address that the answer comes from."""

    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    node: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    tls: bool = False


class _Live(msgspec.Struct, frozen=True):
    """What a server's `/live` says that is of use here."""

    cluster_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None


def addresses() -> dict[str, tuple[str, str | None]]:
    """This machine's IPv4 addresses that are up, with their interface and its broadcast address."""
    stats = psutil.net_if_stats()
    found = {}
    for interface, entries in psutil.net_if_addrs().items():
        if interface in stats and not stats[interface].isup:
            continue
        for entry in entries:
            if entry.family is socket.AF_INET:
                found[entry.address] = (interface, entry.broadcast or _broadcast_of(entry.address, entry.netmask))
    return found


def _broadcast_of(address: str, netmask: str | None) -> str | None:
    if not netmask:
        return None
    return str(ipaddress.IPv4Network(f"{address}/{netmask}", strict=False).broadcast_address)


class Advertiser:
    """Says where the master listens, until closed. `hosts` are its own addresses that workers may use."""

    def __init__(self, hosts: list[str], port: int, node: str, *, tls: bool = False) -> None:
        """Raises `OSError` if the port cannot be listened on for broadcasts."""
        self._answer = msgspec.msgpack.encode(_Answer(port, node, tls))
        self._zeroconf = Zeroconf(interfaces=hosts, ip_version=IPVersion.V4Only)
        self._service = ServiceInfo(
            SERVICE, f"{node}.{SERVICE}", port=port, parsed_addresses=hosts,
            properties={"node": node, "tls": str(int(tls))}, server=f"vramancer-{node[:12]}.local.",
        )  # fmt: skip
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(("", port))  # a broadcast reaches no socket that is bound to one address
            self._zeroconf.register_service(self._service)
        except BaseException:
            self._socket.close()
            self._zeroconf.close()
            raise
        self._woken, self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._reply, name="vrm-discovery", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Say that the master has gone."""
        self._wake.close()
        self._thread.join()
        self._woken.close()
        self._socket.close()
        self._zeroconf.unregister_service(self._service)
        self._zeroconf.close()

    def _reply(self) -> None:
        given, second = 0, 0
        while True:
            readable, _, _ = select.select([self._socket, self._woken], [], [])
            if self._woken in readable:
                return
            with contextlib.suppress(OSError):
                question, address = self._socket.recvfrom(len(_QUESTION) + 1)
                now = int(time.monotonic())
                given, second = (given + 1, second) if now == second else (1, now)
                if question == _QUESTION and given <= _ANSWERS_PER_S:
                    self._socket.sendto(self._answer, address)


class _Listener(ServiceListener):
    """Puts what mDNS finds into a queue."""

    def __init__(self, found: queue.SimpleQueue[Found]) -> None:
        self._found = found

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        info = zc.get_service_info(type_, name, timeout=1000)
        if info is not None and info.port:
            for address in info.parsed_addresses(IPVersion.V4Only):
                self._found.put(Found(address, info.port, "mdns", info.properties.get(b"tls") == b"1"))

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self.add_service(zc, type_, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None: ...


def masters(
    port: int, timeout_s: float, hosts: list[str] | None = None, given_up: threading.Event | None = None
) -> Iterator[Found]:
    """Masters as they are found, each once, until `timeout_s` have passed or they are `given_up`. `port` is the one to
    which broadcasts go; `hosts` are this machine's addresses to look from (None: all)."""
    deadline_s = time.monotonic() + timeout_s
    known = addresses()
    hosts = list(known) if hosts is None else hosts
    found: queue.SimpleQueue[Found] = queue.SimpleQueue()
    seen: set[tuple[str, int]] = set()
    stopped = threading.Event()
    asking = threading.Thread(target=_ask, args=(port, hosts, known, found, stopped), name="vrm-asking", daemon=True)
    with contextlib.ExitStack() as stack:
        try:
            zeroconf = Zeroconf(interfaces=hosts, ip_version=IPVersion.V4Only)
        except OSError as error:  # an address that has gone, or a port that somebody keeps
            logger.debug("mDNS cannot be used", reason=error.strerror or str(error))
        else:
            stack.callback(zeroconf.close)
            # its thread has to end first: what it looks up needs a Zeroconf that is open
            stack.callback(ServiceBrowser(zeroconf, SERVICE, listener=_Listener(found)).cancel)
        asking.start()
        stack.callback(asking.join)
        stack.callback(stopped.set)
        while (left_s := deadline_s - time.monotonic()) > 0 and not (given_up is not None and given_up.is_set()):
            with contextlib.suppress(queue.Empty):
                each = found.get(timeout=min(left_s, _LOOK_S))
                if each[:2] not in seen:
                    seen.add(each[:2])
                    yield each


def _ask(
    port: int,
    hosts: list[str],
    known: dict[str, tuple[str, str | None]],
    found: queue.SimpleQueue[Found],
    stopped: threading.Event,
) -> None:
    """Ask by broadcast, again and again, from every address."""
    sockets = []
    with contextlib.ExitStack() as stack:
        for host in hosts:
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            try:
                sock.bind((host, 0))
            except OSError as error:
                logger.debug("an address is not there any more", address=host, reason=error.strerror or str(error))
                continue
            sockets.append((sock, known.get(host, ("", None))[1] or host))
        while not stopped.is_set():
            for sock, target in sockets:
                with contextlib.suppress(OSError):  # a network that takes no broadcast
                    sock.sendto(_QUESTION, (target, port))
            deadline_s = time.monotonic() + ASKED_EVERY_S
            while (left_s := deadline_s - time.monotonic()) > 0 and not stopped.is_set():
                readable, _, _ = select.select([sock for sock, _ in sockets], [], [], min(left_s, 0.1))
                for sock in readable:
                    _note(sock, found)


def _note(sock: socket.socket, found: queue.SimpleQueue[Found]) -> None:
    with contextlib.suppress(OSError):
        data, (host, _) = sock.recvfrom(_MAX_ANSWER_BYTES)
        try:
            answer = msgspec.msgpack.decode(data, type=_Answer)
        except UNREADABLE:
            logger.debug("an answer to a broadcast cannot be read", address=host)
            return
        found.put(Found(host, answer.port, "broadcast", answer.tls))


def cluster_port_of(host: str, port: int) -> int | None:
    """Where the master whose API is at an address takes workers in; None if there is no such API."""
    try:
        with contextlib.closing(http.client.HTTPConnection(host, port, timeout=_API_TIMEOUT_S)) as connection:
            connection.request("GET", "/live")
            answer = msgspec.json.decode(connection.getresponse().read(_MAX_ANSWER_BYTES), type=_Live)
    except (OSError, http.client.HTTPException, *UNREADABLE) as error:
        logger.debug("no API answers there", host=host, port=port, reason=str(error) or type(error).__name__)
        return None
    return answer.cluster_port
