"""Tensors of a link by a process group of two. Where there is no GPU, gloo stands for NCCL: the rest is the same."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cluster.groups import CPU, means
from steering import LONGEST_WAIT_S, until
from torch import distributed

from core.cluster import gpu_direct
from core.cluster.failures import Failure
from core.cluster.gpu_direct import NixlPair
from core.cluster.group_path import GroupPath, Has, Means, nccl_here
from core.cluster.hosted_stage import NodeEnd
from core.cluster.link_store import LinkStore
from core.cluster.remote_stage import MasterEnd
from core.cluster.stage_wire import RemoteInlet
from core.devices import Device
from core.errors import NetworkError, ProtocolError
from core.network.frames import Flag, Header, Opcode, write_header
from core.network.link import Link
from core.network.nixl_agent import NixlAgent, is_installed

STAGE = 5

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch has no process groups here")


class Arrivals:
    """A stage that keeps what arrives."""

    def __init__(self) -> None:
        self.came: list[tuple[int, torch.Tensor | Failure | None]] = []

    def arrive(self, step: int, what: torch.Tensor | Failure | None) -> None:
        self.came.append((step, what))


class Ends:
    """A master's and a node's end of a link, in this process."""

    def __init__(self, near: Means | None, far: Means | None) -> None:
        ours, theirs = socket.socketpair()
        self.stage, self.lost = Arrivals(), list[NetworkError]()
        self.here = MasterEnd({}, near)
        self.there = NodeEnd({STAGE: self.stage}, self.lost.append, far)  # type: ignore[dict-item]
        self.near = Link(ours, 0, 1, self.here, name="near")
        self.far = Link(theirs, 1, 0, self.there, name="far")
        self.here.attach(self.near)
        self.there.attach(self.far)
        self.near.start()
        self.far.start()
        device = Device("a GPU", 0, "cpu", "cpu", 1 << 30)
        self.moved: list[tuple[int, float]] = []
        path = self.here.path
        self.inlet = RemoteInlet(self.near, STAGE, device, path, lambda *moved: self.moved.append(moved))

    def put(self, step: int, hidden: torch.Tensor) -> torch.Tensor:
        """What arrives."""
        self.inlet.put(step, hidden)
        until(lambda: bool(self.stage.came) or bool(self.lost), "hidden states")
        number, what = self.stage.came.pop()
        assert number == step and isinstance(what, torch.Tensor)
        return what

    def close(self) -> None:
        for link, end in ((self.near, self.here), (self.far, self.there)):
            link.close()
            end.path.close()


@pytest.fixture(autouse=True)
def quicker(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Probes are sent; which way was quicker is what this says."""
    found, timed = [True], GroupPath._time

    def time(self: GroupPath, *, by_group: bool) -> float:
        timed(self, by_group=by_group)
        return 1.0 if by_group is found[0] else 2.0

    monkeypatch.setattr(GroupPath, "_time", time)
    return found


@pytest.fixture
def ends() -> Iterator[Ends]:
    pair = Ends(means("first"), means("second"))
    assert pair.here.path.open()
    until(lambda: pair.there.path.is_used, "both ends know")
    yield pair
    pair.close()


def test_hidden_states_go_by_the_group(ends: Ends) -> None:
    flags: list[int] = []

    def announced(header: Header, keep: bool) -> None:
        flags.append(header.flags)
        ends.there.announced(header, keep)

    ends.far.elsewhere = announced
    before = ends.near.stats.sent_bytes
    for step, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        hidden = torch.randn(1, 7, 64).to(dtype)
        came = ends.put(step, hidden)
        assert came.dtype is dtype and torch.equal(came, hidden) and came.data_ptr() != hidden.data_ptr()
    turned = torch.randn(1, 8, 4).transpose(1, 2)
    assert torch.equal(ends.put(9, turned), turned)
    assert flags == [Flag.ELSEWHERE] * 4 and [nbytes for nbytes, _ in ends.moved] == [1792, 896, 896, turned.nbytes]
    assert ends.near.stats.sent_tensors == ends.far.stats.received_tensors == 4
    assert ends.near.stats.sent_bytes == before + 7 * 64 * 8 + turned.nbytes


def test_both_directions(ends: Ends) -> None:
    came: list[torch.Tensor] = []
    tensor = torch.arange(12.0).reshape(1, 3, 4)

    class Takes:
        def take(self, header: Header, what: torch.Tensor | memoryview) -> None:
            assert isinstance(what, torch.Tensor)
            came.append(what)

        def lose(self, error: NetworkError) -> None: ...

    ends.here.stages[STAGE] = Takes()  # type: ignore[index]
    RemoteInlet(ends.far, STAGE, ends.inlet.device, ends.there.path).put(3, tensor)
    until(lambda: bool(came), "hidden states")
    assert torch.equal(came[0], tensor)


def test_hidden_states_of_another_epoch_are_dropped(ends: Ends) -> None:
    ends.near.epoch = 1
    ends.inlet.put(1, torch.zeros(1, 1, 8))
    ends.near.epoch = 0
    hidden = torch.ones(1, 1, 8)
    assert torch.equal(ends.put(2, hidden), hidden)
    assert ends.far.stats.stale == 1 and not ends.there._tensors


def test_the_slower_way_is_not_taken(quicker: list[bool]) -> None:
    quicker[0] = False
    pair = Ends(means("first"), means("second"))
    assert not pair.here.path.open() and pair.here.path.device is None
    hidden = torch.randn(1, 2, 8)
    assert torch.equal(pair.put(1, hidden), hidden)
    pair.close()


def broken(store: Any, rank: int) -> Any:
    raise RuntimeError("no NCCL for this driver")


@pytest.mark.parametrize(
    ("near", "far"),
    [
        (means("first"), None),
        (None, means("second")),
        (means("the same"), means("the same")),
        (means("first"), means("second", host="another")),
        (Means(Has("host", "first", "gloo"), CPU, broken), means("second")),
    ],
)
def test_where_it_cannot_be_the_link_carries_them(near: Means | None, far: Means | None) -> None:
    pair = Ends(near, far)
    assert not pair.here.path.open()
    hidden = torch.randn(1, 2, 8)
    assert torch.equal(pair.put(1, hidden), hidden)
    pair.close()


class Stuck:
    """A group whose tensors do not come. As NCCL's, it can be told to wait no more; gloo's cannot."""

    def __init__(self) -> None:
        self.waits, self._aborted = threading.Event(), threading.Event()

    def rank(self) -> int:
        return 1

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Stuck:
        return self

    def wait(self) -> None:
        self.waits.set()
        assert self._aborted.wait(LONGEST_WAIT_S)
        raise RuntimeError("aborted")

    def abort(self) -> None:
        self._aborted.set()


def test_who_waits_for_a_tensor_hears_of_the_end(ends: Ends) -> None:
    """It was announced, and does not come."""
    group = ends.there.path._group = Stuck()
    ends.near.announce(Opcode.HIDDEN, 32, step=1, layer=STAGE, dtype="float32", shape=(1, 1, 8))
    assert group.waits.wait(LONGEST_WAIT_S)
    ends.far.abort("silent")
    until(lambda: bool(ends.lost), "the end")
    assert not ends.there.path.is_used and not ends.stage.came


def test_a_process_that_is_gone_takes_its_group_with_it(ends: Ends) -> None:
    ends.near.announce(Opcode.HIDDEN, 32, step=1, layer=STAGE, dtype="float32", shape=(1, 1, 8))
    ends.near.close()
    ends.here.path.close()
    until(lambda: bool(ends.lost), "the end")
    assert not ends.stage.came


def test_nothing_of_this_without_a_gpu() -> None:
    ours, theirs = socket.socketpair()
    assert torch.cuda.is_available() or nccl_here(ours) is None
    ours.close()
    theirs.close()


@pytest.mark.skipif(not is_installed(), reason="needs NIXL: pip install vramancer[rdma]")
def test_by_nixl_as_between_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In main memory instead of a GPU's, over whatever UCX has; tensors of more pieces than there are slots."""
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    monkeypatch.setattr(gpu_direct, "SLOT_BYTES", 4 << 20)
    near, far = (
        Means(Has("", gpu, "nixl"), CPU, lambda store, rank: NixlPair(store, rank, CPU, lambda: NixlAgent(())))
        for gpu in ("first", "second")
    )
    pair = Ends(near, far)
    assert pair.here.path.open()
    until(lambda: pair.there.path.is_used, "both ends know")
    for step, tokens in enumerate((1, 7, 5_000)):
        hidden = torch.randn(1, tokens, 1024)
        assert torch.equal(pair.put(step, hidden), hidden)
    assert pair.near.stats.sent_gpudirect > 3
    pair.close()


# -- ends that do not keep to it --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (Header(Opcode.HIDDEN, Flag.ELSEWHERE, layer=STAGE, dtype="float16", shape=(4,), nbytes=8), "no process group"),
        (Header(Opcode.STEP, Flag.ELSEWHERE, layer=STAGE, nbytes=8), "STEP without its payload"),
        (Header(Opcode.HIDDEN, Flag.ELSEWHERE, layer=STAGE + 1, nbytes=8), "which is not there"),
        (Header(Opcode.GROUP, layer=1), "a key for a process group that is none"),
        (Header(Opcode.GROUP, layer=3), "a probe for a process group that is none"),
        (Header(Opcode.GROUP, layer=5, step=1), "used that is none"),
        (Header(Opcode.GROUP, layer=0), "cannot be read"),
    ],
)  # fmt: skip
def test_who_does_not_keep_to_it_is_left(header: Header, complaint: str) -> None:
    pair = Ends(None, None)
    pair.near._socket.sendall(write_header(header))
    until(lambda: bool(pair.lost), "the objection")
    assert isinstance(pair.lost[0], ProtocolError) and complaint in pair.lost[0].message
    pair.close()


def test_a_store_is_bounded_and_waits_no_longer_than_the_link_lives() -> None:
    told: list[bytes] = []
    over = [False]
    store = LinkStore(told.append, lambda: over[0])
    store.set("a", b"1\0")
    assert told == [b"a\x001\0"] and store.get("a") == b"1\0" and store.check(["a"]) and not store.check(["a", "b"])
    assert store.delete_key("a") and not store.delete_key("a")
    over[0] = True
    with pytest.raises(TimeoutError, match="has not told"):
        store.get("b")
    for number in range(256):
        store.put(str(number), b"")
    store.put("0", b"again")
    with pytest.raises(ProtocolError, match="too many keys"):
        store.put("256", b"")
