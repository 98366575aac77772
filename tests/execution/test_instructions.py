"""The switch between what this processor has and what processors before AVX-512 have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from execution.kernel_variants import VARIANTS, load_variant
from plain_settings import CACHE_DIR, make_settings
from torch import nn

from core.config import load_settings
from core.devices import open_devices
from core.errors import ConfigError
from core.execution.attention.select import planned_packing, select_attention
from core.execution.native import PackedLinear
from core.execution.native.instructions import Instructions, compiler_flags

AVX2 = {"engine.cpu_instructions": "avx2"}


def as_another_processor(monkeypatch: pytest.MonkeyPatch, *, bf16: bool) -> None:
    """Whether torch finds instructions for bf16 products."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("core.execution.native.instructions._is_intel", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)


@pytest.mark.parametrize("bf16", [False, True])
def test_avx2_packs_weights_on_any_processor_that_has_it(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    load_variant("avx2")
    as_another_processor(monkeypatch, bf16=bf16)
    for overrides, packs in ((AVX2, True), ({}, not bf16)):
        given = {"runtime.cache_dir": str(CACHE_DIR), "devices.devices": "cpu=1GiB", **overrides}
        settings = load_settings(overrides=given, environ={})
        (device,) = open_devices(settings.devices)
        adapter = select_attention(device, settings, 1)[1]
        assert adapter is not None and adapter.packs == packs
        assert (planned_packing([device], settings, torch.bfloat16) is not None) == packs
        model = nn.Sequential(nn.Linear(128, 64, bias=False)).bfloat16().requires_grad_(False)
        adapter(model)
        assert isinstance(model[0], PackedLinear) == packs
        x = torch.randn(70, 128).bfloat16()
        with torch.inference_mode():
            assert model(x).shape == (70, 64)


def test_the_setting_is_read_from_the_environment() -> None:
    settings = load_settings(environ={"VRM_CPU_INSTRUCTIONS": "avx2"})
    assert settings.engine.cpu_instructions == "avx2" and make_settings().engine.cpu_instructions == "native"


@pytest.mark.parametrize("instructions", ["avx2", "avx512"])
@pytest.mark.parametrize(("machine", "has"), [("arm64", True), ("x86_64", False)])
def test_instructions_that_the_processor_lacks_are_refused(
    monkeypatch: pytest.MonkeyPatch, machine: str, has: bool, instructions: Instructions
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    for name in ("_is_avx2_supported", "_is_avx512_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: has, raising=False)
    with pytest.raises(ConfigError, match=rf"cpu_instructions is {instructions}, which this processor does not have"):
        compiler_flags(instructions)


def test_avx512_is_taken_with_bf16_where_the_processor_has_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True, raising=False)
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has, raising=False)
        (flags,) = compiler_flags("avx512")
        assert ("-mavx512bf16" in flags) == has and "-mavx512vl" in flags and "-mamx-tile" not in flags


def test_flags_by_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for machine in ("x86_64", "AMD64", "arm64", "aarch64"):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        found[machine] = compiler_flags("native")
    assert found["x86_64"] == found["AMD64"] == [["-march=native"], []]
    assert found["arm64"] == found["aarch64"] == [["-mcpu=native"], []]


def test_libraries_of_both_kinds_stay_apart(tmp_path: Path) -> None:
    kinds = [load_variant(name)._library._name for name in ("this processor", "avx2")]
    assert VARIANTS["avx2"].instructions == "avx2" and kinds[0] != kinds[1]
