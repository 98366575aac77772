"""NIXL as RDMA needs it: memory that the other end may write to, and writing to the other end's.

Only network devices that do RDMA are named to UCX, which does the work below NIXL: on every other one it would open a
port for TCP, and take in whoever comes. NIXL's own way to pass descriptors on is Python's pickle, which nothing here
uses; what it says of itself (`metadata`) has a form of its own. See NIXL 1.5, `nixl/_api.py`, and `UCX_NET_DEVICES`.
"""

from __future__ import annotations

import importlib
import importlib.util
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

_SYSFS = Path("/sys/class/infiniband")
_ACTIVE = "4: ACTIVE"


class Agent(Protocol):
    """What writes to other processes' memory, and lets others write here. All but the constructor raise `OSError`. Any
    thread."""

    def register(self, memory: npt.NDArray[np.uint8]) -> None:
        """Before anything is written from it or to it."""

    def metadata(self) -> bytes:
        """What another agent needs to write to what is registered here."""

    def meet(self, metadata: bytes) -> str:
        """The other agent's name, from what it says of itself."""

    def write(self, source: int, nbytes: int, other: str, target: int) -> Callable[[], bool]:
        """Begin to write bytes at an address here to an address there. What is returned says whether they are there."""

    def close(self) -> None:
        """Nobody writes here any more once it returns."""


def rdma_devices(folder: Path = _SYSFS) -> tuple[str, ...]:
    """This machine's network devices that do RDMA and whose first port has a link, by name. `folder` is where Linux
    describes them."""
    if not folder.is_dir():
        return ()
    states = {each.name: each / "ports" / "1" / "state" for each in sorted(folder.iterdir())}
    return tuple(name for name, state in states.items() if state.is_file() and state.read_text().strip() == _ACTIVE)


def is_installed() -> bool:
    """Whether NIXL is: `pip install vramancer[rdma]`."""
    return importlib.util.find_spec("nixl") is not None


class NixlAgent:
    """An `Agent` by NIXL over UCX, on some of this machine's network devices; none: on those that UCX chooses."""

    def __init__(self, devices: Sequence[str]) -> None:
        """Raises `OSError` where there can be none."""
        with _as_os_error():
            api = importlib.import_module("nixl._api")
            config = api.nixl_agent_config(backends=[], sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT)
            self._agent: Any = api.nixl_agent(secrets.token_hex(16), config)
            options = self._agent.get_plugin_params("UCX")
            if devices:
                options["device_list"] = ", ".join(devices)
            self._agent.create_backend("UCX", options)
        self._registered: list[Any] = []
        self._kept: list[npt.NDArray[np.uint8]] = []
        self._met: list[str] = []

    def register(self, memory: npt.NDArray[np.uint8]) -> None:
        self.register_at(memory.ctypes.data, memory.nbytes)
        self._kept.append(memory)

    def register_at(self, address: int, nbytes: int, gpu: int | None = None) -> None:
        """Memory that somebody else keeps until `close`: main memory, or a GPU's by its index in this process. Raises
        `OSError`."""
        with _as_os_error():
            described = [(address, nbytes, gpu or 0, "")]
            self._registered.append(self._agent.register_memory(described, _kind(gpu), ["UCX"]))

    def metadata(self) -> bytes:
        with _as_os_error():
            return bytes(self._agent.get_agent_metadata())

    def meet(self, metadata: bytes) -> str:
        with _as_os_error():
            self._met.append(self._agent.add_remote_agent(metadata).decode())
            return self._met[-1]

    def write(
        self, source: int, nbytes: int, other: str, target: int, gpus: tuple[int | None, int | None] = (None, None),
        then: bytes = b"",
    ) -> Callable[[], bool]:  # fmt: skip
        """See `Agent`. `gpus`: whose memory the two addresses are, main memory's if None. Once the bytes are there, the
        other agent hears `then`, if it is not empty."""
        agent = self._agent
        with _as_os_error():
            ends = [
                agent.get_xfer_descs([(address, nbytes, gpu or 0)], _kind(gpu))
                for address, gpu in zip((source, target), gpus, strict=True)
            ]
            handle = agent.initialize_xfer("WRITE", *ends, other, then, ["UCX"])
            state = agent.transfer(handle, then)

        def is_there() -> bool:
            nonlocal state
            with _as_os_error():
                if state == "PROC":
                    state = agent.check_xfer_state(handle)
                if state == "PROC":
                    return False
                agent.release_xfer_handle(handle)
            if state != "DONE":
                raise OSError(f"a transfer by NIXL has ended as {state}")
            return True

        return is_there

    def tell(self, other: str, what: bytes) -> None:
        """Raises `OSError`."""
        with _as_os_error():
            self._agent.send_notif(other, what)  # its only backend: naming it fails in NIXL 1.5

    def heard(self) -> list[bytes]:
        """What other agents have told since it was asked last, in order. Raises `OSError`."""
        with _as_os_error():
            return [what for told in self._agent.get_new_notifs(["UCX"]).values() for what in told]

    def close(self) -> None:
        with _as_os_error():
            for other in self._met:
                self._agent.remove_remote_agent(other)
            for registered in self._registered:
                self._agent.deregister_memory(registered, ["UCX"])
        self._agent = None
        self._registered.clear()
        self._kept.clear()


def _kind(gpu: int | None) -> str:
    """What NIXL calls the memory."""
    return "DRAM" if gpu is None else "VRAM"


@contextmanager
def _as_os_error() -> Iterator[None]:
    """NIXL's errors have no base of their own."""
    try:
        yield
    except Exception as error:
        raise OSError(f"NIXL: {error}") from error
