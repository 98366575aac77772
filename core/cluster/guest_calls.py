"""The borrower's end of a `guests` link: pages of stages here that devices of another machine hold, and the attention
that is done there."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from core.cluster.block_wire import ANSWER_BYTES, read_answer
from core.cluster.failures import Failure, decode_failure, error_of
from core.cluster.guest_wire import Pages, pages_head, query_head, site_tables
from core.cluster.tensors import buffer_for, payload_of
from core.devices import Device, machine_of
from core.errors import DeviceLostError, LinkLostError, NetworkError, PageMoveError, ProtocolError
from core.execution.attention.metadata import AttentionSpec, Site
from core.models.architecture import KVShape
from core.network.frames import Header, Opcode
from core.network.link import Link

ANSWER_S = 30.0
"""That an answer may take. Whoever is gone is noticed long before."""

STALE = "what was asked for belongs to an epoch that is over"

Answer = torch.Tensor | memoryview | Failure
_NUMBERS = itertools.count(1)


@dataclass(slots=True)
class _Asked:
    """What may come: a tensor of this `shape`, or up to `most_bytes` bytes; and what has."""

    shape: tuple[int, ...] | None
    most_bytes: int
    tensor: torch.Tensor | None = None
    answer: Answer | None = None


class GuestCalls:
    """A `LinkHandler`; `on_lost` hears of the link's end. `ask` is for any thread."""

    def __init__(self, on_lost: Callable[[NetworkError], None]) -> None:
        self._on_lost = on_lost
        self._changed = threading.Condition()
        self._asked: dict[int, _Asked] = {}
        self._number = 0
        self._error: NetworkError | None = None
        self._link: Link | None = None

    def attach(self, link: Link) -> None:
        """The link that this is an end of, before it starts."""
        self._link = link

    @property
    def link(self) -> Link:
        assert self._link is not None
        return self._link

    @property
    def epoch(self) -> int:
        """Of the cluster, as this machine has heard."""
        return self.link.epoch

    def count(self, *, sent: int = 0, received: int = 0) -> None:
        """Blocks that have been moved."""
        with self._changed:
            self.link.stats.sent_blocks += sent
            self.link.stats.received_blocks += received

    def begin_epoch(self, epoch: int) -> None:
        """Whoever waits does so for a step that has failed."""
        with self._changed:
            self.link.epoch = epoch
            self._asked.clear()
            self._changed.notify_all()
        self.link.wake()

    def ask(
        self, send: Callable[[Link, int], None], shape: tuple[int, ...] | None = None, most_bytes: int = 0
    ) -> torch.Tensor | memoryview:
        """Send something with a number, and wait for what answers it: fp32 of this `shape`, or up to so many bytes.
        Raises `LinkLostError`, and what was raised there."""
        asked = _Asked(shape, most_bytes)
        with self._changed:
            if self._error is not None:
                raise LinkLostError(self._error.message) from self._error
            self._number = number = self._number + 1
            self._asked[number] = asked
        try:
            send(self.link, number)
            self.link.wait_for(lambda: self._is_over(number, asked), self._changed, ANSWER_S)
        finally:
            with self._changed:
                is_stale = self._asked.pop(number, None) is None
                error = self._error
        if asked.answer is None:
            if error is not None:
                raise LinkLostError(error.message) from error
            raise LinkLostError(STALE if is_stale else f"{self.link.name}: no answer within {ANSWER_S:g} s")
        if isinstance(asked.answer, Failure):
            raise error_of(asked.answer)
        return asked.answer

    def _is_over(self, number: int, asked: _Asked) -> bool:
        return asked.answer is not None or self._error is not None or number not in self._asked

    # -- the link's thread, or whoever waits ------------------------------------------------------------------------

    def buffer_for(self, header: Header) -> memoryview | None:
        """See `LinkHandler`."""
        if header.opcode not in (Opcode.PARTIAL, Opcode.KV_ANSWER, Opcode.FAILED):
            raise ProtocolError(f"{header.opcode.name} is not taken here")
        asked = self._asked.get(header.step)
        if asked is None or header.opcode is Opcode.FAILED:
            return None  # nobody waits for it any more
        if header.opcode is Opcode.KV_ANSWER:
            if asked.shape is not None or header.nbytes > ANSWER_BYTES + asked.most_bytes:
                raise ProtocolError(f"KV_ANSWER of {header.nbytes} bytes, where {asked.most_bytes} are the most")
            return None
        if header.dtype != "float32" or header.shape != asked.shape:
            raise ProtocolError(f"PARTIAL of {header.dtype} {list(header.shape)}, where {asked.shape} was asked for")
        asked.tensor, buffer = buffer_for(header)
        return buffer

    def received(self, header: Header, payload: memoryview) -> bool:
        """See `LinkHandler`."""
        answer: Answer | None
        if header.opcode is Opcode.FAILED:
            answer = decode_failure(payload)
        elif header.opcode is Opcode.KV_ANSWER:
            answer = read_answer(payload)
            if answer is None:
                answer = Failure("pages", "pages are not there", "")
        else:
            answer = None
        with self._changed:
            asked = self._asked.get(header.step)
            if asked is not None:
                asked.answer = asked.tensor if answer is None else answer
                self._changed.notify_all()
        return True

    def lost(self, error: NetworkError) -> None:
        """See `LinkHandler`."""
        with self._changed:
            self._error = error
            self._changed.notify_all()
        self._on_lost(error)


class FarDevice:
    """A device of another machine that lends to one stage here, as guest number `guest` there: a `FarSite`. `shapes`
    are those of the stage's layers, whose pages hold `block_size` tokens of `dtype`."""

    def __init__(
        self, calls: GuestCalls, guest: int, name: str, shapes: Mapping[int, KVShape], block_size: int,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self._calls = calls
        self._guest = guest
        self._site = next(_NUMBERS) & 0xFFFFFFFF
        self._shapes = shapes
        self._layer_bytes = {
            layer: block_size * shape.bytes_per_token(dtype.itemsize) for layer, shape in shapes.items()
        }
        self._told: Site | None = None
        self._epoch = calls.epoch
        self._device = Device(name, -1, "cpu", "cpu", 0, node=machine_of(name))

    @property
    def device(self) -> Device:
        return self._device

    @property
    def is_over(self) -> bool:
        """Whether nothing can be asked of it any more."""
        return self._calls.link.error is not None or self._calls.epoch != self._epoch

    def pack(self, region_id: int, pages: Sequence[int], layers: Sequence[int]) -> torch.Tensor:
        """Have pages sent, uint8 `[n, bytes]`."""
        head = pages_head(Pages(region_id, tuple(pages), tuple(layers)))
        row_bytes = sum(self._layer_bytes[layer] for layer in layers or self._layer_bytes)
        data = self._ask(
            lambda link, number: link.send(Opcode.KV_WANTED, [head], step=number, layer=self._guest),
            most_bytes=len(pages) * row_bytes,
        )
        assert isinstance(data, memoryview)
        if len(data) != len(pages) * row_bytes:
            raise PageMoveError(f"{self._device.name}: {len(data)} bytes of {len(pages)} pages have come")
        self._calls.count(received=len(pages))
        return torch.frombuffer(data, dtype=torch.uint8).view(len(pages), -1)

    def unpack(self, region_id: int, pages: Sequence[int], data: torch.Tensor, layers: Sequence[int]) -> None:
        """Send pages, and wait until they are there."""
        head, (raw, *_) = pages_head(Pages(region_id, tuple(pages), tuple(layers))), payload_of(data)
        self._ask(lambda link, number: link.send(Opcode.KV_PAGES, [head, raw], step=number, layer=self._guest))
        self._calls.count(sent=len(pages))

    def attend(self, layer: int, query: torch.Tensor, site: Site, spec: AttentionSpec) -> torch.Tensor:
        """See `FarSite`."""
        rows = query.contiguous()
        head, (raw, *_) = query_head(self._site, layer, rows, spec), payload_of(rows)
        shape = (*query.shape[:2], self._shapes[layer].value_dim + 1)

        def send(link: Link, number: int) -> None:
            if self._told is not site:
                link.send(Opcode.SITE, [site_tables(site.regions)], step=self._site, layer=self._guest)
                self._told = site
            link.send(Opcode.QUERY, [head, raw], step=number, layer=self._guest)

        found = self._ask(send, shape)
        assert isinstance(found, torch.Tensor)
        return found

    def _ask(
        self, send: Callable[[Link, int], None], shape: tuple[int, ...] | None = None, most_bytes: int = 0
    ) -> torch.Tensor | memoryview:
        """A link that has ended is a device that is gone. In a new epoch, the stage's steps have failed elsewhere."""
        try:
            if self._calls.epoch != self._epoch:
                raise LinkLostError(STALE)
            return self._calls.ask(send, shape, most_bytes)
        except NetworkError as error:
            name = self._device.name
            raise DeviceLostError(f"{name}: {error.message}", device=name) from error
