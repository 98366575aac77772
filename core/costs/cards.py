"""Cards by name, with the figures of their makers, for planning without them. What is measured overrides them.

`flops` is the dense matrix rate for bf16 or fp16 with fp32 sums, where the maker distinguishes: NVIDIA's consumer cards
run half as fast with fp32 sums as the advertised rate. Memory is what the name says, in GiB; what can be allocated of
it is less: some tenths of a GiB are the driver's, and macOS gives a GPU about three quarters unless told otherwise.
"""

from __future__ import annotations

import re
from dataclasses import replace
from difflib import get_close_matches

from core.costs import PlacementDevice
from core.costs.profile import DeviceProfile
from core.devices.spec import numbered, parse_devices
from core.errors import DeviceError

GIB = 1024**3

DATASHEET_LAYER_OVERHEAD_S = 0.3e-3
"""Per layer and forward pass, since datasheets have no such figure: what Python and torch's dispatch of a layer's 40
operations take on a host, as it was measured. The card waits for that until whole steps are captured."""

ASSUMED_FLOPS_PER_BYTE = 75
"""Matrix operations per byte of bandwidth where a card's compute is not given: an RTX 3090's; newer ones have more."""

GPU_SYNTAX = (
    'SIZE@BANDWIDTH such as "24GiB@936GB/s", with "/71TFLOPS" after it where the compute rate is known, '
    'or a card such as "3090"; "*2" after either for two of them'
)

_AMPERE = "NVIDIA Ampere GA102 GPU Architecture whitepaper and GeForce RTX 30 specifications"
_ADA = "NVIDIA Ada GPU Architecture whitepaper and GeForce RTX 40 specifications"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper and GeForce RTX 50 specifications"
_TURING = "NVIDIA Turing GPU Architecture whitepaper"
_RADEON = "AMD Radeon RX product specifications, peak half precision"
_APPLE = "Apple technical specifications; compute from GPU cores x 256 operations x clock"

# GiB (several: sold with as much), GB/s, TFLOPS, where they are from; of one name, the smallest first.
_TABLE: tuple[tuple[str, tuple[int, ...], float, float, str], ...] = (
    ("RTX 2060", (6,), 336, 25.8, _TURING),
    ("RTX 2070", (8,), 448, 29.9, _TURING),
    ("RTX 2080 Ti", (11,), 616, 53.8, _TURING),
    ("RTX 3060", (12,), 360, 25.5, _AMPERE),
    ("RTX 3060 Ti", (8,), 448, 32.4, _AMPERE),
    ("RTX 3070", (8,), 448, 40.6, _AMPERE),
    ("RTX 3070 Ti", (8,), 608, 43.5, _AMPERE),
    ("RTX 3080 10GB", (10,), 760, 59.5, _AMPERE),
    ("RTX 3080 12GB", (12,), 912, 61.3, _AMPERE),
    ("RTX 3080 Ti", (12,), 912, 68.2, _AMPERE),
    ("RTX 3090", (24,), 936, 71, _AMPERE),
    ("RTX 3090 Ti", (24,), 1008, 80, _AMPERE),
    ("RTX 4060", (8,), 272, 30.2, _ADA),
    ("RTX 4060 Ti", (8, 16), 288, 44.1, _ADA),
    ("RTX 4070", (12,), 504, 58.3, _ADA),
    ("RTX 4070 Super", (12,), 504, 71, _ADA),
    ("RTX 4070 Ti", (12,), 504, 80.2, _ADA),
    ("RTX 4070 Ti Super", (16,), 672, 88.2, _ADA),
    ("RTX 4080", (16,), 716.8, 97.5, _ADA),
    ("RTX 4080 Super", (16,), 736, 104.4, _ADA),
    ("RTX 4090", (24,), 1008, 165.2, _ADA),
    ("RTX 5060 Ti", (8, 16), 448, 47.4, _BLACKWELL),
    ("RTX 5070", (12,), 672, 61.7, _BLACKWELL),
    ("RTX 5070 Ti", (16,), 896, 87.9, _BLACKWELL),
    ("RTX 5080", (16,), 960, 112.6, _BLACKWELL),
    ("RTX 5090", (32,), 1792, 209.5, _BLACKWELL),
    ("RTX A6000", (48,), 768, 154.8, "NVIDIA RTX A6000 datasheet"),
    ("T4", (16,), 320, 65, "NVIDIA T4 datasheet"),
    ("V100", (16, 32), 900, 125, "NVIDIA V100 datasheet, SXM2"),
    ("L4", (24,), 300, 121, "NVIDIA L4 datasheet, without sparsity"),
    ("L40S", (48,), 864, 362, "NVIDIA L40S datasheet, without sparsity"),
    ("A100 40GB", (40,), 1555, 312, "NVIDIA A100 datasheet"),
    ("A100 80GB", (80,), 1935, 312, "NVIDIA A100 datasheet, PCIe"),
    ("H100 PCIe", (80,), 2000, 756, "NVIDIA H100 datasheet, without sparsity"),
    ("H100 SXM", (80,), 3350, 989, "NVIDIA H100 datasheet, without sparsity"),
    ("H200", (141,), 4800, 989, "NVIDIA H200 datasheet, SXM, without sparsity"),
    ("RX 6800 XT", (16,), 512, 41.5, _RADEON),
    ("RX 7900 XT", (20,), 800, 103, _RADEON),
    ("RX 7900 XTX", (24,), 960, 123, _RADEON),
    ("MI210", (64,), 1638, 181, "AMD Instinct MI210 datasheet"),
    ("MI300X", (192,), 5300, 1307, "AMD Instinct MI300X datasheet, without sparsity"),
    ("M1 Max", (32, 64), 400, 10.4, _APPLE),
    ("M1 Ultra", (64, 128), 800, 20.8, _APPLE),
    ("M2 Max", (32, 64, 96), 400, 13.6, _APPLE),
    ("M2 Ultra", (64, 128, 192), 800, 27.2, _APPLE),
    ("M3 Max 36GB", (36,), 300, 10.7, _APPLE + " (30 cores)"),
    ("M3 Max", (48, 64, 128), 400, 14.3, _APPLE + " (40 cores)"),
    ("M3 Ultra", (96, 256, 512), 819, 28.6, _APPLE + " (80 cores)"),
    ("M4 Max 36GB", (36,), 410, 13.7, _APPLE + " (32 cores)"),
    ("M4 Max", (48, 64, 128), 546, 17.2, _APPLE + " (40 cores)"),
)
_WITHOUT_BF16 = frozenset({"RTX 2060", "RTX 2070", "RTX 2080 Ti", "T4", "V100 16GB", "V100 32GB"})
"""NVIDIA's before Ampere."""

_MAKERS = re.compile(r"\b(nvidia|geforce|quadro|tesla|amd|radeon|instinct|apple)\b|\br(t?)x(?=\b|a?\d)")
_COUNT = re.compile(r"(.+?)\s*\*\s*(\d{1,2})")


def _device(name: str, limit_bytes: int, bandwidth_bytes_s: float, flops: float) -> PlacementDevice:
    profile = DeviceProfile(
        name, bandwidth_bytes_s, ((1, flops),), layer_overhead_s=DATASHEET_LAYER_OVERHEAD_S, source="datasheet"
    )
    return PlacementDevice(name, limit_bytes, profile)


CARDS = tuple(
    _device(f"{name} {size}GB" if len(sizes) > 1 else name, size * GIB, bandwidth * 1e9, tflops * 1e12)
    for name, sizes, bandwidth, tflops, _ in _TABLE
    for size in sizes
)
"""With all of a card's memory."""


def card(name: str) -> PlacementDevice:
    """The card of that name, whatever its case, spaces and maker: "3090", "RTX3090", "NVIDIA GeForce RTX 3090".

    A size may follow: "A100 80GB". Without it, the smallest that is sold is meant, and of an H100 the one for PCIe.

    Raises `DeviceError` if there is no such card; it names those that look like it.
    """
    asked = _key(name)
    for found in CARDS:
        if asked in (_key(found.name), f"{_key(found.name)}{found.limit_bytes // GIB}gb"):
            return found
    for found in CARDS:
        rest = _key(found.name).removeprefix(asked)
        if asked and rest != _key(found.name) and re.fullmatch(r"\d+gb|pcie", rest):
            return found
    keys = {_key(found.name): found.name for found in CARDS}
    close = [keys[key] for key in get_close_matches(asked, keys, n=4, cutoff=0.5)]
    listed = f"Did you mean {', '.join(close)}?" if close else f"Known are {', '.join(keys.values())}."
    raise DeviceError(f"There is no card {name!r}. {listed} Any other can be given as {GPU_SYNTAX}.", param="gpu")


def gpu_spec(*texts: str) -> tuple[PlacementDevice, ...]:
    """The devices that `--gpu` describes, in its order; several of a name become "RTX 3090#0", "RTX 3090#1".

    Raises `DeviceError` if a text does not follow `GPU_SYNTAX`, or names a card that is not known.
    """
    devices = []
    for text in texts:
        counted = _COUNT.fullmatch(text.strip())
        what, count = (counted[1], int(counted[2])) if counted else (text.strip(), 1)
        if count < 1 or "*" in what:
            raise DeviceError(f'gpu "{text}" is no number of cards. Allowed: {GPU_SYNTAX}.', param="gpu")
        devices += [_described(what) if "@" in what else card(what)] * count
    names = numbered([device.name for device in devices])
    return tuple(replace(device, name=name) for device, name in zip(devices, names, strict=True))


def lacks_bf16(device: PlacementDevice) -> bool:
    """Whether a device of `gpu_spec` is a card that does not compute with bf16."""
    return device.name.partition("#")[0] in _WITHOUT_BF16


def _described(text: str) -> PlacementDevice:
    """ "24GiB@936GB/s" with or without "/71TFLOPS"."""
    whole = "flops" in text.lower()
    try:
        (spec,) = parse_devices(f"sim={text if whole else text + '/1TFLOPS'}")
    except (DeviceError, ValueError):
        raise DeviceError(f'gpu "{text}" is no description of a card. Allowed: {GPU_SYNTAX}.', param="gpu") from None
    assert spec.speed is not None and spec.limit_bytes is not None
    bandwidth = spec.speed.bandwidth_bytes_s
    flops = spec.speed.flops if whole else bandwidth * ASSUMED_FLOPS_PER_BYTE
    return _device(text, spec.limit_bytes, bandwidth, flops)


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _MAKERS.sub("", name.lower().replace("-", " ")))
