"""What this machine's devices hold for stages of other machines, and the attention that they do for them.

A *guest* is a stage's pages here. It has the number by which the master knows it, and regions like the stage's own
pages. The stage reads and writes pages over a `guests` link, and asks for attention over them. It is answered in the
thread that reads the link, which waits for nothing else: so machines that attend for each other in a circle do not
wait for each other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from core.cluster.block_wire import send_answer
from core.cluster.failures import encode_failure, failure_of
from core.cluster.guest_wire import Pages, Query, SiteTables, read_pages, read_query, read_site
from core.cluster.tensors import payload_of
from core.devices import Device, DeviceBudget, host_device
from core.errors import InvalidRequestError, NetworkError, NotFoundError, ProtocolError
from core.execution.attention.merge import combine
from core.execution.attention.metadata import SiteBatch, build_site_batch
from core.execution.attention.triton_variants import AttentionKind, Heads
from core.execution.site_attention import BackendOf
from core.kv_cache.page_ops import LOCAL
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.logs import get_logger
from core.models.architecture import KVShape
from core.network.frames import Header, Opcode
from core.network.link import Link
from core.transfer import TransferManager

logger = get_logger(__name__)

MAX_SITES = 64
"""Of one guest: a stage has one for each device that lends to it."""

Pace = Callable[[Device, int, float], None]
"""Told of bytes of KV that a device has read since then (of `time.perf_counter`); returns when it would have."""


@dataclass(frozen=True, slots=True)
class GuestForm:
    """What a guest's pages are: of which layers, and how many tokens each has."""

    shapes: Mapping[int, KVShape]
    block_size: int
    dtype: torch.dtype

    def kinds(self, heads: int, *, softcap: bool) -> frozenset[AttentionKind]:
        """What attention there is asked for, by stages of so many query heads."""
        return frozenset(
            AttentionKind(
                Heads(each.num_kv_heads, max(1, heads // each.num_kv_heads), each.key_dim, each.value_dim, self.dtype),
                self.block_size, has_window=False, has_softcap=softcap, sinks=None,
            )
            for each in self.shapes.values()
        )  # fmt: skip


@dataclass(slots=True)
class _Told:
    """A step's tables, on the device that has the regions."""

    device: Device
    query_start: np.ndarray
    regions: tuple[tuple[int, SiteBatch], ...]


@dataclass(eq=False, slots=True)
class Guest:
    """See the module. `sites` are the steps that it was last told of."""

    form: GuestForm
    kv: PagedKVCache
    backend_of: BackendOf
    transfer: TransferManager
    pace: Pace
    sites: dict[int, _Told] = field(default_factory=dict)

    def read(self, wanted: Pages) -> torch.Tensor:
        """Bytes of pages, uint8 `[n, bytes]` in main memory. Raises `NotFoundError`."""
        device, layers = self._check(wanted)
        return self.transfer.send(self.kv.pack(wanted.region, wanted.pages, layers), device, host_device())

    def write(self, wanted: Pages, data: memoryview) -> None:
        """Raises `NotFoundError` for pages that are not there, `InvalidRequestError` for other bytes than theirs."""
        device, layers = self._check(wanted)
        if len(data) != len(wanted.pages) * sum(self.kv.layer_bytes[layer] for layer in layers):
            raise InvalidRequestError(f"{len(data)} bytes are not those of {len(wanted.pages)} pages")
        packed = torch.frombuffer(data, dtype=torch.uint8).view(len(wanted.pages), -1)
        self.kv.unpack(wanted.region, wanted.pages, self.transfer.send(packed, host_device(), device), layers)

    def _check(self, wanted: Pages) -> tuple[Device, tuple[int, ...]]:
        region = self.kv.regions.get(wanted.region) if wanted.region != LOCAL else None
        layers = wanted.layers or tuple(self.kv.layer_bytes)
        if region is None or max(wanted.pages) >= region.num_pages or not set(layers) <= set(self.kv.layer_bytes):
            raise NotFoundError(f"region {wanted.region} has no such pages")
        return region.device, layers

    def tell(self, number: int, tables: SiteTables) -> None:
        """Of a step. Raises `NotFoundError` for pages that are not there, `ProtocolError` for what is no step's."""
        if number not in self.sites and len(self.sites) >= MAX_SITES:
            raise ProtocolError(f"more than {MAX_SITES} sites of one guest")
        if tables.block_size != self.kv.block_size:
            raise ProtocolError(f"pages of {tables.block_size} tokens, where there are {self.kv.block_size}")
        here = self.kv.regions
        found = [here.get(each.region) if each.region != LOCAL else None for each in tables.regions]
        device = found[0].device if found[0] is not None else None
        for each, region in zip(tables.regions, found, strict=True):
            if region is None or device is None or region.device.name != device.name:
                raise NotFoundError(f"region {each.region} is not there, or is elsewhere")
            if each.pages.max(initial=0) >= region.num_pages:
                raise NotFoundError(f"region {each.region} has no such pages")
        assert device is not None
        where = torch.device(device.torch_device)
        lengths = np.diff(tables.query_start).tolist()
        batches = []
        for each in tables.regions:
            used = (-(-each.seq_lens // tables.block_size)).tolist()
            batch = build_site_batch(
                [row[:count] for row, count in zip(each.pages, used, strict=True)],
                [row[:count] for row, count in zip(each.block_index, used, strict=True)],
                each.seq_lens.tolist(), lengths, tables.query_at, tables.block_size, where,
            )  # fmt: skip
            batches.append((each.region, batch))
        self.sites[number] = _Told(device, tables.query_start, tuple(batches))

    def attend(self, query: Query) -> torch.Tensor:
        """Fp32 `[R, Hq, Dv + 1]` in main memory: what the keys here give the rows, and the log of their sum. Raises
        `NotFoundError` for a step that was not told, `InvalidRequestError` for rows that are not its."""
        told, shape = self.sites.get(query.site), self.form.shapes.get(query.layer)
        if told is None or shape is None:
            raise NotFoundError(f"layer {query.layer} of site {query.site} is not there")
        rows, heads, dim = query.rows.shape
        if rows != told.query_start[-1] or dim != shape.key_dim or heads % shape.num_kv_heads:
            raise InvalidRequestError(f"{rows} rows of {heads} heads of {dim} are not those of the step")
        began_s = time.perf_counter()
        there = self.transfer.send(query.rows, host_device(), told.device)
        backend = self.backend_of(told.device)
        out, lse = combine(
            [
                backend.attend_partial(there, *self.kv.layer(query.layer, region), batch, query.spec)
                for region, batch in told.regions
            ]
        )
        self.pace(told.device, self._read_bytes(told, query.layer), began_s)
        return self.transfer.send(torch.cat((out, lse[..., None]), dim=-1), told.device, host_device())

    def _read_bytes(self, told: _Told, layer: int) -> int:
        keys = sum(sum(batch.host_seq_lens) for _, batch in told.regions)
        return keys * self.kv.layer_bytes[layer] // self.kv.block_size


def _no_pace(device: Device, nbytes: int, since_s: float) -> None: ...


class Guests:
    """All guests of this process, by number. Regions come and go in one thread, links read in others."""

    def __init__(self) -> None:
        self._guests: dict[int, Guest] = {}
        self._lock = threading.Lock()

    def get(self, number: int) -> Guest | None:
        return self._guests.get(number)

    def __len__(self) -> int:
        return len(self._guests)

    def add(
        self, number: int, region: int, pages: int, device: Device, budget: DeviceBudget, form: GuestForm,
        backend_of: BackendOf, transfer: TransferManager, pace: Pace = _no_pace,
    ) -> None:  # fmt: skip
        """Memory for pages of a guest, which may be new. A region of this number goes. Raises `OutOfDeviceMemoryError`,
        with nothing kept, and `InvalidRequestError` if the guest is another one."""
        with self._lock:
            guest = self._guests.get(number)
            if guest is None:
                kv = PagedKVCache(form.shapes, 0, form.block_size, form.dtype, device, budget)
                guest = Guest(form, kv, backend_of, transfer, pace)
            elif guest.form != form:
                raise InvalidRequestError(f"guest {number} has other layers")
            if region in guest.kv.regions:
                guest.kv.drop_region(region)
            guest.kv.add_region(region, pages, device, budget)
            self._guests[number] = guest

    def drop(self, number: int, region: int) -> None:
        """Give a region back; the guest goes with its last one. What is not there is none any more."""
        with self._lock:
            guest = self._guests.get(number)
            if guest is None:
                return
            if region in guest.kv.regions:
                guest.kv.drop_region(region)
            if set(guest.kv.regions) == {LOCAL}:
                del self._guests[number]
                guest.kv.free()

    def devices(self) -> tuple[Device, ...]:
        """Those that hold something."""
        with self._lock:
            found = [region.device for guest in self._guests.values() for region in guest.kv.regions.values()]
        return tuple({device.name: device for device in found}.values())

    def close(self) -> None:
        """Give everything back."""
        with self._lock:
            guests, self._guests = list(self._guests.values()), {}
        for guest in guests:
            guest.kv.free()


class GuestsEnd:
    """The lender's end of a `guests` link: a `LinkHandler`. `on_lost` hears of its end."""

    def __init__(self, guests: Guests, on_lost: Callable[[NetworkError], None]) -> None:
        self._guests = guests
        self._on_lost = on_lost
        self._link: Link | None = None

    def attach(self, link: Link) -> None:
        """The link that this is an end of, before it starts."""
        self._link = link

    def buffer_for(self, header: Header) -> memoryview | None:
        """See `LinkHandler`."""
        if header.opcode not in _TAKES:
            raise ProtocolError(f"{header.opcode.name} is not taken here")
        return None

    def received(self, header: Header, payload: memoryview) -> bool:
        """See `LinkHandler`. Answers at once: this thread waits for nothing else."""
        assert self._link is not None
        with self._told_if_failed(self._link, header), torch.inference_mode():
            _TAKES[header.opcode](self, self._link, header, payload)
        return True

    def lost(self, error: NetworkError) -> None:
        """See `LinkHandler`."""
        self._on_lost(error)

    @contextmanager
    def _told_if_failed(self, link: Link, header: Header) -> Iterator[None]:
        """Whatever goes wrong with what is asked is the borrower's to know; what cannot be read ends the link."""
        try:
            yield
        except NetworkError:
            raise
        except Exception as error:  # noqa: BLE001  travels to whoever asked
            if header.opcode is Opcode.SITE:  # nobody waits for an answer; the queries that follow will fail
                logger.warning("a step's pages cannot be attended to", guest=header.layer, reason=repr(error))
                return
            link.send(Opcode.FAILED, [encode_failure(failure_of(error, ""))], step=header.step, layer=header.layer)

    def _guest(self, header: Header) -> Guest:
        guest = self._guests.get(header.layer)
        if guest is None:
            raise NotFoundError(f"guest {header.layer} is not there")
        return guest

    def _write(self, link: Link, header: Header, payload: memoryview) -> None:
        self._guest(header).write(*read_pages(payload))
        send_answer(link, header.layer, header.step, done=True)

    def _read(self, link: Link, header: Header, payload: memoryview) -> None:
        wanted, rest = read_pages(payload)
        if len(rest):
            raise ProtocolError("KV_WANTED with more than what is wanted")
        data = payload_of(self._guest(header).read(wanted))[0]
        send_answer(link, header.layer, header.step, done=True, data=data)

    def _tell(self, link: Link, header: Header, payload: memoryview) -> None:
        tables = read_site(payload)
        guest = self._guest(header)
        guest.sites.pop(header.step, None)  # if these cannot be used, queries must not find those of before
        guest.tell(header.step, tables)

    def _attend(self, link: Link, header: Header, payload: memoryview) -> None:
        query = read_query(payload)
        data, dtype, shape = payload_of(self._guest(header).attend(query))
        link.send(Opcode.PARTIAL, [data], step=header.step, layer=header.layer, dtype=dtype, shape=shape)


_TAKES = {
    Opcode.KV_PAGES: GuestsEnd._write,
    Opcode.KV_WANTED: GuestsEnd._read,
    Opcode.SITE: GuestsEnd._tell,
    Opcode.QUERY: GuestsEnd._attend,
}
