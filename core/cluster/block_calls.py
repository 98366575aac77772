"""The master's end of a worker's `blocks` link: has the worker keep blocks of KV, and asks for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from core.cluster.block_wire import ANSWER_BYTES, BlockRef, read_answer, send_pages, send_wanted
from core.errors import LinkLostError, NetworkError, ProtocolError
from core.network.frames import Header, Opcode
from core.network.link import Link

ANSWER_S = 30.0
"""That an answer may take. Whoever is gone is noticed long before."""


class BlockCalls:
    """A `LinkHandler`; `on_lost` hears of the link's end. Its other methods are for any thread, and wait for the
    answer: they raise `LinkLostError`."""

    def __init__(self, on_lost: Callable[[NetworkError], None]) -> None:
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[Future[memoryview | None], int]] = {}
        self._number = 0
        self._error: NetworkError | None = None
        self._link: Link | None = None

    def attach(self, link: Link) -> None:
        """The link that this is an end of, before it starts."""
        self._link = link

    def put(self, memory: int, ref: BlockRef, data: memoryview) -> bool:
        """Have a memory keep a copy; whether it does."""
        kept = self._ask(lambda link, number: send_pages(link, memory, number, ref, data), 0) is not None
        self._count(sent=1)
        return kept

    def get(self, memory: int, ref: BlockRef, most_bytes: int) -> memoryview | None:
        """A block of at most so many bytes; None if it is not there."""
        data = self._ask(lambda link, number: send_wanted(link, memory, number, ref), most_bytes)
        self._count(received=data is not None)
        return data

    def drop(self, memory: int, ref: BlockRef) -> None:
        """A block is wanted no more."""
        gone = BlockRef(ref.block, ref.slot, lets_go=True)
        self._ask(lambda link, number: send_wanted(link, memory, number, gone), 0)

    def _count(self, *, sent: int = 0, received: int = 0) -> None:
        assert self._link is not None
        with self._lock:
            self._link.stats.sent_blocks += sent
            self._link.stats.received_blocks += received

    def _ask(self, send: Callable[[Link, int], None], most_bytes: int) -> memoryview | None:
        assert self._link is not None
        future: Future[memoryview | None] = Future()
        with self._lock:
            if self._error is not None:
                raise LinkLostError(self._error.message) from self._error
            self._number = number = self._number + 1
            self._waiting[number] = future, most_bytes  # until it is answered, however long that takes
        try:
            send(self._link, number)
            return future.result(ANSWER_S)
        except (FutureTimeoutError, TimeoutError) as error:
            raise LinkLostError(f"{self._link.name}: nothing was heard of a block for {ANSWER_S:g} s") from error

    # -- the link's thread ------------------------------------------------------------------------------------------

    def buffer_for(self, header: Header) -> memoryview | None:
        """See `LinkHandler`."""
        if header.opcode is not Opcode.KV_ANSWER:
            raise ProtocolError(f"{header.opcode.name} is not taken here")
        with self._lock:
            waiting = self._waiting.get(header.step)
        if waiting is None:
            raise ProtocolError(f"KV_ANSWER to {header.step}, which was not asked")
        if header.nbytes > ANSWER_BYTES + waiting[1]:
            raise ProtocolError(f"KV_ANSWER of {header.nbytes} bytes, where {waiting[1]} are the most")
        return None

    def received(self, header: Header, payload: memoryview) -> bool:
        """See `LinkHandler`."""
        answer = read_answer(payload)
        with self._lock:
            future, _ = self._waiting.pop(header.step)
        future.set_result(answer)
        return True

    def lost(self, error: NetworkError) -> None:
        """See `LinkHandler`."""
        with self._lock:
            self._error = error
            waiting, self._waiting = list(self._waiting.values()), {}
        for future, _ in waiting:
            future.set_exception(LinkLostError(error.message))
        self._on_lost(error)
