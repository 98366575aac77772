"""What was measured on: processor, cores, library versions."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path

import psutil

from core.config import load_settings

_CPUINFO = Path("/proc/cpuinfo")
PACKAGES = ("torch", "transformers", "llama-cpp-python", "gguf", "safetensors", "numpy")


INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 bf16", "avx512f": "AVX-512", "avx2": "AVX2"}
"""By their names in Linux's `/proc/cpuinfo`, widest first: what decides which kernels are the faster ones."""


def cpu_model() -> str:
    """The processor's name as the system reports it, and its widest instructions that are used."""
    lines = [line.split(":", 1) for line in _CPUINFO.read_text().splitlines()] if _CPUINFO.is_file() else []
    facts = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    names = facts.get("flags", "").split()
    widest = next((said for name, said in INSTRUCTIONS.items() if name in names), None)
    held = {"avx2": "AVX2", "avx512": "AVX-512"}.get(load_settings().engine.cpu_instructions)
    if held and widest != held:
        widest = f"{widest}, held to {held}"
    model = facts.get("model name") or platform.processor() or platform.machine()
    return f"{model} ({widest})" if widest else model


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def package_version(name: str) -> str | None:
    """An installed distribution's version, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def machine_info() -> dict[str, str | int | float | dict[str, str | None]]:
    """Everything a reader of the numbers needs to know about the machine."""
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
    }


class LoadMeter:
    """How much of the machine others used while we measured: 0 is a quiet machine, 1 is a full one."""

    def __init__(self) -> None:
        """Start measuring."""
        self._start_s = time.perf_counter()
        self._busy_s, self._nice_s = self._read()

    @staticmethod
    def _read() -> tuple[float, float]:
        """CPU seconds spent so far by all, and by those of low priority alone (0 where that is not told)."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        counted_twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        return sum(times) - idle - counted_twice, getattr(times, "nice", 0.0)

    def others_share(self, own_cpu_s: float, *, niced: bool = True) -> float:
        """Share of all cores taken by others since the start, given the CPU seconds of the engine measured.

        Without ``niced``, processes of lowered priority are left out: they mostly run when nobody else wants to.
        """
        capacity_s = (time.perf_counter() - self._start_s) * (os.cpu_count() or 1)
        busy_s, nice_s = self._read()
        used_s = busy_s - self._busy_s - own_cpu_s
        if not niced:
            used_s -= nice_s - self._nice_s
        return max(0.0, used_s / capacity_s)


def wait_until_quiet(patience_s: float, limit: float = 0.15) -> None:
    """Return once processes of normal priority have used less than ``limit`` for a second, or after ``patience_s``."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        meter = LoadMeter()
        time.sleep(1.0)
        if meter.others_share(own_cpu_s=0.0, niced=False) < limit:
            return
