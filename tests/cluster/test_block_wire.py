"""Frames of a `blocks` link: what is sent arrives, and whatever else comes is refused before it harms."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steering import until

from core.cluster import block_calls
from core.cluster.block_calls import BlockCalls
from core.cluster.block_wire import (
    ANSWER_BYTES,
    HEAD_BYTES,
    BlockRef,
    read_answer,
    read_pages,
    read_wanted,
    send_answer,
    send_pages,
    send_wanted,
)
from core.cluster.kept_blocks import BlocksEnd, KeptBlocks, StageParts
from core.config import Settings
from core.devices import DeviceBudget, host_device
from core.errors import InvalidRequestError, LinkLostError, NetworkError, OutOfDeviceMemoryError, ProtocolError
from core.kv_cache.page_ops import LOCAL, PageLoad, PageSave
from core.network.frames import Header, Opcode
from core.network.link import Link

LENDS, PARTS, STAGE = 4096, 2, 7
PART_BYTES, SLOTS = 64, 3
REFS = st.builds(BlockRef, st.binary(min_size=16, max_size=16), st.integers(0, 2**32 - 1))


class Wire:
    """Stands for a link: what is sent over it."""

    def __init__(self) -> None:
        self.sent: list[tuple[Opcode, bytes, int, int]] = []

    def send(self, opcode: Opcode, payload: list[bytes], *, step: int, layer: int) -> None:
        self.sent.append((opcode, b"".join(map(bytes, payload)), step, layer))


def block(number: int) -> bytes:
    return number.to_bytes(16, "big")


def kept(lends: int = LENDS) -> KeptBlocks:
    """With memory 2 for whole blocks, and memory 7 for a stage's parts."""
    given = Settings.model_validate({"cluster": {"memory_bytes": lends}, "memory": {"host_bytes": 1000}})
    blocks = KeptBlocks(given, DeviceBudget(host_device(1 << 16)), has_cards=False)
    blocks.lend(PARTS)
    blocks.keep(STAGE, StageParts(), SLOTS, PART_BYTES, pin=False)
    return blocks


@given(REFS, st.binary(max_size=100), st.integers(0, 2**64 - 1), st.integers(0, 2**16 - 1), st.booleans())
def test_what_is_sent_arrives(ref: BlockRef, data: bytes, request: int, memory: int, done: bool) -> None:
    wire = Wire()
    send_pages(wire, memory, request, ref, data)  # type: ignore[arg-type]
    send_wanted(wire, memory, request, BlockRef(ref.block, ref.slot, lets_go=done))  # type: ignore[arg-type]
    send_answer(wire, memory, request, done=done, data=data if done else b"")  # type: ignore[arg-type]
    pages, wanted, answer = wire.sent
    assert {each[2:] for each in wire.sent} == {(request, memory)}
    assert read_pages(memoryview(pages[1])) == (ref, data)
    assert read_wanted(memoryview(wanted[1])) == BlockRef(ref.block, ref.slot, lets_go=done)
    assert read_answer(memoryview(answer[1])) == (data if done else None)


@settings(max_examples=300)
@given(st.binary(max_size=HEAD_BYTES + 20))
def test_garbage_is_read_or_refused(data: bytes) -> None:
    for read in (read_pages, read_wanted, read_answer):
        try:
            read(memoryview(data))
        except ProtocolError:
            continue
        assert read is not read_wanted or len(data) == HEAD_BYTES
        assert len(data) >= (HEAD_BYTES if read is read_pages else ANSWER_BYTES)


@pytest.mark.parametrize("at", [20, 21, 23])
def test_heads_that_say_more_than_there_is_to_say_are_refused(at: int) -> None:
    head = bytearray(HEAD_BYTES)
    head[at] = 2
    for read in (read_pages, read_wanted):
        with pytest.raises(ProtocolError):
            read(memoryview(bytes(head)))


FRAMES = st.lists(
    st.tuples(
        st.sampled_from([Opcode.KV_PAGES, Opcode.KV_WANTED]),
        st.sampled_from([PARTS, STAGE, 9]),
        st.one_of(
            st.binary(max_size=HEAD_BYTES + 8),
            st.builds(
                lambda number, slot, what, size: block(number) + slot.to_bytes(4, "little") + bytes((what, 0, 0, 0))
                + bytes(size),
                st.integers(0, 3), st.sampled_from([0, 1, 2, 3, 2**32 - 1]), st.sampled_from([0, 0, 0, 1, 2]),
                st.sampled_from([0, PART_BYTES, LENDS // 2, LENDS, LENDS + 1]),
            ),
        ),
    ),
    max_size=30,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(FRAMES)
def test_no_frame_has_a_worker_keep_more_than_it_lends(frames: list[tuple[Opcode, int, bytes]]) -> None:
    """Whatever comes is answered, or refused as no frame of ours."""
    blocks, wire = kept(), Wire()
    end = BlocksEnd(blocks.memories, lambda error: None)
    end.attach(wire)  # type: ignore[arg-type]
    for number, (opcode, memory, data) in enumerate(frames):
        header = Header(opcode, step=number, layer=memory, nbytes=len(data))
        before = len(wire.sent)
        try:
            assert end.buffer_for(header) is None
            assert end.received(header, memoryview(data))
        except ProtocolError:
            assert len(wire.sent) == before
        else:
            assert wire.sent[-1][0] is Opcode.KV_ANSWER and wire.sent[-1][2:] == (number, memory)
        assert 0 <= blocks.lent_bytes <= LENDS
    blocks.close()
    assert blocks.lent_bytes == 0 and not blocks.memories


def test_parts_are_found_by_slot_and_block_together() -> None:
    parts, budget = StageParts(), DeviceBudget(host_device(1 << 12))
    with pytest.raises(KeyError):
        parts.place(PageSave((LOCAL, 0), block(1), 0))
    parts.open(SLOTS, PART_BYTES, budget, pin=False)
    assert budget.used_by_purpose() == {"kv_tiers": SLOTS * PART_BYTES}
    with pytest.raises(InvalidRequestError):
        parts.open(SLOTS, PART_BYTES, budget, pin=False)
    parts.place(PageSave((LOCAL, 0), block(1), 2)).fill_(5)
    assert torch.equal(parts.place(PageLoad(block(1), (LOCAL, 0), 2)), torch.full((PART_BYTES,), 5, dtype=torch.uint8))
    for wrong in (
        PageLoad(block(2), (LOCAL, 0), 2),
        PageLoad(block(1), (LOCAL, 0), 1),
        PageLoad(block(1), (LOCAL, 0), -1),
    ):
        with pytest.raises(KeyError):
            parts.place(wrong)
    assert parts.get(BlockRef(block(1), 2)) == bytes([5]) * PART_BYTES
    assert parts.get(BlockRef(block(2), 2)) is None and parts.get(BlockRef(block(1), 1)) is None
    assert parts.put(BlockRef(block(2), 2), memoryview(bytes(PART_BYTES)))
    assert parts.get(BlockRef(block(1), 2)) is None
    assert not parts.put(BlockRef(block(2), SLOTS), memoryview(bytes(PART_BYTES)))
    assert not parts.put(BlockRef(block(2), 0), memoryview(bytes(PART_BYTES - 1)))
    parts.close()
    assert budget.used_bytes == 0


def test_numbers_are_given_once_and_memory_is_bounded() -> None:
    blocks = kept()
    with pytest.raises(InvalidRequestError):
        blocks.lend(STAGE)
    with pytest.raises(OutOfDeviceMemoryError):
        blocks.keep(11, StageParts(), 1 << 30, PART_BYTES, pin=False)
    assert 11 not in blocks.memories
    assert blocks.keeps_bytes == 1000
    blocks.close()


# -- over a link ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ends() -> Iterator[SimpleNamespace]:
    lost: list[NetworkError] = []
    blocks, calls = kept(), BlockCalls(lost.append)
    far = BlocksEnd(blocks.memories, lost.append)
    ours, theirs = socket.socketpair()
    near_link, far_link = Link(ours, 0, 1, calls, name="near"), Link(theirs, 1, 0, far, name="far")
    calls.attach(near_link)
    far.attach(far_link)
    for link in (near_link, far_link):
        link.start()
    yield SimpleNamespace(calls=calls, blocks=blocks, near=near_link, far=far_link, lost=lost)
    for link in (near_link, far_link):
        link.close()
    blocks.close()


def test_blocks_go_there_and_come_back(ends: SimpleNamespace) -> None:
    calls, data = ends.calls, bytes(range(200))
    assert calls.put(PARTS, BlockRef(block(1)), memoryview(data))
    assert calls.get(PARTS, BlockRef(block(1)), 200) == data
    assert calls.get(PARTS, BlockRef(block(2)), 200) is None
    assert calls.get(9, BlockRef(block(1)), 200) is None
    assert not calls.put(PARTS, BlockRef(block(3)), memoryview(bytes(LENDS - 100)))
    calls.drop(PARTS, BlockRef(block(1)))
    assert calls.get(PARTS, BlockRef(block(1)), 200) is None and ends.blocks.lent_bytes == 0
    assert calls.put(PARTS, BlockRef(block(3)), memoryview(bytes(LENDS)))
    assert not ends.lost


def test_what_is_larger_than_was_asked_for_ends_the_link(ends: SimpleNamespace) -> None:
    assert ends.calls.put(PARTS, BlockRef(block(1)), memoryview(bytes(300)))
    with pytest.raises(LinkLostError):
        ends.calls.get(PARTS, BlockRef(block(1)), 299)
    assert "where 299 are the most" in ends.lost[0].message
    with pytest.raises(LinkLostError):
        ends.calls.drop(PARTS, BlockRef(block(1)))


def test_an_answer_that_nobody_asked_for_ends_the_link(ends: SimpleNamespace) -> None:
    send_answer(ends.far, PARTS, 99, done=True)
    until(lambda: len(ends.lost) == 2, "both ends hear of it")
    assert "which was not asked" in ends.lost[0].message


def test_an_answer_that_does_not_come_is_waited_for_no_longer(
    ends: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And if it comes after all it is taken, and belongs to nobody."""
    monkeypatch.setattr(block_calls, "ANSWER_S", 0.01)
    held = ends.blocks.memories[PARTS]
    answered: list[int] = []

    class Slow:
        largest_bytes = LENDS

        def get(self, ref: BlockRef) -> memoryview | None:
            until(lambda: answered, "the caller has given up")
            return memoryview(b"late")

    ends.blocks.memories[PARTS] = Slow()
    with pytest.raises(LinkLostError, match="nothing was heard of a block"):
        ends.calls.get(PARTS, BlockRef(block(1)), 4)
    answered.append(1)
    monkeypatch.setattr(block_calls, "ANSWER_S", 30.0)
    ends.blocks.memories[PARTS] = held
    assert ends.calls.get(PARTS, BlockRef(block(1)), 4) is None
    assert not ends.lost
