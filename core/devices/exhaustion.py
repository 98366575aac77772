"""How a device says that it has no memory left."""

from __future__ import annotations

import torch

_MAIN_MEMORY = "DefaultCPUAllocator"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be had. torch's allocator of main memory raises a bare `RuntimeError`."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _MAIN_MEMORY in str(error)
