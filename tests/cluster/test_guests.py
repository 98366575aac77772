"""Both ends of a `guests` link: pages go there and back, attention is as it is here, and what is wrong is refused."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from steering import until

from core.cluster.guest_calls import STALE, FarDevice, GuestCalls
from core.cluster.guest_wire import Pages, Query, pages_head, query_head, read_site, site_tables
from core.cluster.guests import MAX_SITES, GuestForm, Guests, GuestsEnd
from core.devices import Device, DeviceBudget
from core.devices.device import DeviceSpeed
from core.emulation import GuestTime
from core.errors import (
    DeviceLostError,
    InvalidRequestError,
    NetworkError,
    OutOfDeviceMemoryError,
    PageMoveError,
    ProtocolError,
    StepFailedError,
)
from core.execution.attention.metadata import AttentionSpec, Site, build_site_batch
from core.execution.attention.torch_paged import TorchPagedAttention
from core.models.architecture import KVShape
from core.network.frames import Opcode
from core.network.link import Link
from core.transfer import TransferManager

BLOCK, PAGES, GUEST, REGION = 4, 6, 7, 2
FORM = GuestForm({3: KVShape(2, 8, 16), 5: KVShape(2, 8, 16)}, BLOCK, torch.float32)
LENDER = Device("cpu#1", 1, "cpu", "cpu", 1 << 20)
SPEC = AttentionSpec(0.3)


class Pair:
    """A guest in one region, and the stage that it is of."""

    def __init__(self) -> None:
        self.guests, self.budget, self.lost = Guests(), DeviceBudget(LENDER), list[NetworkError]()
        self.backend = TorchPagedAttention()
        self.add(REGION)
        ours, theirs = socket.socketpair()
        self.calls = GuestCalls(self.lost.append)
        self.end = GuestsEnd(self.guests, self.lost.append)
        self.here = Link(ours, 1, 2, self.calls, name="lender")
        self.there = Link(theirs, 2, 1, self.end, name="borrower")
        for link, handler in ((self.here, self.calls), (self.there, self.end)):
            handler.attach(link)
            link.start()
        self.far = FarDevice(self.calls, GUEST, "desk/cpu#1", FORM.shapes, BLOCK, torch.float32)

    def add(self, region: int, form: GuestForm = FORM, pages: int = PAGES) -> None:
        self.guests.add(GUEST, region, pages, LENDER, self.budget, form, lambda device: self.backend, TransferManager())

    def close(self) -> None:
        self.here.close()
        self.there.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def pages_of(count: int, layers: int = 2) -> torch.Tensor:
    return torch.randn(count, layers * BLOCK * 2 * 24).view(torch.uint8)


def site(region: int = REGION, page: int = 4) -> Site:
    """One sequence with two rows, which see five and six keys in pages 1 and `page`."""
    ints = lambda *numbers: torch.tensor(numbers, dtype=torch.int32).numpy()  # noqa: E731
    batch = build_site_batch([ints(1, page)], [ints(0, 1)], [6], [2], ints(4, 5), BLOCK, torch.device("cpu"))
    return Site("desk/cpu#1", torch.arange(2), ((region, batch),))


def test_pages_go_there_and_back(pair: Pair) -> None:
    data = pages_of(3)
    pair.far.unpack(REGION, [4, 0, 2], data, ())
    assert torch.equal(pair.far.pack(REGION, [2, 4], ()), data[[2, 0]])
    half = data.shape[1] // 2
    assert torch.equal(pair.far.pack(REGION, [4], (5,)), data[:1, half:]), "of one layer"
    pair.far.unpack(REGION, [0], data[:1, half:], (3,))
    assert torch.equal(pair.far.pack(REGION, [0], ()), torch.cat((data[:1, half:], data[1:2, half:]), dim=1))
    assert (pair.here.stats.sent_blocks, pair.here.stats.received_blocks) == (4, 4)


def test_attention_there_is_attention_here(pair: Pair) -> None:
    pair.far.unpack(REGION, range(PAGES), pages_of(PAGES), ())
    told, query = site(), torch.randn(2, 4, 8)
    guest = pair.guests.get(GUEST)
    assert guest is not None
    for layer in FORM.shapes:
        both = pair.far.attend(layer, query, told, SPEC)
        out, lse = pair.backend.attend_partial(query, *guest.kv.layer(layer, REGION), told.regions[0][1], SPEC)
        assert torch.equal(both, torch.cat((out, lse[..., None]), dim=-1))
    assert pair.here.stats.sent_queries == pair.there.stats.received_queries == 2
    assert pair.there.stats.received_frames == 4, "the step is told once: pages, the step, and two layers"


def test_an_emulated_lender_takes_as_long_as_its_card_would() -> None:
    device, guests, spent = replace(LENDER, kind="sim", speed=DeviceSpeed(1e6, 1e12)), Guests(), GuestTime()
    guests.add(
        GUEST, REGION, PAGES, device, DeviceBudget(device), FORM, lambda device: TorchPagedAttention(),
        TransferManager(), spent.pace,
    )  # fmt: skip
    guest = guests.get(GUEST)
    assert guest is not None
    guest.tell(1, read_site(memoryview(bytearray(site_tables(site().regions)))))
    began_s = time.perf_counter()
    guest.attend(Query(1, 3, SPEC, torch.randn(2, 4, 8)))
    reading_s = 6 * 2 * 24 * 4 / 1e6
    assert time.perf_counter() - began_s >= reading_s, "six keys of 192 bytes"
    assert spent.take("cpu#1") == pytest.approx(reading_s), "by which its own work is late"


def test_what_is_not_there_fails_and_the_link_goes_on(pair: Pair) -> None:
    query = torch.randn(2, 4, 8)
    for wrong in (
        lambda: pair.far.attend(3, query, site(region=9), SPEC),
        lambda: pair.far.attend(3, query, site(page=PAGES), SPEC),
        lambda: pair.far.attend(3, torch.randn(3, 4, 8), site(), SPEC),
        lambda: pair.far.attend(3, torch.randn(2, 3, 8), site(), SPEC),
        lambda: pair.far.attend(3, torch.randn(2, 4, 4), site(), SPEC),
        lambda: pair.far.pack(REGION, [PAGES], ()),
        lambda: pair.far.pack(0, [0], ()),
        lambda: pair.far.unpack(REGION, [0], pages_of(2), ()),
    ):
        with pytest.raises(StepFailedError):
            wrong()
    pair.far.attend(3, query, site(), SPEC)
    pair.guests.drop(GUEST, REGION)
    assert pair.budget.used_by_purpose() == {} and len(pair.guests) == 0
    with pytest.raises(StepFailedError, match="guest 7 is not there"):
        pair.far.attend(3, query, site(), SPEC)
    assert not pair.lost


def test_a_guest_has_one_form_and_no_more_than_there_is(pair: Pair) -> None:
    with pytest.raises(InvalidRequestError, match="other layers"):
        pair.add(3, GuestForm({3: KVShape(2, 8, 16)}, BLOCK, torch.float32))
    with pytest.raises(OutOfDeviceMemoryError):
        pair.add(3, pages=1 << 20)
    before = pair.budget.used_by_purpose()
    pair.add(REGION)  # whoever asked for it has not heard of it
    assert pair.budget.used_by_purpose() == before
    pair.guests.drop(GUEST, 99)
    pair.guests.close()
    assert pair.budget.used_by_purpose() == {}


def test_a_lender_that_is_gone_is_a_device_that_is_lost(pair: Pair) -> None:
    asking = threading.Event()
    attend = pair.backend.attend_partial

    def gone(*given: Any) -> Any:
        asking.set()
        pair.there.abort("the cable is out")
        return attend(*given)

    pair.backend.attend_partial = gone  # type: ignore[method-assign]
    for _ in range(2):  # while it is asked, and afterwards
        with pytest.raises(DeviceLostError, match="desk/cpu#1") as lost:
            pair.far.attend(3, torch.randn(2, 4, 8), site(), SPEC)
        assert lost.value.device == "desk/cpu#1"
    assert asking.is_set() and pair.far.is_over


def test_nobody_waits_for_what_a_new_epoch_makes_stale(pair: Pair) -> None:
    """The lender drops what was asked before, and whoever asked goes on."""
    pair.there.epoch = 1
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            pair.far.attend(3, torch.randn(2, 4, 8), site(), SPEC)
        except DeviceLostError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: pair.there.stats.stale == 2, "the step and its query are dropped")
    pair.calls.begin_epoch(1)
    thread.join()
    assert [STALE in str(error) for error in errors] == [True] and not pair.lost
    with pytest.raises(DeviceLostError, match="epoch that is over"):
        pair.far.pack(REGION, [0], ())
    again = FarDevice(pair.calls, GUEST, "desk/cpu#1", FORM.shapes, BLOCK, torch.float32)
    again.attend(3, torch.randn(2, 4, 8), site(), SPEC)


def tell(pair: Pair, *frames: tuple[Opcode, list[bytes]]) -> None:
    for opcode, payload in frames:
        pair.here.send(opcode, payload, step=1, layer=GUEST)


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        ((Opcode.QUERY, [b"?"]), "QUERY in 1 bytes"),
        ((Opcode.SITE, [b"?"]), "SITE in 1 bytes"),
        ((Opcode.KV_PAGES, [bytes(8)]), "0 pages"),
        ((Opcode.KV_WANTED, [pages_head(Pages(REGION, (0,), ())), b"more"]), "more than what is wanted"),
        ((Opcode.STEP, []), "STEP is not taken here"),
        ((Opcode.QUERY, [query_head(1, 3, torch.zeros(1, 2, 8), SPEC)]), "rows of other sizes"),
    ],
)
def test_what_cannot_be_read_ends_the_link(pair: Pair, frame: tuple[Opcode, list[bytes]], said: str) -> None:
    tell(pair, frame)
    until(lambda: pair.there.error is not None, "the link has ended")
    assert isinstance(pair.there.error, ProtocolError) and said in pair.there.error.message


def test_a_stage_has_only_so_many_sites(pair: Pair) -> None:
    query, told = torch.randn(2, 4, 8), site()
    for _ in range(MAX_SITES):
        far = FarDevice(pair.calls, GUEST, "desk/cpu#1", FORM.shapes, BLOCK, torch.float32)
        far.attend(3, query, told, SPEC)
    with pytest.raises(DeviceLostError):
        pair.far.attend(3, query, told, SPEC)


Answer = Callable[[Link, int], None]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda link, number: link.send(Opcode.PARTIAL, [bytes(4)], step=number, dtype="float32", shape=(1, 1, 1)), 1),
        (lambda link, number: link.send(Opcode.PARTIAL, [bytes(17 * 32)], step=number), 1),
        (lambda link, number: link.send(Opcode.KV_ANSWER, [b"\1\0\0\0"], step=number), 1),
        (lambda link, number: link.send(Opcode.RESULTS, [], step=number), 1),
        (lambda link, number: link.send(Opcode.FAILED, [b"?"], step=number), 1),
    ],
    ids=["shape", "bytes", "pages", "opcode", "failure"],
)
def test_an_answer_that_was_not_asked_for_ends_the_link(
    pair: Pair, answer: Answer, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: GuestsEnd, header: Any, payload: memoryview) -> bool:
        if header.opcode is Opcode.QUERY:
            with contextlib.suppress(NetworkError):
                answer(pair.there, header.step)
        return True

    monkeypatch.setattr(GuestsEnd, "received", wrong)
    with pytest.raises(DeviceLostError):
        pair.far.attend(3, torch.randn(2, 4, 8), site(), SPEC)
    assert isinstance(pair.here.error, ProtocolError)


def test_pages_that_are_fewer_than_asked_for_are_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = pair.guests.get(GUEST)
    assert guest is not None
    monkeypatch.setattr(type(guest), "read", lambda self, wanted: torch.zeros(1, 8, dtype=torch.uint8))
    with pytest.raises(PageMoveError, match="8 bytes of 1 pages"):
        pair.far.pack(REGION, [0], ())
