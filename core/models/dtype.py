"""Which dtype a model is served in, on these devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from core.costs.card_notes import FIRST_WITH_BF16
from core.devices import Device
from core.devices.device import DeviceKind
from core.models.architecture import DTYPES, Architecture, read_architecture
from core.models.served_dtype import choose_dtype
from core.quantization.choice import AS_IT_IS, QuantizeChoice


def compute_capability(device: torch.device) -> int | None:
    """NVIDIA's: 86 for 8.6; None for other devices."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def supports_bf16(kind: DeviceKind, capability: int | None) -> bool:
    """Whether a device computes with bf16 itself: NVIDIA's do from Ampere on. `capability` as `compute_capability`."""
    return kind != "cuda" or capability is None or capability >= FIRST_WITH_BF16


def served_architecture(
    path: Path, asked: str, devices: Sequence[Device], quantize: QuantizeChoice = AS_IT_IS
) -> tuple[Architecture, tuple[str, ...]]:
    """A checkpoint's architecture with the dtype that all of `devices` can serve it in, and what there is to say of it.
    Raises as `read_architecture` and `fit_dtype` do."""
    capabilities = [(device, compute_capability(torch.device(device.torch_device))) for device in devices]
    lacking = [
        f"{device.name} (compute capability {(capability or 0) / 10})"
        for device, capability in capabilities
        if not supports_bf16(device.kind, capability)
    ]
    return fit_dtype(read_architecture(path, asked, quantize), asked, lacking)


def fit_dtype(architecture: Architecture, asked: str, lacking: Sequence[str]) -> tuple[Architecture, tuple[str, ...]]:
    """The architecture in the dtype of `choose_dtype`. Raises what that raises."""
    name, notes = choose_dtype(str(architecture.dtype).removeprefix("torch."), asked, lacking)
    return replace(architecture, dtype=DTYPES[name]), notes
