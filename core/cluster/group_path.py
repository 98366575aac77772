"""Tensors between two processes of one host from GPU to GPU: by NCCL, past main memory.

A link gets a process group of two that is made for it alone: none of torch's global ones, so no address and no port is
agreed on beforehand. What the two processes need to find each other goes over the link, which has proved who is there
(`LinkStore`). A tensor's frame then goes over the link as before, without its payload, which comes by the group: frames
say what comes, and in which order.

::

    GROUP  layer 0, MessagePack  what this process has: the host, its GPU, what it speaks. `step` 0 asks, 1 answers;
                                 an answer of nothing declines
    GROUP  layer 1               a key of the store, a zero byte, and its value
    GROUP  layer 2               the asked end has made its group
    GROUP  layer 3, a tensor     a probe, by the group or, copied to main memory, by the link
    GROUP  layer 4               it is there, on the GPU
    GROUP  layer 5               `step` is 1 if tensors go by the group from now on, and 0 if not

The end that asks, the master or the worker that connects to another one, times both ways and decides for both
directions. Nothing of this happens unless both ends have a GPU of their own on one host (`nccl_here`),
or each a GPU and a network card that does RDMA (`nixl_here`): then the group is a pair of NIXL agents.
"""

from __future__ import annotations

import datetime as dt
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
import torch
from torch import distributed

from core.cluster.gpu_direct import NixlPair
from core.cluster.tensors import empty_for
from core.decoding import UNREADABLE
from core.devices import Device
from core.errors import LinkLostError, NetworkError, ProtocolError
from core.logs import get_logger
from core.network.connection import Connection
from core.network.frames import Header, Opcode
from core.network.link import Link
from core.network.nixl_agent import NixlAgent, is_installed, rdma_devices
from core.network.shared_memory import may_be_on_one_host

if TYPE_CHECKING:
    from core.cluster.link_store import LinkStore

logger = get_logger(__name__)

GROUP_ASKED_S = 20.0
"""That a link waits at its start for what comes out of it."""
_PATIENCE_S = 10.0
"""That one end waits for the other while the group is made, and for a tensor that was announced."""
_SAYS, _STORES, _MADE, _PROBE, _PROBED, _DECIDES = range(6)
_ASKS, _ANSWERS = 0, 1
_PROBE_BYTES = 4 << 20
_PROBES = 4
_NCCL_ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2", "TORCH_NCCL_ENABLE_MONITORING": "0"}
"""Torch's own answer to a tensor that does not come is to end the process. Here that ends the link."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Has(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one process says of itself: which host (Linux's boot id, or nothing if that does not matter), which GPU, by
    what it sends."""

    host: Annotated[str, msgspec.Meta(max_length=64)]
    gpu: Annotated[str, msgspec.Meta(max_length=64)]
    speaks: Annotated[str, msgspec.Meta(max_length=16)]

    def fits(self, other: Has) -> bool:
        """Two GPUs, of one host if that matters; a group of one GPU with itself does not exist."""
        return (self.host, self.speaks) == (other.host, other.speaks) and self.gpu != other.gpu


@dataclass(frozen=True, slots=True)
class Means:
    """What a process has for this: what it says, the device of the tensors, and what makes the group of a rank."""

    has: Has
    device: torch.device
    make: Callable[[Any, int], Any]


def host_id() -> str:
    """Which run of which machine this is."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""


def nccl_here(sock: Connection) -> Means | None:
    """This process's means for a connection: its first GPU, by NCCL. None without one, without NCCL, for a connection
    to another host, and for one that encrypts: what NCCL sends is in the clear."""
    if hasattr(sock, "binding") or not may_be_on_one_host(sock) or not host_id():
        return None
    if not (torch.cuda.is_available() and distributed.is_available() and distributed.is_nccl_available()):
        return None
    device = torch.device("cuda", 0)
    gpu = str(torch.cuda.get_device_properties(device).uuid)
    return Means(Has(host_id(), gpu, "nccl"), device, _make_nccl)


def nixl_here(sock: Connection) -> Means | None:
    """The same for a connection to another host: its first GPU, by GPUDirect RDMA. None without a card for each."""
    if hasattr(sock, "binding") or may_be_on_one_host(sock) or not torch.cuda.is_available():
        return None
    devices = rdma_devices()
    if not devices or not is_installed():
        return None
    device = torch.device("cuda", 0)
    gpu = f"{torch.cuda.get_device_properties(device).uuid} {host_id()[:18]}"

    def make(store: Any, rank: int) -> NixlPair:
        return NixlPair(store, rank, device, partial(NixlAgent, devices))

    return Means(Has("", gpu, "nixl"), device, make)


def means_for(sock: Connection) -> Means | None:
    """What a process has for a connection, by where the other end is."""
    return nccl_here(sock) or nixl_here(sock)


def _make_nccl(store: Any, rank: int) -> Any:
    """The communicator itself is made when there is first something to send: see `ProcessGroupNCCL::pointToPoint`."""
    for name, value in _NCCL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = distributed.ProcessGroupNCCL.Options()
    options._timeout = dt.timedelta(seconds=_PATIENCE_S)
    return distributed.ProcessGroupNCCL(store, rank, 2, options)


def new_store(tell: Callable[[bytes], None], is_over: Callable[[], bool]) -> LinkStore:
    """See there. Not every torch has process groups, and none needs them but this."""
    from core.cluster.link_store import LinkStore

    return LinkStore(tell, is_over)


class Way(NamedTuple):
    """To another node."""

    link: Link
    path: GroupPath


class GroupPath:
    """Of one end of a link. `attach` it before the link starts; frames with `Opcode.GROUP` are for `take`."""

    def __init__(self, means: Means | None) -> None:
        self._means = means
        self.is_used = False
        self._link: Link | None = None
        self._store = (
            None if means is None else new_store(lambda data: self._say(_STORES, data), lambda: self._error is not None)
        )
        self._group: Any = None
        self._other: Has | None = None
        self._answered = self._asked = self._made = False
        self._probe, self._probed = 0, 0
        self._error: NetworkError | None = None
        self._changed = threading.Condition()
        self._order = threading.Lock()
        self._making: threading.Thread | None = None

    def attach(self, link: Link) -> None:
        self._link = link

    @property
    def device(self) -> torch.device | None:
        """Where the tensors are that go this way; None if none does."""
        return self._means.device if self._means is not None and self.is_used else None

    @property
    def method(self) -> str:
        """What a tensor goes by: nccl, nixl."""
        return self._means.has.speaks if self._means is not None else ""

    def takes_from(self, device: Device) -> bool:
        """Whether what a stage on this device has computed goes this way."""
        return self.device is not None and device.is_here and device.torch_device == str(self.device)

    # -- tensors ----------------------------------------------------------------------------------------------------

    def send(self, opcode: Opcode, tensor: torch.Tensor, *, step: int, layer: int) -> None:
        """A tensor on `device`, contiguous. Nobody may change it before the device has done what is queued by then.
        Raises `LinkLostError`."""
        assert self._link is not None
        name = str(tensor.dtype).removeprefix("torch.")
        with self._order:  # frames and tensors in one order
            self._link.announce(opcode, tensor.nbytes, step=step, layer=layer, dtype=name, shape=tuple(tensor.shape))
            self._move(tensor, sends=True)
            self._link.stats.sent_gpudirect += self._means is not None and self._means.has.speaks == "nixl"

    def receive(self, header: Header) -> torch.Tensor:
        """In the thread that reads: the tensor of a frame that came without it. Raises `ProtocolError`, and
        `LinkLostError` if it does not come."""
        if self._group is None or self._means is None:
            raise ProtocolError("a tensor is announced, and there is no process group")
        tensor = empty_for(header, self._means.device)
        self._move(tensor, sends=False)
        return tensor

    def _move(self, tensor: torch.Tensor, *, sends: bool) -> None:
        assert self._link is not None
        data = [tensor.reshape(-1).view(torch.uint8)]  # gloo does not know every dtype
        rank = self._group.rank()
        try:
            work = self._group.send(data, 1 - rank, 0) if sends else self._group.recv(data, 1 - rank, 0)
            work.wait()  # for NCCL: the current stream waits
            if tensor.is_cuda and not sends:
                torch.cuda.current_stream(tensor.device).synchronize()  # other threads go on with it on other streams
        except RuntimeError as error:
            reason = f"a tensor did not go from GPU to GPU: {error}"
            self._link.abort(reason)  # the other end may wait for it
            raise LinkLostError(f"{self._link.name}: {reason}", node=self._link.name) from error

    # -- agreeing ---------------------------------------------------------------------------------------------------

    def open(self, timeout_s: float = GROUP_ASKED_S) -> bool:
        """Ask the other end, make the group, and time it. Whether it is used. Not in the link's threads."""
        means = self._means
        if means is None or self._asked or self._error is not None:
            return self.is_used
        self._asked, used = True, False
        try:
            self._say(_SAYS, msgspec.msgpack.encode(means.has), _ASKS)
            self._wait_for(lambda: self._answered, timeout_s)
            if self._other is None or not means.has.fits(self._other):
                return False
            self._group = means.make(self._store, 0)
            self._wait_for(lambda: self._made)
            group_s, link_s = self._time(by_group=True), self._time(by_group=False)
            used = group_s < link_s
            self._say(_DECIDES, b"", int(used))
            rates = {"group": f"{_PROBE_BYTES / group_s / 1e9:.2f}", "without": f"{_PROBE_BYTES / link_s / 1e9:.2f}"}
            logger.info("a way between GPUs was timed", link=self._name, is_used=used, unit="GB/s", **rates)
        except (RuntimeError, TimeoutError, NetworkError) as error:
            logger.warning("GPUs are not connected", link=self._name, reason=str(error))
        self.is_used = used
        return used

    def _time(self, *, by_group: bool) -> float:
        """Seconds until a tensor is on the other GPU, at best: the first ones make what the others use."""
        assert self._means is not None and self._link is not None
        taken = []
        for _ in range(_PROBES):
            number = self._probe = self._probe + 1
            probe = torch.full((_PROBE_BYTES,), number, dtype=torch.uint8, device=self._means.device)
            if probe.is_cuda:
                torch.cuda.synchronize(probe.device)
            began_s = time.perf_counter()
            if by_group:
                self.send(Opcode.GROUP, probe, step=number, layer=_PROBE)
            else:
                self._say(_PROBE, probe.cpu().numpy().data, number)
            self._wait_for(lambda number=number: self._probed >= number)  # type: ignore[misc]
            taken.append(time.perf_counter() - began_s)
        return min(taken)

    def _wait_for(self, has_come: Callable[[], bool], timeout_s: float = _PATIENCE_S) -> None:
        """Raises `TimeoutError`."""
        with self._changed:
            self._changed.wait_for(lambda: has_come() or self._error is not None, timeout_s)
            if not has_come():
                raise TimeoutError("the other end does not answer")

    def take(self, header: Header, payload: memoryview, tensor: torch.Tensor | None) -> None:
        """In the thread that reads: a frame with `Opcode.GROUP`. `tensor` is what came by the group. Raises
        `ProtocolError`."""
        layer, data = header.layer, b"" if header.layer == _PROBE else bytes(payload)
        with self._changed:
            if layer == _STORES:
                self._keep(data)
            elif layer == _SAYS and header.step == _ASKS:
                self._asked_for(_decoded(data))
            elif layer == _SAYS:
                self._other, self._answered = (_decoded(data) if data else None), True
            elif layer == _MADE:
                self._made = True
            elif layer == _PROBED:
                self._probed = header.step
            elif layer == _DECIDES:
                self._settle(used=header.step == 1)
            self._changed.notify_all()
        if layer == _PROBE:
            self._probe_came(header, payload if tensor is None else tensor)

    def lose(self, error: NetworkError) -> None:
        """The link has ended: whoever waits for the group, or in it, does so no more."""
        with self._changed:
            self._error = error
            self._changed.notify_all()
        self.is_used = False
        if self._store is not None:
            self._store.wake()
        if self._group is not None:
            self._group.abort()

    def close(self) -> None:
        """After the link has been closed."""
        if self._making is not None:
            self._making.join()
        group, self._group = self._group, None
        if isinstance(group, NixlPair):
            try:
                group.close()
            except RuntimeError as error:
                logger.debug("GPUDirect did not end well", link=self._name, reason=str(error))

    def _keep(self, data: bytes) -> None:
        key, zero, value = data.partition(b"\0")
        if not zero or self._store is None:
            raise ProtocolError("a key for a process group that is none")
        self._store.put(key.decode(errors="replace"), value)

    def _probe_came(self, header: Header, probe: torch.Tensor | memoryview) -> None:
        if self._means is None:
            raise ProtocolError("a probe for a process group that is none")
        if not isinstance(probe, torch.Tensor):
            there = torch.frombuffer(probe, dtype=torch.uint8).to(self._means.device)
            if there.is_cuda:
                torch.cuda.synchronize(there.device)
        self._say(_PROBED, b"", header.step)

    def _asked_for(self, other: Has) -> None:
        if self._making is not None:
            raise ProtocolError("a process group is asked for a second time")
        fits = self._means is not None and self._means.has.fits(other)
        self._making = threading.Thread(target=self._agree, args=(fits,), name=f"vrm-group-{self._name}", daemon=True)
        self._making.start()

    def _agree(self, fits: bool) -> None:
        try:
            means = self._means if fits else None
            self._say(_SAYS, b"" if means is None else msgspec.msgpack.encode(means.has), _ANSWERS)
            if means is not None:
                self._group = means.make(self._store, 1)
                self._say(_MADE)
        except (RuntimeError, TimeoutError, NetworkError) as error:
            logger.warning("GPUs are not connected", link=self._name, reason=str(error))

    def _settle(self, *, used: bool) -> None:
        if used and self._group is None:
            raise ProtocolError("a process group is used that is none")
        self.is_used = used

    @property
    def _name(self) -> str:
        return self._link.name if self._link is not None else ""

    def _say(self, layer: int, data: bytes | memoryview = b"", step: int = 0) -> None:
        assert self._link is not None
        self._link.send(Opcode.GROUP, [data], step=step, layer=layer)


def _decoded(data: bytes) -> Has:
    try:
        return msgspec.msgpack.decode(data, type=Has)
    except UNREADABLE as error:
        raise ProtocolError(f"what a process has for a group cannot be read: {error}") from error
