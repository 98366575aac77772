"""Device specifications as text."""

from __future__ import annotations

import subprocess
import sys

import pytest

from core.devices import parse_devices
from core.devices.device import DeviceSpeed
from core.errors import DeviceError

GIB = 1024**3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cpu", [("cpu", "cpu", 0, None)]),
        ("cpu=2GiB,cpu=1GiB", [("cpu#0", "cpu", 0, 2 * GIB), ("cpu#1", "cpu", 0, GIB)]),
        ("cuda:0=24GiB, cuda:1 = 16 GiB", [("cuda:0", "cuda", 0, 24 * GIB), ("cuda:1", "cuda", 1, 16 * GIB)]),
        ("cuda", [("cuda:0", "cuda", 0, None)]),
        ("cuda=1GiB,cuda:0=1GiB", [("cuda:0#0", "cuda", 0, GIB), ("cuda:0#1", "cuda", 0, GIB)]),
        ("rocm:1=1.5GiB", [("rocm:1", "rocm", 1, 3 * GIB // 2)]),
        ("mps=500MB", [("mps", "mps", 0, 500_000_000)]),
        ("cpu=1gib,mps", [("cpu", "cpu", 0, GIB), ("mps", "mps", 0, None)]),
    ],
)
def test_what_is_understood(text: str, expected: list[tuple[str, str, int, int | None]]) -> None:
    assert [(spec.name, spec.kind, spec.ordinal, spec.limit_bytes) for spec in parse_devices(text)] == expected


def test_emulated_devices_have_a_speed() -> None:
    first, second = parse_devices("sim=24GiB@936GB/s/71TFLOPS,sim=16GiB@896GB/s/44.5TFLOPS")
    assert (first.name, first.limit_bytes, first.speed) == ("sim#0", 24 * GIB, DeviceSpeed(936e9, 71e12))
    assert (second.name, second.speed) == ("sim#1", DeviceSpeed(896e9, 44.5e12))
    assert first.physical_name == "cpu"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "unknown device ''"),
        ("gpu", "unknown device 'gpu'"),
        ("cpu=1GiB,", "unknown device ''"),
        ("cpu:1", "takes no number"),
        ("cpu=", "'' is not a size"),
        ("cuda:0=24", "'24' is not a size"),
        ("cuda:0=-1GiB", "is not a size"),
        ("cuda:0=0GiB", "above 0"),
        ("cuda:0=9999999999TiB", "below"),
        ("sim=4GiB", "sim needs a speed"),
        ("sim=4GiB@fast", "'fast' is not a speed"),
        ("sim=4GiB@0GB/s/1TFLOPS", "above 0"),
        ("cpu=4GiB@1GB/s/1TFLOPS", "only sim takes a speed"),
        ("cpu=1GiB,cpu", "each needs a limit"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(DeviceError, match=said) as caught:
        parse_devices(text)
    assert "Allowed" in caught.value.message or "each needs a limit" in caught.value.message


def test_parsing_needs_no_torch() -> None:
    code = "import sys, core.devices as d; d.parse_devices('cpu=1GiB'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
