"""How many threads CPU stages compute with: all when one stage works at a time, a share when all work at once."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


class CpuThreads:
    """Shared by the kernels of one model's stages. `current` is read at every call and set between steps."""

    def __init__(self, per_device: int, num_cpu_stages: int = 1, cores: int | None = None) -> None:
        self.alone = per_device
        self.together = max(1, min(per_device, (cores or usable_cores()) // max(1, num_cpu_stages)))
        self.current = per_device

    def overlap(self, several: bool) -> None:
        """Whether several stages work at the same time from now on."""
        self.current = self.together if several else self.alone

    def __call__(self) -> int:
        return self.current
