"""Triton is used where its kernel works, and nowhere else: not because it can be imported."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plain_settings import make_settings
from tiny_models import build_tiny

from core.devices import Device
from core.engine.model_plan import measure_with, plan_model
from core.errors import DeviceError, UnsupportedModelError
from core.execution.attention import triton_probe
from core.execution.attention.select import AttentionBackends, planned_gathering, select_attention
from core.execution.attention.triton_variants import AttentionKind, GpuLimits, Heads
from core.execution.attention.warm_up import warm_up_attention
from core.models.architecture import read_architecture
from core.models.resolve import resolve_model
from core.profiling import diagnosis
from core.transfer import TransferManager

CARD = Device("card", 0, "cuda", "cpu", 1 << 26)
"""A card whose tensors are on the CPU: Triton has no driver for it, or interprets its kernels."""

_INTERPRETED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from execution.test_triton_selection import CARD
from plain_settings import make_settings
from core.execution.attention import triton_probe
from core.execution.attention.select import planned_gathering, select_attention
from core.execution.attention.triton_paged import TritonPagedAttention
from core.models.architecture import read_architecture
settings, architecture, right = make_settings(), read_architecture(Path({model!r})), TritonPagedAttention.attend
for factor in (1.0, 1.01, float("nan")):
    TritonPagedAttention.attend = lambda self, *args: right(self, *args) * factor
    triton_probe.probe_triton.cache_clear()
    gathers = planned_gathering([CARD], settings, architecture, 64) > 0
    print("times", factor, select_attention(CARD, settings, 1)[0].name, gathers)
"""


@pytest.fixture(autouse=True)
def ask_anew() -> Iterator[None]:
    triton_probe.probe_triton.cache_clear()
    yield
    triton_probe.probe_triton.cache_clear()


def test_a_kernel_is_used_if_its_numbers_are_right_and_the_plan_goes_by_that(tmp_path: Path) -> None:
    """Kernels run in Triton's interpreter, in a process of their own; results are spoilt by a factor."""
    pytest.importorskip("triton")
    tests = Path(__file__).parent.parent
    build_tiny("llama", tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED.format(tests=str(tests), model=str(tmp_path / "model"))],
        env={"TRITON_INTERPRET": "1", "PYTHONPATH": str(tests.parent), "PATH": os.defpath, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stdout.splitlines() if line.startswith("times")]
    assert said == ["times 1.0 triton False", "times 1.01 torch True", "times nan torch True"]
    assert (done.stdout + done.stderr).count("a Triton kernel is off by") == 2


def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [record.msg for record in caplog.records if isinstance(record.msg, dict)]


def test_a_kernel_that_fails_is_not_and_the_plan_knows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Triton can be imported here, but finds no card."""
    pytest.importorskip("triton")
    build_tiny("llama", tmp_path)
    settings, architecture = make_settings(), read_architecture(tmp_path)
    assert planned_gathering([CARD], settings, architecture, 64) > 0
    assert select_attention(CARD, settings, 1)[0].name == "torch"
    assert select_attention(CARD, settings, 1)[0].name == "torch"
    (warning,) = logged(caplog)
    assert warning["level"] == "warning" and "a Triton kernel failed" in str(warning["reason"])


def test_doctor_says_why_a_card_attends_in_plain_torch() -> None:
    pytest.importorskip("triton")
    told = SimpleNamespace(attention=select_attention(CARD, make_settings(), 1)[0].name)
    (warning,) = diagnosis._kernel_warnings(make_settings(), [CARD], [told])  # type: ignore[list-item]
    assert warning.startswith("card attends in plain torch: a Triton kernel failed: ")


def test_without_triton_the_reason_is_that(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert select_attention(CARD, make_settings(), 1)[0].name == "torch"
    assert logged(caplog)[0]["reason"] == "Triton is not installed"


class _Compiling:
    """A backend that says what it is asked to make ready."""

    name = "compiling"

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[tuple[set[AttentionKind], bool]] = []
        self._error = error

    def warm_up(self, kinds, device, *, partial, on_kernel) -> None:
        if self._error is not None:
            raise self._error
        self.asked.append((set(kinds), partial))
        on_kernel(1, 2)


def kind(dim: int) -> AttentionKind:
    return AttentionKind(Heads(2, 1, dim, dim, torch.float16), 16, has_window=False, has_softcap=False, sinks=None)


def backends_of(**named: _Compiling) -> AttentionBackends:
    backends = AttentionBackends(make_settings(), lambda: 1)
    backends._made = {name: (backend, None) for name, backend in named.items()}
    return backends


def test_lenders_make_ready_what_all_stages_ask_for(caplog: pytest.LogCaptureFixture) -> None:
    a, b, c = (Device(name, index, "cuda", "cpu", 1) for index, name in enumerate("abc"))
    made = {name: _Compiling() for name in "abc"}
    stages = [(a, frozenset({kind(64)})), (b, frozenset({kind(128)}))]
    with caplog.at_level(logging.INFO):
        warm_up_attention(stages, (), backends_of(**made))
    assert [each.asked for each in made.values()] == [[({kind(64)}, False)], [({kind(128)}, False)], []]
    assert [(log["device"], log["ready"]) for log in logged(caplog)] == [("a", "1 of 2"), ("b", "1 of 2")]
    warm_up_attention(stages, (a, b, c), backends_of(**made))
    assert all(each.asked[-1] == ({kind(64), kind(128)}, True) for each in made.values())


def test_heads_that_fit_no_kernel_of_a_card_are_refused_by_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any weight is read."""
    fake = SimpleNamespace(name="triton", limits=GpuLimits("cuda", 75, 64 * 1024))
    monkeypatch.setattr("core.execution.attention.select.open_triton", lambda device: fake)
    for dim in (256, 512):
        build_tiny("llama", tmp_path / str(dim), head_dim=dim)
        settings, resolved = (
            make_settings(model__name=str(tmp_path / str(dim))),
            resolve_model(str(tmp_path / str(dim))),
        )
        plan = partial(plan_model, resolved, [CARD], settings, measure_with(settings, TransferManager()))
        if dim == 256:
            assert [stage.device_name for stage in plan().placement.stages] == ["card"]
        else:
            with pytest.raises(UnsupportedModelError, match=r"card cannot serve llama: heads of 512 .* float32"):
                plan()


def test_a_card_that_refuses_a_kernel_fails_the_load_by_name() -> None:
    stages = [(CARD, frozenset({kind(64)}))]
    with pytest.raises(DeviceError, match=r"card cannot run a kernel .* out of resource"):
        warm_up_attention(stages, (), backends_of(card=_Compiling(RuntimeError("out of resource"))))
    with pytest.raises(UnsupportedModelError, match="too large"):
        warm_up_attention(stages, (), backends_of(card=_Compiling(UnsupportedModelError("too large"))))
