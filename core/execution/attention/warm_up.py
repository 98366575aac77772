"""Compiles, when a model is loaded, every attention kernel that serving it can ask for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch

from core.devices import Device
from core.errors import DeviceError, VRAMancerError
from core.execution.attention.interface import AttentionBackend
from core.execution.attention.select import AttentionBackends
from core.execution.attention.triton_variants import AttentionKind
from core.logs import get_logger

logger = get_logger(__name__)


def warm_up_attention(
    stages: Sequence[tuple[Device, frozenset[AttentionKind]]], lenders: Sequence[Device], backends: AttentionBackends
) -> None:
    """On each stage's device the kernels of its layers; where memory may be lent, on every device those of partial
    attention for all layers. Progress is logged.

    Args:
        stages: device and kinds of each stage's layers.
        lenders: devices that may come to hold pages of any stage; none if nothing is lent.

    Raises:
        DeviceError: a card refuses a kernel. `UnsupportedModelError`: heads are too large for it.
    """
    for device, kinds in stages:
        _warm_up(device, kinds, backends, partial=False)
    if lenders:
        everything = frozenset(kind for _, kinds in stages for kind in kinds)
        for device in lenders:
            _warm_up(device, everything, backends, partial=True)


def warm_up_lender(
    device: Device, kinds: Iterable[AttentionKind], backend_of: Callable[[Device], AttentionBackend]
) -> None:
    """The kernels of partial attention alone, for stages that are not here. Raises as `warm_up_attention` does."""
    _warm_up(device, kinds, backend_of, partial=True)


def _warm_up(
    device: Device, kinds: Iterable[AttentionKind], backends: Callable[[Device], AttentionBackend], *, partial: bool
) -> None:
    started_s = time.perf_counter()

    def on_kernel(done: int, total: int) -> None:
        spent_s = round(time.perf_counter() - started_s, 1)
        logger.info("attention kernel", device=device.name, ready=f"{done} of {total}", seconds=spent_s)

    try:
        backends(device).warm_up(kinds, torch.device(device.torch_device), partial=partial, on_kernel=on_kernel)
    except VRAMancerError:
        raise
    except Exception as error:  # whatever Triton raises, requests would meet it later
        raise DeviceError(f"{device.name} cannot run a kernel that this model's attention needs: {error}") from error
