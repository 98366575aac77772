"""Calls over a control link: either side asks, the other answers in its own time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Annotated, Any, TypeVar

import msgspec

from core import errors
from core.cluster.messages import Report
from core.decoding import UNREADABLE
from core.devices.exhaustion import is_out_of_memory
from core.errors import (
    DeviceLostError,
    InsufficientMemoryError,
    LinkLostError,
    NetworkError,
    ProtocolError,
    RateLimitError,
    VRAMancerError,
)
from core.logs import get_logger
from core.network.frames import Header, Opcode
from core.network.link import Link

logger = get_logger(__name__)

_LONGEST = 4000
CALL_S = 30.0
"""That an answer may take, unless the call says otherwise. Loading takes as long as it takes: the link lives as long as
the other end."""

_NEED_MORE = (DeviceLostError, RateLimitError)
"""Errors that a message alone does not make. What a node lost is not what its master lost, and it limits no rates."""

A = TypeVar("A")


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a call failed. `kind` is the error's class."""

    kind: Annotated[str, msgspec.Meta(max_length=64)]
    message: Annotated[str, msgspec.Meta(max_length=_LONGEST)]
    lacking_bytes: dict[str, int] = {}


def fault_of(error: BaseException) -> Fault:
    """What to tell of an error."""
    if not isinstance(error, VRAMancerError):
        kind = "OutOfDeviceMemoryError" if is_out_of_memory(error) else "VRAMancerError"
        return Fault(kind, f"{type(error).__name__}: {error}"[:_LONGEST])
    lacking = dict(error.lacking_bytes) if isinstance(error, InsufficientMemoryError) else {}
    return Fault(type(error).__name__, error.message[:_LONGEST], lacking)


def raised_by(fault: Fault, node: str) -> VRAMancerError:
    """The error as it would have been raised here; `node` begins its message."""
    message = f"{node}: {fault.message}"
    kind = getattr(errors, fault.kind, None)
    if kind is InsufficientMemoryError:
        return InsufficientMemoryError(message, lacking_bytes=fault.lacking_bytes)
    if isinstance(kind, type) and issubclass(kind, VRAMancerError) and kind not in _NEED_MORE:
        return kind(message)
    return VRAMancerError(message)


class CallEnd:
    """One end of a control link: a `LinkHandler`. `serve` answers what the other end asks, one call after the other, in
    a thread of its own; what it raises is told. Those that are `urgent` have another thread, and do not wait for those
    that take long. `calls` is the union of structs that may be asked here. `on_lost` hears of the link's end,
    `on_report` of the other end's reports, in the link's thread; without it, none may come."""

    def __init__(
        self, calls: Any, serve: Callable[[Any], msgspec.Struct], on_lost: Callable[[NetworkError], None], name: str,
        on_report: Callable[[Report], None] | None = None, urgent: tuple[type[msgspec.Struct], ...] = (),
    ) -> None:  # fmt: skip
        self._decoder = msgspec.msgpack.Decoder(calls) if calls is not None else None
        self._serve = serve
        self._on_lost = on_lost
        self._on_report = on_report
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"vrm-calls-{name}")
        self._urgent = urgent
        self._beside = ThreadPoolExecutor(1, thread_name_prefix=f"vrm-calls-{name}-urgent")
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[bytes]] = {}
        self._number = 0
        self._error: NetworkError | None = None
        self._link: Link | None = None

    def attach(self, link: Link) -> None:
        """The link that this is an end of, before it starts."""
        self._link = link

    def call(self, request: msgspec.Struct, answer: type[A], timeout_s: float | None = CALL_S) -> A:
        """Ask, and wait for the answer. Raises what the other end raised, and `LinkLostError`."""
        assert self._link is not None
        future: Future[bytes] = Future()
        with self._lock:
            if self._error is not None:
                raise self._error
            self._number = number = self._number + 1
            self._waiting[number] = future
        try:
            self._link.send(Opcode.CALL, [msgspec.msgpack.encode(request)], step=number)
            data = future.result(timeout_s)
        except (FutureTimeoutError, TimeoutError) as error:
            name = type(request).__name__
            raise LinkLostError(f"{self._link.name}: no answer to {name} within {timeout_s} s") from error
        finally:
            with self._lock:
                self._waiting.pop(number, None)
        try:
            return msgspec.msgpack.decode(data, type=answer)
        except UNREADABLE as error:
            raise ProtocolError(f"{self._link.name}: an answer cannot be read: {error}") from error

    def close(self) -> None:
        """The link has been closed. Waits for calls that are being served."""
        for pool in (self._pool, self._beside):
            pool.shutdown(cancel_futures=True)

    # -- the link's thread ------------------------------------------------------------------------------------------

    def buffer_for(self, header: Header) -> memoryview | None:
        """See `LinkHandler`."""
        reports = header.opcode is Opcode.REPORT and self._on_report is not None
        if not reports and header.opcode not in (Opcode.CALL, Opcode.ANSWER):
            raise ProtocolError(f"{header.opcode.name} is not taken here")
        return None

    def received(self, header: Header, payload: memoryview) -> bool:
        if header.opcode is Opcode.ANSWER:
            with self._lock:
                future = self._waiting.pop(header.step, None)
            if future is not None:  # else nobody waits any more
                _resolve(future, bytes(payload), self._link.name if self._link is not None else "")
            return True
        if header.opcode is Opcode.REPORT:
            self._reported(payload)
            return True
        if self._decoder is None:
            raise ProtocolError("nothing may be asked here")
        try:
            request = self._decoder.decode(payload)
        except UNREADABLE as error:
            raise ProtocolError(f"a call cannot be read: {error}") from error
        pool = self._beside if isinstance(request, self._urgent) else self._pool
        pool.submit(self._answer, header.step, request)
        return True

    def _reported(self, payload: memoryview) -> None:
        assert self._on_report is not None
        try:
            self._on_report(msgspec.msgpack.decode(payload, type=Report))
        except UNREADABLE as error:
            raise ProtocolError(f"a report cannot be read: {error}") from error

    def lost(self, error: NetworkError) -> None:
        with self._lock:
            self._error = error
            waiting, self._waiting = list(self._waiting.values()), {}
        for future in waiting:
            future.set_exception(error)
        self._on_lost(error)

    def _answer(self, number: int, request: Any) -> None:
        assert self._link is not None
        try:
            data = _OK + msgspec.msgpack.encode(self._serve(request))
        except Exception as error:
            logger.debug("a call failed", call=type(request).__name__, exc_info=error)
            data = _FAILED + msgspec.msgpack.encode(fault_of(error))
        try:
            self._link.send(Opcode.ANSWER, [data], step=number)
        except LinkLostError:
            logger.debug("whoever asked has gone", call=type(request).__name__)


_OK, _FAILED = b"\0", b"\1"


def _resolve(future: Future[bytes], data: bytes, node: str) -> None:
    if data[:1] == _OK:
        future.set_result(data[1:])
        return
    try:
        fault = msgspec.msgpack.decode(data[1:], type=Fault)
    except UNREADABLE as error:
        future.set_exception(ProtocolError(f"{node}: a fault cannot be read: {error}"))
        return
    future.set_exception(raised_by(fault, node))
