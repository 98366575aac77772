"""Which of this machine's addresses the cluster uses."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from core.errors import ConfigError
from core.network.discovery import addresses

LOOPBACK = "127.0.0.1"
_SYSFS = Path("/sys/class/net")
_KINDS = {"772": "loopback", "32": "infiniband"}
"""By the number of a link layer's type, from Linux's `if_arp.h`."""
_ELSEWHERE = ("192.0.2.1", 9)
"""An address for documentation, which is on no network: what leads there is what leads anywhere."""


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface. `kind`: loopback, ethernet, wifi, thunderbolt (USB4 too), infiniband, virtual (bridges,
    tunnels, containers' ends), or unknown where the system does not say."""

    name: str
    kind: str

    @classmethod
    def of(cls, address: str) -> Interface:
        """The one that has an address of this machine."""
        name, _ = addresses().get(address, ("", None))
        return cls(name or address, kind_of(name))


def kind_of(name: str, folder: Path = _SYSFS) -> str:
    """See `Interface`. `folder` is where Linux describes interfaces."""
    about = folder / name
    if not name or not about.is_dir():
        return "unknown"
    number = (about / "type").read_text().strip() if (about / "type").is_file() else ""
    driver = about / "device" / "driver"
    if number in _KINDS:
        return _KINDS[number]
    if (about / "wireless").is_dir() or (about / "phy80211").exists():
        return "wifi"
    if driver.exists() and "thunderbolt" in driver.resolve().name:
        return "thunderbolt"
    return "ethernet" if (about / "device").exists() else "virtual"


def cluster_address(chosen: str | None) -> str:
    """The IPv4 address of the interface that is `chosen`, or the address itself. None: of the interface that other
    networks are reached by, else of the first that is up, else loopback.

    Raises:
        ConfigError: this machine has no such interface or address.
    """
    known = addresses()
    if chosen is None:
        return _outward() or next((each for each in known if not each.startswith("127.")), LOOPBACK)
    if chosen in known:
        return chosen
    of_interface = [address for address, (interface, _) in known.items() if interface == chosen]
    if of_interface:
        return of_interface[0]
    there = ", ".join(f"{interface} ({address})" for address, (interface, _) in known.items()) or "none"
    raise ConfigError(
        f"cluster.interface: {chosen!r} is no interface that is up with an IPv4 address, and no such address. "
        f"There are: {there}."
    )


def _outward() -> str | None:
    """Nothing is sent to find out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(_ELSEWHERE)
        except OSError:
            return None
        address = sock.getsockname()[0]
    return None if address == "0.0.0.0" else str(address)
