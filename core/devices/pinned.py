"""Main memory that GPUs copy from and to by themselves.

It is pageable memory that is registered with the GPUs' runtime: torch's own pinned memory is rounded up to powers of
two, and its allocator keeps it when nobody uses it any more.
"""

from __future__ import annotations

import mmap
from typing import Any

import torch

from core.devices.device import DeviceBudget, format_bytes
from core.errors import OutOfDeviceMemoryError
from core.logs import get_logger

logger = get_logger(__name__)

_PORTABLE = 1
"""For all GPUs, not for the current one alone."""


def gpu_runtime() -> Any:
    """The runtime that torch uses, CUDA's or HIP's, initialised. What is called of it returns 0 if all went well."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class HostBuffer:
    """`memory`, uint8 `[nbytes]` in main memory, until `close`. `is_pinned` says whether GPUs may copy by themselves.

    Whole pages of its own, since a page cannot be registered twice. A system that refuses to register them (a limit on
    locked memory, say) leaves them pageable: copies are slower then, and the log says so.
    """

    def __init__(self, purpose: str, nbytes: int, *, pin: bool, budget: DeviceBudget | None = None) -> None:
        """`budget` has `nbytes` reserved for the purpose from now on; None: they have been already.

        Raises `OutOfDeviceMemoryError` if they are not there.
        """
        self._purpose, self._nbytes, self._budget = purpose, nbytes, budget
        self._runtime: Any = None
        if budget is not None:
            budget.reserve(purpose, nbytes)
        try:
            whole = torch.empty(nbytes + 2 * mmap.PAGESIZE if pin else nbytes, dtype=torch.uint8)
        except (RuntimeError, MemoryError) as error:
            self._give_back()
            raise OutOfDeviceMemoryError(
                f"{purpose}: {format_bytes(nbytes)} of main memory could not be had: {error}"
            ) from error
        first = -whole.data_ptr() % mmap.PAGESIZE if pin else 0
        self.memory = whole[first : first + nbytes]
        if pin and nbytes:
            self._register(-(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)

    @property
    def is_pinned(self) -> bool:
        return self._runtime is not None

    def _register(self, whole_pages_bytes: int) -> None:
        runtime = gpu_runtime()
        status = int(runtime.cudaHostRegister(self.memory.data_ptr(), whole_pages_bytes, _PORTABLE))
        if status:
            logger.warning(
                "main memory cannot be pinned, so copies to and from GPUs are slower",
                purpose=self._purpose, bytes=self._nbytes, status=status,
            )  # fmt: skip
        else:
            self._runtime = runtime

    def close(self) -> None:
        """Give the memory back; no copy may be under way. Safe to call twice."""
        if self._runtime is not None:
            status = int(self._runtime.cudaHostUnregister(self.memory.data_ptr()))
            if status:
                logger.warning("main memory stays pinned", purpose=self._purpose, bytes=self._nbytes, status=status)
        self._runtime = None
        self.memory = torch.empty(0, dtype=torch.uint8)
        self._give_back()

    def _give_back(self) -> None:
        if self._budget is not None:
            self._budget.release(self._purpose, self._nbytes)
        self._budget = None
