"""Profiles on disk: what is kept comes back, and what is damaged is as good as not there."""

from __future__ import annotations

import json
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from core.costs import DeviceProfile, LinkProfile, Sharing
from core.devices import Device
from core.profiling.profile_store import ProfileStore, device_facts, kernel_digest, key_of

FACTS = {"kind": "cpu", "product": "a processor", "threads": 2, "dtype": "float32", "shape": {"hidden": 8}}
PROFILE = DeviceProfile(
    "cpu#0", 1.5e10, ((1, 2e9), (16, 3.25e10)), 2e-5, 3e-4, row_overhead_s=4e-6, kv_bandwidth_bytes_s=1.25e10
)


@pytest.fixture
def store(tmp_path: Path) -> ProfileStore:
    return ProfileStore(tmp_path / "profiles")


def load_device(store: ProfileStore, facts: dict[str, Any], name: str = "cpu#0") -> DeviceProfile:
    found = store.load("device", facts)
    assert found is not None
    return DeviceProfile(name, **found)


def test_a_device_comes_back_under_the_name_that_is_asked_for(store: ProfileStore) -> None:
    assert store.load("device", FACTS) is None
    store.save("device", FACTS, PROFILE)
    assert load_device(store, FACTS) == PROFILE
    assert load_device(store, dict(reversed(FACTS.items()))) == PROFILE
    assert load_device(store, FACTS, "cpu#1") == replace(PROFILE, name="cpu#1")


def test_a_link_comes_back(store: ProfileStore) -> None:
    link = LinkProfile(1.16e10, 3e-5, "staged")
    assert store.load("link", FACTS) is None
    store.save("link", FACTS, link)
    found = store.load("link", FACTS)
    assert found is not None and LinkProfile(**found, method="staged") == link
    assert store.load("device", FACTS) is None


def test_what_parts_cost_each_other_comes_back(store: ProfileStore) -> None:
    assert store.load("sharing", FACTS) is None
    store.save("sharing", FACTS, Sharing("cpu", 2, 1.25, 1.0))
    assert store.load("sharing", FACTS) == {"reading": 1.25, "computing": 1.0}
    assert store.load("sharing", FACTS | {"parts": 3}) is None
    path = store.path("sharing", FACTS)
    path.write_text(path.read_text().replace("1.25", "0.5"))
    assert store.load("sharing", FACTS) is None, "nothing gets faster by sharing"


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"threads": 4}, {"shape": {"hidden": 16}}, {"new": None}])
def test_other_facts_are_another_file(store: ProfileStore, change: dict[str, Any]) -> None:
    store.save("device", FACTS, PROFILE)
    assert store.load("device", FACTS | change) is None
    assert key_of(FACTS | change) != key_of(FACTS)


def test_files_are_replaced_whole_and_leave_nothing_beside(store: ProfileStore) -> None:
    store.save("device", FACTS, PROFILE)
    faster = DeviceProfile("cpu#0", 2e10, ((1, 4e9),))
    store.save("device", FACTS, faster)
    assert load_device(store, FACTS) == faster
    assert [path.name for path in store.directory.iterdir()] == [f"device-{key_of(FACTS)}.json"]


def _edited(**changes: Any) -> Any:
    return lambda content: json.dumps(json.loads(content) | changes)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "",
        lambda content: content[: len(content) // 2],
        lambda content: "[1, 2]",
        _edited(bandwidth_bytes_s=0),
        _edited(bandwidth_bytes_s="fast"),
        _edited(bandwidth_bytes_s=math.inf),
        _edited(flops=[]),
        _edited(flops=[[16, 1e9], [1, 1e9]]),
        _edited(flops=[[1, -1.0]]),
        _edited(flops=7),
        _edited(layer_overhead_s=-1e-6),
        _edited(step_overhead_s=None),
        _edited(row_overhead_s=-1e-6),
        _edited(kv_bandwidth_bytes_s=0.0),
        _edited(format=99),
        _edited(surprise=1),
        _edited(facts={"kind": "another"}),
    ],
)
def test_a_damaged_file_is_logged_and_counts_as_none(
    store: ProfileStore, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store.save("device", FACTS, PROFILE)
    path = store.path("device", FACTS)
    path.write_text(damage(path.read_text()))
    with caplog.at_level(logging.WARNING):
        assert store.load("device", FACTS) is None
    assert "measuring again" in caplog.text and "errors.pydantic" not in caplog.text
    store.save("device", FACTS, PROFILE)
    assert load_device(store, FACTS) == PROFILE


def test_bytes_that_are_no_text(store: ProfileStore) -> None:
    store.save("device", FACTS, PROFILE)
    store.path("device", FACTS).write_bytes(b"\xff\x00\xfe")
    assert store.load("device", FACTS) is None


def test_a_place_that_cannot_be_written_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    store = ProfileStore(tmp_path / "file" / "profiles")
    with caplog.at_level(logging.WARNING):
        store.save("device", FACTS, PROFILE)
        assert store.load("device", FACTS) is None
    assert "cannot be kept" in caplog.text


def test_parts_of_a_cpu_are_the_same_device() -> None:
    first, second = (Device(f"cpu#{index}", index, "cpu", "cpu", 1024) for index in range(2))
    assert device_facts(first, 2) == device_facts(second, 2)
    assert device_facts(first, 2) != device_facts(second, 1)
    assert device_facts(first, 2)["product"]


class FakeNvml(ModuleType):
    """A driver, or none."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, opens: bool) -> None:
        super().__init__("pynvml")
        self.opens, self.sessions = opens, 0

    def nvmlInit(self) -> None:
        if not self.opens:
            raise self.NVMLError("no driver")
        self.sessions += 1

    def nvmlShutdown(self) -> None:
        self.sessions -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "575.64"


@pytest.mark.parametrize("opens", [True, False])
def test_a_card_is_known_by_name_and_driver(monkeypatch: pytest.MonkeyPatch, opens: bool) -> None:
    nvml = FakeNvml(opens=opens)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda="12.9", hip=None))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card at {device}")
    facts = device_facts(Device("cuda:1", 0, "cuda", "cuda:1", 1024), 8)
    driver = "575.64" if opens else "CUDA 12.9"
    assert facts == {"kind": "cuda", "product": "Card at cuda:1", "driver": driver, "threads": None}
    assert nvml.sessions == 0


def test_another_kernel_is_another_digest(tmp_path: Path) -> None:
    source = tmp_path / "dot.c"
    source.write_text("int a;")
    (tmp_path / "notes.txt").write_text("")
    digests = []
    for content in ("int a;", "int b;", "int a;"):
        source.write_text(content)
        kernel_digest.cache_clear()
        digests.append(kernel_digest((tmp_path,)))
    assert digests[0] == digests[2] != digests[1]
    source.rename(tmp_path / "product.c")
    kernel_digest.cache_clear()
    assert kernel_digest((tmp_path,)) != digests[0]
    kernel_digest.cache_clear()
    assert kernel_digest() == kernel_digest()
