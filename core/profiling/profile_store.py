"""Measured profiles on disk: one JSON file per device, per link and per set of parts of one processor, named by a hash
of all that the numbers depend on.

A file that cannot be used is as good as none: it is logged, and what it held is measured again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from core.costs import DeviceProfile, LinkProfile, Sharing
from core.devices import Device
from core.devices.readers import open_nvml
from core.logs import get_logger
from core.profiling.noise import Noise

logger = get_logger(__name__)

Facts = Mapping[str, Any]
"""What a measurement depends on, as JSON values."""

_FORMAT = 4  # goes up when files, or the way of measuring, change


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    format: int = Field(ge=_FORMAT, le=_FORMAT)
    measured_at: str
    facts: dict[str, Any]


class _StoredDevice(_Stored):
    bandwidth_bytes_s: float = Field(gt=0)
    flops: tuple[tuple[int, float], ...] = Field(min_length=1)
    layer_overhead_s: float = Field(ge=0)
    step_overhead_s: float = Field(ge=0)
    row_overhead_s: float = Field(ge=0)
    kv_bandwidth_bytes_s: float | None = Field(gt=0)

    @field_validator("flops")
    @classmethod
    def _check_points(cls, value: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        rows = [point[0] for point in value]
        if rows != sorted(set(rows)) or rows[0] < 1 or any(point[1] <= 0 for point in value):
            raise ValueError("rows must ascend from 1 or more, and rates be above 0")
        return value


class _StoredLink(_Stored):
    bandwidth_bytes_s: float = Field(gt=0)
    latency_s: float = Field(ge=0)


class _StoredSharing(_Stored):
    reading: float = Field(ge=1)
    computing: float = Field(ge=1)


class _StoredNoise(_Stored):
    busy: float = Field(ge=0, le=1)


_KINDS: dict[str, type[_Stored]] = {
    "device": _StoredDevice, "link": _StoredLink, "sharing": _StoredSharing, "noise": _StoredNoise,
}  # fmt: skip


class ProfileStore:
    """Profiles under `directory`, which is made when something is kept. Any number of processes may share it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, kind: str, facts: Facts) -> Path:
        """The file of a "device", the "noise" while it was measured, a "link", or the "sharing" of parts."""
        return self.directory / f"{kind}-{key_of(facts)}.json"

    def load(self, kind: str, facts: Facts) -> dict[str, Any] | None:
        """What was measured with these facts: fields of `DeviceProfile`, `Noise`, `LinkProfile` or `Sharing`; None:
        nothing."""
        path = self.path(kind, facts)
        try:
            stored = _KINDS[kind].model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            reason = _first_error(error) if isinstance(error, ValidationError) else str(error)
            logger.warning("a stored profile cannot be used; measuring again", path=str(path), reason=reason)
            return None
        if key_of(stored.facts) != key_of(facts):
            logger.warning("a stored profile is another one's; measuring again", path=str(path))
            return None
        return stored.model_dump(exclude=set(_Stored.model_fields))

    def save(self, kind: str, facts: Facts, profile: DeviceProfile | LinkProfile | Sharing | Noise) -> None:
        """Keep what `load` gives back; a disk that cannot is logged.

        Written beside, then moved: readers see the old file or the new one, never half of one.
        """
        names = [name for name in _KINDS[kind].model_fields if name not in _Stored.model_fields]
        values = {name: getattr(profile, name) for name in names}
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        content = json.dumps({"format": _FORMAT, "measured_at": now, "facts": dict(facts), **values}, indent=2)
        path = self.path(kind, facts)
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, written = tempfile.mkstemp(dir=self.directory, prefix=".profile-")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(content)
                Path(written).replace(path)
            except OSError:
                Path(written).unlink(missing_ok=True)
                raise
        except OSError as error:
            logger.warning("a profile cannot be kept", path=str(path), reason=str(error))


def _first_error(error: ValidationError) -> str:
    found = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, found['loc']))}: {found['msg']}".removeprefix(": ")


_EXECUTION = Path(__file__).parent.parent / "execution"
_KERNEL_SOURCES = (_EXECUTION / "native", _EXECUTION / "attention", _EXECUTION.parent / "quantization")


@functools.cache
def kernel_digest(folders: tuple[Path, ...] = _KERNEL_SOURCES) -> str:
    """A hash of the code that computes layers here: what another one measured says nothing of it."""
    files = sorted(path for folder in folders for path in folder.iterdir() if path.suffix in (".c", ".h", ".py"))
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:32]


def key_of(facts: Facts) -> str:
    """A hash of the facts, the same for the same values in any order."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:32]


def device_facts(device: Device, cpu_threads: int) -> dict[str, Any]:
    """What tells a physical device, as it is used, from others: hardware, driver, and threads of a CPU.

    Parts of one device have the same facts, and so one profile.
    """
    if device.computes_on_cpu:
        return {"kind": "cpu", "product": cpu_name(), "driver": None, "threads": cpu_threads}
    if device.is_mps:
        product = f"Apple GPU, {platform.machine()}, {cpu_name()}"
        return {"kind": "mps", "product": product, "driver": platform.mac_ver()[0], "threads": None}
    product = torch.cuda.get_device_name(device.torch_device)
    driver = _amd_driver() if device.is_amd else _nvidia_driver()
    return {"kind": device.kind, "product": product, "driver": driver, "threads": None}


def cpu_name() -> str:
    """The processor's name, such as "AMD EPYC 7763"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _nvidia_driver() -> str:
    """NVIDIA's driver version by NVML, or by default the CUDA version torch was built with."""
    fallback = f"CUDA {torch.version.cuda}"
    nvml, _ = open_nvml()
    if nvml is None:
        return fallback
    try:
        return str(nvml.nvmlSystemGetDriverVersion())
    except nvml.NVMLError:
        return fallback
    finally:
        nvml.nvmlShutdown()  # sessions are counted: a reader's own stays open


def _amd_driver() -> str:
    try:
        version = Path("/sys/module/amdgpu/version").read_text().strip()
    except OSError:
        version = "in the kernel"
    return f"amdgpu {version}, HIP {torch.version.hip}"
