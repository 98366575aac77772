"""Which address the cluster uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError
from core.network import interfaces
from core.network.interfaces import Interface, cluster_address, kind_of

KNOWN = {
    "127.0.0.1": ("lo", None),
    "10.0.0.7": ("eth0", "10.0.0.255"),
    "192.168.3.4": ("usb0", "192.168.3.255"),
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces, "addresses", lambda: KNOWN)


def outward(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    """What leads to other networks."""

    class Socket:
        def __init__(self, *kind: object) -> None: ...
        def __enter__(self) -> Socket:
            return self

        def __exit__(self, *error: object) -> None: ...
        def connect(self, to: Any) -> None:
            if address is None:
                raise OSError("Network is unreachable")

        def getsockname(self) -> tuple[str | None, int]:
            return address, 1

    monkeypatch.setattr(interfaces.socket, "socket", Socket)


@pytest.mark.parametrize(("chosen", "found"), [("usb0", "192.168.3.4"), ("10.0.0.7", "10.0.0.7"), ("lo", "127.0.0.1")])
def test_one_that_is_chosen_by_name_or_by_address(chosen: str, found: str) -> None:
    assert cluster_address(chosen) == found


@pytest.mark.parametrize("chosen", ["eth1", "10.0.0.8", "0.0.0.0"])
def test_one_that_is_not_there(chosen: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cluster_address(chosen)
    assert chosen in caught.value.message
    assert "eth0 (10.0.0.7)" in caught.value.message


@pytest.mark.parametrize(
    ("leads", "found"), [("192.168.3.4", "192.168.3.4"), (None, "10.0.0.7"), ("0.0.0.0", "10.0.0.7")]
)
def test_else_the_one_that_leads_elsewhere(monkeypatch: pytest.MonkeyPatch, leads: str | None, found: str) -> None:
    outward(monkeypatch, leads)
    assert cluster_address(None) == found


def test_a_machine_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    outward(monkeypatch, None)
    monkeypatch.setattr(interfaces, "addresses", lambda: {"127.0.0.1": ("lo", None)})
    assert cluster_address(None) == "127.0.0.1"


def described(folder: Path, name: str, number: str = "1", *, driver: str | None = None, wireless: bool = False) -> None:
    """As Linux would."""
    about = folder / name
    (about / "wireless" if wireless else about).mkdir(parents=True)
    (about / "type").write_text(f"{number}\n")
    if driver is not None:
        (folder / "drivers" / driver).mkdir(parents=True, exist_ok=True)
        (about / "device").mkdir()
        (about / "device" / "driver").symlink_to(folder / "drivers" / driver)


def test_what_kind_of_interface_it_is(tmp_path: Path) -> None:
    described(tmp_path, "lo", "772")
    described(tmp_path, "enp5s0", driver="igc")
    described(tmp_path, "wlan0", driver="iwlwifi", wireless=True)
    described(tmp_path, "thunderbolt0", driver="thunderbolt-net")
    described(tmp_path, "ib0", "32", driver="mlx5_core")
    described(tmp_path, "docker0")
    names = ("lo", "enp5s0", "wlan0", "thunderbolt0", "ib0", "docker0", "en0", "")
    assert [kind_of(name, tmp_path) for name in names] == [
        "loopback", "ethernet", "wifi", "thunderbolt", "infiniband", "virtual", "unknown", "unknown",
    ]  # fmt: skip


def test_the_interface_of_an_address() -> None:
    assert Interface.of("10.0.0.7").name == "eth0"
    assert Interface.of("10.9.9.9") == Interface("10.9.9.9", "unknown")
